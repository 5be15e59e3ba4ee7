"""Limits, rights and wrap-around of segments, and alignment, in every mode, on every processor."""

import struct
from collections.abc import Callable

import pytest
from asm import assemble
from harness import (
    AC,
    CODE,
    CODE16,
    DATA,
    GDT,
    KCODE32,
    STACK16,
    Fault,
    Machine,
    Outcome,
    run_asm,
    run_code,
)

from pyhyve.cpu.processor import Segment

FREE = 0x60
"""The first free selector of the harness's GDT."""


def done(outcome: Outcome) -> Outcome:
    assert outcome.exit == "done", f"{outcome.exit} {outcome.fault} {outcome.message} rip {outcome['rip']:#x}"
    return outcome


def faulted(outcome: Outcome, vector: int, error: int = 0) -> Fault:
    assert outcome.fault is not None, f"{outcome.exit} {outcome.message} rip {outcome['rip']:#x}"
    assert (outcome.fault.vector, outcome.fault.error) == (vector, error), outcome.fault
    return outcome.fault


def descriptor(base: int, limit: int, access: int, flags: int = 4) -> bytes:
    low = limit & 0xFFFF | (base & 0xFFFFFF) << 16 | access << 40
    return struct.pack("<Q", low | (limit >> 16 & 15) << 48 | flags << 52 | base >> 24 << 56)


def with_descriptors(*descriptors: bytes) -> Callable[[Machine], None]:
    """Descriptors from FREE on."""

    def setup(machine: Machine) -> None:
        machine.write(GDT + FREE, b"".join(descriptors))
        machine.vcpu.set_table("gdtr", GDT, FREE + 8 * len(descriptors) - 1)

    return setup


def flat(engine: str, source: str, *descriptors: bytes, memory: dict[int, bytes] | None = None) -> Outcome:
    return run_asm(engine, source, memory=memory, mode="prot32", setup=with_descriptors(*descriptors))


def real(engine: str, source: str, regs: dict[str, int] | None = None, **more: object) -> Outcome:
    return run_asm(engine, source, regs, mode="real16", **more)  # type: ignore[arg-type]


# -- real mode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "vector"),
    [
        ("mov ax, [bx]", 13), ("mov [bx], ax", 13), ("add dword ptr [bx-2], 1", 13), ("mov al, [bx]", None),
        ("mov ax, ss:[bx]", 12), ("mov ax, [bp]", 12), ("mov ax, ds:[bp]", 13), ("mov ax, cs:[bx]", 13),
        ("mov eax, fs:[bx-3]", None), ("mov eax, fs:[bx-2]", 13), ("movups xmm0, gs:[bx-14]", 13), ("lodsw", 13),
        ("mov al, [bx+1]", None), ("mov ebx, 0x10000; mov al, [ebx]", 13), ("mov al, [ebx]", None),
        ("les ax, [bx-2]", 13), ("push word ptr [bx]", 13), ("fld qword ptr [bx-4]", 13), ("xlat", None),
        ("mov ah, 2; stosw", 13),
    ],
)  # fmt: skip
def test_real_mode_offsets_end_at_64_kib(whole: str, access: str, vector: int | None) -> None:
    regs = dict.fromkeys(("rbx", "rbp", "rsi", "rdi"), 0xFFFF)
    out = real(whole, f"nop; {access}", regs)
    if vector is None:
        done(out)
    else:
        assert faulted(out, vector).rip == CODE16 + 1 + (6 if "mov ebx" in access else 2 if "mov ah" in access else 0)


def test_real_mode_addresses_wrap_at_64_kib_before_the_limit_counts(engine: str) -> None:
    out = done(real(engine, "mov ax, [bx+si]; mov cx, [bx+0x7fff]", {"rbx": 0x8001, "rsi": 0xC000},
                    memory={0x4001: b"\x34\x12", 0: b"\x78\x56"}))  # fmt: skip
    assert (out["rax"], out["rcx"]) == (0x1234, 0x5678)


@pytest.mark.parametrize("push", ["push ax", "push 5", "call 1f; 1:", "push word ptr [0x4000]", "pushf", "pusha"])
def test_a_push_at_sp_0_goes_to_the_top(whole: str, push: str) -> None:
    def setup(machine: Machine) -> None:
        machine.vcpu.set_segment("ss", Segment(0x2000, 0x20000, 0xFFFF, 0x93))

    out = done(real(whole, push, {"rsp": 0x5_0000, "rax": 7}, setup=setup))
    assert out["rsp"] == (0x5_FFF0 if push == "pusha" else 0x5_FFFE)


