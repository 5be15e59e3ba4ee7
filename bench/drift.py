"""How true guests' clocks run: make drift, or python bench/drift.py [--minutes M] [--only NAME,…] [--serial] [--json]

Boots a stock guest on each clock source, all at the same time, with processes that keep more processors busy than the
host has. A program in the guest (guest/drift.c) reads the guest's clocks and touches a port; the host reads its own at
that moment. Prints how much faster the guest's clock went, in parts per million; see docs/performance.md.
"""

import argparse
import contextlib
import multiprocessing
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Final

import guests
import host
from processes import BenchError
from rich import box
from rich.console import Console
from rich.table import Table

PROGRAM: Final = "drift"
PORT: Final = 0x5F00
MEMORY: Final = "192M"
LIMIT_PPM: Final = 100.0

CLOCKS: Final = {
    "tsc": ("tsc", "clocksource=tsc"),
    "kvm-clock": ("kvm-clock", "clocksource=kvm-clock"),
    "hpet": ("hpet", "clocksource=hpet"),
    "acpi_pm": ("acpi_pm", "clocksource=acpi_pm"),
    "jiffies-lapic": ("jiffies", "clocksource=jiffies highres=off nohz=off lapic=notscdeadline"),
    "jiffies-pit": ("refined-jiffies", "notsc no-kvmclock hpet=disable acpi=off nolapic"),
}
"""Name → the clock source that the guest must be on, and the kernel's options for it."""
COUNTING: Final = ("jiffies-lapic", "jiffies-pit")
"""Clocks that count timer interrupts: what is lost of those, they lose. Their figures are told, not judged."""

_SOURCE: Final = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
_BOOT_S: Final = 240.0
_GRACE_S: Final = 120.0
_ENDS: Final = 5
"""How many bursts of each end are held against each other: their medians."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How a guest's clocks went: parts per million that CLOCK_MONOTONIC_RAW was faster than the host's
    CLOCK_MONOTONIC, and CLOCK_REALTIME faster than that too; over `seconds`."""

    name: str
    ppm: float
    date_ppm: float
    seconds: float
    bursts: int


class Exchange:
    """The device at PORT: takes the host's time when the guest touches it, and what the guest's clocks showed."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._taken = 0
        self._words: list[int] = []
        self._best: list[int] = []
        self.bursts: list[tuple[int, list[int]]] = []
        """(the host's time, how far each of the guest's clocks is ahead of it), ns."""

    def read(self, port: int, size: int) -> int:
        """Return whether it is to go on: for long enough, and until there are bursts enough for both ends."""
        return int(len(self.bursts) < 2 * _ENDS or self.span < self._seconds)

    def write(self, port: int, size: int, value: int) -> None:
        if port:
            self._words.append(value)
            if len(self._words) == 4:
                self._add()
        elif value == 0:
            self._taken = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            self._words.clear()
        else:
            self.bursts.append((self._taken, self._best))
            self._best = []

    def _add(self) -> None:
        """A guest that was held up between its clock and the port seems late: the best is who is furthest ahead.

        That also finds the moment at which a clock that moves in ticks has just moved.
        """
        low, high, low_real, high_real = self._words
        ahead = [(high << 32 | low) - self._taken, (high_real << 32 | low_real) - self._taken]
        self._best = [max(pair) for pair in zip(self._best, ahead, strict=True)] if self._best else ahead

    @property
    def span(self) -> float:
        """Seconds of the host between the first and the last burst."""
        return (self.bursts[-1][0] - self.bursts[0][0]) / 1e9

    def drift(self, clock: int) -> float:
        """Parts per million that a clock of the guest's gained, by the medians of both ends."""
        ends = (self.bursts[:_ENDS], self.bursts[-_ENDS:])
        (at0, ahead0), (at1, ahead1) = (
            (statistics.median(at for at, _ in end), statistics.median(ahead[clock] for _, ahead in end))
            for end in ends
        )
        return (ahead1 - ahead0) / (at1 - at0) * 1e6


def measure(name: str, kernel: Path, initramfs: Path, seconds: float, cpus: int) -> Drift:
    """Run one guest; return how its clocks went. BenchError if it is on another clock at the beginning or the end."""
    from pyhyve.bhyve.config import MachineConfig, parse_cpus, parse_size
    from pyhyve.bhyve.console import CaptureConsole
    from pyhyve.bhyve.machine import Machine

    source, options = CLOCKS[name]
    console = CaptureConsole()
    config = MachineConfig(
        kernel=kernel,
        initrd=initramfs,
        append=f"console=ttyS0 quiet pyhyve.run=/run.sh {options}",
        memory=parse_size(MEMORY),
        topology=parse_cpus(str(cpus)),
        processor="bt",
    )
    exchange = Exchange(seconds)
    with Machine(config, console) as machine:
        machine.vm.ports.attach(PORT, 8, exchange)
        outcome = machine.run(_BOOT_S + seconds * (1 if name not in COUNTING else 2) + _GRACE_S)
        output = console.output
    sources = [line.partition(" ")[2].strip() for line in output.splitlines() if line.startswith("CLOCK ")]
    if not outcome.ok or len(sources) != 2:
        raise BenchError(f"{name}: the guest ended as {outcome}", output[-2000:])
    if set(sources) != {source}:
        raise BenchError(f"{name}: the guest ran on {' and '.join(sources)}", output[-2000:])
    return Drift(
        name, round(exchange.drift(0), 2), round(exchange.drift(1), 2), round(exchange.span), len(exchange.bursts)
    )


