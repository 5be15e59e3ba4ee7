"""Wires between devices and interrupt controllers."""

from collections.abc import Callable
from typing import Protocol

from pyhyve.base.protocols import IrqPin


class Lock(Protocol):
    def acquire(self, blocking: bool = True) -> bool: ...

    def release(self) -> None: ...


class FanOut:
    """One line to several inputs: an ISA interrupt goes to the 8259s and to the I/O APIC."""

    __slots__ = ("_pins",)

    def __init__(self, *pins: IrqPin) -> None:
        self._pins = pins

    def set_level(self, asserted: bool) -> None:
        for pin in self._pins:
            pin.set_level(asserted)

    def pulse(self) -> None:
        for pin in self._pins:
            pin.pulse()


class Switch:
    """A wire that can be cut, and made again with the level that its source has by then."""

    __slots__ = ("_level", "_pin", "connected")

    def __init__(self, pin: IrqPin) -> None:
        self._pin = pin
        self._level = False
        self.connected = True

    def connect(self, connected: bool) -> None:
        self.connected = connected
        self._pin.set_level(connected and self._level)

    def set_level(self, asserted: bool) -> None:
        self._level = asserted
        if self.connected:
            self._pin.set_level(asserted)

    def pulse(self) -> None:
        self.set_level(True)
        self.set_level(False)


class FabricPin:
    """An input for a device that has a lock of its own and may drive it from any thread, with that lock held.

    The interrupt controllers want the VM's device lock, which others hold when they take the device's. So this pin
    never waits: where the lock is not free at once, the event thread carries the present level over.
    """

    __slots__ = ("_call_soon", "_level", "_lock", "_pin")

    def __init__(self, pin: IrqPin, lock: Lock, call_soon: Callable[[Callable[[], None]], None]) -> None:
        self._pin = pin
        self._lock = lock
        self._call_soon = call_soon
        self._level = False

    def set_level(self, asserted: bool) -> None:
        self._level = asserted
        if self._lock.acquire(blocking=False):
            try:
                self._pin.set_level(self._level)
            finally:
                self._lock.release()
        else:
            self._call_soon(self._carry_over)

    def pulse(self) -> None:
        self.set_level(True)
        self.set_level(False)

    def _carry_over(self) -> None:
        self._pin.set_level(self._level)
