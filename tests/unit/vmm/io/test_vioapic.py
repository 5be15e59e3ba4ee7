"""The I/O APIC: shared pins, level triggers, redirection entries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhyve.vmm.io.vioapic import Vioapic

LEVEL, MASKED, REMOTE_IRR, LOGICAL = 1 << 15, 1 << 16, 1 << 14, 1 << 11
ACTIVE_LOW, DELIVERY_STATUS = 1 << 13, 1 << 12


@pytest.fixture
def ioapic(board, cpu):
    ioapic = Vioapic(board.bus, apic_id=4)
    board.bus.attach_ioapic(ioapic)
    return ioapic


def get(ioapic, index):
    ioapic.write(0x00, 4, index)
    return ioapic.read(0x10, 4)


def put(ioapic, index, value):
    ioapic.write(0x00, 4, index)
    ioapic.write(0x10, 4, value)


def route(ioapic, pin, low, dest=0):
    put(ioapic, 0x11 + 2 * pin, dest << 24)
    put(ioapic, 0x10 + 2 * pin, low)


def finish(board, vlapic):
    """Take the pending interrupt and end it."""
    vector = board.take(vlapic)
    if vector is not None:
        vlapic.write(0xB0, 4, 0)
    return vector


# -- registers


def test_power_up_state(ioapic):
    assert get(ioapic, 0) == 4 << 24
    assert get(ioapic, 1) == 0x00170011
    assert get(ioapic, 2) == 4 << 24
    assert all(get(ioapic, 0x10 + 2 * pin) == 0x10000 for pin in range(24))
    assert get(ioapic, 0x40) == 0


def test_an_io_apic_of_32_pins_is_of_version_0x20(board):
    ioapic = Vioapic(board.bus, pins=32)
    assert get(ioapic, 1) == 0x001F0020
    assert get(ioapic, 0x10 + 62) == 0x10000


@pytest.mark.parametrize("pins", [0, 121])
def test_another_number_of_pins_is_refused(board, pins):
    with pytest.raises(ValueError, match="1 to 120"):
        Vioapic(board.bus, pins=pins)


def test_the_arbitration_id_is_loaded_with_the_id(ioapic):
    put(ioapic, 0, 0xFFFFFFFF)
    assert get(ioapic, 0) == get(ioapic, 2) == 0xF << 24
    put(ioapic, 2, 0)
    put(ioapic, 1, 0)
    assert get(ioapic, 2) == 0xF << 24
    assert get(ioapic, 1) == 0x00170011


@pytest.mark.parametrize("index", [3, 0xF, 0x40, 0xFF])
def test_an_indirect_register_that_is_not_there_reads_as_0(ioapic, index):
    put(ioapic, index, 0xFFFFFFFF)
    assert get(ioapic, index) == 0


@pytest.mark.parametrize("pin", [-1, 24])
def test_a_pin_that_is_not_there_is_refused(ioapic, pin):
    with pytest.raises(ValueError, match="0 to 23"):
        ioapic.pin(pin)


def test_remote_irr_and_delivery_status_are_read_only(ioapic):
    put(ioapic, 0x10, 0xFFFFFFFF)
    put(ioapic, 0x11, 0xFFFFFFFF)
    assert ioapic.entry(0) == 0xFF000000_0001AFFF


def test_registers_are_read_in_any_width_and_place(ioapic):
    put(ioapic, 0x10, 0x1A5C3)
    assert [ioapic.read(0x10 + n, 1) for n in range(4)] == [0xC3, 0xA5, 0x01, 0]
    assert ioapic.read(0x12, 2) == 1
    assert ioapic.read(0x10, 8) == 0x1A5C3
    assert ioapic.read(0x00, 8) == 0x10
    assert ioapic.read(0x20, 4) == 0


@pytest.mark.parametrize(("offset", "size"), [(0x10, 1), (0x10, 2), (0x11, 1), (0x12, 2), (0x0E, 4), (0x13, 4)])
def test_the_window_is_written_as_a_whole(ioapic, offset, size):
    put(ioapic, 0x10, 0x1A5C3)
    ioapic.write(offset, size, (1 << 8 * size) - 1)
    assert ioapic.entry(0) == 0x1A5C3


def test_the_index_is_a_byte_and_may_be_written_as_one(ioapic):
    for size, value in ((1, 0x12), (2, 0xFF12), (4, 0xFFFFFF12), (8, 0xFFFFFFFF_FFFFFF12)):
        ioapic.write(0, 4, 0)
        ioapic.write(0, size, value)
        assert ioapic.read(0, 4) == 0x12
        ioapic.write(1, 1, 0x34)
        assert ioapic.read(0, 4) == 0x12


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_no_access_raises(ioapic, size):
    for select in range(256):
        ioapic.write(0, 4, select)
        for offset in range(0, 0x80, size):
            ioapic.read(offset, size)
            ioapic.write(offset, size, (1 << (8 * size)) - 1)


# -- edges


def test_an_edge_is_sent_once(board, cpu, ioapic):
    route(ioapic, 4, 0x41)
    pin = ioapic.pin(4)
    pin.set_level(True)
    assert finish(board, cpu) == 0x41
    pin.set_level(True)
    assert finish(board, cpu) is None
    pin.set_level(False)
    pin.pulse()
    assert finish(board, cpu) == 0x41


def test_a_pulse_on_a_masked_pin_is_lost(board, cpu, ioapic):
    route(ioapic, 4, MASKED | 0x41)
    ioapic.pin(4).pulse()
    route(ioapic, 4, 0x41)
    assert finish(board, cpu) is None


def test_an_edge_that_came_while_masked_is_lost_though_its_line_is_still_high(board, cpu, ioapic):
    """See "Interrupt Mask": such an edge is "not delivered or held pending"."""
    pin = ioapic.pin(4)
    pin.set_level(True)
    route(ioapic, 4, 0x41)
    assert finish(board, cpu) is None
    pin.set_level(False)
    pin.set_level(True)
    assert finish(board, cpu) == 0x41


@pytest.mark.parametrize("mode", [3, 6])
def test_a_reserved_delivery_mode_sends_nothing(board, cpu, ioapic, mode):
    route(ioapic, 4, mode << 8 | 0x41)
    ioapic.pin(4).pulse()
    assert board.events == []


@pytest.mark.parametrize(("mode", "event"), [(4, "nmi"), (5, "init"), (7, "notify")])
def test_the_other_modes_are_edges_whatever_the_entry_says(board, cpu, ioapic, mode, event):
    route(ioapic, 4, LEVEL | mode << 8)
    ioapic.pin(4).set_level(True)
    assert board.names(0) == [event]
    assert not ioapic.entry(4) & REMOTE_IRR


# -- polarity


@pytest.fixture
def wired_low(board, cpu):
    """Pin 20's line is low while asserted."""
    ioapic = Vioapic(board.bus, active_low=1 << 20)
    board.bus.attach_ioapic(ioapic)
    return ioapic


