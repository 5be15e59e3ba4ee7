"""A port by which a guest ends the run with a number of its own: QEMU's isa-debug-exit."""

from collections.abc import Callable

from pyhyve.vmm.bus import ONES


class DebugExit:
    """`on_exit` is called with what the guest writes; reads give nothing."""

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        return ONES[size]

    def write(self, offset: int, size: int, value: int) -> None:
        self._on_exit(value)
