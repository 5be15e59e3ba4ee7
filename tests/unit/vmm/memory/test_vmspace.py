"""A guest's memory as the guest, the devices and the host see it."""

import resource
import threading

import pytest
from hardware_walker import walk_ept
from hypothesis import given, settings
from hypothesis import strategies as st

from pyhyve.cpu.processor import Capabilities
from pyhyve.vmm.memory.arena import Arena, view_of
from pyhyve.vmm.memory.object import OBJT_DEVICE, ArenaObject, SgObject
from pyhyve.vmm.memory.page import (
    PAGE_SIZE,
    PROT_ALL,
    PROT_EXEC,
    PROT_READ,
    PROT_RW,
    PROT_RX,
    PROT_WRITE,
    SIZE_1G,
    SIZE_2M,
)
from pyhyve.vmm.memory.vmspace import Vmspace

MiB = 1 << 20
FULL = Capabilities("full")
OLD = Capabilities("old", ept_ad=False, ept_2m=False, ept_1g=False)


@pytest.fixture(params=[FULL, OLD, Capabilities("no-ad", ept_ad=False)], ids=lambda caps: caps.name)
def space(request):
    space = Vmspace(request.param)
    space.map_ram(0, 8 * MiB)
    yield space
    space.close()


@pytest.fixture
def full():
    space = Vmspace(FULL)
    yield space
    space.close()


def rom(space, gpa, size=PAGE_SIZE, prot=PROT_READ):
    target = ArenaObject(OBJT_DEVICE, Arena.ram(size))
    space.map_object(gpa, target, 0, size, prot)
    return target


def touch(space, gpa, access):
    """A guest's access: walk, fault, walk. The host address, or None for what must be emulated."""
    for _ in range(2):
        found = walk_ept(space.pmap.eptp, gpa, access)
        if found is not None:
            return found.hva
        if not space.fault(gpa, access):
            return None
    raise AssertionError(f"the fault at {gpa:#x} was resolved, yet the walk fails")


@pytest.mark.seed("S12")
def test_each_guest_has_a_space_of_its_own():
    one, two = Vmspace(FULL), Vmspace(FULL)
    for space, text in ((one, b"one"), (two, b"two")):
        space.map_ram(0, SIZE_2M)
        space.write(0x1000, text)
    assert (one.read(0x1000, 3), two.read(0x1000, 3)) == (b"one", b"two")
    assert one.pmap.eptp != two.pmap.eptp
    one.close()
    two.close()


def test_guest_and_host_see_the_same_bytes(space):
    space.write(0x3FFE, b"abcd")
    hva = touch(space, 0x3FFE, PROT_WRITE)
    assert bytes(view_of(hva, 2)) == b"ab"
    view_of(hva, 2)[:] = b"AB"
    assert space.read(0x3FFE, 4) == b"ABcd"


def test_what_is_not_memory_is_left_to_emulation(space):
    assert not space.fault(8 * MiB, PROT_READ)
    assert not space.fault(0xFEE00000, PROT_WRITE)
    assert not space.fault(1 << 50, PROT_READ)
    assert space.fault(8 * MiB - 1, PROT_READ)


@pytest.mark.seed("S2")
def test_a_write_to_read_only_memory_is_left_to_emulation_and_a_read_is_not(space):
    target = rom(space, 0xFFFFF000)
    target.arena.view[:4] = b"BIOS"
    assert bytes(view_of(touch(space, 0xFFFFF000, PROT_READ), 4)) == b"BIOS"
    assert touch(space, 0xFFFFF000, PROT_WRITE) is None
    assert touch(space, 0xFFFFF000, PROT_EXEC) is None
    with pytest.raises(IndexError):
        space.write(0xFFFFF000, b"x")
    with pytest.raises(IndexError):
        space.hold(0xFFFFF000, 4, PROT_RW)
    with space.hold(0xFFFFF000, 4) as view:
        assert view.readonly
        assert view == b"BIOS"
    space.close()
    target.close()


@pytest.mark.seed("S14")
def test_a_fault_maps_2_mib_where_the_processor_can(full):
    full.map_ram(0, 8 * MiB)
    assert full.fault(0x212345, PROT_WRITE)
    assert [(gpa, size) for gpa, size, _ in full.pmap.leaves(0, 8 * MiB)] == [(SIZE_2M, SIZE_2M)]
    assert not full.pmap.is_modified(0)
    assert full.pmap.is_modified(SIZE_2M)


