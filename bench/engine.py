"""What the processor does in how long: python bench/engine.py [--runs N] [--only NAME,...] [--no-qemu] [--json]

A guest without an operating system (guest/engine.c) times single operations, under pyhyve's software processor and
under QEMU's TCG: the same Multiboot image for both. Prints a table (docs/performance.md says what each row is), writes
bench/out/engine.json.
"""

import sys
from collections.abc import Sequence
from typing import Final

import sides
from processes import Finished

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


def parse(finished: Finished, cycles_a_second: float) -> dict[str, float]:
    """Return nanoseconds an operation, by name. BenchError if one is missing, or the guest's clock is not ours."""
    measured = sides.parse(finished, cycles_a_second)
    sides.require(measured, (*NAMES, _WAIT), finished)
    for name in _WAITED:
        measured[name] = max(0.0, measured[name] - measured[_WAIT])
    return measured


def measure(runs: int, names: Sequence[str], qemu: str | None) -> list[sides.Row]:
    return sides.measure("engine", runs, names, qemu, lambda _, finished, hertz: parse(finished, hertz))


if __name__ == "__main__":
    sys.exit(sides.main("engine", "Time single operations of the processor.", DESCRIPTIONS, measure))
