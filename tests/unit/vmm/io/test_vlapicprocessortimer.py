"""The local APIC's timer where the software processor keeps it: what its registers show, saved state, a written TSC."""

import pytest

from pyhyve.base.fakes import FakeClock, FakeTimers
from pyhyve.cpu import select
from pyhyve.cpu.processor import VcpuBackend
from pyhyve.vmm import hostcpu
from pyhyve.vmm.io.apicbus import ApicBus
from pyhyve.vmm.io.apicregs import ESR, LVT_TIMER, SVR, TIMER_CURRENT, TIMER_DIVIDE, TIMER_INITIAL
from pyhyve.vmm.io.vlapic import Vlapic
from pyhyve.vmm.tsc import GuestTsc

KHZ = 2_000_000
LONG = 0xF000_0000
DEADLINE_MSR = 0x6E0
PERIODIC, DEADLINE = 1 << 17, 2 << 17


class Cpu:
    """A local APIC on the software processor's state."""

    def __init__(self) -> None:
        self.backend: VcpuBackend = select.processor("bt").create_vm().create_vcpu(0)
        self.tsc = GuestTsc(self.backend, hostcpu.rdtsc_function(), KHZ)
        clock = FakeClock()
        state = self.backend.apic  # type: ignore[attr-defined]
        self.vlapic = Vlapic(
            0, ApicBus(), clock, FakeTimers(clock), lambda: None, self.tsc.now, self.tsc.hz, state=state
        )
        self.tsc.on_write = self.vlapic.tsc_written
        self.write(SVR, 0x1FF)
        self.write(TIMER_DIVIDE, 0xB)

    def write(self, index: int, value: int) -> None:
        self.vlapic.write(index << 4, 4, value)

    def read(self, index: int) -> int:
        return self.vlapic.read(index << 4, 4)


@pytest.fixture
def cpu() -> Cpu:
    return Cpu()


def test_a_count_goes_down_from_the_initial_one(cpu: Cpu) -> None:
    cpu.write(TIMER_INITIAL, LONG)
    first = cpu.read(TIMER_CURRENT)
    second = cpu.read(TIMER_CURRENT)
    assert cpu.read(TIMER_INITIAL) == LONG
    assert 0 < second <= first <= LONG
    cpu.write(TIMER_INITIAL, 0)
    assert cpu.read(TIMER_CURRENT) == 0


def test_the_divisor_changes_what_is_left_and_not_the_count(cpu: Cpu) -> None:
    cpu.write(TIMER_INITIAL, LONG)
    before = cpu.read(TIMER_CURRENT)
    cpu.write(TIMER_DIVIDE, 0x3)
    assert cpu.read(TIMER_DIVIDE) == 0x3
    assert before - 100_000_000 < cpu.read(TIMER_CURRENT) <= before


def test_modes_disarm_each_other(cpu: Cpu) -> None:
    cpu.write(LVT_TIMER, DEADLINE | 0x51)
    cpu.write(TIMER_INITIAL, LONG)
    assert (cpu.read(TIMER_INITIAL), cpu.read(TIMER_CURRENT)) == (0, 0)
    cpu.vlapic.wrmsr(DEADLINE_MSR, 1 << 62)
    assert cpu.vlapic.rdmsr(DEADLINE_MSR) == 1 << 62
    cpu.write(LVT_TIMER, PERIODIC | 0x51)
    assert cpu.vlapic.rdmsr(DEADLINE_MSR) == 0
    cpu.vlapic.wrmsr(DEADLINE_MSR, 1 << 62)
    assert cpu.vlapic.rdmsr(DEADLINE_MSR) == 0
    cpu.write(TIMER_INITIAL, LONG)
    assert 0 < cpu.read(TIMER_CURRENT) <= LONG


def test_a_written_tsc_moves_deadlines_and_no_counts(cpu: Cpu) -> None:
    cpu.write(TIMER_INITIAL, LONG)
    before = cpu.read(TIMER_CURRENT)
    cpu.tsc.write(1 << 50)
    assert before - 100_000_000 < cpu.read(TIMER_CURRENT) <= before
    cpu.write(LVT_TIMER, DEADLINE | 0x51)
    cpu.vlapic.wrmsr(DEADLINE_MSR, 1 << 62)
    cpu.tsc.write_adjust(5)
    assert cpu.vlapic.rdmsr(DEADLINE_MSR) == 1 << 62


@pytest.mark.parametrize("mode", [0, PERIODIC, DEADLINE])
def test_it_goes_on_from_its_saved_state(cpu: Cpu, mode: int) -> None:
    cpu.write(LVT_TIMER, mode | 0x51)
    cpu.write(TIMER_DIVIDE, 0x3)
    cpu.write(TIMER_INITIAL, LONG)
    cpu.vlapic.wrmsr(DEADLINE_MSR, 1 << 62)
    saved = cpu.vlapic.save()
    other = Cpu()
    other.tsc.set_offset(cpu.tsc.offset)
    other.vlapic.restore(saved)
    again = other.vlapic.save()
    assert (again.regs, again.timer.mode, again.timer.initial, again.timer.divide, again.timer.tsc_deadline) == (
        saved.regs, saved.timer.mode, saved.timer.initial, saved.timer.divide, saved.timer.tsc_deadline,
    )  # fmt: skip
    assert saved.timer.left is not None
    assert again.timer.left is not None
    assert saved.timer.left - 1_000_000_000 < again.timer.left <= saved.timer.left


def test_esr_has_no_error_before_the_timer_is_due(cpu: Cpu) -> None:
    cpu.write(LVT_TIMER, 0x05)
    cpu.write(TIMER_INITIAL, LONG)
    cpu.write(ESR, 0)
    assert cpu.read(ESR) == 0
