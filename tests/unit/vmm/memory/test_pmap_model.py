"""The pmap against the simplest model of it: a dictionary of pages, and a TLB that only a new generation flushes."""

import pytest
from hardware_walker import FRAME, load, walk_ept, walk_x86
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pyhyve.vmm.memory import pte
from pyhyve.vmm.memory.page import PAGE_SIZE, PROT_ALL, PROT_READ, PROT_RW, PROT_RX, PROT_WRITE, SIZE_1G, SIZE_2M
from pyhyve.vmm.memory.pmap import Pmap
from pyhyve.vmm.memory.pte import PMAP_1G, PMAP_2M, PMAP_EMULATE_AD_BITS, PT_EPT, PT_X86

HOST = 0x7E00_0000_0000
# Two neighbours, and one whose walk shares nothing but the root with them.
BLOCKS = (SIZE_1G - SIZE_2M, SIZE_1G, 1 << 40)
PAGES_OF_INTEREST = (0, 1, 2, 255, 511)

blocks = st.sampled_from(BLOCKS)
pages = st.builds(lambda block, page: block + page * PAGE_SIZE, blocks, st.sampled_from(PAGES_OF_INTEREST))
sizes = st.sampled_from([PAGE_SIZE, 3 * PAGE_SIZE, SIZE_2M, 2 * SIZE_2M])
protections = st.sampled_from([PROT_READ, PROT_RW, PROT_RX, PROT_ALL])
accesses = st.sampled_from([0, PROT_READ, PROT_WRITE])


def host_of(gpa, shifted):
    """Where a page's memory is: congruent to gpa modulo 2 MiB, or shifted by one page."""
    return HOST + gpa + (PAGE_SIZE if shifted else 0)


