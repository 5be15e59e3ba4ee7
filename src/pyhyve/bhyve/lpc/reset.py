"""The chipset's own reset register at port 0xCF9.

It lies inside PCI's address register 0xCF8-0xCFB, which takes 32-bit accesses only: `pci.bus.ConfigPorts` passes the
byte accesses on. Source: Intel ICH9 datasheet, "RST_CNT - Reset Control Register".
"""

from collections.abc import Callable
from typing import Final

SYSTEM_RESET: Final = 1 << 1
RESET_CPU: Final = 1 << 2
FULL_RESET: Final = 1 << 3
_WRITABLE: Final = SYSTEM_RESET | RESET_CPU | FULL_RESET


class ResetControl:
    """`on_reset` is called when RESET_CPU rises: hard with SYSTEM_RESET, with or without the power cycle."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._value = 0

    def reset(self) -> None:
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        risen = value & ~self._value
        self._value = value & _WRITABLE
        if risen & RESET_CPU:
            self._on_reset()
