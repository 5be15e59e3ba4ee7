"""Paging, exceptions, interrupts by instruction, and privilege changes, on every processor.

Source: Intel SDM vol 3, "Paging", "Interrupt and Exception Handling"; vol 2 for the instructions.
"""

import struct
from collections.abc import Callable

import pytest
from asm import assemble
from harness import (
    AC,
    ALIAS,
    CODE,
    DATA,
    GDT,
    IDT,
    IF,
    IST_STACK,
    KCODE64,
    KDATA,
    KERNEL_STACK,
    PD,
    PML4,
    PT,
    RF,
    STACK,
    TF,
    TSS,
    UCODE32,
    UCODE64,
    UDATA,
    ZF,
    Fault,
    Machine,
    Outcome,
    paravirtual,
    run_asm,
)

from pyhyve.cpu import exits
from pyhyve.cpu.processor import Segment

P, W, U, A, D, NX = 1, 2, 4, 0x20, 0x40, 1 << 63
PAGE = 0x50000
"""A page of data whose mapping tests change; the one behind it stays mapped."""
M = (1 << 64) - 1

Setup = Callable[[Machine], None]


def map_page(flags: int, page: int = PAGE, frame: int | None = None) -> Setup:
    """Make the page's entry `flags`."""

    def setup(machine: Machine) -> None:
        machine.protect(page, flags | (page if frame is None else frame))

    return setup


def both(*setups: Setup) -> Setup:
    def setup(machine: Machine) -> None:
        for each in setups:
            each(machine)

    return setup


def faulted(outcome: Outcome, vector: int, error: int | None = None) -> Fault:
    assert outcome.fault is not None, f"{outcome.exit} {outcome.message} rip {outcome['rip']:#x}"
    assert outcome.fault.vector == vector, outcome.fault
    if error is not None:
        assert outcome.fault.error == error, hex(outcome.fault.error)
    return outcome.fault


def done(outcome: Outcome) -> Outcome:
    assert outcome.exit == "done", f"{outcome.exit} {outcome.fault} {outcome.message} rip {outcome['rip']:#x}"
    return outcome


# -- page faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpl", "flags", "source", "error"),
    [
        (0, 0, "mov rax, [rbx]", 0),
        (0, 0, "mov [rbx], rax", 2),
        (3, 0, "mov rax, [rbx]", 4),
        (3, 0, "mov [rbx], rax", 6),
        (0, P | U, "mov [rbx], rax", 3),
        (3, P | U, "mov [rbx], rax", 7),
        (3, P | W, "mov rax, [rbx]", 5),
        (3, P | W, "mov [rbx], rax", 7),
        (0, P | W | U | NX, "jmp rbx", 0x11),
        (3, P | W | U | NX, "jmp rbx", 0x15),
        (3, 0, "jmp rbx", 0x14),
        (0, P | W | U | 1 << 50, "mov rax, [rbx]", 9),
        (3, P | W | U | 1 << 50, "mov [rbx], rax", 0xF),
        (3, P | U, "lock add dword ptr [rbx], 0", 7),
        (3, P | U, "cmpxchg [rbx], rcx", 7),
        (3, P | U, "bts dword ptr [rbx], 0", 7),
        (3, P | U, "xchg [rbx], rax", 7),
        (3, 0, "add [rbx], rax", 6),
        (3, 0, "cmp [rbx], rax", 4),
        (3, 0, "push [rbx]", 4),
        (3, 0, "pop [rbx]", 6),
        (3, 0, "movups xmm0, [rbx]", 4),
        (3, 0, "movups [rbx], xmm0", 6),
        (3, 0, "fld qword ptr [rbx]", 4),
        (3, 0, "fstp qword ptr [rbx]", 6),
        (3, 0, "call [rbx]", 4),
        (3, 0, "mov rsi, rbx; lodsb", 4),
        (3, 0, "mov rdi, rbx; stosb", 6),
    ],
)
def test_a_page_fault_has_the_right_error_code(engine: str, cpl: int, flags: int, source: str, error: int) -> None:
    out = run_asm(engine, source, {"rbx": PAGE + 0x123, "rcx": 1}, cpl=cpl, setup=map_page(flags))
    fault = faulted(out, 14, error)
    assert fault.cr2 == PAGE + 0x123
    assert fault.rflags & RF
    if "jmp" in source:
        assert fault.rip == PAGE + 0x123
    else:
        assert CODE <= fault.rip < CODE + 8


@pytest.mark.parametrize("name", ["rax", "r10", "r11", "r15", "rsp"])
def test_a_fault_leaves_every_register_as_it_was(engine: str, name: str) -> None:
    """The operand's own registers included."""
    regs = {reg: 0x1000 + n for n, reg in enumerate(("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r10", "r11", "r15"))}
    regs[name] = PAGE + 0x800
    other = "r11" if name != "r11" else "r15"
    for source in (
        f"add {other}, [{name}]",
        f"xadd [{name}], {other}",
        f"push [{name}+8]",
        f"imul {other}, [{name}], 3",
    ):
        if name == "rsp" and source.startswith("push"):
            continue
        out = run_asm(engine, f"stc; {source}", regs, cpl=3, setup=map_page(0))
        fault = faulted(out, 14)
        assert fault.rip == CODE + 1
        assert {reg: out[reg] for reg in regs} == regs


