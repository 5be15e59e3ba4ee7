"""Physical maps: page tables that a vCPU's walker follows while the monitor changes them.

One algorithm serves two formats (`PT_X86`, `PT_EPT`); what differs is asked of `pte` at run time. Frames, those of
tables included, are host addresses of this process.

The walker sets accessed and modified bits by compare-and-swap, and this side only has plain stores. So a bit that the
walker sets between our read and our store can be lost, and three rules keep that harmless:
- a writable leaf that is rewritten or dropped while a vCPU is in the guest counts as modified;
- `clear_modified` is followed by a flush: who then copies the page waits for it first (`activity.wait_flushed`);
- who must know exactly stops the guest (`activity.stopped`).
An entry without its valid bit is empty, whatever its other bits are.
"""

import threading
from array import array
from collections.abc import Callable, Iterator
from typing import Final

from pyhyve.vmm.memory import pte
from pyhyve.vmm.memory.activity import GuestActivity
from pyhyve.vmm.memory.page import MAX_GPA, PAGE_SHIFT, PAGE_SIZE, PROT_EXEC, PROT_WRITE, SIZE_1G, SIZE_2M, check_pages
from pyhyve.vmm.memory.pte import PG_FRAME, PG_PS, PG_W, PMAP_1G, PMAP_2M, PT_EPT, PT_X86
from pyhyve.vmm.memory.tables import ENTRIES, RESERVE, TablePages

_SHIFTS: Final = (39, 30, 21, 12)
_INDEX: Final = ENTRIES - 1
_SIZES: Final = {PAGE_SIZE: 12, SIZE_2M: 21, SIZE_1G: 30}

Harvest = Callable[[int, int, bool, bool], None]
"""(gpa, size, modified, referenced) of a mapping that goes: whoever accounts for pages keeps it."""


def _ignore() -> None:
    pass


def _forget(gpa: int, size: int, modified: bool, referenced: bool) -> None:
    pass


