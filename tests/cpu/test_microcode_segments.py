"""Microcode: descriptors, segment registers and far transfers."""

from __future__ import annotations

import struct

import asm
import pytest
from bare import (
    ABSENT,
    CODE,
    CONFORMING,
    DATA,
    EXECONLY,
    GATE,
    GDT,
    GP,
    HANDLER,
    KCODE,
    KCODE32,
    KDATA,
    LDT,
    LDTSEL,
    NP,
    RING0_STACK,
    RODATA,
    SS,
    STACK,
    TASK,
    UCODE,
    UCODE32,
    UD,
    UDATA,
    ZF,
    Machine,
    descriptor,
    probe,
)

pytestmark = pytest.mark.skipif(bool(asm.MISSING), reason=str(asm.MISSING))


@pytest.fixture
def m() -> Machine:
    return Machine()


@pytest.fixture
def user() -> Machine:
    return Machine(cpl=3)


# --- segments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "fault"),
    [(0x1000, (GP, 0x1000)), (EXECONLY, (GP, EXECONLY)), (TASK, (GP, TASK)), (ABSENT, (NP, ABSENT)), (0x84, (GP, 0x84)),
     (KDATA | 3, (GP, KDATA))],
)  # fmt: skip
def test_data_segment_loads_that_fault(m: Machine, selector: int, fault: tuple[int, int]) -> None:
    m.p.set(rax=selector)
    assert m.faults("mov ds, eax") == fault


def test_stack_segment_loads_that_fault(m: Machine) -> None:
    for selector, fault in ((UDATA | 3, UDATA), (KCODE, KCODE), (RODATA, RODATA), (KDATA | 3, KDATA)):
        m.p.set(rax=selector)
        assert m.faults("mov ss, eax") == (GP, fault)
    m.p.set(rax=ABSENT)
    assert m.faults("mov ss, eax") == (SS, ABSENT)
    m.p.set(rax=1)
    assert m.faults("mov ss, eax") == (GP, 0)


def test_null_stack_segment_is_for_64_bit_supervisors_only() -> None:
    for bits, cpl, fine in ((64, 0, True), (64, 3, False), (32, 0, False)):
        m = Machine(bits, cpl)
        m.p.set(rax=cpl)
        if fine:
            m.ok("mov ss, eax")
            assert m.shadow == 2
        else:
            assert m.faults("mov ss, eax") == (GP, 0)


def test_segment_load_fills_the_hidden_part_and_sets_accessed(m: Machine) -> None:
    m.p.set(rax=RODATA | 3)
    m.ok("mov fs, eax")
    assert m.get("fs", "fs.base", "fs.limit", "fs.attr") == (RODATA | 3, 0x12345678, 0xFFF, 0x40F1)
    assert m.words(GDT + RODATA, 1)[0] >> 40 & 1


def test_null_selector_clears_the_base(m: Machine) -> None:
    m.p.set(fs__base=0x7FFF12345678, rax=3)
    m.ok("mov fs, eax")
    assert m.get("fs", "fs.base", "fs.attr") == (3, 0, 0x10000)


def test_cs_cannot_be_moved_to(m: Machine) -> None:
    assert m.p.run(bytes.fromhex("8ec8")) == probe.FAULT
    assert m.p.fault() == (UD, None)


def test_selector_store_sizes(m: Machine) -> None:
    m.p.set(rax=(1 << 64) - 1, rdi=DATA)
    m.ok("mov eax, ds")
    assert m.rax == KDATA
    m.p.set(rax=(1 << 64) - 1)
    m.ok("mov ax, ds")
    assert m.rax == (1 << 64) - 0x10000 | KDATA
    m.p.poke(DATA, b"\xff" * 4)
    m.ok("mov [rdi], ds")
    assert m.p.peek(DATA, 4) == b"\x10\0\xff\xff"


def test_ldt_and_segments_in_it(m: Machine) -> None:
    m.p.set(rax=LDTSEL, rcx=0x0C)
    m.ok("lldt ax")
    assert m.get("ldtr", "ldtr.base", "ldtr.limit", "ldtr.attr") == (LDTSEL, LDT, 0xFF, 0x82)
    m.p.poke(LDT + 8, struct.pack("<Q", descriptor(0x5000, 0xFFFF, 0x92, 0)))
    m.ok("mov es, ecx")
    assert m.get("es", "es.base", "es.attr") == (0x0C, 0x5000, 0x93)
    m.p.set(rax=KDATA)
    assert m.faults("lldt ax") == (GP, KDATA)


def test_task_register_marks_its_descriptor_busy(m: Machine) -> None:
    m.p.set(rax=TASK)
    m.ok("ltr ax")
    assert m.p.get("tr.attr") == 0x8B
    assert m.words(GDT + TASK, 1)[0] >> 40 & 15 == 0xB
    assert m.faults("ltr ax") == (GP, TASK)


def test_lar_lsl_verr_verw(user: Machine) -> None:
    user.p.set(rcx=UDATA | 3)
    user.ok("lar eax, cx", "lsl edx, cx")
    assert user.get("rax", "rdx") == (0xC0F300 | 0 << 16, 0xFFFFFFFF)
    assert user.rflags & ZF
    for source, selector, found in (
        ("lar eax, cx", KDATA, False), ("lsl eax, cx", 0, False), ("lar eax, cx", CONFORMING, True),
        ("verr cx", UDATA, True), ("verw cx", UDATA, True), ("verr cx", RODATA, True), ("verw cx", RODATA, False),
        ("verr cx", KDATA, False), ("verw cx", UCODE, False), ("verr cx", UCODE, True), ("lsl eax, cx", GATE, False),
        ("verr cx", 0x1000, False),
    ):  # fmt: skip
        user.p.set(rcx=selector, rax=0x77)
        user.ok(source)
        assert bool(user.rflags & ZF) == found, (source, selector)
        if not found:
            assert user.rax == 0x77


