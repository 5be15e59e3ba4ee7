"""The /dev/kvm engine against the processor contract, with guests of a few instructions."""

import errno
import os
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from asm import MISSING
from harness import (
    CODE,
    DATA,
    IF,
    KERNEL_STACK,
    PT,
    STACK,
    Machine,
    Mode,
    engine_called,
    paravirtual,
)

from pyhyve.base.errors import HostError
from pyhyve.cpu import exits
from pyhyve.cpu.processor import (
    CONTROL_NAMES,
    GPR_NAMES,
    INJECT_EXCEPTION,
    INJECT_EXTERNAL,
    INJECT_NMI,
    INJECT_SOFTWARE,
    MSR_NAMES,
    SEGMENT_NAMES,
    Segment,
)

FOUND = engine_called("kvm")
pytestmark = [
    pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND)),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]

NOTHING = 0x80_0000
"""The first guest-physical address behind RAM; the page tables map it below NOWHERE."""
NOWHERE = 0x1F_F000


def machine(source: str, mode: Mode = "long64", cpl: int = 0) -> Machine:
    made = Machine("kvm", mode, cpl)
    made.load(source)
    return made


def mmio_machine(source: str) -> Machine:
    """In long mode, with linear NOWHERE (two pages) outside RAM."""
    made = machine(source)
    made.protect(NOWHERE, NOTHING | 7)
    made.protect(NOWHERE - 0x1000, (NOTHING - 0x1000) | 7)
    return made


@pytest.fixture
def spinning() -> Iterator[Machine]:
    with machine("1: jmp 1b") as made:
        yield made


@pytest.fixture
def real_hardware() -> None:
    reason = paravirtual("kvm")
    if reason:
        pytest.skip(reason)


# -- ports -------------------------------------------------------------------------------------------------------------


def test_real_mode_out_and_hlt_leave_rip_behind_the_instruction() -> None:
    with machine("mov al, 0x5a; mov dx, 0x3f8; out dx, al; hlt", "real16") as m:
        start = m.vcpu.get("rip")
        assert m.vcpu.run() == exits.IO
        e = m.vcpu.exit
        assert (e.io_port, e.io_size, e.io_in, e.io_string, e.io_value) == (0x3F8, 1, False, False, 0x5A)
        assert m.vcpu.get("rip") == start + 6
        assert m.vcpu.run() == exits.HLT
        assert m.vcpu.get("rip") == start + 7


def test_reset_state_is_the_architectures() -> None:
    assert not isinstance(FOUND, str)
    vm = FOUND.create_vm()
    vcpu = vm.create_vcpu(0)
    assert (vcpu.get("rip"), vcpu.get("rflags"), vcpu.get("cr0")) == (0xFFF0, 2, 0x6000_0010)
    assert vcpu.get_segment("cs") == Segment(0xF000, 0xFFFF_0000, 0xFFFF, 0x9B)
    assert vcpu.get_table("idtr") == (0, 0xFFFF)
    vm.close()


@pytest.mark.parametrize(("register", "size"), [("al", 1), ("ax", 2), ("eax", 4)])
def test_in_changes_just_its_part_of_rax(register: str, size: int) -> None:
    with machine(f"in {register}, 0x60; hlt") as m:
        m.vcpu.set("rax", 0x1122_3344_5566_7788)
        assert m.vcpu.run() == exits.IO
        assert (m.vcpu.exit.io_in, m.vcpu.exit.io_size) == (True, size)
        m.vcpu.complete_io(0xFFFF_FFFF_AABB_CCDD)
        expected = {1: 0x1122_3344_5566_77DD, 2: 0x1122_3344_5566_CCDD, 4: 0xAABB_CCDD}[size]
        assert m.vcpu.get("rax") == expected
        assert m.vcpu.get("rip") == CODE + (3 if size == 2 else 2)
        assert m.vcpu.run() == exits.HLT
        assert m.vcpu.get("rax") == expected


def test_in_that_nobody_completes_reads_all_ones() -> None:
    with machine("in al, 0x60; hlt") as m:
        assert m.vcpu.run() == exits.IO
        assert m.vcpu.run() == exits.HLT
        assert m.vcpu.get("rax") == 0xFF


