"""The 8254 against one that is clocked: every pulse of its clock is carried out, as the data sheet describes it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pyhyve.base.fakes import FakeClock, FakePin, FakeTimers
from pyhyve.vmm.io.vatpit import PIT_HZ, Vatpit


class Clocked:
    """One counter. "Mode Definitions", "Gate Pin Operations" and, for the null count, "Read-Back Command"."""

    def __init__(self):
        self.gate = False
        self.control(3, False)

    def control(self, mode, bcd):
        self.mode = mode
        self.modulus = 10_000 if bcd else 0x10000
        self.out = mode != 0
        self.null = True
        self.register = 0  # the count register
        self.element = 0  # the counting element
        self.counting = self.load = self.trigger = self.half = self.strobe = False

    def first_byte(self):
        if self.mode == 0:
            self.half = True
            self.out = False

    def count(self, value):
        self.register = value or self.modulus
        self.null = True
        self.half = False
        if self.mode in (0, 4) or (self.mode in (2, 3) and not self.counting):
            self.load = True
        if self.mode == 0:
            self.out = False

    def set_gate(self, gate):
        if gate and not self.gate and self.mode in (1, 2, 3, 5) and self.register:
            self.trigger = True
        if not gate and self.mode in (2, 3):
            self.out = True
        self.gate = gate

    def reload(self):
        self.odd = bool(self.register & 1)
        self.element = self.register - self.odd if self.mode == 3 else self.register
        self.null = False

    def pulse(self):
        if self.load or self.trigger:
            self.load = self.trigger = False
            self.reload()
            self.counting = self.strobe = True
            self.out = self.mode not in (0, 1)
        elif self.counting and (self.gate or self.mode in (1, 5)) and not self.half:
            getattr(self, f"count{self.mode}")()

    def down(self):
        self.element = (self.element - 1) % self.modulus

    def count0(self):
        self.down()
        self.out = self.out or self.element == 0

    count1 = count0

    def count2(self):
        if self.element == 1:
            self.reload()
            self.out = True
        else:
            self.down()
            self.out = self.element != 1

    def count3(self):
        """An odd count's high half has one pulse more: there the element stands at 0 before it is loaded again."""
        if self.element == 0 or (self.element == 2 and not (self.out and self.odd)):
            self.out = not self.out
            self.reload()
        else:
            self.element -= 2

    def count4(self):
        self.down()
        self.out = not (self.element == 0 and self.strobe)
        if not self.out:
            self.strobe = False

    count5 = count4


class Pair:
    """Channel 2 of both."""

    def __init__(self):
        self.clock = FakeClock()
        self.timers = FakeTimers(self.clock)
        self.pit = Vatpit(self.clock, self.timers, FakePin())
        self.model = Clocked()
        self.ticks = 0

    def control(self, mode, bcd):
        self.pit.write(0x43, 1, 2 << 6 | 3 << 4 | mode << 1 | bcd)
        self.model.control(mode, bcd)

    def count(self, value):
        if self.model.modulus == 10_000:
            written = int(str(value % 10_000), 16)
        else:
            written = value & 0xFFFF
        self.pit.write(0x42, 1, written & 0xFF)
        self.model.first_byte()
        self.compare()
        self.pit.write(0x42, 1, written >> 8)
        self.model.count(value)

    def gate(self, gate):
        self.pit.write(0x61, 1, int(gate))
        self.model.set_gate(gate)

    def run(self, pulses):
        for _ in range(pulses):
            self.ticks += 1
            self.timers.advance(-(-self.ticks * 1_000_000_000 // PIT_HZ) - self.clock.now())
            self.model.pulse()
            self.compare()

    def compare(self):
        model = self.model
        assert self.pit.output(2) == model.out
        self.pit.write(0x43, 1, 0xC8)  # latch status and count
        status = self.pit.read(0x42, 1)
        assert bool(status & 0x80) == model.out
        assert bool(status & 0x40) == model.null
        assert status >> 1 & 7 == model.mode
        value = self.pit.read(0x42, 1) | self.pit.read(0x42, 1) << 8
        if model.counting:
            element = model.element % model.modulus
            assert value == (int(str(element), 16) if model.modulus == 10_000 else element)


COUNTS = st.one_of(st.integers(2, 12), st.sampled_from((13, 20, 0)))
OPERATIONS = st.one_of(
    st.tuples(st.just("control"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("count"), COUNTS),
    st.tuples(st.just("gate"), st.booleans()),
    st.tuples(st.just("run"), st.integers(0, 30)),
)


@settings(deadline=None)
@given(st.integers(0, 5), COUNTS, st.lists(OPERATIONS, max_size=25))
def test_every_mode_counts_as_one_that_is_clocked(mode, count, operations):
    pair = Pair()
    for name, *arguments in [("control", mode, False), ("gate", True), ("count", count), *operations, ("run", 40)]:
        getattr(pair, name)(*arguments)
        pair.compare()
