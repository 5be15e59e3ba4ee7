"""Kernels of the tests' own, entered by Multiboot and PVH, and the devices that such kernels use."""

import struct
from pathlib import Path

import pytest
from asm import MISSING, assemble
from boot_images import make_elf, make_elf32, multiboot_header, note
from commandline import CommandLine

import pyhyve

pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

BASE = 0x10_0000
ENTRY = BASE + 16
PAGE = 0x20_0000
EXIT = "mov dx, 0xf4\nout dx, eax\n9: jmp 9b\n"

PRINT = """
# Prints the NUL-terminated text at esi, and a space.
text:
    mov dx, 0x3f8
1:  lodsb
    test al, al
    jz 2f
    out dx, al
    jmp 1b
2:  mov al, 32
    out dx, al
    ret
"""


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def multiboot(source: str, directory: Path) -> Path:
    """Write a Multiboot kernel of 32-bit code; `source` may call `text`."""
    code = assemble(f"mov esp, 0x300000\njmp main\n{PRINT}\nmain:\n{source}", ENTRY, bits=32)
    path = directory / "kernel"
    path.write_bytes(make_elf32([(BASE, multiboot_header(3).ljust(16, b"\0") + code, 0x4000)], ENTRY))
    return path


def run(path: Path, **options: object) -> tuple[pyhyve.Outcome, str]:
    options = {"lpc": ["pc-testdev", "fwcfg,qemu"], "memory": "32M", "processor": "bt", **options}
    with pyhyve.Machine(path, **options) as machine:  # type: ignore[arg-type]
        outcome = machine.run(20)
        return outcome, machine.console.output


def test_multiboot_kernel_reads_what_it_is_told_and_chooses_the_exit_status(tmp_path: Path) -> None:
    module = tmp_path / "module"
    module.write_bytes(b"contents\0")
    kernel = multiboot(
        f"""
        cmp eax, 0x2badb002
        jne bad
        mov esi, [ebx + 16]
        call text
        cmp dword ptr [ebx + 20], 1
        jne bad
        mov edi, [ebx + 24]
        mov esi, [edi + 8]
        call text
        mov esi, [edi]
        call text
        mov esi, [ebx + 64]
        call text
        mov eax, 5
        {EXIT}
        bad: mov eax, 6
        {EXIT}
        """,
        tmp_path,
    )
    outcome, output = run(kernel, append="one two", modules=[f"{module} three"])
    assert output.split() == [str(kernel), "one", "two", str(module), "three", "contents", "pyhyve"]
    assert outcome.kind is pyhyve.OutcomeKind.EXITED
    assert (outcome.value, outcome.exit_status) == (5, 11)


def test_pvh_kernel_switches_to_64_bit_mode_itself(tmp_path: Path) -> None:
    """ELF64 with a note; the code makes its own page tables."""
    code = assemble(
        f"""
        cmp dword ptr [ebx], 0x336ec578
        jne bad
        mov esi, [ebx + 24]         # the command line
        mov dword ptr [{PAGE}], {PAGE + 0x1003}
        mov dword ptr [{PAGE + 0x1000}], 0x83       # 1 GiB
        mov eax, cr4
        or eax, 0x20
        mov cr4, eax
        mov eax, {PAGE}
        mov cr3, eax
        mov ecx, 0xc0000080
        rdmsr
        or eax, 0x100
        wrmsr
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        lgdt [gdtr]
        .byte 0xea
        .long long_mode
        .word 8
        bad: mov eax, 1
        {EXIT}
        gdt: .quad 0, 0x00af9b000000ffff
        gdtr: .word 15
        .long gdt
        .code64
        long_mode:
        mov edi, esi
        shl rdi, 32
        shr rdi, 32
        cmp dword ptr [rdi], 0x706c6568             # "help"
        mov eax, 0x21
        je 9f
        mov eax, 2
        9: mov dx, 0x501
        out dx, al
        1: jmp 1b
        """,
        ENTRY,
        bits=32,
    )
    path = tmp_path / "kernel"
    notes = note(b"Xen", 18, struct.pack("<Q", ENTRY))
    path.write_bytes(make_elf([(BASE, bytes(16) + code, 0x2000)], entry=0, notes=notes))
    outcome, _ = run(path, append="help", lpc=["isa-debug-exit"])
    assert (outcome.kind, outcome.value) == (pyhyve.OutcomeKind.EXITED, 0x21)