@pytest.mark.seed("S9")
def test_a_line_that_is_low_while_asserted_interrupts_by_an_entry_that_says_so(board, cpu, wired_low):
    route(wired_low, 20, LEVEL | ACTIVE_LOW | 0x51)
    pin = wired_low.pin(20)
    assert finish(board, cpu) is None
    pin.set_level(True)
    assert wired_low.active(20)
    assert finish(board, cpu) == 0x51
    pin.set_level(False)
    finish(board, cpu)
    assert finish(board, cpu) is None


@pytest.mark.parametrize(("pin", "polarity"), [(20, 0), (19, ACTIVE_LOW)])
def test_an_entry_of_the_wrong_polarity_interrupts_while_nobody_asserts(board, cpu, wired_low, pin, polarity):
    source = wired_low.pin(pin)
    route(wired_low, pin, LEVEL | polarity | 0x51)
    assert wired_low.active(pin)
    assert finish(board, cpu) == 0x51
    source.set_level(True)
    assert not wired_low.active(pin)
    assert finish(board, cpu) == 0x51  # sent again by the end of the first
    assert finish(board, cpu) is None


def test_an_edge_of_the_wrong_polarity_is_the_end_of_an_assertion(board, cpu, wired_low):
    route(wired_low, 20, 0x51)
    pin = wired_low.pin(20)
    pin.set_level(True)
    assert finish(board, cpu) is None
    pin.set_level(False)
    assert finish(board, cpu) == 0x51
    pin.pulse()
    assert finish(board, cpu) == 0x51
    assert finish(board, cpu) is None