@pytest.mark.parametrize(
    "source", ["mov rax, [rbx]", "mov [rbx], rax", "push [rbx]", "movups xmm0, [rbx]", "not dword ptr [rbx]"]
)
def test_a_fault_leaves_the_flags_as_they_were(engine: str, source: str) -> None:
    out = run_asm(engine, f"push 0xad7; popfq; {source}", {"rbx": PAGE}, cpl=3, setup=map_page(0))
    assert faulted(out, 14).rflags & 0x8D5 == 0x8D5


@pytest.mark.parametrize("source", ["add rax, [rbx]", "add [rbx], rax", "cmp [rbx], rax", "imul rax, [rbx]"])
def test_a_fault_leaves_flags_that_the_instruction_would_change(
    engine: str, source: str, differs: Callable[[str, str, str], None]
) -> None:
    differs(engine, "bt", "flags that the faulting instruction overwrites anyway are not kept for its handler")
    out = run_asm(engine, f"stc; {source}", {"rbx": PAGE}, cpl=3, setup=map_page(0))
    assert faulted(out, 14).rflags & 0x8D5 == 1


def test_the_wp_bit_decides_over_supervisor_writes(engine: str) -> None:
    def without_wp(machine: Machine) -> None:
        map_page(P | U)(machine)
        machine.vcpu.set("cr0", machine.vcpu.get("cr0") & ~0x10000)

    out = done(run_asm(engine, "mov byte ptr [rbx], 7", {"rbx": PAGE}, {PAGE: b"\0"}, setup=without_wp))
    assert out.memory[PAGE] == b"\7"


@pytest.mark.parametrize("cpl", [0, 3])
def test_accessed_and_dirty_bits(engine: str, cpl: int) -> None:
    seen = {}

    def look(machine: Machine, _reason: int) -> bool:
        seen.update({page: machine.leaf(page) & (A | D) for page in (PAGE, PAGE + 0x1000, PAGE + 0x2000)})
        seen[PML4] = machine.read_int(PML4) & (A | D)
        return False

    done(run_asm(engine, "mov rax, [rbx]; mov [rbx+0x1000], rax", {"rbx": PAGE}, cpl=cpl, hook=look))
    assert seen[PAGE] == A
    assert seen[PAGE + 0x1000] == A | D
    assert seen[PAGE + 0x2000] == 0
    assert seen[PML4] & A


def test_a_read_before_a_write_still_sets_dirty(engine: str) -> None:
    leaf = []

    def look(machine: Machine, _reason: int) -> bool:
        leaf.append(machine.leaf(PAGE) & (A | D))
        return False

    done(run_asm(engine, "mov rax, [rbx]; out 0x80, al; mov [rbx], rax", {"rbx": PAGE}, hook=look))
    assert leaf[0] == A
    assert leaf[-1] == A | D


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("mov rax, [rbx]", 4),
        ("mov [rbx], rax", 6),
        ("add [rbx], rax", 6),
        ("movups [rbx], xmm0", 6),
        ("lock xadd [rbx], rax", 6),
    ],
)
def test_an_access_over_a_page_end_faults_in_the_second_page_and_writes_nothing(
    engine: str, source: str, error: int
) -> None:
    at = PAGE + 0xFFD
    out = run_asm(engine, source, {"rbx": at, "rax": M}, {at: b"abc"}, cpl=3, setup=map_page(0, PAGE + 0x1000))
    assert faulted(out, 14, error).cr2 == PAGE + 0x1000
    assert out.memory[at] == b"abc"
    assert out["rax"] == M


def test_an_access_over_a_page_end_that_faults_in_the_first_page(engine: str) -> None:
    out = run_asm(
        engine,
        "mov [rbx], rax",
        {"rbx": PAGE + 0xFFD, "rax": M},
        {PAGE + 0x1000: bytes(8)},
        cpl=3,
        setup=map_page(P | U),
    )
    assert faulted(out, 14, 7).cr2 == PAGE + 0xFFD
    assert out.memory[PAGE + 0x1000] == bytes(8)


@pytest.mark.parametrize("cpl", [0, 3])
def test_an_instruction_over_a_page_end_faults_in_the_second_page(engine: str, cpl: int) -> None:
    def setup(machine: Machine) -> None:
        machine.write(PAGE + 0xFFD, bytes.fromhex("48b8000000000000"))  # MOV RAX, imm64, cut
        machine.protect(PAGE + 0x1000, 0)

    fault = faulted(run_asm(engine, "jmp rbx", {"rbx": PAGE + 0xFFD}, cpl=cpl, setup=setup), 14, 0x10 | cpl + 1 & 4)
    assert (fault.cr2, fault.rip) == (PAGE + 0x1000, PAGE + 0xFFD)


