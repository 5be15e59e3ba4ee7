"""The pmap, looked at as the hardware does."""

import pytest
from hardware_walker import load, walk_ept, walk_x86

from pyhyve.vmm.memory import pte
from pyhyve.vmm.memory.page import PAGE_SIZE, PROT_ALL, PROT_READ, PROT_RW, PROT_RX, PROT_WRITE, SIZE_1G, SIZE_2M
from pyhyve.vmm.memory.pmap import Pmap
from pyhyve.vmm.memory.pte import PMAP_1G, PMAP_2M, PMAP_EMULATE_AD_BITS, PT_EPT, PT_X86

HOST = 0x7F00_0000_0000


@pytest.fixture(params=["ept", "ept-emulated", "x86"])
def pmap(request):
    flags = PMAP_2M | PMAP_1G | (PMAP_EMULATE_AD_BITS if request.param == "ept-emulated" else 0)
    pmap = Pmap(PT_X86 if request.param == "x86" else PT_EPT, flags)
    yield pmap
    pmap.close()


@pytest.fixture
def ept():
    pmap = Pmap()
    yield pmap
    pmap.close()


def access(pmap, gpa, kind):
    """An access by the guest, with the monitor's help where the bits are emulated."""
    if pmap.pm_type == PT_X86:
        return walk_x86(pmap.root, gpa, kind)
    found = walk_ept(pmap.eptp, gpa, kind)
    if found is None and pmap.emulate_accessed_dirty(gpa, kind):
        found = walk_ept(pmap.eptp, gpa, kind)
        assert found is not None, "emulation granted what the hardware does not"
    return found


def fill(pmap, gpa, prot=PROT_ALL, kind=PROT_READ, hva=HOST):
    for at in range(0, SIZE_2M, PAGE_SIZE):
        pmap.enter(gpa + at, hva + at, prot, kind)


@pytest.mark.seed("S12")
@pytest.mark.parametrize(
    ("pm_type", "flags", "valid", "rw", "accessed", "modified"),
    [
        (PT_X86, 0, 1 << 0, 1 << 1, 1 << 5, 1 << 6),
        (PT_EPT, 0, 1 << 0, 1 << 1, 1 << 8, 1 << 9),
        pytest.param(PT_EPT, PMAP_EMULATE_AD_BITS, 1 << 52, 1 << 53, 1 << 0, 1 << 1, marks=pytest.mark.seed("S13")),
    ],
)
def test_bits_follow_the_type_of_the_pmap(pm_type, flags, valid, rw, accessed, modified):
    pmap = Pmap(pm_type, flags)
    assert pte.pmap_valid_bit(pmap) == valid
    assert pte.pmap_rw_bit(pmap) == rw
    assert pte.pmap_accessed_bit(pmap) == accessed
    assert pte.pmap_modified_bit(pmap) == modified
    assert pte.pmap_global_bit(pmap) == (1 << 8 if pm_type == PT_X86 else 0)
    pmap.close()


@pytest.mark.seed("S12")
def test_eptp_tells_walk_length_memory_type_and_whether_the_processor_keeps_ad_bits():
    with_ad, without = Pmap(), Pmap(PT_EPT, PMAP_EMULATE_AD_BITS)
    assert with_ad.eptp == with_ad.root | 0x5E
    assert without.eptp == without.root | 0x1E
    assert with_ad.root % PAGE_SIZE == 0
    with_ad.close()
    without.close()


def test_a_page_entered_is_what_the_walker_finds(pmap):
    pmap.enter(0x5000, HOST + 0x3000, PROT_ALL, PROT_READ)
    found = access(pmap, 0x5123, PROT_READ)
    assert (found.hva, found.size) == (HOST + 0x3123, PAGE_SIZE)
    assert pmap.extract(0x5123) == HOST + 0x3123
    assert access(pmap, 0x6000, PROT_READ) is None
    assert pmap.extract(0x6000) is None


def test_protection_holds_against_the_walker(pmap):
    pmap.enter(0x1000, HOST, PROT_READ, PROT_READ)
    pmap.enter(0x2000, HOST, PROT_RX, PROT_READ)
    pmap.enter(0x3000, HOST, PROT_RW, PROT_READ)
    allowed = {gpa: [kind for kind in (1, 2, 4) if access(pmap, gpa, kind)] for gpa in (0x1000, 0x2000, 0x3000)}
    assert allowed == {0x1000: [1], 0x2000: [1, 4], 0x3000: [1, 2]}


