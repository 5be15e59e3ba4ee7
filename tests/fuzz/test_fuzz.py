"""The fuzzer's own test: what it once found, a short run of it, and its tables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from iced_x86 import Code, Instruction, Mnemonic

sys.path.insert(0, str(Path(__file__).parent))
undefined: Any = pytest.importorskip("undefined")
engine = pytest.importorskip("pyhyve.cpu.bt.engine")
Machine: Any = pytest.importorskip("guest").Machine

HERE = Path(__file__).parent
CASES = [case for path in sorted((HERE / "regressions").glob("*.json")) for case in json.loads(path.read_text())]
RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import judge
from guest import Machine
machine = Machine()
for case in json.load(sys.stdin):
    unpacked = judge.Case.unpack(case)
    result = judge.run(machine, unpacked)
    wrong = result.what and judge.excused(unpacked, result) is None
    print(json.dumps(judge.describe(unpacked, result) if wrong else ""))
"""
"""In a process of its own: random code runs natively in it, and it takes the processor's exceptions."""


@pytest.fixture(scope="module")
def replayed() -> list[str]:
    missing = engine.Engine().unavailable()
    if missing:
        pytest.skip(missing)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(HERE)], input=json.dumps(CASES), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case["note"])[:60] for case in CASES])
def test_what_was_found_once_is_as_on_the_host(replayed: list[str], number: int) -> None:
    assert not replayed[number], replayed[number]


def test_random_instructions_do_as_on_the_host(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = engine.Engine().unavailable()
    if missing:
        pytest.skip(missing)
    start = int(os.environ.get("PYHYVE_FUZZ_SEED", "1"))
    done = subprocess.run(
        [sys.executable, str(HERE), "--minutes", "0.1", "--seed", str(start), "--workers", "1", "--json",
         "--cases", str(tmp_path / "cases.json")], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"unit {start}: {done.stderr[-4000:]}"
    summary: dict[str, Any] = json.loads(done.stdout)
    assert summary["instructions"] > 10_000
    assert summary["differences"] == 0


def of_session(leader: int) -> list[float]:
    """The processes of a session: the seconds that each has run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
    return found


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_it_with_one_line_and_nothing_lost(tmp_path: Path, times: int) -> None:
    missing = engine.Engine().unavailable()
    if missing:
        pytest.skip(missing)
    command = [sys.executable, str(HERE), "--workers", "1"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    running = subprocess.Popen(
        [*command, "--minutes", "5"], env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while max(of_session(running.pid)) < 2.5 and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(times):
        os.killpg(running.pid, signal.SIGINT)
        time.sleep(0.02)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    lines = [line for line in said.splitlines() if " opcodes, " not in line]  # without its progress
    assert len(lines) == 1, said
    assert lines[0].startswith("stopped after ")
    deadline = time.monotonic() + 10
    while of_session(running.pid) and time.monotonic() < deadline:
        time.sleep(0.05)  # the tracker of multiprocessing goes when it sees that the others have gone
    assert of_session(running.pid) == []
    kept = json.loads((tmp_path / "pyhyve" / "fuzz-cpu" / "account.json").read_text())
    assert lines[0].endswith(f"goes on with unit {kept['next_unit']}")
    again = subprocess.run([*command, "--minutes", "0", "--json"], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["total"]["instructions"] == kept["instructions"]
    if times == 1:
        assert kept["instructions"] > 10_000
        assert len(set(kept["by_setup"])) == len(Machine.SETUPS)  # each unit with all of them


def test_the_undefined_flags_are_those_that_iced_x86_names() -> None:
    names = {value: name for name, value in vars(Mnemonic).items() if name.isupper() and isinstance(value, int)}
    bits = undefined._BITS
    for name, code in vars(Code).items():
        if not name.isupper() or not isinstance(code, int):
            continue
        insn = Instruction()
        insn.code = code  # type: ignore[assignment]
        foreign = name.startswith(("XOP_", "VEX_KNC_"))  # no processor of ours has them
        if names[insn.mnemonic] in ("SHLD", "SHRD", "SHL", "SAL", "SHR", "SAR") or foreign:
            continue  # shifts depend on their counts
        if name.startswith("MOV_") and ("_CR" in name or "_DR" in name or "_TR" in name):
            continue  # only ring 0 may
        theirs = sum(flag for bit, flag in bits.items() if insn.rflags_undefined & bit)
        mine, section = undefined.UNDEFINED.get(names[insn.mnemonic], (0, ""))
        assert theirs & ~mine == 0, f"{name}: {theirs:#x}, {mine:#x} by {section!r}"