@pytest.mark.parametrize("push", ["push ax", "push 5", "call 1f; 1:", "pushf", "push ds"])
def test_a_push_at_sp_1_faults(whole: str, push: str) -> None:
    """With nowhere to push the fault to, that ends in a triple fault: the 8086's shutdown."""
    out = real(whole, push, {"rsp": 1})
    assert out.exit == "triple-fault", out


@pytest.mark.parametrize(("pop", "at"), [("pop ax", 0xFFFF), ("pop ebx", 0xFFFD), ("ret", 0xFFFF), ("popf", 0xFFFF)])
def test_a_pop_over_the_end_faults(whole: str, pop: str, at: int) -> None:
    stacks = {12: f"mov sp, {STACK16}; out 0xf4, al"}
    out = done(real(whole, f"mov sp, {at}; {pop}; ud2", handlers=stacks))
    assert out["rsp"] == STACK16


def test_a_pop_moves_sp_alone(engine: str) -> None:
    out = done(real(engine, "push 0x1234; pop ax; push esp; pop ecx; mov bp, sp; leave", {"rsp": 0xABCD_7000}))
    assert (out["rax"], out["rcx"], out["rsp"]) == (0x1234, 0xABCD_7000, 0xABCD_7002)


def test_code_does_not_run_over_the_end_of_its_segment(whole: str) -> None:
    # at FFFEH: INC AX, NOP, and then offset 10000H; the fault is pushed with IP 0
    out = run_code(whole, assemble("jmp 0x0:0xfffe", CODE16, 16), memory={0xFFFE: b"\x40\x90"}, mode="real16")
    assert faulted(out, 13).rip == 0
    assert out["rax"] & 0xFFFF == 1


def test_an_instruction_over_the_end_of_its_segment_is_not_fetched(whole: str) -> None:
    out = run_code(whole, assemble("jmp 0x0:0xfffe", CODE16, 16), memory={0xFFFE: b"\xb8\x01"}, mode="real16")
    assert faulted(out, 13).rip == 0xFFFE


@pytest.mark.parametrize("jump", ["jmp", "jc", "call"])
def test_a_jump_over_the_limit_faults_where_it_is(whole: str, jump: str) -> None:
    code = {"jmp": b"\x66\xe9", "jc": b"\x66\x0f\x82", "call": b"\x66\xe8"}[jump] + struct.pack("<I", 0x1_0000)
    assert faulted(run_code(whole, b"\xf9" + code, mode="real16"), 13).rip == CODE16 + 1


def test_a_jump_over_the_limit_that_is_not_taken(engine: str) -> None:
    code = b"\xf8\x66\x0f\x82" + struct.pack("<I", 0x1_0000) + b"\xe6\xf4"
    done(run_code(engine, code, mode="real16"))


def test_unreal_mode_keeps_large_limits(whole: str) -> None:
    source = """
        cli; lgdt [0x9000]; mov eax, cr0; or al, 1; mov cr0, eax; mov bx, 8; mov ds, bx; and al, 0xfe; mov cr0, eax
        xor bx, bx; mov ds, bx; mov ebx, 0x123456; mov dword ptr [ebx], 0x55aa; mov ecx, [ebx]
        mov ax, 0x1000; mov ds, ax; mov edx, [ebx-0x10000]
        mov es:[ebx], al
    """
    gdt = bytes(8) + descriptor(0, 0xFFFFF, 0x93, 0xC)
    out = real(whole, source, memory={0x9000: struct.pack("<HI", 15, 0x9100), 0x9100: gdt})
    faulted(out, 13)
    assert (out["rcx"], out["rdx"]) == (0x55AA, 0x55AA)


# -- protected mode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "access", ["mov al, es:[0]", "mov es:[0], al", "stosb", "lods al, es:[esi]", "les eax, es:[0]"]
)
def test_null_selectors_name_nothing(whole: str, access: str) -> None:
    faulted(flat(whole, f"xor eax, eax; mov es, ax; {access}"), 13)


@pytest.mark.parametrize(
    ("access", "vector"),
    [("mov al, [0]", 13), ("mov al, cs:[0]", 13), ("mov cs:[0], al", 13)],
)
def test_code_that_is_not_readable(whole: str, access: str, vector: int) -> None:
    code = assemble(f"{access}; out 0xf4, al", 0, 32)
    source = f"mov ax, {FREE + 8}; mov ds, ax; ljmp {FREE}, 0"
    out = run_asm(whole, source, memory={DATA: code}, mode="prot32", setup=with_descriptors(
        descriptor(DATA, 0xFFF, 0x99), descriptor(DATA, 0, 0x9B)))  # fmt: skip
    if access == "mov al, [0]":
        done(out)
    else:
        faulted(out, vector)


