"""The monitor's own MSRs, and the guest's time-stamp counter."""

import struct

import pytest
from fake_processor import FakeVcpu

from pyhyve.base.errors import GuestFault
from pyhyve.base.fakes import FakeClock
from pyhyve.vmm import msr
from pyhyve.vmm.msr import MsrTable
from pyhyve.vmm.tsc import GuestTsc, PvClock, pv_scale

KHZ = 2_500_000


class Apic:
    def __init__(self):
        self.log = []

    def rdmsr(self, number):
        return number + 1

    def wrmsr(self, number, value):
        self.log.append((number, value))


class Ram:
    def __init__(self):
        self.data = bytearray(0x1000)

    def read(self, gpa, length):
        return bytes(self.data[gpa : gpa + length])

    def write(self, gpa, data):
        if gpa + len(data) > len(self.data):
            raise IndexError(gpa)
        self.data[gpa : gpa + len(data)] = data


class Board:
    def __init__(self, *, intel=False, hardware=False):
        self.host_tsc = 1_000_000
        self.cpu = FakeVcpu(0, None)
        self.apic = Apic()
        self.ram = Ram()
        self.clock = FakeClock(7_000_000_000)
        self.tsc = GuestTsc(self.cpu, lambda: self.host_tsc, KHZ)
        self.msrs = MsrTable(
            self.cpu,
            self.apic,
            self.tsc,
            PvClock(self.tsc, self.clock, self.ram),
            intel=intel,
            hardware=hardware,
            phys_bits=46,
        )


@pytest.fixture
def board():
    return Board()


def assert_gp(call, *args):
    with pytest.raises(GuestFault) as caught:
        call(*args)
    assert (caught.value.vector, caught.value.error) == (13, 0)


def test_local_apics_registers_go_to_it(board):
    assert board.msrs.read(0x1B) == 0x1C
    assert board.msrs.read(0x802) == 0x803
    board.msrs.write(0x6E0, 99)
    board.msrs.write(0x830, 5)
    assert board.apic.log == [(0x6E0, 99), (0x830, 5)]


def test_unknown_register_is_gp_and_counted(board):
    assert_gp(board.msrs.read, 0x12345)
    assert_gp(board.msrs.write, 0x12345, 0)
    assert board.msrs.unknown == {0x12345: 2}


def test_read_only_register_cannot_be_written(board):
    assert board.msrs.read(msr.ARCH_CAPABILITIES) & 1
    assert_gp(board.msrs.write, msr.ARCH_CAPABILITIES, 0)
    assert board.msrs.read(msr.MCG_CAP) == 0
    assert_gp(board.msrs.write, msr.MCG_CAP, 1)
    assert_gp(board.msrs.read, msr.PRED_CMD)
    board.msrs.write(msr.PRED_CMD, 1)


def test_guest_on_the_hosts_hardware_is_told_nothing_of_immunity():
    assert_gp(Board(hardware=True).msrs.read, msr.ARCH_CAPABILITIES)


def test_spec_ctrl_keeps_valid_bits_only(board):
    board.msrs.write(msr.SPEC_CTRL, 1)
    assert board.msrs.read(msr.SPEC_CTRL) == 1
    assert_gp(board.msrs.write, msr.SPEC_CTRL, 1 << 20)


def test_mtrrs_are_as_firmware_leaves_them(board):
    assert board.msrs.read(msr.MTRR_CAP) & 0xFF == 8
    assert board.msrs.read(msr.MTRR_DEF_TYPE) == 0xC06
    assert board.msrs.read(0x200) == 0xC000_0000
    assert board.msrs.read(0x201) == (1 << 46) - (1 << 30) | 1 << 11
    board.msrs.write(0x202, 0x8000_0006)
    assert board.msrs.read(0x202) == 0x8000_0006
    assert_gp(board.msrs.write, 0x202, 0x8000_0007)
    assert_gp(board.msrs.write, 0x203, 1 << 46)
    assert_gp(board.msrs.write, 0x250, 0x03)
    assert_gp(board.msrs.write, msr.MTRR_DEF_TYPE, 2)
    board.msrs.reset()
    assert board.msrs.read(0x202) == 0


