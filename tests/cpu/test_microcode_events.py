"""Microcode: exceptions and interrupts in every mode, IRET, and the fast system calls."""

from __future__ import annotations

import struct

import asm
import pytest
from bare import (
    ABSENT,
    AC,
    BP,
    CF,
    CODE,
    CONFORMING,
    DATA,
    DB,
    DE,
    DF,
    DFLT,
    GP,
    HANDLER,
    IF,
    IST1_STACK,
    KCODE,
    KCODE16,
    KCODE32,
    KDATA,
    NMI,
    NP,
    NT,
    PAGE,
    RF,
    RING0_STACK,
    SS,
    STACK,
    TF,
    TS,
    TSS,
    UCODE,
    UCODE32,
    UD,
    UDATA,
    VM,
    X_EPT,
    X_TRIPLE,
    ZF,
    Machine,
    probe,
)

pytestmark = pytest.mark.skipif(bool(asm.MISSING), reason=str(asm.MISSING))


@pytest.fixture
def m() -> Machine:
    return Machine()


@pytest.fixture
def user() -> Machine:
    return Machine(cpl=3)


# --- exceptions and interrupts in long mode --------------------------------------------------------------------------


def test_page_fault_is_delivered_with_its_frame(m: Machine) -> None:
    m.gate(PAGE)
    m.p.set(rflags=2 | IF | CF, rsp=STACK - 4)
    assert m.p.deliver_exception(PAGE, 2, 0x1234567) == probe.OK
    assert m.get("rip", "cs", "cr2", "cpl", "rflags") == (HANDLER, KCODE, 0x1234567, 0, 2 | CF)
    assert m.rsp == STACK - 16 - 48
    assert m.words(m.rsp, 6) == (2, CODE, KCODE, 2 | IF | CF | RF, STACK - 4, KDATA)
    assert m.ss == KDATA


def test_trap_gate_keeps_interrupts_enabled(m: Machine) -> None:
    m.gate(UD, 0x8F)
    m.p.set(rflags=2 | IF | TF | NT)
    assert m.p.deliver_exception(UD) == probe.OK
    assert m.rflags == 2 | IF
    assert m.rsp == STACK - 40


def test_event_in_user_mode_goes_to_the_ring_0_stack(user: Machine) -> None:
    user.gate(PAGE)
    assert user.p.deliver_exception(PAGE, 6, 0) == probe.OK
    assert user.get("cpl", "cs", "ss", "rsp", "bank") == (0, KCODE, 0, RING0_STACK - 48, probe.KERNEL)
    assert user.p.get("ss.attr") & 0x10000
    assert user.words(user.rsp, 6) == (6, CODE, UCODE | 3, 2 | RF, STACK, UDATA | 3)


def test_interrupt_stack_table(m: Machine) -> None:
    m.gate(0x40, ist=1)
    assert m.p.deliver_interrupt(0x40) == probe.OK
    assert m.get("rsp", "ss") == (IST1_STACK - 40, KDATA)
    assert m.words(m.rsp, 5) == (CODE, KCODE, 2, STACK, KDATA)


def test_iret_undoes_delivery(user: Machine) -> None:
    user.gate(PAGE)
    user.p.set(rflags=2 | IF | ZF | AC)
    before = {k: v for k, v in user.p.state().items() if k != "cr2"}
    assert user.p.deliver_exception(PAGE, 0, 0) == probe.OK
    user.p.set(rsp=user.rsp + 8)
    user.ok("iretq")
    after = user.p.state()
    assert {k: after[k] for k in before} == before | {"rflags": before["rflags"] | RF}


def test_iret_within_ring_0_loads_the_stack(m: Machine) -> None:
    m.p.poke(STACK, struct.pack("<5Q", CODE + 5, KCODE, 2 | IF, 0x123450, KDATA))
    m.ok("iretq")
    assert m.get("rip", "rsp", "rflags", "ss") == (CODE + 5, 0x123450, 2 | IF, KDATA)
    m.p.poke(STACK, struct.pack("<5Q", CODE + 5, KCODE, 2, 0x123450, 0))
    m.p.set(rsp=STACK)
    m.ok("iretq")
    assert m.ss == 0


