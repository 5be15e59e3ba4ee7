"""The two buses of a VM: I/O ports, found by index, and memory-mapped devices, found by page.

What nobody claims is open bus: reads give all ones, writes are lost, both are counted.
"""

from collections import Counter
from collections.abc import Callable
from typing import Final

from pyhyve.base.protocols import IoHandler

PORTS: Final = 1 << 16
ONES: Final = (0, 0xFF, 0xFFFF, 0, 0xFFFF_FFFF, 0, 0, 0, 0xFFFF_FFFF_FFFF_FFFF)
"""All ones of 1, 2, 4 or 8 bytes, by size; also the mask of a value of that size."""

PortRead = Callable[[int, int], int]
PortWrite = Callable[[int, int, int], None]


class PortBus:
    """`read[port]` and `write[port]` are the functions to call with (port - base[port], size[, value])."""

    def __init__(self) -> None:
        self.unclaimed: Counter[int] = Counter()
        """How often the guest touched each port that nobody has."""
        self.base: Final[list[int]] = [0] * PORTS
        self.read: Final[list[PortRead]] = [self._open_read] * PORTS
        self.write: Final[list[PortWrite]] = [self._open_write] * PORTS
        self._owner: Final[dict[int, IoHandler]] = {}

    def attach(self, port: int, length: int, handler: IoHandler, base: int | None = None) -> None:
        """Give `length` ports from `port` on to `handler`. ValueError if one is taken or there is no such port.

        The handler sees offsets from `base`: from `port` unless told otherwise, port numbers themselves with 0.
        """
        if not 0 <= port < port + length <= PORTS:
            raise ValueError(f"ports {port:#x}+{length:#x} are not I/O ports")
        for number in range(port, port + length):
            if number in self._owner:
                raise ValueError(f"port {number:#x} is already taken")
        for number in range(port, port + length):
            self._owner[number] = handler
            self.base[number] = port if base is None else base
            self.read[number] = handler.read
            self.write[number] = handler.write

    def detach(self, port: int, length: int) -> None:
        """Leave `length` ports from `port` on to nobody; harmless where they are."""
        for number in range(port, port + length):
            if self._owner.pop(number, None) is not None:
                self.base[number] = 0
                self.read[number] = self._open_read
                self.write[number] = self._open_write

    def _open_read(self, port: int, size: int) -> int:
        self.unclaimed[port] += 1
        return ONES[size]

    def _open_write(self, port: int, size: int, value: int) -> None:
        self.unclaimed[port] += 1


_SMALL_PAGES: Final = 64
_Range = tuple[int, int, IoHandler]


class MmioBus:
    """Devices by guest-physical address; several may share a page.

    A range of many pages (PCI's configuration space has 65,536) is kept in a list of its own, not page by page.
    """

    def __init__(self) -> None:
        self.unclaimed: Counter[int] = Counter()
        """How often the guest touched each page that is neither memory nor a device."""
        self._pages: Final[dict[int, list[_Range]]] = {}
        self._large: Final[list[_Range]] = []

    def attach(self, gpa: int, length: int, handler: IoHandler) -> None:
        """Give `length` bytes from `gpa` on to `handler`. ValueError if they overlap another device."""
        limit = gpa + length
        if length <= 0 or gpa < 0:
            raise ValueError(f"{gpa:#x}+{length:#x} is no address range")
        pages = range(gpa >> 12, (limit + 0xFFF) >> 12)
        large = len(pages) > _SMALL_PAGES
        others = {r for ranges in self._pages.values() for r in ranges} if large else None
        for page in () if large else pages:
            others = {*(others or ()), *self._pages.get(page, ())}
        for first, end, _ in (*(others or ()), *self._large):
            if gpa < end and first < limit:
                raise ValueError(f"{gpa:#x}+{length:#x} overlaps the device at {first:#x}")
        if large:
            self._large.append((gpa, limit, handler))
        else:
            for page in pages:
                self._pages.setdefault(page, []).append((gpa, limit, handler))

    def detach(self, gpa: int, length: int) -> None:
        """Remove what was attached with the same `gpa` and `length`; harmless if nothing was."""
        limit = gpa + length
        self._large[:] = [r for r in self._large if r[:2] != (gpa, limit)]
        for page in range(gpa >> 12, (limit + 0xFFF) >> 12) if length >> 12 <= _SMALL_PAGES else ():
            ranges = [r for r in self._pages.get(page, ()) if r[:2] != (gpa, limit)]
            if ranges:
                self._pages[page] = ranges
            else:
                self._pages.pop(page, None)

    def has_page(self, page: int) -> bool:
        """True if a device lies in this page (a number: address >> 12)."""
        if page in self._pages:
            return True
        gpa = page << 12
        return any(first <= gpa < limit for first, limit, _ in self._large)

    def read(self, gpa: int, size: int) -> int:
        """Read `size` (1 to 8) bytes. A device is called with the size that it was accessed with."""
        for first, limit, handler in self._pages.get(gpa >> 12, self._large):
            if first <= gpa < limit:
                return handler.read(gpa - first, size) & (1 << 8 * size) - 1
        self.unclaimed[gpa >> 12] += 1
        return (1 << 8 * size) - 1

    def write(self, gpa: int, size: int, value: int) -> None:
        for first, limit, handler in self._pages.get(gpa >> 12, self._large):
            if first <= gpa < limit:
                handler.write(gpa - first, size, value)
                return
        self.unclaimed[gpa >> 12] += 1