def test_firmware_configuration_by_port_and_by_dma(tmp_path: Path) -> None:
    """The third file of the directory is the user's: etc/e820, opt/first, opt/text."""
    kernel = multiboot(
        f"""
        mov dx, 0x510
        xor eax, eax
        out dx, ax
        mov ecx, 4
        mov dx, 0x511
        mov edi, {PAGE}
        rep insb
        mov byte ptr [edi], 0
        mov esi, {PAGE}
        call text
        mov dword ptr [{PAGE}], 0x0a002200          # big-endian: item 0x22, select and read
        mov dword ptr [{PAGE} + 4], 0x14000000      # 20 bytes
        mov dword ptr [{PAGE} + 8], 0
        mov dword ptr [{PAGE} + 12], 0x00102000     # to 0x201000
        mov dx, 0x518
        mov eax, 0x00002000                         # the request is at 0x200000
        out dx, eax
        mov esi, {PAGE + 0x1000}
        call text
        mov eax, [{PAGE}]
        {EXIT}
        """,
        tmp_path,
    )
    outcome, output = run(kernel, fwcfg={"opt/first": b"1", "opt/text": "from-outside"})
    assert output.split() == ["QEMU", "from-outside"]
    assert outcome.value == 0


def test_interrupt_lines_of_the_test_device_reach_the_io_apic(tmp_path: Path) -> None:
    """Line 20 is pin 20; the local APIC's IRR then has its vector."""
    kernel = multiboot(
        f"""
        mov dword ptr [0xfee000f0], 0x1ff           # local APIC on
        mov dword ptr [0xfec00000], 0x38            # pin 20, low half
        mov dword ptr [0xfec00010], 0x2041          # edge, active low, vector 0x41
        mov dword ptr [0xfec00000], 0x39
        mov dword ptr [0xfec00010], 0
        mov dx, 0x2014
        mov al, 1
        out dx, al
        mov eax, [0xfee00220]                       # IRR, vectors 0x40 to 0x5f
        {EXIT}
        """,
        tmp_path,
    )
    outcome, _ = run(kernel)
    assert outcome.value == 2


def test_test_devices_memory_and_registers_keep_what_is_written(tmp_path: Path) -> None:
    kernel = multiboot(
        f"""
        mov dword ptr [0xff000010], 0x11223344
        mov eax, [0xff000012]
        mov dx, 0xe1
        out dx, al
        in eax, 0xe0
        {EXIT}
        """,
        tmp_path,
    )
    assert run(kernel)[0].value == 0x2200


def test_exit_status_is_that_of_the_process(command: CommandLine, tmp_path: Path) -> None:
    kernel = multiboot(f"mov eax, 0x31\n{EXIT}", tmp_path)
    ended = command.run("run", "--kernel", kernel, "-m", "32M", "-l", "isa-debug-exit,iobase=0xf4,iosize=4", "--json")
    assert ended.status == 0x63
    assert '"outcome": "exited"' in ended.stdout
    assert '"value": 49' in ended.stdout


