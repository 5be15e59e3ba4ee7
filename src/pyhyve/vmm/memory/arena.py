"""Host memory at known addresses: what the monitor calls physical memory.

A frame number in an EPT entry is the virtual address of the page in this process, so memory is mapped through the C
library: Python's mmap module neither aligns (2 MiB and 1 GiB pages need it) nor tells the address.
"""

import contextlib
import ctypes
import fcntl
import os
from collections.abc import Callable
from typing import Final, cast

from pyhyve.base.errors import HostError, UsageError
from pyhyve.vmm.memory.page import PAGE_SIZE, SIZE_1G, SIZE_2M, check_pages

GUARD: Final = 1 << 16
"""Bytes without access on both sides of a mapping: a stray access faults instead of finding a neighbour."""

_PROT_NONE: Final = 0
_PROT_RW: Final = 3
_MAP_SHARED: Final = 0x01
_MAP_PRIVATE: Final = 0x02
_MAP_FIXED: Final = 0x10
_MAP_ANONYMOUS: Final = 0x20
_MAP_NORESERVE: Final = 0x4000
_MADV_REMOVE: Final = 9
_MADV_POPULATE_WRITE: Final = 23
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_PYBUF_WRITE: Final = 0x200

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_from_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_from_memory.restype = ctypes.py_object
_from_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)


def view_of(address: int, length: int) -> memoryview:
    """A writable view of this process's memory. The caller sees to it that the memory outlives the view."""
    return cast(memoryview, _from_memory(address, length, _PYBUF_WRITE))


def host_memory() -> int:
    """Bytes of memory and swap that the host has in all."""
    total = 0
    with open("/proc/meminfo", encoding="ascii") as info:
        for line in info:
            if line.startswith(("MemTotal:", "SwapTotal:")):
                total += int(line.split()[1]) << 10
    return total


def _mmap(address: int | None, size: int, prot: int, flags: int, fd: int = -1) -> int:
    result = _libc.mmap(address, size, prot, flags, fd, 0)
    if result is None or result == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return cast(int, result)


def _check(status: int) -> None:
    if status != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Reservation:
    """Address space without memory: `base % align == color % align`, a guard gap before and behind.

    Raises HostError when the process has no address space left (RLIMIT_AS).
    """

    def __init__(self, size: int, align: int = PAGE_SIZE, color: int = 0) -> None:
        self.size = size
        total = size + align + 2 * GUARD
        try:
            start = _mmap(None, total, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE)
        except OSError as error:
            raise HostError(
                f"address space: cannot reserve {total >> 20} MiB: {error.strerror}; "
                "raise the address space limit (ulimit -v)"
            ) from error
        lowest = start + GUARD
        self.base = lowest + (color - lowest) % align
        self._start = self.base - GUARD
        self._end = self.base + size + GUARD
        if self._start > start:
            _libc.munmap(start, self._start - start)
        if start + total > self._end:
            _libc.munmap(self._end, start + total - self._end)

    def map_file(self, fd: int) -> None:
        """Put `size` bytes of a file there, shared, readable and writable, without reserving swap for them."""
        _mmap(self.base, self.size, _PROT_RW, _MAP_SHARED | _MAP_FIXED | _MAP_NORESERVE, fd)

    def commit(self, offset: int, length: int) -> None:
        """Make a part of the reservation zeroed private memory."""
        _check(_libc.mprotect(self.base + offset, length, _PROT_RW))

    def close(self) -> None:
        """Give the address space back. Nobody may touch it any more. Idempotent."""
        if self._end:
            _libc.munmap(self._start, self._end - self._start)
            self._start = self._end = 0


class Arena:
    """A file's pages, all of them, mapped into this process: guest RAM (`ram`) or a devmem segment.

    `base`: host address of the first byte. `view`: the bytes. The arena owns `fd`. Memory is taken from the host page
    by page, when somebody touches it. `color` is a guest-physical address: base and color agree modulo 2 MiB (modulo
    1 GiB from that size on), so that aligned guest memory is aligned host memory.
    """

    def __init__(self, fd: int, size: int, color: int = 0) -> None:
        check_pages("arena", size, color)
        if size == 0:
            raise ValueError("arena: a size of 0")
        self.fd = fd
        self.size = size
        self._space = Reservation(size, SIZE_1G if size >= SIZE_1G else SIZE_2M, color)
        self.base = self._space.base
        try:
            self._space.map_file(fd)
        except OSError as error:
            self._space.close()
            raise HostError(f"memory: cannot map {size >> 20} MiB: {error.strerror}") from error
        self.view = view_of(self.base, size)
        self._closed = False

    @classmethod
    def ram(cls, size: int, color: int = 0, *, available: Callable[[], int] = host_memory) -> "Arena":
        """Zeroed RAM in a file of its own that cannot be truncated. UsageError if the host is smaller than that."""
        check_pages("memory", size)
        limit = available()
        if size > limit:
            raise UsageError(f"memory {size >> 20} MiB: the host has {limit >> 20} MiB with swap; ask for that or less")
        fd = os.memfd_create("pyhyve-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            try:
                os.ftruncate(fd, size)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            except OSError as error:
                raise HostError(f"memory: the host refuses {size >> 20} MiB: {error.strerror}") from error
            return cls(fd, size, color)
        except BaseException:
            os.close(fd)
            raise

    def resident(self) -> int:
        """Bytes that the host has given so far."""
        return 0 if self._closed else os.fstat(self.fd).st_blocks * 512

    def populate(self, offset: int, length: int) -> None:
        """Take a range's memory from the host now. HostError if it has no more."""
        if _libc.madvise(self.base + offset, length, _MADV_POPULATE_WRITE) == 0:
            return
        try:
            os.posix_fallocate(self.fd, offset, length)  # a kernel before 5.14
        except OSError as error:
            raise HostError(f"memory: cannot populate {length >> 20} MiB: {error.strerror}") from error

    def discard(self, offset: int, length: int) -> None:
        """Give a range's memory back to the host; it reads as zeros from now on."""
        _check(_libc.madvise(self.base + offset, length, _MADV_REMOVE))

    def close(self) -> None:
        """Unmap; no vCPU, device or view may use the memory any more. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(BufferError):
            self.view.release()
        self._space.close()
        os.close(self.fd)
