"""Run kvm-unit-tests that were built elsewhere, under QEMU's TCG and under pyhyve, and compare test by test.

    python tools/kut.py DIRECTORY [NAME...] [--json FILE] [--table FILE] [--only tcg|pyhyve] [--logs DIRECTORY]

DIRECTORY has `unittests.cfg` and the built `.flat` images (the `x86` directory of kvm-unit-tests). Each test runs with
the processors, memory and arguments that its configuration names. Of `-cpu`, pyhyve takes the features to hide.
"""

import argparse
import configparser
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pyhyve.vmm.cpufeatures import FEATURES

QEMU: Final = "qemu-system-x86_64"
DEFAULT_TIMEOUT_S: Final = 90.0
DEFAULT_MEMORY: Final = "128M"
ENVIRONMENT: Final = "QEMU_ACCEL=tcg\nERRATA_FORCE=y\n"
"""What the suite's own runner hands its tests under TCG; pyhyve gets the same."""
PASSED: Final = 1
"""The exit status of a run whose tests all passed: 0 to the exit port."""
_RESULT: Final = re.compile(r"^(PASS|FAIL|SKIP|XFAIL|XPASS): (.*?)\s*$", re.MULTILINE)
_ERROR: Final = re.compile(r"^pyhyve: error: ", re.MULTILINE)
_VARIES: Final = re.compile(r"\b(0x)?[0-9a-f]*\d[0-9a-f]*\b")


@dataclass(frozen=True)
class Test:
    """A section of unittests.cfg."""

    name: str
    file: Path
    arguments: str = ""
    cpus: int = 1
    qemu: Sequence[str] = ()
    timeout: float = DEFAULT_TIMEOUT_S
    wants_kvm: bool = False

    @property
    def memory(self) -> str:
        return self.qemu[self.qemu.index("-m") + 1] if "-m" in self.qemu else DEFAULT_MEMORY

    @property
    def hidden(self) -> list[str]:
        """Features that the test wants the processor to lack, of those that pyhyve can hide."""
        cpu = self.qemu[self.qemu.index("-cpu") + 1] if "-cpu" in self.qemu else ""
        return [word[1:] for word in cpu.split(",") if word.startswith("-") and word[1:] in FEATURES]


@dataclass
class Result:
    """How a run ended: "ok", "failed", "skipped", "timeout", "not run", "error" (a bug of pyhyve's), or what else its
    exit status says."""

    status: str
    seconds: float
    tests: dict[str, str] = field(default_factory=dict)
    """Subtest → PASS, FAIL, SKIP, ...; the second of one name is "name #2"."""
    output: str = ""

    def count(self, verdict: str) -> int:
        return sum(each == verdict for each in self.tests.values())


