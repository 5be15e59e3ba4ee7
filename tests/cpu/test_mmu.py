"""The software processor's MMU: guest page walks through the EPT, and its TLB, without translator or run loop."""

from __future__ import annotations

import random
import struct
from typing import Any, Final

import pytest

probe = pytest.importorskip("pyhyve.cpu.bt._probe", reason="the bt engine is not built")

P, W, U, A, D, PS, G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
NX: Final = 1 << 63
PG_PE: Final = 0x80000001
WP: Final = 1 << 16
PSE, PAE, PGE, LA57, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 7, 1 << 12, 1 << 20, 1 << 21
LMA_NXE: Final = 0xD00

TABLES: Final = 0x100000
KERNEL, USER, KERNEL_AC = 0, 1, 2
READ, WRITE, FETCH = 0, 1, 2
EPT_VIOLATION, EPT_MISCONFIG = 48, 49


class Guest:
    """Page tables of one format, built in guest memory as pages are mapped."""

    def __init__(self, levels: int = 4, *, cr0: int = 0, cr4: int = 0, size: int = 16 << 20, **options: Any) -> None:
        self.p = probe.Probe(size, **options)
        self.levels = levels
        self.next = TABLES
        self.root = self._table()
        modes = {2: (0, 0), 3: (PAE, 0x800), 4: (PAE, LMA_NXE), 5: (PAE | LA57, LMA_NXE)}
        flags, efer = modes[levels]
        self.p.set(cr0=PG_PE | WP | cr0, cr3=self.root, cr4=flags | PGE | cr4, efer=efer)

    def _table(self) -> int:
        self.next += 4096
        return self.next - 4096

    def entry(self, lin: int, level: int, flags: int = P | W | U) -> int:
        """Guest-physical address of the entry for `lin` in the table of `level` (0: the last), tables made on the way
        with `flags`."""
        width, bits = (4, 10) if self.levels == 2 else (8, 9)
        table = self.root
        for at in range(self.levels - 1, level - 1, -1):
            index = lin >> (12 + bits * at) & ((1 << bits) - 1)
            if self.levels == 3 and at == 2:
                index = lin >> 30 & 3
            where = table + index * width
            if at == level:
                return where
            value = int.from_bytes(self.p.peek(where, width), "little")
            if not value & P:
                value = self._table() | (P if self.levels == 3 and at == 2 else flags)
                self.p.poke(where, value.to_bytes(width, "little"))
            table = value & 0x000FFFFFFFFFF000
        raise ValueError(level)

    def map(self, lin: int, gpa: int, flags: int = P | W | U, level: int = 0, tables: int = P | W | U) -> int:
        where = self.entry(lin, level, tables)
        size = 4 if self.levels == 2 else 8
        self.p.poke(where, (gpa | flags).to_bytes(size, "little"))
        return where

    def flags(self, where: int) -> int:
        return struct.unpack("<I", self.p.peek(where, 4))[0] & 0xFFF

    def fault(self, lin: int, access: int = READ, bank: int = KERNEL) -> tuple[int, int | None]:
        """The exception that the access raises."""
        assert self.p.translate(lin, access, bank)[0] == probe.FAULT
        if self.p.fault()[0] == 14:
            assert self.p.get("fault_addr") == lin
        return self.p.fault()


@pytest.fixture(params=[2, 3, 4, 5], ids=["32-bit", "pae", "4-level", "5-level"])
def guest(request: pytest.FixtureRequest) -> Guest:
    return Guest(request.param)


# --- walks -----------------------------------------------------------------------------------------------------------


def test_linear_is_physical_without_paging() -> None:
    p = probe.Probe()
    assert p.translate(0x12345, WRITE) == (probe.OK, 0x12345, probe.WRITABLE, 0x12345)


def test_walk_finds_the_page(guest: Guest) -> None:
    guest.map(0x40201000, 0x7000)
    assert guest.p.translate(0x40201ABC)[1::2] == (0x7ABC, 0x7ABC)


def test_walk_in_the_upper_half() -> None:
    guest = Guest(4)
    guest.map(0xFFFFFFFF81000000, 0x200000, P | W | PS, level=1)
    assert guest.p.translate(0xFFFFFFFF81012345)[3] == 0x212345


