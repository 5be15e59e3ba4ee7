"""The MultiProcessor tables: Intel MultiProcessor Specification 1.4, "MP Configuration Table"."""

import struct
from collections.abc import Sequence

import pytest

from pyhyve.bhyve import layout, mptable
from pyhyve.bhyve.pci.bus import intx_pin

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def build(apic_ids: Sequence[int] = range(4), ioapic_pins: int = 32) -> bytes:
    return mptable.build_mptable(
        apic_ids,
        signature=0xA10F11,
        features=0x1783_FBFF,
        lapic_version=0x14,
        ioapic_version=0x20,
        ioapic_pins=ioapic_pins,
    )


def entries(data: bytes, kind: int) -> list[bytes]:
    """The entries of one kind, found as a kernel does: from the pointer, by count and type."""
    table = struct.unpack_from("<I", data, 4)[0] - layout.MPTABLE_BASE
    count, at = struct.unpack_from("<H", data, table + 34)[0], table + 44
    found = []
    last = 0
    for _ in range(count):
        entry = data[at : at + SIZES[data[at]]]
        assert entry[0] >= last, "entries are sorted by their type"
        last = entry[0]
        if last == kind:
            found.append(entry)
        at += len(entry)
    assert at == table + struct.unpack_from("<H", data, table + 4)[0] == len(data)
    return found


def test_pointer_leads_to_a_table_and_both_have_valid_sums() -> None:
    data = build()
    assert layout.MPTABLE_BASE % 16 == 0
    assert data[:4] == b"_MP_"
    assert (data[8], data[9]) == (1, 4), "16 bytes, of revision 1.4"
    assert data[11:16] == bytes(5), "there is a table; virtual wire mode"
    assert sum(data[:16]) & 0xFF == 0
    table = data[struct.unpack_from("<I", data, 4)[0] - layout.MPTABLE_BASE :]
    assert table[:4] == b"PCMP"
    assert table[6] == 4
    assert sum(table) & 0xFF == 0
    assert struct.unpack_from("<I", table, 36)[0] == layout.LAPIC_BASE


def test_every_processor_is_there_and_the_first_starts_the_machine() -> None:
    processors = [struct.unpack("<BBBBII8x", entry) for entry in entries(build((0, 1, 4, 5)), mptable.PROCESSOR)]
    assert [(apic_id, flags) for _, apic_id, _, flags, _, _ in processors] == [(0, 3), (1, 1), (4, 1), (5, 1)]
    assert {rest for _, _, *_, rest in processors} == {0x1783_FBFF}
    assert {(version, signature) for _, _, version, _, signature, _ in processors} == {(0x14, 0xA10F11)}


@pytest.mark.parametrize("pins", [24, 32])
def test_interrupts_go_where_they_are_wired(pins: int) -> None:
    data = build(ioapic_pins=pins)
    buses = {entry[1]: entry[2:].rstrip() for entry in entries(data, mptable.BUS)}
    (ioapic,) = (struct.unpack("<BBBBI", entry) for entry in entries(data, mptable.IOAPIC))
    assert ioapic == (2, 0, 0x20, 1, layout.IOAPIC_BASE)
    wired = {}
    for entry in entries(data, mptable.IO_INTERRUPT):
        _, kind, flags, bus, line, apic, pin = struct.unpack("<BBHBBBB", entry)
        assert (kind, apic) == (mptable.INT, 0)
        wired[buses[bus], line] = (pin, flags)
    isa = {line: target for (bus, line), target in wired.items() if bus == b"ISA"}
    assert isa.pop(layout.PIT_IRQ) == (layout.PIT_IOAPIC_PIN, 0)
    assert isa.pop(layout.SCI_IRQ) == (layout.SCI_IRQ, 0xF), "active low and level"
    assert isa == {line: (line, 0) for line in range(1, 16) if line not in (2, 9)}
    pci = {line: target for (bus, line), target in wired.items() if bus == b"PCI"}
    assert pci == {slot << 2 | pin: (intx_pin(slot, pin + 1, pins), 0) for slot in range(32) for pin in range(4)}
    assert max(pin for pin, _ in pci.values()) == pins - 1


def test_local_interrupts_are_the_8259s_and_nmi_on_every_processor() -> None:
    found = [struct.unpack("<BBHBBBB", entry) for entry in entries(build(), mptable.LOCAL_INTERRUPT)]
    assert [(kind, apic, pin) for _, kind, _, _, _, apic, pin in found] == [
        (mptable.EXTINT, 0xFF, 0),
        (mptable.NMI, 0xFF, 1),
    ]


def test_processors_that_cannot_be_named_or_do_not_fit_are_left_out() -> None:
    wide = entries(build((0, 1, 255, 256)), mptable.PROCESSOR)
    assert [entry[1] for entry in wide] == [0, 1]
    data = build(range(254))
    assert len(data) <= layout.SMBIOS_BASE - layout.MPTABLE_BASE
    assert len(entries(data, mptable.PROCESSOR)) > 128