def test_each_vendor_has_its_own():
    intel, amd = Board(intel=True).msrs, Board().msrs
    for number in (msr.PLATFORM_INFO, msr.FEATURE_CONTROL):
        intel.read(number)
        assert_gp(amd.read, number)
    for number in (msr.AMD_HWCR, msr.AMD_SYSCFG, msr.AMD_DE_CFG):
        amd.read(number)
        assert_gp(intel.read, number)
    assert amd.read(msr.AMD_DE_CFG) & 2, "LFENCE serialises"
    assert intel.read(msr.PLATFORM_INFO) >> 8 & 0xFF == 25


def test_registers_that_the_engine_keeps_are_passed_on(board):
    board.msrs.write(0xC000_0082, 0xFFFFFFFF81000000)
    assert board.cpu.get("lstar") == 0xFFFFFFFF81000000
    assert board.msrs.read(0xC000_0082) == 0xFFFFFFFF81000000
    board.msrs.write(0xC000_0101, 0x1234)
    assert board.cpu.get_segment("gs").base == 0x1234
    assert board.msrs.read(0xC000_0101) == 0x1234


def test_counter_and_its_adjustment_move_together(board):
    board.tsc.set_offset(-1_000_000)
    assert board.msrs.read(msr.TSC) == 0
    board.host_tsc += 500
    board.msrs.write(msr.TSC, 10_000)
    assert board.msrs.read(msr.TSC) == 10_000
    assert board.msrs.read(msr.TSC_ADJUST) == 9_500
    assert board.cpu.get("tsc_offset") == (10_000 - board.host_tsc) & (1 << 64) - 1
    board.msrs.write(msr.TSC_ADJUST, 0)
    assert board.msrs.read(msr.TSC) == 500


def test_counter_goes_on_after_a_pause_where_the_clock_does(board):
    board.tsc.set_offset(-1_000_000)
    board.msrs.write(msr.TSC_ADJUST, 77)
    board.host_tsc += 1_000_000_000
    board.tsc.rebase(2_000)
    assert board.tsc.now() == 2_077


@pytest.mark.parametrize("khz", [1_000, 999_999, 1_000_000, 2_596_132, 5_000_000])
def test_paravirtual_scale_turns_ticks_into_time(khz):
    multiplier, shift = pv_scale(khz)
    assert 1 << 31 <= multiplier < 1 << 32
    ticks = khz * 1000 * 60
    shifted = ticks << shift if shift >= 0 else ticks >> -shift
    assert shifted * multiplier >> 32 == pytest.approx(60_000_000_000, rel=1e-8)


def test_paravirtual_clock_is_written_where_the_guest_says(board):
    board.tsc.set_offset(-1_000_000)
    board.host_tsc += 123
    board.msrs.write(msr.PV_SYSTEM_TIME, 0x100 | 1)
    version, _, tsc, system, multiplier, shift, flags = struct.unpack_from("<IIQQIbB", board.ram.data, 0x100)
    assert version % 2 == 0
    assert (tsc, system, flags) == (123, 7_000_000_000, 1)
    assert (multiplier, shift) == pv_scale(KHZ)
    assert board.msrs.read(msr.PV_SYSTEM_TIME) == 0x101
    board.ram.data[:] = bytes(0x1000)
    board.msrs.write(msr.PV_SYSTEM_TIME, 0x100)
    assert not any(board.ram.data), "bit 0 enables"


def test_paravirtual_wall_clock_is_the_time_at_zero(board):
    import time

    board.msrs.write(msr.PV_WALL_CLOCK, 0x200)
    version, seconds, nanoseconds = struct.unpack_from("<III", board.ram.data, 0x200)
    assert version % 2 == 0
    assert seconds + nanoseconds / 1e9 == pytest.approx(time.time() - 7, abs=1)


def test_clock_outside_memory_is_written_nowhere(board):
    board.msrs.write(msr.PV_SYSTEM_TIME, 0xFFFF_F001)
    board.msrs.write(msr.PV_WALL_CLOCK, 0xFFFF_F000)