@pytest.mark.parametrize(
    ("source", "vector", "at"),
    [
        ("nop; jmp 0x100", 13, 1), ("nop; call 0x100", 13, 1), ("stc; jc 0x100", 13, 1),
        ("mov eax, 0x100; jmp eax", 13, 5), ("push 0x100; ret", 13, 5), ("mov eax, 0x100; call eax", 13, 5),
        ("clc; jc 0x100; jmp 1f; 1: nop", None, 0),
        ("mov ecx, 9; 1: loop 1b", None, 0), ("jmp 2f; .org 0xfd; 2: nop; nop; nop", 13, 0x100),
        ("jmp 2f; .org 0xfd; 2: mov eax, 1", 13, 0xFD), ("call 3f; push offset 4f; ret; 3: ret; 4: nop", None, 0),
    ],
)  # fmt: skip
def test_code_segments_end_at_their_limit(whole: str, source: str, vector: int | None, at: int) -> None:
    code = assemble(f"{source}\n out 0xf4, al", 0, 32)
    setup = with_descriptors(descriptor(DATA, 0xFF, 0x9B))
    out = run_asm(whole, f"ljmp {FREE}, 0", memory={DATA: code}, mode="prot32", setup=setup)
    if vector is None:
        done(out)
    else:
        assert faulted(out, vector).rip == at


def test_many_limits_of_code(engine: str) -> None:
    """More of them than the software processor tells apart at a time."""
    n = 150
    source = "".join(f"lcall {FREE + 8 * k}, 0\n" for k in range(n)) * 2
    code = assemble("inc ebx; call 1f; lret; 1: inc ecx; ret", 0, 32)
    setup = with_descriptors(*(descriptor(DATA, 0xF00 + k, 0x9B) for k in range(n)))
    out = done(run_asm(engine, source, memory={DATA: code}, mode="prot32", setup=setup))
    assert (out["rbx"], out["rcx"]) == (2 * n, 2 * n)


def test_segments_change_under_one_piece_of_code(engine: str) -> None:
    """The same code with ES flat, with a base, and with a limit."""
    source = f"""
        mov ebx, {DATA}; call 1f; mov edx, eax
        mov cx, {FREE}; mov es, cx; xor ebx, ebx; call 1f; mov esi, eax
        mov cx, {FREE + 8}; mov es, cx; mov ebx, 4; call 1f; mov edi, eax
        mov ebx, 0xffd
    1:  mov eax, es:[ebx]
        ret
    """
    out = flat(engine, source, descriptor(DATA, 0xFFFFF, 0x93, 0xC), descriptor(DATA, 0xFFF, 0x93),
               memory={DATA: b"\1\0\0\0\2\0\0\0"})  # fmt: skip
    faulted(out, 13)
    assert (out["rdx"], out["rsi"], out["rdi"]) == (1, 1, 2)


# -- virtual-8086 and compatibility mode ------------------------------------------------------------------------------


def v8086(machine: Machine) -> None:
    vcpu = machine.vcpu
    vcpu.set("rflags", vcpu.get("rflags") | 1 << 17 | 0x3000)
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        base = 0x1_0000 if name == "cs" else 0x4_0000
        vcpu.set_segment(name, Segment(base >> 4, base, 0xFFFF, 0xF3))
    vcpu.set("rip", 0)
    vcpu.set("rsp", 0x8000)


@pytest.mark.parametrize(
    ("access", "vector"),
    [("mov al, [bx]", None), ("mov ax, [bx]", 13), ("mov ax, [bp]", 12), ("mov sp, 1; push ax", 12),
     ("mov sp, 0xffff; pop ax", 12), ("mov sp, 0; push ax; call 1f; 1: pop cx", None),
     ("mov eax, 0x10000; mov al, [eax]", 13)],
)  # fmt: skip
def test_virtual_8086_segments_have_64_kib(whole: str, access: str, vector: int | None) -> None:
    code = assemble(f"{access}\n .byte 0x0f, 0x0b, 0x64, 0x6f, 0x6e, 0x65", 0, 16)
    out = run_code(whole, code, {"rbx": 0xFFFF, "rbp": 0xFFFF}, mode="prot32", cpl=3, setup=v8086)
    assert out.fault is not None
    assert out.fault.vector == (6 if vector is None else vector)