def test_devices_that_cannot_be_are_one_line(command: CommandLine, tmp_path: Path) -> None:
    kernel = multiboot(EXIT, tmp_path)
    for options, complaint in (
        (["-l", "isa-debug-exit,iobase=0x3f8"], "-l isa-debug-exit: port 0x3f8 is already taken; "),
        (["-l", "pc-testdev", "-l", "pc-testdev"], "-l pc-testdev: port 0xe0 is already taken; "),
        (["-l", "nothing"], "-l nothing: no such device; there are "),
        (["-f", "opt/x,string=y"], "-f opt/x: there is no firmware configuration; add -l fwcfg,qemu"),
        (
            ["-l", "fwcfg,qemu", "-f", "opt/x,string=", "-f", "opt/x,string="],
            "-f opt/x: there is such a file already; ",
        ),
        (["--module", "/nowhere arguments"], "module /nowhere: no such file; "),
    ):
        ended = command.run("run", "--kernel", kernel, *options)
        assert ended.status == 2
        assert ended.complaint.startswith(complaint)


def test_list_of_devices(command: CommandLine) -> None:
    ended = command.run("run", "-l", "help")
    assert ended.status == 0
    assert "isa-debug-exit" in ended.stdout


def test_a_vector_instruction_may_have_a_device_as_its_operand(tmp_path: Path) -> None:
    kernel = multiboot(
        f"""
        mov eax, cr4
        or eax, 0x200
        mov cr4, eax
        mov dword ptr [0xff000ff8], 0x04030201
        mov dword ptr [0xff000ffc], 0x08070605
        mov dword ptr [0xff001000], 0x0c0b0a09
        movups xmm0, [0xff000ff9]                   # over the end of a page
        paddb xmm0, xmm0
        movups [0xff002003], xmm0
        fild dword ptr [0xff002003]
        fistp dword ptr [0xff003000]
        mov eax, [0xff003000]
        {EXIT}
        """,
        tmp_path,
    )
    assert run(kernel)[0].value == 0x0A080604


def test_fault_of_such_an_instruction_is_the_guests(tmp_path: Path) -> None:
    """MOVAPS wants its operand aligned: #GP, by a gate that leads to `handler`."""
    kernel = multiboot(
        f"""
        mov eax, cr4
        or eax, 0x200
        mov cr4, eax
        sgdt [{PAGE}]
        lea eax, handler
        mov word ptr [{PAGE + 0x1000 + 13 * 8}], ax
        mov word ptr [{PAGE + 0x1002 + 13 * 8}], cs
        mov word ptr [{PAGE + 0x1004 + 13 * 8}], 0x8e00
        shr eax, 16
        mov word ptr [{PAGE + 0x1006 + 13 * 8}], ax
        mov word ptr [{PAGE}], 0x7ff
        mov dword ptr [{PAGE + 2}], {PAGE + 0x1000}
        lidt [{PAGE}]
        at: movaps [0xff000008], xmm0
        mov eax, 1
        {EXIT}
        handler:
        mov eax, [esp + 4]
        sub eax, offset at
        add eax, 0x10
        {EXIT}
        """,
        tmp_path,
    )
    assert run(kernel)[0].value == 0x10


def test_multiboot_kernel_finds_a_ticking_timer(tmp_path: Path) -> None:
    """As a PC's BIOS leaves it: in real mode, the timer's interrupt counts at 0x46C."""
    kernel = multiboot(
        """
        mov word ptr [0x7000], 0x3ff
        mov dword ptr [0x7002], 0
        lidt [0x7000]
        mov esi, offset real
        mov edi, 0x7c00
        mov ecx, 256
        rep movsb
        mov eax, offset gdt
        mov [0x7012], eax
        mov word ptr [0x7010], 23
        lgdt [0x7010]
        .byte 0xea
        .long 0x7c00
        .word 8
        gdt: .quad 0, 0x00009b000000ffff, 0x000093000000ffff
        .code16
        real:
        mov ax, 16
        mov ds, ax
        mov ss, ax
        mov es, ax
        mov eax, cr0
        and al, 0xfe
        mov cr0, eax
        .byte 0xea
        .word 0x7c20, 0
        .org real + 0x20, 0x90
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x7000
        sti
        1: hlt
        mov eax, [0x46c]
        cmp eax, 2
        jb 1b
        mov dx, 0xf4
        out dx, eax
        """,
        tmp_path,
    )
    assert run(kernel)[0].value == 2