def test_large_page_of_each_format(guest: Guest) -> None:
    size = 22 if guest.levels == 2 else 21
    guest.p.set(cr4=guest.p.get("cr4") | PSE)
    guest.map(0x40000000, 1 << size, P | W | U | PS, level=1)
    assert guest.p.translate(0x40000000 + 0x123456)[3] == (1 << size) + 0x123456


def test_gigabyte_page() -> None:
    guest = Guest(4)
    guest.map(0x40000000, 0, P | W | PS, level=2)
    assert guest.p.translate(0x40000000 + 0x345678)[3] == 0x345678


def test_ps_is_ignored_in_32_bit_tables_without_pse() -> None:
    guest = Guest(2)
    where = guest.map(0x400000, 0x7000)
    pde = guest.entry(0x400000, 1)
    guest.p.poke(pde, (guest.flags(pde) | PS | (guest.next - 4096)).to_bytes(4, "little"))
    assert guest.p.translate(0x400010)[3] == 0x7010
    assert guest.flags(where) & A


def test_pse36_reaches_beyond_4_gib() -> None:
    guest = Guest(2, cr4=PSE)
    guest.map(0, 0x00002000, P | W | PS, level=1)
    assert guest.p.translate(0x1234)[0] == probe.EXIT
    assert guest.p.exit()["gpa"] == (1 << 32) + 0x1234


def test_not_canonical_is_general_protection() -> None:
    assert Guest(4).fault(1 << 47) == (13, 0)
    assert Guest(4).fault(0xFFFF << 48) == (13, 0)
    assert Guest(5).fault(1 << 47) == (14, 0)
    assert Guest(5).fault(1 << 56) == (13, 0)


# --- faults ----------------------------------------------------------------------------------------------------------


def test_not_present_at_each_level(guest: Guest) -> None:
    for level in range(guest.levels):
        where = guest.map(0x40201000, 0x7000)
        saved = guest.p.peek(guest.entry(0x40201000, level), 4)
        guest.p.poke(guest.entry(0x40201000, level), bytes(4))
        assert guest.fault(0x40201008) == (14, 0)
        assert guest.fault(0x40201008, WRITE, USER) == (14, 6)
        guest.p.poke(guest.entry(0x40201000, level), saved)
        assert guest.p.peek(where, 1) != b"\0"


def test_user_is_kept_out_of_supervisor_pages(guest: Guest) -> None:
    guest.map(0x40201000, 0x7000, P | W)
    assert guest.fault(0x40201000, READ, USER) == (14, 5)
    assert guest.fault(0x40201000, WRITE, USER) == (14, 7)
    assert guest.p.translate(0x40201000, WRITE, KERNEL)[0] == probe.OK


def test_supervisor_bit_of_an_upper_level_counts() -> None:
    guest = Guest(4)
    guest.map(0x40201000, 0x7000, tables=P | W)
    assert guest.fault(0x40201000, READ, USER) == (14, 5)


def test_read_only_pages(guest: Guest) -> None:
    guest.map(0x40201000, 0x7000, P | U)
    assert guest.fault(0x40201000, WRITE, USER) == (14, 7)
    assert guest.fault(0x40201000, WRITE, KERNEL) == (14, 3)
    guest.p.set(cr0=PG_PE)
    assert guest.fault(0x40201000, WRITE, USER) == (14, 7)
    assert guest.p.translate(0x40201000, WRITE, KERNEL)[0] == probe.OK


def test_no_execute() -> None:
    for levels in (3, 4):
        guest = Guest(levels)
        guest.map(0x40201000, 0x7000, P | W | U | NX)
        assert guest.p.translate(0x40201000)[0] == probe.OK
        assert guest.fault(0x40201000, FETCH, USER) == (14, 0x15)
        assert guest.fault(0x40201000, FETCH, KERNEL) == (14, 0x11)
        guest.p.set(efer=guest.p.get("efer") & ~0x800)
        assert guest.fault(0x40201000) == (14, 9)


def test_smep_keeps_the_supervisor_from_user_code(guest: Guest) -> None:
    guest.map(0x40201000, 0x7000)
    assert guest.p.translate(0x40201000, FETCH, KERNEL)[0] == probe.OK
    guest.p.set(cr4=guest.p.get("cr4") | SMEP)
    assert guest.fault(0x40201000, FETCH, KERNEL) == (14, 0x11)
    assert guest.p.translate(0x40201000, FETCH, USER)[0] == probe.OK


