"""The HPET: counter, comparators, routes, level-triggered interrupts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhyve.base.fakes import FakeClock, FakeMsiSink, FakePin, FakeTimers
from pyhyve.vmm.io.vhpet import Vhpet
from pyhyve.vmm.io.vioapic import Vioapic

LEVEL, ENABLE, PERIODIC, VALUE_SET, FSB = 1 << 1, 1 << 2, 1 << 3, 1 << 6, 1 << 14
NARROW = 1 << 8


class Bench:
    """An HPET with one FakePin for each I/O APIC pin, whoever drives it."""

    def __init__(self, legacy=False):
        self.clock = FakeClock(555)
        self.timers = FakeTimers(self.clock)
        self.msi = FakeMsiSink()
        self.pins = {}
        self.legacy = (FakePin(), FakePin())
        self.replaced = []
        pins = self.legacy if legacy else None
        self.hpet = Vhpet(self.clock, self.timers, self.msi, self.pin, pins, self.replaced.append)

    def pin(self, n):
        return self.pins.setdefault(n, FakePin())

    def timer(self, n, config, route=20, comparator=None):
        self.hpet.write(0x100 + 0x20 * n, 8, config | route << 9)
        if comparator is not None:
            self.hpet.write(0x108 + 0x20 * n, 8, comparator)

    def start(self, legacy=0):
        self.hpet.write(0x10, 8, 1 | legacy << 1)

    def ticks(self, n):
        self.timers.advance(100 * n)


@pytest.fixture
def bench():
    return Bench()


def test_capabilities_say_ten_megahertz_eight_timers_of_64_bits(bench):
    assert bench.hpet.read(0, 8) == 100_000_000 << 32 | 0x8086_2701
    assert bench.hpet.read(4, 4) == 100_000_000
    assert bench.hpet.read(0, 4) == 0x8086_2701
    bench.hpet.write(0, 8, 0)
    assert bench.hpet.read(0, 8) == 100_000_000 << 32 | 0x8086_2701


@pytest.mark.seed("S11")
def test_every_timer_may_be_routed_to_pins_20_to_23(bench):
    for n in range(8):
        assert bench.hpet.read(0x104 + 0x20 * n, 4) == 0x00F00000
        assert bench.hpet.read(0x100 + 0x20 * n, 4) == 0x8030


def test_the_counter_runs_while_enabled_and_can_be_set_while_not(bench):
    bench.hpet.write(0xF0, 8, 1000)
    bench.ticks(50)
    assert bench.hpet.read(0xF0, 8) == 1000
    bench.start()
    bench.ticks(50)
    assert bench.hpet.read(0xF0, 4) == 1050
    bench.hpet.write(0xF0, 8, 5)
    assert bench.hpet.read(0xF0, 8) == 1050
    bench.hpet.write(0x10, 8, 0)
    bench.ticks(50)
    assert bench.hpet.read(0xF0, 8) == 1050


def test_the_counter_has_64_bits_and_is_written_in_halves_too(bench):
    bench.hpet.write(0xF4, 4, 0x12345678)
    bench.hpet.write(0xF0, 4, 0xFFFFFFFF)
    bench.start()
    bench.ticks(3)
    assert bench.hpet.read(0xF0, 8) == 0x12345679_00000002
    assert bench.hpet.read(0xF4, 4) == 0x12345679
    bench.hpet.write(0x10, 4, 0)
    bench.hpet.write(0xF0, 8, (1 << 64) - 1)
    bench.start()
    bench.ticks(3)
    assert bench.hpet.read(0xF0, 8) == 2


@given(st.lists(st.integers(0, 10**14), max_size=30))
def test_the_counter_does_not_drift_in_days(steps):
    """It is what has passed on the clock, whatever was looked at in between."""
    bench = Bench()
    bench.timer(0, ENABLE | PERIODIC | VALUE_SET)
    bench.hpet.write(0x108, 8, 36_000_000_000)
    bench.start()
    begun = bench.clock.now()
    for step in steps:
        bench.timers.advance(step)
        assert bench.hpet.read(0xF0, 8) == (bench.clock.now() - begun) // 100
    hours = (bench.clock.now() - begun) // 3_600_000_000_000
    assert bench.pins[20].edges == hours
    assert bench.hpet.read(0x108, 8) == 36_000_000_000 * (hours + 1)


@pytest.mark.seed("S11")
def test_a_one_shot_timer_of_64_bits_fires_once(bench):
    bench.timer(0, ENABLE, comparator=(1 << 32) + 1000)
    bench.start()
    bench.ticks((1 << 32) + 999)
    assert bench.pins[20].edges == 0
    bench.ticks(1)
    assert bench.pins[20].edges == 1
    bench.ticks(1 << 40)
    assert bench.pins[20].edges == 1
    assert bench.timers.pending == 0


@pytest.mark.seed("S11")
def test_a_one_shot_timer_of_32_bits_fires_again_after_a_wrap(bench):
    bench.timer(0, NARROW | ENABLE, comparator=(5 << 32) + 1000)
    assert bench.hpet.read(0x108, 8) == 1000
    bench.start()
    bench.ticks(999)
    assert bench.pins[20].edges == 0
    bench.ticks(1)
    assert bench.pins[20].edges == 1
    bench.ticks((1 << 32) - 1)
    assert bench.pins[20].edges == 1
    bench.ticks(1)
    assert bench.pins[20].edges == 2


@pytest.mark.seed("S11")
def test_periodic_fires_each_period_without_drift(bench):
    bench.start()
    bench.timer(0, ENABLE | PERIODIC | VALUE_SET)
    bench.hpet.write(0x108, 8, 5000)
    bench.hpet.write(0x108, 8, 1000)
    bench.ticks(4999)
    assert bench.pins[20].edges == 0
    for n in range(10):
        bench.ticks(1)
        assert bench.pins[20].edges == n + 1
        bench.ticks(999)
        assert bench.pins[20].edges == n + 1
    assert bench.hpet.read(0x108, 8) == 15000


def test_a_late_wake_up_keeps_the_phase(bench):
    bench.start()
    bench.timer(0, ENABLE | PERIODIC | VALUE_SET)
    bench.hpet.write(0x108, 8, 1000)
    bench.clock.time += 350_000
    bench.timers.advance(0)
    assert bench.pins[20].edges == 1
    assert bench.hpet.read(0x108, 8) == 4000
    bench.ticks(500)
    assert bench.pins[20].edges == 2


@pytest.mark.parametrize("period", [0, 1])
def test_the_shortest_periods_do_not_flood_the_host(bench, period):
    bench.start()
    bench.timer(0, ENABLE | PERIODIC | VALUE_SET)
    bench.hpet.write(0x108, 8, 1)
    bench.hpet.write(0x108, 8, period)
    bench.timers.advance(1_000_000)
    assert bench.pins[20].edges <= 51


@pytest.mark.seed("S11")
def test_a_level_interrupt_holds_its_pin_until_its_status_bit_is_written(bench):
    bench.timer(2, LEVEL | ENABLE, route=21, comparator=10)
    bench.start()
    bench.ticks(10)
    assert bench.pins[21].level
    assert bench.hpet.read(0x20, 8) == 1 << 2
    bench.hpet.write(0x20, 8, 1 << 3)
    assert bench.pins[21].level
    bench.hpet.write(0x20, 8, 1 << 2)
    assert not bench.pins[21].level
    assert bench.hpet.read(0x20, 8) == 0


def test_an_edge_interrupt_leaves_no_status(bench):
    bench.timer(0, ENABLE, comparator=10)
    bench.start()
    bench.ticks(10)
    assert bench.hpet.read(0x20, 8) == 0


@pytest.mark.seed("S11")
@pytest.mark.parametrize("route", [0, 2, 19, 24, 31])
def test_a_route_not_allowed_is_no_route(bench, route):
    bench.timer(0, LEVEL | ENABLE, route=route, comparator=10)
    bench.start()
    bench.ticks(10)
    assert not any(pin.level or pin.edges for pin in bench.pins.values())
    assert bench.hpet.read(0x100, 8) >> 9 & 0x1F == 0


def test_a_disabled_timer_is_silent(bench):
    bench.timer(0, LEVEL, comparator=10)
    bench.timer(1, 0, comparator=10)
    bench.start()
    bench.ticks(10)
    assert not bench.pins[20].edges


def test_a_held_interrupt_moves_with_its_route_and_falls_when_disabled(bench):
    bench.timer(0, LEVEL | ENABLE, comparator=10)
    bench.start()
    bench.ticks(10)
    bench.timer(0, LEVEL | ENABLE, route=22)
    assert not bench.pins[20].level
    assert bench.pins[22].level
    bench.timer(0, LEVEL, route=22)
    assert not bench.pins[22].level


def test_fsb_sends_the_guests_own_message(bench):
    bench.hpet.write(0x110, 8, 0xFEE01000_00004041)
    bench.timer(0, ENABLE | FSB, comparator=10)
    bench.start()
    bench.ticks(10)
    assert bench.msi.sent == [(0xFEE01000, 0x4041)]


def test_legacy_replacement_uses_irq_0_and_8():
    bench = Bench(legacy=True)
    assert bench.hpet.read(0, 8) & 1 << 15
    bench.timer(0, ENABLE | FSB, comparator=10)  # its own routing has no effect
    for n in (1, 2):
        bench.timer(n, ENABLE, comparator=10)
    bench.start(legacy=1)
    assert bench.hpet.legacy
    bench.ticks(10)
    assert [pin.edges for pin in bench.legacy] == [1, 1]
    assert bench.pins[20].edges == 1
    assert bench.msi.sent == []
    bench.hpet.write(0x10, 8, 1)
    assert bench.replaced == [True, False]


def test_a_level_in_legacy_replacement_holds_its_irq():
    bench = Bench(legacy=True)
    bench.timer(1, LEVEL | ENABLE | FSB, comparator=10)
    bench.start(legacy=1)
    bench.ticks(10)
    assert bench.legacy[1].level
    bench.hpet.write(0x20, 4, 2)
    assert not bench.legacy[1].level


def test_without_legacy_pins_there_is_no_legacy_replacement(bench):
    assert not bench.hpet.read(0, 8) & 1 << 15
    bench.start(legacy=1)
    assert not bench.hpet.legacy


def test_halves_of_registers_can_be_written(bench):
    bench.hpet.write(0x100, 4, ENABLE | 20 << 9)
    bench.hpet.write(0x104, 4, 0xFFFFFFFF)
    bench.hpet.write(0x108, 4, 10)
    bench.hpet.write(0x10C, 4, 77)
    assert bench.hpet.read(0x108, 8) == 77 << 32 | 10
    bench.hpet.write(0x10C, 4, 0)
    bench.hpet.write(0x114, 4, 0xFEE00000)
    assert bench.hpet.read(0x110, 8) == 0xFEE00000 << 32
    bench.hpet.write(0x10, 4, 1)
    bench.ticks(10)
    assert bench.pins[20].edges == 1


def test_stopping_the_counter_cancels_and_starting_it_books_again(bench):
    bench.timer(0, ENABLE, comparator=1000)
    bench.start()
    bench.ticks(400)
    bench.hpet.write(0x10, 8, 0)
    bench.ticks(5000)
    assert bench.pins[20].edges == 0
    bench.start()
    bench.ticks(599)
    assert bench.pins[20].edges == 0
    bench.ticks(1)
    assert bench.pins[20].edges == 1


@pytest.mark.parametrize("late", [0, 1, 12_345])
def test_a_match_that_nobody_has_seen_yet_comes_when_the_counter_is_stopped(bench, late):
    bench.timer(0, LEVEL | ENABLE, comparator=1000)
    bench.timer(1, ENABLE | PERIODIC | VALUE_SET, route=21)
    bench.hpet.write(0x128, 8, 1000)
    bench.start()
    bench.clock.time += 100 * (1000 + late)  # and the wake-up is late
    bench.hpet.write(0x10, 8, 0)
    assert bench.pins[20].level
    assert bench.pins[21].edges == 1
    bench.hpet.write(0x20, 8, 1)
    bench.start()
    following = 1000 - late % 1000
    bench.ticks(following - 1)
    assert bench.pins[21].edges == 1
    bench.ticks(1)
    assert bench.pins[21].edges == 2
    assert not bench.pins[20].level


def test_status_and_comparator_are_true_before_the_wake_up_comes(bench):
    bench.timer(0, LEVEL | PERIODIC | VALUE_SET)
    bench.hpet.write(0x108, 8, 1000)
    bench.start()
    bench.clock.time += 100 * 2500
    assert bench.hpet.read(0x20, 4) == 1
    assert bench.hpet.read(0x108, 8) == 3000
    assert not bench.pins[20].level  # it is not enabled
    bench.timer(0, LEVEL | ENABLE | PERIODIC)
    assert bench.pins[20].level


def test_a_timer_becomes_one_of_32_bits(bench):
    bench.timer(0, ENABLE, comparator=0x12345678_00001000)
    bench.start()
    bench.timer(0, ENABLE | NARROW)
    assert bench.hpet.read(0x108, 8) == 0x1000
    bench.hpet.write(0x10C, 4, 5)
    assert bench.hpet.read(0x108, 8) == 0x1000
    bench.ticks(0x1000)
    assert bench.pins[20].edges == 1


def test_a_period_of_64_bits_is_written_in_halves_each_after_its_value_set(bench):
    for offset, value in ((0x108, 10), (0x10C, 1)):
        bench.hpet.write(0x100, 4, ENABLE | PERIODIC | VALUE_SET | 20 << 9)
        bench.hpet.write(offset, 4, value)
    assert not bench.hpet.read(0x100, 4) & VALUE_SET
    bench.start()
    bench.ticks((1 << 32) + 9)
    assert bench.pins[20].edges == 0
    bench.ticks(1)
    assert bench.pins[20].edges == 1
    assert bench.hpet.read(0x108, 8) == 2 * ((1 << 32) + 10)


def test_value_set_has_no_effect_on_a_one_shot_timer(bench):
    bench.timer(0, ENABLE | VALUE_SET, comparator=10)
    assert bench.hpet.read(0x100, 4) & 0x40 == 0
    bench.start()
    bench.ticks(10)
    assert bench.pins[20].edges == 1


@pytest.mark.parametrize(("offset", "size"), [(0x108, 1), (0x108, 2), (0x10A, 4), (0x10C, 8), (0x109, 1)])
def test_a_write_that_is_narrow_or_not_aligned_is_ignored(bench, offset, size):
    bench.timer(0, ENABLE, comparator=1000)
    bench.hpet.write(offset, size, 0)
    assert bench.hpet.read(0x108, 8) == 1000
    assert [bench.hpet.read(0x108 + n, 1) for n in range(2)] == [0xE8, 0x03]


# -- a model


@given(
    wide=st.booleans(),
    start=st.integers(0, 2**34),
    comparator=st.integers(0, 2**34),
    period=st.one_of(st.integers(200, 10**6), st.integers(2**31, 2**33)),
    periodic=st.booleans(),
    ticks=st.integers(0, 2**35),
)
def test_matches_are_where_the_counter_meets_the_comparator(wide, start, comparator, period, periodic, ticks):
    """By the specification: the counter reaches the comparator, and a periodic one moves on by its period."""
    bench = Bench()
    bench.hpet.write(0xF0, 8, start)
    bench.timer(0, ENABLE | (0 if wide else NARROW) | (PERIODIC | VALUE_SET if periodic else 0), comparator=comparator)
    if periodic:
        bench.hpet.write(0x108, 8, period)
    bench.start()
    modulus = 1 << (64 if wide else 32)
    first = (comparator - start) % modulus or modulus
    step = period % modulus if periodic else modulus
    expected = (ticks - first) // (step or modulus) + 1 if ticks >= first else 0
    bench.clock.time += 100 * ticks
    shown = bench.hpet.read(0x108, 8)
    assert bench.pins[20].edges == min(expected, 1)  # what nobody saw in time interrupts once
    assert shown == (comparator + expected * (step or modulus if periodic else 0)) % modulus


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_no_access_raises(size):
    bench = Bench(legacy=True)
    for offset in range(0, 0x400, size):
        bench.hpet.write(offset, size, (1 << (8 * size)) - 1)
        assert 0 <= bench.hpet.read(offset, size) < 1 << (8 * size)
        bench.timers.advance(1_000_000)


@pytest.mark.seed("S11")
@pytest.mark.seed("S10")
def test_a_level_interrupt_comes_again_after_eoi_until_the_guest_drops_it(board, cpu):
    """The whole way: HPET, pin 20 of the I/O APIC, local APIC, EOI."""
    ioapic = Vioapic(board.bus)
    board.bus.attach_ioapic(ioapic)
    hpet = Vhpet(board.clock, board.timers, board.bus, ioapic.pin)
    ioapic.write(0, 4, 0x10 + 40)
    ioapic.write(0x10, 4, 1 << 15 | 0x51)
    hpet.write(0x100, 8, LEVEL | ENABLE | 20 << 9)
    hpet.write(0x108, 8, 10)
    hpet.write(0x10, 8, 1)
    board.timers.advance(1_000)
    for _ in range(2):
        assert board.take(cpu) == 0x51
        cpu.write(0xB0, 4, 0)
    assert board.take(cpu) == 0x51
    hpet.write(0x20, 8, 1)
    cpu.write(0xB0, 4, 0)
    assert board.take(cpu) is None


def test_state_survives_save_and_restore(bench):
    bench.timer(0, LEVEL | ENABLE, comparator=10)
    bench.timer(1, ENABLE | PERIODIC | VALUE_SET, route=22, comparator=1000)
    bench.start()
    bench.ticks(400)
    state = bench.hpet.save()
    other = Bench()
    other.clock.time = 123_456_789
    other.hpet.restore(state)
    assert other.hpet.save() == state
    assert other.pins[20].level
    assert other.hpet.read(0xF0, 8) == 400
    other.ticks(600)
    assert other.pins[22].edges == 1
    other.hpet.reset()
    assert not other.pins[20].level
    assert other.timers.pending == 0
