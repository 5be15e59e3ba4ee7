"""What the processor does in how long: python bench/engine.py [--runs N] [--only NAME,...] [--no-qemu] [--json]

A guest without an operating system (guest/engine.c) times single operations, under pyhyve's software processor and
under QEMU's TCG: the same Multiboot image for both. Prints a table (docs/performance.md says what each row is), writes
bench/out/engine.json.
"""

import argparse
import json
import os
import re
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import guests
import host
from processes import BenchError, Finished, Interrupted, interrupt, run_to_end
from results import OUTPUT, write_json
from rich import box
from rich.console import Console
from rich.table import Table

DEFAULT_RUNS: Final = 3
SIDES: Final = ("pyhyve", "qemu")
_IMAGE: Final = "engine"
_CPUS: Final = 2
_MEMORY_MIB: Final = 256
_DEBUG_EXIT: Final = "isa-debug-exit,iobase=0xf4,iosize=4"
_PASSED: Final = 2 * 0x10 + 1
"""The exit status that the guest's last write makes, on both sides."""
_TIMEOUT_S: Final = 300.0
_DISAGREEMENT: Final = 0.1
_DISAGREEMENT_S: Final = 0.25

_MEASURED: Final = re.compile(r"^M (\w+) (\d+) (\d+)$")
_WAIT: Final = "wait"
_WAITED: Final = ("ipi_halted",)
"""Each of these waits first, as long as `wait` measures: taken off."""

DESCRIPTIONS: Final = {
    "translate": "an instruction never seen before: translated, and run once",
    "jump_same_page": "a direct jump within a page",
    "jump_indirect_16": "an indirect jump, 16 targets in turn",
    "jump_indirect_1024": "an indirect jump, 1,024 targets in turn",
    "jump_indirect_32768": "an indirect jump, 32,768 targets in turn: more than the branch table has",
    "call_same_page": "a call and its return, within a page",
    "call_other_page": "a call of another page, and its return",
    "call_indirect": "an indirect call, and its return",
    "call_recursive": "a call and its return, 500 deep",
    "load": "a load that depends on the one before, one page",
    "store": "a store, one page",
    "load_64_pages": "a load that depends on the one before, 64 pages in turn",
    "tlb_miss": "the same, 8,192 pages in turn",
    "page_fault": "a page fault in the kernel, and IRET",
    "interrupt": "INT, and IRET",
    "syscall": "SYSCALL, and SYSRET",
    "cr3_write": "a write to CR3",
    "context_switch": "another address space, eight pages written there",
    "code_rewrite": "a byte of code written, and the code run",
    "cpuid": "CPUID",
    "out": "OUT to a device (pyhyve: in Python; QEMU: in C)",
    "ipi_running": "an IPI to a processor in a loop of PAUSE, until its handler has run",
    "ipi_spinning": "the same, in a loop without PAUSE",
    "ipi_halted": "the same, in HLT",
}
NAMES: Final = tuple(DESCRIPTIONS)


@dataclass(frozen=True, slots=True)
class Row:
    """Nanoseconds an operation (medians of the runs); `vs_qemu` is pyhyve's over QEMU's, smaller is better."""

    name: str
    pyhyve: float
    qemu: float | None

    @property
    def vs_qemu(self) -> float | None:
        return None if not self.qemu else self.pyhyve / self.qemu

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "pyhyve_ns": round(self.pyhyve, 3),
            "qemu_ns": None if self.qemu is None else round(self.qemu, 3),
            "vs_qemu": None if self.vs_qemu is None else round(self.vs_qemu, 4),
        }


def parse(finished: Finished, cycles_a_second: float) -> dict[str, float]:
    """Return nanoseconds an operation, by name. BenchError if one is missing, or the guest's clock is not ours."""
    measured: dict[str, float] = {}
    started = ended = None
    cycles = 0
    for line in finished.lines:
        text = line.text.strip()
        match = _MEASURED.match(text)
        if match is not None:
            measured[match[1]] = int(match[3]) / int(match[2]) / cycles_a_second * 1e9
        elif text.endswith("START"):
            started = line.at
        elif text.startswith("END "):
            ended, cycles = line.at, int(text[4:])
        elif text.startswith("UNEXPECTED"):
            raise BenchError(f"the guest met something unexpected: {text}", finished.tail())
    if started is None or ended is None or finished.status != _PASSED:
        raise BenchError(f"the guest did not get to its end (exit status {finished.status})", finished.tail())
    seconds, by_host = cycles / cycles_a_second, ended - started
    if abs(seconds - by_host) > max(_DISAGREEMENT_S, _DISAGREEMENT * by_host):
        raise BenchError(f"{seconds:.3f} s by the guest's clock, {by_host:.3f} s by the host's")
    missing = [name for name in (*NAMES, _WAIT) if name not in measured]
    if missing:
        raise BenchError(f"{missing[0]}: not measured", finished.tail())
    for name in _WAITED:
        measured[name] = max(0.0, measured[name] - measured[_WAIT])
    return measured


