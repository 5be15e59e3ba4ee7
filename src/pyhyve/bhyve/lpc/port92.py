"""System control port A, 0x92: the fast A20 gate and fast reset. Address line 20 is never masked."""

from collections.abc import Callable
from typing import Final

FAST_RESET: Final = 1 << 0
A20: Final = 1 << 1


class SystemControl:
    """`on_reset` is called when FAST_RESET rises. A20 reads as set whatever is written."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._value = A20

    def reset(self) -> None:
        self._value = A20

    def read(self, offset: int, size: int) -> int:
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        risen = value & ~self._value
        self._value = value & 0xFF & ~FAST_RESET | A20
        if risen & FAST_RESET:
            self._on_reset()