@pytest.mark.parametrize(
    ("frame", "fault"),
    [
        ((1 << 47, UCODE | 3, 2, STACK, UDATA | 3), (GP, 0)),
        ((CODE, 0, 2, STACK, UDATA | 3), (GP, 0)),
        ((CODE, 0x1000, 2, STACK, UDATA | 3), (GP, 0x1000)),
        ((CODE, KDATA, 2, STACK, KDATA), (GP, KDATA)),
        ((CODE, KCODE | 3, 2, STACK, UDATA | 3), (GP, KCODE)),
        ((CODE, UCODE | 3, 2, STACK, 0), (GP, 0)),
        ((CODE, UCODE | 3, 2, STACK, KDATA), (GP, KDATA)),
        ((CODE, KCODE, 2, STACK, ABSENT), (SS, ABSENT)),
    ],
)
def test_iret_checks_what_it_loads(m: Machine, frame: tuple[int, ...], fault: tuple[int, int]) -> None:
    m.p.poke(STACK, struct.pack("<5Q", *frame))
    assert m.faults("iretq") == fault


def test_iret_to_compatibility_mode(m: Machine) -> None:
    m.p.poke(STACK, struct.pack("<5Q", CODE, UCODE32 | 3, 2, STACK, UDATA | 3))
    m.ok("iretq")
    assert m.get("cpl", "cs", "cs.attr") == (3, UCODE32 | 3, 0xC0FB)


def test_iret_with_nt_is_general_protection(m: Machine) -> None:
    m.p.set(rflags=2 | NT)
    assert m.faults("iretq") == (GP, 0)


def test_iret_cannot_raise_privilege_or_flags(user: Machine) -> None:
    user.p.poke(STACK, struct.pack("<5Q", CODE, KCODE, 2, STACK, KDATA))
    assert user.faults("iretq") == (GP, KCODE)
    user.p.poke(STACK, struct.pack("<5Q", CODE, UCODE | 3, 0x3302, STACK, UDATA | 3))
    user.ok("iretq")
    assert user.rflags == 2 | TF


def test_inner_segments_become_null_on_return(m: Machine) -> None:
    m.p.set(ds=UDATA | 3, ds__attr=0xC0F3)
    m.p.poke(STACK, struct.pack("<5Q", CODE, UCODE | 3, 2, STACK, UDATA | 3))
    m.ok("iretq")
    assert m.get("es", "fs", "gs", "ds") == (0, 0, 0, UDATA | 3)
    assert m.p.get("es.attr") == 0x10000


def test_gates_that_cannot_be_used(m: Machine) -> None:
    m.gate(DFLT)
    for kind, selector, fault in (
        (0x0E, KCODE, (NP, 0x40 * 8 + 3)),
        (0x85, KCODE, (GP, 0x40 * 8 + 3)),
        (0x8E, KDATA, (GP, KDATA | 1)),
        (0x8E, KCODE32, (GP, KCODE32 | 1)),
        (0x8E, 0, (GP, 1)),
        (0x8E, 0x1000, (GP, 0x1000 | 1)),
    ):
        m.gate(0x40, kind, selector)
        m.gate(fault[0])
        m.p.set(rsp=STACK, rip=CODE)
        assert m.p.deliver_interrupt(0x40) == probe.OK
        assert m.words(m.rsp, 2) == (fault[1], CODE)


def test_vector_beyond_the_idt(m: Machine) -> None:
    m.p.set(idtr__limit=16 * 16 - 1)
    m.gate(GP)
    assert m.p.deliver_interrupt(16) == probe.OK
    assert m.words(m.rsp, 1) == (16 * 8 + 3,)


