"""The ACPI PM timer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhyve.base.fakes import FakeClock, FakeTimers
from pyhyve.vmm.io.vpmtmr import PM_TIMER_HZ, Vpmtmr

SECOND = 1_000_000_000


class Bench:
    def __init__(self, start=0, bits=32):
        self.clock = FakeClock(start)
        self.timers = FakeTimers(self.clock)
        self.carries = 0
        self.timer = Vpmtmr(self.clock, self.timers, self.carried, bits)

    def carried(self):
        self.carries += 1

    def read(self, offset=0, size=4):
        return self.timer.read(offset, size)


def test_it_counts_3579545_ticks_a_second_from_zero():
    bench = Bench(123)
    assert bench.read() == 0
    bench.timers.advance(SECOND)
    assert bench.read() == 3_579_545


@pytest.mark.parametrize("bits", [24, 32])
def test_it_wraps_at_its_width(bits):
    bench = Bench(bits=bits)
    bench.timers.advance(1200 * SECOND)
    assert bench.read() == 1200 * 3_579_545 % (1 << bits)


@pytest.mark.parametrize("bits", [23, 64])
def test_another_width_is_refused(bits):
    with pytest.raises(ValueError, match="24 or 32 bits"):
        Bench(bits=bits)


@pytest.mark.parametrize("bits", [24, 32])
def test_it_tells_of_each_change_of_its_highest_bit(bits):
    bench = Bench(bits=bits)
    for number in range(1, 6):
        exactly = -(-number * (1 << bits - 1) * SECOND // PM_TIMER_HZ)
        bench.timers.advance(exactly - 1 - bench.clock.now())
        assert (bench.carries, bench.read() >> bits - 1) == (number - 1, number - 1 & 1)
        bench.timers.advance(1)
        assert (bench.carries, bench.read() >> bits - 1) == (number, number & 1)


@given(st.lists(st.integers(0, 10**14), max_size=20))
def test_it_does_not_drift_in_days(steps):
    bench = Bench(start=77)
    for step in steps:
        bench.timers.advance(step)
        assert bench.read() == (bench.clock.now() - 77) * PM_TIMER_HZ // SECOND % (1 << 32)


def test_it_is_read_only_and_can_be_read_in_parts():
    bench = Bench()
    bench.timers.advance(3600 * SECOND)
    bench.timer.write(0, 4, 0)
    value = bench.read()
    assert bench.read(1, 1) == value >> 8 & 0xFF
    assert bench.read(2, 2) == value >> 16
    assert bench.read(4, 4) == 0xFFFFFFFF
