"""A walk of a guest's own page tables, for debuggers and the like: KVM's own (KVM_TRANSLATE) knows no permissions.

Source: Intel SDM vol 3, "Paging".
"""

from collections.abc import Callable
from typing import Final, NamedTuple

CR0_WP: Final = 1 << 16
CR0_PG: Final = 1 << 31
CR4_PSE: Final = 1 << 4
CR4_PAE: Final = 1 << 5
CR4_LA57: Final = 1 << 12
CR4_SMEP: Final = 1 << 20
EFER_LMA: Final = 1 << 10
EFER_NXE: Final = 1 << 11

PRESENT: Final = 1
WRITABLE: Final = 1 << 1
USER: Final = 1 << 2
LARGE: Final = 1 << 7
NO_EXECUTE: Final = 1 << 63
FRAME: Final = 0x000F_FFFF_FFFF_F000


class Paging(NamedTuple):
    """The registers that say how a linear address is translated."""

    cr0: int
    cr3: int
    cr4: int
    efer: int


def translate(mode: Paging, read: Callable[[int, int], int | None], gla: int, access: int) -> int | None:
    """Return the guest-physical address of `gla` for a supervisor's access (0 read, 1 write, 2 fetch), or None.

    read(gpa, size) gives 4 or 8 bytes of guest memory, None where there is none. Accessed and dirty bits stay as they
    are, SMAP and protection keys are not looked at.
    """
    long_mode = bool(mode.efer & EFER_LMA)
    gla &= 0xFFFF_FFFF_FFFF_FFFF if long_mode else 0xFFFF_FFFF
    if not mode.cr0 & CR0_PG:
        return gla
    table, size, bits = mode.cr3 & FRAME, 8, 9
    if long_mode:
        levels = 5 if mode.cr4 & CR4_LA57 else 4
        if gla >> (11 + 9 * levels) not in (0, (1 << (53 - 9 * levels)) - 1):
            return None
    elif mode.cr4 & CR4_PAE:
        levels, table = 3, mode.cr3 & 0xFFFF_FFE0
    else:
        levels, size, bits = 2, 4, 10
    allowed, entry, shift = WRITABLE | USER, 0, 12
    no_execute = 0
    for level in range(levels, 0, -1):
        shift = 12 + bits * (level - 1)
        found = read(table + (gla >> shift & (1 << bits) - 1) * size, size)
        if found is None or not found & PRESENT:
            return None
        entry, table = found, found & FRAME
        if level == 3 and not long_mode:
            continue  # a page-directory pointer has no permissions
        allowed &= entry
        no_execute |= entry & NO_EXECUTE
        large = level == 3 or (level == 2 and (size == 8 or mode.cr4 & CR4_PSE))
        if large and entry & LARGE:
            break
    if access == 1 and not allowed & WRITABLE and mode.cr0 & CR0_WP:
        return None
    if access == 2 and ((no_execute and mode.efer & EFER_NXE) or (allowed & USER and mode.cr4 & CR4_SMEP)):
        return None
    if size == 4 and shift > 12:
        table = entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32  # PSE-36
    offset = (1 << shift) - 1
    return table & ~offset | gla & offset
