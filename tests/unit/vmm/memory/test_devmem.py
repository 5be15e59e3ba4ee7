"""Named segments beside guest RAM."""

import errno
import mmap
import os

import pytest

from pyhyve.cpu.processor import Capabilities
from pyhyve.vmm.memory.devmem import Devmem
from pyhyve.vmm.memory.page import PAGE_SIZE, PROT_EXEC, PROT_READ, PROT_RW, PROT_RX, PROT_WRITE, SIZE_2M
from pyhyve.vmm.memory.vmspace import Vmspace

BAR, OTHER = 0xC000_0000, 0xD000_0000


@pytest.fixture
def space():
    space = Vmspace(Capabilities("any"))
    space.map_ram(0, SIZE_2M)
    yield space
    space.close()


@pytest.fixture
def devmem(space, tmp_path):
    devmem = Devmem(space, tmp_path, "testvm")
    yield devmem
    devmem.close()


def refused(number):
    return pytest.raises(OSError, match=rf"\[Errno {number}\] devmem")


@pytest.mark.seed("S1")
def test_the_same_name_and_size_is_the_same_segment(devmem):
    segment = devmem.create("bootrom", 4 * PAGE_SIZE)
    segment.view[:4] = b"BIOS"
    assert devmem.create("bootrom", 4 * PAGE_SIZE) is segment
    assert bytes(devmem["bootrom"].view[:4]) == b"BIOS"


@pytest.mark.seed("S1")
def test_the_same_name_and_another_size_exists(devmem):
    devmem.create("bootrom", PAGE_SIZE)
    with refused(errno.EEXIST):
        devmem.create("bootrom", 2 * PAGE_SIZE)


@pytest.mark.seed("S1")
@pytest.mark.parametrize(
    ("name", "size"),
    [("rom", 0), ("rom", -PAGE_SIZE), ("rom", 100), ("", PAGE_SIZE), ("../x", PAGE_SIZE), ("a/b", PAGE_SIZE),
     ("x" * 64, PAGE_SIZE), ("a\0", PAGE_SIZE), ("rom\n", PAGE_SIZE)],
)  # fmt: skip
def test_a_segment_that_cannot_be_is_refused(devmem, tmp_path, name, size):
    with refused(errno.EINVAL):
        devmem.create(name, size)
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_system_is_told_at_once_and_leaves_no_node(devmem, tmp_path, monkeypatch):
    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with refused(errno.ENOSPC):
        devmem.create("fb", PAGE_SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.seed("S1")
def test_an_unknown_segment_is_refused(devmem):
    with refused(errno.EINVAL):
        devmem.map("bootrom", BAR, PROT_READ)


@pytest.mark.seed("S2")
def test_a_segment_is_placed_moved_and_removed(space, devmem):
    segment = devmem.create("fb", SIZE_2M)
    devmem.map("fb", BAR, PROT_RW)
    assert space.fault(BAR, PROT_WRITE)
    assert not space.fault(BAR, PROT_EXEC)
    space.write(BAR + 5, b"pixel")
    devmem.unmap(BAR)
    assert not space.fault(BAR, PROT_READ)
    assert space.pmap.extract(BAR) is None
    devmem.map("fb", OTHER, PROT_RW)
    assert space.read(OTHER + 5, 5) == b"pixel"
    assert bytes(segment.view[5:10]) == b"pixel"


@pytest.mark.seed("S2")
def test_a_rom_may_be_read_and_run_but_not_written(space, devmem):
    devmem.create("bootrom", 4 * PAGE_SIZE)
    devmem.map("bootrom", (1 << 32) - PAGE_SIZE, PROT_RX, offset=3 * PAGE_SIZE, length=PAGE_SIZE)
    devmem["bootrom"].view[4 * PAGE_SIZE - 16] = 0xEA
    assert space.fault((1 << 32) - 16, PROT_EXEC)
    assert not space.fault((1 << 32) - 16, PROT_WRITE)
    assert space.read((1 << 32) - 16, 1) == b"\xea"


@pytest.mark.seed("S2")
def test_one_segment_may_be_seen_twice(space, devmem):
    devmem.create("fb", PAGE_SIZE)
    devmem.map("fb", BAR, PROT_RW)
    devmem.map("fb", OTHER, PROT_READ)
    space.write(BAR, b"twice")
    assert space.read(OTHER, 5) == b"twice"
    assert [mapping.gpa for mapping in devmem.mappings] == [BAR, OTHER]


@pytest.mark.seed("S2")
@pytest.mark.parametrize(
    ("gpa", "prot", "offset", "length", "number"),
    [
        (BAR + 1, PROT_READ, 0, None, errno.EINVAL),
        (BAR, PROT_READ, 1, None, errno.EINVAL),
        (BAR, PROT_READ, 0, 100, errno.EINVAL),
        (BAR, PROT_READ, 0, 0, errno.EINVAL),
        (BAR, PROT_READ, 0, 3 * PAGE_SIZE, errno.EINVAL),
        (BAR, PROT_READ, 2 * PAGE_SIZE, None, errno.EINVAL),
        (BAR, PROT_READ, -PAGE_SIZE, PAGE_SIZE, errno.EINVAL),
        (BAR, 0, 0, None, errno.EINVAL),
        (BAR, PROT_WRITE, 0, None, errno.EINVAL),
        (1 << 48, PROT_READ, 0, None, errno.EINVAL),
        (SIZE_2M - PAGE_SIZE, PROT_READ, 0, None, errno.EEXIST),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(devmem, gpa, prot, offset, length, number):
    devmem.create("fb", 2 * PAGE_SIZE)
    with refused(number):
        devmem.map("fb", gpa, prot, offset, length)
    assert devmem.mappings == []


def test_what_is_not_mapped_cannot_be_unmapped(devmem):
    with refused(errno.EINVAL):
        devmem.unmap(BAR)


@pytest.mark.seed("S2")
def test_a_reset_drops_mappings_and_keeps_segments_and_ram(space, devmem):
    segment = devmem.create("bootrom", PAGE_SIZE)
    segment.view[:4] = b"BIOS"
    space.write(0, b"ram")
    devmem.map("bootrom", BAR, PROT_READ)
    devmem.reset()
    assert not space.fault(BAR, PROT_READ)
    assert space.read(0, 3) == b"ram"
    assert bytes(devmem["bootrom"].view[:4]) == b"BIOS"


@pytest.mark.seed("S3")
def test_the_node_is_the_segment_whether_the_guest_has_it_or_not(space, devmem, tmp_path):
    devmem.create("fb", PAGE_SIZE)
    node = tmp_path / "testvm.fb"
    assert node.stat().st_mode & 0o777 == 0o600
    with node.open("r+b") as file, mmap.mmap(file.fileno(), PAGE_SIZE) as seen:
        seen[:5] = b"other"
        devmem.map("fb", BAR, PROT_READ)
        assert space.read(BAR, 5) == b"other"
        devmem.unmap(BAR)
        devmem["fb"].view[:5] = b"mine!"
        assert seen[:5] == b"mine!"
    devmem.close()
    devmem.close()
    assert not node.exists()


@pytest.mark.seed("S3")
def test_a_leftover_node_is_replaced_and_a_link_is_not_followed(devmem, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "testvm.fb").symlink_to(victim)
    devmem.create("fb", PAGE_SIZE)
    assert victim.read_bytes() == b"precious"
    assert not os.path.islink(tmp_path / "testvm.fb")
