"""Microcode: the stack, near branches and decimal arithmetic, one instruction at a time."""

from __future__ import annotations

import struct

import asm
import pytest
from bare import (
    AC,
    AF,
    CF,
    CODE,
    DATA,
    DE,
    DF,
    GP,
    IF,
    KDATA,
    KDATA16,
    NT,
    OF,
    PF,
    SF,
    SS,
    STACK,
    TF,
    UDATA,
    ZF,
    Machine,
    probe,
)

pytestmark = pytest.mark.skipif(bool(asm.MISSING), reason=str(asm.MISSING))


@pytest.fixture
def m() -> Machine:
    return Machine()


# --- the stack -------------------------------------------------------------------------------------------------------


def test_pop_addresses_memory_by_the_moved_stack_pointer(m: Machine) -> None:
    m.p.poke(STACK, struct.pack("<Q", 0x1234))
    m.ok("pop qword ptr [rsp + 8]")
    assert m.words(STACK + 16, 1) == (0x1234,)
    m.page(DATA, 0)
    m.p.set(rdi=DATA)
    before = m.rsp
    assert m.run("pop qword ptr [rdi]") == probe.FAULT
    assert m.rsp == before


def test_push_and_pop_of_segment_registers(m: Machine) -> None:
    m.ok("push fs")
    assert m.words(STACK - 8, 1) == (KDATA,)
    m.p.poke(STACK - 8, struct.pack("<Q", UDATA))
    m.ok("pop gs")
    assert m.get("gs", "rsp") == (UDATA, STACK)
    m.p.poke(STACK, struct.pack("<Q", 0x1000))
    assert m.faults("pop gs") == (GP, 0x1000)


def test_push_and_pop_fall_back_forms(m: Machine) -> None:
    m.p.set(rax=0x1122334455667788)
    m.ok("push rax", "push -2", "push ax", "pop cx", "pop rdx", "pop rbx", "push rsp", "pop rsi")
    assert m.get("rcx", "rdx", "rbx", "rsi", "rsp") == (0x7788, (1 << 64) - 2, 0x1122334455667788, STACK, STACK)
    m.ok("push rbx", "pop rsp")
    assert m.rsp == 0x1122334455667788


@pytest.mark.parametrize(
    ("cpl", "iopl", "changes"),
    [(0, 0, IF | 0x3000), (3, 0, 0), (3, 3, IF)],
)
def test_popf_changes_what_privilege_allows(cpl: int, iopl: int, changes: int) -> None:
    m = Machine(64, cpl)
    old = 2 | iopl << 12
    m.p.set(rflags=old)
    m.p.poke(STACK, struct.pack("<Q", 0xFFFFFFFF))
    m.ok("popfq")
    fixed = CF | PF | AF | ZF | SF | TF | DF | OF | NT | AC | 1 << 21 | 2
    assert m.rflags == fixed | changes | (old & 0x3000)
    m.ok("pushfq")
    assert m.words(STACK, 1)[0] == m.rflags


def test_popf_of_16_bits_keeps_the_upper_flags(m: Machine) -> None:
    m.p.set(rflags=2 | AC)
    m.p.poke(STACK, struct.pack("<H", CF))
    m.ok("popf" if m.bits == 16 else "popfw")
    assert m.rflags == 2 | AC | CF


def test_popf_of_ac_changes_the_bank(m: Machine) -> None:
    m.p.poke(STACK, struct.pack("<Q", AC))
    m.ok("popfq")
    assert m.bank == probe.KERNEL_AC


def test_enter_and_leave(m: Machine) -> None:
    m.p.set(rbp=0xB0)
    m.ok("enter 0x20, 0")
    assert m.get("rbp", "rsp") == (STACK - 8, STACK - 0x28)
    m.ok("leave")
    assert m.get("rbp", "rsp") == (0xB0, STACK)
    m.p.set(rbp=DATA + 0x100)
    m.p.poke(DATA + 0xF0, struct.pack("<2Q", 0xAAAA, 0xBBBB))
    m.ok("enter 0x10, 3")
    assert m.words(STACK - 32, 4) == (STACK - 8, 0xAAAA, 0xBBBB, DATA + 0x100)
    assert m.get("rbp", "rsp") == (STACK - 8, STACK - 48)


def test_pusha_and_popa() -> None:
    m = Machine(32)
    names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
    m.p.set(**{name: 0x1000 + n for n, name in enumerate(names) if name != "rsp"})
    before = m.get(*names)
    m.ok("pushad")
    assert m.words(m.rsp, 8, 4) == before[::-1]
    m.p.set(rax=0, rdi=0)
    m.ok("popad")
    assert m.get(*names) == before


def test_16_bit_stack_in_protected_mode() -> None:
    m = Machine(32)
    m.segment("ss", KDATA16, 0x10000, 0xFFFF, 0x93)
    m.p.set(rsp=0xABCD0002, rax=0x11223344)
    assert m.faults("push eax") == (SS, 0)
    m.ok("push ax")
    assert m.rsp == 0xABCD0000
    m.ok("push eax")
    assert m.rsp == 0xABCDFFFC
    assert m.p.peek(0x1FFFC, 4) == b"\x44\x33\x22\x11"


# --- near branches ---------------------------------------------------------------------------------------------------


