"""Where a loader puts what it loads: the image, modules, and the block of what the kernel is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.base.protocols import GuestMemory
from pyhyve.bhyve import layout
from pyhyve.bhyve.boot.files import ModuleFile, read_file

KERNEL_FILE_MAX: Final = 512 * layout.MIB
_WRITE_CHUNK: Final = layout.MIB
_BLOCK_LIMIT: Final = 0x9_F000
"""The block ends below conventional memory's last page, where PC firmware has its own data."""
_BLOCK_BASE: Final = 0x1_0000


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that go to a guest-physical address."""

    address: int
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Extent:
    """Guest-physical addresses that an image occupies: start <= address < end."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Module:
    """A module in its place."""

    piece: Piece
    text: bytes

    @property
    def end(self) -> int:
        return self.piece.address + len(self.piece.data)


def write_piece(memory: GuestMemory, piece: Piece) -> None:
    view = memoryview(piece.data)
    for offset in range(0, len(view), _WRITE_CHUNK):
        memory.write(piece.address + offset, bytes(view[offset : offset + _WRITE_CHUNK]))


def encode_text(text: str, what: str) -> bytes:
    """Return a command line's bytes, with the NUL at their end. UsageError, beginning with `what`, for what is none."""
    try:
        encoded = text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise UsageError(f"{what}: holds characters that no encoding has; leave them out") from None
    if b"\0" in encoded:
        raise UsageError(f"{what}: holds a NUL character; leave it out")
    return encoded + b"\0"


def check_extents(extents: Sequence[Extent], subject: str, low_ram: int) -> None:
    """Raise UsageError, one line, if an image lies where there is no RAM, or over the firmware's tables."""
    end = max(extent.end for extent in extents)
    if end > low_ram:
        raise UsageError(
            f"{subject}: does not fit into {mib(low_ram)} MiB of memory: it reaches up to {mib(end)} MiB; "
            "give more (-m), or link it lower"
        )
    for extent in extents:
        if extent.start < layout.BIOS_LIMIT and extent.end > layout.CONVENTIONAL_LIMIT:
            raise UsageError(
                f"{subject}: wants to be at {extent.start:#x}, over a PC's video memory and firmware tables "
                f"({layout.CONVENTIONAL_LIMIT:#x} to {layout.BIOS_LIMIT:#x}); link it elsewhere"
            )


def place_modules(files: Sequence[ModuleFile], base: int, low_ram: int) -> list[Module]:
    """Read the modules and put them behind each other from `base` on, each on a page of its own."""
    placed = []
    for file in files:
        base = page_up(base)
        room = low_ram - base
        data = read_file(file.path, "module", max_size=max(room, 0))
        placed.append(Module(Piece(base, data), encode_text(file.text, f"module {file.path}")))
        base += len(data)
    return placed


def place_block(size: int, extents: Sequence[Extent], behind: int, low_ram: int, subject: str) -> int:
    """Return a page-aligned address for `size` bytes: high in conventional memory, or from `behind` on."""
    address = (_BLOCK_LIMIT - size) // layout.PAGE_SIZE * layout.PAGE_SIZE
    if address >= _BLOCK_BASE and all(extent.end <= address or extent.start >= _BLOCK_LIMIT for extent in extents):
        return address
    address = page_up(behind)
    if address + size > low_ram:
        raise UsageError(f"{subject}: no room is left for its command lines; give more memory (-m)")
    return address


def page_up(address: int) -> int:
    return -(-address // layout.PAGE_SIZE) * layout.PAGE_SIZE


def aligned(size: int) -> int:
    """Up to a multiple of 8."""
    return -(-size // 8) * 8


def mib(size: int) -> int:
    """Whole MiB, rounded up."""
    return -(-size // layout.MIB)


class Block:
    """Bytes that are put together at a known address: `add` returns where each part lies, 8-byte aligned."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.data = bytearray(size)
        self._used = 0

    def add(self, part: bytes) -> int:
        start = aligned(self._used)
        self._used = start + len(part)
        assert self._used <= len(self.data)
        self.data[start : self._used] = part
        return self.address + start