def test_turning_the_polarity_of_an_edge_makes_one_unless_masked(board, cpu, ioapic):
    route(ioapic, 4, 0x41)
    route(ioapic, 4, ACTIVE_LOW | 0x41)
    assert finish(board, cpu) == 0x41
    route(ioapic, 4, 0x41)
    assert finish(board, cpu) is None
    route(ioapic, 4, MASKED | 0x41)
    route(ioapic, 4, ACTIVE_LOW | 0x41)
    assert finish(board, cpu) is None


def test_the_entry_names_destination_and_mode(board, cpu, ioapic):
    board.add(1).write(0xD0, 4, 2 << 24)
    board.add(2)
    route(ioapic, 1, 0x41, dest=2)
    route(ioapic, 2, LOGICAL | 0x42, dest=2)
    route(ioapic, 3, 4 << 8, dest=1)
    for n in (1, 2, 3):
        ioapic.pin(n).pulse()
    assert board.pending() == {2: 0x41, 1: 0x42}
    assert "nmi" in board.names(1)


def test_an_entry_has_a_destination_of_15_bits_where_the_guest_was_told_of_them(board, cpu, ioapic):
    board.add(0x1203, x2apic=True)
    put(ioapic, 0x13, 0xFFFFFFFF)
    assert ioapic.entry(1) >> 32 == 0xFF000000
    board.bus.extended_ids = True
    put(ioapic, 0x13, 0xFFFFFFFF)
    assert ioapic.entry(1) >> 32 == 0xFFFE0000
    put(ioapic, 0x13, 0x03 << 24 | 0x12 << 17)
    put(ioapic, 0x12, 0x41)
    ioapic.pin(1).pulse()
    assert board.pending() == {0x1203: 0x41}


# -- levels


@pytest.mark.seed("S9")
def test_only_the_first_of_several_asserters_sends(board, cpu, ioapic):
    route(ioapic, 20, LEVEL | 0x51)
    first, second = ioapic.pin(20), ioapic.pin(20)
    first.set_level(True)
    first.set_level(True)
    second.set_level(True)
    assert ioapic.asserters(20) == 2
    assert board.take(cpu) == 0x51
    assert cpu.pending_vector() is None
    first.set_level(False)
    first.set_level(False)
    assert ioapic.asserters(20) == 1


@pytest.mark.seed("S9")
def test_a_shared_pin_is_sent_again_until_the_last_source_lets_go(board, cpu, ioapic):
    route(ioapic, 20, LEVEL | 0x51)
    first, second = ioapic.pin(20), ioapic.pin(20)
    first.set_level(True)
    second.set_level(True)
    assert board.take(cpu) == 0x51
    first.set_level(False)
    cpu.write(0xB0, 4, 0)
    assert board.take(cpu) == 0x51
    second.set_level(False)
    cpu.write(0xB0, 4, 0)
    assert board.take(cpu) is None


@pytest.mark.seed("S10")
def test_eoi_samples_the_pin_and_sends_again_while_it_is_asserted(board, cpu, ioapic):
    route(ioapic, 20, LEVEL | 0x51)
    pin = ioapic.pin(20)
    pin.set_level(True)
    for _ in range(3):
        assert finish(board, cpu) == 0x51
        assert ioapic.entry(20) & REMOTE_IRR
    pin.set_level(False)
    finish(board, cpu)
    assert finish(board, cpu) is None
    assert not ioapic.entry(20) & REMOTE_IRR