def test_an_instruction_that_ends_with_its_page_does_not_need_the_next(engine: str) -> None:
    def setup(machine: Machine) -> None:
        machine.write(PAGE + 0xFFA, bytes.fromhex("b807000000") + b"\xc3")
        machine.protect(PAGE + 0x1000, 0)

    assert done(run_asm(engine, "call rbx", {"rbx": PAGE + 0xFFA}, cpl=3, setup=setup))["rax"] == 7


@pytest.mark.parametrize(
    ("source", "regs"),
    [
        ("push rax", {"rsp": PAGE + 0x1008 - 8}),
        ("call 1f; 1:", {"rsp": PAGE + 0x1000}),
        ("pop rax", {"rsp": PAGE + 0xFF8}),
        ("ret", {"rsp": PAGE + 0xFF8}),
        ("leave", {"rbp": PAGE + 0xFF8}),
        ("enter 8, 0", {"rsp": PAGE + 0x1000}),
        ("pop qword ptr [rbx]", {"rbx": PAGE}),
        ("pushfq", {"rsp": PAGE + 0x1000}),
        ("popfq", {"rsp": PAGE + 0xFF0}),
    ],
)
def test_a_stack_instruction_that_faults_leaves_rsp_alone(engine: str, source: str, regs: dict[str, int]) -> None:
    out = run_asm(engine, source, regs, cpl=3, setup=map_page(0))
    fault = faulted(out, 14)
    assert fault.rip == CODE
    assert out["rsp"] == regs.get("rsp", STACK)
    assert out["rbp"] == regs.get("rbp", 0)


@pytest.mark.parametrize("cpl", [0, 3])
def test_rep_movs_faults_with_its_progress_in_the_registers(engine: str, cpl: int) -> None:
    regs = {"rsi": DATA, "rdi": PAGE - 0x10, "rcx": 0x40}
    out = run_asm(
        engine, "rep movsb", regs, {DATA: bytes(range(64)), PAGE - 0x10: bytes(16)}, cpl=cpl, setup=map_page(0)
    )
    fault = faulted(out, 14)
    assert (fault.rip, fault.cr2) == (CODE, PAGE)
    assert (out["rsi"], out["rdi"], out["rcx"]) == (DATA + 0x10, PAGE, 0x30)
    assert out.memory[PAGE - 0x10] == bytes(range(16))


@pytest.mark.parametrize("cpl", [0, 3])
def test_a_handler_that_maps_the_page_lets_the_instruction_go_on(engine: str, cpl: int) -> None:
    entry = PAGE | P | W | U
    leaf = PT + (PAGE >> 12) * 8
    handler = f"push rax; mov eax, {entry}; mov [{leaf}], rax; inc dword ptr [{DATA}]; pop rax; add rsp, 8; iretq"
    source = "mov [rbx+8], r10; add r11, [rbx+8]; push qword ptr [rbx+8]; pop r15"
    out = run_asm(engine, source, {"rbx": PAGE, "r10": 5, "r11": 6}, {DATA: bytes(4)}, cpl=cpl, handlers={14: handler},
                  setup=map_page(0))  # fmt: skip
    done(out)
    assert (out["r11"], out["r15"], out.memory[DATA][0]) == (11, 5, 1)


def test_a_changed_entry_counts_after_invlpg_and_after_cr3(engine: str) -> None:
    entry = PT + (PAGE >> 12) * 8
    source = f"""
        mov rax, [rbx]
        mov qword ptr [{entry}], {(PAGE + 0x1000) | 7}; invlpg [rbx]
        mov rcx, [rbx]
        mov qword ptr [{entry}], {(PAGE + 0x2000) | 7}; mov rdi, cr3; mov cr3, rdi
        mov rdx, [rbx]
        mov qword ptr [{entry}], {(PAGE + 0x1000) | 5}; invlpg [rbx]
        mov [rbx], rdx
    """
    memory = {PAGE + n * 0x1000: struct.pack("<Q", n + 1) for n in range(3)}
    out = run_asm(engine, source, {"rbx": PAGE}, memory)
    faulted(out, 14, 3)
    assert (out["rax"], out["rcx"], out["rdx"]) == (1, 2, 3)


def test_large_pages_and_aliases(engine: str) -> None:
    out = done(run_asm(engine, "mov rax, [rbx]; mov qword ptr [rcx], 9; mov rdx, [rsi]",
                       {"rbx": ALIAS + DATA, "rcx": ALIAS + 0x40_0008, "rsi": 0x40_0008},
                       {DATA: struct.pack("<Q", 5), 0x40_0008: bytes(8)}))  # fmt: skip
    assert (out["rax"], out["rdx"]) == (5, 9)


