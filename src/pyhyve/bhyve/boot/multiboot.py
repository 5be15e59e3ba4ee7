"""The Multiboot loader, version 1: ELF images, and images that say in their header where they go.

Source: Multiboot Specification version 0.6.96, "OS image format", "Machine state", "Boot information format".
"""

import dataclasses
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.base.protocols import GuestMemory
from pyhyve.bhyve import layout
from pyhyve.bhyve.boot import bios, elf, placing, protected
from pyhyve.bhyve.boot.files import ModuleFile
from pyhyve.bhyve.boot.placing import Block, Extent, Module, Piece
from pyhyve.bhyve.boot.state import BootState

HEADER_MAGIC: Final = 0x1BAD_B002
LOADER_MAGIC: Final = 0x2BAD_B002
LOADER_NAME: Final = b"pyhyve\0"

_SEARCH: Final = 8192
_PAGE_ALIGN: Final = 1 << 0
_MEMORY_INFO: Final = 1 << 1
_VIDEO_MODE: Final = 1 << 2
_MUST_KNOW: Final = 0xFFFF
_ADDRESSES: Final = 1 << 16

_INFO: Final = struct.Struct("<7I4I7I2I4H")
_INFO_MEMORY: Final = 1 << 0
_INFO_COMMAND_LINE: Final = 1 << 2
_INFO_MODULES: Final = 1 << 3
_INFO_MEMORY_MAP: Final = 1 << 6
_INFO_LOADER_NAME: Final = 1 << 9
_MODULE: Final = struct.Struct("<IIII")
_MAP_ENTRY: Final = struct.Struct("<IQQI")
_KIB: Final = 1024
_SLACK: Final = 64
"""What the alignment of the block's parts may cost."""


@dataclass(frozen=True, slots=True)
class Header:
    """A Multiboot header; `offset` is where in the file it lies. The addresses mean something with _ADDRESSES only."""

    offset: int
    flags: int
    header_addr: int
    load_addr: int
    load_end_addr: int
    bss_end_addr: int
    entry_addr: int


@dataclass(frozen=True, slots=True)
class _Image:
    pieces: tuple[Piece, ...]
    extents: tuple[Extent, ...]
    entry: int

    @property
    def end(self) -> int:
        return max(extent.end for extent in self.extents)


def find_header(data: bytes) -> Header | None:
    """Return the header among the first 8 KiB, on a 4-byte boundary, with its checksum right; None if there is none."""
    window = data[:_SEARCH]
    magic = struct.pack("<I", HEADER_MAGIC)
    at = window.find(magic)
    while at >= 0:
        if at % 4 == 0 and at + 12 <= len(window):
            flags, checksum = struct.unpack_from("<II", window, at + 4)
            if (HEADER_MAGIC + flags + checksum) & 0xFFFF_FFFF == 0:
                rest = window[at + 12 : at + 32].ljust(20, b"\0")
                return Header(at, flags, *struct.unpack("<5I", rest))
        at = window.find(magic, at + 1)
    return None


def load_multiboot(
    memory: GuestMemory,
    data: bytes,
    header: Header,
    subject: str,
    cmdline: str,
    modules: Sequence[ModuleFile],
    low_ram: int,
    high_ram: int,
) -> BootState:
    """Place the image in `data` and all it is handed into `memory`; return the state in which it is entered.

    Nothing is written before everything is known to fit. UsageError, one line, for what cannot be.
    """
    if header.flags & _VIDEO_MODE:
        raise UsageError(f"{subject}: asks for a video mode (Multiboot flag 2); pyhyve has no graphics yet")
    unknown = header.flags & _MUST_KNOW & ~(_PAGE_ALIGN | _MEMORY_INFO)
    if unknown:
        raise UsageError(f"{subject}: asks for what Multiboot 1 does not have (flags {unknown:#x}); build it without")
    image = _from_addresses(data, header, subject) if header.flags & _ADDRESSES else _from_elf(data, subject)
    placing.check_extents(image.extents, subject, low_ram)
    placed = placing.place_modules(modules, image.end, low_ram)
    behind = max([image.end, *(module.end for module in placed)])
    command_line = placing.encode_text(cmdline, "kernel command line")
    block = _information(image, placed, command_line, behind, low_ram, high_ram, subject)

    bios.write_memory(memory)  # first: an image may well lie over it
    for piece in (*image.pieces, *(module.piece for module in placed), Piece(block.address, bytes(block.data))):
        placing.write_piece(memory, piece)
    gdt = block.address + len(block.data) - protected.GDT_SIZE
    state = protected.entry_state(memory, gdt, rip=image.entry, rax=LOADER_MAGIC, rbx=block.address)
    return dataclasses.replace(state, bios=True)


