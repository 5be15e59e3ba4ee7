"""The small interfaces by which chips and devices are wired: pins, messages, memory, clocks, buses.

Chips are handed these; they never look for them. `base.fakes` has one of each for tests.
"""

from collections.abc import Callable
from typing import Protocol


class IrqPin(Protocol):
    """One input of an interrupt controller, held by one source. Levels are counted by the controller, not here."""

    def set_level(self, asserted: bool) -> None:
        """Drive the line: True asserts. Repeating a level is harmless (each source holds its pin once)."""
        ...

    def pulse(self) -> None:
        """Assert and deassert: an edge."""
        ...


class MsiSink(Protocol):
    """Where message-signalled interrupts go. `addr` and `data` are opaque to the caller."""

    def send_msi(self, addr: int, data: int) -> None: ...


class GuestMemory(Protocol):
    """Guest-physical memory by address (bytes); accesses outside RAM raise IndexError."""

    def read(self, gpa: int, length: int) -> bytes: ...

    def write(self, gpa: int, data: bytes) -> None: ...


class Clock(Protocol):
    """Host-monotonic time that stands still while the VM is paused."""

    def now(self) -> int:
        """Nanoseconds, never going back."""
        ...


class Timer(Protocol):
    """A pending call; cancelling one that has fired is harmless."""

    def cancel(self) -> None: ...


class Timers(Protocol):
    """Calls at absolute times of the Clock, made on the VM's event thread."""

    def call_at(self, deadline_ns: int, callback: Callable[[], None]) -> Timer: ...


class IoHandler(Protocol):
    """A port or MMIO range. `offset` is from the range's start; `size` is 1, 2, 4 or 8 bytes; values are unsigned."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...