@pytest.mark.seed("S10")
def test_the_same_over_x2apic(board, ioapic):
    vlapic = board.add(1, x2apic=True)
    route(ioapic, 20, LEVEL | 0x51, dest=1)
    ioapic.pin(20).set_level(True)
    assert vlapic.rdmsr(0x81A) == 1 << 0x11
    assert board.take(vlapic) == 0x51
    vlapic.wrmsr(0x80B, 0)
    assert board.take(vlapic) == 0x51


@pytest.mark.seed("S9")
def test_remote_irr_holds_back_a_new_assertion_until_eoi(board, cpu, ioapic):
    route(ioapic, 20, LEVEL | 0x51)
    pin = ioapic.pin(20)
    pin.set_level(True)
    assert board.take(cpu) == 0x51
    pin.set_level(False)
    pin.set_level(True)
    assert not cpu.read(0x220, 4)
    cpu.write(0xB0, 4, 0)
    assert board.take(cpu) == 0x51


@pytest.mark.seed("S9")
def test_unmasking_a_pin_still_asserted_sends_it(board, cpu, ioapic):
    route(ioapic, 20, MASKED | LEVEL | 0x51)
    ioapic.pin(20).set_level(True)
    assert cpu.pending_vector() is None
    route(ioapic, 20, LEVEL | 0x51)
    assert finish(board, cpu) == 0x51


@pytest.mark.seed("S9")
def test_writing_an_entry_whose_pin_was_released_sends_nothing(board, cpu, ioapic):
    route(ioapic, 20, MASKED | LEVEL | 0x51)
    pin = ioapic.pin(20)
    pin.set_level(True)
    pin.set_level(False)
    route(ioapic, 20, LEVEL | 0x51)
    assert finish(board, cpu) is None


def test_a_level_that_no_apic_accepted_is_sent_later(board, cpu, ioapic):
    cpu.write(0xF0, 4, 0xFF)
    route(ioapic, 20, LEVEL | 0x51)
    ioapic.pin(20).set_level(True)
    assert get(ioapic, 0x10 + 40) == LEVEL | DELIVERY_STATUS | 0x51
    cpu.write(0xF0, 4, 0x1FF)
    route(ioapic, 20, LEVEL | 0x51)
    assert get(ioapic, 0x10 + 40) == LEVEL | REMOTE_IRR | 0x51
    assert finish(board, cpu) == 0x51


def test_making_a_pin_edge_triggered_clears_remote_irr(board, cpu, ioapic):
    route(ioapic, 20, LEVEL | 0x51)
    ioapic.pin(20).set_level(True)
    put(ioapic, 0x10 + 40, MASKED | 0x51)
    assert not ioapic.entry(20) & REMOTE_IRR


def test_the_eoi_register_completes_a_vector(board, cpu):
    ioapic = Vioapic(board.bus, pins=32)
    route(ioapic, 20, LEVEL | 0x51)
    pin = ioapic.pin(20)
    pin.set_level(True)
    pin.set_level(False)
    ioapic.write(0x40, 4, 0x50)
    assert ioapic.entry(20) & REMOTE_IRR
    ioapic.write(0x40, 4, 0x51)
    assert not ioapic.entry(20) & REMOTE_IRR


def test_version_0x11_has_no_eoi_register(board, cpu, ioapic):
    route(ioapic, 20, LEVEL | 0x51)
    pin = ioapic.pin(20)
    pin.set_level(True)
    pin.set_level(False)
    ioapic.write(0x40, 4, 0x51)
    assert ioapic.entry(20) & REMOTE_IRR
    assert ioapic.read(0x40, 4) == 0


def test_pins_of_one_vector_are_both_sampled(board, cpu, ioapic):
    route(ioapic, 20, LEVEL | 0x51)
    route(ioapic, 21, LEVEL | 0x51)
    first, second = ioapic.pin(20), ioapic.pin(21)
    first.set_level(True)
    second.set_level(True)
    assert board.take(cpu) == 0x51
    first.set_level(False)
    cpu.write(0xB0, 4, 0)
    assert board.take(cpu) == 0x51


# -- a model: three sources of two pins with one vector