class PmapMachine(RuleBasedStateMachine):
    pm_type = PT_EPT
    flags = PMAP_2M | PMAP_1G

    @initialize()
    def start(self):
        self.gone_modified = set()
        self.pmap = Pmap(self.pm_type, self.flags, harvest=self.harvest)
        self.emulated = bool(self.flags & PMAP_EMULATE_AD_BITS)
        self.mapped = {}  # gpa -> (hva, protection)
        self.wired = set()
        self.written = set()  # since the modified bit was cleared
        self.tlb = {}  # gpa -> (hva, writable)
        self.generation = self.pmap.eptgen

    def teardown(self):
        if hasattr(self, "pmap"):
            self.pmap.close()

    def harvest(self, gpa, size, modified, referenced):
        if modified:
            self.gone_modified.update(range(gpa, gpa + size, PAGE_SIZE))

    def put(self, gpa, hva, prot, access, wired):
        if self.mapped.get(gpa, (None,))[0] != hva:
            self.lose(gpa)
        self.mapped[gpa] = (hva, prot)
        (self.wired.add if wired else self.wired.discard)(gpa)
        if access & prot & PROT_WRITE:
            self.write(gpa)

    def write(self, gpa):
        self.written.add(gpa)
        self.gone_modified.discard(gpa)

    def lose(self, gpa):
        if self.mapped.pop(gpa, None) is not None and gpa in self.written:
            assert gpa in self.gone_modified, f"the write to {gpa:#x} is forgotten"
            self.written.discard(gpa)
        self.gone_modified.discard(gpa)
        self.wired.discard(gpa)

    def inside(self, gpa, size):
        return [page for page in self.mapped if gpa <= page < gpa + size]

    def walk(self, gpa, access):
        if self.pm_type == PT_X86:
            return walk_x86(self.pmap.root, gpa, access)
        return walk_ept(self.pmap.eptp, gpa, access)

    @rule(gpa=pages, prot=protections, access=accesses, wired=st.booleans(), shifted=st.booleans())
    def enter(self, gpa, prot, access, wired, shifted):
        hva = host_of(gpa, shifted)
        self.pmap.enter(gpa, hva, prot, access, wired=wired)
        self.put(gpa, hva, prot, access, wired)

    @rule(gpa=blocks, prot=protections, access=accesses, wired=st.booleans(), skip=st.sampled_from([None, 2]))
    def enter_all_pages(self, gpa, prot, access, wired, skip):
        for page in range(512):
            if page != skip:
                at = gpa + page * PAGE_SIZE
                self.pmap.enter(at, host_of(at, False), prot, access, wired=wired)
                self.put(at, host_of(at, False), prot, access, wired)

    @rule(gpa=blocks, prot=protections, access=accesses, wired=st.booleans())
    def enter_superpage(self, gpa, prot, access, wired):
        if self.pmap.enter_superpage(gpa, host_of(gpa, False), prot, access, wired=wired):
            for at in range(gpa, gpa + SIZE_2M, PAGE_SIZE):
                self.put(at, host_of(at, False), prot, access, wired)

    @rule(gpa=pages, size=sizes)
    def remove(self, gpa, size):
        self.pmap.remove(gpa, size)
        for page in self.inside(gpa, size):
            self.lose(page)

    @rule(gpa=pages, size=sizes, prot=protections)
    def protect(self, gpa, size, prot):
        self.pmap.protect(gpa, size, prot)
        for page in self.inside(gpa, size):
            self.mapped[page] = (self.mapped[page][0], prot)

    @rule(gpa=pages, size=sizes, wired=st.booleans())
    def wire(self, gpa, size, wired):
        self.pmap.wire(gpa, size, wired)
        for page in self.inside(gpa, size):
            (self.wired.add if wired else self.wired.discard)(page)

    @rule(gpa=pages, size=sizes)
    def clear_modified(self, gpa, size):
        self.pmap.clear_modified(gpa, size)
        for page in self.inside(gpa, size):
            self.written.discard(page)
            self.gone_modified.discard(page)
            assert not self.pmap.is_modified(page)

    @rule(gpa=pages, size=sizes)
    def ts_referenced(self, gpa, size):
        self.pmap.ts_referenced(gpa, size)
        for page in self.inside(gpa, size):
            if self.pmap.extract(page) is None:
                assert self.emulated
                assert page not in self.wired
            elif not self.emulated:
                assert not self.pmap.is_referenced(page)
        if self.emulated:  # what may not stand without its accessed bit is gone
            for page in [page for page in self.mapped if self.pmap.extract(page) is None]:
                self.lose(page)

    @rule(gpa=pages)
    def promote(self, gpa):
        self.pmap.promote(gpa)

    @rule(gpa=pages)
    def demote(self, gpa):
        self.pmap.demote(gpa)

    @rule(gpa=pages, access=st.sampled_from([PROT_READ, PROT_WRITE]))
    def guest_access(self, gpa, access):
        if self.pmap.eptgen != self.generation:
            self.tlb.clear()
            self.generation = self.pmap.eptgen
        cached = self.tlb.get(gpa)
        if cached is not None and (cached[1] or access == PROT_READ):
            found_hva = cached[0]
        else:
            found = self.walk(gpa, access)
            if found is None and self.emulated and self.pmap.emulate_accessed_dirty(gpa, access):
                found = self.walk(gpa, access)
                assert found is not None
            found_hva = found and found.hva
            if found:
                self.tlb[gpa] = (found.hva, access == PROT_WRITE)
        expected = self.mapped.get(gpa, (None, 0))
        assert found_hva == (expected[0] if expected[1] & access else None)
        assert bool(found_hva) == self.pmap.permits(gpa, access)
        if found_hva and access == PROT_WRITE:
            self.write(gpa)

    @rule(gpa=pages, size=sizes)
    def write_and_clear(self, gpa, size):
        self.guest_access(gpa, PROT_WRITE)
        self.clear_modified(gpa, size)

    @invariant()
    def every_page_is_where_the_model_has_it(self):
        if not hasattr(self, "pmap"):
            return
        found, wired = {}, set()
        mask, value = pte.pmap_exec_bits(self.pmap)
        for at, size, entry in self.pmap.leaves(0, 1 << 48):
            prot = PROT_READ
            prot |= PROT_WRITE if entry & pte.pmap_rw_bit(self.pmap) else 0
            prot |= 4 if entry & mask == value else 0
            for gpa in range(at, at + size, PAGE_SIZE):
                found[gpa] = ((entry & FRAME & -size) + gpa - at, prot)
                if entry & pte.PG_W:
                    wired.add(gpa)
        assert found == self.mapped
        assert wired == self.wired

    @invariant()
    def no_write_is_forgotten(self):
        for gpa in getattr(self, "written", ()):
            assert self.pmap.is_modified(gpa) or gpa in self.gone_modified

    @invariant()
    def what_a_tlb_may_hold_is_still_true(self):
        if not hasattr(self, "pmap") or self.pmap.eptgen != self.generation:
            return
        for gpa, (hva, writable) in self.tlb.items():
            assert self.mapped[gpa][0] == hva
            assert not writable or self.mapped[gpa][1] & PROT_WRITE
            assert not writable or self.pmap.is_modified(gpa), "a write would go unseen"

    @invariant()
    def tables_are_counted_and_none_is_empty(self):
        if not hasattr(self, "pmap"):
            return
        counts = {}
        valid = pte.pmap_valid_bit(self.pmap)

        def visit(table, level):
            entries = [load(table + 8 * index) for index in range(512)]
            here = [entry for entry in entries if entry & valid]
            counts[table] = len(here)
            for entry in here:
                if level > 1 and not entry & pte.PG_PS:
                    visit(entry & FRAME, level - 1)

        visit(self.pmap.root, 4)
        assert counts == self.pmap._count
        assert all(count or table == self.pmap.root for table, count in counts.items())


class EmulatedMachine(PmapMachine):
    flags = PMAP_2M | PMAP_1G | PMAP_EMULATE_AD_BITS


class SmallPagesMachine(PmapMachine):
    flags = 0


class X86Machine(PmapMachine):
    pm_type = PT_X86


FEW = settings(max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param(PmapMachine, marks=pytest.mark.seed("S12")),
        pytest.param(EmulatedMachine, marks=pytest.mark.seed("S13")),
        pytest.param(SmallPagesMachine, marks=pytest.mark.seed("S14")),
        pytest.param(X86Machine, marks=pytest.mark.seed("S12")),
    ],
)
def test_any_sequence_of_operations_keeps_the_tables_true(machine):
    run_state_machine_as_test(machine, settings=FEW)
