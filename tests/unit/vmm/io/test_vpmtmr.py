"""The ACPI PM timer."""

from pyhyve.base.fakes import FakeClock
from pyhyve.vmm.io.vpmtmr import Vpmtmr


def test_it_counts_3579545_ticks_a_second_from_zero():
    clock = FakeClock(123)
    timer = Vpmtmr(clock)
    assert timer.read(0, 4) == 0
    clock.time += 1_000_000_000
    assert timer.read(0, 4) == 3_579_545


def test_it_wraps_at_32_bits():
    clock = FakeClock()
    timer = Vpmtmr(clock)
    clock.time = 1200 * 1_000_000_000
    assert timer.read(0, 4) == 1200 * 3_579_545 - (1 << 32)


def test_it_is_read_only_and_can_be_read_in_parts():
    clock = FakeClock()
    timer = Vpmtmr(clock)
    clock.time = 3_600_000_000_000
    timer.write(0, 4, 0)
    value = timer.read(0, 4)
    assert timer.read(1, 1) == value >> 8 & 0xFF
    assert timer.read(2, 2) == value >> 16
    assert timer.read(4, 4) == 0xFFFFFFFF


def test_state_survives_save_and_restore():
    clock = FakeClock()
    timer = Vpmtmr(clock)
    clock.time = 5_000_000_000
    state = timer.save()
    other = Vpmtmr(FakeClock(77))
    other.restore(state)
    assert other.read(0, 4) == timer.read(0, 4)
    assert other.save() == state