def test_registers_set_after_an_in_win() -> None:
    with machine("in al, 0x60; hlt") as m:
        m.vcpu.run()
        m.vcpu.complete_io(1)
        m.vcpu.set("rax", 77)
        assert m.vcpu.run() == exits.HLT
        assert m.vcpu.get("rax") == 77


def test_outs_exits_once_for_each_element() -> None:
    with machine("rep outsb; hlt") as m:
        m.write(DATA, b"hello")
        for name, value in (("rsi", DATA), ("rcx", 5), ("rdx", 0xE9)):
            m.vcpu.set(name, value)
        seen = b""
        while m.vcpu.run() == exits.IO:
            assert not m.vcpu.exit.io_string
            seen += bytes([m.vcpu.exit.io_value])
        assert seen == b"hello"
        assert m.vcpu.exit.reason == exits.HLT
        assert (m.vcpu.get("rsi"), m.vcpu.get("rcx")) == (DATA + 5, 0)


def test_ins_takes_each_element_in_order() -> None:
    with machine("rep insw; hlt") as m:
        for name, value in (("rdi", DATA), ("rcx", 300), ("rdx", 0x1F0)):
            m.vcpu.set(name, value)
        count = 0
        while m.vcpu.run() == exits.IO:
            assert (m.vcpu.exit.io_in, m.vcpu.exit.io_size, m.vcpu.exit.io_port) == (True, 2, 0x1F0)
            m.vcpu.complete_io(count)
            count += 1
        assert count == 300
        assert m.read(DATA, 602) == struct.pack("<301H", *range(300), 0)
        assert m.vcpu.get("rdi") == DATA + 600


# -- registers ---------------------------------------------------------------------------------------------------------


def test_long_mode_arithmetic_and_all_registers() -> None:
    source = "".join(f"add {name}, {index + 1};" for index, name in enumerate(GPR_NAMES)) + "hlt"
    with machine(source) as m:
        for index, name in enumerate(GPR_NAMES):
            m.vcpu.set_gpr(index, (index << 56) + 0x1000)
            assert m.vcpu.get(name) == (index << 56) + 0x1000
        assert m.vcpu.run() == exits.HLT
        for index, name in enumerate(GPR_NAMES):
            assert m.vcpu.get_gpr(index) == m.vcpu.get(name) == (index << 56) + 0x1001 + index


def test_every_named_register_can_be_read_and_written_back() -> None:
    with machine("hlt") as m:
        for name in (*GPR_NAMES, *CONTROL_NAMES, *MSR_NAMES):
            m.vcpu.set(name, m.vcpu.get(name))
        for name in SEGMENT_NAMES:
            m.vcpu.set_segment(name, m.vcpu.get_segment(name))
        assert m.vcpu.run() == exits.HLT


@pytest.mark.parametrize(
    ("name", "value"),
    [("star", 0x1B_0008 << 32), ("lstar", 0xFFFF_8000_0000_1000), ("sfmask", 0x700), ("kernel_gs_base", 0x7FFF_0000),
     ("sysenter_cs", 8), ("sysenter_esp", 0x5000), ("sysenter_eip", 0x6000), ("cr2", 0x1234), ("cr8", 5),
     ("pat", 0x0007_0406_0007_0406), ("dr0", 0x1000), ("dr3", 0x3000)],
)  # fmt: skip
def test_registers_keep_their_value_over_a_run(name: str, value: int) -> None:
    with machine("hlt") as m:
        m.vcpu.set(name, value)
        assert m.vcpu.get(name) == value
        assert m.vcpu.run() == exits.HLT
        assert m.vcpu.get(name) == value


def test_unknown_names_are_key_errors() -> None:
    with machine("hlt") as m:
        for access in (
            lambda: m.vcpu.get("rzx"),
            lambda: m.vcpu.set("rzx", 0),
            lambda: m.vcpu.get_segment("hs"),
            lambda: m.vcpu.set_segment("hs", Segment()),
            lambda: m.vcpu.get_table("ldtr"),
        ):
            with pytest.raises(KeyError):
                access()


def test_segments_and_tables_round_trip() -> None:
    with machine("hlt") as m:
        fs = Segment(0x23, 0x7000_0000_1234, 0xFFFF_FFFF, 0xC0F3)
        m.vcpu.set_segment("fs", fs)
        m.vcpu.set_table("gdtr", 0xFFFF_8000_0000_0000, 0x7F)
        assert m.vcpu.get_segment("fs") == fs
        assert m.vcpu.run() == exits.HLT
        assert m.vcpu.get_segment("fs") == fs
        assert m.vcpu.get_table("gdtr") == (0xFFFF_8000_0000_0000, 0x7F)


