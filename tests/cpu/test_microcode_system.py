"""Microcode: control registers, MSRs, CPUID, ports, and the vector state images."""

from __future__ import annotations

import random
import struct

import asm
import pytest
from bare import (
    CODE,
    DATA,
    DB,
    GP,
    IF,
    NM,
    PAGES,
    RF,
    TSS,
    UD,
    X_CR,
    X_HLT,
    X_IO,
    X_RDMSR,
    X_VMCALL,
    X_WRMSR,
    Machine,
    linear,
    probe,
    shuffled,
)

from pyhyve.vmm import hostcpu

pytestmark = pytest.mark.skipif(bool(asm.MISSING), reason=str(asm.MISSING))


@pytest.fixture
def m() -> Machine:
    return Machine()


@pytest.fixture
def user() -> Machine:
    return Machine(cpl=3)


# --- system registers ------------------------------------------------------------------------------------------------


def test_long_mode_activation() -> None:
    m = Machine(32)
    m.p.set(cr3=PAGES, efer=0x100, rax=0x80000011)
    assert m.faults("mov cr0, eax") == (GP, 0)
    m.p.set(cr4=0x20)
    m.ok("mov cr0, eax")
    assert m.efer == 0x500
    m.p.set(rax=0x11, rip=CODE)
    m.ok("mov cr0, eax")
    assert m.efer == 0x100


def test_control_register_writes_that_fault(m: Machine) -> None:
    for cr, value in (
        (0, 0x80000000), (0, 0x20000011 | 1 << 31), (0, 1 << 32 | 0x80000011), (0, 0x11),
        (4, 0x680), (4, 1 << 13 | 0x6A0), (4, 1 << 23 | 0x6A0), (4, 1 << 12 | 0x6A0), (3, 1 << 46), (3, 1 << 63),
        (8, 16),
    ):  # fmt: skip
        m.p.set(rax=value)
        assert m.faults(f"mov cr{cr}, rax") == (GP, 0), (cr, hex(value))


def test_pcid_needs_a_clear_low_cr3(m: Machine) -> None:
    m.p.set(cr3=PAGES | 1, rax=0x6A0 | 1 << 17)
    assert m.faults("mov cr4, rax") == (GP, 0)
    m.p.set(cr3=PAGES)
    m.ok("mov cr4, rax")
    m.p.set(rax=PAGES | 5 | 1 << 63)
    m.ok("mov cr3, rax")
    assert m.cr3 == PAGES | 5


def test_features_must_be_in_cpuid(m: Machine) -> None:
    m.p.set_cpuid([(1, None, 0, 0, 0, 0), (7, 0, 0, 1 << 7, 0, 0)])
    m.p.set(rax=0x6A0 | 1 << 20)
    m.ok("mov cr4, rax")
    m.p.set(rax=0x6A0 | 1 << 21)
    assert m.faults("mov cr4, rax") == (GP, 0)


def test_system_instructions_are_privileged(user: Machine) -> None:
    user.p.set(rdi=DATA)
    user.p.poke(TSS + 0x68, b"\xff" * 0x2000)
    for source in (
        "mov rax, cr0", "mov cr3, rax", "mov rax, dr7", "hlt", "clts", "lgdt [rdi]", "lidt [rdi]", "lmsw ax", "ltr ax",
        "lldt ax", "invlpg [rdi]", "rdmsr", "wrmsr", "wbinvd", "swapgs", "invpcid rax, [rdi]", "cli", "sti",
        "in al, dx", "out 0x80, al", "insb",
    ):  # fmt: skip
        assert user.faults(source) == (GP, 0), source
    for source in ("stac", "clac"):
        assert user.faults(source) == (UD, None)


def test_cr8_write_exits_at_the_instruction(m: Machine) -> None:
    m.p.set(rax=5)
    x = m.exits("mov cr8, rax")
    assert (x["reason"], x["length"], x["qualification"]) == (X_CR, 4, 8)
    assert m.get("cr8", "rip") == (0, CODE)
    m.p.set(cr8=5)
    m.ok("mov cr8, rax")
    m.ok("mov rcx, cr8")
    assert m.rcx == 5
    m.p.set(rax=0x10)
    assert m.faults("mov cr8, rax") == (GP, 0)