def test_fault_while_a_page_fault_is_delivered_is_a_double_fault(m: Machine) -> None:
    m.gate(DFLT, ist=1)
    m.gate(PAGE)
    m.page(DATA, 0)
    m.p.set(rsp=DATA + 0x808)
    assert m.p.deliver_exception(PAGE, 0, 0x1111) == probe.OK
    assert m.rsp == IST1_STACK - 48
    assert m.words(m.rsp, 6)[0] == 0
    assert m.words(m.rsp, 6)[4] == DATA + 0x808
    assert m.cr2 == DATA + 0x800 - 48


def test_page_fault_while_a_benign_exception_is_delivered_replaces_it(m: Machine) -> None:
    m.gate(UD)
    m.gate(PAGE, ist=1)
    m.page(DATA, 0)
    m.p.set(rsp=DATA + 0x808)
    assert m.p.deliver_exception(UD) == probe.OK
    assert m.words(m.rsp, 2) == (2, CODE)
    assert m.cr2 == DATA + 0x800 - 40


def test_page_fault_while_general_protection_is_delivered_replaces_it(m: Machine) -> None:
    m.gate(GP)
    m.gate(PAGE, ist=1)
    m.page(DATA, 0)
    m.p.set(rsp=DATA + 0x808)
    assert m.p.deliver_exception(GP, 0) == probe.OK
    assert m.words(m.rsp, 1) == (2,)


def test_two_contributory_exceptions_are_a_double_fault(m: Machine) -> None:
    m.gate(DFLT)
    assert m.p.deliver_exception(DE) == probe.OK  # there is no #DE gate: #NP while #DE is delivered
    assert m.words(m.rsp, 2) == (0, CODE)


def test_fault_while_a_double_fault_is_delivered_is_a_triple_fault(m: Machine) -> None:
    before = m.p.state()
    assert m.p.deliver_exception(GP, 0) == probe.EXIT
    assert m.p.exit()["reason"] == X_TRIPLE
    assert m.p.state() == before


def test_stack_that_is_not_canonical_is_a_stack_fault(m: Machine) -> None:
    m.gate(0x40)
    m.gate(SS, ist=1)
    m.p.set(rsp=1 << 63)
    assert m.p.deliver_interrupt(0x40) == probe.OK
    assert m.words(m.rsp, 2) == (1, CODE)


def test_delivery_to_memory_without_ept_mapping_exits_and_can_be_repeated(m: Machine) -> None:
    m.gate(PAGE)
    before = m.p.state()
    m.p.ept_map(CODE, 0, 0, 2 << 20)  # the frame is just below STACK
    m.p.flush_ept()
    assert m.p.deliver_exception(PAGE, 2, 0x5000) == probe.EXIT
    assert m.p.exit()["reason"] == X_EPT
    assert {**m.p.state(), "cr2": 0} == before
    m.p.ept_map(CODE, CODE, 7, 2 << 20)
    assert m.p.deliver_exception() == probe.OK


def test_nmi_blocks_others_until_iret(m: Machine) -> None:
    m.gate(NMI)
    assert m.p.deliver_interrupt(NMI) == probe.OK
    assert m.nmi_blocked == 1
    m.ok("iretq")
    assert m.nmi_blocked == 0


def test_software_interrupt_obeys_the_gates_dpl(user: Machine) -> None:
    user.gate(0x40)
    assert user.faults("int 0x40") == (GP, 0x40 * 8 + 2)
    user.gate(0x40, 0xEE)
    user.ok("int 0x40")
    assert user.get("rip", "cpl") == (HANDLER, 0)
    assert user.words(user.rsp, 1) == (CODE + 2,)


def test_breakpoint_pushes_the_next_address(user: Machine) -> None:
    user.gate(BP, 0xEF)
    user.ok("int3")
    assert user.words(user.rsp, 3) == (CODE + 1, UCODE | 3, 2)


def test_icebp_ignores_the_gates_dpl(user: Machine) -> None:
    user.gate(DB)
    user.ok("int1")
    assert user.words(user.rsp, 1) == (CODE + 1,)


def test_bank_follows_privilege_and_ac(user: Machine) -> None:
    assert user.bank == probe.USER
    user.gate(0x40)
    user.p.set(rflags=2 | AC)
    user.p.deliver_interrupt(0x40)
    assert user.bank == probe.KERNEL_AC
    user.ok("clac")
    assert user.bank == probe.KERNEL
    user.ok("stac")
    assert user.bank == probe.KERNEL_AC


