"""The loader places kernels as the boot protocol asks, and says in one line why it cannot."""

import contextlib
import gzip
import os
import struct
from pathlib import Path

import pytest
from boot_images import CODE, KERNEL_PADDR, Ram, make_bzimage, make_elf, note
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyhyve.base.errors import UsageError
from pyhyve.bhyve import layout
from pyhyve.bhyve.boot.guestimage import GuestImage
from pyhyve.bhyve.boot.linux import BootState, load_linux

RAM_SIZE = 64 * layout.MIB
ZERO_PAGE = layout.ZERO_PAGE


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


@pytest.fixture
def bzimage(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(make_bzimage(packed(make_elf())))
    return path


@pytest.fixture
def ram() -> Ram:
    return Ram(RAM_SIZE)


def load(
    ram: Ram, kernel: Path, initrd: Path | None = None, cmdline: str = "console=ttyS0", *, kaslr: bool = False
) -> BootState:
    return load_linux(ram, kernel, initrd, cmdline, len(ram.data), 0, kaslr=kaslr, rsdp=layout.RSDP)


def e820(ram: Ram) -> list[tuple[int, int, int]]:
    count = ram.number(ZERO_PAGE + 0x1E8, 1)
    return [struct.unpack("<QQI", ram.read(ZERO_PAGE + 0x2D0 + 20 * index, 20)) for index in range(count)]


def test_packed_kernel_is_placed_at_its_physical_address_and_entered_there(ram: Ram, bzimage: Path) -> None:
    state = load(ram, bzimage)
    assert ram.read(KERNEL_PADDR, len(CODE)) == CODE
    assert state.rip == KERNEL_PADDR
    assert state.rsi == ZERO_PAGE


def test_kaslr_places_the_image_itself_and_enters_its_64bit_entry(ram: Ram, bzimage: Path) -> None:
    state = load(ram, bzimage, kaslr=True)
    protected = bzimage.read_bytes()[1024:]
    assert ram.read(KERNEL_PADDR, len(protected)) == protected
    assert state.rip == KERNEL_PADDR + 0x200


def test_vmlinux_needs_no_header_of_its_own(ram: Ram, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(make_elf([(0x100_0000, b"a" * 100, 200), (0x120_0000, CODE, 0x10000)], entry=0x120_0010))
    assert load(ram, kernel).rip == 0x120_0010
    assert ram.read(0x100_0000, 101) == b"a" * 100 + b"\0"
    assert ram.read(ZERO_PAGE + 0x202, 4) == b"HdrS"


def test_zero_page_carries_the_header_and_what_the_loader_fills_in(ram: Ram, bzimage: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"i" * 5000)
    load(ram, bzimage, initrd, "root=/dev/vda ro")
    header = bzimage.read_bytes()[0x1F1:0x26C]
    kept = [*range(0x1F1, 0x210), *range(0x22C, 0x26C)]
    assert [ram.data[ZERO_PAGE + offset] for offset in kept] == [header[offset - 0x1F1] for offset in kept]
    assert ram.number(ZERO_PAGE + 0x070, 8) == layout.RSDP
    assert ram.number(ZERO_PAGE + 0x1EF, 1) == 0, "the sentinel: a loader that knows boot_params clears it"
    assert ram.number(ZERO_PAGE + 0x210, 1) == 0xFF
    command_line = ram.number(ZERO_PAGE + 0x228, 4)
    assert ram.read(command_line, 17) == b"root=/dev/vda ro\0"
    assert e820(ram) == [tuple(entry) for entry in layout.memory_map(RAM_SIZE, 0)]


def test_high_ram_is_in_the_map(bzimage: Path) -> None:
    ram = Ram(RAM_SIZE)
    load_linux(ram, bzimage, None, "", RAM_SIZE, 5 * layout.GIB, rsdp=0)
    assert e820(ram)[-1] == (4 * layout.GIB, 5 * layout.GIB, layout.E820_RAM)


@pytest.mark.parametrize(("limit", "size"), [(0x7FFF_FFFF, 5000), (0x7FFF_FFFF, 4096), (0x2FF_FFFF, 70_000)])
def test_initrd_lies_as_high_as_kernel_and_ram_allow(ram: Ram, tmp_path: Path, limit: int, size: int) -> None:
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    kernel.write_bytes(make_bzimage(packed(make_elf()), initrd_addr_max=limit))
    content = os.urandom(size)
    initrd.write_bytes(content)
    load(ram, kernel, initrd)
    address = ram.number(ZERO_PAGE + 0x218, 4)
    top = min(limit + 1, RAM_SIZE)
    assert ram.number(ZERO_PAGE + 0x21C, 4) == size
    assert address % 4096 == 0
    assert top - 4096 < address + size <= top
    assert ram.read(address, size) == content


def test_large_files_are_written_in_pieces(ram: Ram, bzimage: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(5 << 20))
    load(ram, bzimage, initrd)
    assert max(size for _, size in ram.writes) <= layout.MIB


def test_entry_state_is_flat_64bit_code_with_interrupts_off(ram: Ram, bzimage: Path) -> None:
    state = load(ram, bzimage)
    assert state.cr0 & 0x8000_0001 == 0x8000_0001
    assert state.cr4 & 0x20
    assert state.efer == 0x500
    assert state.rflags == 2
    assert (state.cr3, state.gdt_base, state.gdt_limit) == (layout.BOOT_PAGE_TABLES, layout.BOOT_GDT, 0x2F)
    assert set(state.segments) == {"es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"}
    assert state.registers()["rip"] == state.rip


def test_debian_kernel_is_loaded_where_it_was_linked(guest_image: GuestImage) -> None:
    ram = Ram(256 * layout.MIB)
    state = load(ram, guest_image.kernel, guest_image.initramfs, "console=ttyS0 pyhyve.tour")
    assert state.rip == KERNEL_PADDR
    assert b"Linux version " in ram.data
    address, size = ram.number(ZERO_PAGE + 0x218, 4), ram.number(ZERO_PAGE + 0x21C, 4)
    assert ram.read(address, size) == guest_image.initramfs.read_bytes()


# --- What is wrong is said in one line, and nothing is written ---------------------------------------------------

LITTLE_RAM = Ram(17 * layout.MIB)
PROGRAM_NOTE = note(b"GNU", 1, bytes(16))

BAD_KERNELS = {
    "empty": (b"", "is empty"),
    "text": (b"#!/bin/sh\n" * 100, "not a Linux kernel; give a bzImage"),
    "zeros": (bytes(4096), "not a Linux kernel"),
    "short MZ": (b"MZ" + bytes(100), "truncated kernel"),
    "header cut": (make_bzimage(packed(make_elf()))[:0x230], "truncated: 560 bytes"),
    "body cut": (make_bzimage(packed(make_elf()))[:2000], r"truncated: it has 2000 of \d+ bytes"),
    "i386 bzImage": (make_bzimage(packed(make_elf()), xloadflags=0), r"a 32-bit \(i386\) kernel"),
    "old protocol": (make_bzimage(packed(make_elf()), version=0x020B), r"protocol is 2\.11; pyhyve needs 2\.12"),
    "payload outside": (make_bzimage(packed(make_elf()), payload_length=1 << 30), "outside the file"),
    "payload no ELF": (make_bzimage(packed(b"x" * 100)), "not an ELF kernel"),
    "payload unknown": (make_bzimage(b"unknown packer" * 10), "unknown method"),
    "arm64": (b"MZ" + bytes(0x36) + b"ARM\x64" + bytes(1000), "another architecture, arm64"),
    "riscv": (b"MZ" + bytes(0x36) + b"RSC\x05" + bytes(1000), "another architecture, RISC-V"),
    "zboot": (b"MZ\0\0zimg" + bytes(1000), "another architecture"),
    "gzip": (gzip.compress(b"x" * 1000), "packed by gzip"),
    "initramfs": (b"070701" + b"0" * 200, "did you mean --initrd"),
    "deb": (b"!<arch>\n" + bytes(100), "an archive or package"),
    "ELF i386": (make_elf(machine=3), "another architecture, 32-bit x86"),
    "ELF arm64": (make_elf(machine=183), "another architecture, arm64"),
    "ELF of an unknown machine": (make_elf(machine=0x7777), "another architecture, 30583"),
    "ELF program": (make_elf(notes=PROGRAM_NOTE), "an x86-64 program"),
    "ELF object": (make_elf(kind=1), "an x86-64 program or object file"),
    "ELF cut": (make_elf()[:500], r"truncated: it has 500 of \d+ bytes"),
    "ELF header cut": (make_elf()[:70], "truncated or damaged"),
    "ELF magic only": (b"\x7fELF", "truncated or damaged"),
    "ELF without code": (make_elf([]), "entry point 0x1000000 is in no loaded segment"),
    "ELF entry outside": (make_elf(entry=0x200_0000), "entry point 0x2000000"),
    "ELF too low": (make_elf([(0x8000, CODE, 0x1000)], entry=0x8000), "wants to be at 0x8000"),
    "ELF at 4 GiB": (make_elf([(1 << 32, CODE, 0x1000)], entry=1 << 32), "does not fit into 17 MiB"),
    "ELF too large": (
        make_elf([(KERNEL_PADDR, CODE, 32 << 20)]),
        r"it occupies 16 to 48 MiB; give at least 80 MiB \(-m\)",
    ),
}


@pytest.mark.parametrize("name", BAD_KERNELS)
def test_bad_kernel_is_one_line(name: str, tmp_path: Path) -> None:
    content, message = BAD_KERNELS[name]
    path = tmp_path / "kernel"
    path.write_bytes(content)
    LITTLE_RAM.writes.clear()
    with pytest.raises(UsageError, match=message) as caught:
        load(LITTLE_RAM, path)
    assert str(caught.value).startswith(f"kernel {path}: ")
    assert "\n" not in str(caught.value)
    assert not LITTLE_RAM.writes


def test_kernel_larger_than_a_tiny_memory_says_how_much_it_needs(bzimage: Path) -> None:
    for size in (0, 4096, 1 << 20, 16 << 20):
        with pytest.raises(UsageError, match=r"does not fit into \d+ MiB of memory.*give at least \d+ MiB \(-m\)$"):
            load(Ram(size), bzimage)


@pytest.mark.parametrize("what", ["kernel", "initrd"])
def test_file_that_cannot_be_read_is_one_line(what: str, tmp_path: Path, bzimage: Path, ram: Ram) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    for path, message in (
        (tmp_path / "missing", "no such file"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (tmp_path, "is a directory"),
        (tmp_path / "fifo", "is not a regular file"),
        (tmp_path / "empty", "is empty"),
        (bzimage / "below", "cannot be read"),
    ):
        with pytest.raises(UsageError, match=f"^{what} [^\n]*: {message}[^\n]*$"):
            load(ram, path if what == "kernel" else bzimage, path if what == "initrd" else None)


def test_file_without_permission_is_one_line(monkeypatch: pytest.MonkeyPatch, bzimage: Path, ram: Ram) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root, who may run this, is refused nothing
    with pytest.raises(UsageError, match="may not be read; check its permissions"):
        load(ram, bzimage)


def test_initrd_that_does_not_fit_is_one_line_and_not_read(bzimage: Path, tmp_path: Path, ram: Ram) -> None:
    initrd = tmp_path / "initrd"
    with initrd.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(UsageError, match=r"^initrd [^\n]*: is too large: 1048576 MiB; at most \d+ MiB fit"):
        load(ram, bzimage, initrd)
    assert not ram.writes


def test_initrd_never_overlaps_the_kernel(tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    kernel.write_bytes(make_bzimage(packed(make_elf([(KERNEL_PADDR, CODE, 0x5001)]))))
    end = KERNEL_PADDR + 0x5001
    ram = Ram(KERNEL_PADDR + 0x8000)
    for size in (0x1000, 0x2000, 0x2001, 0x2FFF, 0x3000, 0x4000):
        initrd.write_bytes(b"i" * size)
        if size <= 0x2000:
            load(ram, kernel, initrd)
            assert ram.number(ZERO_PAGE + 0x218, 4) >= end
        else:
            with pytest.raises(UsageError, match=r"^initrd "):
                load(ram, kernel, initrd)


@pytest.mark.parametrize(
    ("cmdline", "message"),
    [("x" * 2048, "2048 bytes; this kernel takes at most 2047"), ("a\0b", "NUL"), ("\ud800", "no encoding")],
)
def test_bad_command_line_is_one_line(cmdline: str, message: str, bzimage: Path, ram: Ram) -> None:
    with pytest.raises(UsageError, match=f"^kernel command line: .*{message}"):
        load(ram, bzimage, cmdline=cmdline)


def test_kaslr_of_a_vmlinux_is_refused(tmp_path: Path, ram: Ram) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(make_elf())
    with pytest.raises(UsageError, match="cannot place itself at random"):
        load(ram, kernel, kaslr=True)


@given(damage=st.lists(st.tuples(st.integers(0, 1023), st.integers(0, 255)), min_size=1, max_size=6), elf=st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_header_loads_or_is_a_usage_error(
    tmp_path: Path, damage: list[tuple[int, int]], elf: bool
) -> None:
    image = make_elf(notes=note(b"Linux", 257, bytes(4)))
    content = bytearray(image if elf else make_bzimage(packed(image)))
    for position, value in damage:
        content[position % (200 if elf else 1024)] = value
    path = tmp_path / "kernel"
    path.write_bytes(content)
    for kaslr in (False, True):
        with contextlib.suppress(UsageError):
            load(LITTLE_RAM, path, kaslr=kaslr)
