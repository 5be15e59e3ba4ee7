"""A page-table walker written from the manual, not from the pmap: what the hardware would make of the tables."""

import ctypes
from dataclasses import dataclass

FRAME = 0x000F_FFFF_FFFF_F000
READ, WRITE, EXEC = 1, 2, 4


class Misconfiguration(Exception):
    """An entry that the processor does not accept."""


@dataclass
class Translation:
    hva: int
    size: int
    writable: bool


def load(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def store(address: int, value: int) -> None:
    ctypes.c_uint64.from_address(address).value = value


def walk_ept(eptp: int, gpa: int, access: int) -> Translation | None:
    """Intel SDM vol 3, "EPT Translation Mechanism". None: EPT violation. Sets A and D where EPTP bit 6 says so."""
    assert eptp & 0x3F == 0x1E, "4-level walk, write-back"
    keeps_ad = bool(eptp & 1 << 6)
    table, rights, path = eptp & FRAME, 7, []
    for shift in (39, 30, 21, 12):
        address = table + 8 * (gpa >> shift & 511)
        entry = load(address)
        if entry & 7 == 0:
            return None
        if entry & 3 == 2 or entry & 7 == 4:
            raise Misconfiguration(f"{entry:#x}")
        leaf = shift == 12 or bool(entry & 0x80)
        if leaf and entry >> 3 & 7 not in (0, 1, 4, 5, 6):
            raise Misconfiguration(f"memory type of {entry:#x}")
        if (not leaf and entry >> 3 & 0x1F) or (leaf and entry & FRAME & ((1 << shift) - 1)):
            raise Misconfiguration(f"reserved bits of {entry:#x}")
        rights &= entry
        path.append((address, entry))
        if leaf:
            break
        table = entry & FRAME
    if access & ~rights:
        return None
    if keeps_ad:
        for address, entry in path[:-1]:
            store(address, entry | 1 << 8)
        address, entry = path[-1]
        store(address, entry | 1 << 8 | (1 << 9 if access & WRITE else 0))
    size = 1 << shift
    return Translation((entry & FRAME) + (gpa & (size - 1)), size, bool(rights & WRITE))


def walk_x86(root: int, linear: int, access: int) -> Translation | None:
    """Intel SDM vol 3, "4-Level Paging", as a user access with EFER.NXE = 1. None: page fault."""
    table, rights, executable, path = root, 6, True, []
    for shift in (39, 30, 21, 12):
        address = table + 8 * (linear >> shift & 511)
        entry = load(address)
        if not entry & 1:
            return None
        rights &= entry
        executable = executable and not entry >> 63
        path.append((address, entry))
        if shift == 12 or entry & 0x80:
            break
        table = entry & FRAME
    if not rights & 4 or (access & WRITE and not rights & 2) or (access & EXEC and not executable):
        return None
    for address, entry in path[:-1]:
        store(address, entry | 1 << 5)
    address, entry = path[-1]
    store(address, entry | 1 << 5 | (1 << 6 if access & WRITE else 0))
    size = 1 << shift
    return Translation((entry & FRAME & -size) + (linear & (size - 1)), size, bool(rights & 2))
