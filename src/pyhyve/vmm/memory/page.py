"""Units, protections and the state of pages: flat arrays indexed by page, never an object per page."""

from typing import Final

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
PAGE_MASK: Final = PAGE_SIZE - 1
SIZE_2M: Final = 1 << 21
SIZE_1G: Final = 1 << 30
MAX_GPA: Final = 1 << 48
"""What a 4-level walk reaches."""

# Protections and accesses share one encoding: that of the low bits of an EPT violation's exit qualification
# (Intel SDM vol 3, "Exit Qualification for EPT Violations") and of FreeBSD's VM_PROT_*.
PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4
PROT_RW: Final = PROT_READ | PROT_WRITE
PROT_RX: Final = PROT_READ | PROT_EXEC
PROT_ALL: Final = PROT_READ | PROT_WRITE | PROT_EXEC


def check_pages(what: str, *values: int) -> None:
    """Raise ValueError unless every value is a non-negative multiple of the page size."""
    for value in values:
        if value < 0 or value & PAGE_MASK:
            raise ValueError(f"{what}: {value:#x} is not a multiple of the page size ({PAGE_SIZE:#x})")


class PageStates:
    """What is known of an object's pages when no page table says it any more: one byte a page and property.

    `dirty`: written since it was last clean (by the guest through a mapping now gone, or by a device);
    `referenced`: touched since the last time that somebody asked.
    """

    __slots__ = ("dirty", "referenced")

    def __init__(self, count: int) -> None:
        self.dirty = bytearray(count)
        self.referenced = bytearray(count)

    def mark(self, offset: int, length: int, *, modified: bool) -> None:
        """Record an access to the bytes offset <= b < offset + length of the object (length >= 1)."""
        first = offset >> PAGE_SHIFT
        last = (offset + length - 1) >> PAGE_SHIFT
        if first == last:
            self.referenced[first] = 1
            if modified:
                self.dirty[first] = 1
            return
        ones = b"\1" * (last - first + 1)
        self.referenced[first : last + 1] = ones
        if modified:
            self.dirty[first : last + 1] = ones
