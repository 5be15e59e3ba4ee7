"""Host memory at known addresses."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyhyve.base.errors import HostError, UsageError
from pyhyve.vmm.memory import arena as arena_module
from pyhyve.vmm.memory.arena import GUARD, Arena, Reservation, host_memory, view_of
from pyhyve.vmm.memory.page import PAGE_SIZE, SIZE_1G, SIZE_2M


@pytest.mark.parametrize(
    ("size", "color", "align"),
    [
        (SIZE_2M, 0, SIZE_2M),
        (PAGE_SIZE, 0xA0000, SIZE_2M),
        (3 * SIZE_1G, SIZE_1G * 4, SIZE_1G),
        (SIZE_1G, 0x123000, SIZE_1G),
    ],
)
def test_host_and_guest_addresses_agree_modulo_the_largest_page(size, color, align):
    arena = Arena.ram(size, color)
    assert (arena.base - color) % align == 0
    arena.close()


def test_view_and_address_are_the_same_memory():
    arena = Arena.ram(SIZE_2M)
    arena.view[0x1234:0x1238] = b"here"
    assert bytes(view_of(arena.base + 0x1234, 4)) == b"here"
    assert arena.resident() == PAGE_SIZE
    arena.discard(0, SIZE_2M)
    assert arena.view[0x1234] == 0
    arena.close()


def test_populating_takes_memory():
    arena = Arena.ram(SIZE_2M)
    arena.populate(PAGE_SIZE, 3 * PAGE_SIZE)
    assert arena.resident() == 3 * PAGE_SIZE
    arena.close()
    assert arena.resident() == 0


def test_ram_cannot_be_truncated_under_a_running_guest():
    arena = Arena.ram(SIZE_2M)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)
    arena.close()


def test_more_than_the_host_has_is_the_users_error():
    with pytest.raises(UsageError, match="memory 4096 MiB: the host has 1024 MiB with swap; ask for that or less"):
        Arena.ram(4 * SIZE_1G, available=lambda: SIZE_1G)
    assert host_memory() > SIZE_2M


def test_a_host_that_refuses_is_one_line_and_leaves_no_file(monkeypatch):
    def refuse(fd, size):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(arena_module.os, "ftruncate", refuse)
    with pytest.raises(HostError, match="memory: the host refuses 2 MiB: Cannot allocate memory"):
        Arena.ram(SIZE_2M)
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_address_space_is_one_line():
    with pytest.raises(HostError, match="ulimit -v"):
        Reservation(1 << 62)


def test_closing_unmaps_once():
    arena = Arena.ram(SIZE_2M)
    line = f"{arena.base:x}-"
    assert line in Path("/proc/self/maps").read_text()
    arena.close()
    arena.close()
    assert line not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("where", [-1, SIZE_2M, -GUARD, SIZE_2M + GUARD - 1])
def test_guard_gaps_stop_stray_accesses(where):
    code = (
        "import ctypes; from pyhyve.vmm.memory.arena import Arena\n"
        f"a = Arena.ram({SIZE_2M}); ctypes.c_char.from_address(a.base + {where}).value"
    )
    environment = dict(os.environ, PYTHONFAULTHANDLER="0")
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -11
