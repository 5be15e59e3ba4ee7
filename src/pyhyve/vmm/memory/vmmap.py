"""The map of a guest-physical address space: which object stands where."""

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pyhyve.vmm.memory.object import VmObject
from pyhyve.vmm.memory.page import MAX_GPA, PROT_READ, check_pages


def _check_prot(prot: int) -> None:
    """No page table can express memory that is written or executed but not read."""
    if not prot & PROT_READ:
        raise ValueError(f"map entry: protection {prot:#x} does not let the guest read")


@dataclass(frozen=True, slots=True)
class MapEntry:
    """Guest-physical start <= gpa < end shows the object from `offset` on, with a protection (PROT_*)."""

    start: int
    end: int
    object: VmObject
    offset: int
    prot: int
    wired: bool = False

    def clip(self, start: int, end: int) -> "MapEntry":
        """The part between start and end, which lie inside."""
        return replace(self, start=start, end=end, offset=self.offset + start - self.start)


class VmMap:
    """Entries in order, never overlapping. Readers take no lock: a change replaces the whole index at once."""

    def __init__(self) -> None:
        self._index: tuple[list[int], list[MapEntry]] = ([], [])

    def __iter__(self) -> Iterator[MapEntry]:
        return iter(self._index[1])

    def lookup(self, gpa: int) -> MapEntry | None:
        """The entry that holds an address."""
        starts, entries = self._index
        at = bisect.bisect_right(starts, gpa) - 1
        if at < 0:
            return None
        entry = entries[at]
        return entry if gpa < entry.end else None

    def overlapping(self, start: int, end: int) -> list[MapEntry]:
        """The entries that a range touches, in order."""
        starts, entries = self._index
        first = max(bisect.bisect_right(starts, start) - 1, 0)
        last = bisect.bisect_left(starts, end)
        return [entry for entry in entries[first:last] if entry.end > start]

    def insert(self, entry: MapEntry) -> None:
        """Add an entry. ValueError if it is empty, unaligned, beyond reach or its object, unreadable, or overlaps."""
        check_pages("map entry", entry.start, entry.end, entry.offset)
        size = entry.end - entry.start
        if size <= 0 or entry.end > MAX_GPA:
            raise ValueError(f"map entry: no guest memory from {entry.start:#x} to {entry.end:#x}")
        if entry.offset + size > entry.object.size:
            raise ValueError(
                f"map entry: {size:#x} bytes at offset {entry.offset:#x} of an object of {entry.object.size:#x}"
            )
        _check_prot(entry.prot)
        for other in self.overlapping(entry.start, entry.end):
            raise ValueError(f"map entry: {entry.start:#x}-{entry.end:#x} overlaps {other.start:#x}-{other.end:#x}")
        self._set([*self, entry])

    def delete(self, start: int, end: int) -> list[MapEntry]:
        """Drop what lies in a range, clipping what reaches out of it; return the parts dropped."""
        dropped = []

        def drop(entry: MapEntry) -> None:
            dropped.append(entry)

        self._change(start, end, drop)
        return dropped

    def protect(self, start: int, end: int, prot: int) -> None:
        """Set the protection of what lies in a range. ValueError if nobody could read it."""
        _check_prot(prot)
        self._change(start, end, lambda entry: replace(entry, prot=prot))

    def wire(self, start: int, end: int, wired: bool) -> None:
        """Mark what lies in a range as wired or not."""
        self._change(start, end, lambda entry: replace(entry, wired=wired))

    def _change(self, start: int, end: int, change: Callable[[MapEntry], MapEntry | None]) -> None:
        check_pages("map range", start, end)
        result = []
        for entry in self:
            low, high = max(entry.start, start), min(entry.end, end)
            if low >= high:
                result.append(entry)
                continue
            if entry.start < low:
                result.append(entry.clip(entry.start, low))
            changed = change(entry.clip(low, high))
            if changed is not None:
                result.append(changed)
            if high < entry.end:
                result.append(entry.clip(high, entry.end))
        self._set(result)

    def _set(self, entries: list[MapEntry]) -> None:
        entries.sort(key=lambda entry: entry.start)
        self._index = ([entry.start for entry in entries], entries)