class Pmap:
    """The page tables of one address space below 2**48.

    Addresses and sizes are multiples of 4 KiB (ValueError). Operations on ranges skip what is not mapped. Each call is
    atomic against other callers and ends with at most one invalidation.
    """

    def __init__(
        self,
        pm_type: int = PT_EPT,
        pm_flags: int = PMAP_2M | PMAP_1G,
        *,
        kick: Callable[[], None] = _ignore,
        harvest: Harvest = _forget,
        reserve: int = RESERVE,
    ) -> None:
        if pm_type not in (PT_X86, PT_EPT):
            raise ValueError(f"pmap: unknown type {pm_type}")
        if pm_type == PT_X86 and pm_flags & pte.PMAP_EMULATE_AD_BITS:
            raise ValueError("pmap: every x86 processor keeps accessed and dirty bits")
        self.pm_type = pm_type
        self.pm_flags = pm_flags
        self.eptgen = 1
        self.lock = threading.RLock()
        self.activity = GuestActivity(lambda: self.eptgen, kick)
        self.counters = dict.fromkeys(
            ("enters", "superpages", "promotions", "demotions", "emulations", "invalidations"), 0
        )
        self._kick = kick
        self._harvest = harvest
        self._v = pte.pmap_valid_bit(self)
        self._rw = pte.pmap_rw_bit(self)
        self._a = pte.pmap_accessed_bit(self)
        self._m = pte.pmap_modified_bit(self)
        self._emulate = pte.pmap_emulate_ad_bits(self)
        self._exec = pte.pmap_exec_bits(self)
        self._rights = [pte.pmap_protection_bits(self, prot) for prot in range(8)]
        self._cache = [pte.pmap_cache_bits(self, uncached=uncached) for uncached in (False, True)]
        self._table_bits = pte.pmap_table_bits(self)
        self._tables = TablePages(reserve)
        self._words = self._tables.words
        self._base = self._tables.base
        self.root = self._tables.alloc()
        self._count = {self.root: 0}
        self._closed = False

    # What the hardware is told.

    @property
    def eptp(self) -> int:
        """The EPT pointer: root, 4-level walk, write-back, and bit 6 if the walker keeps accessed and dirty bits."""
        if self.pm_type != PT_EPT:
            raise ValueError("pmap: only a PT_EPT pmap has an EPT pointer")
        return self.root | pte.EPTP_WALK_4 | pte.EPTP_WRITE_BACK | (0 if self._emulate else pte.EPTP_AD)

    def activate(self, vcpu: int) -> int:
        """A vCPU goes into the guest; return the generation that it must flush to. Pair with `deactivate`."""
        return self.activity.enter(vcpu)

    def deactivate(self, vcpu: int) -> None:
        """The vCPU is back in the monitor."""
        self.activity.leave(vcpu)

    def invalidate_page(self, gpa: int) -> None:
        """Forget what is cached of one page."""
        self._invalidate()

    def invalidate_range(self, gpa: int, size: int) -> None:
        """Forget what is cached of a range."""
        self._invalidate()

    def invalidate_all(self) -> None:
        """Forget everything cached."""
        self._invalidate()

    def _invalidate(self) -> None:
        """The one way to invalidate: a new generation, seen at the next entry, and a kick to those inside now."""
        with self.lock:
            self.eptgen += 1
            self.counters["invalidations"] += 1
        self._kick()

    # Looking.

    def lookup(self, gpa: int) -> tuple[int, int]:
        """(leaf entry or 0, size of what it maps, or of the hole's entry) for an address."""
        if gpa >= MAX_GPA:
            return 0, PAGE_SIZE
        with self.lock:
            _, entry, shift = self._leaf(gpa)
            return entry if entry & self._v else 0, 1 << shift

    def extract(self, gpa: int) -> int | None:
        """The host address of a guest byte, or None."""
        entry, size = self.lookup(gpa)
        return (entry & PG_FRAME & -size) | (gpa & (size - 1)) if entry else None

    def permits(self, gpa: int, access: int) -> bool:
        """True if the walker would let the access (PROT_*) pass, without anybody's help."""
        entry, _ = self.lookup(gpa)
        if not self._allows(entry, access):
            return False
        return not self._emulate or not (self._touch(access) & ~entry)

    def is_modified(self, gpa: int) -> bool:
        """True if the page was written since its modified bit was cleared (a superpage is one page)."""
        return bool(self.lookup(gpa)[0] & self._m)

    def is_referenced(self, gpa: int) -> bool:
        """True if the page was touched since its accessed bit was cleared (a superpage is one page)."""
        return bool(self.lookup(gpa)[0] & self._a)

    def is_wired(self, gpa: int) -> bool:
        return bool(self.lookup(gpa)[0] & PG_W)

    def leaves(self, gpa: int, size: int) -> list[tuple[int, int, int]]:
        """(gpa, size, entry) of each mapping that the range touches, in order."""
        with self.lock:
            return [(at, 1 << shift, entry) for _, entry, shift, at in self._walk(gpa, gpa + size, whole=True)]

    @property
    def table_bytes(self) -> int:
        """Host memory that the tables take."""
        return self._tables.taken

    # Entering.

    def enter(
        self, gpa: int, hpa: int, prot: int, access: int = 0, *, wired: bool = False, uncached: bool = False
    ) -> None:
        """Map a 4 KiB page, in place of what was there. `access`: the access that asks for it, done when this returns.

        A full, uniform table is promoted to a superpage at once.
        """
        check_pages("pmap", gpa, hpa)
        with self.lock:
            slot, table = self._slot(gpa, PAGE_SHIFT)
            self._store_leaf(slot, table, gpa, PAGE_SHIFT, self._new_leaf(hpa, prot, access, wired, uncached))
            self.counters["enters"] += 1
            if self._count[table] == ENTRIES:
                self._promote(gpa, 21)

    def enter_superpage(
        self,
        gpa: int,
        hpa: int,
        prot: int,
        access: int = 0,
        size: int = SIZE_2M,
        *,
        wired: bool = False,
        uncached: bool = False,
    ) -> bool:
        """Map 2 MiB or 1 GiB at once. False if the processor has no such pages or smaller ones are mapped there."""
        if size not in (SIZE_2M, SIZE_1G) or (gpa | hpa) & (size - 1):
            raise ValueError(f"pmap: no superpage of {size:#x} bytes at {gpa:#x} -> {hpa:#x}")
        if not self.pm_flags & (PMAP_2M if size == SIZE_2M else PMAP_1G):
            return False
        shift = _SIZES[size]
        with self.lock:
            _, entry, level = self._leaf(gpa)
            if level < shift:
                return False
            slot, table = self._slot(gpa, shift)
            entry = self._new_leaf(hpa, prot, access, wired, uncached) | PG_PS
            self._store_leaf(slot, table, gpa, shift, entry)
            self.counters["superpages"] += 1
            if shift == 21 and self._count[table] == ENTRIES:
                self._promote(gpa, 30)
        return True

    def emulate_accessed_dirty(self, gpa: int, access: int) -> bool:
        """For a walker without accessed and dirty bits: grant a violation's access if the page is mapped for it.

        True: the mapping now lets the access pass (no flush: nothing was taken away).
        """
        if not self._emulate:
            return False
        with self.lock:
            slot, entry, _ = self._leaf(gpa)
            if not self._allows(entry, access):
                return False
            self._words[slot] = entry | self._touch(access)
            self.counters["emulations"] += 1
            return True

    # Changing and removing.

    def remove(self, gpa: int, size: int = PAGE_SIZE) -> None:
        """Unmap a range; its accessed and modified bits go to `harvest`."""
        with self.lock:
            changed = False
            for slot, entry, shift, at in self._walk(gpa, gpa + size):
                self._words[slot] = 0
                self._gone(entry, at, shift)
                self._uncount(slot, at)
                changed = True
            if changed:
                self._invalidate()

    def protect(self, gpa: int, size: int, prot: int) -> None:
        """Set the protection of what is mapped in a range; 0 removes it."""
        if not prot:
            self.remove(gpa, size)
            return
        keep = PG_FRAME | PG_PS | PG_W | self._cache[0] | self._cache[1]
        rights = self._rights[prot]
        with self.lock:
            changed = False
            for slot, entry, shift, at in self._walk(gpa, gpa + size):
                new = self._carry(entry, (entry & keep) | rights, at, shift)
                if new != entry:
                    self._words[slot] = new
                    changed = True
            if changed:
                self._invalidate()

    def wire(self, gpa: int, size: int, wired: bool = True) -> None:
        """Mark what is mapped in a range as never to be taken away, or undo it."""
        with self.lock:
            for slot, entry, _, _ in self._walk(gpa, gpa + size):
                entry = self._settled(entry)
                self._words[slot] = entry | PG_W if wired else entry & ~PG_W

    def clear_modified(self, gpa: int, size: int = PAGE_SIZE) -> int:
        """Clear modified bits of a range; return how many 4 KiB pages had one. A superpage partly inside is demoted."""
        with self.lock:
            count = 0
            for slot, entry, shift, _ in self._walk(gpa, gpa + size):
                if entry & self._m:
                    self._words[slot] = entry & ~self._m
                    count += 1 << (shift - PAGE_SHIFT)
            if count:
                self._invalidate()
            return count

    def ts_referenced(self, gpa: int, size: int = PAGE_SIZE) -> int:
        """Count the 4 KiB pages of a range that were touched, and clear their accessed bits.

        A superpage that the range touches counts, and is cleared, as a whole. Where the bits are emulated, a mapping
        that may not stand without its accessed bit is removed instead, unless it is wired.
        """
        with self.lock:
            count = 0
            for slot, entry, shift, at in self._walk(gpa, gpa + size, whole=True):
                if not entry & self._a:
                    continue
                entry = self._settled(entry)
                count += 1 << (shift - PAGE_SHIFT)
                if self._hardware(entry & ~self._a) == entry & ~self._a:
                    self._words[slot] = entry & ~self._a
                elif not entry & PG_W:
                    self._words[slot] = 0
                    self._gone(entry & ~self._a, at, shift)
                    self._uncount(slot, at)
            if count:
                self._invalidate()
            return count

    def clear_reference(self, gpa: int, size: int = PAGE_SIZE) -> None:
        """Clear accessed bits of a range, as `ts_referenced` does."""
        self.ts_referenced(gpa, size)

    def promote(self, gpa: int, size: int = SIZE_2M) -> bool:
        """Make one superpage of the mappings around gpa, if they are complete, contiguous, alike and all touched."""
        with self.lock:
            return self._promote(gpa, _SIZES[size])

    def demote(self, gpa: int) -> bool:
        """Split the superpage that maps gpa into the next smaller pages; False if there is none."""
        with self.lock:
            slot, entry, shift = self._leaf(gpa)
            if shift == PAGE_SHIFT or not entry & self._v:
                return False
            self._demote(slot, entry, shift)
            self._invalidate()
            return True

    def close(self) -> None:
        """Free the tables; no vCPU may run any more. Idempotent."""
        with self.lock:
            if not self._closed:
                self._closed = True
                self._tables.close()
                self.root = 0

    # Entries.

    def _new_leaf(self, hpa: int, prot: int, access: int, wired: bool, uncached: bool) -> int:
        if not prot:
            raise ValueError("pmap: a mapping without any access")
        leaf = hpa | self._rights[prot] | self._cache[uncached] | (PG_W if wired else 0)
        if access:
            leaf |= self._touch(access & prot)
        return self._hardware(leaf)

    def _touch(self, access: int) -> int:
        """The bits that an access sets."""
        return self._a | self._m if access & PROT_WRITE else self._a

    def _allows(self, entry: int, access: int) -> bool:
        if not entry & self._v or (access & PROT_WRITE and not entry & self._rw):
            return False
        return not access & PROT_EXEC or entry & self._exec[0] == self._exec[1]

    def _hardware(self, entry: int) -> int:
        """An entry that the processor takes. With emulated bits, readable is accessed, and neither writable nor
        executable may stand without it (Intel SDM vol 3, "EPT Misconfigurations")."""
        if self._emulate and entry & (self._m | pte.EPT_PG_EXECUTE):
            return entry | self._a
        return entry

    def _settled(self, entry: int) -> int:
        """An entry about to be rewritten: a walker may be setting its modified bit right now."""
        if entry & self._rw and not self._emulate and self.activity.any_inside():
            return entry | self._m
        return entry

    def _carry(self, old: int, new: int, gpa: int, shift: int) -> int:
        """`new` for the frame of `old`, with its accessed and modified bits."""
        new |= self._settled(old) & (self._a | self._m)
        if self._emulate and new & self._m and not new & self._rw:  # modified would let the hardware write
            self._harvest(gpa, 1 << shift, True, True)
            new &= ~self._m
        return self._hardware(new)

    def _gone(self, entry: int, gpa: int, shift: int) -> None:
        entry = self._settled(entry)
        if entry & (self._a | self._m):
            self._harvest(gpa, 1 << shift, bool(entry & self._m), bool(entry & self._a))

    def _store_leaf(self, slot: int, table: int, gpa: int, shift: int, new: int) -> None:
        """Put a leaf where a leaf or nothing is."""
        old = self._words[slot]
        if not old & self._v:
            self._words[slot] = new
            self._count[table] += 1
            return
        moved = (old ^ new) & PG_FRAME
        if not moved:
            new = self._carry(old, new, gpa, shift)
        self._words[slot] = new
        if moved:
            self._gone(old, gpa, shift)
        if (old | self._a | self._m) != (new | self._a | self._m):
            self._invalidate()

    # Walking.

    def _leaf(self, gpa: int) -> tuple[int, int, int]:
        """(slot, entry, shift) where a walk for gpa ends: at a leaf or at an entry that is not valid."""
        words, base, valid = self._words, self._base, self._v
        table = self.root
        for shift in _SHIFTS:
            slot = ((table - base) >> 3) + ((gpa >> shift) & _INDEX)
            entry: int = words[slot]
            if not entry & valid or shift == PAGE_SHIFT or entry & PG_PS:
                return slot, entry, shift
            table = entry & PG_FRAME
        raise AssertionError("unreachable: the last level returns")

    def _slot(self, gpa: int, target: int) -> tuple[int, int]:
        """(slot, its table) at the level of `target`; makes the tables on the way and demotes superpages."""
        if gpa >= MAX_GPA:
            raise ValueError(f"pmap: {gpa:#x} is beyond what a 4-level walk reaches")
        words, base, valid = self._words, self._base, self._v
        table = self.root
        for shift in _SHIFTS:
            slot = ((table - base) >> 3) + ((gpa >> shift) & _INDEX)
            if shift == target:
                return slot, table
            entry: int = words[slot]
            if not entry & valid:
                child = self._new_table()
                words[slot] = child | self._table_bits
                self._count[table] += 1
                table = child
            else:
                if entry & PG_PS:
                    self._demote(slot, entry, shift)
                    self._invalidate()
                    entry = words[slot]
                table = entry & PG_FRAME
        raise AssertionError("unreachable: the last level returns")

    def _walk(self, start: int, end: int, *, whole: bool = False) -> Iterator[tuple[int, int, int, int]]:
        """(slot, entry, shift, gpa) of each leaf in a range. One partly inside is demoted first, or given if `whole`.

        The caller may change or clear the leaf it was given, nothing else.
        """
        check_pages("pmap", start, end)
        end = min(end, MAX_GPA)
        gpa = start
        while gpa < end:
            slot, entry, shift = self._leaf(gpa)
            size = 1 << shift
            at = gpa & -size
            if not entry & self._v:
                gpa = at + size
            elif shift > PAGE_SHIFT:
                if not whole and (at < start or at + size > end):
                    self._demote(slot, entry, shift)
                    self._invalidate()
                else:
                    yield slot, entry, shift, at
                    gpa = at + size
            else:
                count = min(end - gpa >> PAGE_SHIFT, ENTRIES - (slot & _INDEX))
                for leaf in self._words[slot : slot + count].tolist():
                    if leaf & self._v:
                        yield slot, leaf, PAGE_SHIFT, gpa
                    slot += 1
                    gpa += PAGE_SIZE

    # Tables.

    def _new_table(self) -> int:
        oldest = self.activity.oldest()
        if oldest is not None:
            self._tables.reclaim(oldest)
        table = self._tables.alloc()
        self._count[table] = 0
        return table

    def _retire(self, table: int) -> None:
        """The tree has lost a table; the invalidation that ends this operation makes it free."""
        del self._count[table]
        self._tables.retire(table, self.eptgen + 1)

    def _uncount(self, slot: int, gpa: int) -> None:
        """A slot has been cleared: tables that are empty now leave the tree."""
        while True:
            table = self._base + (slot << 3 & -PAGE_SIZE)
            self._count[table] -= 1
            if self._count[table] or table == self.root:
                return
            slot = self._parent(gpa, table)
            self._words[slot] = 0
            self._retire(table)

    def _parent(self, gpa: int, child: int) -> int:
        """The slot that points to a table on gpa's walk."""
        table = self.root
        for shift in _SHIFTS:
            slot = ((table - self._base) >> 3) + ((gpa >> shift) & _INDEX)
            table = self._words[slot] & PG_FRAME
            if table == child:
                return slot
        raise AssertionError(f"table {child:#x} is not on the walk of {gpa:#x}")

    def _promote(self, gpa: int, shift: int) -> bool:
        if not self.pm_flags & (PMAP_2M if shift == 21 else PMAP_1G):
            return False
        below = shift - 9
        slot, _, level = self._leaf(gpa)
        if level != below:
            return False
        table = self._base + (slot << 3 & -PAGE_SIZE)
        if self._count[table] != ENTRIES:
            return False
        first_slot = (table - self._base) >> 3
        entries: list[int] = self._words[first_slot : first_slot + ENTRIES].tolist()
        fixed = ~(self._a | self._m)
        first = entries[0] & fixed
        last = entries[-1] & fixed
        size, step = 1 << shift, 1 << below
        if first & PG_FRAME & (size - 1) or last != first + size - step or (below > PAGE_SHIFT and not first & PG_PS):
            return False
        if [entry & fixed for entry in entries] != list(range(first, first + size, step)):
            return False
        if not all(entry & self._a for entry in entries):
            return False
        modified = self._m if any(self._settled(entry) & self._m for entry in entries) else 0
        parent = self._parent(gpa, table)
        self._words[parent] = first | PG_PS | self._a | modified
        self._retire(table)
        self.counters["promotions"] += 1
        self._invalidate()
        if shift == 21 and self._count[self._base + (parent << 3 & -PAGE_SIZE)] == ENTRIES:
            self._promote(gpa, 30)
        return True

    def _demote(self, slot: int, entry: int, shift: int) -> None:
        """Replace a superpage by a full table; the caller invalidates."""
        below = shift - 9
        entry = self._settled(entry)
        first = entry if below > PAGE_SHIFT else entry & ~PG_PS
        table = self._new_table()
        index = (table - self._base) >> 3
        self._words[index : index + ENTRIES] = memoryview(array("Q", range(first, first + (1 << shift), 1 << below)))
        self._count[table] = ENTRIES
        self._words[slot] = table | self._table_bits
        self.counters["demotions"] += 1