def test_smap_keeps_the_supervisor_from_user_data_unless_ac(guest: Guest) -> None:
    guest.map(0x40201000, 0x7000)
    guest.p.set(cr4=guest.p.get("cr4") | SMAP)
    assert guest.fault(0x40201000, READ, KERNEL) == (14, 1)
    assert guest.fault(0x40201000, WRITE, KERNEL) == (14, 3)
    assert guest.p.translate(0x40201000, WRITE, KERNEL_AC)[0] == probe.OK
    assert guest.p.translate(0x40201000, WRITE, USER)[0] == probe.OK


@pytest.mark.parametrize("bit", [46, 51])
def test_bits_beyond_maxphyaddr_are_reserved(bit: int) -> None:
    for level in range(4):
        guest = Guest(4)
        guest.map(0x40201000, 0x7000)
        where = guest.entry(0x40201000, level)
        value = int.from_bytes(guest.p.peek(where, 8), "little") | 1 << bit
        guest.p.poke(where, value.to_bytes(8, "little"))
        assert guest.fault(0x40201000) == (14, 9)


def test_reserved_bits_of_large_pages() -> None:
    guest = Guest(4)
    guest.map(0x40000000, 0x200000 | 1 << 13, P | W | PS, level=1)
    assert guest.fault(0x40000000) == (14, 9)
    guest.map(0x80000000, 1 << 29, P | W | PS, level=2)
    assert guest.fault(0x80000000) == (14, 9)
    guest.map(1 << 40, 0, P | W | PS, level=3)
    assert guest.fault(1 << 40) == (14, 9)
    guest.map(0x40000000, 0x200000 | 1 << 12, P | W | PS, level=1)  # PAT
    assert guest.p.translate(0x40000000)[3] == 0x200000


def test_reserved_bits_of_a_pae_pdpte() -> None:
    guest = Guest(3)
    guest.map(0x40201000, 0x7000)
    where = guest.entry(0x40201000, 2)
    guest.p.poke(where, bytes([guest.p.peek(where, 1)[0] | W]))
    assert guest.fault(0x40201000) == (14, 9)


# --- accessed and dirty ----------------------------------------------------------------------------------------------


def test_read_sets_accessed_on_every_level(guest: Guest) -> None:
    where = guest.map(0x40201000, 0x7000)
    assert guest.p.translate(0x40201000)[0] == probe.OK
    assert guest.flags(where) & (A | D) == A
    for level in range(1, min(guest.levels, 2) if guest.levels == 3 else guest.levels):
        assert guest.flags(guest.entry(0x40201000, level)) & (A | D) == A


def test_write_sets_dirty_in_the_leaf_only(guest: Guest) -> None:
    where = guest.map(0x40201000, 0x7000)
    assert guest.p.translate(0x40201000, WRITE)[2] & probe.WRITABLE
    assert guest.flags(where) & (A | D) == A | D
    assert not guest.flags(guest.entry(0x40201000, 1)) & D


def test_large_page_gets_dirty() -> None:
    guest = Guest(4)
    where = guest.map(0x40000000, 0x200000, P | W | PS, level=1)
    guest.p.translate(0x40000000, WRITE)
    assert guest.flags(where) & (A | D) == A | D


def test_a_fault_sets_nothing(guest: Guest) -> None:
    where = guest.map(0x40201000, 0x7000, P | U)
    guest.fault(0x40201000, WRITE)
    assert not guest.flags(where) & (A | D)


# --- the EPT ---------------------------------------------------------------------------------------------------------


def test_ept_violation_tells_of_the_access() -> None:
    guest = Guest(4)
    guest.map(0x40201000, 0xF0000000)
    for access, bits in ((READ, 1), (WRITE, 2), (FETCH, 4)):
        assert guest.p.translate(0x40201123, access)[0] == probe.EXIT
        x = guest.p.exit()
        assert (x["reason"], x["qualification"], x["gpa"], x["gla"]) == (
            EPT_VIOLATION, 0x180 | bits, 0xF0000123, 0x40201123,
        )  # fmt: skip


