"""Guests' clocks beside the host's, for a moment: `make drift` does it for ten minutes."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from pyhyve.bhyve.boot.guestimage import GuestImage

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import drift
import host

SECOND = 1_000_000_000


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc, which compiles the guest's program, is not installed")
def test_clocks_run_as_the_host_s_under_load(
    guest_image: GuestImage, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four guests at once, each with more busy processes than it has processors."""
    monkeypatch.setattr(host, "OUTPUT", tmp_path)
    only = "tsc,kvm-clock,hpet,acpi_pm"
    monkeypatch.setattr(sys, "argv", ["drift.py", "--minutes", "0.15", "--only", only, "--json"])
    status = drift.main()
    printed = capsys.readouterr()
    assert status == 0, printed.err
    rows = json.loads(printed.out)["rows"]
    assert ",".join(row["name"] for row in rows) == only
    assert all(abs(row["ppm"]) < drift.LIMIT_PPM and row["seconds"] >= 9 for row in rows)


def burst(exchange: drift.Exchange, monkeypatch: pytest.MonkeyPatch, at: int, clocks: list[tuple[int, int]]) -> None:
    """What the guest writes in a burst that begins at `at`, its clocks being read 10 microseconds before each touch."""
    for number, values in enumerate(clocks):
        monkeypatch.setattr(drift.time, "clock_gettime_ns", lambda clock, now=at + 10_000 * (number + 1): now)
        exchange.write(0, 4, 0)
        for value in values:
            exchange.write(4, 4, value & 0xFFFF_FFFF)
            exchange.write(4, 4, value >> 32)
    exchange.write(0, 4, 1)


def test_drift_is_that_of_the_reading_that_was_least_delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = drift.Exchange(100)
    assert exchange.read(0, 4) == 1
    for second in range(101):
        at = second * SECOND
        gained = second * 50_000  # 50 in a million
        late = at + gained - 3_000_000, at - gained - 3_000_000
        burst(exchange, monkeypatch, at, [late, (at + gained, at - gained), late])
    assert exchange.span == pytest.approx(100, abs=0.001)
    assert exchange.read(0, 4) == 0, "it is enough"
    assert exchange.drift(0) == pytest.approx(50, abs=0.01)
    assert exchange.drift(1) == pytest.approx(-50, abs=0.01)


def test_clocks_that_count_ticks_are_told_but_not_judged() -> None:
    good = drift.Drift("tsc", 0.5, 0.5, 600, 1000)
    slow = drift.Drift("hpet", -101.0, -101.0, 600, 1000)
    counting = drift.Drift("jiffies-pit", -5000.0, -5000.0, 600, 1000)
    assert drift.too_fast_or_slow([good, slow, counting]) == ["hpet"]


@pytest.mark.parametrize(
    "arguments", [["--minutes", "0"], ["--cpus", "65"], ["--workers", "-1"], ["--only", "sundial"]], ids=lambda a: a[0]
)
def test_arguments_that_cannot_be_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        drift.parse_arguments(arguments)
