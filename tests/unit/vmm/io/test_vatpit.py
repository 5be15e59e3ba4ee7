"""The 8254: modes, latches, IRQ 0, port 0x61."""

import pytest

from pyhyve.base.fakes import FakeClock, FakePin, FakeTimers
from pyhyve.vmm.io.vatpit import PIT_HZ, Vatpit


def ticks(n):
    """Nanoseconds after which `n` ticks have passed."""
    return -(-n * 1_000_000_000 // PIT_HZ)


class Bench:
    def __init__(self):
        self.clock = FakeClock()
        self.timers = FakeTimers(self.clock)
        self.irq0 = FakePin()
        self.pit = Vatpit(self.clock, self.timers, self.irq0)

    def program(self, channel, mode, count, access=3, bcd=0):
        self.pit.write(0x43, 1, channel << 6 | access << 4 | mode << 1 | bcd)
        if access & 1:
            self.pit.write(0x40 + channel, 1, count & 0xFF)
        if access & 2:
            self.pit.write(0x40 + channel, 1, count >> 8 & 0xFF)

    def count(self, channel):
        self.pit.write(0x43, 1, channel << 6)
        low = self.pit.read(0x40 + channel, 1)
        return low | self.pit.read(0x40 + channel, 1) << 8

    def to(self, n):
        """Move time to `n` ticks after the one at which a count written at the clock's zero is loaded."""
        self.timers.advance(ticks(n + 1) - self.clock.now())


@pytest.fixture
def bench():
    return Bench()


@pytest.mark.parametrize("mode", [2, 3, 6, 7])
def test_the_periodic_modes_give_an_edge_each_period_without_drift(bench, mode):
    bench.program(0, mode, 11932)
    bench.to(11931)
    assert bench.irq0.edges == 0
    for n in range(1, 101):
        bench.to(11932 * n)
        assert bench.irq0.edges == n


def test_a_count_of_zero_is_65536(bench):
    bench.program(0, 2, 0)
    bench.to(65535)
    assert bench.irq0.edges == 0
    bench.to(65536)
    assert bench.irq0.edges == 1


def test_a_late_wake_up_keeps_the_phase(bench):
    bench.program(0, 2, 10_000)
    bench.clock.time = ticks(35_001)
    bench.timers.advance(0)
    edges = bench.irq0.edges
    bench.to(39_999)
    assert bench.irq0.edges == edges
    bench.to(40_000)
    assert bench.irq0.edges == edges + 1


def test_the_shortest_period_does_not_flood_the_host(bench):
    bench.program(0, 2, 2)
    bench.timers.advance(1_000_000)
    assert 0 < bench.irq0.edges <= 51


def test_mode_0_raises_irq0_at_terminal_count_and_holds_it(bench):
    bench.program(0, 0, 1000)
    bench.to(999)
    assert not bench.irq0.level
    bench.to(1000)
    assert bench.irq0.level
    bench.to(100_000)
    assert bench.irq0.level
    assert bench.irq0.edges == 1
    bench.program(0, 0, 1000)
    assert not bench.irq0.level


def test_mode_4_gives_one_strobe(bench):
    bench.program(0, 4, 500)
    bench.to(500)
    assert not bench.pit.output(0)
    assert bench.irq0.edges == 0
    bench.to(501)
    assert bench.pit.output(0)
    assert bench.irq0.edges == 1
    bench.to(100_000)
    assert bench.irq0.edges == 1
    bench.pit.write(0x40, 1, 0xF4)
    bench.pit.write(0x40, 1, 0x01)
    bench.to(100_501)
    assert bench.irq0.edges == 1
    bench.to(100_502)
    assert bench.irq0.edges == 2


def test_modes_1_and_5_wait_for_a_gate_that_channel_0_never_sees(bench):
    for mode in (1, 5):
        bench.program(0, mode, 100)
        bench.timers.advance(1_000_000)
    assert bench.irq0.edges == 0


def test_reprogramming_cancels_what_was_due(bench):
    bench.program(0, 2, 1000)
    bench.program(0, 2, 5000)
    bench.to(4999)
    assert bench.irq0.edges == 0
    bench.to(5000)
    assert bench.irq0.edges == 1


def set_count(bench, channel, count):
    bench.pit.write(0x40 + channel, 1, count & 0xFF)
    bench.pit.write(0x40 + channel, 1, count >> 8)


def test_a_new_count_in_mode_2_is_taken_at_the_end_of_the_period(bench):
    bench.program(0, 2, 1000)
    bench.to(400)
    set_count(bench, 0, 5000)
    assert bench.count(0) == 600
    bench.pit.write(0x43, 1, 0xE2)
    assert bench.pit.read(0x40, 1) & 0x40
    bench.to(1000)
    assert bench.irq0.edges == 1
    assert bench.count(0) == 5000
    bench.pit.write(0x43, 1, 0xE2)
    assert not bench.pit.read(0x40, 1) & 0x40
    bench.to(5999)
    assert bench.irq0.edges == 1
    bench.to(6000)
    assert bench.irq0.edges == 2


@pytest.mark.parametrize(("written", "edges"), [(100, (1500, 3500)), (600, (1000, 3000))])
def test_a_new_count_in_mode_3_is_taken_at_the_end_of_the_half_period(bench, written, edges):
    bench.program(0, 3, 1000)
    bench.to(written)
    set_count(bench, 0, 2000)
    for number, at in enumerate(edges):
        bench.to(at - 1)
        assert bench.irq0.edges == number
        bench.to(at)
        assert bench.irq0.edges == number + 1


def test_the_first_byte_of_a_count_stops_mode_0_and_lowers_irq0(bench):
    bench.program(0, 0, 1000)
    bench.to(1000)
    assert bench.irq0.level
    bench.pit.write(0x40, 1, 0x10)
    assert not bench.irq0.level
    bench.to(5000)
    assert bench.count(0) == 0
    bench.pit.write(0x40, 1, 0)
    bench.to(5016)
    assert not bench.irq0.level
    bench.to(5017)
    assert bench.irq0.level


def test_edges_that_nobody_saw_in_time_interrupt_once_also_when_the_guest_programs_anew(bench):
    bench.program(0, 2, 1000)
    bench.clock.time = ticks(3501)
    bench.program(0, 2, 2000)
    assert bench.irq0.edges == 1
    bench.timers.advance(0)
    assert bench.irq0.edges == 1


def test_the_count_runs_down_and_wraps_in_mode_0(bench):
    bench.program(0, 0, 1000)
    bench.to(400)
    assert bench.count(0) == 600
    bench.to(1001)
    assert bench.count(0) == 0xFFFF


def test_the_count_reloads_in_mode_2_and_runs_by_twos_in_mode_3(bench):
    bench.program(0, 2, 1000)
    bench.program(1, 3, 1000)
    bench.to(1100)
    assert bench.count(0) == 900
    assert bench.count(1) == 800
    bench.to(1600)
    assert bench.count(0) == 400
    assert bench.count(1) == 800


def test_a_latched_count_stands_still_until_it_is_read(bench):
    bench.program(0, 2, 0x8000)
    bench.to(0)
    bench.pit.write(0x43, 1, 0x00)
    bench.to(0x123)
    bench.pit.write(0x43, 1, 0x00)
    assert bench.pit.read(0x40, 1) | bench.pit.read(0x40, 1) << 8 == 0x8000
    assert bench.pit.read(0x40, 1) | bench.pit.read(0x40, 1) << 8 == 0x8000 - 0x123


@pytest.mark.parametrize(("access", "expected"), [(1, 0x34), (2, 0x12)])
def test_single_byte_access_reads_its_byte(bench, access, expected):
    bench.program(0, 0, 0x1234, access=3)
    bench.pit.write(0x43, 1, access << 4)
    bench.pit.write(0x40, 1, 0x12 if access == 2 else 0x34)
    bench.to(0)
    assert bench.pit.read(0x40, 1) == expected


def test_bcd_counts_in_decimal(bench):
    bench.program(0, 2, 0x1000, bcd=1)
    bench.to(1)
    assert bench.count(0) == 0x0999
    bench.to(1000)
    assert bench.irq0.edges == 1


def test_read_back_gives_status_before_count(bench):
    bench.program(0, 2, 0x1234)
    bench.pit.write(0x43, 1, 0xE2)
    assert bench.pit.read(0x40, 1) == 0xF4
    bench.to(0)
    bench.pit.write(0x43, 1, 0xC2)
    assert bench.pit.read(0x40, 1) == 0xB4
    assert bench.pit.read(0x40, 1) | bench.pit.read(0x40, 1) << 8 == 0x1234


def test_status_shows_a_null_count_until_one_is_loaded(bench):
    bench.pit.write(0x43, 1, 0x30)
    bench.pit.write(0x43, 1, 0xE2)
    assert bench.pit.read(0x40, 1) == 0x70


# -- channel 2 and port 0x61


def test_channel_2_counts_only_behind_its_gate(bench):
    bench.program(2, 0, 1000)
    bench.to(5000)
    assert bench.count(2) == 1000
    assert not bench.pit.read(0x61, 1) & 0x20
    bench.pit.write(0x61, 1, 0x01)
    bench.to(5999)
    assert not bench.pit.read(0x61, 1) & 0x20
    bench.to(6001)
    assert bench.pit.read(0x61, 1) & 0x20


def test_a_closed_gate_holds_the_count_of_mode_0(bench):
    bench.pit.write(0x61, 1, 0x01)
    bench.program(2, 0, 1000)
    bench.to(300)
    bench.pit.write(0x61, 1, 0x00)
    bench.to(5000)
    assert bench.count(2) == 700
    bench.pit.write(0x61, 1, 0x01)
    bench.to(5101)
    assert bench.count(2) == 599


def test_a_kernels_calibration_by_channel_2_takes_the_time_it_asked_for(bench):
    bench.pit.write(0x61, 1, bench.pit.read(0x61, 1) & ~0x02 | 0x01)
    latch = PIT_HZ // 100
    bench.program(2, 0, latch)
    start = bench.clock.now()
    while not bench.pit.read(0x61, 1) & 0x20:
        bench.timers.advance(1_000)
    assert abs(bench.clock.now() - start - 10_000_000) <= 2_000


def test_mode_3_is_a_square_wave_on_the_output(bench):
    bench.pit.write(0x61, 1, 0x01)
    bench.program(2, 3, 1000)
    bench.to(499)
    assert bench.pit.output(2)
    bench.to(500)
    assert not bench.pit.output(2)
    bench.to(1000)
    assert bench.pit.output(2)


def test_mode_2_is_low_for_the_last_tick(bench):
    bench.program(0, 2, 1000)
    bench.to(998)
    assert bench.pit.output(0)
    bench.to(999)
    assert not bench.pit.output(0)


@pytest.mark.parametrize("mode", [1, 5])
def test_a_rising_gate_triggers_modes_1_and_5(bench, mode):
    bench.program(2, mode, 1000)
    bench.to(100)
    assert bench.pit.output(2)
    bench.pit.write(0x61, 1, 0x01)
    bench.to(600)
    assert bench.pit.output(2) is (mode == 5)
    bench.to(1200)
    assert bench.pit.output(2)


def test_port_61_keeps_its_bits_and_toggles_refresh(bench):
    bench.pit.write(0x61, 1, 0xFF)
    assert bench.pit.read(0x61, 1) & 0xCF == 0x0F
    first = bench.pit.read(0x61, 1) & 0x10
    bench.timers.advance(ticks(18))
    assert bench.pit.read(0x61, 1) & 0x10 != first


def test_no_access_raises(bench):
    for port in (0x40, 0x41, 0x42, 0x43, 0x61):
        for value in range(256):
            for size in (1, 2, 4):
                bench.pit.write(port, size, value * 0x01010101 & ((1 << (8 * size)) - 1))
                bench.pit.read(port, size)
        bench.timers.advance(10_000_000)


def test_state_survives_save_and_restore(bench):
    bench.program(0, 2, 10_000)
    bench.pit.write(0x61, 1, 0x01)
    bench.program(2, 0, 1000)
    bench.to(400)
    state = bench.pit.save()
    other = Bench()
    other.clock.time = 987_654_321
    other.pit.restore(state)
    assert other.pit.save() == state
    assert other.count(2) == 600
    other.timers.advance(ticks(9_600))
    assert other.irq0.edges == 1
