"""PVH kernels: their note, and what they are told."""

import struct
from pathlib import Path

import pytest
from boot_images import CODE, KERNEL_PADDR, Ram, make_elf, make_elf32, note

from pyhyve.base.errors import UsageError
from pyhyve.bhyve import layout
from pyhyve.bhyve.boot.files import BootFiles, ModuleFile
from pyhyve.bhyve.boot.loader import load_kernel
from pyhyve.bhyve.boot.pvh import START_MAGIC
from pyhyve.bhyve.boot.state import BootState

RAM_SIZE = 64 * layout.MIB
ENTRY = KERNEL_PADDR + 0x40
SEGMENT = (KERNEL_PADDR, CODE, 0x4000)


def pvh_note(entry: int = ENTRY, size: str = "I") -> bytes:
    return note(b"Xen", 6, b"other\0\0\0") + note(b"Xen", 18, struct.pack(f"<{size}", entry))


def load(ram: Ram, kernel: Path, **files: object) -> BootState:
    return load_kernel(ram, BootFiles(kernel, **files), RAM_SIZE, layout.GIB, rsdp=layout.RSDP)  # type: ignore[arg-type]


@pytest.fixture
def ram() -> Ram:
    return Ram(RAM_SIZE)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(make_elf([SEGMENT], notes=pvh_note()))
    return path


def text(ram: Ram, address: int) -> str:
    return ram.data[address : ram.data.index(0, address)].decode()


@pytest.mark.parametrize(
    "image", [make_elf([SEGMENT], notes=pvh_note(size="Q")), make_elf32([SEGMENT], 0, notes=pvh_note())]
)
def test_kernel_is_entered_at_its_notes_address_in_32_bit_mode(ram: Ram, tmp_path: Path, image: bytes) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(image)
    state = load(ram, kernel)
    assert state.rip == ENTRY
    assert (state.cr0 & 0x8000_0001, state.cr4, state.efer) == (1, 0, 0)
    assert state.segments["cs"].attr & 0x6000 == 0x4000, "32-bit code"
    assert ram.number(state.rbx, 4) == START_MAGIC


def test_start_info_has_command_line_modules_map_and_acpi(ram: Ram, kernel: Path, tmp_path: Path) -> None:
    initrd, extra = tmp_path / "initrd", tmp_path / "extra"
    initrd.write_bytes(b"i" * 5000)
    extra.write_bytes(b"e")
    state = load(ram, kernel, initrd=initrd, append="quiet", modules=[ModuleFile(extra, "what for")])
    magic, version, flags, count, table, line, rsdp, map_at, entries, _ = struct.unpack(
        "<IIIIQQQQII", ram.read(state.rbx, 56)
    )
    assert (magic, version, flags, rsdp) == (START_MAGIC, 1, 0, layout.RSDP)
    assert text(ram, line) == "quiet"
    modules = [struct.unpack("<QQQQ", ram.read(table + 32 * index, 32)) for index in range(count)]
    assert [ram.read(address, size) for address, size, _, _ in modules] == [b"i" * 5000, b"e"]
    assert [text(ram, at) for _, _, at, _ in modules] == ["", "what for"]
    found = [struct.unpack("<QQII", ram.read(map_at + 24 * index, 24)) for index in range(entries)]
    assert found == [(*entry, 0) for entry in layout.memory_map(RAM_SIZE, layout.GIB)]


def test_command_line_of_its_own_is_linuxs(ram: Ram, kernel: Path) -> None:
    state = load(ram, kernel)
    assert text(ram, ram.number(state.rbx + 24, 8)) == "console=ttyS0"


def test_entry_outside_the_kernel_is_one_line(ram: Ram, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(make_elf([SEGMENT], notes=pvh_note(0x10)))
    with pytest.raises(UsageError, match="its PVH entry point is in no loaded segment"):
        load(ram, kernel)
    assert not ram.writes


def test_other_notes_make_no_pvh_kernel(ram: Ram, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(make_elf([SEGMENT], notes=note(b"Zen", 18, struct.pack("<I", ENTRY))))
    state = load(ram, kernel)
    assert (state.rip, state.rsi) == (KERNEL_PADDR, layout.ZERO_PAGE)


def test_linux_takes_no_modules(ram: Ram, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(make_elf([SEGMENT]))
    with pytest.raises(UsageError, match=r"--module extra: this Linux kernel takes none; .* as --initrd"):
        load(ram, kernel, modules=[ModuleFile(Path("extra"))])
