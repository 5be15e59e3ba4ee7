"""The 8259 pair: initialization, priorities, EOI commands, cascade, ELCR."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhyve.vmm.io.vatpic import Vatpic


@pytest.fixture
def output():
    return []


@pytest.fixture
def pic(output):
    """Initialized as a PC does: vectors 0x30 and 0x38, everything unmasked."""
    pic = Vatpic(output.append)
    start(pic)
    return pic


def start(pic, icw4=0x01):
    for command, data, base, cascade in ((0x20, 0x21, 0x30, 4), (0xA0, 0xA1, 0x38, 2)):
        pic.write(command, 1, 0x11)
        pic.write(data, 1, base)
        pic.write(data, 1, cascade)
        pic.write(data, 1, icw4)
        pic.write(data, 1, 0)


def test_nothing_is_delivered_before_initialization(output):
    pic = Vatpic(output.append)
    pic.pin(1).set_level(True)
    assert not pic.pending()
    assert output == []


def test_intr_rises_with_a_request_and_falls_with_its_acknowledge(pic, output):
    pic.pin(1).pulse()
    assert pic.pending()
    assert pic.acknowledge() == 0x31
    assert not pic.pending()
    assert output == [True, False]


def test_the_lower_number_is_served_first_and_nests(pic):
    pic.pin(4).pulse()
    pic.pin(1).pulse()
    assert pic.acknowledge() == 0x31
    assert not pic.pending()
    pic.pin(0).pulse()
    assert pic.acknowledge() == 0x30
    pic.write(0x20, 1, 0x20)
    pic.write(0x20, 1, 0x20)
    assert pic.acknowledge() == 0x34


def test_slave_interrupts_come_through_the_cascade(pic):
    pic.pin(8).pulse()
    assert pic.acknowledge() == 0x38
    pic.write(0x20, 1, 0x0B)
    pic.write(0xA0, 1, 0x0B)
    assert pic.read(0x20, 1) == 0x04
    assert pic.read(0xA0, 1) == 0x01
    pic.pin(12).pulse()
    assert not pic.pending()
    pic.write(0xA0, 1, 0x20)
    pic.write(0x20, 1, 0x20)
    assert pic.acknowledge() == 0x3C


def test_the_slave_outranks_irq_3_and_up(pic):
    pic.pin(3).pulse()
    pic.pin(15).pulse()
    assert pic.acknowledge() == 0x3F


def test_a_mask_holds_a_request_back_but_keeps_it(pic):
    pic.write(0x21, 1, 0x02)
    pic.pin(1).pulse()
    assert not pic.pending()
    assert pic.read(0x20, 1) == 0x02
    pic.write(0x21, 1, 0x00)
    assert pic.acknowledge() == 0x31


def test_an_acknowledge_with_nothing_pending_is_spurious(pic):
    assert pic.acknowledge() == 0x37
    pic.write(0x20, 1, 0x0B)
    assert pic.read(0x20, 1) == 0


def test_what_the_slave_has_withdrawn_by_the_acknowledge_is_a_spurious_irq_15(pic, output):
    pic.write(0x4D1, 1, 0x04)
    pin = pic.pin(10)
    pin.set_level(True)
    pin.set_level(False)
    assert output == [True]
    assert pic.acknowledge() == 0x3F
    assert in_service(pic) == (0x04, 0)  # the master has served its input; the guest ends it there only
    pic.write(0x20, 1, 0x20)
    assert not pic.pending()


def test_a_request_masked_before_its_acknowledge_is_spurious_too(pic):
    pic.pin(12).pulse()
    pic.write(0xA1, 1, 0x10)
    assert pic.acknowledge() == 0x3F
    pic.write(0x20, 1, 0x20)
    pic.write(0xA1, 1, 0)
    assert pic.acknowledge() == 0x3C


def in_service(pic):
    pic.write(0x20, 1, 0x0B)
    pic.write(0xA0, 1, 0x0B)
    return pic.read(0x20, 1), pic.read(0xA0, 1)


def test_requests_and_service_are_read_as_chosen(pic):
    pic.pin(1).pulse()
    pic.acknowledge()
    pic.pin(5).pulse()
    pic.write(0x20, 1, 0x0A)
    assert pic.read(0x20, 1) == 0x20
    pic.write(0x20, 1, 0x0B)
    assert pic.read(0x20, 1) == 0x02
    pic.write(0x20, 1, 0x08)  # neither: it stays as it was
    assert pic.read(0x20, 1) == 0x02


@pytest.mark.parametrize("icw4", [0x01, 0x03])
def test_two_requests_of_the_slave_come_one_after_the_other(pic, icw4):
    start(pic, icw4)
    pic.pin(8).pulse()
    pic.pin(12).pulse()
    assert pic.acknowledge() == 0x38
    if icw4 == 0x01:
        assert not pic.pending()
        pic.write(0xA0, 1, 0x20)
        pic.write(0x20, 1, 0x20)
    assert pic.acknowledge() == 0x3C


def test_automatic_eoi_with_rotation_moves_what_was_served_to_the_bottom(pic):
    start(pic, icw4=0x03)
    pic.write(0x20, 1, 0x80)
    served = []
    for _ in range(4):
        pic.pin(1).pulse()
        pic.pin(4).pulse()
        served.append(pic.acknowledge())
    assert served == [0x31, 0x34, 0x31, 0x34]
    pic.write(0x20, 1, 0x00)  # rotation ends
    pic.acknowledge()
    for _ in range(2):
        pic.pin(1).pulse()
        assert pic.acknowledge() == 0x31


def test_rotation_on_a_specific_eoi(pic):
    pic.pin(1).pulse()
    pic.acknowledge()
    pic.write(0x20, 1, 0xE1)
    for n in (0, 1, 3):
        pic.pin(n).pulse()
    assert pic.acknowledge() == 0x33
    pic.write(0x20, 1, 0x20)
    assert pic.acknowledge() == 0x30


def test_an_eoi_with_nothing_in_service_rotates_nothing(pic):
    pic.write(0x20, 1, 0xA0)
    pic.pin(0).pulse()
    pic.pin(7).pulse()
    assert pic.acknowledge() == 0x30


def test_a_polled_slave_asks_no_more(pic):
    pic.pin(12).pulse()
    pic.write(0xA0, 1, 0x0C)
    assert pic.read(0xA1, 1) == 0x84  # by either port
    assert not pic.pending()
    assert pic.read(0xA1, 1) == 0


def test_polling_the_master_says_which_slave_to_poll(pic):
    pic.pin(9).pulse()
    for port, answer in ((0x20, 0x82), (0xA0, 0x81)):
        pic.write(port, 1, 0x0C)
        assert pic.read(port, 1) == answer
    assert in_service(pic) == (0x04, 0x02)


def test_a_master_that_was_started_again_looks_at_its_slave(pic):
    pic.pin(9).pulse()
    for port, value in ((0x20, 0x11), (0x21, 0x50), (0x21, 4), (0x21, 1), (0x21, 0)):
        pic.write(port, 1, value)
    assert pic.acknowledge() == 0x39


def test_a_master_without_slaves_serves_input_2_itself(pic):
    for port, value in ((0x20, 0x13), (0x21, 0x50), (0x21, 1), (0x21, 0)):
        pic.write(port, 1, value)
    pic.pin(9).pulse()
    assert pic.acknowledge() == 0x52


def test_a_held_edge_is_served_once(pic):
    pin = pic.pin(5)
    pin.set_level(True)
    assert pic.acknowledge() == 0x35
    pic.write(0x20, 1, 0x20)
    assert not pic.pending()
    pin.set_level(False)
    pin.set_level(True)
    assert pic.acknowledge() == 0x35


def test_the_masks_bits_are_written_while_not_initializing_only(pic):
    pic.write(0x21, 1, 0x5A)
    assert pic.read(0x21, 1) == 0x5A
    pic.write(0x20, 1, 0x11)
    assert pic.read(0x21, 1) == 0
    pic.write(0x21, 1, 0x47)  # ICW2: the low bits are no part of the base
    pic.write(0x21, 1, 4)
    pic.write(0x21, 1, 1)
    assert pic.read(0x21, 1) == 0
    pic.pin(1).pulse()
    assert pic.acknowledge() == 0x41


# -- a model of one 8259: its levels in the order of their priority


class Model:
    def __init__(self, aeoi):
        self.order = list(range(8))
        self.irr, self.isr, self.imr = set(), set(), set()
        self.aeoi, self.special, self.rotating = aeoi, False, False

    def counted(self):
        """Levels in service that count: in special mask mode the masked ones do not."""
        return self.isr - self.imr if self.special else self.isr

    def choice(self):
        for level in self.order:
            if level in self.counted():
                return None
            if level in self.irr - self.imr:
                return level
        return None

    def to_bottom(self, level):
        while self.order[-1] != level:
            self.order.append(self.order.pop(0))

    def acknowledge(self):
        level = self.choice()
        if level is None:
            return 7
        self.irr.discard(level)
        if not self.aeoi:
            self.isr.add(level)
        elif self.rotating:
            self.to_bottom(level)
        return level

    def ocw2(self, form, level):
        """R, SL and EOI: "Operation Command Words", the table of OCW2."""
        highest = next((each for each in self.order if each in self.counted()), None)
        if form == 0b001 or form == 0b101:
            self.end(highest, form == 0b101)
        elif form == 0b011 or form == 0b111:
            self.end(level, form == 0b111)
        elif form == 0b110:
            self.to_bottom(level)
        elif form != 0b010:
            self.rotating = form == 0b100

    def end(self, level, rotate):
        if level is not None:
            self.isr.discard(level)
            if rotate:
                self.to_bottom(level)


OPERATIONS = st.one_of(
    st.tuples(st.just("pulse"), st.sampled_from((0, 1, 3, 4, 5, 6, 7))),
    st.tuples(st.just("acknowledge")),
    st.tuples(st.just("mask"), st.integers(0, 255)),
    st.tuples(st.just("ocw2"), st.integers(0, 7), st.integers(0, 7)),
    st.tuples(st.just("special"), st.booleans()),
)


@given(st.booleans(), st.lists(OPERATIONS, max_size=60))
def test_every_command_follows_the_model(aeoi, operations):
    pic, model = Vatpic(lambda level: None), Model(aeoi)
    start(pic, icw4=0x03 if aeoi else 0x01)
    pins = {n: pic.pin(n) for n in range(8) if n != 2}
    for name, *arguments in operations:
        if name == "pulse":
            pins[arguments[0]].pulse()
            model.irr.add(arguments[0])
        elif name == "acknowledge":
            assert pic.acknowledge() == 0x30 | model.acknowledge()
        elif name == "mask":
            pic.write(0x21, 1, arguments[0])
            model.imr = {n for n in range(8) if arguments[0] >> n & 1}
        elif name == "ocw2":
            form, level = arguments
            pic.write(0x20, 1, form << 5 | level)
            model.ocw2(form, level)
        else:
            pic.write(0x20, 1, 0x68 if arguments[0] else 0x48)
            model.special = arguments[0]
        assert pic.pending() == (model.choice() is not None)
        for command, levels in ((0x0A, model.irr), (0x0B, model.isr)):
            pic.write(0x20, 1, command)
            assert pic.read(0x20, 1) == sum(1 << n for n in levels)


def test_specific_eoi_ends_the_level_that_it_names(pic):
    pic.pin(4).pulse()
    pic.acknowledge()
    pic.pin(1).pulse()
    pic.acknowledge()
    pic.write(0x20, 1, 0x64)
    pic.write(0x20, 1, 0x0B)
    assert pic.read(0x20, 1) == 0x02


def test_automatic_eoi_leaves_nothing_in_service(pic):
    start(pic, icw4=0x03)
    for _ in range(2):
        pic.pin(1).pulse()
        assert pic.acknowledge() == 0x31


def test_rotation_moves_the_served_level_to_the_bottom(pic):
    pic.pin(1).pulse()
    pic.acknowledge()
    pic.write(0x20, 1, 0xA0)
    pic.pin(0).pulse()
    pic.pin(4).pulse()
    assert pic.acknowledge() == 0x34


def test_set_priority(pic):
    pic.write(0x20, 1, 0xC3)
    pic.pin(1).pulse()
    pic.pin(4).pulse()
    assert pic.acknowledge() == 0x34


def test_special_mask_mode_lets_lower_levels_through(pic):
    pic.pin(1).pulse()
    pic.acknowledge()
    pic.pin(4).pulse()
    assert not pic.pending()
    pic.write(0x21, 1, 0x02)
    pic.write(0x20, 1, 0x68)
    assert pic.acknowledge() == 0x34
    pic.write(0x20, 1, 0x20)
    pic.write(0x20, 1, 0x0B)
    assert pic.read(0x20, 1) == 0x02


def test_special_fully_nested_mode_lets_the_slave_nest_in_itself(pic):
    start(pic, icw4=0x11)
    pic.pin(12).pulse()
    assert pic.acknowledge() == 0x3C
    pic.pin(8).pulse()
    assert pic.acknowledge() == 0x38


def test_poll_acknowledges_by_a_read(pic):
    pic.write(0x20, 1, 0x0C)
    assert pic.read(0x20, 1) & 0x80 == 0
    pic.pin(5).pulse()
    pic.write(0x20, 1, 0x0C)
    assert pic.read(0x20, 1) == 0x85
    assert not pic.pending()


@pytest.mark.seed("S9")
def test_a_level_triggered_input_stays_requested_while_any_source_holds_it(pic):
    pic.write(0x4D1, 1, 0x04)
    first, second = pic.pin(10), pic.pin(10)
    first.set_level(True)
    second.set_level(True)
    assert pic.acknowledge() == 0x3A
    first.set_level(False)
    pic.write(0xA0, 1, 0x20)
    pic.write(0x20, 1, 0x20)
    assert pic.acknowledge() == 0x3A
    second.set_level(False)
    pic.write(0xA0, 1, 0x20)
    pic.write(0x20, 1, 0x20)
    assert not pic.pending()


def test_a_level_withdrawn_before_the_acknowledge_is_spurious(pic, output):
    pic.write(0x4D0, 1, 0x20)
    pin = pic.pin(5)
    pin.set_level(True)
    pin.set_level(False)
    assert output == [True, False]
    assert pic.acknowledge() == 0x37


def test_elcr_keeps_the_fixed_edges_and_reads_back(pic):
    pic.write(0x4D0, 2, 0xFFFF)
    assert pic.read(0x4D0, 1) == 0xF8
    assert pic.read(0x4D1, 1) == 0xDE
    assert pic.read(0x4D0, 2) == 0xDEF8


def test_initialization_forgets_edges_and_keeps_held_levels(pic):
    pic.write(0x4D0, 1, 0x20)
    pic.pin(5).set_level(True)
    pic.pin(1).pulse()
    start(pic)
    assert pic.acknowledge() == 0x35
    assert not pic.pending()


def test_initialization_without_icw4(output):
    pic = Vatpic(output.append)
    pic.write(0x20, 1, 0x10)
    pic.write(0x21, 1, 0x40)
    pic.write(0x21, 1, 0x04)
    pic.write(0x21, 1, 0xFE)
    assert pic.read(0x21, 1) == 0xFE
    pic.pin(0).pulse()
    assert pic.acknowledge() == 0x40


@pytest.mark.parametrize("irq", [-1, 2, 16])
def test_inputs_that_are_not_there_are_refused(pic, irq):
    with pytest.raises(ValueError, match="8259 input"):
        pic.pin(irq)


def test_no_access_raises(pic):
    for port in (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1):
        for value in range(256):
            for size in (1, 2, 4):
                pic.write(port, size, value * 0x01010101 & ((1 << (8 * size)) - 1))
                pic.read(port, size)
                pic.acknowledge()


def test_state_survives_save_and_restore(pic, output):
    pic.write(0x4D1, 1, 0x04)
    pic.pin(10).set_level(True)
    pic.pin(4).pulse()
    pic.acknowledge()
    pic.write(0x21, 1, 0x40)
    state = pic.save()
    copy = Vatpic(output.append)
    pin = copy.pin(10)
    copy.pin(4)
    copy.restore(state)
    assert copy.save() == state
    copy.write(0x20, 1, 0x62)
    pin.set_level(False)
    copy.write(0xA0, 1, 0x20)
    copy.write(0x20, 1, 0x20)
    assert copy.acknowledge() == 0x34
