"""Real mode, 16-bit and 32-bit protected mode, compatibility mode, and the ways between them, on every processor."""

import struct
from collections.abc import Callable

import pytest
from asm import assemble
from harness import (
    CF,
    CODE,
    CODE16,
    CODE16_SEL,
    DATA,
    DATA16_SEL,
    GDT,
    IF,
    KCODE32,
    KCODE64,
    KDATA,
    KERNEL_STACK,
    PML4,
    STACK,
    STACK16,
    UCODE32,
    UDATA,
    Fault,
    Machine,
    Mode,
    Outcome,
    paravirtual,
    run_asm,
)

from pyhyve.cpu.processor import Segment


def done(outcome: Outcome) -> Outcome:
    assert outcome.exit == "done", f"{outcome.exit} {outcome.fault} {outcome.message} rip {outcome['rip']:#x}"
    return outcome


def faulted(outcome: Outcome, vector: int, error: int = 0) -> Fault:
    assert outcome.fault is not None, f"{outcome.exit} {outcome.message} rip {outcome['rip']:#x}"
    assert (outcome.fault.vector, outcome.fault.error) == (vector, error), outcome.fault
    return outcome.fault


def real(
    engine: str, source: str, regs: dict[str, int] | None = None, memory: dict[int, bytes] | None = None
) -> Outcome:
    return run_asm(engine, source, regs, memory, mode="real16")


def flat(
    engine: str,
    source: str,
    regs: dict[str, int] | None = None,
    memory: dict[int, bytes] | None = None,
    cpl: int = 0,
    setup: Callable[[Machine], None] | None = None,
    paging: bool = False,
) -> Outcome:
    return run_asm(engine, source, regs, memory, mode="prot32", cpl=cpl, setup=setup, paging=paging)


# -- real mode --------------------------------------------------------------------------------------------------------


def test_real_mode_arithmetic_is_16_bit_by_default(engine: str) -> None:
    out = done(real(engine, "mov ax, 0xffff; add ax, 1; setc bl; mov ecx, 0xffffffff; inc cx; mov edx, 5; dec dx"))
    assert (out["rax"], out["rbx"], out["rcx"], out["rdx"]) == (0, 1, 0xFFFF_0000, 4)


@pytest.mark.parametrize(
    ("operand", "address"),
    [
        ("[bx+si]", 0x2000 + 0x30), ("[bx+di+5]", 0x2000 + 0x40 + 5), ("[bp+si+0x100]", 0x3000 + 0x30 + 0x100),
        ("[bp+di]", 0x3000 + 0x40), ("[si]", 0x30), ("[di-1]", 0x3F), ("[bp]", 0x3000), ("[bx+0x1234]", 0x3234),
        ("ds:[0x2468]", 0x2468), ("[ebx+esi*4+3]", 0x2000 + 0xC0 + 3), ("[ebp+8]", 0x3008),
    ],
)  # fmt: skip
def test_16_bit_addressing(engine: str, operand: str, address: int) -> None:
    """With DS at 10000H and SS at 20000H, to tell the default segments apart."""
    base = 0x2_0000 if "bp" in operand else 0x1_0000
    source = f"mov ax, 0x1000; mov ds, ax; mov ax, 0x2000; mov ss, ax; mov ax, {operand}; mov byte ptr {operand}, 0x99"
    out = done(
        real(engine, source, {"rbx": 0x2000, "rsi": 0x30, "rdi": 0x40, "rbp": 0x3000}, {base + address: b"\x34\x12"})
    )
    assert out["rax"] == 0x1234
    assert out.memory[base + address] == b"\x99\x12"


def test_16_bit_addresses_wrap_and_segments_override(engine: str) -> None:
    out = done(
        real(
            engine,
            "mov ax, 0x4000; mov es, ax; mov fs, ax; mov bx, 0xfff0; mov si, 0x20;"
            "mov al, es:[bx+si]; mov ah, fs:[0x11];"
            "mov cl, cs:[1f]; jmp 2f; 1: .byte 0x77; 2: mov dl, gs:[bx+si]",
            memory={0x4_0010: b"\x55\x66", 0x10: b"\x88"},
        )
    )
    assert (out["rax"], out["rcx"], out["rdx"]) == (0x6655, 0x77, 0x88)


def test_real_mode_stack_wraps_and_pusha_keeps_sp(engine: str) -> None:
    out = done(real(engine, "mov sp, 0x6000; mov ax, 1; mov cx, 2; pusha; mov bp, sp; mov dx, [bp+6];"
                            "mov bx, [bp+14]; popa;"
                            "push 0x1234; pop si; pushf; pop di; push eax; mov bp, sp"))  # fmt: skip
    assert (out["rax"], out["rcx"], out["rsi"], out["rbp"]) == (1, 2, 0x1234, 0x5FFC)


