"""Instructions that the processor itself carries out on a device's bytes: for those that the monitor cannot emulate.

The monitor reads the operand from the device into a page of its own, lets the vCPU run this one instruction with nested
page tables in which that page lies at the device's address, and writes to the device what the instruction has stored.
So every instruction that the processor knows may have a device as its operand, with the processor's own results, flags
and faults. The private tables are copies of the real ones along the paths to these pages; everything else is shared.
"""

import ctypes
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from iced_x86 import CodeSize, Instruction, InstructionInfoFactory, MemorySizeExt, OpAccess, Register, UsedMemory

from pyhyve.cpu import exits
from pyhyve.cpu.processor import Exit
from pyhyve.vmm.memory import pte
from pyhyve.vmm.operand import GPRS, SEGMENTS

_PAGE: Final = 4096
_ENTRIES: Final = 512
_LEVELS: Final = 4
_PAGES_MAX: Final = 4
"""Device pages of one instruction: two operands (PUSH has its stack), each over the end of a page."""
_ATTEMPTS: Final = 16
_BITS: Final = pte.EPT_PG_READ | pte.EPT_PG_WRITE | pte.EPT_PG_EXECUTE
_LEAF: Final = (
    _BITS | pte.EPT_PG_A | pte.EPT_PG_M | pte.EPT_PG_IGNORE_PAT | pte.MEMORY_WRITE_BACK << pte.EPT_PG_MEMORY_TYPE_SHIFT
)
_READS: Final = frozenset((OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE))
_WRITES: Final = frozenset((OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE))


class Steps(Protocol):
    """A vCPU that can run one instruction with nested page tables of the caller's."""

    @property
    def eptp(self) -> int:
        """The nested page tables that are its own."""
        ...

    def step(self, eptp: int) -> int:
        """Run the instruction at RIP, or bring the guest to the handler of its fault; return the exit's reason."""
        ...


class Devices(Protocol):
    def is_device(self, gpa: int) -> bool: ...

    def read_device(self, gpa: int, size: int) -> int: ...

    def write_device(self, gpa: int, size: int, value: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Access:
    """An access of the instruction that meets a device: within one page, `size` bytes from `gpa` on."""

    gpa: int
    size: int
    reads: bool
    writes: bool


class Pages:
    """Page-aligned memory of the monitor's, given out page by page and taken back all at once."""

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, count * _PAGE)
        self._view = memoryview(self._memory)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._count = count
        self._used = 0

    def reset(self) -> None:
        self._used = 0

    def take(self, content: bytes = bytes(_PAGE)) -> tuple[int, memoryview]:
        """Return a page's address and the page itself, holding `content`."""
        if self._used == self._count:
            raise MemoryError("no page is left")
        offset = self._used * _PAGE
        self._used += 1
        view = self._view[offset : offset + _PAGE]
        view[:] = content
        return self._base + offset, view


