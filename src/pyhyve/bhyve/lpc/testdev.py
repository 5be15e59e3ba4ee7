"""The device of test suites for hypervisors, as bhyve's and QEMU's pc-testdev show it to them.

| where | what |
| --- | --- |
| ports 0xE0-0xE3 | a register that keeps what is written to it, for accesses of every size |
| ports 0xE4-0xE7 | takes the address of a page that shall be mapped anew; reads give 0 |
| ports 0xE8-0xEB | a register that is read and written by bytes, however wide the access |
| ports 0x2000-0x2017 | the interrupt lines 0 to 23: 1 asserts, 0 releases |
| memory 0xFF00_0000, 64 KiB | keeps what is written to it; every access is an exit |
"""

from collections.abc import Sequence
from typing import Final

from pyhyve.base.protocols import IrqPin

REGISTER_PORT: Final = 0xE0
FLUSH_PORT: Final = 0xE4
BYTES_PORT: Final = 0xE8
REGISTER_SIZE: Final = 4
IRQ_PORT: Final = 0x2000
IRQ_LINES: Final = 24
ISA_LINES: Final = 16
"""Lines from here on go to the I/O APIC only."""
MEMORY_BASE: Final = 0xFF00_0000
MEMORY_SIZE: Final = 0x1_0000
EXIT_PORT: Final = 0xF4
EXIT_SIZE: Final = 4


class Register:
    """Little-endian bytes that keep what is written."""

    def __init__(self, size: int) -> None:
        self._data = bytearray(size)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        end = min(offset + size, len(self._data))
        self._data[offset:end] = value.to_bytes(size, "little")[: end - offset]


class FlushPage:
    """Takes addresses to no effect: the guest cannot see whether a page of its memory is mapped anew."""

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass


class IrqLines:
    """Port n drives the n-th of `pins`."""

    def __init__(self, pins: Sequence[IrqPin]) -> None:
        self._pins = pins

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._pins[offset].set_level(bool(value))
