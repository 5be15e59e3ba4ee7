"""Every chip but the local APIC: restored from a saved state, it goes on as the one that was saved."""

import pytest
from chipstate import assert_goes_on_alike
from hypothesis import given, settings
from hypothesis import strategies as st

from pyhyve.base.fakes import FakeClock, FakeMsiSink, FakePin, FakeTimers
from pyhyve.bhyve.lpc.pm import PowerManagement
from pyhyve.vmm.io.vatpic import Vatpic
from pyhyve.vmm.io.vatpit import Vatpit
from pyhyve.vmm.io.vhpet import Vhpet
from pyhyve.vmm.io.vioapic import Vioapic
from pyhyve.vmm.io.vpmtmr import Vpmtmr
from pyhyve.vmm.io.vrtc import Vrtc

BYTES = st.one_of(st.sampled_from((0, 0x20, 0xFF)), st.integers(0, 255))
WORDS = st.one_of(st.integers(0, 0xFFFFFFFF), st.integers(0, 100_000))
TIMES = st.one_of(st.integers(0, 3_000), st.sampled_from((20_000, 999_999, 10**9, 10**10)), st.integers(0, 10**7))


class Bench:
    """A chip between a clock and its pins. `heard` collects what it does besides driving those."""

    def __init__(self, start):
        self.clock = FakeClock(start)
        self.timers = FakeTimers(self.clock)
        self.pins = []
        self.heard = []
        self.chip = self.make()

    def make(self):
        raise NotImplementedError

    def pin(self, number=0):
        self.pins.append(FakePin())
        return self.pins[-1]

    def save(self):
        return self.chip.save()

    def restore(self, state):
        self.chip.restore(state)
        self.look()

    def look(self):
        """What has been seen since the last look."""
        seen = [(pin.level, pin.edges) for pin in self.pins], list(self.heard)
        for pin in self.pins:
            pin.edges = 0
        self.heard.clear()
        return seen

    def apply(self, operation):
        name, *arguments = operation
        return getattr(self, name)(*arguments), self.look()

    def read(self, offset, size=1):
        return self.chip.read(offset, size)

    def write(self, offset, value, size=1):
        self.chip.write(offset, size, value & (1 << 8 * size) - 1)

    def advance(self, ns):
        self.timers.advance(ns)


def operations(offsets, values, *more, sizes=(1,)):
    return st.one_of(
        st.tuples(st.just("read"), offsets, st.sampled_from(sizes)),
        st.tuples(st.just("write"), offsets, values, st.sampled_from(sizes)),
        st.tuples(st.just("write"), offsets, values, st.sampled_from(sizes)),
        st.tuples(st.just("advance"), TIMES),
        *more,
    )


LEVELS = st.tuples(st.just("level"), st.integers(0, 5), st.booleans())


class Ioapic(Bench):
    extended_ids = True
    PINS = (1, 4, 4, 20, 20, 31)
    OPERATIONS = operations(
        st.sampled_from((0x00, 0x10, 0x40)),
        st.one_of(
            st.sampled_from((0, 1, 0x12, 0x18, 0x38, 0x39, 0x4E)), WORDS, st.sampled_from((0x51, 0x8051, 0xA051))
        ),
        LEVELS,
        sizes=(4,),
    )

    def make(self):
        chip = Vioapic(self, pins=32, active_low=1 << 20)
        self.sources = [chip.pin(n) for n in self.PINS]
        return chip

    def deliver(self, *message):
        self.heard.append(message)
        return message[0] & 1  # half of all destinations accept

    def level(self, source, asserted):
        self.sources[source].set_level(asserted)


class Pic(Bench):
    INPUTS = (0, 1, 5, 8, 10, 10)
    OPERATIONS = operations(
        st.sampled_from((0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)),
        st.one_of(st.sampled_from((0x11, 0x13, 0x30, 0x03, 0x0B, 0x0C, 0x68)), BYTES),
        LEVELS,
        st.tuples(st.just("pulse"), st.integers(0, 5)),
        st.tuples(st.just("acknowledge")),
        st.tuples(st.just("start"), st.sampled_from((0x01, 0x03, 0x11))),
    )

    def make(self):
        chip = Vatpic(self.heard.append)
        self.sources = [chip.pin(n) for n in self.INPUTS]
        return chip

    def level(self, source, asserted):
        self.sources[source].set_level(asserted)

    def pulse(self, source):
        self.sources[source].pulse()

    def acknowledge(self):
        return self.chip.acknowledge()

    def start(self, icw4):
        for port in (0x20, 0xA0):
            self.write(port, 0x11)
            for word in (port + 0x10, 4, icw4, 0):
                self.write(port + 1, word)


