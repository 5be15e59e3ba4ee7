"""The Linux boot loader, by the 64-bit boot protocol.

A bzImage is unpacked here and its ELF kernel entered where it was linked to run, so that it needs no relocation and
the guest no decompressor; with `kaslr`, the bzImage's own decompressor runs in the guest and chooses the place.
Source: Linux Documentation/arch/x86/boot.rst, "64-bit BOOT PROTOCOL", and zero-page.rst.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.base.protocols import GuestMemory
from pyhyve.bhyve import layout
from pyhyve.bhyve.boot import bzimage, elf, longmode, payload
from pyhyve.bhyve.boot.files import read_file
from pyhyve.bhyve.boot.placing import KERNEL_FILE_MAX, Piece, encode_text, mib, write_piece
from pyhyve.bhyve.boot.state import BootState

__all__ = ["BootState", "load_linux"]

# Offsets in struct boot_params (zero-page.rst); the setup header has the same offsets in it as in a bzImage.
_ACPI_RSDP_ADDR: Final = 0x070
_E820_ENTRIES: Final = 0x1E8
_E820_TABLE: Final = 0x2D0
_E820_MAX: Final = 128
_TYPE_OF_LOADER: Final = 0x210
_RAMDISK_IMAGE: Final = 0x218
_RAMDISK_SIZE: Final = 0x21C
_CMD_LINE_PTR: Final = 0x228

_LOADER_UNDEFINED: Final = 0xFF
"""type_of_loader of a loader without an assigned number."""

# What a kernel without a setup header (vmlinux) is taken to be.
_PLAIN_PROTOCOL: Final = 0x020F
_PLAIN_INITRD_ADDR_MAX: Final = 0x7FFF_FFFF
_PLAIN_CMDLINE_SIZE: Final = 2047
_LOADED_HIGH: Final = 1

_FOREIGN: Final = (
    (0x38, b"ARM\x64", "for another architecture, arm64; pyhyve boots x86-64 kernels"),
    (0x38, b"RSC\x05", "for another architecture, RISC-V; pyhyve boots x86-64 kernels"),
    (0x04, b"zimg", "an EFI zboot image of another architecture; pyhyve boots x86-64 kernels"),
    (0x00, b"\x27\x05\x19\x56", "a U-Boot image, not a kernel by itself; give a bzImage or vmlinux"),
    (0x00, b"070701", "an initramfs (cpio), not a kernel; did you mean --initrd?"),
    (0x00, b"!<arch>\n", "an archive or package, not a kernel; unpack it and give its boot/vmlinuz-*"),
)


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A kernel of either format, ready to be placed; `start` to `end` is what it occupies when it begins to run."""

    pieces: tuple[Piece, ...]
    start: int
    end: int
    entry: int
    setup_header: bytes
    initrd_addr_max: int
    cmdline_size: int
    five_levels: bool = False
    """It is entered with as many levels of page tables as it is to use, and can use five."""


def load_linux(
    memory: GuestMemory,
    kernel: Path,
    initrd: Path | None,
    cmdline: str,
    low_ram: int,
    high_ram: int,
    *,
    kaslr: bool = False,
    la57: bool = False,
    rsdp: int,
    data: bytes | None = None,
) -> BootState:
    """Place a kernel with all it is handed into `memory`; return the state in which its first processor starts.

    `low_ram` and `high_ram` are bytes, as `layout.split_ram` gives them; RAM is taken to hold zeros. `rsdp` is the
    guest-physical address of the ACPI root pointer, 0 for none; `data` the kernel file's content where it has been
    read already. With `la57`, a kernel that uses five levels of page tables begins with them (where `kaslr` lets it
    unpack itself, it turns them on by itself). Nothing is written before everything is known to fit. Raises UsageError,
    one line, for whatever is wrong with the files, the command line or the memory's size.
    """
    image = _read_kernel(kernel, kaslr, data)
    command_line = _command_line(cmdline, image.cmdline_size)
    if image.start < layout.KERNEL_BASE:
        raise UsageError(
            f"kernel {kernel}: wants to be at {image.start:#x}; pyhyve loads kernels from {layout.KERNEL_BASE:#x} on"
        )
    if image.end > low_ram:
        raise UsageError(
            f"kernel {kernel}: does not fit into {mib(low_ram)} MiB of memory: it occupies {mib(image.start)} to "
            f"{mib(image.end)} MiB; give at least {mib(image.end) + 32} MiB (-m)"
        )
    ramdisk = _place_initrd(initrd, image, low_ram)

    for piece in (*image.pieces, *((ramdisk,) if ramdisk else ())):
        write_piece(memory, piece)
    memory.write(layout.COMMAND_LINE, command_line)
    memory.write(layout.ZERO_PAGE, _boot_params(image.setup_header, ramdisk, low_ram, high_ram, rsdp))
    five_levels = la57 and image.five_levels and "no5lvl" not in cmdline.split()
    gdt_limit = longmode.write_gdt(memory, layout.BOOT_GDT)
    return BootState(
        rip=image.entry,
        rsp=layout.BOOT_STACK_TOP,
        rsi=layout.ZERO_PAGE,
        rflags=longmode.RFLAGS,
        cr0=longmode.CR0,
        cr3=longmode.write_identity_map(memory, layout.BOOT_PAGE_TABLES, five_levels=five_levels),
        cr4=longmode.CR4 | (longmode.CR4_LA57 if five_levels else 0),
        efer=longmode.EFER,
        gdt_base=layout.BOOT_GDT,
        gdt_limit=gdt_limit,
        segments=longmode.SEGMENTS,
    )