def test_machine_status_word(m: Machine) -> None:
    m.p.set(rax=8)
    m.ok("lmsw ax")
    assert m.cr0 & 15 == 9
    m.ok("clts")
    assert m.cr0 & 15 == 1
    m.ok("smsw ax")
    assert m.rax == m.cr0 & 0xFFFF
    m.p.set(cr4=m.cr4 | 1 << 11)
    m.ring(3)
    assert m.faults("smsw ax") == (GP, 0)


def test_debug_registers(m: Machine) -> None:
    m.p.set(rax=(1 << 64) - 1)
    assert m.faults("mov dr7, rax") == (GP, 0)
    m.ok("mov dr0, rax")
    m.p.set(rax=0xFFFFDFFF)
    m.ok("mov dr7, rax", "mov dr6, rax", "mov rcx, dr7", "mov rdx, dr6", "mov rbx, dr0")
    assert m.get("rcx", "rdx", "rbx") == (0xFFFF0FFF & 0xFFFF23FF | 0x400, 0xFFFFCFFF & ~0x1000, (1 << 64) - 1)
    m.p.set(dr7=0x2400)
    assert m.run("mov rax, dr0") == probe.FAULT
    assert m.p.fault() == (DB, None)
    assert (m.dr6 & 0x200F, m.fault_addr) == (0x2000, RF), "a fault: RF is set in the flags that are pushed"


def test_descriptor_table_registers(m: Machine) -> None:
    m.p.set(rdi=DATA)
    m.p.poke(DATA, struct.pack("<HQ", 0x123, 0xFFFF800012345678))
    m.ok("lidt [rdi]")
    assert m.get("idtr.base", "idtr.limit") == (0xFFFF800012345678, 0x123)
    m.p.poke(DATA + 2, struct.pack("<Q", 1 << 50))
    assert m.faults("lgdt [rdi]") == (GP, 0)
    m.ok("sidt [rdi]")
    assert m.p.peek(DATA, 10) == struct.pack("<HQ", 0x123, 0xFFFF800012345678)
    r = Machine(16)
    r.p.set(rbx=0x600)
    r.p.poke(0x600, struct.pack("<HI", 0x123, 0x12345678))
    r.ok("lgdt [bx]")
    assert r.p.get("gdtr.base") == 0x345678
    r.ok("data32 lgdt [bx]")
    assert r.p.get("gdtr.base") == 0x12345678


def test_model_specific_registers(m: Machine) -> None:
    for msr, name in ((0xC0000082, "lstar"), (0xC0000101, "gs.base"), (0x176, "sysenter_eip"), (0xC0000103, "tsc_aux")):
        m.p.set(rcx=msr, rax=0x12345678, rdx=0)
        m.ok("wrmsr")
        assert m.p.get(name) == 0x12345678
        m.p.set(rax=0)
        m.ok("rdmsr")
        assert m.rax == 0x12345678
    for msr, high in ((0xC0000082, 0x8000), (0xC0000100, 0x8000), (0xC0000103, 1), (0x277, 2), (0xC0000080, 1)):
        m.p.set(rcx=msr, rdx=high, rax=0)
        assert m.faults("wrmsr") == (GP, 0), hex(msr)
    m.p.set(rcx=0x1B, rax=5, rdx=6)
    x = m.exits("wrmsr")
    assert (x["reason"], x["msr"], x["msr_value"], x["length"]) == (X_WRMSR, 0x1B, 6 << 32 | 5, 2)
    assert m.exits("rdmsr")["reason"] == X_RDMSR


def test_long_mode_enable_is_fixed_while_paging(m: Machine) -> None:
    m.p.set(rcx=0xC0000080, rax=0xC01, rdx=0)
    assert m.faults("wrmsr") == (GP, 0)
    m.p.set(rax=0x100)
    m.ok("wrmsr")
    assert m.efer == 0x500


def test_time_stamp_counter_has_the_guests_offset(m: Machine) -> None:
    m.p.set(rcx=0x10, rax=1000, rdx=0)
    x = m.exits("wrmsr")  # the monitor has IA32_TSC_ADJUST, and the timers
    assert (x["reason"], x["msr"], x["msr_value"]) == (X_WRMSR, 0x10, 1000)
    m.p.set(tsc_offset=1000 - hostcpu.rdtsc_function()() & (1 << 64) - 1)
    m.ok("rdtsc")
    assert 1000 <= (m.rdx << 32 | m.rax) < 1000 + 10**9
    m.p.set(tsc_aux=7)
    m.ok("rdtscp")
    assert m.rcx == 7
    m.ok("rdpid rbx")
    assert m.rbx == 7
    m.p.set(cr4=m.cr4 | 4)
    m.ring(3)
    assert m.faults("rdtsc") == (GP, 0)