PINS = (4, 20)
OPERATIONS = st.one_of(
    st.tuples(st.just("level"), st.integers(0, 2), st.booleans()),
    st.tuples(st.just("entry"), st.sampled_from(PINS), st.integers(0, 7)),
    st.tuples(st.just("eoi")),
)


class Accepting:
    """A bus on which somebody accepts everything."""

    extended_ids = False

    def __init__(self):
        self.sent = 0

    def deliver(self, dest, logical, mode, vector, level):
        self.sent += 1
        return 1


class Model:
    """The rules of a redirection entry, one by one. Vector 0x51 is in service from its sending to its EOI."""

    def __init__(self):
        self.held = [False] * 3
        self.entry = dict.fromkeys(PINS, MASKED)
        self.remote = dict.fromkeys(PINS, False)
        self.sent = 0

    def active(self, pin):
        asserted = self.held[2] if pin == 20 else self.held[0] or self.held[1]
        return asserted != bool(self.entry[pin] & ACTIVE_LOW)

    def send(self, pin):
        if not self.entry[pin] & MASKED and not self.remote[pin]:
            self.sent += 1
            self.remote[pin] = bool(self.entry[pin] & LEVEL)

    def level(self, source, asserted):
        pin = 20 if source == 2 else 4
        before = self.active(pin)
        self.held[source] = asserted
        if self.active(pin) and not before:
            self.send(pin)

    def write(self, pin, value):
        before, old = self.active(pin), self.entry[pin]
        self.entry[pin] = value
        if not value & LEVEL:
            self.remote[pin] = False
        if self.active(pin) and (value & LEVEL or (not old & MASKED and not before)):
            self.send(pin)

    def eoi(self):
        for pin in PINS:
            if self.remote[pin]:
                self.remote[pin] = False
                if self.active(pin):
                    self.send(pin)


@pytest.mark.seed("S9")
@pytest.mark.seed("S10")
@given(st.lists(OPERATIONS, max_size=60))
def test_random_operations_follow_the_model(operations):
    bus = Accepting()
    ioapic = Vioapic(bus, pins=32)
    model = Model()
    sources = [ioapic.pin(4), ioapic.pin(4), ioapic.pin(20)]
    for name, *arguments in operations:
        if name == "level":
            source, asserted = arguments
            sources[source].set_level(asserted)
            model.level(source, asserted)
        elif name == "entry":
            pin, bits = arguments
            value = 0x51 | (bits & 1) * MASKED | (bits >> 1 & 1) * LEVEL | (bits >> 2) * ACTIVE_LOW
            put(ioapic, 0x10 + 2 * pin, value)
            model.write(pin, value)
        else:
            ioapic.write(0x40, 4, 0x51)
            model.eoi()
        assert bus.sent == model.sent
        for pin in PINS:
            assert bool(ioapic.entry(pin) & REMOTE_IRR) == model.remote[pin]
            assert ioapic.active(pin) == model.active(pin)


# -- saved state


def test_state_with_held_pins_survives_save_and_restore(board, cpu, ioapic):
    route(ioapic, 20, LEVEL | 0x51)
    ioapic.pin(20)
    ioapic.pin(20).set_level(True)
    state = ioapic.save()
    copy = Vioapic(board.bus)
    first, second = copy.pin(20), copy.pin(20)
    copy.restore(state)
    assert copy.save() == state
    second.set_level(True)
    assert copy.asserters(20) == 1
    first.set_level(True)
    second.set_level(False)
    assert copy.asserters(20) == 1


def test_reset_masks_everything_and_keeps_the_wires(ioapic):
    route(ioapic, 20, LEVEL | 0x51)
    ioapic.pin(20).set_level(True)
    put(ioapic, 0, 9 << 24)
    ioapic.reset()
    assert get(ioapic, 0) == 4 << 24
    assert ioapic.entry(20) == 0x10000
    assert ioapic.asserters(20) == 1


def test_a_state_of_another_size_is_refused(board, ioapic):
    with pytest.raises(ValueError, match="24 pins"):
        Vioapic(board.bus, pins=32).restore(ioapic.save())