def script(workers: int) -> bytes:
    """What the guest runs: it says on which clock it is, before and after."""
    return f"""\
for i in $(seq 20); do grep -q early {_SOURCE} || break; sleep 0.2; done
echo "CLOCK $(cat {_SOURCE})"
/{PROGRAM} {PORT} {workers}
echo "CLOCK $(cat {_SOURCE})"
""".encode()


def child(name: str, files: tuple[Path, Path], seconds: float, cpus: int, pipe: Connection) -> None:
    """One guest in a process of its own; sends a Drift or a BenchError."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pipe.send(measure(name, *files, seconds, cpus))
    except BenchError as error:
        pipe.send(error)


def measure_all(names: Sequence[str], files: tuple[Path, Path], seconds: float, cpus: int) -> list[Drift]:
    """Run these guests at the same time. BenchError of the first that fails."""
    context = multiprocessing.get_context("spawn")
    found: list[Drift] = []
    with contextlib.ExitStack() as stack:
        pipes: dict[Connection, str] = {}
        for name in names:
            ours, theirs = context.Pipe()
            process = context.Process(target=child, args=(name, files, seconds, cpus, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes[ours] = name
            stack.callback(process.join)
            stack.callback(process.terminate)
        while pipes:
            for ready in wait(list(pipes)):
                assert isinstance(ready, Connection)
                name = pipes.pop(ready)
                try:
                    result = ready.recv()
                except EOFError:
                    raise BenchError(f"{name}: its process ended") from None
                if isinstance(result, BenchError):
                    raise result
                found.append(result)
    return sorted(found, key=lambda drift: list(CLOCKS).index(drift.name))


def drift(options: argparse.Namespace) -> list[Drift]:
    """Run all that was asked for."""
    from pyhyve.base.errors import PyhyveError
    from pyhyve.bhyve.boot import guestimage

    try:
        image = guestimage.get()
    except PyhyveError as error:
        raise BenchError(str(error)) from None
    with tempfile.TemporaryDirectory(prefix="pyhyve-drift-") as place:
        scratch = Path(place)
        program = guests.compile_static(PROGRAM, scratch)
        run = scratch / "run.sh"
        run.write_bytes(script(options.workers))
        initramfs = guests.write_initramfs(image.busybox, {PROGRAM: program, "run.sh": run}, scratch / "initramfs.cpio")
        files = image.kernel, initramfs
        seconds = options.minutes * 60
        together = [[name] for name in options.names] if options.serial else [options.names]
        return [each for names in together for each in measure_all(names, files, seconds, options.cpus)]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/drift.py", description="Hold guests' clocks against the host's.")
    parser.add_argument("--minutes", type=float, metavar="M", default=10.0, help="how long (%(default)g)")
    parser.add_argument("--cpus", type=int, metavar="N", default=2, help="processors of each guest (%(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", default=3, help="busy processes in each (%(default)s)")
    parser.add_argument("--only", metavar="NAME,…", help=f"of {', '.join(CLOCKS)}")
    parser.add_argument("--serial", action="store_true", help="one guest after the other")
    host.add_json(parser, "table")
    arguments = parser.parse_args(argv)
    arguments.names = host.chosen(parser, arguments.only, tuple(CLOCKS))
    if not 0 < arguments.minutes <= 100_000:
        parser.error(f"--minutes {arguments.minutes:g}: not a time; write minutes")
    if not 1 <= arguments.cpus <= 64:
        parser.error(f"--cpus {arguments.cpus}: write a number of processors, 1 to 64")
    if not 0 <= arguments.workers <= 1000:
        parser.error(f"--workers {arguments.workers}: write a number of processes, 0 to 1000")
    return arguments


def too_fast_or_slow(found: Sequence[Drift]) -> list[str]:
    """Return the clocks that are judged and found wanting."""
    return [each.name for each in found if each.name not in COUNTING and abs(each.ppm) > LIMIT_PPM]


def table(found: Sequence[Drift]) -> Table:
    drawn = Table(box=box.HORIZONTALS, show_edge=False, pad_edge=False)
    drawn.add_column("clock")
    for title in ("ppm", "date, ppm", "seconds"):
        drawn.add_column(title, justify="right")
    for each in found:
        drawn.add_row(each.name, f"{each.ppm:,.2f}", f"{each.date_ppm:,.2f}", f"{each.seconds:,.0f}")
    return drawn


def main() -> int:
    options = parse_arguments()
    found: list[Drift] = []

    def work() -> Mapping[str, object]:
        machine = host.prepare(None)
        found.extend(drift(options))
        settings = {name: getattr(options, name) for name in ("minutes", "cpus", "workers", "serial")}
        return {"machine": machine} | settings | {"rows": [asdict(each) for each in found]}

    status = host.run(work, "drift.json", None if options.as_json else lambda: Console().print(table(found)))
    wanting = too_fast_or_slow(found)
    if wanting:
        print(f"bench: drift of more than {LIMIT_PPM:g} ppm: {', '.join(wanting)}", file=sys.stderr)
    return status or int(bool(wanting))


if __name__ == "__main__":
    sys.exit(main())