def test_upper_levels_restrict_too(engine: str) -> None:
    def read_only_directory(machine: Machine) -> None:
        machine.write(PD + 8, struct.pack("<Q", 1 << 21 | 0x85))

    faulted(run_asm(engine, "mov [rbx], rax", {"rbx": 0x20_0000}, cpl=3, setup=read_only_directory), 14, 7)


@pytest.mark.parametrize(
    ("source", "vector"),
    [
        ("mov rax, [rbx]", 13),
        ("mov [rbx], al", 13),
        ("call rbx", 13),
        ("jmp [rbx]", 13),
        ("push [rbx]", 13),
        ("pop [rbx]", 13),
        ("call [rbx]", 13),
        ("mov rbp, rbx; mov rax, fs:[rbp]", 13),
        ("mov rsp, rbx; push rax", 12),
        ("mov rsp, rbx; push rax; push rcx; push rdx", 12),
        ("mov rsp, rbx; pop rax", 12),
        ("mov rsp, rbx; push [rip]", 12),
        ("mov rsp, rbx; pop [rip]", 12),
        ("mov rsp, rbx; pushfq", 12),
        ("mov rsp, rbx; call .", 12),
        ("mov rsp, rbx; call [rip]", 12),
        ("mov rsp, rbx; ret", 12),
        ("mov rsp, rbx; mov [rsp + 8], eax", 12),
        ("mov rsp, rbx; fxsave [rsp]", 12),
        ("mov rbp, rbx; leave", 12),
        ("mov rbp, rbx; mov rax, [rbp]", 12),
        ("mov rbp, rbx; movups xmm0, [rbp + 3]", 12),
        ("mov rbp, rbx; jmp [rbp]", 12),
        ("push [rbp]; mov rbp, rbx; push [rbp]", 12),
    ],
)
@pytest.mark.parametrize("address", [(1 << 47) + 0x1000, 0x8000_0000_0000_0000])
def test_addresses_that_are_not_canonical(engine: str, source: str, vector: int, address: int) -> None:
    faulted(run_asm(engine, source, {"rbx": address, "rbp": CODE}, cpl=3), vector, 0)


def test_an_instruction_over_a_pages_end_gives_a_stack_fault(engine: str) -> None:
    source = "jmp 1f; .org 0xffd; 1: mov rax, [rbp + 0x100000]"
    faulted(run_asm(engine, source, {"rbp": 1 << 50}, cpl=3), 12, 0)


def test_smep_and_smap(whole: str) -> None:
    def guard(bits: int) -> Setup:
        def setup(machine: Machine) -> None:
            for page in range(0, 1 << 21, 0x1000):
                if page != PAGE:
                    machine.protect(page, page | P | W)
            machine.vcpu.set("cr4", machine.vcpu.get("cr4") | bits)

        return setup

    faulted(run_asm(whole, "jmp rbx", {"rbx": PAGE}, setup=guard(1 << 20)), 14, 0x11)
    faulted(run_asm(whole, "mov rax, [rbx]", {"rbx": PAGE}, setup=guard(1 << 21)), 14, 1)
    faulted(run_asm(whole, "stac; mov [rbx], rax; clac; mov rcx, [rbx]", {"rbx": PAGE}, setup=guard(1 << 21)), 14, 1)
    assert (
        done(run_asm(whole, "stac; mov rax, [rbx]; clac", {"rbx": PAGE}, {PAGE: b"\5"}, setup=guard(1 << 21)))["rax"]
        == 5
    )


# -- exceptions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize(
    ("source", "vector", "error", "offset"),
    [
        ("div ecx", 0, 0, 0),
        ("mov rdx, 5; div rcx", 0, 0, 7),
        ("mov eax, 1000; mov cl, 2; div cl", 0, 0, 7),
        ("mov edx, 1; inc ecx; div ecx", 0, 0, 7),
        ("mov rax, 0x8000000000000000; cqo; or rcx, -1; idiv rcx", 0, 0, 16),
        ("nop; ud2", 6, 0, 1),
        (".byte 0x06", 6, 0, 0),
        ("nop; int3; nop", 3, 0, 2),
        (".byte 0xf1", 1, 0, 1),
        ("mov ss, cx", 13, 0, 0),
        ("mov cx, 0x200; mov ds, cx", 13, 0x200, 4),
    ],
)
def test_exceptions_arrive_with_vector_error_and_rip(
    engine: str, cpl: int, source: str, vector: int, error: int, offset: int
) -> None:
    if cpl == 0 and "mov ss" in source:
        pytest.skip("a null SS is allowed in ring 0")
    if source == ".byte 0xf1" and paravirtual(engine):
        pytest.skip(str(paravirtual(engine)))
    fault = faulted(run_asm(engine, source, cpl=cpl), vector, error)
    assert fault.rip == CODE + offset