def test_xsave_area_round_trips_and_reaches_user_code() -> None:
    with machine("movups [0x40000], xmm3; ud2", cpl=3) as m:
        area = bytearray(m.vcpu.get_xsave())
        assert len(area) >= 832
        area[160 + 48 : 160 + 64] = bytes(range(16))  # XMM3
        area[512] |= 3
        m.vcpu.set_xsave(bytes(area))
        assert m.vcpu.get_xsave()[160 + 48 : 160 + 64] == bytes(range(16))
        assert m.run() == "fault"
        assert m.read(DATA, 16) == bytes(range(16))


@pytest.mark.usefixtures("real_hardware")
def test_tsc_offset_moves_the_guests_counter() -> None:
    with machine("rdtsc; shl rdx, 32; or rax, rdx; hlt; rdtsc; shl rdx, 32; or rax, rdx; hlt") as m:
        m.vcpu.run()
        first = m.vcpu.get("rax")
        m.vcpu.set("tsc_offset", 1 << 50)
        assert m.vcpu.get("tsc_offset") == 1 << 50
        m.vcpu.run()
        assert 1 << 50 < m.vcpu.get("rax") - first < (1 << 50) + (1 << 40)


def test_skip_moves_rip() -> None:
    with machine("ud2; hlt") as m:
        m.vcpu.skip(2)
        assert m.vcpu.run() == exits.HLT


def test_cpuid_answers_are_the_monitors() -> None:
    from pyhyve.cpu.processor import CpuidEntry

    with machine("cpuid; mov [0x40000], ebx; mov eax, 0x40000001; mov ecx, 5; cpuid; hlt") as m:
        m.vcpu.set_cpuid(
            [
                CpuidEntry(0, None, 0xD, 0x1234_5678, 2, 3),
                CpuidEntry(0x4000_0001, None, 1, 1, 1, 1),
                CpuidEntry(0x4000_0001, 5, 10, 11, 12, 13),
            ]
        )
        m.vcpu.set("rax", 0)
        assert m.vcpu.run() == exits.HLT
        assert m.read_int(DATA, 4) == 0x1234_5678
        assert [m.vcpu.get(name) for name in ("rax", "rbx", "rcx", "rdx")] == [10, 11, 12, 13]


# -- MMIO --------------------------------------------------------------------------------------------------------------


def test_mmio_write_exits_with_address_size_and_value() -> None:
    with mmio_machine(f"mov dword ptr [{NOWHERE:#x} + 0x10], 0x12345678; hlt") as m:
        assert m.vcpu.run() == exits.MMIO
        e = m.vcpu.exit
        assert (e.mmio_gpa, e.mmio_size, e.mmio_write, e.mmio_value) == (NOTHING + 0x10, 4, True, 0x12345678)
        m.vcpu.complete_mmio(0)
        assert m.vcpu.get("rip") == CODE + 11
        assert m.vcpu.run() == exits.HLT


@pytest.mark.parametrize(
    ("source", "size", "expected"),
    [
        ("mov rax, [rbx]", 8, 0x8877_6655_4433_2211),
        ("mov eax, [rbx]", 4, 0x4433_2211),
        ("movzx eax, byte ptr [rbx]", 1, 0x11),
        ("movsx rax, word ptr [rbx]", 2, 0x2211),
        ("mov al, [rbx]", 1, 0xFFFF_FFFF_FFFF_FF11),
    ],
)
def test_mmio_read_is_completed(source: str, size: int, expected: int) -> None:
    with mmio_machine(f"{source}; hlt") as m:
        m.vcpu.set("rax", 0xFFFF_FFFF_FFFF_FFFF)
        m.vcpu.set("rbx", NOWHERE + 8)
        assert m.vcpu.run() == exits.MMIO
        e = m.vcpu.exit
        assert (e.mmio_gpa, e.mmio_size, e.mmio_write) == (NOTHING + 8, size, False)
        m.vcpu.complete_mmio(0x8877_6655_4433_2211)
        assert m.vcpu.run() == exits.HLT
        assert m.vcpu.get("rax") == expected


