"""The HPET: counter, comparators, routes, level-triggered interrupts."""

import pytest

from pyhyve.base.fakes import FakeClock, FakeMsiSink, FakePin, FakeTimers
from pyhyve.vmm.io.vhpet import Vhpet
from pyhyve.vmm.io.vioapic import Vioapic

LEVEL, ENABLE, PERIODIC, VALUE_SET, FSB = 1 << 1, 1 << 2, 1 << 3, 1 << 6, 1 << 14


class Bench:
    """An HPET with one FakePin for each I/O APIC pin, whoever drives it."""

    def __init__(self, legacy=False):
        self.clock = FakeClock(555)
        self.timers = FakeTimers(self.clock)
        self.msi = FakeMsiSink()
        self.pins = {}
        self.legacy = (FakePin(), FakePin())
        self.hpet = Vhpet(self.clock, self.timers, self.msi, self.pin, self.legacy if legacy else None)

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


def test_capabilities_say_ten_megahertz_eight_timers_of_32_bits(bench):
    assert bench.hpet.read(0, 8) == 100_000_000 << 32 | 0x8086_0701
    assert bench.hpet.read(4, 4) == 100_000_000
    assert bench.hpet.read(0, 4) == 0x8086_0701


@pytest.mark.seed("S11")
def test_every_timer_may_be_routed_to_pins_20_to_23(bench):
    for n in range(8):
        assert bench.hpet.read(0x104 + 0x20 * n, 4) == 0x00F00000
        assert bench.hpet.read(0x100 + 0x20 * n, 4) & 0x10


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


def test_the_counter_wraps_at_32_bits(bench):
    bench.hpet.write(0xF0, 8, 0xFFFFFFFF)
    bench.start()
    bench.ticks(3)
    assert bench.hpet.read(0xF0, 8) == 2


@pytest.mark.seed("S11")
def test_one_shot_fires_at_its_comparator_and_again_only_after_a_wrap(bench):
    bench.timer(0, ENABLE, comparator=1000)
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
    for n in range(3):
        bench.timer(n, ENABLE, comparator=10)
    bench.start(legacy=1)
    assert bench.hpet.legacy
    bench.ticks(10)
    assert [pin.edges for pin in bench.legacy] == [1, 1]
    assert bench.pins[20].edges == 1


def test_without_legacy_pins_there_is_no_legacy_replacement(bench):
    assert not bench.hpet.read(0, 8) & 1 << 15
    bench.start(legacy=1)
    assert not bench.hpet.legacy


def test_halves_of_registers_can_be_written(bench):
    bench.hpet.write(0x100, 4, ENABLE | 20 << 9)
    bench.hpet.write(0x104, 4, 0xFFFFFFFF)
    bench.hpet.write(0x108, 4, 10)
    bench.hpet.write(0x10C, 4, 77)
    assert bench.hpet.read(0x108, 8) == 10
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
