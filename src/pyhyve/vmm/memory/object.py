"""VM objects: where the pages of a map entry come from."""

import bisect
from collections.abc import Sequence
from typing import Final

from pyhyve.vmm.memory.arena import Arena, view_of
from pyhyve.vmm.memory.page import PAGE_SHIFT, PageStates, check_pages

OBJT_DEFAULT: Final = "default"
"""Anonymous, demand-zero: guest RAM."""
OBJT_DEVICE: Final = "device"
"""A devmem segment: RAM with a name and a node."""
OBJT_SG: Final = "sg"
"""A scatter list of host ranges that somebody else owns: a passthrough BAR."""


class VmObject:
    """Pages 0 .. size >> 12, each at a host address of its own.

    `uncached` asks for the memory type of device registers. Objects of an arena own it and close it when the last hold
    is gone.
    """

    def __init__(self, kind: str, size: int) -> None:
        check_pages(f"{kind} object", size)
        if size == 0:
            raise ValueError(f"{kind} object: a size of 0")
        self.kind = kind
        self.size = size
        self.uncached = kind == OBJT_SG
        self.pages = PageStates(size >> PAGE_SHIFT)
        self.holds: dict[int, tuple[int, int]] = {}
        """Ranges that the host now touches, by cookie: (offset, length). Such pages are never taken away."""
        self._closing = False

    def run(self, offset: int) -> tuple[int, int]:
        """(host address of a byte, how many bytes from there on are contiguous in host memory)."""
        raise NotImplementedError

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes of one contiguous run."""
        raise NotImplementedError

    def resident(self) -> int:
        """Bytes of host memory that the object has taken."""
        return 0

    def populate(self, offset: int, length: int) -> None:
        """Take the range's memory from the host now."""

    def discard(self) -> None:
        """Give all memory back: no map entry shows it any more."""

    def hold(self, cookie: int, offset: int, length: int) -> None:
        self.holds[cookie] = (offset, length)

    def unhold(self, cookie: int) -> None:
        """End a hold; one that has ended already is harmless."""
        self.holds.pop(cookie, None)
        if self._closing and not self.holds:
            self._release()

    def is_held(self, offset: int, length: int) -> bool:
        """True if the host touches any byte of the range now."""
        end = offset + length
        return any(start < end and offset < start + size for start, size in list(self.holds.values()))

    def close(self) -> None:
        """Release the memory, now or when the last hold ends. Idempotent."""
        self._closing = True
        if not self.holds:
            self._release()

    def _release(self) -> None:
        pass


class ArenaObject(VmObject):
    """RAM (OBJT_DEFAULT) or a devmem segment (OBJT_DEVICE): contiguous in host memory, populated by the host kernel."""

    def __init__(self, kind: str, arena: Arena) -> None:
        super().__init__(kind, arena.size)
        self.arena = arena

    def run(self, offset: int) -> tuple[int, int]:
        return self.arena.base + offset, self.size - offset

    def view(self, offset: int, length: int) -> memoryview:
        return self.arena.view[offset : offset + length]

    def resident(self) -> int:
        return self.arena.resident()

    def populate(self, offset: int, length: int) -> None:
        self.arena.populate(offset, length)

    def discard(self) -> None:
        if self.kind == OBJT_DEFAULT and not self.holds and not self._closing:
            self.arena.discard(0, self.size)

    def _release(self) -> None:
        self.arena.close()


class SgObject(VmObject):
    """(host address, length) pairs in order, page-aligned; the ranges outlive the object."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__(OBJT_SG, sum(length for _, length in ranges))
        self._ranges = list(ranges)
        self._offsets = []
        offset = 0
        for address, length in self._ranges:
            check_pages("scatter list", address, length)
            self._offsets.append(offset)
            offset += length

    def run(self, offset: int) -> tuple[int, int]:
        index = bisect.bisect_right(self._offsets, offset) - 1
        address, length = self._ranges[index]
        inner = offset - self._offsets[index]
        return address + inner, length - inner

    def view(self, offset: int, length: int) -> memoryview:
        address, contiguous = self.run(offset)
        return view_of(address, min(length, contiguous))