def test_mmio_read_modify_write_exits_twice() -> None:
    with mmio_machine("or dword ptr [rbx], 0x0f; hlt") as m:
        m.vcpu.set("rbx", NOWHERE)
        assert m.vcpu.run() == exits.MMIO
        m.vcpu.complete_mmio(0x100)
        assert m.vcpu.run() == exits.MMIO
        assert (m.vcpu.exit.mmio_write, m.vcpu.exit.mmio_value) == (True, 0x10F)
        assert m.vcpu.run() == exits.HLT


def test_an_exit_found_while_finishing_another_is_not_lost() -> None:
    with mmio_machine("mov qword ptr [rbx], rax; hlt") as m:
        m.vcpu.set("rax", 0x8877_6655_4433_2211)
        m.vcpu.set("rbx", NOWHERE - 3)
        pieces = []
        while m.vcpu.run() == exits.MMIO:
            e = m.vcpu.exit
            pieces.append((e.mmio_gpa, e.mmio_size, e.mmio_value))
            m.vcpu.get("rax")
        assert pieces == [(NOTHING - 3, 3, 0x33_2211), (NOTHING, 5, 0x88_7766_5544)][-len(pieces) :]
        assert m.vcpu.exit.reason == exits.HLT


def test_mmio_that_nobody_completes_is_open_bus() -> None:
    with mmio_machine("mov rax, [rbx]; hlt") as m:
        m.vcpu.set("rbx", NOWHERE)
        assert m.vcpu.run() == exits.MMIO
        assert m.vcpu.run() == exits.HLT
        assert m.vcpu.get("rax") == 0xFFFF_FFFF_FFFF_FFFF


def test_writes_to_a_read_only_slot_exit_and_reads_do_not() -> None:
    with mmio_machine("mov rax, [rbx]; mov [rbx], rcx; hlt") as m:
        m.write(DATA, struct.pack("<Q", 0xABCD))
        m.vm.map_memory(NOTHING, m.hva + DATA, 0x1000, False)
        m.vcpu.set("rbx", NOWHERE)
        assert m.vcpu.run() == exits.MMIO
        assert (m.vcpu.exit.mmio_write, m.vcpu.exit.mmio_gpa) == (True, NOTHING)
        assert m.vcpu.run() == exits.HLT
        assert m.vcpu.get("rax") == 0xABCD
        assert m.read_int(DATA) == 0xABCD


def test_unmapping_the_middle_of_a_slot_keeps_its_ends() -> None:
    with machine("mov rax, [0x3f000]; mov rbx, [0x41000]; mov rcx, [0x40000]; hlt") as m:
        m.write(0x3F000, struct.pack("<Q", 1))
        m.write(0x41000, struct.pack("<Q", 2))
        m.vm.unmap_memory(DATA, 0x1000)
        assert m.vcpu.run() == exits.MMIO
        assert m.vcpu.exit.mmio_gpa == DATA
        m.vcpu.complete_mmio(3)
        assert m.vcpu.run() == exits.HLT
        assert [m.vcpu.get(name) for name in ("rax", "rbx", "rcx")] == [1, 2, 3]


@pytest.mark.parametrize(("gpa", "length"), [(0x100, 0x1000), (0, 0x800), (0, 0), (-0x1000, 0x1000)])
def test_map_memory_refuses_what_is_no_range_of_pages(spinning: Machine, gpa: int, length: int) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        spinning.vm.map_memory(gpa, spinning.hva, length, True)


# -- MSRs --------------------------------------------------------------------------------------------------------------


def test_rdmsr_exits_and_is_completed() -> None:
    with machine("mov ecx, 0x1b; rdmsr; hlt") as m:
        assert m.vcpu.run() == exits.RDMSR
        assert m.vcpu.exit.msr == 0x1B
        assert m.vcpu.get("rip") == CODE + 5
        m.vcpu.complete_rdmsr(0x1122_3344_5566_7788)
        assert m.vcpu.run() == exits.HLT
        assert (m.vcpu.get("rax"), m.vcpu.get("rdx")) == (0x5566_7788, 0x1122_3344)


def test_wrmsr_exits_with_its_value() -> None:
    with machine("mov ecx, 0x6e0; mov eax, 5; mov edx, 6; wrmsr; hlt") as m:
        assert m.vcpu.run() == exits.WRMSR
        assert (m.vcpu.exit.msr, m.vcpu.exit.msr_value) == (0x6E0, 6 << 32 | 5)
        m.vcpu.complete_wrmsr()
        assert m.vcpu.get("rip") == CODE + 17
        assert m.vcpu.run() == exits.HLT


