"""What the monitor and its devices cost: python bench/devices.py [--runs N] [--only NAME,...] [--json]

Port accesses a second that a device in Python handles, the time of `pyhyve --help`, what an idle guest costs of a
processor, and what it takes of the host's memory beyond its own. Prints a table, writes bench/out/devices.json.
"""

import argparse
import contextlib
import os
import pty
import re
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import host
from processes import BenchError, Signals, end_group, run_to_end
from rich.console import Console
from rich.table import Table

DEFAULT_RUNS: Final = 5
NAMES: Final = ("out", "in", "help", "idle", "memory")

ACCESSES: Final = 500_000
_MARK_PORT: Final = 0x200
_DEVICE_PORT: Final = 0x300
_CODE: Final = 0x10_0000
_PAGE_TABLES: Final = 0x9000
_GDT: Final = 0x8000
_GUEST_TIMEOUT_S: Final = 120.0

IDLE_SECONDS: Final = 20.0
_SETTLE_SECONDS: Final = 3.0
_PROMPT: Final = b"root@pyhyve:~# "
_BOOT_TIMEOUT_S: Final = 120.0
_ARENA: Final = "/memfd:pyhyve-ram"
"""The guest's memory, as /proc shows it."""
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Figure:
    """One number. `target` is what issue 2 asks for; `larger` says on which side of it the number should be."""

    name: str
    value: float
    unit: str
    target: float
    larger: bool
    runs: int

    @property
    def reached(self) -> bool:
        return self.value >= self.target if self.larger else self.value <= self.target


# -- ports -------------------------------------------------------------------------------------------------------------


class Latch:
    """A device: one byte that is written and read back."""

    def __init__(self) -> None:
        self.value = 0
        self.accesses = 0

    def read(self, offset: int, size: int) -> int:
        self.accesses += 1
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses += 1
        self.value = value & 0xFF


class Mark:
    """A port whose first write starts the clock, and whose second stops it and calls `done`."""

    def __init__(self, done: Callable[[], None]) -> None:
        self.times: list[float] = []
        self._done = done

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self._done()


def port_loop(instruction: str, count: int) -> bytes:
    """Return 64-bit code that touches the device's port `count` times, between two writes to the mark's."""
    opcode = {"in": b"\xec", "out": b"\xee"}[instruction]  # IN AL, DX; OUT DX, AL
    body = opcode + b"\xff\xc9"  # DEC ECX
    body += b"\x75" + (-len(body) - 2 & 0xFF).to_bytes(1)  # JNZ body

    def mov_edx(value: int) -> bytes:
        return b"\xba" + value.to_bytes(4, "little")

    mark = mov_edx(_MARK_PORT) + b"\xee"
    counter = b"\xb9" + count.to_bytes(4, "little")  # MOV ECX, count
    return mark + mov_edx(_DEVICE_PORT) + counter + body + mark + b"\xfa\xf4"  # CLI; HLT


def port_accesses(instruction: str) -> float:
    """Return accesses a second of a guest that does nothing else."""
    from pyhyve.bhyve.boot import longmode
    from pyhyve.cpu import select as processors
    from pyhyve.vmm.topology import Topology
    from pyhyve.vmm.vm import Suspend, Vm

    vm = Vm(f"bench-{os.getpid()}", processors.processor("bt"), Topology())
    try:
        vm.map_ram(0, 16 * MIB)
        latch, mark = Latch(), Mark(lambda: vm.suspend(Suspend.POWEROFF))
        vm.ports.attach(_DEVICE_PORT, 1, latch)
        vm.ports.attach(_MARK_PORT, 1, mark)
        vm.memory.write(_CODE, port_loop(instruction, ACCESSES))
        backend = vm.vcpus[0].backend
        for name, segment in longmode.SEGMENTS.items():
            backend.set_segment(name, segment)
        backend.set_table("gdtr", _GDT, longmode.write_gdt(vm.memory, _GDT))
        for name, value in {
            "efer": longmode.EFER,
            "cr3": longmode.write_identity_map(vm.memory, _PAGE_TABLES),
            "cr4": longmode.CR4,
            "cr0": longmode.CR0,
            "rflags": longmode.RFLAGS,
            "rip": _CODE,
        }.items():
            backend.set(name, value)
        vm.start()
        ended = vm.wait(_GUEST_TIMEOUT_S)
        suspended = vm.suspended
        if not ended or suspended is None:
            raise BenchError(f"the guest is not at its end after {_GUEST_TIMEOUT_S:g} s")
        if suspended.how is not Suspend.POWEROFF:
            raise BenchError(f"the guest ended by {suspended.how.value}: {suspended.detail}")
        if latch.accesses != ACCESSES:
            raise BenchError(f"the device saw {latch.accesses} accesses, not {ACCESSES}")
        start, end = mark.times
        return ACCESSES / (end - start)
    finally:
        vm.close()


# -- the command line --------------------------------------------------------------------------------------------------


def help_seconds() -> float:
    """Return the seconds of `pyhyve --help`, the whole process."""
    finished = run_to_end([*host.pyhyve_command(), "--help"], 60)
    if finished.status != 0:
        raise BenchError(f"pyhyve --help: exit status {finished.status}", finished.tail())
    return finished.seconds


