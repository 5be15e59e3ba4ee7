"""MSI addresses and data: opaque to senders, decoded here."""

import pytest

from pyhyve.vmm.io.msi import decode_msi


@pytest.mark.seed("S7")
@pytest.mark.parametrize("addr", [0, 0xFED00000, 0xFEF00000, 0x1_FEE00000, 0xDEADBEEF_FEE00000, 0xFFFFFFFF_FFFFFFFF])
def test_an_address_outside_the_interrupt_window_is_no_message(addr):
    assert decode_msi(addr, 0x4041) is None


@pytest.mark.seed("S7")
def test_destination_vector_and_mode_come_from_their_fields():
    message = decode_msi(0xFEEAB000, 0x0541)
    assert message is not None
    assert (message.dest, message.vector, message.mode) == (0xAB, 0x41, 5)
    assert not message.logical
    assert not message.level


@pytest.mark.seed("S7")
@pytest.mark.parametrize(("low", "logical"), [(0x0, False), (0x4, False), (0x8, False), (0xC, True)])
def test_the_destination_is_logical_only_when_rh_and_dm_are_both_set(low, logical):
    message = decode_msi(0xFEE01000 | low, 0x41)
    assert message is not None
    assert message.logical is logical


def test_a_level_message_asserts_only_with_bit_14():
    assert decode_msi(0xFEE00000, 0xC041).asserted
    assert not decode_msi(0xFEE00000, 0x8041).asserted
    assert decode_msi(0xFEE00000, 0x0041).asserted