@pytest.mark.parametrize(
    "source",
    ["hlt", "cli", "sti", "mov rax, cr0", "mov cr3, rax", "mov rax, dr7", "lgdt [rbx]", "lidt [rbx]", "ltr ax",
     "lldt ax", "rdmsr", "wrmsr", "invlpg [rbx]", "wbinvd", "clts", "in al, 0x80", "out 0x80, al", "swapgs", "xsetbv",
     "lmsw ax", "sysretq", "iretq"],
)  # fmt: skip
def test_privileged_instructions_are_protected_from_user_code(engine: str, source: str) -> None:
    def plain(machine: Machine) -> None:
        machine.vcpu.set("rflags", 2)

    out = run_asm(engine, source, {"rbx": DATA}, {DATA: bytes(16)}, cpl=3, setup=plain)
    assert out.fault is not None, out.exit
    assert (out.fault.vector, out.fault.error) in ((13, 0), (6, 0)) if source in ("sysretq", "xsetbv") else (13, 0)
    assert out.fault.vector == 13 or source in ("sysretq", "xsetbv")


def test_the_stack_and_registers_of_a_fault_from_user_code(engine: str) -> None:
    seen = {}

    def look(machine: Machine, _reason: int) -> bool:
        seen["rsp"] = machine.vcpu.get("rsp")
        seen["cs"] = machine.vcpu.get_segment("cs").selector
        seen["ss"] = machine.vcpu.get_segment("ss").selector
        seen["flags"] = machine.vcpu.get("rflags")
        return False

    fault = faulted(run_asm(engine, "ud2", {"rflags": 0x202, "rsp": STACK - 3}, cpl=3, hook=look), 6)
    assert (fault.cs, fault.ss, fault.rsp) == (UCODE64, UDATA, STACK - 3)
    assert seen["rsp"] == KERNEL_STACK - 56, "SS, RSP, RFLAGS, CS, RIP and two words of the stub"
    assert (seen["cs"], seen["ss"]) == (KCODE64, 0)
    assert not seen["flags"] & (IF | RF)


def test_a_64_bit_frame_is_aligned_without_a_stack_switch(engine: str) -> None:
    fault = faulted(run_asm(engine, "sub rsp, 5; ud2"), 6)
    assert fault.rsp == STACK - 5


def test_an_interrupt_stack_is_used(engine: str) -> None:
    seen = []

    def setup(machine: Machine) -> None:
        machine.gate(6, 0x8000 + 6 * 16, ist=1)

    def look(machine: Machine, _reason: int) -> bool:
        seen.append(machine.vcpu.get("rsp"))
        return False

    faulted(run_asm(engine, "ud2", setup=setup, hook=look), 6)
    assert seen[0] == IST_STACK - 56


def test_a_fault_on_delivery_is_a_double_fault(engine: str) -> None:
    def no_gate(machine: Machine) -> None:
        machine.write(IDT + 13 * 16, bytes(16))
        machine.write(IDT + 14 * 16, bytes(16))

    out = run_asm(engine, "mov rax, [rbx]", {"rbx": 1 << 60}, setup=no_gate)
    faulted(out, 8, 0)


def test_a_bad_stack_is_a_double_fault_on_its_own_stack(whole: str) -> None:
    fault = faulted(run_asm(whole, "mov rsp, rbx; ud2", {"rbx": PAGE + 0x800}, setup=map_page(0)), 8, 0)
    assert fault.cr2 >> 12 == PAGE >> 12
    assert fault.rsp == PAGE + 0x800


def test_no_handlers_at_all_is_a_triple_fault(engine: str) -> None:
    def no_idt(machine: Machine) -> None:
        machine.vcpu.set_table("idtr", IDT, 0)

    assert run_asm(engine, "ud2", setup=no_idt).exit == "triple-fault"


def test_a_gate_that_is_not_present_or_beyond_the_limit(whole: str) -> None:
    def absent(machine: Machine) -> None:
        low, high = struct.unpack("<QQ", machine.read(IDT + 0x40 * 16, 16))
        machine.write(IDT + 0x40 * 16, struct.pack("<QQ", low & ~(1 << 47), high))

    faulted(run_asm(whole, "int 0x40", setup=absent), 11, 0x40 * 8 + 2)

    def short(machine: Machine) -> None:
        machine.vcpu.set_table("idtr", IDT, 0x40 * 16 - 1)

    faulted(run_asm(whole, "int 0x40", setup=short), 13, 0x40 * 8 + 2)


def test_single_step_traps_behind_each_instruction(engine: str) -> None:
    handler = f"mov r15, [rsp]; mov [{DATA}+r14*8], r15; inc r14; iretq"
    source = (
        "pushfq; or qword ptr [rsp], 0x100; popfq; nop; mov eax, 1; pushfq; pop rax;"
        "pushfq; and qword ptr [rsp], -257; popfq; nop"
    )
    out = run_asm(engine, source, memory={DATA: bytes(128)}, handlers={1: handler})
    done(out)
    steps = [rip - CODE for rip in struct.unpack("<16Q", out.memory[DATA]) if rip]
    assert steps[:5] == [11, 16, 17, 18, 19]
    assert out["rax"] & TF
    assert out["r14"] == 7, "the last is behind the POPF that clears TF"


