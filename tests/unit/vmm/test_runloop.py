"""Exits go to their handlers, and what is pending goes into the guest."""

import time

import pytest
from fake_processor import Device

from pyhyve.base.errors import GuestFault
from pyhyve.cpu import exits
from pyhyve.cpu.processor import INJECT_EXCEPTION, INJECT_EXTERNAL, INJECT_NMI, Segment
from pyhyve.vmm.vm import Suspend


class Port:
    """Records writes, answers reads; a write of 0xFF to it ends the VM."""

    def __init__(self, vm, answer=0x5A):
        self.vm = vm
        self.answer = answer
        self.log = []

    def read(self, offset, size):
        self.log.append(("read", offset, size))
        return self.answer

    def write(self, offset, size, value):
        self.log.append(("write", offset, size, value))
        if value == 0xFF:
            self.vm.suspend(Suspend.POWEROFF)


END = 0x80


def run(vm, port=END):
    vm.ports.attach(port, 1, Port(vm))
    vm.start()
    assert vm.wait(10), "the VM did not end"
    assert vm.join()
    return vm.suspended


def test_port_accesses_reach_the_handler_with_offsets(make_vm):
    def guest(cpu):
        yield cpu.out(0x101, 0x1234, 2)
        yield cpu.inp(0x100, 1)
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    port = Port(vm, 0x1_FF)
    vm.ports.attach(0x100, 4, port)
    assert run(vm).how is Suspend.POWEROFF
    assert port.log == [("write", 1, 2, 0x1234), ("read", 0, 1)]
    assert processor.vcpus[0].completed == [("io", 0xFF)], "an answer is cut to the access's size"


def test_handler_with_port_base_zero_sees_port_numbers(make_vm):
    def guest(cpu):
        yield cpu.out(0x43, 7)
        yield cpu.out(END, 0xFF)

    vm, _ = make_vm(guest)
    port = Port(vm)
    vm.ports.attach(0x40, 4, port, base=0)
    run(vm)
    assert port.log == [("write", 0x43, 1, 7)]


def test_unclaimed_port_is_open_bus_and_counted(make_vm):
    def guest(cpu):
        yield cpu.inp(0x999, 2)
        yield cpu.out(0x999, 1)
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    run(vm)
    assert processor.vcpus[0].completed == [("io", 0xFFFF)]
    assert vm.ports.unclaimed == {0x999: 2}


def test_known_msr_is_answered_and_unknown_is_gp(make_vm):
    def guest(cpu):
        yield cpu.rdmsr(0x1B)
        yield cpu.rdmsr(0xDEAD)
        yield cpu.wrmsr(0xBEEF, 1)
        yield cpu.wrmsr(0x48, 1)
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    run(vm)
    cpu = processor.vcpus[0]
    assert cpu.completed == [("rdmsr", 0xFEE00900), ("wrmsr", 0)]
    assert cpu.injected == [(13, INJECT_EXCEPTION, 0)] * 2
    assert vm.vcpus[0].msrs.unknown == {0xDEAD: 1, 0xBEEF: 1}


def test_interrupt_is_injected_where_the_guest_takes_it(make_vm):
    def guest(cpu):
        cpu.registers["rflags"] = 2 | 1 << 9
        yield cpu.out(0x10, 1)
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    vlapic = vm.vcpus[0].vlapic
    vlapic.virtual_wire()

    class Raise(Device):
        def write(self, offset, size, value):
            vlapic.post(0x31)

    vm.ports.attach(0x10, 1, Raise())
    run(vm)
    assert processor.vcpus[0].injected == [(0x31, INJECT_EXTERNAL, None)]
    assert vlapic.pending_vector() is None, "it is in service"


def test_interrupt_waits_for_the_window(make_vm):
    def guest(cpu):
        yield cpu.out(0x10, 1)  # interrupts are off
        assert cpu.window
        cpu.registers["rflags"] |= 1 << 9
        yield cpu.out(0x11, 1)
        assert not cpu.window
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    vlapic = vm.vcpus[0].vlapic
    vlapic.virtual_wire()

    class Raise(Device):
        def write(self, offset, size, value):
            if offset == 0:
                vlapic.post(0x40)

    vm.ports.attach(0x10, 2, Raise())
    assert run(vm).how is Suspend.POWEROFF
    cpu = processor.vcpus[0]
    assert cpu.injected == [(0x40, INJECT_EXTERNAL, None)]
    assert vm.exit_counts()["interrupt-window"] == 1