def test_real_mode_calls_near_and_far(engine: str) -> None:
    out = done(
        real(
            engine,
            """
            call near_one
            push cs; call far_one
            .byte 0x9a; .word far_one, 0
            mov bx, offset pointer; call dword ptr [bx]
            jmp over
            near_one: inc ax; ret
            far_one: inc cx; retf
            pointer: .word far_one, 0
            over:
            """,
        )
    )
    assert (out["rax"], out["rcx"], out["rsp"]) == (1, 3, STACK16)


def test_real_mode_interrupts_go_through_the_vector_table(engine: str) -> None:
    def setup(machine: Machine) -> None:
        machine.write(0x9000, assemble("inc bx; mov bp, sp; mov cx, [bp+4]; iret", 0x9000, 16))
        machine.write(0x21 * 4, struct.pack("<HH", 0x8000, 0x100))

    out = done(run_asm(engine, "stc; sti; nop; int 0x21; setc dl; pushf; pop ax", mode="real16", setup=setup))
    assert (out["rbx"], out["rdx"], out["rsp"]) == (1, 1, STACK16)
    assert out["rcx"] & (IF | CF) == IF | CF
    assert out["rax"] & IF


def test_real_mode_exceptions(engine: str) -> None:
    assert faulted(real(engine, "nop; xor cx, cx; div cx"), 0).rip == CODE16 + 3
    assert faulted(real(engine, "nop; ud2"), 6).rip == CODE16 + 1
    assert faulted(real(engine, "mov al, 0x7f; inc al; into"), 4).rip == CODE16 + 5
    assert faulted(real(engine, "int3"), 3).rip == CODE16 + 1


def test_a_word_at_the_end_of_a_real_mode_segment_is_protected(engine: str) -> None:
    faulted(real(engine, "mov bx, 0xffff; mov ax, [bx]"), 13)


def test_real_mode_strings_use_si_and_di(engine: str) -> None:
    regs = {"rsi": 0xFFFF_4000, "rdi": 0xFFFF_5000, "rcx": 0xFFFF_0004}
    out = done(real(engine, "cld; rep movsw", regs, {0x4000: b"abcdefgh", 0x5000: bytes(10)}))
    assert out.memory[0x5000] == b"abcdefgh\0\0"
    assert (out["rsi"], out["rdi"], out["rcx"]) == (0xFFFF_4008, 0xFFFF_5008, 0xFFFF_0000)


def test_les_lds_and_segment_moves(engine: str) -> None:
    source = "les bx, [0x4000]; mov ax, es; lfs si, [0x4004]; mov cx, fs;mov dx, es:[bx]; push es; pop ds; mov di, [bx]"
    memory = {0x4000: struct.pack("<4H", 0x10, 0x3000, 0x20, 0x1111), 0x3_0010: b"\xcd\xab"}
    out = done(real(engine, source, memory=memory))
    assert [out[name] for name in ("rbx", "rax", "rsi", "rcx", "rdx", "rdi")] == [
        0x10,
        0x3000,
        0x20,
        0x1111,
        0xABCD,
        0xABCD,
    ]


@pytest.mark.parametrize(
    ("source", "ax", "flags"),
    [
        ("mov al, 0x79; add al, 0x35; daa", 0x14, CF),
        ("mov al, 0x35; sub al, 0x47; das", 0x88, CF),
        ("mov ax, 0x0205; add al, 9; aaa", 0x0304, CF),
        ("mov ax, 0x0205; sub al, 6; aas", 0x0109, CF),
        ("mov al, 63; aam", 0x0603, 0),
        ("mov ax, 0x0603; aad", 63, 0),
    ],
)
def test_decimal_adjustment(whole: str, source: str, ax: int, flags: int) -> None:
    out = done(real(whole, source))
    assert (out["rax"], out.flags & CF) == (ax, flags)


# -- 32-bit protected mode --------------------------------------------------------------------------------------------


def test_32_bit_arithmetic_and_one_byte_inc(engine: str) -> None:
    out = done(
        flat(
            engine,
            "mov eax, 0xffffffff; .byte 0x40; setz bl; .byte 0x4a; add ecx, [ebx+0x3ffff]",
            memory={DATA: b"\x07\0\0\0"},
        )
    )
    assert (out["rax"], out["rbx"], out["rdx"], out["rcx"]) == (0, 1, 0xFFFF_FFFF, 7)