@pytest.mark.parametrize("msr", [0x802, 0x174000, 0x4B56_4D00, 0xC001_0015])
def test_msrs_of_every_kind_reach_the_monitor(msr: int) -> None:
    with machine(f"mov ecx, {msr:#x}; rdmsr; hlt") as m:
        assert m.vcpu.run() == exits.RDMSR
        assert m.vcpu.exit.msr == msr


def test_a_refused_msr_access_is_general_protection() -> None:
    with machine("mov ecx, 0x1234; rdmsr; hlt") as m:
        assert m.vcpu.run() == exits.RDMSR
        m.vcpu.inject(13, INJECT_EXCEPTION, 0)
        assert m.run() == "fault"
        fault = m.fault()
        assert (fault.vector, fault.error, fault.rip) == (13, 0, CODE + 5)


def test_an_msr_access_left_alone_is_run_again() -> None:
    with machine("mov ecx, 0x1234; rdmsr; hlt") as m:
        assert m.vcpu.run() == exits.RDMSR
        assert m.vcpu.run() == exits.RDMSR
        m.vcpu.set("rbx", 9)
        assert m.vcpu.get("rip") == CODE + 5
        assert m.vcpu.run() == exits.RDMSR
        m.vcpu.complete_rdmsr(4)
        assert m.vcpu.run() == exits.HLT
        assert (m.vcpu.get("rax"), m.vcpu.get("rbx")) == (4, 9)


def test_the_processors_own_msrs_do_not_exit() -> None:
    with machine("mov ecx, 0xc0000102; mov eax, 0x1000; xor edx, edx; wrmsr; mov ecx, 0x10; rdmsr; hlt") as m:
        assert m.vcpu.run() == exits.HLT
        assert m.vcpu.get("kernel_gs_base") == 0x1000


def test_a_bad_value_in_the_processors_own_msr_is_general_protection() -> None:
    with machine("mov ecx, 0xc0000082; xor eax, eax; mov edx, 0x80000000; wrmsr; hlt") as m:  # LSTAR not canonical
        assert m.run() == "fault"
        assert (m.fault().vector, m.fault().rip) == (13, CODE + 12)


def test_completing_what_did_not_exit_is_an_error(spinning: Machine) -> None:
    calls: list[tuple[Any, tuple[int, ...]]] = [
        (spinning.vcpu.complete_io, (0,)),
        (spinning.vcpu.complete_mmio, (0,)),
        (spinning.vcpu.complete_rdmsr, (0,)),
        (spinning.vcpu.complete_wrmsr, ()),
    ]
    for call, arguments in calls:
        with pytest.raises(RuntimeError):
            call(*arguments)


# -- events ------------------------------------------------------------------------------------------------------------


def with_handler(m: Machine, vector: int, source: str) -> None:
    from asm import assemble

    at = 0x30000 + vector * 0x100
    m.write(at, assemble(source, at, 64))
    m.gate(vector, at)


def test_an_injected_interrupt_goes_through_the_idt() -> None:
    with machine("sti; 1: cmp dword ptr [0x40000], 0; je 1b; hlt") as m:
        with_handler(m, 0x31, "mov dword ptr [0x40000], 7; iretq")
        m.vcpu.set("rflags", 2 | IF)
        assert m.vcpu.interruptible()
        m.vcpu.inject(0x31, INJECT_EXTERNAL)
        assert m.vcpu.injection_pending()
        assert not m.vcpu.interruptible()
        assert m.vcpu.run() == exits.HLT
        assert not m.vcpu.injection_pending()
        assert m.read_int(DATA, 4) == 7
        assert m.vcpu.get("rsp") == STACK


def test_an_event_is_delivered_before_any_instruction() -> None:
    with machine("mov rax, 1; hlt") as m:
        m.vcpu.set("rflags", 2 | IF)
        m.vcpu.inject(0x31, INJECT_EXTERNAL)
        assert m.run() == "fault"
        fault = m.fault()
        assert (fault.vector, fault.rip, fault.rflags & IF) == (0x31, CODE, IF)
        assert m.vcpu.get("rax") == 0


