"""Bits of page-table entries, for the two formats that a pmap can have.

What differs by format is asked for at run time (`pmap_modified_bit(pmap)` and its siblings) and never assumed.
Sources: Intel SDM vol 3, "4-Level Paging and 5-Level Paging" (Format of Paging-Structure Entries) and "The Extended
Page Table Mechanism (EPT)" (Format of EPT entries).
"""

from typing import Final, Protocol

from pyhyve.vmm.memory.page import PROT_EXEC, PROT_WRITE

PT_X86: Final = 0
"""The format of the processor's own page tables."""
PT_EPT: Final = 1
"""The format of nested page tables."""

# pm_flags: what the processor has, and what it lacks and the pmap must do for it.
PMAP_2M: Final = 1 << 0
PMAP_1G: Final = 1 << 1
PMAP_EMULATE_AD_BITS: Final = 1 << 2

# Both formats.
PG_PS: Final = 1 << 7
PG_FRAME: Final = 0x000F_FFFF_FFFF_F000
PG_W: Final = 1 << 11
"""Wired; the hardware ignores the bit in both formats."""

X86_PG_V: Final = 1 << 0
X86_PG_RW: Final = 1 << 1
X86_PG_U: Final = 1 << 2
X86_PG_NC_PWT: Final = 1 << 3
X86_PG_NC_PCD: Final = 1 << 4
X86_PG_A: Final = 1 << 5
X86_PG_M: Final = 1 << 6
X86_PG_G: Final = 1 << 8
X86_PG_NX: Final = 1 << 63

EPT_PG_READ: Final = 1 << 0
EPT_PG_WRITE: Final = 1 << 1
EPT_PG_EXECUTE: Final = 1 << 2
EPT_PG_MEMORY_TYPE_SHIFT: Final = 3
EPT_PG_IGNORE_PAT: Final = 1 << 6
EPT_PG_A: Final = 1 << 8
EPT_PG_M: Final = 1 << 9
EPT_PG_EMUL_V: Final = 1 << 52
EPT_PG_EMUL_RW: Final = 1 << 53

MEMORY_UNCACHEABLE: Final = 0
MEMORY_WRITE_BACK: Final = 6

EPTP_WALK_4: Final = 3 << 3
EPTP_WRITE_BACK: Final = 6
EPTP_AD: Final = 1 << 6


class HasType(Protocol):
    """What the functions below ask of a pmap."""

    @property
    def pm_type(self) -> int: ...

    @property
    def pm_flags(self) -> int: ...


def pmap_emulate_ad_bits(pmap: HasType) -> bool:
    """True if the processor does not keep accessed and dirty bits in this pmap's entries."""
    return bool(pmap.pm_flags & PMAP_EMULATE_AD_BITS)


def pmap_valid_bit(pmap: HasType) -> int:
    if pmap.pm_type == PT_X86:
        return X86_PG_V
    return EPT_PG_EMUL_V if pmap_emulate_ad_bits(pmap) else EPT_PG_READ


def pmap_rw_bit(pmap: HasType) -> int:
    if pmap.pm_type == PT_X86:
        return X86_PG_RW
    return EPT_PG_EMUL_RW if pmap_emulate_ad_bits(pmap) else EPT_PG_WRITE


def pmap_accessed_bit(pmap: HasType) -> int:
    if pmap.pm_type == PT_X86:
        return X86_PG_A
    return EPT_PG_READ if pmap_emulate_ad_bits(pmap) else EPT_PG_A


def pmap_modified_bit(pmap: HasType) -> int:
    if pmap.pm_type == PT_X86:
        return X86_PG_M
    return EPT_PG_WRITE if pmap_emulate_ad_bits(pmap) else EPT_PG_M


def pmap_global_bit(pmap: HasType) -> int:
    """0 where the format knows no global mappings."""
    return X86_PG_G if pmap.pm_type == PT_X86 else 0


def pmap_cache_bits(pmap: HasType, *, uncached: bool) -> int:
    """The memory type of a leaf."""
    if pmap.pm_type == PT_X86:
        return X86_PG_NC_PCD | X86_PG_NC_PWT if uncached else 0
    kind = MEMORY_UNCACHEABLE if uncached else MEMORY_WRITE_BACK
    return kind << EPT_PG_MEMORY_TYPE_SHIFT | EPT_PG_IGNORE_PAT


def pmap_exec_bits(pmap: HasType) -> tuple[int, int]:
    """(mask, value): a leaf may be executed if entry & mask == value."""
    return (X86_PG_NX, 0) if pmap.pm_type == PT_X86 else (EPT_PG_EXECUTE, EPT_PG_EXECUTE)


def pmap_protection_bits(pmap: HasType, prot: int) -> int:
    """Valid, writable and executable, as a leaf with this protection has them. Every mapping is readable."""
    bits = pmap_valid_bit(pmap)
    if prot & PROT_WRITE:
        bits |= pmap_rw_bit(pmap)
    if pmap.pm_type == PT_X86:
        bits |= X86_PG_U
    mask, value = pmap_exec_bits(pmap)
    return bits | (value if prot & PROT_EXEC else mask ^ value)


def pmap_table_bits(pmap: HasType) -> int:
    """What an entry that points to another table has: everything allowed, the leaf decides."""
    bits = pmap_valid_bit(pmap) | pmap_rw_bit(pmap) | pmap_accessed_bit(pmap)
    if pmap.pm_type == PT_X86:
        return bits | X86_PG_U
    if pmap_emulate_ad_bits(pmap):
        bits |= pmap_modified_bit(pmap)
    return bits | EPT_PG_EXECUTE
