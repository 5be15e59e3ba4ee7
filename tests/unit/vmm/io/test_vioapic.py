"""The I/O APIC: shared pins, level triggers, redirection entries."""

import pytest

from pyhyve.vmm.io.vioapic import Vioapic

LEVEL, MASKED, REMOTE_IRR, LOGICAL = 1 << 15, 1 << 16, 1 << 14, 1 << 11


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
    assert get(ioapic, 1) == 0x00170020
    assert all(get(ioapic, 0x10 + 2 * pin) == 0x10000 for pin in range(24))
    assert get(ioapic, 0x40) == 0


def test_more_pins_are_allowed(board):
    ioapic = Vioapic(board.bus, pins=32)
    assert get(ioapic, 1) >> 16 == 31
    assert get(ioapic, 0x10 + 62) == 0x10000


@pytest.mark.parametrize("pin", [-1, 24])
def test_a_pin_that_is_not_there_is_refused(ioapic, pin):
    with pytest.raises(ValueError, match="0 to 23"):
        ioapic.pin(pin)


def test_remote_irr_and_delivery_status_are_read_only(ioapic):
    put(ioapic, 0x10, 0xFFFFFFFF)
    put(ioapic, 0x11, 0xFFFFFFFF)
    assert ioapic.entry(0) == 0xFF000000_0001AFFF


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


@pytest.mark.seed("S9")
def test_an_edge_still_high_is_sent_when_its_entry_is_unmasked(board, cpu, ioapic):
    ioapic.pin(4).set_level(True)
    route(ioapic, 4, 0x41)
    assert finish(board, cpu) == 0x41
    route(ioapic, 4, 0x42)
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
    assert not ioapic.entry(20) & REMOTE_IRR
    cpu.write(0xF0, 4, 0x1FF)
    route(ioapic, 20, LEVEL | 0x51)
    assert finish(board, cpu) == 0x51


def test_making_a_pin_edge_triggered_clears_remote_irr(board, cpu, ioapic):
    route(ioapic, 20, LEVEL | 0x51)
    ioapic.pin(20).set_level(True)
    put(ioapic, 0x10 + 40, MASKED | 0x51)
    assert not ioapic.entry(20) & REMOTE_IRR


def test_the_eoi_register_completes_a_vector(board, cpu, ioapic):
    route(ioapic, 20, LEVEL | 0x51)
    pin = ioapic.pin(20)
    pin.set_level(True)
    pin.set_level(False)
    ioapic.write(0x40, 4, 0x50)
    assert ioapic.entry(20) & REMOTE_IRR
    ioapic.write(0x40, 4, 0x51)
    assert not ioapic.entry(20) & REMOTE_IRR


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
    ioapic.reset()
    assert ioapic.entry(20) == 0x10000
    assert ioapic.asserters(20) == 1


def test_a_state_of_another_size_is_refused(board, ioapic):
    with pytest.raises(ValueError, match="24 pins"):
        Vioapic(board.bus, pins=32).restore(ioapic.save())