@pytest.mark.parametrize("cpl", [0, 3])
def test_pusha_popa_push_of_segments(engine: str, cpl: int) -> None:
    source = (
        "mov eax, 1; mov edi, 8; pusha; mov ebx, [esp+12]; mov ecx, [esp]; add dword ptr [esp+28], 5; popa;"
        "push ds; pop edx; push es; pop es"
    )
    out = done(flat(engine, source, cpl=cpl))
    assert (out["rax"], out["rsp"], out["rdx"] & 0xFFFF) == (6, STACK, UDATA if cpl else KDATA)


@pytest.mark.parametrize("cpl", [0, 3])
def test_calls_loops_and_strings_in_32_bit_mode(engine: str, cpl: int) -> None:
    source = f"""
        mov ecx, 5; 1: add eax, ecx; loop 1b
        call 2f; jmp 3f; 2: inc eax; ret 0; 3:
        mov esi, {DATA}; mov edi, {DATA + 16}; mov ecx, 4; rep movsd
        mov ebx, offset 4f; jmp ebx; ud2; 4:
        xor ecx, ecx; jecxz 5f; ud2; 5:
        enter 8, 0; mov [ebp-4], eax; mov edx, [ebp-4]; leave
    """
    out = done(flat(engine, source, memory={DATA: bytes(range(32))}, cpl=cpl))
    assert (out["rax"], out["rdx"], out["rsp"]) == (16, 16, STACK)
    assert out.memory[DATA][16:] == bytes(range(16))


def test_bound_into_arpl(whole: str) -> None:
    limits = {DATA: struct.pack("<ii", -5, 10)}
    done(flat(whole, "mov eax, 10; bound eax, [0x40000]; mov eax, -5; bound eax, [0x40000]", memory=limits))
    faulted(flat(whole, "mov eax, 11; bound eax, [0x40000]", memory=limits), 5)
    assert faulted(flat(whole, "mov eax, 0x7fffffff; inc eax; into", cpl=3), 4).rip == CODE + 7
    done(flat(whole, "mov eax, 1; inc eax; into"))
    out = done(flat(whole, "mov eax, 0x10; mov ecx, 3; arpl ax, cx; setz bl; arpl ax, cx; setz dl"))
    assert (out["rax"], out["rbx"], out["rdx"]) == (0x13, 1, 0)


def test_16_bit_operands_and_addresses_in_32_bit_code(engine: str) -> None:
    out = done(flat(engine, "mov bx, 0x4000; addr16 mov al, [bx+2]; push ax; pop cx; mov dx, 0xffff; inc dx",
                    {"rbx": 0xFFFF_0000, "rdx": 0x1_0000}, {0x4002: b"\x5a"}))  # fmt: skip
    assert (out["rax"], out["rcx"], out["rdx"]) == (0x5A, 0x5A, 0x1_0000)


@pytest.mark.parametrize("access", ["mov eax, fs:[0xffd]", "mov al, fs:[0x1000]", "mov fs:[0], al"])
def test_segment_limits_and_rights_are_checked(engine: str, access: str) -> None:
    def setup(machine: Machine) -> None:
        machine.write(GDT + 0x60, struct.pack("<Q", 0x0000_9100_0000_0FFF | DATA << 16))  # read-only, 4 KiB
        machine.vcpu.set_table("gdtr", GDT, 0x67)

    done(flat(engine, "mov ax, 0x60; mov fs, ax; mov ebx, fs:[0xffc]; mov cl, fs:[0xfff]", setup=setup))
    faulted(flat(engine, f"mov ax, 0x60; mov fs, ax; {access}", setup=setup), 13)


def test_expand_down_segments(engine: str) -> None:
    def setup(machine: Machine) -> None:
        machine.write(GDT + 0x60, struct.pack("<Q", 0x0040_9700_0000_0FFF | DATA << 16))
        machine.vcpu.set_table("gdtr", GDT, 0x67)

    out = done(
        flat(engine, "mov ax, 0x60; mov fs, ax; mov ebx, fs:[0x1000]", memory={DATA + 0x1000: b"\7\0\0\0"}, setup=setup)
    )
    assert out["rbx"] == 7
    faulted(flat(engine, "mov ax, 0x60; mov fs, ax; mov ebx, fs:[0xfff]", setup=setup), 13)