def test_cpuid_answers_from_the_table(m: Machine) -> None:
    m.p.set_cpuid([(0, None, 0xD, 1, 2, 3), (1, None, 4, 5, 6, 7), (7, 0, 0, 8, 9, 10), (4, 1, 11, 12, 13, 14)])
    for leaf, sub, answer in (
        (0, 99, (0xD, 1, 2, 3)), (1, 0, (4, 5, 6, 7)), (4, 1, (11, 12, 13, 14)), (4, 2, (0, 0, 0, 0)),
        (0x80000000, 0, (0, 0, 0, 0)), (0, 0, (0xD, 1, 2, 3)),
    ):  # fmt: skip
        m.p.set(rax=0xFFFF00000000 | leaf, rcx=sub)
        m.ok("cpuid")
        assert m.get("rax", "rbx", "rcx", "rdx") == answer
    m.p.set(rax=1, cr4=m.cr4 | 1 << 18)
    m.ok("cpuid")
    assert m.rcx == 6 | 1 << 27


def test_cpuid_tells_the_size_of_the_enabled_state(m: Machine) -> None:
    m.p.set_cpuid(
        [(13, 0, 0xE7, 2696, 2696, 0), (13, 1, 7, 2440, 0, 0), (13, 2, 256, 576, 0, 0), (13, 7, 1024, 1664, 0, 0)]
    )
    for xcr0, sizes in ((3, (576, 576)), (7, (832, 832)), (0x87, (2688, 1856))):
        m.p.set(xcr0=xcr0)
        for sub in (0, 1):
            m.p.set(rax=13, rcx=sub)
            m.ok("cpuid")
            assert m.rbx == sizes[sub]


def test_xcr0(m: Machine) -> None:
    assert m.faults("xgetbv") == (UD, None)
    m.p.set(cr4=m.cr4 | 1 << 18, rcx=0, rdx=0)
    for value in (0, 2, 5, 1 << 9 | 3, 1 << 17 | 7, 0x27):
        m.p.set(rax=value)
        assert m.faults("xsetbv") == (GP, 0), value
    m.p.set(rax=3)
    m.ok("xsetbv", "xgetbv")
    assert m.get("rax", "rdx", "xcr0") == (3, 0, 3)


def test_port_access_exits_behind_the_instruction(m: Machine) -> None:
    m.p.set(rax=0x11223344, rdx=0x1F0)
    x = m.exits("out dx, ax")
    assert (x["reason"], x["io_port"], x["io_size"], x["io_in"], x["io_value"]) == (X_IO, 0x1F0, 2, 0, 0x3344)
    assert m.rip == CODE + 2
    x = m.exits("in al, 0x71")
    assert (x["io_port"], x["io_size"], x["io_in"]) == (0x71, 1, 1)
    assert m.exits("in eax, dx")["io_size"] == 4


