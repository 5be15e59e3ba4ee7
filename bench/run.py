"""The benchmark: make bench, or python bench/run.py [--runs N] [--only NAME,...] [--quick] [--json]

Boots the same kernel and initramfs under pyhyve and under QEMU's TCG, in turn, and runs the eight workloads of
guest/bench.sh in both and natively; so a program that computes in floating point, and two jobs at once on four
processors. Prints a table, writes bench/out/latest.json. See docs/performance.md.
"""

import argparse
import contextlib
import functools
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import console
import guests
import host
import results
from processes import BenchError, Finished, Interrupted, interrupt, run_to_end
from results import BOOT, FP, NAMES, OUTPUT, PARALLEL, SIDES, TIMED, Samples, Speedups
from rich.console import Console

DEFAULT_RUNS: Final = 5
DEFAULT_TIMEOUT: Final = 600.0
MEMORY_MIB: Final = 256
APPEND: Final = "console=ttyS0"
PARALLEL_CPUS: Final = 4
_SERIAL: Final = "serial"
"""bench.sh's name for the two jobs of PARALLEL one after the other."""
QEMU_MACHINE: Final = ("-accel", "tcg,thread=multi", "-cpu", "max", "-machine", "q35", "-nographic", "-no-reboot")
_SHARED_MEMORY: Final = Path("/dev/shm")
_SCRATCH_BYTES: Final = 96 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for: `names` in the order of results.NAMES."""

    runs: int
    names: tuple[str, ...]
    timeout: float
    as_json: bool


@dataclass(frozen=True, slots=True)
class Guest:
    """What is booted, and the same busybox for the host; beside the script is what it runs."""

    kernel: Path
    initramfs: Path
    busybox: Path
    script: Path


class Progress:
    """On standard error: one line that moves on a terminal, one line a step elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._step = ""

    def step(self, text: str) -> None:
        self._step = text
        self._show(text)

    def detail(self, text: str) -> None:
        if self._terminal:
            self._show(f"{self._step}: {text}")

    def finish(self) -> None:
        if self._terminal and self._step:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self._step = ""

    def fetching(self, step: str, done: int, total: int) -> None:
        """What getting a guest reports."""
        if step != self._step:
            self.step(step)
        if total:
            self.detail(f"{done >> 20} of {total >> 20} MiB")

    def _show(self, text: str) -> None:
        if self._terminal:
            print(f"\r\033[Kbench: {text}", end="", file=sys.stderr, flush=True)
        else:
            print(f"bench: {text}", file=sys.stderr, flush=True)


class Bench:
    """Measures: each call makes one measurement more of everything that was asked for, on every side, in turn."""

    def __init__(self, guest: Guest, qemu: str, options: Options, scratch: Path, progress: Progress) -> None:
        self._guest = guest
        self._qemu = qemu
        self._options = options
        self._scratch = scratch
        self._progress = progress
        self._timed = [name for name in options.names if name in TIMED]
        self._digests: dict[str, tuple[str, str]] = {}
        self.samples = {name: Samples() for name in options.names if name != PARALLEL}
        self.speedups = Speedups()

    def measure(self, run: int) -> None:
        """One run of everything. BenchError, with the side that failed, if anything is not as it should be."""
        if BOOT in self._options.names:
            for side in ("pyhyve", "qemu"):
                finished = self._run(run, side, "boot", self._command(side, "pyhyve.run=/dev/null"))
                self._checking(side, "boot", finished, functools.partial(console.check_boot, finished))
                self.samples[BOOT].of(side).append(finished.seconds)
        if self._timed:
            for side in SIDES:
                for name, seconds in self._workloads(run, side, "workloads", self._timed, 1).items():
                    self.samples[name].of(side).append(seconds)
        if PARALLEL in self._options.names:
            for side in SIDES:
                measured = self._workloads(run, side, "two jobs", [_SERIAL, PARALLEL], PARALLEL_CPUS)
                self.speedups.add(side, measured[_SERIAL], measured[PARALLEL])

    def _workloads(self, run: int, side: str, what: str, names: Sequence[str], cpus: int) -> dict[str, float]:
        """Run these of bench.sh's workloads, in one boot on guests; return their seconds."""
        if side == "native":
            command = [str(self._guest.busybox), "sh", str(self._guest.script), *names]
        else:
            # Without the kernel's own messages, which would stand in the middle of ours.
            command = self._command(side, f"quiet pyhyve.bench={','.join(names)}", cpus)
        finished = self._run(run, side, what, command)
        seconds = {}

        def check() -> None:
            if side != "native":
                console.check_power_off(finished)
            elif finished.status != 0:
                raise BenchError(f"exit status {finished.status}")
            for name, measured in console.parse(finished.lines, names).items():
                self._compare(PARALLEL if name == _SERIAL else name, side, measured.digest)
                seconds[name] = measured.seconds

        self._checking(side, what, finished, check)
        return seconds

    def _compare(self, name: str, side: str, digest: str) -> None:
        """Whoever computes faster must also compute the same."""
        other, expected = self._digests.setdefault(name, (side, digest))
        if digest != expected:
            raise BenchError(f"{name}: its output is not that of {other} ({digest}, not {expected})")

    def _command(self, side: str, append: str, cpus: int = 1) -> list[str]:
        guest, line = self._guest, f"{APPEND} {append}"
        if side == "pyhyve":
            command = [*host.pyhyve_command(), "run", "--processor", "bt", "-c", str(cpus), "-m", f"{MEMORY_MIB}M"]
            return [*command, "--kernel", str(guest.kernel), "--initrd", str(guest.initramfs), "--append", line]
        command = [self._qemu, *QEMU_MACHINE, "-smp", str(cpus), "-m", str(MEMORY_MIB)]
        return [*command, "-kernel", str(guest.kernel), "-initrd", str(guest.initramfs), "-append", line]

    def _run(self, run: int, side: str, what: str, command: Sequence[str]) -> Finished:
        self._progress.step(f"run {run} of {self._options.runs}: {what}, {side}")

        def on_line(text: str) -> None:
            name = console.workload_started(text)
            if name is not None:
                self._progress.detail(name)

        environment = None
        if side == "native":
            environment = {"PATH": os.defpath, "TMPDIR": str(self._scratch)}
        try:
            return run_to_end(command, self._options.timeout, environment, on_line)
        except BenchError as error:
            raise BenchError(f"{side}, {what}: {error}", error.output) from None
        except OSError as error:
            raise BenchError(f"{side}, {what}: cannot start {command[0]}: {error.strerror}") from None

    def _checking(self, side: str, what: str, finished: Finished, check: Callable[[], None]) -> None:
        try:
            check()
        except BenchError as error:
            raise BenchError(f"{side}, {what}: {error}", finished.tail()) from None