def test_stack_segment_limit_is_a_stack_fault(engine: str) -> None:
    def setup(machine: Machine) -> None:
        machine.write(GDT + 0x60, struct.pack("<Q", 0x0040_9300_0000_0FFF | DATA << 16))
        machine.vcpu.set_table("gdtr", GDT, 0x67)
        machine.gate(12, 0x18000)
        machine.write(0x18000, assemble(f"mov bx, {KDATA}; mov ss, bx; mov esp, {STACK}; out 0xf4, al", 0x18000, 32))

    out = done(
        flat(
            engine,
            "mov ax, 0x60; mov ss, ax; mov esp, 0x800; push eax; mov eax, [esp+0x7fc]; mov eax, [esp+0x801]; ud2",
            setup=setup,
        )
    )
    assert out["rbx"] == KDATA


@pytest.mark.parametrize(
    ("selector", "vector", "error"),
    [(0x300, 13, 0x300), (0x62, 13, 0x60), (0x68, 11, 0x68), (0x73, 13, 0x70)],
)
def test_loads_of_bad_segments(engine: str, selector: int, vector: int, error: int) -> None:
    """Beyond the limit; a system descriptor; not present; execute-only."""

    def setup(machine: Machine) -> None:
        entries = (0x0000_8900_0000_0067, 0x0040_1300_0000_FFFF, 0x0040_F900_0000_FFFF)
        machine.write(GDT + 0x60, struct.pack("<3Q", *entries))
        machine.vcpu.set_table("gdtr", GDT, 0x77)

    faulted(flat(engine, f"mov ax, {selector}; mov ds, ax", setup=setup), vector, error)


def test_user_code_faults_to_the_kernel_stack_of_a_32_bit_tss(engine: str) -> None:
    seen = []

    def look(machine: Machine, _reason: int) -> bool:
        seen.append(machine.vcpu.get("rsp"))
        return False

    out = run_asm(engine, "mov eax, 5; ud2", mode="prot32", cpl=3, hook=look)
    fault = faulted(out, 6)
    assert (fault.cs, fault.ss, fault.rsp, fault.rip) == (UCODE32, UDATA, STACK, CODE + 5)
    assert seen[0] == KERNEL_STACK - 28


@pytest.mark.parametrize("cpl", [0, 3])
def test_32_bit_paging(engine: str, cpl: int) -> None:
    reason = paravirtual(engine)
    if reason and cpl == 3:
        pytest.skip(reason)

    def setup(machine: Machine) -> None:
        machine.protect(0x50000, 0x51000 | 7)
        machine.protect(0x52000, 0)

    out = flat(engine, "mov eax, [0x50000]; mov dword ptr [0x50004], 9; mov ecx, [0x52010]; nop",
               memory={0x51000: struct.pack("<2I", 7, 0)}, cpl=cpl, setup=setup, paging=True)  # fmt: skip
    fault = faulted(out, 14, cpl + 1 & 4)
    assert (out["rax"], fault.cr2) == (7, 0x52010)
    assert struct.unpack("<2I", out.memory[0x51000]) == (7, 9)


def test_pae_paging(whole: str) -> None:
    def setup(machine: Machine) -> None:
        directory = 0x3000
        machine.write(0x1000, struct.pack("<4Q", directory | 1, 0, 0, 0))
        machine.write(directory, struct.pack("<4Q", 0x4000 | 7, *(n << 21 | 0x87 for n in (1, 2, 3))))
        machine.write(0x4000, struct.pack("<512Q", *(n << 12 | 7 for n in range(512))))
        machine.write(0x4000 + 0x50 * 8, struct.pack("<2Q", 0x51000 | 7, 0x51000 | 7 | 1 << 63))
        machine.vcpu.set("cr4", machine.vcpu.get("cr4") | 0x20)
        machine.vcpu.set("efer", 0x800)
        machine.vcpu.set("cr0", machine.vcpu.get("cr0") | 1 << 31)

    out = flat(
        whole,
        "mov eax, [0x50000]; mov ecx, [0x200000]; mov ebx, 0x51000; jmp ebx",
        memory={0x51000: b"\7\0\0\0"},
        setup=setup,
    )
    fault = faulted(out, 14, 0x11)
    assert (out["rax"], fault.cr2) == (7, 0x51000)


def test_far_jumps_between_32_bit_and_16_bit_code(engine: str) -> None:
    def setup(machine: Machine) -> None:
        machine.write(
            0x8000,
            assemble(
                f"mov ax, 0x7fff; inc ax; seto bl; mov dx, {DATA16_SEL}; mov es, dx; ljmpd {KCODE32}, {CODE + 7}",
                0x8000,
                16,
            ),
        )

    out = done(flat(engine, f"ljmp {CODE16_SEL}, 0x8000", setup=setup))
    assert (out["rax"], out["rbx"]) == (0x8000, 1)


# -- through all modes ------------------------------------------------------------------------------------------------


