"""devmem: named segments beside guest RAM, for what a guest reads without an exit but RAM is not (ROMs, framebuffers).

A segment is a file, its node, on tmpfs; the host's view of it (this process's, and any other's that maps the node)
does not depend on where the guest sees it, or whether it does. Errors are OSErrors with the errno that the caller of
the original's ioctls would get.
"""

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyhyve.vmm.memory.arena import Arena
from pyhyve.vmm.memory.object import OBJT_DEVICE, ArenaObject
from pyhyve.vmm.memory.page import PAGE_MASK, PROT_EXEC, PROT_READ, PROT_RW, PROT_RX
from pyhyve.vmm.memory.vmspace import Vmspace

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")
_PROTECTIONS: Final = (PROT_READ, PROT_RW, PROT_RX, PROT_RW | PROT_EXEC)


@dataclass(frozen=True, slots=True)
class Segment:
    """A named piece of memory; `node` is its file."""

    name: str
    node: Path
    object: ArenaObject

    @property
    def size(self) -> int:
        """Bytes."""
        return self.object.size

    @property
    def view(self) -> memoryview:
        """The bytes, writable whatever the guest's protection is."""
        return self.object.arena.view


@dataclass(frozen=True, slots=True)
class Mapping:
    """Where the guest sees a part of a segment."""

    gpa: int
    segment: str
    offset: int
    length: int
    prot: int


def _invalid(text: str) -> OSError:
    return OSError(errno.EINVAL, text)


class Devmem:
    """The segments of one VM and where the guest sees them. Nodes are `directory`/VM.SEGMENT, mode 0600.

    Whoever makes this holds the VM's name, so a node of that name is a leftover and is replaced.
    """

    def __init__(self, space: Vmspace, directory: Path, vm_name: str) -> None:
        self._space = space
        self._directory = directory
        self._vm_name = vm_name
        self._segments: dict[str, Segment] = {}
        self._mappings: dict[int, Mapping] = {}

    def create(self, name: str, size: int) -> Segment:
        """Make a zeroed segment; one of the same name and size is returned as it is.

        OSError: EEXIST if it has another size; EINVAL for a bad name, a size of 0 or not of whole pages; what the host
        says if it cannot make the node, or has no room for it (all of it is taken now: a full file system would
        otherwise be a fatal signal at some later access).
        """
        if not _NAME.fullmatch(name):
            raise _invalid(f"devmem {name!r}: a name is 1-63 letters, digits, '_', '.' or '-'")
        if size <= 0 or size & PAGE_MASK:
            raise _invalid(f"devmem {name}: a size of {size:#x} is not a multiple of 4 KiB above 0")
        known = self._segments.get(name)
        if known is not None:
            if known.size != size:
                raise OSError(errno.EEXIST, f"devmem {name}: it exists with {known.size:#x} bytes, not {size:#x}")
            return known
        node = self._directory / f"{self._vm_name}.{name}"
        node.unlink(missing_ok=True)
        fd = os.open(node, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError as error:
                text = f"devmem {name}: cannot take {size:#x} bytes at {node}: {error.strerror}"
                raise OSError(error.errno, text) from error
            arena = Arena(fd, size)
        except BaseException:
            os.close(fd)
            node.unlink(missing_ok=True)
            raise
        segment = self._segments[name] = Segment(name, node, ArenaObject(OBJT_DEVICE, arena))
        return segment

    def __iter__(self) -> Iterator[Segment]:
        return iter(list(self._segments.values()))

    def __getitem__(self, name: str) -> Segment:
        """A segment by name. OSError EINVAL if there is none."""
        if name not in self._segments:
            raise _invalid(f"devmem {name}: no such segment")
        return self._segments[name]

    @property
    def mappings(self) -> list[Mapping]:
        """Where the guest sees segments now, by address."""
        return sorted(self._mappings.values(), key=lambda mapping: mapping.gpa)

    def map(self, name: str, gpa: int, prot: int, offset: int = 0, length: int | None = None) -> Mapping:
        """Show a segment, or a part of it, to the guest: PROT_READ or PROT_RW, with PROT_EXEC only where asked for.

        OSError: EINVAL for an unknown segment, addresses not of whole pages, a part beyond the segment, a protection
        without read; EEXIST if the guest has other memory there.
        """
        segment = self[name]
        size = segment.size - offset if length is None else length
        if (gpa | offset | size) & PAGE_MASK or gpa < 0 or offset < 0 or size <= 0 or offset + size > segment.size:
            raise _invalid(f"devmem {name}: cannot map {size:#x} bytes at offset {offset:#x} to {gpa:#x}")
        if prot not in _PROTECTIONS:
            raise _invalid(f"devmem {name}: protection {prot:#x} is none of read, read-write, with or without execute")
        if self._space.map.overlapping(gpa, gpa + size):
            raise OSError(errno.EEXIST, f"devmem {name}: the guest has other memory at {gpa:#x}-{gpa + size:#x}")
        try:
            self._space.map_object(gpa, segment.object, offset, size, prot)
        except ValueError as error:
            raise _invalid(f"devmem {name}: {error}") from error
        mapping = self._mappings[gpa] = Mapping(gpa, name, offset, size, prot)
        return mapping

    def unmap(self, gpa: int) -> None:
        """Take the mapping that starts at gpa out of the guest's view. OSError EINVAL if none starts there."""
        mapping = self._mappings.pop(gpa, None)
        if mapping is None:
            raise _invalid(f"devmem: nothing is mapped at {gpa:#x}")
        self._space.unmap(mapping.gpa, mapping.length)

    def reset(self) -> None:
        """What a reset of the VM does: no segment is mapped any more; segments and their bytes stay."""
        for gpa in list(self._mappings):
            self.unmap(gpa)

    def close(self) -> None:
        """Unmap and destroy all segments with their nodes. No vCPU may run any more. Idempotent."""
        self.reset()
        for segment in self:
            segment.node.unlink(missing_ok=True)
            segment.object.close()
        self._segments.clear()
