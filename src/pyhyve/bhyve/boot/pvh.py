"""The PVH loader: ELF kernels with a 32-bit entry point that a Xen note names, and no need of Xen.

Source: Xen docs/misc/pvh.pandoc, "x86/HVM direct boot ABI"; xen/include/public/arch-x86/hvm/start_info.h.
"""

import struct
from collections.abc import Sequence
from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.base.protocols import GuestMemory
from pyhyve.bhyve import layout
from pyhyve.bhyve.boot import elf, placing, protected
from pyhyve.bhyve.boot.files import ModuleFile
from pyhyve.bhyve.boot.placing import Block, Extent, Module, Piece
from pyhyve.bhyve.boot.state import BootState

START_MAGIC: Final = 0x336E_C578
_VERSION: Final = 1
_START_INFO: Final = struct.Struct("<IIIIQQQQII")
_MODULE: Final = struct.Struct("<QQQQ")
_MAP_ENTRY: Final = struct.Struct("<QQII")
_SLACK: Final = 64
"""What the alignment of the block's parts may cost."""


def load_pvh(
    memory: GuestMemory,
    image: elf.ElfImage,
    subject: str,
    cmdline: str,
    modules: Sequence[ModuleFile],
    low_ram: int,
    high_ram: int,
    *,
    rsdp: int,
) -> BootState:
    """Place a kernel that has a `pvh_entry`, with all it is handed; return the state in which it is entered.

    Nothing is written before everything is known to fit. UsageError, one line, for what cannot be.
    """
    entry = image.pvh_entry
    if entry is None or not image.holds(entry):
        raise UsageError(f"{subject}: its PVH entry point is in no loaded segment; get it anew")
    extents = tuple(Extent(segment.paddr, segment.paddr + segment.memsz) for segment in image.segments)
    placing.check_extents(extents, subject, low_ram)
    placed = placing.place_modules(modules, image.end, low_ram)
    behind = max([image.end, *(module.end for module in placed)])
    command_line = placing.encode_text(cmdline, "kernel command line")
    block = _start_info(extents, placed, command_line, behind, low_ram, high_ram, rsdp, subject)

    kernel = (Piece(segment.paddr, segment.data) for segment in image.segments)
    for piece in (*kernel, *(module.piece for module in placed), Piece(block.address, bytes(block.data))):
        placing.write_piece(memory, piece)
    gdt = block.address + len(block.data) - protected.GDT_SIZE
    return protected.entry_state(memory, gdt, rip=entry, rbx=block.address)


def _start_info(
    extents: Sequence[Extent],
    modules: Sequence[Module],
    command_line: bytes,
    behind: int,
    low_ram: int,
    high_ram: int,
    rsdp: int,
    subject: str,
) -> Block:
    """Return the block that begins with struct hvm_start_info and ends with room for a descriptor table."""
    ranges = layout.memory_map(low_ram, high_ram)
    memory_map = b"".join(_MAP_ENTRY.pack(*entry, 0) for entry in ranges)
    texts = [command_line, *(module.text for module in modules)]
    size = _START_INFO.size + len(memory_map) + _MODULE.size * len(modules) + sum(len(text) + 8 for text in texts)
    size = placing.aligned(size + protected.GDT_SIZE + _SLACK)
    block = Block(placing.place_block(size, extents, behind, low_ram, subject), size)
    block.add(bytes(_START_INFO.size))
    map_at = block.add(memory_map)
    line_at, *text_at = (block.add(text) for text in texts)
    table = b"".join(
        _MODULE.pack(module.piece.address, len(module.piece.data), at, 0)
        for module, at in zip(modules, text_at, strict=True)
    )
    table_at = block.add(table) if modules else 0
    _START_INFO.pack_into(
        block.data, 0, START_MAGIC, _VERSION, 0, len(modules), table_at, line_at, rsdp, map_at, len(ranges), 0
    )
    return block