def test_from_real_mode_to_long_mode_and_user_code(whole: str) -> None:
    """What every boot loader does: real mode, protected mode, paging with PAE, long mode."""
    with Machine(whole, "long64") as m:
        vcpu = m.vcpu
        # Tables stand from the long-mode set-up; the state goes back to real mode.
        vcpu.set("cr0", 0x30)
        vcpu.set("cr4", 0)
        vcpu.set("efer", 0)
        vcpu.set("cr3", 0)
        vcpu.set_segment("cs", Segment(0, 0, 0xFFFF, 0x9B))
        for name in ("ss", "ds", "es", "fs", "gs"):
            vcpu.set_segment(name, Segment(0, 0, 0xFFFF, 0x93))
        m.write(0x7B00, struct.pack("<HI", 0x5F, GDT))
        m.write(
            CODE16,
            assemble(f"cli; lgdt [0x7b00]; mov eax, cr0; or al, 1; mov cr0, eax; ljmpd {KCODE32}, 0x18000", CODE16, 16),
        )
        m.write(
            0x18000,
            assemble(
                f"""
                mov ax, {KDATA}; mov ds, ax; mov es, ax; mov ss, ax; mov esp, {STACK}
                mov eax, cr4; or eax, 0x620; mov cr4, eax
                mov eax, {PML4}; mov cr3, eax
                mov ecx, 0xc0000080; rdmsr; or eax, 0x901; wrmsr
                mov eax, cr0; or eax, 0x80010020; mov cr0, eax
                mov ecx, 0xc0000080; rdmsr; mov ebp, eax
                ljmp {KCODE64}, 0x19000
                """,
                0x18000,
                32,
            ),
        )
        m.write(
            0x19000,
            assemble(
                "mov r15, 0x123456789abcdef0; push r15; pop r10; mov rbx, cr0; mov eax, cs; out 0xf4, al",
                0x19000,
                64,
            ),
        )
        vcpu.set("rip", CODE16)
        assert m.run() == "done", m.vcpu.message()
        assert vcpu.get("r10") == 0x1234_5678_9ABC_DEF0
        assert vcpu.get("rbp") & 0xD01 == 0xD01, "LMA came with paging"
        assert vcpu.get("rbx") == 0x8001_0031
        assert vcpu.get("efer") & 0x500 == 0x500
        assert vcpu.get_segment("cs").attr & 1 << 13


def test_a_protected_mode_segment_keeps_its_limit_in_real_mode(whole: str) -> None:
    """What is called unreal mode: DS with 4 GiB."""
    with Machine(whole, "real16") as m:
        m.write(GDT, struct.pack("<3Q", 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF))
        m.write(0x7B00, struct.pack("<HI", 23, GDT))
        m.write(0x20_0000, b"\x42")
        m.load(
            "lgdt [0x7b00]; mov eax, cr0; or al, 1; mov cr0, eax; mov bx, 16; mov ds, bx; and al, 0xfe; mov cr0, eax;"
            "mov ebx, 0x200000; mov cl, [ebx]; mov ax, 0x10; mov ds, ax; mov dl, [ebx-0x100]; out 0xf4, al"
        )
        m.write(0x20_0000, b"\x43")
        assert m.run() == "done"
        assert (m.vcpu.get("rcx"), m.vcpu.get("rdx")) == (0x43, 0x43)


def test_long_mode_is_left_again(whole: str) -> None:
    with Machine(whole) as m:
        m.load(f"mov dword ptr [{DATA}], 0x18000; mov word ptr [{DATA + 4}], {KCODE32}; jmp fword ptr [{DATA}]")
        m.write(
            0x18000,
            assemble(
                "mov eax, cr0; and eax, 0x7fffffff; mov cr0, eax; mov ecx, 0xc0000080; rdmsr; mov ebx, eax;"
                "and eax, ~0x100; wrmsr; .byte 0x40; out 0xf4, al",
                0x18000,
                32,
            ),
        )
        assert m.run() == "done", m.vcpu.message()
        assert m.vcpu.get("rbx") & 0x500 == 0x100
        assert m.vcpu.get("efer") & 0x500 == 0


@pytest.mark.parametrize("mode", ["real16", "prot32", "long64"])
def test_state_is_read_back_in_every_mode(engine: str, mode: Mode) -> None:
    with Machine(engine, mode) as m:
        before = {name: m.vcpu.get_segment(name) for name in ("cs", "ss", "ds", "tr")}
        m.load("out 0x80, al; hlt")
        m.step()
        assert {name: m.vcpu.get_segment(name) for name in before} == before
        assert m.vcpu.get("rip") == (CODE16 if mode == "real16" else CODE) + 2