def test_port_bitmap(user: Machine) -> None:
    user.p.set(rdx=0x3F8)
    user.p.poke(TSS + 0x68, b"\xff" * 0x2000)
    assert user.faults("out dx, al") == (GP, 0)
    user.p.poke(TSS + 0x68 + 0x3F8 // 8, b"\xfe")
    assert user.exits("out dx, al")["reason"] == X_IO
    assert user.faults("out dx, ax") == (GP, 0)
    user.p.set(rflags=0x3002)
    assert user.exits("out dx, ax")["reason"] == X_IO
    user.p.set(rflags=2, tr__limit=0x66)
    assert user.faults("out dx, al") == (GP, 0)


def test_halt_and_interrupt_flag(m: Machine) -> None:
    m.p.set(shadow=0)
    m.ok("sti")
    assert m.get("rflags", "shadow") == (2 | IF, 1)
    m.p.set(shadow=0)
    m.ok("sti")
    assert m.shadow == 0
    m.ok("cli")
    assert m.rflags == 2
    before = m.rip
    assert m.exits("hlt")["reason"] == X_HLT
    assert m.rip == before + 1


def test_hypercall_exits(user: Machine) -> None:
    x = user.exits("vmcall")
    assert (x["reason"], x["length"], user.rip) == (X_VMCALL, 3, CODE)


def test_segment_base_instructions(m: Machine) -> None:
    assert m.faults("rdfsbase rax") == (UD, None)
    m.p.set(cr4=m.cr4 | 1 << 16, rax=0xFFFF800000001234, kernel_gs_base=0x5678)
    m.ok("wrgsbase rax", "swapgs", "rdgsbase rbx")
    assert m.get("rbx", "gs.base", "kernel_gs_base") == (0x5678, 0x5678, 0xFFFF800000001234)
    m.ok("wrfsbase ebx", "rdfsbase ecx")
    assert m.rcx == 0x5678
    m.p.set(rax=1 << 50)
    assert m.faults("wrfsbase rax") == (GP, 0)


@pytest.mark.parametrize("how", ["invlpg [rdi]", "mov cr3, rax", "invpcid rcx, [rsi]", "mov cr4, rbx"])
def test_translations_are_dropped(m: Machine, how: str) -> None:
    m.p.set(rdi=DATA + 0x123, rax=PAGES, rsi=DATA + 0x1000, rbx=m.cr4 ^ 0x80, rcx=0)
    m.p.poke(DATA + 0x1000, struct.pack("<2Q", 0, DATA))
    m.p.fill(DATA)
    assert m.p.tlb(DATA)[0]
    m.ok(how)
    assert not m.p.tlb(DATA)[0]


def test_what_is_not_offered_is_undefined(m: Machine) -> None:
    for code in ("0f01c8", "0f01c9", "0f01ee", "0f01ef", "0f01d9"):
        assert m.p.run(bytes.fromhex(code)) == probe.FAULT
        assert m.p.fault() == (UD, None)


# --- vector state ----------------------------------------------------------------------------------------------------


def fx_image(xmm: int = 0, mxcsr: int = 0x1F80) -> bytes:
    image = bytearray(512)
    struct.pack_into("<HH", image, 0, 0x27F, 0)  # not the initial state
    struct.pack_into("<Q", image, 8, 0xDEAD)
    struct.pack_into("<I", image, 24, mxcsr)
    for n in range(16):
        image[160 + n * 16 : 176 + n * 16] = bytes([xmm + n]) * 16
    return bytes(image)


def test_fxsave_brings_back_what_fxrstor_loaded(m: Machine) -> None:
    m.p.set(rsi=DATA, rdi=DATA + 0x1FF0)
    m.p.poke(DATA, fx_image(0x40))
    m.p.write(DATA + 0x1FF0, b"\xee" * 512)
    m.ok("fxrstor64 [rsi]", "fxsave64 [rdi]")
    stored = linear(m, DATA + 0x1FF0, 512)
    assert stored[160:416] == fx_image(0x40)[160:416]
    assert stored[8:24] == bytes(16)  # host addresses are not shown
    assert stored[416:] == b"\xee" * 96
    assert stored[:2] == b"\x7f\x02"


def test_fxrstor_checks_its_image(m: Machine) -> None:
    m.p.set(rsi=DATA, rdi=DATA + 8)
    m.p.poke(DATA, fx_image(mxcsr=1 << 16))
    assert m.faults("fxrstor64 [rsi]") == (GP, 0)
    assert m.faults("fxsave64 [rdi]") == (GP, 0)
    m.p.set(cr0=m.cr0 | 8)
    assert m.faults("fxsave64 [rsi]") == (NM, None)


def test_xsave_and_xrstor(m: Machine) -> None:
    m.p.set(cr4=m.cr4 | 1 << 18, rsi=DATA, rdi=DATA + 0x1F80, rax=7, rdx=0)
    area = fx_image(0x20) + struct.pack("<8Q", 7, *([0] * 7)) + bytes(range(256))
    m.p.poke(DATA, area)
    m.p.write(DATA + 0x1F80, b"\xff" * 1024)
    m.p.write(DATA + 0x1F80 + 512, struct.pack("<8Q", 1 << 40, *([0] * 7)))
    m.ok("xrstor64 [rsi]", "xsave64 [rdi]")
    stored = linear(m, DATA + 0x1F80, 1024)
    assert stored[160:416] == area[160:416]
    assert stored[576:832] == area[576:832]
    assert struct.unpack_from("<2Q", stored, 512) == (7 | 1 << 40, 0)
    assert stored[464:512] == b"\xff" * 48
    assert stored[832:] == b"\xff" * 192


def test_xsave_of_one_component_leaves_the_others(m: Machine) -> None:
    m.p.set(cr4=m.cr4 | 1 << 18, rsi=DATA, rdi=DATA + 0x1000, rax=7, rdx=0)
    m.p.poke(DATA, fx_image(0x20) + struct.pack("<8Q", 7, *([0] * 7)) + bytes(range(256)))
    m.p.write(DATA + 0x1000, fx_image(0x60) + struct.pack("<8Q", 3, *([0] * 7)) + b"\xaa" * 256)
    m.ok("xrstor64 [rsi]")
    m.p.set(rax=4)
    m.ok("xrstor64 [rsi]", "xsave64 [rdi]")
    stored = linear(m, DATA + 0x1000, 832)
    assert stored[160:416] == fx_image(0x60)[160:416]
    assert stored[576:] == bytes(range(256))
    assert stored[512] == 7


def test_xsavec_writes_the_compacted_form(m: Machine) -> None:
    m.p.set(cr4=m.cr4 | 1 << 18, rsi=DATA, rdi=DATA + 0x1000, rax=7, rdx=0)
    m.p.poke(DATA, fx_image(0x20) + struct.pack("<8Q", 7, *([0] * 7)) + bytes(range(256)))
    m.ok("xrstor64 [rsi]", "xsavec64 [rdi]", "xrstor64 [rdi]", "xsave64 [rsi]")
    assert struct.unpack_from("<2Q", linear(m, DATA + 0x1000 + 512, 16)) == (7, 7 | 1 << 63)
    assert linear(m, DATA + 576, 256) == bytes(range(256))
    assert linear(m, DATA + 160, 256) == fx_image(0x20)[160:416]


@pytest.mark.parametrize(
    ("offset", "value"),
    [(512, 8), (512, 1 << 63), (520, 1), (528, 1), (24, 1 << 20), (520, 1 << 63 | 1), (520, 1 << 63 | 1 << 9)],
)
def test_xrstor_checks_its_header(m: Machine, offset: int, value: int) -> None:
    m.p.set(cr4=m.cr4 | 1 << 18, rsi=DATA, rax=7, rdx=0)
    m.p.poke(DATA, fx_image() + struct.pack("<8Q", 7, *([0] * 7)) + bytes(256))
    m.p.poke(DATA + offset, struct.pack("<Q", value))
    assert m.faults("xrstor64 [rsi]") == (GP, 0)


def test_xsave_needs_osxsave_and_alignment(m: Machine) -> None:
    m.p.set(rdi=DATA, rax=7, rdx=0)
    for source in ("xsave [rdi]", "xrstor [rdi]", "xsavec [rdi]", "xsaveopt [rdi]", "xsaves [rdi]", "xrstors [rdi]"):
        assert m.faults(source) == (UD, None)
    m.p.set(cr4=m.cr4 | 1 << 18, rdi=DATA + 32)
    assert m.faults("xsave [rdi]") == (GP, 0)


def test_x87_environment(m: Machine) -> None:
    m.p.set(rsi=DATA, rdi=DATA + 0x1FF8, rbx=DATA + 0x5000)
    m.p.poke(DATA, struct.pack("<7I", 0x27F, 0x3800, 0xFFFF, 0x1234, 0x5678, 0x9ABC, 0xDEF0))
    m.ok("fldenv [rsi]", "fnstenv [rdi]")
    words = struct.unpack("<7I", linear(m, DATA + 0x1FF8, 28))
    assert [w & 0xFFFF for w in words[:3]] == [0x27F, 0x3800, 0xFFFF]
    assert words[3:] == (0, 0, 0, 0)
    m.ok("fldenv [rsi]", "fnsave [rdi]", "frstor [rdi]", "fnsave [rbx]")
    assert linear(m, DATA + 0x1FF8, 108) == linear(m, DATA + 0x5000, 108)


def test_masked_store_writes_chosen_bytes(m: Machine) -> None:
    shuffled(m)
    image = bytearray(fx_image(0x30))
    image[160:176] = bytes(range(16))
    image[176:192] = bytes([0x80, 0] * 8)
    m.p.write(DATA, bytes(image))
    m.p.write(DATA + 0x2FF8, b"\xff" * 16)
    m.p.set(rsi=DATA, rdi=DATA + 0x2FF8)
    m.ok("fxrstor64 [rsi]", "maskmovdqu xmm0, xmm1")
    assert linear(m, DATA + 0x2FF8, 16) == bytes(n if n % 2 == 0 else 0xFF for n in range(16))
    m.page(DATA + 0x3000, 0)
    m.p.set(rdi=DATA + 0x2FF1)
    assert m.run("fxrstor64 [rsi]", "maskmovdqu xmm0, xmm1") == probe.OK  # byte 15 is not chosen
    m.p.set(rdi=DATA + 0x2FF2)
    assert m.run("fxrstor64 [rsi]", "maskmovdqu xmm0, xmm1") == probe.FAULT


def test_pending_x87_exception_is_raised_in_the_guest(m: Machine) -> None:
    m.p.set(rsi=DATA, rdi=DATA + 64)
    m.p.poke(DATA, struct.pack("<7I", 0x37E, 1, 0xFFFF, 0, 0, 0, 0))
    for waiting in ("fldenv [rsi]", "frstor [rsi]"):
        assert m.run("fldenv [rsi]", waiting) == probe.FAULT
        assert m.p.fault() == (16, None)
    assert m.p.run(*(asm.assemble(s, 0) for s in ("fldenv [rsi]", "maskmovq mm0, mm1"))) == probe.FAULT
    assert m.p.fault() == (16, None)
    m.ok("fldenv [rsi]", "fnstenv [rdi]")


def test_no_image_of_the_guest_makes_the_host_fault(m: Machine) -> None:
    """Random bytes under every loading instruction: R_OK or a guest fault, never a signal."""
    rng = random.Random(3)
    m.p.set(cr4=m.cr4 | 1 << 18, xcr0=7, rsi=DATA, rdx=0)
    codes = [asm.assemble(s, 0) for s in ("xrstor64 [rsi]", "fxrstor64 [rsi]", "fldenv [rsi]", "frstor [rsi]")]
    tidy = asm.assemble("fnsave [rdi]", 0)
    m.p.set(rdi=DATA + 0x8000)
    loaded = 0
    for _ in range(4000):
        image = bytearray(rng.randbytes(1024))
        if rng.random() < 0.9:
            image[26:28] = bytes(2)
        if rng.random() < 0.8:
            compact = rng.random() < 0.5
            form = rng.randrange(8)
            have = rng.randrange(8) & (form if compact else 7)
            image[512:576] = struct.pack("<8Q", have, (1 << 63 | form) if compact else 0, *([0] * 6))
        if rng.random() < 0.1:
            image[rng.randrange(512, 576)] ^= 1 << rng.randrange(8)
        m.p.poke(DATA, bytes(image))
        m.p.set(rax=rng.randrange(8))
        result = m.p.run(tidy, rng.choice(codes))
        assert result == probe.OK or m.p.fault() == (GP, 0)
        loaded += result == probe.OK
    assert loaded > 2000


def test_kept_addresses_are_as_wide_as_the_processor_has_them(m: Machine) -> None:
    """With 57-bit addresses in CPUID, MSRs and bases take them though CR4.LA57 is clear."""
    wide = 0xFF12_3456_789A_B000
    m.p.set(rcx=0xC0000102, rax=wide & 0xFFFFFFFF, rdx=wide >> 32)
    assert m.run("wrmsr") == probe.FAULT
    m.p.set_cpuid([(7, 0, 0, 1, 1 << 16, 0)])
    m.ok("wrmsr")
    assert m.kernel_gs_base == wide
    m.p.set(rdx=wide >> 32 & 0xFEFFFFFF)
    assert m.run("wrmsr") == probe.FAULT
    m.p.set(rdi=DATA)
    m.p.poke(DATA, struct.pack("<HQ", 0x7F, wide))
    m.ok("lgdt [rdi]")
    m.p.set(rax=m.cr4 | 1 << 12)
    assert m.run("mov cr4, rax") == probe.FAULT, "LA57 does not change in long mode"
