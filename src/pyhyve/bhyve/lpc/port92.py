"""System control port A, 0x92: the fast A20 gate and fast reset."""

from collections.abc import Callable
from typing import Final

FAST_RESET: Final = 1 << 0
A20: Final = 1 << 1


class SystemControl:
    """`on_reset` is called when FAST_RESET rises; `on_a20` when A20 changes, with whether address line 20 is let
    through. Without `on_a20`, A20 reads as set whatever is written."""

    def __init__(self, on_reset: Callable[[], None], on_a20: Callable[[bool], None] | None = None) -> None:
        self._on_reset = on_reset
        self._on_a20 = on_a20
        self._value = A20

    def reset(self) -> None:
        self._value = A20

    def read(self, offset: int, size: int) -> int:
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        before = self._value
        self._value = value & 0xFF & ~FAST_RESET | (A20 if self._on_a20 is None else 0)
        if (before ^ self._value) & A20 and self._on_a20 is not None:
            self._on_a20(bool(self._value & A20))
        if value & ~before & FAST_RESET:
            self._on_reset()
