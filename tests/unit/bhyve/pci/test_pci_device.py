"""What a declared device shows a guest."""

from collections.abc import Sequence
from typing import ClassVar

import pytest

from pyhyve.base.protocols import IoHandler
from pyhyve.bhyve.pci import bits
from pyhyve.bhyve.pci.device import Bar, BarKind, Capability, Identity, PciDevice


class Disk(PciDevice):
    IDENTITY = Identity(0x1AF4, 0x1001, class_code=0x010802, revision=3, subsystem_vendor=0x1AF4, subsystem=2)
    BARS: ClassVar = {
        0: Bar(64, BarKind.IO),
        1: Bar(0x1000, BarKind.MEM32),
        2: Bar(1 << 33, BarKind.MEM64, prefetchable=True),
    }
    CAPABILITIES: ClassVar[Sequence[Capability]] = (
        Capability(bits.CAP_VENDOR, b"\x04\x01", writable=b"\x00\xff"),
        Capability(bits.CAP_MSIX, bytes(10)),
    )
    INTERRUPT_PIN = 1

    def bar_read(self, index: int, offset: int, size: int) -> int:
        return index << 16 | offset << 8 | size


class Space:
    def __init__(self) -> None:
        self.mapped: dict[tuple[BarKind, int], tuple[int, IoHandler]] = {}

    def map_bar(self, kind: BarKind, base: int, size: int, handler: IoHandler) -> None:
        self.mapped[kind, base] = size, handler

    def unmap_bar(self, kind: BarKind, base: int, size: int) -> None:
        assert self.mapped.pop((kind, base))[0] == size


@pytest.fixture
def space() -> Space:
    return Space()


@pytest.fixture
def disk(space: Space) -> Disk:
    disk = Disk()
    disk.connect(8, space)
    return disk


def test_identity_is_read_only(disk: Disk) -> None:
    disk.write_config(0, 4, 0)
    assert disk.read_config(bits.VENDOR_ID, 4) == 0x1001_1AF4
    assert disk.read_config(bits.REVISION_ID, 4) == 0x010802_03
    assert disk.read_config(bits.SUBSYSTEM_VENDOR_ID, 4) == 0x0002_1AF4
    assert disk.read_config(bits.INTERRUPT_PIN, 1) == 1


def test_interrupt_line_is_the_guests_to_write(disk: Disk) -> None:
    disk.write_config(bits.INTERRUPT_LINE, 1, 11)
    assert disk.read_config(bits.INTERRUPT_LINE, 2) == 0x010B


@pytest.mark.parametrize(
    ("index", "sized"), [(0, 0xFFFF_FFC1), (1, 0xFFFF_F000), (2, 0x0000_000C), (3, 0xFFFF_FFFE), (4, 0), (5, 0)]
)
def test_writing_ones_tells_the_size(disk: Disk, index: int, sized: int) -> None:
    disk.write_config(bits.BAR0 + 4 * index, 4, 0xFFFF_FFFF)
    assert disk.read_config(bits.BAR0 + 4 * index, 4) == sized


def test_bars_are_decoded_as_the_command_register_says(disk: Disk, space: Space) -> None:
    disk.write_config(bits.BAR0, 4, 0x2000)
    disk.write_config(bits.BAR0 + 4, 4, 0xC000_0000)
    disk.write_config(bits.BAR0 + 12, 4, 0x8)
    assert not space.mapped
    disk.write_config(bits.COMMAND, 2, bits.COMMAND_MEMORY)
    assert set(space.mapped) == {(BarKind.MEM32, 0xC000_0000), (BarKind.MEM64, 0x8_0000_0000)}
    disk.write_config(bits.COMMAND, 2, bits.COMMAND_MEMORY | bits.COMMAND_IO)
    assert disk.decoded == {0: 0x2000, 1: 0xC000_0000, 2: 0x8_0000_0000}
    size, handler = space.mapped[BarKind.MEM32, 0xC000_0000]
    assert size == 0x1000
    assert handler.read(0x10, 4) == 1 << 16 | 0x10 << 8 | 4
    disk.write_config(bits.BAR0 + 4, 4, 0xC100_0000)
    assert (BarKind.MEM32, 0xC100_0000) in space.mapped
    assert (BarKind.MEM32, 0xC000_0000) not in space.mapped
    disk.write_config(bits.COMMAND, 2, 0)
    assert not space.mapped


def test_a_write_that_changes_nothing_moves_nothing(disk: Disk) -> None:
    class Once(Space):
        def unmap_bar(self, kind: BarKind, base: int, size: int) -> None:
            raise AssertionError("moved")

    disk.connect(8, Once())
    disk.set_bar(1, 0xC000_0000)
    disk.write_config(bits.COMMAND, 2, bits.COMMAND_MEMORY)
    disk.write_config(bits.COMMAND, 2, bits.COMMAND_MEMORY | bits.COMMAND_BUS_MASTER)
    disk.write_config(bits.BAR0 + 4, 4, 0xC000_0000)
    assert disk.decoded == {1: 0xC000_0000}


def test_firmware_can_assign_aligned_addresses_only(disk: Disk) -> None:
    disk.set_bar(2, 1 << 35)
    assert disk.bar_base(2) == 1 << 35
    with pytest.raises(ValueError, match="aligned"):
        disk.set_bar(1, 0x800)


def test_capabilities_are_chained_and_masked(disk: Disk) -> None:
    assert disk.read_config(bits.STATUS, 2) & bits.STATUS_CAPABILITIES
    first = disk.read_config(bits.CAPABILITIES_POINTER, 1)
    assert disk.read_config(first, 1) == bits.CAP_VENDOR
    second = disk.read_config(first + 1, 1)
    assert second % 4 == 0
    assert disk.read_config(second, 2) == bits.CAP_MSIX
    disk.write_config(first, 4, 0xFFFF_FFFF)
    assert disk.read_config(first, 4) == 0xFF04_0000 | second << 8 | bits.CAP_VENDOR


def test_reset_undoes_what_the_guest_wrote(disk: Disk, space: Space) -> None:
    disk.set_bar(1, 0xC000_0000)
    disk.write_config(bits.COMMAND, 2, bits.COMMAND_MEMORY)
    disk.reset()
    assert not space.mapped
    assert disk.read_config(bits.COMMAND, 2) == 0


def test_overlapping_bars_are_a_declaration_error() -> None:
    class Bad(Disk):
        BARS: ClassVar = {0: Bar(16, BarKind.MEM64), 1: Bar(16, BarKind.MEM32)}

    with pytest.raises(ValueError, match="overlaps"):
        Bad()
    with pytest.raises(ValueError, match="power of two"):
        Bar(48, BarKind.MEM32)