def _read_kernel(path: Path, kaslr: bool, data: bytes | None) -> _Kernel:
    subject = f"kernel {path}"
    if data is None:
        data = read_file(path, "kernel", max_size=KERNEL_FILE_MAX)
    if data.startswith(elf.MAGIC):
        if kaslr:
            raise UsageError(f"{subject}: a vmlinux cannot place itself at random; give its bzImage, or no --kaslr")
        return _from_elf(data, subject, None)
    for offset, magic, fault in _FOREIGN:
        if data[offset : offset + len(magic)] == magic:
            raise UsageError(f"{subject}: {fault}")
    if not bzimage.is_bzimage(data):
        raise UsageError(f"{subject}: {_not_a_kernel(data)}")
    image = bzimage.parse_bzimage(data, subject)
    if kaslr:
        return _from_bzimage(image)
    unpacked = payload.unpack(image.payload, subject)
    if not unpacked.startswith(elf.MAGIC):
        raise UsageError(f"{subject}: what is packed in it is not an ELF kernel; --kaslr lets it unpack itself")
    return _from_elf(unpacked, subject, image)


def _not_a_kernel(data: bytes) -> str:
    packed = payload.compression(data)
    if packed is not None:
        return f"a file packed by {packed}, not a kernel; unpack it first"
    if data[:2] == b"MZ":
        return "an EFI program or a truncated kernel; give a bzImage or vmlinux"
    return "not a Linux kernel; give a bzImage (vmlinuz) or vmlinux"


def _from_elf(data: bytes, subject: str, image: bzimage.BzImage | None) -> _Kernel:
    kernel = elf.read_elf(data, subject)
    elf.check_kernel(kernel, subject)
    return _Kernel(
        pieces=tuple(Piece(segment.paddr, segment.data) for segment in kernel.segments),
        start=kernel.start,
        end=kernel.end,
        entry=kernel.entry,
        setup_header=image.setup_header if image else _plain_setup_header(),
        initrd_addr_max=image.initrd_addr_max if image else _PLAIN_INITRD_ADDR_MAX,
        cmdline_size=image.cmdline_size if image else _PLAIN_CMDLINE_SIZE,
        five_levels=image is not None and image.five_levels,
    )


def _from_bzimage(image: bzimage.BzImage) -> _Kernel:
    return _Kernel(
        pieces=(Piece(image.pref_address, image.protected),),
        start=image.pref_address,
        end=image.pref_address + max(image.init_size, image.protected_size),
        entry=image.pref_address + bzimage.ENTRY_64,
        setup_header=image.setup_header,
        initrd_addr_max=image.initrd_addr_max,
        cmdline_size=image.cmdline_size,
    )


def _plain_setup_header() -> bytes:
    header = bytearray(0x268 - bzimage.HEADER_START)

    def put(offset: int, layout_: str, value: int | bytes) -> None:
        struct.pack_into(layout_, header, offset - bzimage.HEADER_START, value)

    put(0x1FE, "<H", 0xAA55)
    put(0x202, "4s", b"HdrS")
    put(0x206, "<H", _PLAIN_PROTOCOL)
    put(0x211, "B", _LOADED_HIGH)
    put(0x22C, "<I", _PLAIN_INITRD_ADDR_MAX)
    put(0x236, "<H", bzimage.XLF_KERNEL_64)
    put(0x238, "<I", _PLAIN_CMDLINE_SIZE)
    return bytes(header)


def _command_line(text: str, limit: int) -> bytes:
    encoded = encode_text(text, "kernel command line")
    limit = min(limit, layout.COMMAND_LINE_LIMIT - layout.COMMAND_LINE - 1)
    if len(encoded) - 1 > limit:
        raise UsageError(
            f"kernel command line: {len(encoded) - 1} bytes; this kernel takes at most {limit}; shorten it"
        )
    return encoded


def _place_initrd(path: Path | None, image: _Kernel, low_ram: int) -> Piece | None:
    """As high as the kernel and the low RAM allow: out of the way of what the kernel allocates first."""
    if path is None:
        return None
    top = min(low_ram, image.initrd_addr_max + 1)
    room = top // layout.PAGE_SIZE * layout.PAGE_SIZE - image.end
    data = read_file(path, "initrd", max_size=max(room, 0))
    address = (top - len(data)) // layout.PAGE_SIZE * layout.PAGE_SIZE
    if address < image.end:
        raise UsageError(
            f"initrd {path}: does not fit: {len(data)} bytes into {room} beside the kernel; give more memory (-m)"
        )
    return Piece(address, data)


def _boot_params(setup_header: bytes, ramdisk: Piece | None, low_ram: int, high_ram: int, rsdp: int) -> bytes:
    params = bytearray(layout.PAGE_SIZE)
    params[bzimage.HEADER_START : bzimage.HEADER_START + len(setup_header)] = setup_header
    struct.pack_into("<Q", params, _ACPI_RSDP_ADDR, rsdp)
    params[_TYPE_OF_LOADER] = _LOADER_UNDEFINED
    struct.pack_into("<I", params, _CMD_LINE_PTR, layout.COMMAND_LINE)
    if ramdisk is not None:
        struct.pack_into("<I", params, _RAMDISK_IMAGE, ramdisk.address)
        struct.pack_into("<I", params, _RAMDISK_SIZE, len(ramdisk.data))
    ranges = layout.memory_map(low_ram, high_ram)[:_E820_MAX]
    params[_E820_ENTRIES] = len(ranges)
    for index, memory_range in enumerate(ranges):
        struct.pack_into("<QQI", params, _E820_TABLE + 20 * index, *memory_range)
    return bytes(params)