def test_ept_violation_of_a_walk() -> None:
    guest = Guest(4)
    guest.map(0x40201000, 0x7000)
    guest.p.ept_map(guest.entry(0x40201000, 1) & ~0xFFF, 0, 0)
    assert guest.p.translate(0x40201123)[0] == probe.EXIT
    x = guest.p.exit()
    assert x["qualification"] & 0x1FF == 0x81
    assert x["gpa"] == guest.entry(0x40201000, 1)


def test_ept_permissions() -> None:
    p = probe.Probe()
    p.ept_map(0x7000, 0x7000, 1)
    assert p.translate(0x7000, READ)[:3] == (probe.OK, 0x7000, 0)
    assert p.translate(0x7000, WRITE)[0] == probe.EXIT
    assert p.exit()["qualification"] == 0x18A
    assert p.translate(0x7000, FETCH)[0] == probe.EXIT
    assert p.exit()["qualification"] == 0x18C
    assert p.translate(0x7000, READ)[0] == probe.OK


def test_write_without_read_is_misconfigured() -> None:
    p = probe.Probe()
    p.ept_map(0x7000, 0x7000, 2)
    assert p.translate(0x7000)[0] == probe.EXIT
    assert p.exit()["reason"] == EPT_MISCONFIG


@pytest.mark.parametrize("page", [4096, 2 << 20, 1 << 30])
def test_ept_page_sizes(page: int) -> None:
    p = probe.Probe(ept_page=page)
    p.poke(0x654321, b"x")
    assert p.read(0x654321, 1) == (probe.OK, b"x")
    assert p.translate(0x654321)[1] == 0x654321


def test_ept_accessed_and_dirty() -> None:
    p = probe.Probe(ept_page=2 << 20)
    assert p.translate(0x1000)[2] == 0  # not writable without another walk: D is clear
    assert p.ept_raw(0x1000) & 0x300 == 0x100
    assert p.fill(0x1000) == probe.OK
    assert p.tlb(0x1000) == (True, False)
    assert p.translate(0x1000, WRITE)[2] == probe.WRITABLE
    assert p.ept_raw(0x1000) & 0x300 == 0x300


def test_ept_without_accessed_and_dirty() -> None:
    p = probe.Probe(ept_ad=False)
    assert p.fill(0x1000) == probe.OK
    assert p.tlb(0x1000) == (True, True)
    assert p.ept_raw(0x1000) & 0x300 == 0


def test_setting_a_guest_bit_makes_the_tables_page_dirty() -> None:
    guest = Guest(4)
    where = guest.map(0x40201000, 0x7000)
    guest.p.translate(0x40201000)
    assert guest.p.ept_raw(where) & 0x300 == 0x300


def test_tables_in_read_only_memory_work_while_no_bit_must_be_set() -> None:
    guest = Guest(4)
    where = guest.map(0x40201000, 0x7000, P | W | A)
    for level in range(1, 4):
        at = guest.entry(0x40201000, level)
        guest.p.poke(at, bytes([guest.p.peek(at, 1)[0] | A]))
        guest.p.ept_map(at & ~0xFFF, at & ~0xFFF, 1)
    guest.p.ept_map(where & ~0xFFF, where & ~0xFFF, 1)
    assert guest.p.translate(0x40201000)[0] == probe.OK
    assert guest.p.translate(0x40201000, WRITE)[0] == probe.EXIT
    assert guest.p.exit()["gpa"] == where
    assert guest.p.exit()["qualification"] & 0x102 == 2


def test_a_changed_ept_is_seen_after_its_flush() -> None:
    p = probe.Probe()
    p.poke(0x7000, b"old")
    p.poke(0x8000, b"new")
    assert p.read(0x7000, 3)[1] == b"old"
    p.ept_map(0x7000, 0x8000, 7)
    p.flush_ept()
    assert p.read(0x7000, 3)[1] == b"new"


# --- the TLB ---------------------------------------------------------------------------------------------------------


def test_fill_for_a_read_lets_only_dirty_pages_be_written() -> None:
    guest = Guest(4)
    guest.map(0x5000, 0x7000)
    guest.map(0x6000, 0x8000, P | W | U | D)
    guest.p.translate(0x6000, WRITE)  # the EPT's dirty bit
    guest.p.translate(0x5000)
    guest.p.ept_raw(0x7000, 0x307)
    guest.p.flush_ept()
    assert guest.p.fill(0x5000) == guest.p.fill(0x6000) == probe.OK
    assert guest.p.tlb(0x5000) == (True, False)
    assert guest.p.tlb(0x6000) == (True, True)
    assert guest.p.fill(0x5000, WRITE) == probe.OK
    assert guest.p.tlb(0x5000) == (True, True)