def test_an_event_after_out_comes_behind_the_out() -> None:
    with machine("out 0x80, al; mov rax, 1; hlt") as m:
        m.vcpu.set("rflags", 2 | IF)
        assert m.vcpu.run() == exits.IO
        m.vcpu.inject(0x31, INJECT_EXTERNAL)
        assert m.run() == "fault"
        assert m.fault().rip == CODE + 2


def test_an_exception_carries_its_error_code_to_user_codes_kernel() -> None:
    with machine("1: jmp 1b", cpl=3) as m:
        m.vcpu.set("cr2", 0x1234)
        m.vcpu.inject(14, INJECT_EXCEPTION, 6)
        assert m.run() == "fault"
        fault = m.fault()
        assert (fault.vector, fault.error, fault.rip, fault.cr2, fault.rsp) == (14, 6, CODE, 0x1234, STACK)
        assert m.vcpu.get("rsp") < KERNEL_STACK


def test_nmi_and_software_interrupts_ignore_if() -> None:
    for kind, vector in ((INJECT_NMI, 2), (INJECT_SOFTWARE, 0x80)):
        with machine("1: jmp 1b") as m:
            assert m.vcpu.nmi_allowed()
            m.vcpu.inject(vector, kind)
            assert m.run() == "fault"
            assert m.fault().vector == vector


def test_an_nmi_in_an_nmi_handler_waits_for_iret() -> None:
    with machine("1: hlt; jmp 1b") as m:
        with_handler(m, 2, "inc dword ptr [0x40000]; out 0x80, al; inc dword ptr [0x40004]; iretq")
        m.vcpu.inject(2, INJECT_NMI)
        assert m.vcpu.run() == exits.IO
        m.vcpu.inject(2, INJECT_NMI)
        while m.vcpu.run() == exits.HLT:
            pass
        assert m.vcpu.exit.reason == exits.IO
        assert m.read_int(DATA, 4) == 2
        assert m.read_int(DATA + 4, 4) == 1, "the second NMI came before the first handler's IRET"
        assert m.vcpu.run() == exits.HLT


def test_injection_refuses_nonsense(spinning: Machine) -> None:
    with pytest.raises(ValueError, match="vector"):
        spinning.vcpu.inject(256, INJECT_EXTERNAL)
    with pytest.raises(ValueError, match="vector"):
        spinning.vcpu.inject(32, INJECT_EXCEPTION)
    with pytest.raises(ValueError, match="kind"):
        spinning.vcpu.inject(32, 1)
    spinning.vcpu.inject(32, INJECT_EXTERNAL)
    with pytest.raises(RuntimeError, match="still"):
        spinning.vcpu.inject(33, INJECT_EXTERNAL)


@pytest.mark.usefixtures("real_hardware")
def test_interrupt_window_opens_behind_the_sti_shadow() -> None:
    with machine("nop; nop; sti; nop; nop; hlt") as m:
        assert not m.vcpu.interruptible()
        m.vcpu.request_interrupt_window(True)
        assert m.vcpu.run() == exits.INTERRUPT_WINDOW
        assert m.vcpu.get("rip") == CODE + 4
        assert m.vcpu.interruptible()
        m.vcpu.request_interrupt_window(False)
        assert m.vcpu.run() == exits.HLT


@pytest.mark.parametrize("cpl", [0, 3])
def test_interrupt_window_stays_in_force_until_it_is_turned_off(cpl: int) -> None:
    with machine("1: jmp 1b", cpl=cpl) as m:
        m.vcpu.set("rflags", 2 | IF)
        m.vcpu.request_interrupt_window(True)
        for _ in range(3):
            assert m.vcpu.run() == exits.INTERRUPT_WINDOW
            assert m.vcpu.interruptible()
        m.vcpu.request_interrupt_window(False)
        threading.Timer(0.02, m.vcpu.kick).start()
        assert m.vcpu.run() == exits.EXTERNAL_INTERRUPT


def test_interrupt_window_waits_for_sti() -> None:
    with machine("1: cmp dword ptr [0x40000], 0; je 1b; sti; nop; 2: jmp 2b") as m:
        m.vcpu.request_interrupt_window(True)
        threading.Timer(0.02, m.vcpu.kick).start()
        assert m.vcpu.run() == exits.EXTERNAL_INTERRUPT
        m.write(DATA, b"\1")
        assert m.vcpu.run() == exits.INTERRUPT_WINDOW
        assert m.vcpu.get("rip") > CODE + 10