def test_int3_from_user_code_and_into_other_vectors(engine: str) -> None:
    assert faulted(run_asm(engine, "int3", cpl=3), 3).rip == CODE + 1
    if not paravirtual(engine):
        faulted(run_asm(engine, "int 0x80", cpl=3), 0x80)
        faulted(run_asm(engine, "int 13", cpl=3), 13, 13 * 8 + 2)
        faulted(run_asm(engine, "int 0x21", cpl=3), 0x21)


def test_device_not_available(whole: str) -> None:
    def task_switched(machine: Machine) -> None:
        machine.vcpu.set("cr0", machine.vcpu.get("cr0") | 8)

    for source in ("fld1", "paddd xmm0, xmm1", "movups xmm0, [rbx]"):
        for cpl in (0, 3):
            assert faulted(run_asm(whole, source, {"rbx": DATA}, cpl=cpl, setup=task_switched), 7).rip == CODE
    done(run_asm(whole, "clts; fld1; movups xmm0, [rbx]", {"rbx": DATA}, setup=task_switched))


def test_floating_point_exceptions(whole: str) -> None:
    fault = faulted(
        run_asm(whole, f"fninit; fldcw [{DATA}]; fld1; fldz; fdivp; nop; fwait", memory={DATA: b"\x7b\3"}, cpl=3), 16
    )
    assert fault.rip > CODE + 8
    source = f"ldmxcsr [{DATA}]; xorps xmm0, xmm0; movd xmm1, eax; divss xmm1, xmm0"
    faulted(run_asm(whole, source, {"rax": 0x3F80_0000}, {DATA: struct.pack("<I", 0x1D80)}, cpl=3), 19)


def test_alignment_check_in_user_code_alone(whole: str) -> None:
    def check(machine: Machine) -> None:
        machine.vcpu.set("cr0", machine.vcpu.get("cr0") | 1 << 18)
        machine.vcpu.set("rflags", machine.vcpu.get("rflags") | AC)

    faulted(run_asm(whole, "mov eax, [rbx]", {"rbx": DATA + 1}, cpl=3, setup=check), 17, 0)
    done(run_asm(whole, "mov eax, [rbx]; mov al, [rbx+2]", {"rbx": DATA}, cpl=3, setup=check))
    done(run_asm(whole, "mov eax, [rbx]", {"rbx": DATA + 1}, cpl=0, setup=check))


def test_misaligned_sse_operands(whole: str) -> None:
    faulted(run_asm(whole, "movaps xmm0, [rbx]", {"rbx": DATA + 8}, cpl=3), 13, 0)
    faulted(run_asm(whole, "paddd xmm0, [rbx]", {"rbx": DATA + 4}, cpl=3), 13, 0)


# -- INT, IRET, SYSCALL ------------------------------------------------------------------------------------------------


def test_int_n_and_iret_restore_everything(whole: str) -> None:
    handler = "mov r10, [rsp]; mov r11, [rsp+8]; mov r15, [rsp+16]; mov rbx, rsp; iretq"
    out = done(run_asm(whole, "stc; int 0x40; setc al", {"rflags": 0x202}, handlers={0x40: handler}))
    assert (out["r10"], out["r11"], out["r15"] & 0x201, out["rax"]) == (CODE + 3, KCODE64, 0x201, 1)
    assert (out["rbx"], out["rsp"]) == (STACK - 40, STACK)
    assert out.rflags & IF


def test_iret_to_user_code_and_back(whole: str) -> None:
    user = 0x18000

    def setup(machine: Machine) -> None:
        machine.write(user, assemble("mov eax, cs; mov ebx, ss; mov rdx, rsp; ud2", user, 64))

    out = run_asm(
        whole, f"push {UDATA}; push {STACK - 0x100}; push 0x202; push {UCODE64}; push {user}; iretq", setup=setup
    )
    fault = faulted(out, 6)
    assert (out["rax"], out["rbx"], out["rdx"]) == (UCODE64, UDATA, STACK - 0x100)
    assert (fault.cs, fault.rflags & IF) == (UCODE64, IF)


def test_iret_to_32_bit_code(engine: str) -> None:
    user = 0x18000

    def setup(machine: Machine) -> None:
        machine.write(user, assemble("mov eax, cs; inc ecx; push 5; pop ebx; mov edx, esp; .byte 0x40; ud2", user, 32))

    out = run_asm(
        engine, f"or rcx, -1; push {UDATA}; push {STACK}; push 0x202; push {UCODE32}; push {user}; iretq", setup=setup
    )
    fault = faulted(out, 6)
    assert (out["rax"], out["rcx"], out["rbx"], out["rdx"]) == (UCODE32 + 1, 0, 5, STACK), "40 is INC EAX there"
    assert fault.cs == UCODE32