def test_far_jump_call_and_return(m: Machine) -> None:
    m.p.poke(DATA, struct.pack("<IH", 0x1234, KCODE32))
    m.p.set(rdi=DATA)
    m.ok("call fword ptr [rdi]")
    assert m.get("rip", "cs", "rsp", "cs.attr") == (0x1234, KCODE32, STACK - 8, 0xC09B)
    assert m.words(STACK - 8, 2, 4) == (CODE + 2, KCODE)
    m.bits = 32
    m.ok("retf")
    assert m.get("rip", "cs", "rsp") == (CODE + 2, KCODE, STACK)


def test_far_return_to_the_outer_ring(m: Machine) -> None:
    m.p.poke(STACK, struct.pack("<5Q", CODE + 9, UCODE | 3, 0xAAAA, DATA, UDATA | 3))
    m.ok("rex.w retf 8")
    assert m.get("rip", "cs", "cpl", "rsp", "ss") == (CODE + 9, UCODE | 3, 3, DATA + 8, UDATA | 3)


def test_far_jump_checks(m: Machine) -> None:
    for selector, fault in ((0, (GP, 0)), (KDATA, (GP, KDATA)), (UCODE, (GP, UCODE)), (TASK, (GP, TASK))):
        m.p.poke(DATA, struct.pack("<IH", 0x1234, selector))
        m.p.set(rdi=DATA)
        assert m.faults("jmp fword ptr [rdi]") == fault


def test_call_gate_to_the_inner_ring_in_long_mode(user: Machine) -> None:
    user.p.poke(DATA, struct.pack("<IH", 0, GATE | 3))
    user.p.set(rdi=DATA)
    user.ok("call fword ptr [rdi]")
    assert user.get("rip", "cs", "cpl", "ss", "rsp") == (HANDLER, KCODE, 0, 0, RING0_STACK - 32)
    assert user.words(user.rsp, 4) == (CODE + 2, UCODE | 3, STACK, UDATA | 3)
    user.ok("rex.w retf")
    assert user.get("rip", "cs", "cpl", "ss", "rsp") == (CODE + 2, UCODE | 3, 3, UDATA | 3, STACK)


def test_call_gate_copies_parameters_in_32_bit_mode() -> None:
    m = Machine(32, cpl=3)
    m.p.poke(GDT + GATE + 4, b"\x02")
    m.p.poke(STACK, struct.pack("<2I", 0x1111, 0x2222))
    m.ok(f"call {GATE | 3}:0")
    assert m.get("rip", "cs", "cpl", "ss") == (HANDLER, KCODE32, 0, KDATA)
    assert m.words(m.rsp, 6, 4) == (CODE + 7, UCODE32 | 3, 0x1111, 0x2222, STACK, UDATA | 3)
    m.ok("retf 8")
    assert m.get("rip", "cs", "cpl", "rsp") == (CODE + 7, UCODE32 | 3, 3, STACK + 8)


def test_real_mode_segments_and_far_transfers() -> None:
    m = Machine(16)
    m.p.set(rax=0x1234)
    m.ok("mov ds, ax")
    assert m.get("ds", "ds.base", "ds.limit") == (0x1234, 0x12340, 0xFFFF)
    m.ok("jmp 0x2000:0x10")
    assert m.get("cs", "cs.base", "rip") == (0x2000, 0x20000, 0x10)
    m.ok("call 0x3000:0x20")
    assert m.words(0x7FFC, 2, 2) == (0x15, 0x2000)
    m.ok("retf")
    assert m.get("cs", "rip", "rsp") == (0x2000, 0x15, 0x8000)


def test_protected_mode_entry_from_real_mode() -> None:
    m = Machine(16)
    m.p.set(gdtr__base=GDT, gdtr__limit=0x9F, rax=0x11)
    m.ok("mov cr0, eax")
    assert m.rip == 0x103
    m.ok(f"jmp {KCODE32}:0x1000")
    assert m.get("cs.attr", "rip", "cpl") == (0xC09B, 0x1000, 0)
    m.bits = 32
    m.p.set(rax=KDATA)
    m.ok("mov ss, eax")
    assert m.get("ss.limit", "ss.attr") == (0xFFFFFFFF, 0xC093)


def test_segment_limits_and_types_are_checked() -> None:
    m = Machine(32)
    m.segment("ds", KDATA, 0, 0xFFF, 0x93)
    m.p.set(rbx=0x1000)
    assert m.faults("pop dword ptr [ebx]") == (GP, 0)
    m.p.set(rbx=0xFFD)
    assert m.faults("pop dword ptr [ebx]") == (GP, 0)
    m.p.set(rbx=0xFFC)
    m.ok("pop dword ptr [ebx]")
    m.segment("ds", KDATA, 0, 0xFFF, 0xC097)  # expands down
    m.p.set(rbx=0xFFC)
    assert m.faults("pop dword ptr [ebx]") == (GP, 0)
    m.p.set(rbx=0x1000)
    m.ok("pop dword ptr [ebx]")
    m.segment("ds", KDATA, 0, 0xFFFFFFFF, 0xC091)  # read-only
    assert m.faults("pop dword ptr [ebx]") == (GP, 0)
    m.ok("push dword ptr [ebx]")
    m.segment("ds", 0, 0, 0, 0x10000)
    assert m.faults("push dword ptr [ebx]") == (GP, 0)
    m.segment("ss", KDATA, 0, 0xFFF, 0xC093)
    assert m.faults("push dword ptr cs:[ebx]") == (SS, 0)
