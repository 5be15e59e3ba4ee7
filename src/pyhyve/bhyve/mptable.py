"""The MultiProcessor tables, for kernels that do without ACPI (Linux: acpi=off).

Source: Intel MultiProcessor Specification 1.4, "MP Configuration Table" and its appendices; for the I/O APIC's inputs
of PCI, section D.3, "I/O Interrupt Assignment Entries for PCI Devices".
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from pyhyve.bhyve import layout
from pyhyve.bhyve.acpi.tables import checksum
from pyhyve.bhyve.pci.bits import SLOTS
from pyhyve.bhyve.pci.bus import intx_pin

REVISION: Final = 4
"""Of the specification: 1.4."""
POINTER_SIZE: Final = 16
HEADER_SIZE: Final = 44

PROCESSOR: Final = 0
BUS: Final = 1
IOAPIC: Final = 2
IO_INTERRUPT: Final = 3
LOCAL_INTERRUPT: Final = 4

CPU_ENABLED: Final = 1
CPU_BOOTSTRAP: Final = 2
IOAPIC_ENABLED: Final = 1

# Interrupt types.
INT: Final = 0
NMI: Final = 1
EXTINT: Final = 3

CONFORMING: Final = 0
"""Polarity and trigger mode are the bus's own: active high and edge on ISA, active low and level on PCI."""
ACTIVE_LOW_LEVEL: Final = 0xF

PCI_BUS: Final = 0
ISA_BUS: Final = 1
ALL_APICS: Final = 0xFF

_CASCADE: Final = 2
_ISA_LINES: Final = 16
_PINS: Final = 4
_PROCESSOR_SIZE: Final = 20
_MAX_ID: Final = 0xFE
"""Entries have 8 bits for an APIC id, and 0xFF means all of them."""
_SIZE: Final = layout.SMBIOS_BASE - layout.MPTABLE_BASE


def build_mptable(
    apic_ids: Sequence[int],
    *,
    signature: int,
    features: int,
    lapic_version: int,
    ioapic_version: int,
    ioapic_pins: int = layout.IOAPIC_PINS,
) -> bytes:
    """Return the floating pointer and the configuration table behind it, for layout.MPTABLE_BASE.

    `signature` and `features` are EAX and EDX of the processors' CPUID leaf 1. The first processor is the bootstrap
    one. Those with an id of more than 8 bits, and what does not fit below layout.SMBIOS_BASE, are left out: some 140
    processors fit.
    """
    rest = [*_buses(), _ioapic(ioapic_version), *_io_interrupts(ioapic_pins), *_local_interrupts()]
    room = (_SIZE - POINTER_SIZE - HEADER_SIZE - sum(map(len, rest))) // _PROCESSOR_SIZE
    processors = [
        _processor(apic_id, lapic_version, signature, features, bootstrap=number == 0)
        for number, apic_id in enumerate(apic_ids[:room])
        if apic_id <= _MAX_ID
    ]
    return _pointer(layout.MPTABLE_BASE + POINTER_SIZE) + _table([*processors, *rest])


def _pointer(table: int) -> bytes:
    """The floating pointer structure; its feature bytes say that there is a table, and virtual wire mode before it."""
    data = struct.pack("<4sIBB6x", b"_MP_", table, POINTER_SIZE // 16, REVISION)
    return data[:10] + bytes((checksum(data),)) + data[11:]


def _table(entries: Sequence[bytes]) -> bytes:
    body = b"".join(entries)
    head = struct.pack(
        "<4sHBB8s12sIHHIHBB",
        b"PCMP",
        HEADER_SIZE + len(body),
        REVISION,
        0,
        b"BHyVe   ",
        b"Hypervisor  ",
        0,  # no table of the maker's
        0,
        len(entries),
        layout.LAPIC_BASE,
        0,  # no extended entries
        0,
        0,
    )
    return head[:7] + bytes((checksum(head + body),)) + head[8:] + body


def _processor(apic_id: int, version: int, signature: int, features: int, *, bootstrap: bool) -> bytes:
    flags = CPU_ENABLED | (CPU_BOOTSTRAP if bootstrap else 0)
    return struct.pack("<BBBBII8x", PROCESSOR, apic_id, version, flags, signature, features)


def _buses() -> Iterator[bytes]:
    for bus, name in ((PCI_BUS, b"PCI   "), (ISA_BUS, b"ISA   ")):
        yield struct.pack("<BB6s", BUS, bus, name)


def _ioapic(version: int) -> bytes:
    return struct.pack("<BBBBI", IOAPIC, 0, version, IOAPIC_ENABLED, layout.IOAPIC_BASE)


def _io_interrupts(ioapic_pins: int) -> Iterator[bytes]:
    """The ISA lines, then every line of every slot of PCI's bus 0."""
    for line in range(_ISA_LINES):
        if line == _CASCADE:
            continue
        pin = layout.PIT_IOAPIC_PIN if line == layout.PIT_IRQ else line
        flags = ACTIVE_LOW_LEVEL if line == layout.SCI_IRQ else CONFORMING
        yield _interrupt(IO_INTERRUPT, INT, flags, ISA_BUS, line, 0, pin)
    for slot in range(SLOTS):
        for pin in range(_PINS):
            target = intx_pin(slot, pin + 1, ioapic_pins)
            yield _interrupt(IO_INTERRUPT, INT, CONFORMING, PCI_BUS, slot << 2 | pin, 0, target)


def _local_interrupts() -> Iterator[bytes]:
    """The 8259s on LINT0, NMI on LINT1."""
    for pin, kind in enumerate((EXTINT, NMI)):
        yield _interrupt(LOCAL_INTERRUPT, kind, CONFORMING, ISA_BUS, 0, ALL_APICS, pin)


def _interrupt(entry: int, kind: int, flags: int, bus: int, line: int, apic: int, pin: int) -> bytes:
    return struct.pack("<BBHBBBB", entry, kind, flags, bus, line, apic, pin)