def test_compatibility_mode_checks_segments(whole: str) -> None:
    def setup(machine: Machine) -> None:
        with_descriptors(descriptor(DATA, 0xFFF, 0x93), descriptor(DATA, 0xFFFFF, 0x93, 0xC))(machine)
        vcpu = machine.vcpu
        vcpu.set_segment("cs", Segment(KCODE32, 0, 0xFFFF_FFFF, 0xC09B))

    code = assemble(f"mov ax, {FREE + 8}; mov fs, ax; mov ecx, fs:[8]; mov ax, {FREE}; mov fs, ax; mov edx, fs:[0xffc];"
                    "mov eax, fs:[0xffd]", CODE, 32)  # fmt: skip
    out = run_code(whole, code, memory={DATA + 8: b"\5\0\0\0", DATA + 0xFFC: b"\6\0\0\0"}, setup=setup)
    faulted(out, 13)
    assert (out["rcx"], out["rdx"]) == (5, 6)


# -- alignment --------------------------------------------------------------------------------------------------------


def check_alignment(machine: Machine) -> None:
    machine.vcpu.set("cr0", machine.vcpu.get("cr0") | 1 << 18)
    machine.vcpu.set("rflags", machine.vcpu.get("rflags") | AC)


@pytest.mark.parametrize(
    ("access", "needs"),
    [
        ("mov al, [rbx]", 1), ("mov ax, [rbx]", 2), ("mov [rbx], eax", 4), ("add [rbx], rax", 8),
        ("movss xmm0, [rbx]", 4), ("movq xmm0, [rbx]", 8), ("movups xmm0, [rbx]", 16), ("movdqu [rbx], xmm0", 16),
        ("fld tbyte ptr [rbx]", 8),
        ("fild word ptr [rbx]", 2), ("fldcw [rbx]; fninit", 2), ("fnstenv [rbx]", 4), ("fnsave [rbx]", 4),
        ("data16 fnstenv [rbx]", 2), ("lodsq", 8), ("movsw", 2), ("push [rbx]", 8), ("bt dword ptr [rbx], ecx", 4),
        ("lock inc dword ptr [rbx]", 4), ("cmpxchg8b [rbx]", 8), ("xlat", 1), ("mov rsp, rbx; push rax", 8),
        ("mov rsp, rbx; pop rax", 8), ("mov rsp, rbx; call 1f; 1:", 8), ("mov rsp, rbx; pop ax", 2),
        ("mov [rbx], ds", 2), ("stmxcsr [rbx]", 4), ("mov rsp, rbx; pushf", 8),
        ("mov rsp, rbx; push rax; push rcx; push rdx", 8),
    ],
)  # fmt: skip
def test_alignment_that_each_access_needs(whole: str, access: str, needs: int) -> None:
    for off in (0, 1, 2, 4, 8, 16):
        at = DATA + 0x100 + off
        regs = {"rbx": at, "rsi": at, "rdi": at, "rax": 0, "rcx": 0}
        out = run_asm(whole, f"fninit; fldz; {access}", regs, cpl=3, setup=check_alignment)
        if off % needs:
            faulted(out, 17)
        else:
            done(out)


def test_alignment_check_comes_behind_general_protection_and_before_page_faults(whole: str) -> None:
    faulted(run_asm(whole, "mov eax, [rbx]", {"rbx": 0x8000_0000_0000_0001}, cpl=3, setup=check_alignment), 13)
    faulted(run_asm(whole, "mov eax, [rbx]", {"rbx": 0x1_0000_0001}, cpl=3, setup=check_alignment), 17)
    faulted(run_asm(whole, "movaps xmm0, [rbx]", {"rbx": DATA + 8}, cpl=3, setup=check_alignment), 13)


def test_user_code_switches_alignment_checks_on_and_off(whole: str) -> None:
    def setup(machine: Machine) -> None:
        machine.vcpu.set("cr0", machine.vcpu.get("cr0") | 1 << 18)

    flip = "pushfq; xor dword ptr [rsp], 0x40000; popfq"
    source = f"mov eax, [rbx]; {flip}; mov eax, [rbx+3]; {flip}; inc ecx; mov eax, [rbx]; {flip}; 1: mov eax, [rbx]"
    out = run_asm(whole, source, {"rbx": DATA + 1}, cpl=3, setup=setup)
    faulted(out, 17)
    assert out["rcx"] == 1


def test_alignment_of_32_bit_code(whole: str) -> None:
    for access, vector in (("push eax", 17), ("mov esp, 0x60000; push eax; call 1f; 1:", None), ("les eax, [ebx]", 17),
                           ("lds ax, [ebx+1]", 13), ("bound eax, [ebx+1]", 17), ("popad", 17)):  # fmt: skip
        out = run_asm(whole, access, {"rbx": DATA + 1, "rsp": DATA + 0x102}, {DATA: b"\x77" * 32}, mode="prot32", cpl=3,
                      setup=check_alignment)  # fmt: skip
        if vector is None:
            done(out)
        else:
            assert out.fault is not None, access
            assert out.fault.vector == vector, access
