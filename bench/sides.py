"""The benchmarks that are a guest of their own: the same Multiboot image under pyhyve's processor and under QEMU's TCG.

The guest prints START, "M name count cycles" for each measurement, END cycles, and ends by its debug-exit port.
"""

import argparse
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import guests
import host
from processes import BenchError, Finished, run_to_end
from rich import box
from rich.console import Console
from rich.table import Table

DEFAULT_RUNS: Final = 3
SIDES: Final = ("pyhyve", "qemu")
_CPUS: Final = 2
_MEMORY_MIB: Final = 256
_DEBUG_EXIT: Final = "isa-debug-exit,iobase=0xf4,iosize=4"
_PASSED: Final = 2 * 0x10 + 1
"""The exit status that the guest's last write makes, on both sides."""
_TIMEOUT_S: Final = 300.0
_DISAGREEMENT: Final = 0.1
_DISAGREEMENT_S: Final = 0.25

_MEASURED: Final = re.compile(r"^M (\w+) (\d+) (\d+)$")


@dataclass(frozen=True, slots=True)
class Row:
    """Nanoseconds an operation (medians of the runs); `vs_qemu` is pyhyve's over QEMU's, smaller is better. None: not
    measured, because the side lacks it."""

    name: str
    pyhyve: float | None
    qemu: float | None

    @property
    def vs_qemu(self) -> float | None:
        return None if not self.qemu or self.pyhyve is None else self.pyhyve / self.qemu

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "pyhyve_ns": None if self.pyhyve is None else round(self.pyhyve, 3),
            "qemu_ns": None if self.qemu is None else round(self.qemu, 3),
            "vs_qemu": None if self.vs_qemu is None else round(self.vs_qemu, 4),
        }


def parse(finished: Finished, cycles_a_second: float) -> dict[str, float]:
    """Return nanoseconds an operation, by name. BenchError if the guest is not whole, or its clock is not ours."""
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
    return measured


def require(measured: Mapping[str, float], names: Collection[str], finished: Finished) -> None:
    """BenchError if one of `names` was not measured."""
    missing = [name for name in names if name not in measured]
    if missing:
        raise BenchError(f"{missing[0]}: not measured", finished.tail())


def command(side: str, image: Path, qemu: str | None) -> list[str]:
    if side == "pyhyve":
        words = [*host.pyhyve_command(), "run", "--processor", "bt", "-c", str(_CPUS), "-m", f"{_MEMORY_MIB}M"]
        return [*words, "-l", _DEBUG_EXIT, "--kernel", str(image)]
    assert qemu is not None
    words = [qemu, "-accel", "tcg,thread=multi", "-cpu", "max", "-machine", "q35", "-display", "none"]
    words += ["-serial", "stdio", "-monitor", "none", "-no-reboot", "-smp", str(_CPUS), "-m", str(_MEMORY_MIB)]
    return [*words, "-device", _DEBUG_EXIT, "-kernel", str(image)]


Reader = Callable[[str, Finished, float], dict[str, float]]
"""(side, the guest's run, cycles a second): nanoseconds an operation, by name."""


def measure(
    image: str,
    runs: int,
    names: Sequence[str],
    qemu: str | None,
    read: Reader,
    on_start: Callable[[int], None] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> list[Row]:
    """Run guest/<image>.c on both sides; return a row for each name. BenchError, with the side, if a guest fails."""
    from pyhyve.vmm import hostcpu

    hostcpu.start_measuring()
    cycles_a_second = hostcpu.tsc_khz() * 1000.0
    sides = SIDES if qemu is not None else SIDES[:1]
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="pyhyve-bench-") as scratch:
        program = guests.compile_flat(image, Path(scratch))
        for number in range(1, runs + 1):
            for side in sides:
                print(f"bench: run {number} of {runs}: {side}", file=sys.stderr)
                try:
                    finished = run_to_end(command(side, program, qemu), _TIMEOUT_S, None, on_line, on_start)
                    samples[side].append(read(side, finished, cycles_a_second))
                except BenchError as error:
                    raise BenchError(f"{side}: {error}", error.output) from None

    def median(side: str, name: str) -> float | None:
        values = [sample[name] for sample in samples[side] if name in sample]
        return statistics.median(values) if values else None

    return [Row(name, median("pyhyve", name), median("qemu", name)) for name in names]


def main(image: str, about: str, descriptions: Mapping[str, str], measure_rows: Callable[..., list[Row]]) -> int:
    """Be the main() of bench/<image>.py. `measure_rows` takes runs, names, and QEMU's path or None."""
    arguments = parse_arguments(image, about, tuple(descriptions))
    rows: list[Row] = []

    def work() -> Mapping[str, object]:
        qemu = None if arguments.no_qemu else host.find_qemu()
        machine = host.prepare(qemu)
        rows.extend(measure_rows(arguments.runs, arguments.names, qemu))
        return {"machine": machine, "runs": arguments.runs, "rows": [row.to_json() for row in rows]}

    def show() -> None:
        if arguments.markdown:
            print(markdown(rows, descriptions))
        else:
            Console().print(table(rows))

    return host.run(work, f"{image}.json", None if arguments.as_json else show)


def table(rows: Sequence[Row]) -> Table:
    drawn = Table(
        box=box.HORIZONTALS, show_edge=False, pad_edge=False, caption="the best of several, medians of the runs"
    )
    drawn.add_column("", no_wrap=True)
    for heading in ("pyhyve, ns", "QEMU, ns", "vs QEMU"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        drawn.add_row(row.name, *cells(row))
    return drawn


def cells(row: Row) -> tuple[str, str, str]:
    ratio = "-" if row.vs_qemu is None else f"{row.vs_qemu:.2g}"
    return nanoseconds(row.pyhyve), nanoseconds(row.qemu), ratio


def nanoseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def markdown(rows: Sequence[Row], descriptions: Mapping[str, str]) -> str:
    """Return the rows as the table of docs/performance.md."""
    lines = ["| | pyhyve, ns | QEMU TCG, ns | vs QEMU | what |", "| --- | ---: | ---: | ---: | --- |"]
    lines += [f"| {' | '.join((row.name, *cells(row), descriptions[row.name]))} |" for row in rows]
    return "\n".join(lines)


def parse_arguments(
    image: str, about: str, names: Sequence[str], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"bench/{image}.py", description=about)
    host.add_runs(parser, DEFAULT_RUNS)
    parser.add_argument("--only", metavar="NAME,...", help=f"show only these of {', '.join(names)}")
    parser.add_argument("--no-qemu", action="store_true", help="pyhyve alone")
    host.add_json(parser, "table")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    arguments = parser.parse_args(argv)
    host.check_runs(parser, arguments.runs)
    arguments.names = host.chosen(parser, arguments.only, names)
    return arguments