# --- 32-bit, real and virtual-8086 mode ------------------------------------------------------------------------------


def test_32_bit_interrupt_from_ring_3_and_back() -> None:
    m = Machine(32, cpl=3)
    m.gate(GP)
    before = m.p.state()
    assert m.p.deliver_exception(GP, 0x50) == probe.OK
    assert m.get("rip", "cs", "cpl", "ss", "rsp") == (HANDLER, KCODE32, 0, KDATA, RING0_STACK - 24)
    assert m.words(m.rsp, 6, 4) == (0x50, CODE, UCODE32 | 3, 2 | RF, STACK, UDATA | 3)
    m.p.set(rsp=m.rsp + 4)
    m.ok("iretd")
    assert m.p.state() == before | {"rflags": 2 | RF}


def test_32_bit_interrupt_within_ring_0() -> None:
    m = Machine(32)
    m.gate(0x20, 0x8F)
    m.p.set(rflags=2 | IF)
    assert m.p.deliver_interrupt(0x20) == probe.OK
    assert m.words(m.rsp, 3, 4) == (CODE, KCODE32, 2 | IF)
    assert m.rflags & IF
    m.ok("iretd")
    assert m.get("rip", "rsp") == (CODE, STACK)


def test_16_bit_gate() -> None:
    m = Machine(32)
    m.gate(0x20, 0x86, KCODE16, to=0x1234)
    m.p.set(rip=0x5678)
    assert m.p.deliver_interrupt(0x20) == probe.OK
    assert m.rip == 0x1234
    assert m.words(m.rsp, 3, 2) == (0x5678, KCODE32, 2)


def test_missing_inner_stack_is_an_invalid_tss() -> None:
    m = Machine(32, cpl=3)
    m.gate(0x20)
    m.gate(TS, 0x8E, CONFORMING)
    m.p.poke(TSS + 8, struct.pack("<I", 0))
    assert m.p.deliver_interrupt(0x20) == probe.OK
    assert m.cpl == 3
    assert m.words(m.rsp, 2, 4) == (1, CODE)


def test_virtual_8086_interrupt_and_return() -> None:
    m = Machine(32)
    m.gate(GP)
    m.p.set(rflags=0x3002 | VM | IF, cpl=3, rip=0x100, rsp=0x2000)
    for n, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs")):
        m.segment(name, 0x1000 + n, (0x1000 + n) << 4, 0xFFFF, 0xF3)
    before = m.p.state()
    assert m.p.deliver_exception(GP, 0) == probe.OK
    assert m.get("cpl", "es", "gs", "ss") == (0, 0, 0, KDATA)
    assert not m.rflags & VM
    frame = m.words(m.rsp, 10, 4)
    assert frame == (0, 0x100, 0x1001, 0x3002 | VM | IF | RF, 0x2000, 0x1002, 0x1000, 0x1003, 0x1004, 0x1005)
    m.p.set(rsp=m.rsp + 4)
    m.ok("iretd")
    assert m.p.state() == before | {"rflags": before["rflags"] | RF}


def test_virtual_8086_needs_iopl_3() -> None:
    m = Machine(32)
    m.p.set(rflags=2 | VM, cpl=3)
    for source in ("int 0x20", "pushfd", "popfd", "iretd", "cli", "sti"):
        assert m.run(source) == probe.FAULT
        assert m.p.fault() == (GP, 0)


VIF, VIP, IOPL, VME, PVI = 1 << 19, 1 << 20, 0x3000, 1, 2
IO_MAP = 0x88