def test_banks_are_apart() -> None:
    guest = Guest(4)
    guest.map(0x5000, 0x7000, P | U | W | D)
    assert guest.p.fill(0x5000, WRITE, USER) == probe.OK
    assert guest.p.tlb(0x5000, USER) == (True, True)
    assert guest.p.tlb(0x5000, KERNEL) == (False, False)


def test_zero_page_does_not_hit_an_empty_tlb() -> None:
    p = probe.Probe()
    for lin in (0, 0x1000, 0x3FF000, 0x400000, 0x1FF000, 0x200000):
        for bank in range(3):
            assert p.tlb(lin, bank) == (False, False)


def test_flush_of_local_entries_keeps_global_ones() -> None:
    guest = Guest(4)
    guest.map(0x5000, 0x7000)
    guest.map(0x6000, 0x8000, P | W | U | G)
    for lin in (0x5000, 0x6000):
        guest.p.fill(lin)
        guest.p.fetch(lin)
    guest.p.flush_nonglobal()
    assert guest.p.tlb(0x5000) == (False, False)
    assert not guest.p.fetch_cached(0x5000)
    assert guest.p.tlb(0x6000)[0]
    assert guest.p.fetch_cached(0x6000)
    guest.p.flush_all()
    assert not guest.p.tlb(0x6000)[0]
    assert not guest.p.fetch_cached(0x6000)


def test_global_bit_means_nothing_without_pge() -> None:
    guest = Guest(4)
    guest.p.set(cr4=PAE)
    guest.map(0x6000, 0x8000, P | W | G)
    guest.p.fill(0x6000)
    guest.p.flush_nonglobal()
    assert not guest.p.tlb(0x6000)[0]


def test_entry_that_turns_from_global_to_local_and_back() -> None:
    guest = Guest(4)
    guest.map(0x5000, 0x7000, P | G)
    guest.map(0x405000, 0x8000, P)  # the same index
    for lin in (0x5000, 0x405000, 0x5000):
        guest.p.fill(lin)
    guest.p.flush_nonglobal()
    assert guest.p.tlb(0x5000)[0]
    guest.p.fill(0x405000)
    guest.p.flush_nonglobal()
    assert not guest.p.tlb(0x405000)[0]
    guest.p.fill(0x5000)
    guest.p.flush_all()
    assert not guest.p.tlb(0x5000)[0]
    guest.p.fill(0x405000)
    guest.p.flush_nonglobal()
    assert not guest.p.tlb(0x405000)[0]


def test_page_flush_drops_one_page_of_every_bank() -> None:
    guest = Guest(4)
    for lin in (0x5000, 0x6000):
        guest.map(lin, lin, P | W | U | G)
        for bank in range(3):
            guest.p.fill(lin, READ, bank)
        guest.p.fetch(lin)
    guest.p.flush_page(0x5FFF)
    for bank in range(3):
        assert guest.p.tlb(0x5000, bank) == (False, False)
        assert guest.p.tlb(0x6000, bank)[0]
    assert not guest.p.fetch_cached(0x5000)
    assert guest.p.fetch_cached(0x6000)


@pytest.mark.parametrize(("level", "reach"), [(1, 0x1FF000), (2, 0x1FF000)])
def test_page_flush_drops_the_whole_large_page(level: int, reach: int) -> None:
    guest = Guest(4)
    guest.map(0x40000000, 0, P | W | PS, level=level)
    guest.map(0x5000, 0x5000)
    for lin in (0x40000000, 0x40000000 + reach, 0x5000):
        guest.p.fill(lin)
    guest.p.fetch(0x40003000)
    guest.p.flush_page(0x40000000 + 0x7000)
    assert not guest.p.tlb(0x40000000)[0]
    assert not guest.p.tlb(0x40000000 + reach)[0]
    assert not guest.p.fetch_cached(0x40003000)
    assert guest.p.tlb(0x5000)[0]


