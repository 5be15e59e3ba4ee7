"""Segment descriptors for a loader's descriptor table."""

from collections.abc import Sequence

from pyhyve.base.protocols import GuestMemory
from pyhyve.cpu.processor import Segment


def write_table(memory: GuestMemory, base: int, segments: Sequence[Segment]) -> int:
    """Write a table at `base`, its first entry null, with 8 bytes more for a last of 16; return its limit."""
    table = bytes(8) + b"".join(_descriptor(segment).to_bytes(8, "little") for segment in segments) + bytes(8)
    memory.write(base, table)
    return len(table) - 1


def _descriptor(segment: Segment) -> int:
    """The first 8 bytes of a descriptor (Intel SDM vol 3, "Segment Descriptors"); null if not present."""
    if not segment.attr & 0x80:
        return 0
    limit = segment.limit >> 12 if segment.attr & 0x8000 else segment.limit
    return (
        limit & 0xFFFF
        | (segment.base & 0xFF_FFFF) << 16
        | (segment.attr & 0xFF) << 40
        | (limit >> 16 & 0xF) << 48
        | (segment.attr >> 12 & 0xF) << 52
        | (segment.base >> 24) << 56
    )