def test_halted_vcpu_sleeps_until_a_timer_interrupts_it(make_vm):
    def guest(cpu):
        yield cpu.hlt()
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    vlapic = vm.vcpus[0].vlapic
    vlapic.virtual_wire()
    vm.timers.call_at(100_000_000, lambda: vlapic.post(0x50))
    before = time.thread_time_ns()
    run(vm)
    assert vm.clock.now() >= 100_000_000
    cpu = processor.vcpus[0]
    assert cpu.injected == [(0x50, INJECT_EXTERNAL, None)]
    assert cpu.kicks <= 1, "a sleeping vCPU is woken, not kicked (but to end)"
    assert time.thread_time_ns() - before < 50_000_000


def test_cli_hlt_ends_the_vm(make_vm):
    def guest(cpu):
        yield cpu.hlt(interrupts=False)

    vm, _ = make_vm(guest)
    suspended = run(vm)
    assert suspended.how is Suspend.HALT
    assert "interrupts off" in suspended.detail


def test_nmi_wakes_a_vcpu_halted_with_interrupts_off(make_vm):
    def bootstrap(cpu):
        yield cpu.out(0x10, 1)

    def other(cpu):
        yield cpu.hlt(interrupts=False)
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(bootstrap, other)

    class Start(Device):
        def write(self, offset, size, value):
            vm.vcpus[1].post_sipi(9)
            vm.timers.call_at(vm.clock.now() + 50_000_000, vm.vcpus[1].post_nmi)

    vm.ports.attach(0x10, 1, Start())
    assert run(vm).how is Suspend.POWEROFF
    cpu = processor.vcpus[1]
    assert cpu.injected == [(2, INJECT_NMI, None)]
    assert cpu.segments["cs"] == Segment(0x900, 0x9000, 0xFFFF, 0x9B)


def test_nmi_waits_for_its_window(make_vm):
    def guest(cpu):
        cpu.nmi_blocked = True
        yield cpu.out(0x10, 1)
        assert cpu.nmi_window
        cpu.nmi_blocked = False
        yield cpu.out(0x11, 1)
        assert not cpu.nmi_window
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)

    class Raise(Device):
        def write(self, offset, size, value):
            if offset == 0:
                vm.vcpus[0].post_nmi()

    vm.ports.attach(0x10, 2, Raise())
    assert run(vm).how is Suspend.POWEROFF
    assert processor.vcpus[0].injected == [(2, INJECT_NMI, None)]


def test_a_second_nmi_waits_for_the_end_of_the_first_and_a_third_is_lost(make_vm):
    def guest(cpu):
        yield cpu.out(0x10, 1)
        yield cpu.out(0x11, 1)
        yield cpu.out(0x11, 1)
        assert not cpu.nmi_window
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)

    class Raise(Device):
        def write(self, offset, size, value):
            if offset == 0:
                for _ in range(3):
                    vm.vcpus[0].post_nmi()

    vm.ports.attach(0x10, 2, Raise())
    assert run(vm).how is Suspend.POWEROFF
    assert processor.vcpus[0].injected == [(2, INJECT_NMI, None)] * 2


def test_init_resets_and_waits_for_a_startup(make_vm):
    def bootstrap(cpu):
        yield cpu.out(0x10, 1)

    def other(cpu):
        cpu.set("rax", 77)
        cpu.set("cr4", 0x20)
        yield cpu.out(0x11, 1)
        assert cpu.get("rax") == 0
        assert cpu.get("cr4") == 0
        assert cpu.get("rdx") == 0x600
        assert cpu.segments["cs"].base == 0x2000
        yield cpu.out(END, 0xFF)

    vm, _ = make_vm(bootstrap, other)

    class Commands(Device):
        def write(self, offset, size, value):
            vm.vcpus[1].post_sipi(1)
            if offset == 1:
                vm.vcpus[1].post_init()
                vm.vcpus[1].post_sipi(2)

    vm.ports.attach(0x10, 2, Commands())
    assert run(vm).how is Suspend.POWEROFF


def test_startup_is_ignored_by_a_running_vcpu(make_vm):
    def guest(cpu):
        yield cpu.out(0x10, 1)
        assert cpu.segments["cs"].base == 0
        yield cpu.out(END, 0xFF)

    vm, _ = make_vm(guest)

    class Commands(Device):
        def write(self, offset, size, value):
            vm.vcpus[0].post_sipi(5)

    vm.ports.attach(0x10, 1, Commands())
    assert run(vm).how is Suspend.POWEROFF


def test_external_interrupt_comes_from_the_8259(make_vm):
    def guest(cpu):
        cpu.registers["rflags"] = 2 | 1 << 9
        yield cpu.out(0x10, 1)
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    vm.vcpus[0].vlapic.virtual_wire()

    class Pic:
        output = False

        def pending(self):
            return self.output

        def acknowledge(self):
            self.output = False
            return 0x28

    pic = Pic()
    vm.attach_pic(pic)

    class Raise(Device):
        def write(self, offset, size, value):
            pic.output = True
            vm.vcpus[0].notify()

    vm.ports.attach(0x10, 1, Raise())
    run(vm)
    assert processor.vcpus[0].injected == [(0x28, INJECT_EXTERNAL, None)]