def virtual(flags: int, cr4: int = VME) -> Machine:
    """A virtual-8086 program at 1000:100 with its stack at 2000:1000, and a redirection bitmap of ones."""
    m = Machine(32)
    for n, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs")):
        at = {"cs": 0x1000, "ss": 0x2000}.get(name, 0x3000 + n)
        m.segment(name, at, at << 4, 0xFFFF, 0xF3)
    m.p.set(rflags=2 | VM | flags, cpl=3, rip=0x100, rsp=0x1000, cr4=cr4)
    m.p.poke(TSS + 0x66, struct.pack("<H", IO_MAP))
    m.p.poke(TSS + IO_MAP - 32, b"\xff" * 32)
    return m


def real(m: Machine, source: str) -> int:
    """A 16-bit instruction: the Machine would assemble for 32 bits."""
    result: int = m.p.run(asm.assemble(source, 0, 16))
    return result


@pytest.mark.parametrize(("source", "before", "after"), [("cli", VIF, 0), ("sti", 0, VIF), ("cli", VIF | VIP, VIP)])
def test_cli_and_sti_work_on_the_virtual_flag(source: str, before: int, after: int) -> None:
    m = virtual(before | IF)
    assert real(m, source) == probe.OK
    assert (m.rflags, m.rip, m.shadow) == (2 | VM | IF | after, 0x101, 0)
    assert real(virtual(before | IF, 0), source) == probe.FAULT, "CR4.VME is clear"
    m = virtual(before | IF | IOPL)
    assert real(m, source) == probe.OK
    assert m.rflags & (VIF | IF) == before & VIF | (IF if source == "sti" else 0), "IOPL 3: the real flag"
    user = Machine(32, cpl=3)
    user.p.set(rflags=2 | before, cr4=PVI)
    user.ok(source)
    assert user.rflags == 2 | after
    user.p.set(cr4=VME)
    assert user.run(source) == probe.FAULT


def test_a_pending_virtual_interrupt_faults_where_the_flag_would_be_set() -> None:
    for source in ("sti", "popf", "iret"):
        m = virtual(VIP)
        m.p.poke(0x21000, struct.pack("<3H", IF if source == "popf" else 0x111, 0x1000, IF))
        assert m.p.run(asm.assemble(source, 0, 16)) == probe.FAULT
        assert m.p.fault() == (GP, 0)
        assert m.rsp == 0x1000


def test_pushf_and_popf_see_the_virtual_flag() -> None:
    m = virtual(VIF | CF)
    assert real(m, "pushf") == probe.OK
    assert m.words(0x20FFE, 1, 2) == (2 | CF | IF | IOPL,)
    m = virtual(IF)
    assert real(m, "pushf") == probe.OK
    assert m.words(0x20FFE, 1, 2) == (2 | IOPL,)
    m = virtual(0)
    m.p.poke(0x21000, struct.pack("<H", IF | IOPL | ZF | NT))
    assert real(m, "popf") == probe.OK
    assert m.rflags == 2 | VM | VIF | ZF | NT
    m = virtual(0)
    m.p.poke(0x21000, struct.pack("<H", TF))
    assert real(m, "popf") == probe.FAULT
    for source in ("pushfd", "popfd"):
        assert real(virtual(0), source) == probe.FAULT


def test_iret_loads_the_virtual_flag() -> None:
    m = virtual(IF)
    m.p.poke(0x21000, struct.pack("<3H", 0x234, 0x4000, IF | CF))
    assert real(m, "iret") == probe.OK
    assert (m.rip, m.cs, m.rsp, m.rflags) == (0x234, 0x4000, 0x1006, 2 | VM | IF | VIF | CF)
    assert real(virtual(0), "iretd") == probe.FAULT


def test_int_is_redirected_where_the_bitmap_says_so() -> None:
    m = virtual(VIF | IF | CF)
    m.p.poke(0x21 * 4, struct.pack("<HH", 0x1234, 0x5678))
    m.p.poke(TSS + IO_MAP - 32 + 4, b"\xfd")
    assert real(m, "int 0x21") == probe.OK
    assert (m.rip, m.cs, m.rsp, m.rflags) == (0x1234, 0x5678, 0xFFA, 2 | VM | IF | CF)
    assert m.words(0x20FFA, 3, 2) == (0x102, 0x1000, 2 | IF | IOPL | CF)
    m = virtual(IOPL | IF | VIF)
    m.p.poke(0x21 * 4, struct.pack("<HH", 0x1234, 0x5678))
    m.p.poke(TSS + IO_MAP - 32 + 4, b"\xfd")
    assert real(m, "int 0x21") == probe.OK
    assert (m.rip, m.rflags) == (0x1234, 2 | VM | IOPL | VIF)
    assert m.words(0x20FFA, 3, 2) == (0x102, 0x1000, 2 | IF | IOPL)