def command(side: str, image: Path, qemu: str | None) -> list[str]:
    if side == "pyhyve":
        words = [*host.pyhyve_command(), "run", "--processor", "bt", "-c", str(_CPUS), "-m", f"{_MEMORY_MIB}M"]
        return [*words, "-l", _DEBUG_EXIT, "--kernel", str(image)]
    assert qemu is not None
    words = [qemu, "-accel", "tcg,thread=multi", "-cpu", "max", "-machine", "q35", "-display", "none"]
    words += ["-serial", "stdio", "-monitor", "none", "-no-reboot", "-smp", str(_CPUS), "-m", str(_MEMORY_MIB)]
    return [*words, "-device", _DEBUG_EXIT, "-kernel", str(image)]


def measure(runs: int, names: Sequence[str], qemu: str | None) -> list[Row]:
    """Return a row for each name. BenchError, with the side, if a guest fails."""
    from pyhyve.vmm import hostcpu

    hostcpu.start_measuring()
    cycles_a_second = hostcpu.tsc_khz() * 1000.0
    sides = SIDES if qemu is not None else SIDES[:1]
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="pyhyve-bench-") as scratch:
        image = guests.compile_flat(_IMAGE, Path(scratch))
        for number in range(1, runs + 1):
            for side in sides:
                print(f"bench: run {number} of {runs}: {side}", file=sys.stderr)
                try:
                    finished = run_to_end(command(side, image, qemu), _TIMEOUT_S)
                    samples[side].append(parse(finished, cycles_a_second))
                except BenchError as error:
                    raise BenchError(f"{side}: {error}", error.output) from None

    def median(side: str, name: str) -> float:
        return statistics.median(sample[name] for sample in samples[side])

    return [Row(name, median("pyhyve", name), median("qemu", name) if qemu is not None else None) for name in names]


def table(rows: Sequence[Row]) -> Table:
    drawn = Table(
        box=box.HORIZONTALS, show_edge=False, pad_edge=False, caption="the best of several, medians of the runs"
    )
    drawn.add_column("", min_width=19, no_wrap=True)
    for heading in ("pyhyve, ns", "QEMU, ns", "vs QEMU"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        drawn.add_row(row.name, *cells(row))
    return drawn


def cells(row: Row) -> tuple[str, str, str]:
    qemu = "-" if row.qemu is None else f"{row.qemu:,.1f}"
    ratio = "-" if row.vs_qemu is None else f"{row.vs_qemu:.2g}"
    return f"{row.pyhyve:,.1f}", qemu, ratio


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as the table of docs/performance.md."""
    lines = ["| | pyhyve, ns | QEMU TCG, ns | vs QEMU | what |", "| --- | ---: | ---: | ---: | --- |"]
    lines += [f"| {' | '.join((row.name, *cells(row), DESCRIPTIONS[row.name]))} |" for row in rows]
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/engine.py", description="Time single operations of the processor.")
    parser.add_argument("--runs", type=int, metavar="N", default=DEFAULT_RUNS, help="median of N (%(default)s)")
    parser.add_argument("--only", metavar="NAME,...", help=f"show only these of {', '.join(NAMES)}")
    parser.add_argument("--no-qemu", action="store_true", help="pyhyve alone")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the JSON instead of the table")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    arguments = parser.parse_args(argv)
    if arguments.runs < 1:
        parser.error(f"--runs {arguments.runs}: not a number of runs; write 1 or more")
    asked = set(NAMES) if arguments.only is None else {name.strip() for name in arguments.only.split(",")}
    unknown = sorted(asked - set(NAMES))
    if unknown:
        parser.error(f"--only {unknown[0]}: no such benchmark; there are {', '.join(NAMES)}")
    arguments.names = tuple(name for name in NAMES if name in asked)
    return arguments


def main() -> int:
    arguments = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        host.require_processor()
        qemu = None if arguments.no_qemu else host.find_qemu()
        warning = host.busy()
        if warning is not None:
            print(f"bench: {warning}", file=sys.stderr)
        machine = host.describe() | {"processor": "bt"}
        if qemu is not None:
            machine["qemu"] = host.first_line([qemu, "--version"])
        rows = measure(arguments.runs, arguments.names, qemu)
        document = {"machine": machine, "runs": arguments.runs, "rows": [row.to_json() for row in rows]}
        write_json(OUTPUT / "engine.json", document)
    except BenchError as error:
        if error.output:
            print(error.output, file=sys.stderr)
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print("bench: interrupted; nothing was written", file=sys.stderr)
        return 128 + interrupted.number
    if arguments.as_json:
        print(json.dumps(document, indent=2))
    elif arguments.markdown:
        print(markdown(rows))
    else:
        Console().print(table(rows))
    print(f"bench: wrote {os.path.relpath(OUTPUT / 'engine.json')}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