def parse_arguments(argv: Sequence[str] | None = None) -> Options:
    """Return the options. SystemExit with status 2, after one line, for what cannot be."""
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.split("\n\n")[1] if __doc__ else None)
    parser.add_argument("--runs", type=int, metavar="N", help=f"measure everything N times ({DEFAULT_RUNS})")
    parser.add_argument("--only", metavar="NAME,...", help=f"only these of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="one run: whether it works, not how fast it is")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the JSON instead of the table")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", default=DEFAULT_TIMEOUT, help="for each program run (%(default)g)"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.runs is not None:
        parser.error("--quick is --runs 1; give one of the two")
    runs = 1 if arguments.quick else DEFAULT_RUNS if arguments.runs is None else arguments.runs
    if runs < 1:
        parser.error(f"--runs {runs}: not a number of runs; write 1 or more")
    if not arguments.timeout > 0:
        parser.error(f"--timeout {arguments.timeout:g}: not a time; write seconds")
    asked = set(NAMES) if arguments.only is None else {name.strip() for name in arguments.only.split(",")}
    unknown = sorted(asked - set(NAMES))
    if unknown:
        parser.error(f"--only {unknown[0]}: no such benchmark; there are {', '.join(NAMES)}")
    return Options(runs, tuple(name for name in NAMES if name in asked), arguments.timeout, arguments.as_json)


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory for the native workloads: in memory, as the guest's is, where the host has that."""
    parent: Path | None = None
    if os.access(_SHARED_MEMORY, os.W_OK):
        status = os.statvfs(_SHARED_MEMORY)
        if status.f_bavail * status.f_frsize >= _SCRATCH_BYTES:
            parent = _SHARED_MEMORY
    with tempfile.TemporaryDirectory(prefix="pyhyve-bench-", dir=parent) as name:
        yield Path(name)


def run(options: Options, progress: Progress) -> None:
    """Measure, print and write. BenchError if a run fails: then nothing is written."""
    qemu = host.find_qemu()
    host.require_processor()

    from pyhyve.base.errors import PyhyveError
    from pyhyve.bhyve.boot import guestimage
    from pyhyve.bhyve.boot.initramfs import GUEST_BENCH, guest_script

    try:
        image = guestimage.get(progress.fetching)
    except PyhyveError as error:
        raise BenchError(str(error)) from None
    warning = host.busy()
    if warning is not None:
        print(f"bench: {warning}", file=sys.stderr)
    machine = host.describe() | {
        "processor": "bt",
        "qemu": host.first_line([qemu, "--version"]),
        "guest": image.version,
        "guest_memory_mib": MEMORY_MIB,
        "busybox": host.first_line([str(image.busybox)]),
    }
    with scratch_directory() as scratch:
        script = scratch / "bench.sh"
        script.write_bytes(guest_script("bench.sh"))
        initramfs = image.initramfs
        if FP in options.names:
            program = guests.compile_static(FP, scratch)
            name = str(Path(GUEST_BENCH).with_name(FP))
            initramfs = guests.write_initramfs(image.busybox, {name: program}, scratch / "initramfs.cpio")
        guest = Guest(image.kernel, initramfs, image.busybox, script)
        bench = Bench(guest, qemu, options, scratch, progress)
        for number in range(1, options.runs + 1):
            bench.measure(number)
    progress.finish()
    rows = [results.make_row(name, samples) for name, samples in bench.samples.items()]
    speedups = bench.speedups if PARALLEL in options.names else None
    document = results.report(machine, rows, speedups)
    path = OUTPUT / "latest.json"
    results.write_json(path, document)
    if options.as_json:
        print(json.dumps(document, indent=2))
    else:
        Console().print(results.table(rows, bench.samples, speedups))
    print(f"bench: wrote {os.path.relpath(path)}", file=sys.stderr)


def main() -> int:
    options = parse_arguments()
    progress = Progress()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        run(options, progress)
    except BenchError as error:
        progress.finish()
        if error.output:
            print(error.output, file=sys.stderr)
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        progress.finish()
        print("bench: interrupted; nothing was written", file=sys.stderr)
        return 128 + interrupted.number
    return 0


if __name__ == "__main__":
    sys.exit(main())