class Pit(Bench):
    OPERATIONS = operations(
        st.sampled_from((0x40, 0x41, 0x42, 0x43, 0x61)),
        st.one_of(BYTES, st.sampled_from((0x00, 0x14, 0x30, 0x34, 0x36, 0x38, 0xB0, 0xB4, 0xC2, 0xCE))),
        st.tuples(st.just("program"), st.integers(0, 2), st.integers(0, 5), st.integers(0, 0xFFFF), st.booleans()),
    )

    def make(self):
        return Vatpit(self.clock, self.timers, self.pin())

    def program(self, channel, mode, count, bcd):
        self.write(0x43, channel << 6 | 0x30 | mode << 1 | bcd)
        self.write(0x40 + channel, count)
        self.write(0x40 + channel, count >> 8)


class Rtc(Bench):
    OPERATIONS = operations(
        st.sampled_from((0x70, 0x71)),
        st.one_of(st.integers(0, 14), BYTES),
        st.tuples(st.just("put"), st.sampled_from((0x0A,)), st.sampled_from((0x26, 0x20, 0x2F, 0x76, 0x23))),
        st.tuples(
            st.just("put"), st.sampled_from((0x0B,)), st.sampled_from((0x02, 0x12, 0x42, 0x72, 0x82, 0xF6, 0x00))
        ),
        st.tuples(st.just("put"), st.sampled_from((0, 1, 2, 3, 4, 5, 7, 8, 9, 0x32)), st.integers(0, 0x30)),
        st.tuples(st.just("put"), st.sampled_from((1, 3, 5)), st.just(0xFF)),
        st.tuples(st.just("get"), st.sampled_from((0, 2, 4, 8, 0x0A, 0x0C, 0x0D, 0x32, 0x50))),
    )

    def make(self):
        return Vrtc(self.clock, self.timers, self.pin(), now=lambda: 1_709_251_190)

    def put(self, index, value):
        self.write(0x70, index)
        self.write(0x71, value)

    def get(self, index):
        self.write(0x70, index)
        return self.read(0x71)


class Hpet(Bench):
    OPERATIONS = operations(
        st.sampled_from((0x00, 0x10, 0x20, 0xF0, 0xF4, 0x100, 0x104, 0x108, 0x10C, 0x110, 0x120, 0x128, 0x1E0, 0x1E8)),
        st.one_of(WORDS, st.sampled_from((0, 1, 2, 3, 0x2806, 0x284C, 0x294E, 0x6804, 0x2A0C, 0x150))),
        sizes=(4, 8),
    )

    def make(self):
        self.msi = FakeMsiSink()
        legacy = (self.pin(), self.pin())
        return Vhpet(self.clock, self.timers, self.msi, self.pin, legacy, self.heard.append)

    def look(self):
        self.heard += self.msi.sent
        self.msi.sent.clear()
        return super().look()


class PmTimer(Bench):
    OPERATIONS = operations(st.integers(0, 4), WORDS, sizes=(1, 2, 4))

    def make(self):
        return Vpmtmr(self.clock, self.timers, lambda: self.heard.append("carry"), 24)


class Pm(Bench):
    OPERATIONS = operations(
        st.integers(0, 4),
        st.one_of(WORDS, st.sampled_from((0x0101, 0x2001, 0x3400, 0xFFFF))),
        st.tuples(st.just("call"), st.sampled_from(("press_power_button", "timer_carried"))),
        st.tuples(st.just("gpe"), st.integers(0, 15), st.integers(0, 3), BYTES),
        st.tuples(st.just("mode"), st.sampled_from((0xA0, 0xA1, 0))),
        sizes=(1, 2),
    )

    def make(self):
        return PowerManagement(self.pin(), lambda: self.heard.append("power off"))

    def call(self, name):
        return getattr(self.chip, name)()

    def gpe(self, bit, offset, value):
        self.chip.raise_gpe(bit)
        self.chip.gpe0.write(offset, 1, value)
        return self.chip.gpe0.read(0, 4)

    def mode(self, command):
        self.chip.smi_command.write(0, 1, command)


@pytest.mark.parametrize("kind", [Ioapic, Pic, Pit, Rtc, Hpet, PmTimer, Pm])
@settings(deadline=None)
@given(data=st.data())
def test_a_restored_chip_goes_on_alike(kind, data):
    many = st.lists(kind.OPERATIONS, max_size=30)
    assert_goes_on_alike(kind, data.draw(many, "before"), data.draw(many, "after"))