@pytest.mark.seed("S14")
def test_a_fault_maps_4_kib_where_it_cannot():
    space = Vmspace(OLD)
    space.map_ram(0, 8 * MiB)
    assert space.fault(0x212345, PROT_WRITE)
    assert [(gpa, size) for gpa, size, _ in space.pmap.leaves(0, 8 * MiB)] == [(0x212000, PAGE_SIZE)]
    space.close()


@pytest.mark.seed("S14")
def test_the_ends_of_unaligned_memory_are_mapped_by_small_pages(full):
    full.map_ram(0x1000, 4 * MiB)
    for gpa in (0x1000, SIZE_2M, 2 * SIZE_2M):
        assert full.fault(gpa, PROT_READ)
    assert [size for _, size, _ in full.pmap.leaves(0, 8 * MiB)] == [PAGE_SIZE, SIZE_2M, PAGE_SIZE]


@pytest.mark.seed("S14")
def test_a_gigabyte_of_ram_is_aligned_for_gigabyte_pages(full):
    full.map_ram(4 * SIZE_1G, SIZE_1G)
    [(gpa, hva, size, writable)] = full.ram_ranges()
    assert (gpa, hva % SIZE_1G, size, writable) == (4 * SIZE_1G, 0, SIZE_1G, True)
    for at in range(gpa, gpa + size, SIZE_2M):
        assert full.fault(at, PROT_READ)
    assert [size for _, size, _ in full.pmap.leaves(gpa, size)] == [SIZE_1G]


@pytest.mark.seed("S24")
def test_a_scattered_object_is_mapped_page_by_page():
    space = Vmspace(FULL)
    arena = Arena.ram(4 * SIZE_2M)
    pages = [arena.base + (page * 7 % 512 << 12) for page in range(512)]
    space.map_object(0, SgObject([(page, PAGE_SIZE) for page in pages]), 0, SIZE_2M, PROT_ALL)
    for page in range(512):
        assert touch(space, page << 12, PROT_READ) == pages[page]
    space.write(0xFFF, b"ab")
    assert space.read(0xFFF, 2) == b"ab"
    assert bytes(view_of(pages[1], 1)) == b"b"
    with pytest.raises(IndexError, match="in one piece"):
        space.hold(0xFFF, 2)
    space.close()
    arena.close()


@pytest.mark.seed("S17")
def test_a_guest_takes_no_host_memory_before_it_touches_it(full):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    full.map_ram(0, 256 * MiB)
    for gpa in range(0, 256 * MiB, SIZE_2M):
        assert full.fault(gpa, PROT_READ)
    assert full.resident() == 0
    assert full.pmap.table_bytes == 3 * PAGE_SIZE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000
    full.write(100 * MiB, b"x")
    assert full.resident() == PAGE_SIZE


@pytest.mark.seed("S15")
def test_a_fault_does_not_flush_and_an_unmap_does():
    kicks = []
    space = Vmspace(FULL, lambda: kicks.append(1))
    space.map_ram(0, SIZE_2M)
    assert space.fault(0, PROT_WRITE)
    assert space.fault(0, PROT_WRITE), "another vCPU was first: still resolved"
    assert (space.pmap.eptgen, kicks) == (1, [])
    space.unmap(0, PAGE_SIZE)
    assert space.pmap.eptgen > 1
    assert kicks
    assert not space.fault(0, PROT_READ)
    assert space.fault(PAGE_SIZE, PROT_READ)
    space.close()


def test_unmapped_ram_is_given_back_and_may_be_put_elsewhere(full):
    full.map_ram(0, SIZE_2M)
    full.write(0, bytes(range(256)) * 4096)
    assert full.resident() == MiB
    full.unmap(0, SIZE_2M)
    assert full.resident() == 0
    full.map_ram(0, SIZE_2M)
    assert full.read(0, 8) == bytes(8)


def test_protection_can_fall_and_rise(space):
    assert touch(space, 0x5000, PROT_WRITE)
    space.protect(0x5000, PAGE_SIZE, PROT_RX)
    assert touch(space, 0x5000, PROT_WRITE) is None
    assert touch(space, 0x6000, PROT_WRITE)
    space.protect(0x5000, PAGE_SIZE, PROT_ALL)
    assert touch(space, 0x5000, PROT_WRITE)


@pytest.mark.parametrize("prot", [0, PROT_WRITE, PROT_EXEC])
def test_memory_that_cannot_be_read_is_refused(space, prot):
    with pytest.raises(ValueError, match="does not let the guest read"):
        space.protect(0, PAGE_SIZE, prot)
    assert space.fault(0, PROT_READ)