def test_a_leaf_has_the_memory_type_of_its_object(ept):
    ept.enter(0x1000, HOST, PROT_RW)
    ept.enter(0x2000, HOST, PROT_RW, uncached=True)
    assert ept.lookup(0x1000)[0] >> 3 & 15 == 6 | 8
    assert ept.lookup(0x2000)[0] >> 3 & 15 == 0 | 8


@pytest.mark.seed("S12")
def test_accessed_and_modified_follow_the_guest_page_by_page(pmap):
    for page in range(3):
        pmap.enter(page << 12, HOST + (page << 12), PROT_RW)
    assert access(pmap, 0x0000, PROT_READ)
    assert access(pmap, 0x1000, PROT_WRITE)
    assert [pmap.is_referenced(page << 12) for page in range(3)] == [True, True, False]
    assert [pmap.is_modified(page << 12) for page in range(3)] == [False, True, False]


@pytest.mark.seed("S12")
def test_clearing_modified_makes_the_next_write_set_it_again(pmap):
    pmap.enter(0x1000, HOST, PROT_ALL, PROT_WRITE)
    generation = pmap.eptgen
    assert pmap.clear_modified(0x1000) == 1
    assert pmap.eptgen == generation + 1
    assert not pmap.is_modified(0x1000)
    assert access(pmap, 0x1000, PROT_READ)
    assert not pmap.is_modified(0x1000)
    assert access(pmap, 0x1000, PROT_WRITE)
    assert pmap.is_modified(0x1000)
    assert pmap.clear_modified(0x8000) == 0


@pytest.mark.seed("S12")
def test_ts_referenced_counts_and_clears(ept):
    for page in range(4):
        ept.enter(page << 12, HOST + (page << 12), PROT_ALL, PROT_READ if page < 3 else 0)
    assert ept.ts_referenced(0, 4 << 12) == 3
    assert ept.ts_referenced(0, 4 << 12) == 0
    assert access(ept, 0x1000, PROT_READ)
    assert ept.ts_referenced(0, 4 << 12) == 1


@pytest.mark.seed("S13")
def test_emulated_reference_of_executable_page_goes_with_its_mapping_and_is_accounted():
    gone = []
    pmap = Pmap(PT_EPT, PMAP_EMULATE_AD_BITS, harvest=lambda *what: gone.append(what))
    pmap.enter(0x1000, HOST, PROT_ALL, PROT_WRITE)
    pmap.enter(0x2000, HOST, PROT_ALL, PROT_READ, wired=True)
    pmap.enter(0x3000, HOST, PROT_READ, PROT_READ)
    assert pmap.ts_referenced(0x1000, 0x3000) == 3
    assert gone == [(0x1000, PAGE_SIZE, True, False)]
    assert pmap.extract(0x1000) is None
    assert pmap.extract(0x2000) == HOST
    assert walk_ept(pmap.eptp, 0x3000, PROT_READ) is None
    assert access(pmap, 0x3000, PROT_READ).hva == HOST
    pmap.close()


@pytest.mark.seed("S13")
def test_emulated_dirty_bit_is_the_hardware_writable_bit():
    pmap = Pmap(PT_EPT, PMAP_EMULATE_AD_BITS)
    pmap.enter(0x1000, HOST, PROT_RW, PROT_READ)
    entry = pmap.lookup(0x1000)[0]
    assert (entry & 7, entry >> 52 & 3) == (1, 3)
    generation = pmap.eptgen
    assert pmap.emulate_accessed_dirty(0x1000, PROT_WRITE)
    assert pmap.lookup(0x1000)[0] & 7 == 3
    assert pmap.eptgen == generation, "granting takes nothing away: no flush"
    pmap.enter(0x2000, HOST, PROT_READ, PROT_READ)
    assert not pmap.emulate_accessed_dirty(0x2000, PROT_WRITE)
    assert not pmap.emulate_accessed_dirty(0x9000, PROT_READ)
    pmap.close()


@pytest.mark.seed("S13")
def test_emulated_write_protection_keeps_what_was_modified():
    gone = []
    pmap = Pmap(PT_EPT, PMAP_EMULATE_AD_BITS, harvest=lambda *what: gone.append(what))
    pmap.enter(0x1000, HOST, PROT_RW, PROT_WRITE)
    pmap.protect(0x1000, PAGE_SIZE, PROT_READ)
    assert walk_ept(pmap.eptp, 0x1000, PROT_WRITE) is None
    assert gone == [(0x1000, PAGE_SIZE, True, True)]
    pmap.close()