def test_int_is_not_redirected_where_the_bitmap_has_a_one() -> None:
    m = virtual(VIF)
    assert real(m, "int 0x21") == probe.FAULT
    assert m.p.fault() == (GP, 0)
    m = virtual(IOPL)
    m.gate(0x21, 0xEE)
    assert real(m, "int 0x21") == probe.OK
    assert (m.rip, m.cs, m.cpl) == (HANDLER, KCODE32, 0)
    m = virtual(0)
    m.p.poke(TSS + 0x66, struct.pack("<H", 0x3000))
    assert real(m, "int 0x21") == probe.FAULT, "the bitmap is beyond the TSS's limit"
    m = virtual(VIF)
    m.gate(3, 0xEE)
    assert real(m, "int3") == probe.OK, "neither IOPL nor the bitmap matters"
    assert m.cpl == 0


AMD, INTEL = (0x68747541, 0x444D4163, 0x69746E65), (0x756E6547, 0x6C65746E, 0x49656E69)


def vendor(m: Machine, name: tuple[int, int, int]) -> None:
    m.p.set_cpuid([(0, None, 1, *name), (1, None, 0, 0, 0, 0)])


def test_syscall_outside_of_64_bit_mode_is_amds() -> None:
    for name, works in ((AMD, True), (INTEL, False)):
        m = Machine(cpl=3)
        vendor(m, name)
        m.segment("cs", UCODE32 | 3, 0, 0xFFFFFFFF, 0xC0FB)
        m.p.set(star=KCODE << 32 | 0x18 << 48, cstar=0xFFFF800000001000, lstar=5, sfmask=IF, rflags=2 | IF | CF)
        assert m.p.run(b"\x0f\x05") == (probe.OK if works else probe.FAULT)
        if works:
            assert m.get("rip", "rcx", "r11", "cs", "ss") == (
                0xFFFF800000001000, CODE + 2, 2 | IF | CF, KCODE, KDATA,
            )  # fmt: skip
            assert (m.rflags, m.cpl) == (2 | CF, 0)
            m.p.set(rcx=0x1234)
            assert m.p.run(b"\x0f\x07") == probe.OK
            assert (m.rip, m.cs, m.cpl, m.rflags) == (0x1234, 0x1B, 3, 2 | IF | CF)
        else:
            assert m.p.fault() == (UD, None)


def test_syscall_in_legacy_mode() -> None:
    m = Machine(32, cpl=3)
    vendor(m, AMD)
    m.p.set(efer=1, star=0x123456 | KCODE32 << 32 | 0x18 << 48, rflags=2 | IF)
    assert m.p.run(b"\x0f\x05") == probe.OK
    assert m.get("rip", "rcx", "cs", "cs.attr", "cpl", "rflags") == (0x123456, CODE + 2, KCODE32, 0xC09B, 0, 2)
    m.ok("sysret")
    assert m.get("rip", "cs", "cpl", "rflags") == (CODE + 2, 0x1B, 3, 2 | IF)


def test_sysret_to_a_bad_address_faults_at_the_target_on_amd(m: Machine) -> None:
    vendor(m, AMD)
    m.p.set(rcx=1 << 50, r11=2, star=0x18 << 48)
    m.ok("sysretq")
    assert (m.rip, m.cpl) == (1 << 50, 3)
    vendor(m, INTEL)
    m.ring(0)
    assert m.run("sysretq") == probe.FAULT