@pytest.mark.parametrize(("gpa", "length"), [(8 * MiB, 1), (8 * MiB - 1, 2), (0xFEE00000, 4), (0, 9 * MiB)])
def test_the_host_cannot_reach_outside_memory(space, gpa, length):
    space.write(8 * MiB - 16, b"0123456789abcdef")
    with pytest.raises(IndexError):
        space.read(gpa, length)
    with pytest.raises(IndexError):
        space.write(gpa, bytes(length))
    with pytest.raises(IndexError):
        space.hold(gpa, length)
    assert space.read(8 * MiB - 16, 16) == b"0123456789abcdef", "a write is done whole or not at all"


def test_nothing_is_read_and_written_anywhere(space):
    assert space.read(0xFEE00000, 0) == b""
    space.write(0xFEE00000, b"")


def test_a_transfer_may_cross_adjacent_memory(full):
    full.map_ram(0, SIZE_2M)
    full.map_ram(SIZE_2M, SIZE_2M)
    data = bytes(range(256)) * 8192
    full.write(MiB, data)
    assert full.read(MiB, len(data)) == data
    with pytest.raises(IndexError, match="in one piece"):
        full.hold(SIZE_2M - 1, 2)


@pytest.mark.seed("S16")
def test_a_hold_gives_the_bytes_and_ends_with_its_block(space):
    with space.hold(0x1234, 4, PROT_RW) as view:
        view[:] = b"held"
        [target] = {entry.object for entry in space.map}
        assert target.is_held(0x1000, PAGE_SIZE)
        assert not target.is_held(0x2000, PAGE_SIZE)
    assert space.read(0x1234, 4) == b"held"
    assert not target.is_held(0, 8 * MiB)
    with pytest.raises(ValueError, match="released"):
        view[0]


@pytest.mark.seed("S16")
def test_a_hold_ends_when_its_block_fails(space):
    with pytest.raises(RuntimeError), space.hold(0, 1):
        raise RuntimeError
    assert not next(iter(space.map)).object.is_held(0, 8 * MiB)


@pytest.mark.seed("S16")
def test_held_memory_outlives_the_space(full):
    ram = full.map_ram(0, SIZE_2M)
    hold = full.hold(0, 16, PROT_RW)
    full.close()
    hold.view[:] = b"still here, mine"
    hold.release()
    hold.release()
    assert ram.resident() == 0


@pytest.mark.seed("S17")
def test_what_devices_and_gone_mappings_did_is_accounted(space):
    pages = next(iter(space.map)).object.pages
    space.read(0x1000, 1)
    space.write(0x2FFF, b"ab")
    with space.hold(0x5000, 1, PROT_RW):
        pass
    assert touch(space, 0x200000, PROT_WRITE)
    assert not pages.dirty[0x200]
    space.unmap(0x200000, PAGE_SIZE)
    assert [page for page in range(0x201) if pages.dirty[page]] == [2, 3, 5, 0x200]
    assert pages.referenced[1]


def test_host_writes_are_told_to_who_keeps_translated_code(full):
    told = []
    full.map_ram(0, SIZE_2M)
    full.on_host_write = lambda hva, length: told.append((hva, length))
    [(_, base, _, _)] = full.ram_ranges()
    full.write(0x1000, b"code")
    full.read(0x1000, 4)
    with full.hold(0x2000, 8):
        pass
    with full.hold(0x3000, 8, PROT_RW):
        assert len(told) == 1
    assert told == [(base + 0x1000, 4), (base + 0x3000, 8)]


@pytest.mark.seed("S18")
def test_wired_memory_is_mapped_and_taken_before_it_is_touched(space):
    space.wire(0, 8 * MiB)
    assert space.resident() == 8 * MiB
    assert all(space.pmap.is_wired(gpa) for gpa in range(0, 8 * MiB, PAGE_SIZE))
    space.pmap.ts_referenced(0, 8 * MiB)
    assert space.pmap.extract(0x123000) is not None


def test_ranges_tell_what_may_be_written(full):
    full.map_ram(0, SIZE_2M)
    target = rom(full, 0xFFFFF000)
    assert [(gpa, size, writable) for gpa, _, size, writable in full.ram_ranges()] == [
        (0, SIZE_2M, True),
        (0xFFFFF000, PAGE_SIZE, False),
    ]
    full.close()
    target.close()


