"""Small kernels and memory for the loader's tests."""

import struct
from collections.abc import Sequence

KERNEL_PADDR = 0x100_0000
CODE = b"\x0f\x0b" * 512  # ud2: nobody runs it


class Ram:
    """Guest memory from address 0 that counts what is written."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.writes: list[tuple[int, int]] = []

    def read(self, gpa: int, length: int) -> bytes:
        if gpa < 0 or gpa + length > len(self.data):
            raise IndexError(f"{gpa:#x}")
        return bytes(self.data[gpa : gpa + length])

    def write(self, gpa: int, data: bytes) -> None:
        if gpa < 0 or gpa + len(data) > len(self.data):
            raise IndexError(f"{gpa:#x}")
        self.writes.append((gpa, len(data)))
        self.data[gpa : gpa + len(data)] = data

    def number(self, gpa: int, size: int) -> int:
        return int.from_bytes(self.read(gpa, size), "little")


def note(name: bytes, kind: int, description: bytes) -> bytes:
    return (
        struct.pack("<III", len(name) + 1, len(description), kind)
        + (name + b"\0").ljust(-(-(len(name) + 1) // 4) * 4, b"\0")
        + description
    )


def make_elf(
    segments: Sequence[tuple[int, bytes, int]] = ((KERNEL_PADDR, CODE, 0x4000),),
    entry: int = KERNEL_PADDR,
    *,
    machine: int = 62,
    kind: int = 2,
    notes: bytes = b"",
) -> bytes:
    """An ELF64 file of (paddr, data, memsz) segments."""
    count = len(segments) + bool(notes)
    offset = 64 + 56 * count
    headers, body = b"", b""
    for paddr, data, memsz in segments:
        headers += struct.pack(
            "<IIQQQQQQ", 1, 5, offset + len(body), 0xFFFF_8000_0000_0000 + paddr, paddr, len(data), memsz, 0x1000
        )
        body += data
    if notes:
        headers += struct.pack("<IIQQQQQQ", 4, 4, offset + len(body), 0, 0, len(notes), len(notes), 4)
        body += notes
    ident = b"\x7fELF" + bytes((2, 1, 1, 0)) + bytes(8)
    header = ident + struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, entry, 64, 0, 0, 64, 56, count, 0, 0, 0)
    return header + headers + body


def make_elf32(
    segments: Sequence[tuple[int, bytes, int]], entry: int, *, machine: int = 3, notes: bytes = b""
) -> bytes:
    """An ELF32 file of (paddr, data, memsz) segments, linked to run where they are loaded."""
    count = len(segments) + bool(notes)
    offset = 52 + 32 * count
    headers, body = b"", b""
    for paddr, data, memsz in segments:
        headers += struct.pack("<8I", 1, offset + len(body), paddr, paddr, len(data), memsz, 7, 4)
        body += data
    if notes:
        headers += struct.pack("<8I", 4, offset + len(body), 0, 0, len(notes), len(notes), 4, 4)
        body += notes
    ident = b"\x7fELF" + bytes((1, 1, 1, 0)) + bytes(8)
    header = ident + struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, entry, 52, 0, 0, 52, 32, count, 0, 0, 0)
    return header + headers + body


def multiboot_header(flags: int = 0, *addresses: int) -> bytes:
    """A Multiboot header; `addresses` are its own, load, load end, bss end and entry."""
    checksum = -(0x1BADB002 + flags) & 0xFFFF_FFFF
    return struct.pack(f"<{3 + len(addresses)}I", 0x1BADB002, flags, checksum, *addresses)


def make_bzimage(
    payload: bytes,
    *,
    version: int = 0x020F,
    xloadflags: int = 1,
    pref_address: int = KERNEL_PADDR,
    init_size: int = 0x10_0000,
    cmdline_size: int = 2047,
    initrd_addr_max: int = 0x7FFF_FFFF,
    payload_length: int | None = None,
) -> bytes:
    """A bzImage with `payload` at offset 0x400 of its protected-mode part."""
    setup = bytearray(1024)
    protected = bytearray(0x400) + payload
    protected += bytes(-len(protected) % 16)
    setup[0:2] = b"MZ"
    for offset, form, value in (
        (0x1F1, "B", 1),
        (0x1F4, "I", len(protected) // 16),
        (0x1FE, "H", 0xAA55),
        (0x200, "H", 0x6AEB),
        (0x206, "H", version),
        (0x211, "B", 1),
        (0x22C, "I", initrd_addr_max),
        (0x230, "I", 0x20_0000),
        (0x234, "B", 1),
        (0x236, "H", xloadflags),
        (0x238, "I", cmdline_size),
        (0x248, "I", 0x400),
        (0x24C, "I", len(payload) if payload_length is None else payload_length),
        (0x258, "Q", pref_address),
        (0x260, "I", init_size),
    ):
        struct.pack_into(f"<{form}", setup, offset, value)
    setup[0x202:0x206] = b"HdrS"
    return bytes(setup + protected)
