"""The stress guest, for a moment: `make soak` runs it for an hour."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from pyhyve.bhyve.boot.guestimage import GuestImage

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import soak
from processes import BenchError

MINUTES = 0.4
DIGEST = "0123456789abcdef"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc, which compiles the guest's program, is not installed")
def test_a_guest_under_mixed_load_computes_nothing_wrong(
    guest_image: GuestImage, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "OUTPUT", tmp_path)
    assert soak.run(soak.parse_arguments(["--minutes", str(MINUTES), "--json"])) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    assert result["wrong"] == 0
    assert result["epochs"] >= 1
    assert result["replayed"] >= 1


def test_whatever_is_wrong_ends_it() -> None:
    for text in (
        "WRONG 1 7 futex turns: 0x1, not 0x2",
        "FAILED a worker ended with status 0x8b",
        "KERNEL [ 5.0] BUG: soft lockup",
    ):
        tally = soak.Tally(0.0, 1.0, 99)
        tally.line(f"EPOCH 0 1 {DIGEST}\r")
        with pytest.raises(BenchError, match=re.escape(text)):
            tally.line(text + "\r")
        assert tally.digests == {(0, 1): DIGEST}


def test_a_failure_is_told_with_the_seed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(options: soak.Options) -> dict[str, object]:
        raise BenchError("WRONG")

    monkeypatch.setattr(soak, "soak", fail)
    assert soak.run(soak.parse_arguments(["--seed", "99"])) == 1
    assert capsys.readouterr().err == "soak: WRONG (seed 99)\n"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc, which compiles the program, is not installed")
def test_what_the_guest_computed_is_held_against_the_host(tmp_path: Path) -> None:
    program = soak.guests.compile_static(soak.PROGRAM, tmp_path, ("-pthread",))
    tally = soak.Tally(0.0, 1.0, 5)
    tally.digests[0, 3] = DIGEST
    with pytest.raises(BenchError, match=f"epoch 3 of worker 0: {DIGEST} in the guest, here 'DIGEST [0-9a-f]{{16}}'"):
        soak.replay(program, tally, 1)