def test_nmi_window_is_open() -> None:
    with machine("hlt") as m:
        m.vcpu.request_nmi_window(True)
        assert m.vcpu.run() == exits.NMI_WINDOW
        m.vcpu.request_nmi_window(False)
        assert m.vcpu.run() == exits.HLT


def test_interruptible_follows_if_and_the_shadow() -> None:
    with machine("out 0x80, al; sti; out 0x80, al; nop; out 0x80, al; hlt") as m:
        assert m.vcpu.run() == exits.IO
        assert not m.vcpu.interruptible()
        m.vcpu.run()
        m.vcpu.run()
        assert m.vcpu.interruptible()
        m.vcpu.set("rflags", 2)
        assert not m.vcpu.interruptible()


@pytest.mark.usefixtures("real_hardware")
def test_lowering_cr8_exits_and_raising_it_does_not() -> None:
    with machine("mov eax, 9; mov cr8, rax; mov eax, 3; mov cr8, rax; hlt") as m:
        assert m.vcpu.run() == exits.TPR_BELOW_THRESHOLD
        assert m.vcpu.get("cr8") == 3
        assert m.vcpu.run() == exits.HLT


def test_a_fault_without_handlers_is_a_triple_fault() -> None:
    with machine("ud2") as m:
        m.vcpu.set_table("idtr", 0, 0)
        assert m.vcpu.run() == exits.TRIPLE_FAULT


# -- kicks -------------------------------------------------------------------------------------------------------------


def test_kick_stops_a_spinning_guest_within_100_ms(spinning: Machine) -> None:
    for _ in range(5):
        kicked: list[float] = []

        def kick(to: list[float] = kicked) -> None:
            time.sleep(0.02)
            to.append(time.monotonic())
            spinning.vcpu.kick()

        thread = threading.Thread(target=kick)
        thread.start()
        assert spinning.vcpu.run() == exits.EXTERNAL_INTERRUPT
        assert time.monotonic() - kicked[0] < 0.1
        thread.join()


def test_a_kick_before_run_counts_once(spinning: Machine) -> None:
    spinning.vcpu.kick()
    spinning.vcpu.kick()
    assert spinning.vcpu.run() == exits.EXTERNAL_INTERRUPT
    threading.Timer(0.05, spinning.vcpu.kick).start()
    start = time.monotonic()
    assert spinning.vcpu.run() == exits.EXTERNAL_INTERRUPT
    assert time.monotonic() - start > 0.02


def test_a_kick_survives_the_finishing_of_an_instruction() -> None:
    with machine("out 0x80, al; 1: jmp 1b") as m:
        assert m.vcpu.run() == exits.IO
        m.vcpu.kick()
        assert m.vcpu.get("rip") == CODE + 2
        assert m.vcpu.run() == exits.EXTERNAL_INTERRUPT


def test_no_kick_is_lost_in_a_storm() -> None:
    """Each kick waits until the vCPU has answered the last: a lost one would hang both."""
    rounds = 2000
    with machine("1: out 0x80, al; jmp 1b") as m:
        answered = threading.Semaphore(0)

        def storm() -> None:
            for _ in range(rounds):
                m.vcpu.kick()
                if not answered.acquire(timeout=10):
                    return

        thread = threading.Thread(target=storm)
        thread.start()
        seen = 0
        while seen < rounds and thread.is_alive():
            if m.vcpu.run() == exits.EXTERNAL_INTERRUPT:
                seen += 1
                answered.release()
        thread.join()
        assert seen == rounds


def test_a_vcpu_may_move_to_another_thread(spinning: Machine) -> None:
    results: list[int] = []

    def body() -> None:
        results.append(spinning.vcpu.run())

    for _ in range(3):
        thread = threading.Thread(target=body)
        thread.start()
        time.sleep(0.02)
        spinning.vcpu.kick()
        thread.join(timeout=5)
        assert not thread.is_alive()
    assert results == [exits.EXTERNAL_INTERRUPT] * 3


def test_other_threads_run_while_the_guest_does(spinning: Machine) -> None:
    ticks = 0
    thread = threading.Thread(target=spinning.vcpu.run)
    thread.start()
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        ticks += 1
    spinning.vcpu.kick()
    thread.join(timeout=5)
    assert ticks > 1000