def test_touched_memory_is_mapped_on_demand(make_vm):
    def guest(cpu):
        yield cpu.violation(0x5000, 1)
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    run(vm)
    assert vm.memory.pmap.permits(0x5000, 1)
    assert processor.vcpus[0].epts[0][0] == vm.memory.pmap.eptp


def test_device_memory_is_emulated(make_vm):
    def guest(cpu):
        cpu.set("rip", 0x1000)
        cpu.set("rdi", 0xFED00010)
        cpu.registers["efer"] = 1 << 10
        cpu.segments["cs"] = Segment(0x10, 0, 0xFFFFFFFF, 0xA09B)
        yield cpu.violation(0xFED00010, 2)
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    vm.memory.write(0x1000, bytes.fromhex("c70755000000"))  # mov dword [rdi], 0x55
    device = Port(vm)
    vm.mmio.attach(0xFED00000, 0x400, device)
    run(vm)
    assert device.log == [("write", 0x10, 4, 0x55)]
    assert processor.vcpus[0].skipped == [6]


def test_mmio_that_the_engine_decoded_reaches_the_device(make_vm):
    def guest(cpu):
        cpu.exit.mmio_gpa, cpu.exit.mmio_size, cpu.exit.mmio_write, cpu.exit.mmio_value = 0xD0000004, 2, True, 0xAB
        yield exits.MMIO
        cpu.exit.mmio_write = False
        yield exits.MMIO
        cpu.exit.mmio_gpa = 0xD8000000
        yield exits.MMIO
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    device = Port(vm, 0x12345678)
    vm.mmio.attach(0xD0000000, 8, device)
    run(vm)
    assert device.log == [("write", 4, 2, 0xAB), ("read", 4, 2)]
    assert processor.vcpus[0].completed == [("mmio", 0x5678), ("mmio", 0xFFFF)]
    assert vm.mmio.unclaimed == {0xD8000: 1}


def test_local_apic_page_is_each_vcpus_own(make_vm):
    def guest(cpu):
        cpu.exit.mmio_gpa, cpu.exit.mmio_size, cpu.exit.mmio_write = 0xFEE00020, 4, False
        yield exits.MMIO
        yield cpu.out(END if cpu.vcpu_id else 0x10, 0xFF)

    vm, processor = make_vm(guest, guest)

    class Start(Device):
        def write(self, offset, size, value):
            vm.vcpus[1].post_sipi(0)

    vm.ports.attach(0x10, 1, Start())
    run(vm)
    assert [cpu.completed for cpu in processor.vcpus] == [[("mmio", 0)], [("mmio", 1 << 24)]]


def test_cpuid_exit_is_answered_from_the_policy(make_vm):
    def guest(cpu):
        cpu.exit.length = 2
        cpu.set("rax", 0x40000000)
        yield exits.CPUID
        cpu.answers = tuple(cpu.get(name) for name in ("rax", "rbx", "rcx", "rdx"))
        cpu.set("rax", 0x7FFFFFFF)
        yield exits.CPUID
        cpu.nothing = tuple(cpu.get(name) for name in ("rax", "rbx", "rcx", "rdx"))
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    run(vm)
    cpu = processor.vcpus[0]
    eax, ebx, ecx, edx = cpu.answers
    assert eax == 0x40000010
    assert b"".join(value.to_bytes(4, "little") for value in (ebx, ecx, edx)) == b"bhyve bhyve "
    assert cpu.nothing == (0, 0, 0, 0)
    assert cpu.skipped == [2, 2]


@pytest.mark.parametrize(("reason", "length"), [(exits.PAUSE, 2), (exits.WBINVD, 2), (exits.MWAIT, 3)])
def test_instruction_with_nothing_to_do_is_skipped(make_vm, reason, length):
    def guest(cpu):
        cpu.exit.length = length
        yield reason
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    run(vm)
    assert processor.vcpus[0].skipped == [length]


def test_unknown_hypercall_is_refused(make_vm):
    def guest(cpu):
        cpu.exit.length = 3
        yield exits.VMCALL
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    run(vm)
    assert processor.vcpus[0].get("rax") == (1 << 64) - 1000