@pytest.mark.parametrize(
    ("gpa", "size"), [(0, 0), (1, PAGE_SIZE), (0, 100), (0x7FF000, 2 * PAGE_SIZE), (1 << 48, 4096)]
)
def test_memory_that_cannot_be_is_refused_and_leaves_nothing(space, gpa, size):
    before = space.ram_ranges()
    with pytest.raises(ValueError, match=r"map entry|memory|arena|object"):
        space.map_ram(gpa, size)
    assert space.ram_ranges() == before


def test_a_closed_space_is_empty_and_closes_again(full):
    full.map_ram(0, SIZE_2M)
    full.close()
    full.close()
    assert not full.fault(0, PROT_READ)
    assert full.ram_ranges() == []
    assert full.resident() == 0
    with pytest.raises(IndexError):
        full.read(0, 1)
    with pytest.raises(ValueError, match="closed"):
        full.map_ram(0, SIZE_2M)


def test_threads_fault_the_same_memory(space):
    failed = []

    def run(first):
        for gpa in range(first, 8 * MiB, 2 * PAGE_SIZE):
            if not space.fault(gpa, PROT_WRITE):
                failed.append(gpa)

    threads = [threading.Thread(target=run, args=(start,)) for start in (0, 0, PAGE_SIZE, PAGE_SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    [(_, base, _, _)] = space.ram_ranges()
    assert all(space.pmap.extract(gpa) == base + gpa for gpa in range(0, 8 * MiB, PAGE_SIZE))


AREA = 24
page_ranges = st.tuples(st.integers(0, AREA - 1), st.integers(1, 8))
operations = st.one_of(
    st.tuples(st.just("map"), page_ranges, st.sampled_from([PROT_READ, PROT_RW, PROT_ALL])),
    st.tuples(st.just("unmap"), page_ranges, st.just(0)),
    st.tuples(st.just("protect"), page_ranges, st.sampled_from([PROT_READ, PROT_RW, PROT_ALL])),
    st.tuples(st.just("touch"), page_ranges, st.sampled_from([PROT_READ, PROT_WRITE])),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([FULL, OLD]), st.lists(operations, max_size=30))
def test_any_sequence_of_changes_keeps_map_and_tables_true(capabilities, steps):
    space, arena = Vmspace(capabilities), Arena.ram(64 * PAGE_SIZE)
    target, model = ArenaObject(OBJT_DEVICE, arena), {}
    for number, (what, (first, count), prot) in enumerate(steps):
        gpa, size, pages = first << 12, count << 12, range(first, first + count)
        offset = number % 32
        if what == "map":
            if any(page in model for page in pages):
                with pytest.raises(ValueError, match="overlaps"):
                    space.map_object(gpa, target, offset << 12, size, prot)
            else:
                space.map_object(gpa, target, offset << 12, size, prot)
                model.update({page: (offset + index, prot) for index, page in enumerate(pages)})
        elif what == "unmap":
            space.unmap(gpa, size)
            for page in pages:
                model.pop(page, None)
        elif what == "protect":
            space.protect(gpa, size, prot)
            model.update({page: (model[page][0], prot) for page in pages if page in model})
        else:
            for page in pages:
                index, allowed = model.get(page, (0, 0))
                hva = arena.base + (index << 12) if allowed & prot else None
                assert touch(space, page << 12, prot) == hva
        for page in range(AREA + 8):
            mapped = space.pmap.extract(page << 12)
            assert mapped is None or mapped == arena.base + (model[page][0] << 12)
            entry = space.map.lookup(page << 12)
            assert (entry is not None) == (page in model)
            assert entry is None or entry.prot == model[page][1]
    space.close()
    target.close()


def test_an_alias_shows_other_memory_until_it_is_taken_away(space):
    space.write(0x1000, b"first")
    space.write(MiB + 0x1000, b"second")
    generation = space.pmap.eptgen
    assert space.fault(MiB + 0x1000, PROT_READ)
    space.alias(MiB, 0, MiB)
    assert space.read(MiB + 0x1000, 5) == b"first"
    assert space.pmap.eptgen != generation, "the processors must look again"
    space.write(MiB + 0x1000, b"other")
    with pytest.raises(ValueError, match="no 0x100000 bytes"):
        space.alias(MiB, 0, MiB)
    space.unalias(MiB)
    assert space.read(MiB + 0x1000, 6) == b"second"
    assert space.read(0x1000, 5) == b"other"
    with pytest.raises(ValueError, match="no 0x100000 bytes"):
        space.alias(MiB, 64 * MiB, MiB)