# -- a guest at its prompt ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def guest_at_prompt() -> Iterator[int]:
    """Boot a guest of 256 MiB on a terminal to its shell; the process's id while it sits there."""
    from pyhyve.base.errors import PyhyveError
    from pyhyve.bhyve.boot import guestimage

    try:
        image = guestimage.get()
    except PyhyveError as error:
        raise BenchError(str(error)) from None
    command = [*host.pyhyve_command(), "run", "--processor", "bt", "-m", "256M"]
    command += ["--kernel", str(image.kernel), "--initrd", str(image.initramfs), "--append", "console=ttyS0"]
    master, slave = pty.openpty()
    process: subprocess.Popen[bytes] | None = None
    try:
        with Signals():
            process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        slave = -1
        _await_prompt(master)
        time.sleep(_SETTLE_SECONDS)
        yield process.pid
        if process.poll() is not None:
            raise BenchError(f"the guest ended at its prompt: exit status {process.returncode}")
    finally:
        if process is not None:
            end_group(process)
        if slave >= 0:
            os.close(slave)
        os.close(master)


def _await_prompt(terminal: int) -> None:
    deadline = time.monotonic() + _BOOT_TIMEOUT_S
    seen = b""
    while _PROMPT not in re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", seen):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([terminal], [], [], left)[0]:
            raise BenchError(f"no shell prompt after {_BOOT_TIMEOUT_S:g} s", _last(seen))
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # its other side is closed
            data = b""
        if not data:
            raise BenchError("the guest ended before its prompt", _last(seen))
        seen = (seen + data)[-(1 << 16) :]


def _last(seen: bytes) -> str:
    return "\n".join(seen.decode("utf-8", "replace").splitlines()[-12:])


def idle_percent(pid: int) -> float:
    """Return what the guest at its prompt takes of one processor, in percent."""
    before, start = host.cpu_seconds(pid), time.monotonic()
    time.sleep(IDLE_SECONDS)
    return (host.cpu_seconds(pid) - before) / (time.monotonic() - start) * 100


def mapped_memory(smaps: str) -> tuple[int, int]:
    """Return (bytes of guest memory, bytes of everything else) that a process maps, from the text of its smaps."""
    guest = rest = 0
    in_guest = False
    for line in smaps.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            in_guest = _ARENA in line
        elif line.startswith("Pss:"):
            size = int(line.split()[1]) << 10
            if in_guest:
                guest += size
            else:
                rest += size
    return guest, rest


def extra_memory(pid: int) -> float:
    """Return the MiB that the process takes beyond the pages of guest memory that exist: those that the guest touched.

    With the page tables that the host's kernel keeps for it.
    """
    guest, rest = mapped_memory(Path(f"/proc/{pid}/smaps").read_text())
    if not guest:
        raise BenchError(f"there is no guest memory ({_ARENA}) in /proc/{pid}/smaps")
    tables = re.search(r"^VmPTE:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return (rest + (int(tables[1]) << 10 if tables is not None else 0)) / MIB


# -- all of it ---------------------------------------------------------------------------------------------------------


def measure(names: Sequence[str], runs: int, progress: Callable[[str], None]) -> list[Figure]:
    """Return the figures asked for, in the order of NAMES."""
    figures = []

    def median(what: str, function: Callable[[], float]) -> float:
        values = []
        for run in range(1, runs + 1):
            progress(f"run {run} of {runs}: {what}")
            values.append(function())
        return statistics.median(values)

    for instruction in ("out", "in"):
        if instruction in names:
            rate = median(f"{instruction.upper()} in a loop", lambda name=instruction: port_accesses(name))  # type: ignore[misc]
            figures.append(Figure(f"port {instruction.upper()} to a device", rate, "1/s", 200_000, True, runs))
    if "help" in names:
        figures.append(Figure("pyhyve --help", median("pyhyve --help", help_seconds), "s", 0.1, False, runs))
    if {"idle", "memory"} & set(names):
        progress("booting a guest to its prompt")
        with guest_at_prompt() as pid:
            # Memory first: it is what the guest has at its prompt, not what 20 s there may add.
            memory = extra_memory(pid)
            if "idle" in names:
                progress(f"watching it for {IDLE_SECONDS:g} s")
                figures.append(Figure("idle, of one core", idle_percent(pid), "%", 2.0, False, 1))
            if "memory" in names:
                figures.append(Figure("memory but the guest's", memory, "MiB", 64.0, False, 1))
    return figures


def report(machine: Mapping[str, object], figures: Sequence[Figure]) -> dict[str, object]:
    """Return the result as it is written."""
    rows = [asdict(figure) | {"value": round(figure.value, 6), "reached": figure.reached} for figure in figures]
    return {"machine": dict(machine), "rows": rows}


def table(figures: Sequence[Figure]) -> Table:
    drawn = Table()
    for heading in ("", "measured", "target", "", "runs"):
        drawn.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for figure in figures:
        target = f"{'≥' if figure.larger else '≤'} {figure.target:,g} {figure.unit}"
        value = f"{figure.value:,.0f}" if figure.value >= 1000 else f"{figure.value:.3f}"
        verdict = "reached" if figure.reached else "missed"
        drawn.add_row(figure.name, f"{value} {figure.unit}", target, verdict, str(figure.runs))
    return drawn


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/devices.py", description="Measure what the monitor costs.")
    host.add_runs(parser, DEFAULT_RUNS)
    parser.add_argument("--only", metavar="NAME,...", help=f"only these of {', '.join(NAMES)}")
    host.add_json(parser, "table")
    arguments = parser.parse_args(argv)
    host.check_runs(parser, arguments.runs)
    arguments.names = host.chosen(parser, arguments.only, NAMES)
    return arguments


def main() -> int:
    arguments = parse_arguments()
    figures: list[Figure] = []

    def work() -> Mapping[str, object]:
        machine = host.prepare()
        figures.extend(measure(arguments.names, arguments.runs, lambda text: print(f"bench: {text}", file=sys.stderr)))
        return report(machine, figures)

    return host.run(work, "devices.json", None if arguments.as_json else lambda: Console().print(table(figures)))


if __name__ == "__main__":
    sys.exit(main())