def test_iret_refuses_bad_targets(whole: str) -> None:
    faulted(run_asm(whole, f"push {KDATA}; push 0; push 2; push {KDATA}; push {CODE}; iretq"), 13, KDATA)
    faulted(run_asm(whole, f"push {KDATA}; push 0; push 2; push 0; push {CODE}; iretq"), 13, 0)


def set_syscall(machine: Machine) -> None:
    machine.vcpu.set("star", (UCODE32 << 16 | KCODE64) << 32)
    machine.vcpu.set("lstar", 0x18000)
    machine.vcpu.set("sfmask", 0x300)


def test_syscall_and_sysret(whole: str) -> None:
    def setup(machine: Machine) -> None:
        set_syscall(machine)
        machine.write(
            0x18000,
            assemble("mov r8d, cs; mov r9d, ss; mov r14, rcx; pushfq; pop r15; mov r13, r11; sysretq", 0x18000, 64),
        )

    out = done(run_asm(whole, "stc; syscall; mov eax, cs; mov ebx, ss; setc dl", {"rflags": 0x202}, cpl=3, setup=setup))
    assert (out["r8"], out["r9"], out["r14"]) == (KCODE64, KDATA, CODE + 3)
    assert (out["r13"] & 0x201, out["r15"] & 0x201) == (0x201, 1)
    assert (out["rax"], out["rbx"], out["rdx"]) == (UCODE64, UDATA, 1)
    assert out.rflags & IF
    assert out["rsp"] == STACK, "SYSCALL does not switch stacks"


def test_syscall_needs_sce(whole: str) -> None:
    def off(machine: Machine) -> None:
        machine.vcpu.set("efer", machine.vcpu.get("efer") & ~1)

    faulted(run_asm(whole, "syscall", cpl=3, setup=off), 6)


def test_far_call_return_and_jump(engine: str) -> None:
    out = done(
        run_asm(
            engine,
            f"""
            mov dword ptr [{DATA}], offset 1f; mov word ptr [{DATA + 4}], {KCODE64}
            call fword ptr [{DATA}]; jmp 2f
            1: mov rax, [rsp]; retf
            2: push {KCODE64}; lea rbx, [rip+3f]; push rbx; retfq; ud2
            3: mov dword ptr [{DATA}], offset 4f; jmp fword ptr [{DATA}]; ud2
            4: mov ecx, 9
            """,
            memory={DATA: bytes(16)},
        )
    )
    assert (out["rcx"], out["rsp"]) == (9, STACK)


# -- segments, tables, system registers --------------------------------------------------------------------------------


def test_segment_bases_of_fs_and_gs(engine: str) -> None:
    out = done(
        run_asm(
            engine,
            f"""
            mov ecx, 0xc0000100; mov eax, {DATA}; xor edx, edx; wrmsr
            mov ecx, 0xc0000101; mov eax, {DATA + 8}; wrmsr
            mov ecx, 0xc0000102; mov eax, {DATA + 16}; wrmsr
            mov rax, fs:[0]; mov rbx, gs:[0]; swapgs; mov rsi, gs:[0]; mov r15d, 1; mov rdi, gs:[r15*8]
            mov qword ptr fs:[32], 7; add r10, fs:[r15*8+24]; lea r11, fs:[r15]
            """,
            memory={DATA: struct.pack("<5Q", 11, 22, 33, 44, 0)},
        )
    )
    assert [out[name] for name in ("rax", "rbx", "rsi", "rdi", "r10", "r11")] == [11, 22, 33, 44, 7, 1]


def test_loading_a_segment_loads_its_base_and_limit(engine: str) -> None:
    def setup(machine: Machine) -> None:
        base = DATA
        machine.write(GDT + 0x60, struct.pack("<Q", 0x0040_F300_0000_00FF | base << 16))
        machine.vcpu.set_table("gdtr", GDT, 0x67)

    out = done(
        run_asm(
            engine,
            "mov ax, 0x63; mov fs, ax; mov ebx, fs:[8]; mov ecx, fs",
            memory={DATA + 8: b"\x77\0\0\0"},
            setup=setup,
        )
    )
    assert (out["rbx"], out["rcx"]) == (0x77, 0x63)


def test_descriptor_table_and_control_register_instructions(engine: str) -> None:
    out = done(
        run_asm(
            engine,
            f"sgdt [{DATA}]; sidt [{DATA + 16}]; str eax; sldt ebx; mov rcx, cr0; mov rdx, cr3; mov rsi, cr4; smsw edi;"
            f"lgdt [{DATA}]; lidt [{DATA + 16}]; mov r8, 0x1234; mov cr2, r8; mov r9, cr2; mov r10, cr8",
            memory={DATA: bytes(32)},
        )
    )
    assert struct.unpack_from("<HQ", out.memory[DATA], 0) == (0x5F, GDT)
    assert struct.unpack_from("<HQ", out.memory[DATA], 16) == (0xFFF, IDT)
    assert (out["rax"], out["rbx"], out["rdx"]) == (0x30, 0, PML4)
    assert out["rcx"] == out["rdi"] == 0x8001_0033
    assert (out["rsi"] & 0x20, out["r9"], out["r10"]) == (0x20, 0x1234, 0)