def test_conditions_are_the_architectures(m: Machine) -> None:
    tests = (
        lambda f: f & OF, lambda f: f & CF, lambda f: f & ZF, lambda f: f & (CF | ZF), lambda f: f & SF,
        lambda f: f & PF, lambda f: bool(f & SF) != bool(f & OF), lambda f: f & ZF or bool(f & SF) != bool(f & OF),
    )  # fmt: skip
    for cc in range(16):
        for bits in range(32):
            flags = sum(f for n, f in enumerate((OF, CF, ZF, SF, PF)) if bits >> n & 1)
            m.p.set(rflags=flags | 2, rip=CODE)
            assert m.p.run(bytes([0x70 + cc, 0x10])) == probe.OK
            taken = bool(tests[cc >> 1](flags)) != bool(cc & 1)
            assert m.rip == CODE + 2 + (0x10 if taken else 0)


def test_near_calls_returns_and_jumps(m: Machine) -> None:
    m.ok("call . + 0x105")
    assert m.get("rip", "rsp") == (CODE + 0x105, STACK - 8)
    m.ok("ret 8")
    assert m.get("rip", "rsp") == (CODE + 5, STACK + 8)
    m.p.set(rax=CODE + 0x50, rdi=DATA)
    m.p.poke(DATA, struct.pack("<Q", CODE + 0x90))
    m.ok("call rax")
    assert m.rip == CODE + 0x50
    m.ok("jmp [rdi]")
    assert m.rip == CODE + 0x90
    m.p.set(rax=1 << 47)
    assert m.faults("jmp rax") == (GP, 0)
    assert m.faults("call rax") == (GP, 0)


def test_loops(m: Machine) -> None:
    m.p.set(rcx=2)
    m.ok("loop . + 0x10")
    assert m.get("rcx", "rip") == (1, CODE + 0x10)
    m.ok("loop . + 0x10")
    assert m.get("rcx", "rip") == (0, CODE + 0x12)
    m.ok("jrcxz . + 0x10")
    assert m.rip == CODE + 0x22
    m.p.set(rcx=5, rflags=2 | ZF)
    m.ok("loopne . + 0x10")
    assert m.get("rcx", "rip") == (4, CODE + 0x24)
    m.p.set(rcx=1 << 32 | 1)
    m.ok("addr32 loop . + 0x10")
    assert m.get("rcx", "rip") == (0, CODE + 0x27)


def test_branch_beyond_the_code_segment_faults() -> None:
    m = Machine(16)
    m.p.set(rip=0xFFF0)
    m.ok("jmp . + 0x20")
    assert m.rip == 0x10
    m = Machine(32)
    m.p.set(cs__limit=0xFFFF, rip=0xFFF0)
    assert m.faults("jmp . + 0x20") == (GP, 0)


# --- decimal arithmetic and relics -----------------------------------------------------------------------------------


def test_decimal_adjustment_after_addition_and_subtraction() -> None:
    m = Machine(32)

    def bcd(n: int) -> int:
        return n // 10 << 4 | n % 10

    for a in range(0, 100, 3):
        for b in range(100):
            x, y = bcd(a), bcd(b)
            m.p.set(rax=x + y & 0xFF, rflags=2 | (CF if x + y > 255 else 0) | (AF if (x & 15) + (y & 15) > 15 else 0))
            m.ok("daa")
            assert (m.rax, bool(m.rflags & CF)) == (bcd((a + b) % 100), a + b > 99)
            m.p.set(rax=x - y & 0xFF, rflags=2 | (CF if x < y else 0) | (AF if x & 15 < y & 15 else 0))
            m.ok("das")
            assert (m.rax, bool(m.rflags & CF)) == (bcd((a - b) % 100), a < b)
            assert bool(m.rflags & ZF) == (m.rax == 0)


def test_ascii_adjustment() -> None:
    m = Machine(32)
    m.p.set(rax=0x20F, rflags=2)
    m.ok("aaa")
    assert (m.rax, m.rflags & (CF | AF)) == (0x305, CF | AF)
    m.p.set(rax=0x2FF, rflags=2 | AF)
    m.ok("aas")
    assert m.rax == 0x109
    m.p.set(rax=77)
    m.ok("aam")
    assert m.rax == 0x707
    m.ok("aad")
    assert m.rax == 77
    assert m.p.run(bytes.fromhex("d400")) == probe.FAULT
    assert m.p.fault() == (DE, None)


def test_bound_arpl_salc_xlat() -> None:
    m = Machine(32)
    m.p.set(rax=5, rbx=DATA)
    m.p.poke(DATA, struct.pack("<2i", -3, 5))
    m.ok("bound eax, [ebx]")
    m.p.set(rax=6)
    assert m.faults("bound eax, [ebx]") == (5, None)
    m.p.set(rax=0x10, rcx=3)
    m.ok("arpl ax, cx")
    assert (m.rax, m.rflags & ZF) == (0x13, ZF)
    m.p.set(rflags=3, rax=0x100)
    assert m.p.run(b"\xd6") == probe.OK
    assert m.rax == 0x1FF
    m.p.poke(DATA + 0xFF, b"\x42")
    m.ok("xlatb")
    assert m.rax == 0x142
