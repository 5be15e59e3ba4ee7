"""Multiboot images: where they go, what they are told, and why some cannot be loaded."""

import struct
from pathlib import Path

import pytest
from boot_images import Ram, make_elf, make_elf32, multiboot_header, note

from pyhyve.base.errors import UsageError
from pyhyve.bhyve import layout
from pyhyve.bhyve.boot.files import BootFiles, ModuleFile
from pyhyve.bhyve.boot.loader import load_kernel
from pyhyve.bhyve.boot.multiboot import LOADER_MAGIC, find_header
from pyhyve.bhyve.boot.state import BootState

RAM_SIZE = 32 * layout.MIB
BASE = 0x10_0000
CODE = b"\xf4" * 4096
XEN_PVH = 18


def load(ram: Ram, kernel: Path, **files: object) -> BootState:
    return load_kernel(ram, BootFiles(kernel, **files), len(ram.data), 0, rsdp=layout.RSDP)  # type: ignore[arg-type]


@pytest.fixture
def ram() -> Ram:
    return Ram(RAM_SIZE)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(make_elf32([(BASE, multiboot_header(3) + CODE, 0x3000)], BASE + 12))
    return path


def text(ram: Ram, address: int) -> str:
    end = ram.data.index(0, address)
    return ram.data[address:end].decode()


def test_image_is_entered_in_flat_32_bit_mode(ram: Ram, kernel: Path) -> None:
    state = load(ram, kernel)
    assert (state.rip, state.rax) == (BASE + 12, LOADER_MAGIC)
    assert (state.cr0 & 0x8000_0001, state.cr4, state.efer) == (1, 0, 0), "protection on, paging off"
    assert not state.rflags & 0x2_0200, "neither virtual-8086 mode nor interrupts"
    code, data = state.segments["cs"], state.segments["ds"]
    assert (code.base, code.limit, code.attr & 0x4F1F) == (0, 0xFFFF_FFFF, 0x401B)
    assert (data.base, data.limit, data.attr & 0x4F1F) == (0, 0xFFFF_FFFF, 0x4013)
    assert ram.read(state.gdt_base + code.selector, 8) == bytes.fromhex("ffff0000009bcf00")
    assert ram.read(BASE, len(CODE)) == (multiboot_header(3) + CODE)[: len(CODE)]


