"""Deadlines that move: late calls, early calls, calls on their way when cancelled."""

import pytest

from pyhyve.base.fakes import FakeClock, FakeTimers
from pyhyve.vmm.io.deadline import MIN_PERIOD_NS, Deadline, next_period


class Bench:
    def __init__(self):
        self.clock = FakeClock()
        self.timers = FakeTimers(self.clock)
        self.fired = []
        self.deadline = Deadline(self.clock, self.timers, self.wake)

    def wake(self):
        if self.deadline.due():
            self.fired.append(self.clock.now())


@pytest.fixture
def bench():
    return Bench()


def test_it_is_reached_once(bench):
    bench.deadline.set(100)
    bench.timers.advance(1_000)
    assert bench.fired == [100]
    assert bench.deadline.at is None


def test_moving_it_later_or_earlier_fires_at_the_last_time_set(bench):
    bench.deadline.set(100)
    bench.deadline.set(300)
    assert bench.timers.pending == 1
    bench.deadline.set(200)
    bench.timers.advance(1_000)
    assert bench.fired == [200]


def test_an_earlier_time_replaces_the_booked_call(bench):
    bench.deadline.set(300)
    bench.deadline.set(50)
    assert bench.timers.pending == 1
    bench.timers.advance(1_000)
    assert bench.fired == [50]


def test_a_call_on_its_way_when_cleared_does_nothing(bench):
    bench.deadline.set(100)
    bench.clock.time = 100
    bench.deadline.clear()
    bench.wake()
    assert bench.fired == []


def test_a_call_on_its_way_when_moved_fires_at_the_new_time_only(bench):
    bench.deadline.set(100)
    bench.clock.time = 100
    bench.deadline.set(500)
    bench.wake()
    bench.timers.advance(1_000)
    assert bench.fired == [500]


@pytest.mark.parametrize("late", [0, 1, 99_999, 100_000, 1_234_567])
def test_the_next_period_is_in_the_future_and_in_phase(late):
    following = next_period(1_000, 100_000, 1_000 + late)
    assert following > 1_000 + late
    assert following - 1_000 - late <= 100_000
    assert (following - 1_000) % 100_000 == 0


def test_short_periods_are_merged_in_phase():
    following = next_period(0, 7, 3)
    assert following >= 3 + MIN_PERIOD_NS
    assert following % 7 == 0