def read_tests(directory: Path) -> list[Test]:
    """Return the tests of this architecture whose images are there."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",), strict=False)
    parser.read(directory / "unittests.cfg")
    tests = []
    for name in parser.sections():
        section = parser[name]
        path = directory / section["file"]
        if path.exists():
            arguments = section.get("test_args", "").strip()
            arguments = arguments.replace("`date +%s`", str(int(time.time())))
            qemu = shlex.split(section.get("qemu_params", section.get("extra_params", "")))
            tests.append(
                Test(
                    name=name,
                    file=path,
                    arguments=" ".join(shlex.split(arguments)),
                    cpus=int(section.get("smp", "1")),
                    qemu=qemu,
                    timeout=float(section.get("timeout", DEFAULT_TIMEOUT_S)),
                    wants_kvm=section.get("accel", "") == "kvm"
                    or "-enable-kvm" in qemu
                    or any(each.startswith("host") for each in qemu),
                )
            )
    return tests


def tcg_command(test: Test, environment: Path) -> list[str]:
    command = [QEMU, "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio", "-vga", "none"]
    command += ["-device", "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-accel", "tcg"]
    command += ["-kernel", str(test.file), "-smp", str(test.cpus), "-initrd", str(environment)]
    if "-cpu" not in test.qemu:
        command += ["-cpu", "max"]
    return [*command, *test.qemu, *(["-append", test.arguments] if test.arguments else [])]


def pyhyve_command(test: Test, environment: Path) -> list[str]:
    command = [sys.executable, "-m", "pyhyve.cli.main", "run", "--kernel", str(test.file), "--initrd", str(environment)]
    command += ["--processor", "bt", "--hang", "0", "-c", str(test.cpus), "-m", test.memory]
    command += ["-l", "pc-testdev", "-l", "fwcfg,qemu"]
    for feature in test.hidden:
        command += ["--cpu-feature", f"{feature}=off"]
    return [*command, f"--append={test.arguments}"]


def run(command: Sequence[str], timeout: float) -> Result:
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        data, _ = process.communicate(timeout=timeout)
        status = {PASSED: "ok", PASSED | 2: "failed", 77 << 1 | 1: "skipped"}.get(
            process.returncode, f"status {process.returncode}"
        )
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        data, _ = process.communicate()
        status = "timeout"
    output = data.decode("utf-8", "replace").replace("\r", "")
    if status == "ok" and all(line.startswith(QEMU) for line in output.splitlines()):
        status = "not run"  # QEMU's own complaint, with the same exit status
    elif _ERROR.search(output):
        status = "error"  # and pyhyve's
    return Result(status, time.monotonic() - started, subtests(output), output)


def subtests(output: str) -> dict[str, str]:
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for verdict, name in _RESULT.findall(output):
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name} #{seen[name]}"] = verdict
    return found


def missing(tcg: Result, ours: Result) -> list[str]:
    """Return the subtests that pass under TCG and not under pyhyve; numbers in their names may differ.

    What a run that ends in order has not printed at all, it was not asked: the processors' features differ.
    """
    in_order = ours.status in ("ok", "failed") and bool(ours.tests)
    passed = Counter(_VARIES.sub("N", name) for name, verdict in ours.tests.items() if verdict == "PASS")
    lost = []
    for name, verdict in tcg.tests.items():
        if verdict == "PASS" and ours.tests.get(name) != "PASS":
            plain = _VARIES.sub("N", name)
            if name in ours.tests or (passed[plain] <= 0 and not in_order):
                lost.append(name)
        if verdict == "PASS":
            passed[_VARIES.sub("N", name)] -= 1
    if not lost and tcg.status == "ok" and ours.status != "ok":
        lost.append(f"(ends with {ours.status})")
    return lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", help="tests, by their sections' names; all that TCG can run unless given")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--table", type=Path, help="write a Markdown table there")
    parser.add_argument("--logs", type=Path, help="keep what the tests print there")
    parser.add_argument("--only", choices=("tcg", "pyhyve"))
    parser.add_argument("--timeout", type=float, help="seconds for each run, instead of each test's own")
    arguments = parser.parse_intermixed_args()
    tests = read_tests(arguments.directory)
    unknown = set(arguments.names) - {test.name for test in tests}
    if unknown:
        parser.error(f"no such test, or it is not built: {', '.join(sorted(unknown))}")
    chosen = [test for test in tests if test.name in arguments.names or not (arguments.names or test.wants_kvm)]
    records: dict[str, dict[str, Any]] = {}
    lost_any = False
    with tempfile.TemporaryDirectory(prefix="pyhyve-kut-") as place:
        environment = Path(place) / "environment"
        environment.write_text(ENVIRONMENT)
        for test in chosen:
            results = {}
            for name, command in (("tcg", tcg_command), ("pyhyve", pyhyve_command)):
                if arguments.only in (None, name):
                    result = run(command(test, environment), arguments.timeout or test.timeout)
                    results[name] = result
                    if arguments.logs:
                        arguments.logs.mkdir(parents=True, exist_ok=True)
                        (arguments.logs / f"{test.name}.{name}").write_text(result.output)
            lost = missing(results["tcg"], results["pyhyve"]) if len(results) == 2 else []
            lost_any |= bool(lost)
            figures = "  ".join(
                f"{name} {result.status:9} {result.count('PASS'):4}+{result.count('FAIL')}-{result.count('SKIP')}s "
                f"{result.seconds:5.1f} s"
                for name, result in results.items()
            )
            print(f"{test.name:38} {figures}{'' if not lost else f'  LOST {len(lost)}'}", flush=True)
            for name in lost:
                print(f"    {name}", flush=True)
            records[test.name] = {
                "lost": lost,
                **{
                    name: {"status": result.status, "seconds": round(result.seconds, 2), "tests": result.tests}
                    for name, result in results.items()
                },
            }
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1))
    if arguments.table:
        arguments.table.write_text(table(records))
    return int(lost_any)


def table(records: dict[str, dict[str, Any]]) -> str:
    """Return a row for each test: passed, failed and skipped subtests of both, and how the runs ended."""
    lines = ["| test | TCG | pyhyve | lost |", "| --- | --- | --- | --- |"]
    for name, record in records.items():
        cells = [name]
        for which in ("tcg", "pyhyve"):
            verdicts = Counter(record[which]["tests"].values()) if which in record else Counter()
            figures = f"{verdicts['PASS']}/{verdicts['FAIL']}/{verdicts['SKIP']}"
            cells.append(f"{figures} {record[which]['status']}" if which in record else "")
        lines.append(f"| {' | '.join(cells)} | {len(record['lost']) or ''} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