def test_cr8_is_the_local_apics(make_vm):
    def guest(cpu):
        cpu.exit.length = 4
        cpu.set("rdx", 9)
        cpu.exit.qualification = 8 | 2 << 8  # mov cr8, rdx
        yield exits.CR_ACCESS
        cpu.exit.qualification = 8 | 1 << 4 | 3 << 8  # mov rbx, cr8
        yield exits.CR_ACCESS
        cpu.set("rdx", 0x10)
        cpu.exit.qualification = 8 | 2 << 8
        yield exits.CR_ACCESS
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    run(vm)
    cpu = processor.vcpus[0]
    assert cpu.get("rbx") == 9
    assert cpu.injected == [(13, INJECT_EXCEPTION, 0)]


def test_cr8_and_the_local_apics_tpr_are_one(make_vm):
    seen = []

    def guest(cpu):
        cpu.exit.mmio_gpa, cpu.exit.mmio_size, cpu.exit.mmio_write, cpu.exit.mmio_value = 0xFEE00080, 4, True, 0x57
        yield exits.MMIO
        seen.append(cpu.get("cr8"))
        cpu.set("cr8", 9)  # raised without an exit
        cpu.exit.mmio_write = False
        yield exits.MMIO
        cpu.set("cr8", 9)
        yield cpu.wrmsr(0x1B, 0xFEE00D00)
        yield cpu.rdmsr(0x808)
        yield cpu.wrmsr(0x808, 0x31)
        seen.append(cpu.get("cr8"))
        cpu.exit.length = 4
        cpu.set("rdx", 3)
        cpu.exit.qualification = 8 | 2 << 8
        yield exits.CR_ACCESS
        yield cpu.rdmsr(0x808)
        yield cpu.wrmsr(0x1B, 0xFEE00100)
        seen.append(cpu.get("cr8"))
        yield cpu.out(END, 0xFF)

    vm, processor = make_vm(guest)
    run(vm)
    assert seen == [5, 3, 0]
    assert [entry for entry in processor.vcpus[0].completed if entry[0] != "wrmsr"] == [
        ("mmio", 0x90),
        ("rdmsr", 0x90),
        ("rdmsr", 0x31),
    ]


def test_triple_fault_and_engine_error_end_the_vm(make_vm):
    def faulting(cpu):
        yield exits.TRIPLE_FAULT

    def failing(cpu):
        yield cpu.error("something that is not built yet")

    vm, _ = make_vm(faulting)
    assert run(vm).how is Suspend.TRIPLE_FAULT
    vm, _ = make_vm(failing)
    suspended = run(vm)
    assert suspended.how is Suspend.ERROR
    assert suspended.detail.startswith("something that is not built yet\nvCPU 0: rip ")


def test_bug_in_a_device_stops_the_vm_with_a_report(make_vm):
    def guest(cpu):
        yield cpu.out(0x10, 1)

    class Broken(Device):
        def write(self, offset, size, value):
            raise ZeroDivisionError("a bug")

    vm, _ = make_vm(guest)
    vm.ports.attach(0x10, 1, Broken())
    suspended = run(vm)
    assert suspended.how is Suspend.ERROR
    assert suspended.detail.splitlines()[0] == "ZeroDivisionError: a bug"
    assert "Traceback" in suspended.detail
    assert "rip 000000000000fff0" in suspended.detail


def test_exit_nobody_asked_for_is_an_error(make_vm):
    def guest(cpu):
        yield exits.EPT_MISCONFIG

    vm, _ = make_vm(guest)
    assert "ept-misconfig" in run(vm).detail


def test_task_switch_is_an_error_that_says_so(make_vm):
    def guest(cpu):
        cpu.exit.qualification = 2 << 30 | 0x18
        yield exits.TASK_SWITCH

    vm, _ = make_vm(guest)
    suspended = run(vm)
    assert suspended.how is Suspend.ERROR
    assert suspended.detail.startswith("a task switch by JMP (selector 0x18)")


def test_fault_raised_by_a_handler_reaches_the_guest(make_vm):
    def guest(cpu):
        yield cpu.inp(0x10)
        yield cpu.out(END, 0xFF)

    class Faulting(Device):
        def read(self, offset, size):
            raise GuestFault(14, 2, 0x1234)

    vm, processor = make_vm(guest)
    vm.ports.attach(0x10, 1, Faulting())
    run(vm)
    cpu = processor.vcpus[0]
    assert cpu.injected == [(14, INJECT_EXCEPTION, 2)]
    assert cpu.get("cr2") == 0x1234


def test_exits_are_counted_by_reason(make_vm):
    def guest(cpu):
        for _ in range(5):
            yield cpu.out(0x20, 1)
        yield cpu.rdmsr(0x1B)
        yield cpu.out(END, 0xFF)

    vm, _ = make_vm(guest, timing=True)
    run(vm)
    assert vm.exit_counts() == {"io": 6, "rdmsr": 1}
    assert vm.vcpus[0].guest_ns > 0
    assert vm.vcpus[0].handler_ns > 0