@pytest.mark.seed("S14")
def test_a_full_uniform_table_is_promoted_and_one_changed_page_demotes_it(pmap):
    fill(pmap, SIZE_2M)
    assert pmap.leaves(0, SIZE_1G)[0][:2] == (SIZE_2M, SIZE_2M)
    assert access(pmap, SIZE_2M + 0x12345, PROT_READ).hva == HOST + 0x12345
    pmap.protect(SIZE_2M + 0x7000, PAGE_SIZE, PROT_READ)
    assert len(pmap.leaves(0, SIZE_1G)) == 512
    assert access(pmap, SIZE_2M + 0x7000, PROT_WRITE) is None
    assert access(pmap, SIZE_2M + 0x8000, PROT_WRITE).hva == HOST + 0x8000
    pmap.protect(SIZE_2M + 0x7000, PAGE_SIZE, PROT_ALL)
    assert pmap.promote(SIZE_2M)
    assert pmap.counters["promotions"] == 2
    assert pmap.counters["demotions"] == 1


@pytest.mark.seed("S14")
@pytest.mark.parametrize("why", ["unaligned", "scattered", "mixed", "untouched", "incomplete"])
def test_no_promotion_where_a_superpage_would_differ(ept, why):
    for page in range(512 - (why == "incomplete")):
        at = page << 12
        hva = HOST + at + (PAGE_SIZE if why == "unaligned" else 0) + (SIZE_2M if (why, page) == ("scattered", 9) else 0)
        prot = PROT_READ if (why, page) == ("mixed", 9) else PROT_ALL
        ept.enter(at, hva, prot, 0 if (why, page) == ("untouched", 9) else PROT_READ)
    assert ept.counters["promotions"] == 0
    assert not ept.promote(0)


@pytest.mark.seed("S14")
def test_a_processor_without_superpages_gets_none():
    pmap = Pmap(PT_EPT, 0)
    fill(pmap, 0)
    assert not pmap.enter_superpage(SIZE_2M, HOST, PROT_ALL)
    assert not pmap.promote(0)
    assert {size for _, size, _ in pmap.leaves(0, SIZE_1G)} == {PAGE_SIZE}
    pmap.close()


@pytest.mark.seed("S14")
def test_512_large_pages_become_a_gigabyte_and_demote_level_by_level(ept):
    for at in range(0, SIZE_1G, SIZE_2M):
        assert ept.enter_superpage(SIZE_1G + at, HOST + at, PROT_ALL, PROT_READ)
    assert ept.leaves(0, 4 * SIZE_1G) == [(SIZE_1G, SIZE_1G, ept.lookup(SIZE_1G)[0])]
    assert access(ept, SIZE_1G + 0x1234567, PROT_READ).hva == HOST + 0x1234567
    ept.remove(SIZE_1G + SIZE_2M + 0x3000)
    assert len(ept.leaves(0, 4 * SIZE_1G)) == 511 + 511
    assert ept.extract(SIZE_1G + SIZE_2M + 0x3000) is None
    assert access(ept, SIZE_1G + SIZE_2M + 0x4000, PROT_READ).hva == HOST + SIZE_2M + 0x4000


@pytest.mark.seed("S14")
def test_a_gigabyte_page_only_where_the_processor_has_them():
    pmap = Pmap(PT_EPT, PMAP_2M)
    assert not pmap.enter_superpage(0, HOST, PROT_ALL, size=SIZE_1G)
    for at in range(0, SIZE_1G, SIZE_2M):
        pmap.enter_superpage(at, HOST + at, PROT_ALL, PROT_READ)
    assert len(pmap.leaves(0, SIZE_1G)) == 512
    pmap.close()


def test_a_superpage_does_not_replace_smaller_pages(ept):
    ept.enter(0x3000, HOST + 0x3000, PROT_ALL)
    assert not ept.enter_superpage(0, HOST, PROT_ALL)
    ept.remove(0x3000)
    assert ept.enter_superpage(0, HOST, PROT_ALL)


@pytest.mark.parametrize(("gpa", "hpa"), [(PAGE_SIZE, HOST), (0, HOST + PAGE_SIZE)])
def test_an_unaligned_superpage_is_refused(ept, gpa, hpa):
    with pytest.raises(ValueError, match="no superpage"):
        ept.enter_superpage(gpa, hpa, PROT_ALL)


@pytest.mark.parametrize(("gpa", "hpa", "prot"), [(1, HOST, 1), (0, HOST + 8, 1), (-PAGE_SIZE, HOST, 1), (0, HOST, 0)])
def test_a_mapping_that_cannot_be_is_refused(ept, gpa, hpa, prot):
    with pytest.raises(ValueError, match="pmap"):
        ept.enter(gpa, hpa, prot)


