"""What an interrupt costs: python bench/interrupts.py [--runs N] [--only NAME,...] [--no-qemu] [--json]

A guest without an operating system (guest/interrupts.c) times interrupts from the timer's deadline, or another
processor, to their handlers, under pyhyve's software processor and under QEMU's TCG; and the host measures what ticks
cost it. Prints a table (docs/performance.md says what each row is), writes bench/out/interrupts.json.
"""

import re
import sys
from collections.abc import Sequence
from typing import Final

import host
import sides
from processes import Finished

DESCRIPTIONS: Final = {
    "oneshot_halted": "the local APIC's timer, one-shot: from its time to the handler of a processor in HLT",
    "oneshot_spinning": "the same, in a loop",
    "deadline_halted": "the same with a TSC deadline, in HLT",
    "deadline_spinning": "the same, in a loop",
    "eoi": "a write to the EOI register",
    "eoi_x2apic": "the same, by WRMSR",
    "timer_write": "a write to the timer's initial count",
    "timer_write_x2apic": "the same, by WRMSR",
    "deadline_write": "a WRMSR of the TSC deadline",
    "self_ipi": "an IPI to the sender itself, until its handler runs",
    "self_ipi_x2apic": "the same, by WRMSR",
    "ipi_spinning": "an IPI to another processor and one back, both in a loop",
    "ipi_spinning_x2apic": "the same, by WRMSR",
    "ipi_halted": "the same, both in HLT",
    "ipi_halted_x2apic": "the same, by WRMSR",
    "tick_periodic": "processor time of all the host's threads for a tick, 1,000 a second, by a periodic timer, in HLT",
    "tick_oneshot": "the same, by a one-shot timer set anew",
    "tick_deadline": "the same, by a TSC deadline set anew",
    "tick_pit": "the same, by the 8254 and the 8259",
    "tick_hpet": "the same, by the HPET and the 8259",
}
NAMES: Final = tuple(DESCRIPTIONS)
QEMU_LACKS: Final = frozenset(name for name in NAMES if "x2apic" in name or "deadline" in name)
"""What QEMU's TCG may not have (7.2 does not)."""
_TICK: Final = re.compile(r"^([TD]) (\w+)(?: (\d+))?$")


class TickMeter:
    """Processor time of a process between what its guest prints around its ticks."""

    def __init__(self) -> None:
        self.nanoseconds: dict[str, float] = {}
        """Of a tick, by name."""
        self._pid = 0
        self._before = 0.0

    def start(self, pid: int) -> None:
        """Another process: nothing is known of its ticks."""
        self._pid = pid
        self.nanoseconds = {}

    def line(self, text: str) -> None:
        match = _TICK.match(text.strip())
        if match is None:
            return
        spent = host.cpu_seconds(self._pid)
        if match[1] == "T":
            self._before = spent
        else:
            self.nanoseconds[match[2]] = (spent - self._before) / int(match[3]) * 1e9


def measure(runs: int, names: Sequence[str], qemu: str | None) -> list[sides.Row]:
    """Return a row for each name. BenchError, with the side, if a guest fails or leaves something out."""
    meter = TickMeter()

    def read(side: str, finished: Finished, cycles_a_second: float) -> dict[str, float]:
        measured = sides.parse(finished, cycles_a_second) | meter.nanoseconds
        sides.require(measured, set(NAMES) - (QEMU_LACKS if side == "qemu" else set()), finished)
        return measured

    return sides.measure("interrupts", runs, names, qemu, read, meter.start, meter.line)


if __name__ == "__main__":
    sys.exit(sides.main("interrupts", "Time interrupts.", DESCRIPTIONS, measure))
