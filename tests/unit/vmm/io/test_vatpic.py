"""The 8259 pair: initialization, priorities, EOI commands, cascade, ELCR."""

import pytest

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
