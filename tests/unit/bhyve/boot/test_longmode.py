"""The environment that the loader builds is what a processor would read back."""

import pytest
from boot_images import Ram

from pyhyve.bhyve import layout
from pyhyve.bhyve.boot import longmode


def walk(ram: Ram, cr3: int, linear: int) -> tuple[int, int]:
    """(physical address, page size) by Intel SDM vol 3, "4-Level Paging"."""
    table = cr3
    for shift in (39, 30, 21, 12):
        entry = ram.number(table + (linear >> shift & 0x1FF) * 8, 8)
        assert entry & 3 == 3, f"not mapped: {linear:#x}"
        table = entry & 0xF_FFFF_FFFF_F000
        if shift == 12 or entry & 0x80:
            break
    size = 1 << shift
    return table + linear % size, size


@pytest.mark.parametrize("linear", [0, 0x1000, 0x1F_FFFF, 0x20_0000, 0x100_0000, 0x3FFF_FFFF, 0x4000_0000, 0xFFFF_FFFF])
def test_first_four_gib_are_mapped_onto_themselves(linear: int) -> None:
    ram = Ram(1 << 20)
    cr3 = longmode.write_identity_map(ram, layout.BOOT_PAGE_TABLES)
    assert walk(ram, cr3, linear) == (linear, 2 * layout.MIB)
    assert max(base + size for base, size in ram.writes) <= layout.BOOT_PAGE_TABLES_LIMIT


def test_what_is_above_is_not_mapped() -> None:
    ram = Ram(1 << 20)
    cr3 = longmode.write_identity_map(ram, layout.BOOT_PAGE_TABLES)
    with pytest.raises(AssertionError, match="not mapped"):
        walk(ram, cr3, 4 * layout.GIB)


@pytest.mark.parametrize("name", ["cs", "ds", "es", "fs", "gs", "ss", "tr"])
def test_descriptors_say_what_the_hidden_parts_say(name: str) -> None:
    ram = Ram(1 << 20)
    limit = longmode.write_gdt(ram, layout.BOOT_GDT)
    segment = longmode.SEGMENTS[name]
    assert segment.selector + 7 <= limit
    low, high = (ram.number(layout.BOOT_GDT + segment.selector + half, 4) for half in (0, 4))
    # Intel SDM vol 3, "Segment Descriptors"
    base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF00_0000
    attr = high >> 8 & 0xF0FF
    raw_limit = low & 0xFFFF | high & 0xF_0000
    assert base == segment.base
    assert attr == segment.attr
    assert (raw_limit << 12 | 0xFFF if attr & 0x8000 else raw_limit) == segment.limit


def test_selectors_are_those_of_the_boot_protocol() -> None:
    assert longmode.SEGMENTS["cs"].selector == 0x10
    assert {longmode.SEGMENTS[name].selector for name in ("ds", "es", "ss")} == {0x18}
    assert longmode.SEGMENTS["cs"].attr & 0x2000, "64-bit code"
