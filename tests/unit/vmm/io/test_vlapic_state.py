"""A local APIC restored from a saved state goes on as the one that was saved."""

from board import Board
from chipstate import assert_goes_on_alike
from hypothesis import given, settings
from hypothesis import strategies as st

from pyhyve.base.errors import GuestFault

VECTORS = st.sampled_from((0x0F, 0x10, 0x31, 0x3F, 0x41, 0x42, 0x80, 0xEC, 0xFE))
OFFSETS = st.sampled_from((0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0, 0x280, 0x2F0, 0x300, 0x310, 0x320, 0x330,
                           0x340, 0x350, 0x360, 0x370, 0x380, 0x390, 0x3E0, 0x3F0, 0x84))  # fmt: skip
VALUES = st.one_of(
    VECTORS,
    st.sampled_from((0, 0x1FF, 0xFF, 0x100FF, 0x20031, 0x40041, 0x8441, 0x700, 0x10000, 0xB, 1_000, 50_000, 0x44041)),
    st.integers(0, 0xFFFFFFFF),
)
OPERATIONS = st.one_of(
    st.tuples(st.just("read"), OFFSETS),
    st.tuples(st.just("write"), OFFSETS, VALUES),
    st.tuples(st.just("rdmsr"), OFFSETS.map(lambda offset: 0x800 + (offset >> 4))),
    st.tuples(st.just("wrmsr"), OFFSETS.map(lambda offset: 0x800 + (offset >> 4)), VALUES),
    st.tuples(st.just("mode"), st.sampled_from((0x800, 0xC00, 0, 0x900, 0xD00, 0x10800))),
    st.tuples(st.just("local"), st.sampled_from((0x2F, 0x33, 0x34))),
    st.tuples(st.just("deadline"), st.integers(0, 100_000)),
    st.tuples(st.just("post"), VECTORS, st.booleans()),
    st.tuples(st.just("message"), st.integers(0, 7), VECTORS),
    st.tuples(st.just("lint"), st.integers(0, 1), st.booleans()),
    st.tuples(st.just("take")),
    st.tuples(st.just("init")),
    st.tuples(st.just("cr8"), st.integers(0, 15)),
    st.tuples(st.just("advance"), st.sampled_from((0, 1, 999, 20_000, 1_000_000))),
)


class ApicBench:
    """CPU 0 of two, and what its vCPU and the other one hear."""

    def __init__(self, start):
        self.board = Board(start)
        self.chip = self.board.add(0)
        self.other = self.board.add(1)
        self.save = self.chip.save

    def restore(self, state):
        self.chip.restore(state)
        self.board.events.clear()

    def apply(self, operation):
        name, *arguments = operation
        try:
            answer = getattr(self, name)(*arguments)
        except GuestFault as fault:
            answer = (fault.vector, fault.error)
        chip = self.chip
        # A chip that does not run any more may have been asked to notify once more, or once less.
        heard = [event for event in self.board.events if event[1] != "notify"]
        self.board.events.clear()
        return answer, heard, chip.pending_vector(), chip.ppr, chip.cr8, chip.base_msr, chip.page, chip.extint_enabled()

    def read(self, offset):
        return self.chip.read(offset, 4)

    def write(self, offset, value):
        self.chip.write(offset, 4, value)

    def rdmsr(self, msr):
        return self.chip.rdmsr(msr)

    def wrmsr(self, msr, value):
        self.chip.wrmsr(msr, value)

    def mode(self, bits):
        self.chip.wrmsr(0x1B, 0xFEE00000 | bits)

    def deadline(self, ticks):
        if ticks:
            ticks += self.board.tsc()
        self.chip.wrmsr(0x6E0, ticks)

    def post(self, vector, level):
        return self.chip.post(vector, level)

    def message(self, mode, vector):
        return self.chip.receive(mode, vector, False)

    def lint(self, pin, asserted):
        self.chip.lint(pin, asserted)

    def local(self, entry):
        self.chip.local_interrupt(entry)

    def take(self):
        return self.board.take(self.chip)

    def init(self):
        self.chip.init()

    def cr8(self, value):
        self.chip.cr8 = value

    def advance(self, ns):
        self.board.timers.advance(ns)


@settings(deadline=None)
@given(before=st.lists(OPERATIONS, max_size=30), after=st.lists(OPERATIONS, max_size=30))
def test_a_restored_local_apic_goes_on_alike(before, after):
    assert_goes_on_alike(ApicBench, before, after)
