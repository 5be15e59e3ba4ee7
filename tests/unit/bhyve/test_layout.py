"""The memory map has no two things at one place."""

import itertools

import pytest

from pyhyve.bhyve import layout


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [
        (16 * layout.MIB, 16 * layout.MIB, 0),
        (3 * layout.GIB, 3 * layout.GIB, 0),
        (3 * layout.GIB + 4096, 3 * layout.GIB, 4096),
        (64 * layout.GIB, 3 * layout.GIB, 61 * layout.GIB),
    ],
)
def test_ram_is_split_at_three_gib(size: int, low: int, high: int) -> None:
    assert layout.split_ram(size) == (low, high)


@pytest.mark.parametrize("size", [16 * layout.MIB, 256 * layout.MIB, 3 * layout.GIB, 8 * layout.GIB])
def test_memory_map_ascends_without_overlap_and_holds_all_ram(size: int) -> None:
    low, high = layout.split_ram(size)
    ranges = layout.memory_map(low, high)
    for lower, upper in itertools.pairwise(ranges):
        assert lower.base + lower.size <= upper.base
    usable = sum(entry.size for entry in ranges if entry.kind == layout.E820_RAM)
    assert usable == size - (layout.BIOS_LIMIT - layout.CONVENTIONAL_LIMIT)


def test_memory_map_reserves_the_configuration_space() -> None:
    assert (layout.PCI_ECAM_BASE, layout.PCI_ECAM_SIZE, layout.E820_RESERVED) in layout.memory_map(layout.GIB, 0)


def test_boot_structures_are_apart_and_in_conventional_memory() -> None:
    page = layout.PAGE_SIZE
    spans = [
        (layout.BOOT_GDT, page),
        (layout.BOOT_STACK_TOP - page, page),
        (layout.ZERO_PAGE, page),
        (layout.BOOT_PAGE_TABLES, layout.BOOT_PAGE_TABLES_LIMIT - layout.BOOT_PAGE_TABLES),
        (layout.COMMAND_LINE, layout.COMMAND_LINE_LIMIT - layout.COMMAND_LINE),
    ]
    for (base, size), (following, _) in itertools.pairwise(spans):
        assert base + size <= following
    assert spans[0][0] >= 0x500  # the BIOS data area ends there
    assert layout.COMMAND_LINE_LIMIT <= layout.CONVENTIONAL_LIMIT


def test_chips_and_windows_lie_between_low_and_high_ram() -> None:
    spans = [
        (layout.PCI_MEM32_BASE, layout.PCI_MEM32_LIMIT),
        (layout.PCI_ECAM_BASE, layout.PCI_ECAM_BASE + layout.PCI_ECAM_SIZE),
        (layout.IOAPIC_BASE, layout.IOAPIC_BASE + layout.IOAPIC_SIZE),
        (layout.HPET_BASE, layout.HPET_BASE + layout.HPET_SIZE),
        (layout.LAPIC_BASE, layout.LAPIC_BASE + layout.LAPIC_SIZE),
        (layout.BOOTROM_LIMIT - layout.BOOTROM_MAX_SIZE, layout.BOOTROM_LIMIT),
    ]
    assert spans[0][0] == layout.LOW_RAM_LIMIT
    assert spans[-1][1] <= layout.HIGH_RAM_BASE
    for (_, limit), (base, _) in itertools.pairwise(spans):
        assert limit <= base


def test_rsdp_is_where_a_guest_scans_for_it() -> None:
    assert layout.RSDP % 16 == 0
    assert 0xE0000 <= layout.RSDP < 0x100000


@pytest.mark.parametrize("high", [0, 1, 28 * layout.GIB, 29 * layout.GIB])
def test_64bit_pci_window_is_above_ram_and_aligned(high: int) -> None:
    base = layout.pci_mem64_base(high)
    assert base >= layout.HIGH_RAM_BASE + high
    assert base % layout.PCI_MEM64_SIZE == 0