def test_sysenter_in_long_mode_is_intels(m: Machine) -> None:
    m.p.set(sysenter_cs=KCODE)
    vendor(m, AMD)
    for code in (b"\x0f\x34", b"\x0f\x35"):
        assert m.p.run(code) == probe.FAULT
        assert m.p.fault() == (UD, None)
    vendor(m, INTEL)
    m.ok("sysenter")


def test_iret_ends_the_blocking_of_nmi_even_if_it_faults(m: Machine) -> None:
    m.p.set(nmi_blocked=1, rflags=2 | NT)
    assert m.run("iretq") == probe.FAULT
    assert m.nmi_blocked == 0


def test_real_mode_interrupt_and_return() -> None:
    m = Machine(16)
    m.p.poke(0x21 * 4, struct.pack("<HH", 0x1234, 0x5678))
    m.segment("ss", 0x3000, 0x30000, 0xFFFF, 0x93)
    m.p.set(rflags=2 | IF | CF)
    m.ok("int 0x21")
    assert m.get("rip", "cs", "cs.base", "rsp", "rflags") == (0x1234, 0x5678, 0x56780, 0x7FFA, 2 | CF)
    assert m.words(0x37FFA, 3, 2) == (0x102, 0, 2 | IF | CF)
    m.ok("iret")
    assert m.get("rip", "cs", "rsp", "rflags") == (0x102, 0, 0x8000, 2 | IF | CF)


def test_real_mode_vector_beyond_the_table_ends_in_a_triple_fault() -> None:
    m = Machine(16)
    m.p.set(idtr__limit=3)
    assert m.p.deliver_exception(UD) == probe.EXIT
    assert m.p.exit()["reason"] == X_TRIPLE


# --- fast system calls -----------------------------------------------------------------------------------------------


def test_syscall_and_sysret(user: Machine) -> None:
    user.p.set(star=(UCODE32 << 48) | (KCODE << 32), lstar=HANDLER, sfmask=IF | AC | DF, rflags=2 | IF | CF | AC)
    before = user.p.state()
    user.ok("syscall")
    assert user.get("rip", "rcx", "r11", "rflags", "cpl") == (HANDLER, CODE + 2, 2 | IF | CF | AC, 2 | CF, 0)
    assert user.get("cs", "ss", "cs.attr", "ss.attr", "bank") == (KCODE, KDATA, 0xA09B, 0xC093, probe.KERNEL)
    user.ok("sysretq")
    changed = {"rip": CODE + 2, "rcx": CODE + 2, "r11": 2 | IF | CF | AC}
    assert user.p.state() == before | changed


def test_sysret_to_compatibility_mode(m: Machine) -> None:
    m.p.set(star=UCODE32 << 48, rcx=0x1_0000_1234, r11=2)
    m.ok("sysretd")
    assert m.get("rip", "cs", "ss", "cs.attr", "cpl") == (0x1234, UCODE32 | 3, UDATA | 3, 0xC0FB, 3)


def test_sysret_to_a_bad_address_faults_in_ring_0(m: Machine) -> None:
    m.p.set(rcx=1 << 47)
    assert m.faults("sysretq") == (GP, 0)


def test_syscall_must_be_enabled(user: Machine) -> None:
    user.p.set(efer=0xD00)
    assert user.faults("syscall") == (UD, None)
    assert user.faults("sysretq") == (UD, None)
    user.p.set(efer=0xD01)
    assert user.faults("sysretq") == (GP, 0)


def test_sysenter_and_sysexit() -> None:
    m = Machine(32, cpl=3)
    assert m.faults("sysenter") == (GP, 0)
    m.p.set(sysenter_cs=0x40, sysenter_esp=RING0_STACK, sysenter_eip=HANDLER, rflags=2 | IF | CF)
    m.ok("sysenter")
    assert m.get("rip", "rsp", "cs", "ss", "cpl", "rflags") == (HANDLER, RING0_STACK, 0x40, 0x48, 0, 2 | CF)
    m.p.set(rcx=STACK, rdx=CODE)
    m.ok("sysexit")
    assert m.get("rip", "rsp", "cs", "ss", "cpl") == (CODE, STACK, 0x53, 0x5B, 3)