def test_fetch_checks_privilege_anew() -> None:
    guest = Guest(4)
    guest.map(0x5000, 0x7000, P | W)
    assert guest.p.fetch(0x5010, KERNEL) == (probe.OK, 0x7000)
    assert guest.p.fetch(0x5010, KERNEL_AC) == (probe.OK, 0x7000)
    assert guest.p.fetch(0x5010, USER)[0] == probe.FAULT
    assert guest.p.fault() == (14, 0x15)


# --- memory by linear address ----------------------------------------------------------------------------------------


def test_access_over_a_page_end_joins_pages() -> None:
    guest = Guest(4)
    guest.map(0x5000, 0x7000)
    guest.map(0x6000, 0x3000)
    assert guest.p.write(0x5FFD, b"abcdefgh") == probe.OK
    assert guest.p.peek(0x7FFD, 3) == b"abc"
    assert guest.p.peek(0x3000, 5) == b"defgh"
    assert guest.p.read(0x5FFD, 8) == (probe.OK, b"abcdefgh")


def test_nothing_is_written_if_the_second_page_faults() -> None:
    guest = Guest(4)
    guest.map(0x5000, 0x7000)
    assert guest.p.write(0x5FFC, b"abcdefgh") == probe.FAULT
    assert guest.p.fault() == (14, 2)
    assert guest.p.get("fault_addr") == 0x6000
    assert guest.p.peek(0x7FFC, 4) == bytes(4)


def test_long_transfers() -> None:
    guest = Guest(4)
    data = bytes(n * 7 & 0xFF for n in range(20000))
    for n in range(6):
        guest.map(0x5000 + n * 4096, 0x20000 - n * 4096)
    assert guest.p.write(0x5123, data) == probe.OK
    assert guest.p.read(0x5123, 20000) == (probe.OK, data)
    guest.map(0x9000, 0, 0)
    guest.p.flush_all()
    assert guest.p.write(0x5123, bytes(20000)) == probe.FAULT
    assert guest.p.read(0x5123, 4096)[1] == data[:4096]


def test_addresses_wrap_at_4_gib_outside_long_mode() -> None:
    guest = Guest(2)
    guest.map(0xFFFFF000, 0x7000)
    guest.map(0, 0x8000)
    assert guest.p.write(0xFFFFFFFE, b"abcd") == probe.OK
    assert guest.p.peek(0x8000, 2) == b"cd"


def test_random_mappings_agree_with_a_model() -> None:
    """Accesses, remappings and flushes in random order: what is read comes from the page that the tables name, or
    named at some time since the last flush that covered it."""
    rng = random.Random(1)
    guest = Guest(4)
    frames = [n * 4096 for n in range(16, 200)]
    for gpa in frames:
        guest.p.poke(gpa, gpa.to_bytes(8, "little"))
    pages = [0x40000000 + n * 0x1000 for n in range(12)] + [0x40400000 + n * 0x1000 for n in range(12)]
    now: dict[int, tuple[int, bool]] = {}
    allowed: dict[int, set[tuple[int, bool]]] = {lin: set() for lin in pages}
    seen = 0
    for _ in range(20000):
        lin = rng.choice(pages)
        what = rng.randrange(12)
        if what < 2:
            now[lin] = rng.choice(frames), rng.random() < 0.3
            guest.map(lin, now[lin][0], P | W | U | (G if now[lin][1] else 0))
            allowed[lin].add(now[lin])
        elif what == 2:
            guest.map(lin, 0, 0)
            now.pop(lin, None)
        elif what == 3:
            guest.p.flush_page(lin)
            allowed[lin] = {now[lin]} if lin in now else set()
        elif what == 4 and rng.random() < 0.3:
            guest.p.flush_all()
            allowed = {at: {now[at]} if at in now else set() for at in pages}
        elif what == 5:
            guest.p.flush_nonglobal()
            allowed = {at: {x for x in allowed[at] if x[1] or x == now.get(at)} for at in pages}
        elif what < 8:
            guest.p.fill(lin, rng.randrange(2), rng.randrange(3))
        else:
            result, data = guest.p.read(lin, 8, rng.randrange(3))
            frames_allowed = {gpa for gpa, _ in allowed[lin]}
            if result == probe.OK:
                assert int.from_bytes(data, "little") in frames_allowed
                seen += 1
            else:
                assert lin not in now
    assert seen > 2000