def test_information_has_memory_command_line_modules_map_and_name(ram: Ram, kernel: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1" * 5000)
    second.write_bytes(b"2" * 10)
    state = load(ram, kernel, initrd=first, append="-v all", modules=[ModuleFile(second, "a b")])
    fields = struct.unpack("<11I7I", ram.read(state.rbx, 72))
    flags, lower, upper, _, line, count, table = fields[:7]
    map_length, map_at, _, _, _, name, _ = fields[11:]
    assert flags == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (lower, upper) == (640, (RAM_SIZE >> 10) - 1024)
    assert text(ram, line) == f"{kernel} -v all"
    assert text(ram, name) == "pyhyve"
    modules = [struct.unpack("<IIII", ram.read(table + 16 * index, 16)) for index in range(count)]
    assert [ram.read(start, end - start) for start, end, _, _ in modules] == [b"1" * 5000, b"2" * 10]
    assert [text(ram, at) for _, _, at, _ in modules] == [str(first), f"{second} a b"]
    assert all(start % 4096 == 0 and start >= BASE + 0x3000 for start, *_ in modules)
    entries, at = [], map_at
    while at < map_at + map_length:
        size, *entry = struct.unpack("<IQQI", ram.read(at, 24))
        entries.append(tuple(entry))
        at += size + 4
    assert entries == [tuple(entry) for entry in layout.memory_map(RAM_SIZE, 0)]


def test_nothing_that_is_placed_overlaps(ram: Ram, kernel: Path, tmp_path: Path) -> None:
    module = tmp_path / "module"
    module.write_bytes(b"m" * 70_000)
    load(ram, kernel, modules=[ModuleFile(module)] * 3, append="x" * 9000)
    ends = 0
    for address, size in sorted(ram.writes):
        if size < 48 or address + size > ends:  # the descriptor table lies at the end of the block
            assert address >= ends
        ends = max(ends, address + size)


def test_image_in_low_memory_keeps_its_place(ram: Ram, tmp_path: Path) -> None:
    """Everything else has to go elsewhere then."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(make_elf32([(0x8000, multiboot_header() + CODE, 0x9_7000)], 0x8010))
    state = load(ram, kernel)
    assert state.rip == 0x8010
    assert state.rbx >= 0x9_F000


def test_image_that_is_no_elf_goes_where_its_header_says(ram: Ram, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    header = multiboot_header(1 << 16, BASE + 64, BASE, BASE + 256, BASE + 0x5000, BASE + 128)
    kernel.write_bytes(b"junk" * 4 + (b"\x90" * 64 + header).ljust(256, b"\x90") + b"not loaded")
    state = load(ram, kernel)
    assert state.rip == BASE + 128
    assert ram.read(BASE, 65) == b"\x90" * 64 + b"\x02"
    assert ram.read(BASE + 255, 2) == b"\x90\0"


def test_load_end_of_zero_means_the_whole_file(ram: Ram, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(multiboot_header(1 << 16, BASE, BASE, 0, 0, BASE + 32) + b"\x90" * 100)
    load(ram, kernel)
    assert ram.read(BASE + 131, 2) == b"\x90\0"


def test_64_bit_elf_is_entered_at_its_physical_address(ram: Ram, tmp_path: Path) -> None:
    """The same 32-bit entry: the image switches to long mode itself."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(make_elf([(BASE, multiboot_header() + CODE, 0x2000)], entry=0xFFFF_8000_0000_0000 + BASE + 16))
    assert load(ram, kernel).rip == BASE + 16


@pytest.mark.parametrize(
    "data",
    [
        bytes(8192) + multiboot_header(),
        b"x" + multiboot_header(),
        multiboot_header()[:8] + bytes(8),
        multiboot_header()[:8],
        b"",
    ],
    ids=["behind 8 KiB", "not aligned", "wrong checksum", "cut", "empty"],
)
def test_what_is_no_header(data: bytes) -> None:
    assert find_header(data) is None


def test_header_at_the_last_place() -> None:
    header = find_header(bytes(8180) + multiboot_header())
    assert header is not None
    assert header.offset == 8180


BAD = {
    "video mode": (make_elf32([(BASE, multiboot_header(4) + CODE, 0x2000)], BASE), "asks for a video mode"),
    "unknown flag": (make_elf32([(BASE, multiboot_header(0x80) + CODE, 0x2000)], BASE), "flags 0x80"),
    "no addresses": (multiboot_header() + CODE, "neither is it ELF nor does the header say where it goes"),
    "entry": (make_elf32([(BASE, multiboot_header() + CODE, 0x9000)], BASE + 0x8000), "entry point 0x108000"),
    "arm": (make_elf32([(BASE, multiboot_header() + CODE, 0x2000)], BASE, machine=40), "no x86 executable"),
    "damaged": (make_elf32([(BASE, multiboot_header() + CODE, 0x2000)], BASE)[:60].ljust(200) + multiboot_header(), ""),
    "too large": (make_elf32([(BASE, multiboot_header() + CODE, 1 << 30)], BASE), "give more (-m)"),
    "over video memory": (make_elf32([(0x9_0000, multiboot_header() + CODE, 0x2_0000)], 0x9_0010), "video memory"),
    "firmware tables": (make_elf32([(0xF_0000, multiboot_header() + CODE, 0x2000)], 0xF_0010), "firmware tables"),
    "load before file": (multiboot_header(1 << 16, BASE + 99, BASE, 0, 0, BASE) + CODE, "outside the file"),
    "header before load": (multiboot_header(1 << 16, BASE, BASE + 4, 0, 0, BASE) + CODE, "outside the file"),
    "bss before data": (multiboot_header(1 << 16, BASE, BASE, BASE + 64, BASE + 32, BASE) + CODE, "out of order"),
    "load end": (multiboot_header(1 << 16, BASE, BASE, BASE + 9999, 0, BASE) + CODE, "truncated"),
    "entry outside": (multiboot_header(1 << 16, BASE, BASE, 0, 0, BASE - 1) + CODE, "nothing that is loaded"),
}


@pytest.mark.parametrize(("data", "complaint"), BAD.values(), ids=BAD)
def test_bad_image_is_one_line_and_touches_nothing(ram: Ram, tmp_path: Path, data: bytes, complaint: str) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        load(ram, kernel)
    assert str(caught.value).startswith(f"kernel {kernel}: ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not ram.writes


def test_what_cannot_be_handed_over_is_one_line(ram: Ram, kernel: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"module /nowhere: no such file"):
        load(ram, kernel, modules=[ModuleFile(Path("/nowhere"))])
    with pytest.raises(UsageError, match="NUL character"):
        load(ram, kernel, append="a\0b")
    with pytest.raises(UsageError, match="no room is left"):
        load(ram, kernel, append="x" * RAM_SIZE)
    with pytest.raises(UsageError, match="cannot place itself at random"):
        load(ram, kernel, kaslr=True)
    assert not ram.writes


def test_multiboot_goes_before_pvh(ram: Ram, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    notes = note(b"Xen", XEN_PVH, struct.pack("<I", BASE + 32))
    kernel.write_bytes(make_elf32([(BASE, multiboot_header() + CODE, 0x2000)], BASE + 16, notes=notes))
    assert load(ram, kernel).rip == BASE + 16