def test_lar_lsl_verr_verw(whole: str) -> None:
    out = done(run_asm(whole, f"mov ecx, {KDATA}; lar eax, ecx; lsl ebx, ecx; mov ecx, {KCODE64};"
                              "verw cx; setz dl; verr cx; setz dh;"
                              "mov ecx, 0x300; lar esi, ecx; setz r8b"))  # fmt: skip
    assert (out["rax"], out["rbx"]) == (0x00CF_9300 & 0x00F0_FF00, 0xFFFF_FFFF)
    assert (out["rdx"] & 0xFF, out["rdx"] >> 8, out["r8"]) == (0, 1, 0)


@pytest.mark.parametrize(
    ("source", "regs"),
    [
        ("mov cr0, rax", {"rax": 0x8000_0000}),  # PG without PE
        ("mov cr4, rax", {"rax": 0}),  # PAE off in long mode
        ("mov cr4, rax", {"rax": 0x20 | 1 << 40}),
        ("mov cr3, rax", {"rax": 1 << 60}),
        ("mov ecx, 0xc0000080; wrmsr", {"rax": 0xFFFF_FFFF, "rdx": 0}),
        ("mov ecx, 0xc0000082; wrmsr", {"rax": 0, "rdx": 0x8000_0000}),
        ("mov ecx, 0x277; wrmsr", {"rax": 0x0202_0202, "rdx": 0}),
    ],
)
def test_reserved_bits_of_system_registers_are_protected(whole: str, source: str, regs: dict[str, int]) -> None:
    assert faulted(run_asm(whole, source, regs), 13, 0).rip >= CODE


def test_cpuid_says_what_the_monitor_set(engine: str) -> None:
    out = done(run_asm(engine, "xor eax, eax; cpuid; mov r10, rax; mov eax, 0x80000008; cpuid", cpl=0))
    assert (out["r10"], out["rax"]) == (0xD, 0x3028)


def test_rdtsc_counts(whole: str) -> None:
    out = done(
        run_asm(whole, "rdtsc; mov ebx, eax; mov esi, edx; rdtscp; shl rdx, 32; or rax, rdx; shl rsi, 32; or rbx, rsi")
    )
    assert out["rax"] > out["rbx"]


def test_msr_access_of_the_monitors(engine: str) -> None:
    seen = []

    def monitor(machine: Machine, reason: int) -> bool:
        if reason == exits.WRMSR:
            seen.append((machine.vcpu.exit.msr, machine.vcpu.exit.msr_value, machine.vcpu.get("rip")))
            machine.vcpu.complete_wrmsr()
            return True
        if reason == exits.RDMSR:
            machine.vcpu.complete_rdmsr(machine.vcpu.exit.msr << 32 | 7)
            return True
        return False

    out = done(run_asm(engine, "mov ecx, 0x1b; mov eax, 5; mov edx, 6; wrmsr; rdmsr; mov r15, rdx", hook=monitor))
    assert seen == [(0x1B, 6 << 32 | 5, CODE + 15)]
    assert (out["rax"], out["r15"]) == (7, 0x1B)


def test_input_and_output(engine: str) -> None:
    def values(machine: Machine) -> None:
        machine.inputs = {0x60: 0xAB, 0x1234: 0x1122_3344}

    out = done(run_asm(engine, "mov rax, -1; in al, 0x60; mov rbx, rax; mov dx, 0x1234; in eax, dx;"
                               "mov rcx, rax; in ax, dx;"
                               "out 0x61, al; out dx, ax; out dx, eax", setup=values))  # fmt: skip
    assert (out["rbx"], out["rcx"]) == (M & ~0xFF | 0xAB, 0x1122_3344)
    assert out.io == [(0x61, 1, 0x44), (0x1234, 2, 0x3344), (0x1234, 4, 0x1122_3344)]


def test_the_io_permission_map_opens_ports_to_user_code(whole: str) -> None:
    def open_80(machine: Machine) -> None:
        machine.write(TSS + 0x68, b"\xff" * 16 + b"\xfe\xff\xff")
        machine.vcpu.set_segment("tr", Segment(0x30, TSS, 0x68 + 18, 0x8B))
        machine.vcpu.set("rflags", 2)

    out = run_asm(whole, "out 0x80, al; out 0x81, al", {"rax": 5}, cpl=3, setup=open_80)
    assert out.io == [(0x80, 1, 5)]
    assert faulted(out, 13, 0).rip == CODE + 2


def test_zero_flag_of_verr_is_all_that_changes(whole: str) -> None:
    out = done(run_asm(whole, f"push 0x8d5; popfq; mov ecx, {KDATA}; verw cx"))
    assert out.flags == 0x8D5 | ZF
