"""A flat 64-bit environment: descriptor table, identity-mapped page tables, and the registers that go with them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from pyhyve.base.protocols import GuestMemory
from pyhyve.bhyve import layout
from pyhyve.bhyve.boot.descriptors import write_table
from pyhyve.cpu.processor import Segment

CODE_SELECTOR: Final = 0x10
DATA_SELECTOR: Final = 0x18
TASK_SELECTOR: Final = 0x20

CR0: Final = 1 << 31 | 1 << 5 | 1 << 4 | 1 << 0
"""PG, NE, ET, PE."""
CR4: Final = 1 << 5
"""PAE."""
CR4_LA57: Final = 1 << 12
EFER: Final = 1 << 10 | 1 << 8
"""LMA, LME."""
RFLAGS: Final = 1 << 1
"""Interrupts off; bit 1 always reads 1."""

_CODE: Final = Segment(CODE_SELECTOR, 0, 0xFFFF_FFFF, 0xA09B)
_DATA: Final = Segment(DATA_SELECTOR, 0, 0xFFFF_FFFF, 0xC093)
_TASK: Final = Segment(TASK_SELECTOR, 0, 0x67, 0x008B)
_UNUSABLE: Final = Segment(0, 0, 0, 0x1_0082)

SEGMENTS: Final[Mapping[str, Segment]] = MappingProxyType(
    dict.fromkeys(("es", "ss", "ds", "fs", "gs"), _DATA) | {"cs": _CODE, "tr": _TASK, "ldtr": _UNUSABLE}
)
"""Linux's boot protocol asks for these selectors; a busy task segment because VM entry does
(Intel SDM vol 3, "Checks on Guest Segment Registers")."""

_PRESENT_WRITABLE: Final = 0x3
_LARGE_PAGE: Final = 0x80
_ENTRIES: Final = 512
_LARGE_PAGE_SIZE: Final = 2 * layout.MIB


def write_gdt(memory: GuestMemory, base: int) -> int:
    """Write the descriptor table at `base`; return its limit."""
    return write_table(memory, base, (Segment(attr=0), _CODE, _DATA, _TASK))


def write_identity_map(memory: GuestMemory, base: int, *, five_levels: bool = False) -> int:
    """Map the first 4 GiB onto themselves by 2 MiB pages, writable and executable; return CR3.

    The tables are contiguous from `base`: with five levels a PML5; a PML4, a page-directory-pointer table, four page
    directories.
    """
    if five_levels:
        _write_table(memory, base, [base + layout.PAGE_SIZE | _PRESENT_WRITABLE])
        write_identity_map(memory, base + layout.PAGE_SIZE)
        return base
    pointer_table = base + layout.PAGE_SIZE
    directories = [pointer_table + layout.PAGE_SIZE * (index + 1) for index in range(4)]
    _write_table(memory, base, [pointer_table | _PRESENT_WRITABLE])
    _write_table(memory, pointer_table, [directory | _PRESENT_WRITABLE for directory in directories])
    for index, directory in enumerate(directories):
        first = index * layout.GIB
        pages = range(first, first + layout.GIB, _LARGE_PAGE_SIZE)
        _write_table(memory, directory, [page | _LARGE_PAGE | _PRESENT_WRITABLE for page in pages])
    return base


def _write_table(memory: GuestMemory, base: int, entries: list[int]) -> None:
    filled = entries + [0] * (_ENTRIES - len(entries))
    memory.write(base, b"".join(entry.to_bytes(8, "little") for entry in filled))