def test_nothing_is_mapped_beyond_a_4_level_walk(ept):
    with pytest.raises(ValueError, match="4-level"):
        ept.enter(1 << 48, HOST, PROT_ALL)
    assert ept.extract(1 << 48) is None
    ept.enter((1 << 48) - PAGE_SIZE, HOST, PROT_ALL)
    assert ept.extract((1 << 48) - 1) == HOST + 0xFFF


def test_wired_survives_protection_and_demotion(ept):
    ept.enter_superpage(0, HOST, PROT_ALL)
    ept.wire(0x4000, PAGE_SIZE)
    ept.protect(0, SIZE_2M, PROT_READ)
    assert [gpa for gpa, _, _ in ept.leaves(0, SIZE_2M) if ept.is_wired(gpa)] == [0x4000]
    ept.wire(0x4000, PAGE_SIZE, False)
    assert not ept.is_wired(0x4000)


@pytest.mark.seed("S15")
def test_every_invalidation_moves_the_generation_and_kicks():
    kicks = []
    pmap = Pmap(kick=lambda: kicks.append(1))
    pmap.enter(0x1000, HOST, PROT_ALL)
    assert (pmap.eptgen, len(kicks)) == (1, 0), "a new mapping takes nothing away"
    steps = [
        lambda: pmap.enter(0x1000, HOST + 0x1000, PROT_ALL, PROT_WRITE),
        lambda: pmap.protect(0x1000, PAGE_SIZE, PROT_RX),
        lambda: pmap.clear_modified(0x1000) or pmap.clear_reference(0x1000),
        lambda: pmap.remove(0x1000),
        lambda: pmap.invalidate_page(0x1000),
        lambda: pmap.invalidate_range(0x1000, 0x4000),
        pmap.invalidate_all,
    ]
    for done, step in enumerate(steps, 1):
        step()
        assert pmap.eptgen == 1 + len(kicks)
        assert len(kicks) >= done
    before = pmap.eptgen
    pmap.remove(0, SIZE_1G)
    pmap.protect(0, SIZE_1G, PROT_READ)
    assert pmap.eptgen == before, "nothing was mapped"
    pmap.close()


@pytest.mark.seed("S15")
def test_a_range_is_invalidated_once(ept):
    for page in range(200):
        ept.enter(page << 12, HOST, PROT_ALL, PROT_WRITE)
    before = ept.eptgen
    ept.remove(0, 200 << 12)
    assert ept.eptgen == before + 1


@pytest.mark.seed("S15")
def test_a_table_is_not_used_again_before_the_last_vcpu_flushed(ept):
    ept.activate(0)
    ept.enter(0, HOST, PROT_ALL)
    pointer = load(ept.root) & pte.PG_FRAME
    before = ept.table_bytes
    ept.remove(0)
    ept.enter(0, HOST, PROT_ALL)
    assert load(ept.root) & pte.PG_FRAME != pointer, "vCPU 0 may still be walking the old table"
    assert ept.table_bytes == 2 * before - PAGE_SIZE
    ept.deactivate(0)
    for _ in range(10):
        ept.activate(0)
        ept.deactivate(0)
        ept.remove(0)
        ept.enter(0, HOST, PROT_ALL)
    assert ept.table_bytes == 2 * before - PAGE_SIZE


def test_tables_are_not_used_again_while_nobody_says_who_is_in_the_guest(ept):
    tables = set()
    for _ in range(5):
        ept.enter(0, HOST, PROT_ALL)
        tables.add(load(ept.root) & pte.PG_FRAME)
        ept.remove(0)
    assert len(tables) == 5


def test_a_writable_page_taken_from_a_running_guest_counts_as_modified():
    gone = []
    pmap = Pmap(harvest=lambda *what: gone.append(what))
    for page in range(3):
        pmap.enter(page << 12, HOST, PROT_READ if page == 2 else PROT_RW, PROT_READ)
    pmap.remove(0)
    pmap.activate(0)
    pmap.remove(0x1000)
    pmap.remove(0x2000)
    assert gone == [
        (0, PAGE_SIZE, False, True),
        (0x1000, PAGE_SIZE, True, True),
        (0x2000, PAGE_SIZE, False, True),
    ]
    pmap.close()


def test_closing_twice_is_harmless(pmap):
    pmap.enter(0, HOST, PROT_ALL)
    pmap.close()
    pmap.close()