# -- translation -------------------------------------------------------------------------------------------------------


def test_translate_walks_the_guests_tables() -> None:
    with machine("hlt") as m:
        m.protect(0x50000, 0x61000 | 7)
        m.protect(0x51000, 0)
        m.protect(0x52000, 0x62000 | 5)
        m.protect(0x53000, 0x63000 | 7 | 1 << 63)
        t = m.vcpu.translate
        assert t(0x50123) == 0x61123
        assert t(0x51000) is None
        assert (t(0x52008, 0), t(0x52008, 1)) == (0x62008, None)
        assert (t(0x53008, 0), t(0x53008, 2)) == (0x63008, None)
        assert t(0x40_1234) == 0x40_1234
        assert t(0x4000_0000 + 0x40_1234) == 0x40_1234
        assert t(0x8000_0000) is None
        assert t(1 << 50) is None
        m.vcpu.set("cr0", m.vcpu.get("cr0") & ~0x10000)
        assert t(0x52008, 1) == 0x62008


def test_translate_in_32_bit_and_unpaged_modes() -> None:
    with Machine("kvm", "prot32", paging=True) as m:
        m.protect(0x50000, 0x61000 | 7)
        m.protect(0x51000, 0)
        assert (m.vcpu.translate(0x50123), m.vcpu.translate(0x51000)) == (0x61123, None)
        assert m.vcpu.translate(0x40_1234) == 0x40_1234
        assert m.read_int(0x1000, 4) & ~0xFFF == PT
    with Machine("kvm", "real16") as m:
        assert m.vcpu.translate(0xFFFF0) == 0xFFFF0


# -- errors ------------------------------------------------------------------------------------------------------------


def test_what_kvm_cannot_run_is_said_in_words() -> None:
    with machine("jmp rbx") as m:
        m.protect(NOWHERE, NOTHING | 7)
        m.vcpu.set("rbx", NOWHERE)
        assert m.vcpu.run() == exits.ENGINE_ERROR
        assert "KVM" in m.vcpu.message()


def test_impossible_state_is_an_engine_error() -> None:
    with machine("hlt") as m:
        m.vcpu.set("cr4", 0)  # long mode without PAE
        assert m.vcpu.run() == exits.ENGINE_ERROR
        assert "refuses" in m.vcpu.message()


def test_a_closed_vm_answers_with_an_error_and_stays_closed() -> None:
    with machine("hlt") as m:
        m.vm.close()
        m.vm.close()
        m.vcpu.kick()
        with pytest.raises(RuntimeError, match="closed"):
            m.vcpu.run()
        with pytest.raises(RuntimeError, match="closed"):
            m.vcpu.get("rax")
        with pytest.raises(RuntimeError, match="closed"):
            m.vm.create_vcpu(1)


def test_unavailable_says_the_remedy_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(FOUND, str)
    assert FOUND.unavailable() is None
    from pyhyve.cpu.kvm import engine

    for number in (errno.ENOENT, errno.EACCES, errno.ENODEV):
        line = engine.why_not(number)
        assert "\n" not in line
        assert "/dev/kvm" in line
        assert "--processor bt" in line


def test_no_descriptor_stays_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with machine("hlt") as m:
            m.vcpu.run()
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0


def test_two_vms_and_two_vcpus_are_apart() -> None:
    with machine("mov rax, 1; hlt") as one, machine("mov rax, 2; hlt") as two:
        second = one.vm.create_vcpu(1)
        assert one.vcpu.run() == two.vcpu.run() == exits.HLT
        assert (one.vcpu.get("rax"), two.vcpu.get("rax"), second.get("rax")) == (1, 2, 0)
        with pytest.raises(HostError):
            one.vm.create_vcpu(1)


def test_capabilities_and_counters() -> None:
    assert not isinstance(FOUND, str)
    offered = FOUND.capabilities()
    assert (offered.name, FOUND.name) == ("kvm", "kvm")
    assert offered.max_vcpus >= 4
    assert "hardware" in offered.notes
    with machine("out 0x80, al; hlt") as m:
        m.vcpu.run()
        m.vcpu.run()
        counted = m.vcpu.counters()
        assert (counted["io"], counted["hlt"], counted["entries"]) == (1, 1, 2)