def _from_elf(data: bytes, subject: str) -> _Image:
    if not data.startswith(elf.MAGIC):
        raise UsageError(
            f"{subject}: has a Multiboot header, but neither is it ELF nor does the header say where it goes; "
            "link it as ELF, or give it the address fields (flag 16)"
        )
    image = elf.read_elf(data, subject)
    if image.machine not in ("EM_386", "EM_X86_64") or image.kind != "ET_EXEC" or not image.segments:
        raise UsageError(f"{subject}: has a Multiboot header, but is no x86 executable; link it as one")
    entry = image.physical_entry
    if not image.holds(entry):
        raise UsageError(f"{subject}: its entry point {image.entry:#x} is in no loaded segment; link it anew")
    return _Image(
        tuple(Piece(segment.paddr, segment.data) for segment in image.segments),
        tuple(Extent(segment.paddr, segment.paddr + segment.memsz) for segment in image.segments),
        entry,
    )


def _from_addresses(data: bytes, header: Header, subject: str) -> _Image:
    start = header.offset - (header.header_addr - header.load_addr)
    if header.load_addr > header.header_addr or start < 0:
        raise UsageError(f"{subject}: its Multiboot header's load_addr lies outside the file; build it anew")
    end = header.load_end_addr or header.load_addr + len(data) - start
    bss_end = header.bss_end_addr or end
    if not header.load_addr <= end <= bss_end:
        raise UsageError(f"{subject}: its Multiboot header's addresses are out of order; build it anew")
    size = end - header.load_addr
    if start + size > len(data):
        raise UsageError(f"{subject}: truncated: it has {len(data)} of {start + size} bytes; get it anew")
    if not header.load_addr <= header.entry_addr < end:
        raise UsageError(
            f"{subject}: its entry point {header.entry_addr:#x} is in nothing that is loaded; build it anew"
        )
    content = memoryview(data)[start : start + size]
    return _Image((Piece(header.load_addr, content),), (Extent(header.load_addr, bss_end),), header.entry_addr)


def _information(
    image: _Image,
    modules: Sequence[Module],
    command_line: bytes,
    behind: int,
    low_ram: int,
    high_ram: int,
    subject: str,
) -> Block:
    """Return the block that begins with the boot information and ends with room for a descriptor table."""
    memory_map = b"".join(
        _MAP_ENTRY.pack(_MAP_ENTRY.size - 4, *entry) for entry in layout.memory_map(low_ram, high_ram)
    )
    texts = [command_line, LOADER_NAME, *(module.text for module in modules)]
    size = _INFO.size + len(memory_map) + _MODULE.size * len(modules) + sum(len(text) + 8 for text in texts)
    size = placing.aligned(size + protected.GDT_SIZE + _SLACK)
    block = Block(placing.place_block(size, image.extents, behind, low_ram, subject), size)
    block.add(bytes(_INFO.size))
    map_at = block.add(memory_map)
    line_at, name_at, *text_at = (block.add(text) for text in texts)
    table = b"".join(
        _MODULE.pack(module.piece.address, module.end, at, 0) for module, at in zip(modules, text_at, strict=True)
    )
    table_at = block.add(table)
    flags = _INFO_MEMORY | _INFO_COMMAND_LINE | _INFO_MODULES | _INFO_MEMORY_MAP | _INFO_LOADER_NAME
    _INFO.pack_into(
        block.data,
        0,
        flags,
        layout.CONVENTIONAL_LIMIT // _KIB,
        (low_ram - layout.BIOS_LIMIT) // _KIB,
        0,  # boot device
        line_at,
        len(modules),
        table_at,
        *(0, 0, 0, 0),  # symbols
        len(memory_map),
        map_at,
        *(0, 0),  # drives
        0,  # configuration table
        name_at,
        *(0, 0, 0, 0, 0, 0, 0),  # APM, VBE
    )
    return block