class Assistant:
    """Runs instructions on devices' bytes, for one vCPU. `fault_in(gpa, access)` makes RAM resident; True if it did."""

    def __init__(self, vcpu: Steps, devices: Devices, fault_in: Callable[[int, int], bool]) -> None:
        self._vcpu = vcpu
        self._devices = devices
        self._fault_in = fault_in
        self._data = Pages(_PAGES_MAX)
        self._tables = Pages(1 + (_LEVELS - 1) * _PAGES_MAX)

    def run(self, accesses: list[Access], exit_: Exit, done: Callable[[], bool]) -> bool:
        """Carry out the instruction at RIP; False if that is not possible (no device has been written to then).

        `exit_` is the vCPU's; `done()` says whether the instruction has been carried out, rather than the guest brought
        to a handler of its fault.
        """
        pages: dict[int, tuple[int, memoryview]] = {}
        self._data.reset()
        for access in accesses:
            if access.gpa >> 12 not in pages:
                if len(pages) == _PAGES_MAX:
                    return False
                pages[access.gpa >> 12] = self._data.take()
            if access.reads:
                page = pages[access.gpa >> 12][1]
                for gpa, size in _pieces(access):
                    page[gpa & 0xFFF : (gpa & 0xFFF) + size] = self._devices.read_device(gpa, size).to_bytes(
                        size, "little"
                    )
        for _ in range(_ATTEMPTS):
            reason = self._vcpu.step(self._private({page: address for page, (address, _) in pages.items()}))
            if reason != exits.EPT_VIOLATION:
                break
            if self._devices.is_device(exit_.gpa) or not self._fault_in(exit_.gpa, exit_.qualification & 7):
                return False
        if reason != exits.MONITOR_TRAP:
            return False
        if done():
            for access in accesses:
                if access.writes:
                    page = pages[access.gpa >> 12][1]
                    for gpa, size in _pieces(access):
                        value = int.from_bytes(page[gpa & 0xFFF : (gpa & 0xFFF) + size], "little")
                        self._devices.write_device(gpa, size, value)
        return True

    def _private(self, leaves: dict[int, int]) -> int:
        """Return an EPT pointer to tables that are the real ones but for `leaves`: page number → host address."""
        eptp = self._vcpu.eptp
        self._tables.reset()
        root, _ = self._tables.take(_table(eptp & pte.PG_FRAME))
        copies = {root}
        for page, address in leaves.items():
            table = root
            for level in range(_LEVELS - 1, 0, -1):
                table = self._copied(table, page >> 9 * level & _ENTRIES - 1, copies)
            _entry(table, page & _ENTRIES - 1).value = address | _LEAF
        return root | eptp & (_PAGE - 1)

    def _copied(self, table: int, index: int, copies: set[int]) -> int:
        """Make the table behind an entry of ours one of ours as well; return its address."""
        entry = _entry(table, index)
        below = entry.value & pte.PG_FRAME
        if below not in copies:
            present = entry.value & _BITS and not entry.value & pte.PG_PS
            below, _ = self._tables.take(_table(below)) if present else self._tables.take()
            copies.add(below)
            entry.value = below | _BITS | pte.EPT_PG_A
        return below


def _table(address: int) -> bytes:
    return ctypes.string_at(address, _PAGE)


def _entry(table: int, index: int) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(table + 8 * index)


def _pieces(access: Access) -> Iterator[tuple[int, int]]:
    """Accesses of 1, 2, 4 or 8 bytes, each on a boundary of its size."""
    gpa, end = access.gpa, access.gpa + access.size
    while gpa < end:
        size = 8
        while gpa % size or gpa + size > end:
            size //= 2
        yield gpa, size
        gpa += size


_OFFSET_MASKS: Final = {CodeSize.CODE16: 0xFFFF, CodeSize.CODE32: 0xFFFF_FFFF}
_factory: Final = InstructionInfoFactory()


def memory_accesses(
    instruction: Instruction, get_gpr: Callable[[int], int], linear: Callable[[str, int, int], int]
) -> list[tuple[int, int, bool, bool]] | None:
    """Return (linear address, size, reads, writes) of each access; None where they cannot be known beforehand.

    `linear(segment, offset, size)` applies a segment.
    """
    found = []
    for used in _factory.info(instruction).used_memory():
        size = MemorySizeExt.size(used.memory_size)
        if used.access == OpAccess.NO_MEM_ACCESS:
            continue
        offset = _offset(used, get_gpr)
        if not size or offset is None:
            return None
        at = linear(SEGMENTS[used.segment], offset, size)
        found.append((at, size, used.access in _READS, used.access in _WRITES))
    return found


def _offset(used: UsedMemory, get_gpr: Callable[[int], int]) -> int | None:
    offset = used.displacement
    for register, scale in ((used.base, 1), (used.index, used.scale)):
        if register in (Register.NONE, Register.RIP, Register.EIP):
            continue
        if register not in GPRS:
            return None  # a vector of indices
        offset += get_gpr(GPRS[register][0]) * scale
    return offset & _OFFSET_MASKS.get(used.address_size, (1 << 64) - 1)
