"""The bus: where functions are, and the two ways to them."""

import pytest

from pyhyve.base.errors import UsageError
from pyhyve.bhyve import layout
from pyhyve.bhyve.lpc.reset import ResetControl
from pyhyve.bhyve.pci import bits
from pyhyve.bhyve.pci.bus import ConfigPorts, PciBus, intx_pin, requester_id
from pyhyve.bhyve.pci.hostbridge import HostBridge

HOST_BRIDGE_ID = 0x1275_1275
ONES = 0xFFFF_FFFF


@pytest.fixture
def bus() -> PciBus:
    bus = PciBus()
    bus.add(HostBridge(), 0)
    return bus


@pytest.mark.seed("S6")
@pytest.mark.parametrize(
    ("place", "rid"),
    [
        ((0, 0, 0), 0),
        ((0, 1, 0), 8),
        ((0, 31, 7), 0xFF),
        ((1, 0, 0), 0x100),
        ((5, 3, 2), 0x51A),
        ((255, 31, 7), 0xFFFF),
    ],
)
def test_a_requester_id_is_bus_slot_and_function(place: tuple[int, int, int], rid: int) -> None:
    assert requester_id(*place) == rid


@pytest.mark.seed("S6")
@pytest.mark.parametrize("place", [(256, 0, 0), (0, 32, 0), (0, 0, 8), (0, 0, 255), (-1, 0, 0)])
def test_there_is_no_function_beyond_seven_and_no_ari(place: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="function 0-7"):
        requester_id(*place)


@pytest.mark.seed("S6")
def test_a_device_is_told_the_requester_id_by_which_its_configuration_is_reached() -> None:
    bus = PciBus()
    device = HostBridge()
    assert bus.add(device, slot=3, function=2, bus=5) == 0x51A
    assert device.rid == 0x51A
    assert bus.ecam.read(0x51A << 12, 4) == HOST_BRIDGE_ID
    ports = ConfigPorts(bus)
    ports.write(0, 4, bits.ADDRESS_ENABLE | 0x51A << 8)
    assert ports.read(4, 4) == HOST_BRIDGE_ID


def test_the_host_bridge_is_bhyves_and_a_root_port(bus: PciBus) -> None:
    assert bus.read(0, bits.VENDOR_ID, 4) == HOST_BRIDGE_ID
    assert bus.read(0, bits.REVISION_ID, 4) >> 8 == bits.CLASS_BRIDGE_HOST
    assert bus.read(0, bits.HEADER_TYPE, 1) == 0
    capability = bus.read(0, bits.CAPABILITIES_POINTER, 1)
    assert bus.read(0, capability, 1) == bits.CAP_EXPRESS
    assert bus.read(0, capability + 2, 2) >> 4 & 0xF == bits.EXPRESS_ROOT_PORT
    assert bus.ecam.read(0x100, 4) == 0  # express: an extended space, with nothing in it


def test_an_absent_device_reads_as_all_ones(bus: PciBus) -> None:
    assert bus.ecam.read(1 << 15, 4) == ONES
    assert bus.ecam.read(1 << 15, 8) == (1 << 64) - 1
    bus.ecam.write(1 << 15, 4, 0)
    ports = ConfigPorts(bus)
    ports.write(0, 4, bits.ADDRESS_ENABLE | 1 << 11)
    assert ports.read(4, 4) == ONES
    assert ports.read(6, 1) == 0xFF


def test_mechanism_one_reaches_bytes_and_words_of_a_register(bus: PciBus) -> None:
    ports = ConfigPorts(bus)
    ports.write(0, 4, bits.ADDRESS_ENABLE | bits.CLASS_CODE & 0xFC)
    assert ports.read(0, 4) == bits.ADDRESS_ENABLE | 0x08
    assert ports.read(7, 1) == 0x06
    assert ports.read(6, 2) == 0x0600


def test_mechanism_one_is_off_until_enabled(bus: PciBus) -> None:
    ports = ConfigPorts(bus)
    assert ports.read(4, 4) == ONES
    ports.write(0, 4, 0x7F00_0003)
    assert ports.read(0, 4) == 0  # reserved bits stay zero


def test_only_dwords_reach_the_address_register_and_a_byte_at_cf9_is_the_reset_control(bus: PciBus) -> None:
    resets: list[bool] = []
    ports = ConfigPorts(bus, ResetControl(lambda: resets.append(True)))
    ports.write(0, 2, 0xFFFF)
    ports.write(0, 1, 0xFF)
    assert ports.read(0, 4) == 0
    assert ports.read(0, 2) == 0xFFFF
    ports.write(layout.RESET_PORT - layout.PCI_CONFIG_ADDRESS, 1, 0x06)
    assert resets == [True]
    assert ports.read(1, 1) == 0x06


def test_configuration_written_one_way_is_read_the_other(bus: PciBus) -> None:
    ports = ConfigPorts(bus)
    bus.ecam.write(bits.INTERRUPT_LINE, 1, 5)
    ports.write(0, 4, bits.ADDRESS_ENABLE | bits.INTERRUPT_LINE)
    assert ports.read(4, 1) == 5


def test_every_access_that_a_guest_can_make_has_an_answer(bus: PciBus) -> None:
    ports = ConfigPorts(bus)
    ports.write(0, 4, bits.ADDRESS_ENABLE | 0xFC)
    for offset in range(8):
        for size in (1, 2, 4):
            if offset + size <= 8:
                assert 0 <= ports.read(offset, size) < 1 << 8 * size
    for offset in (0, 0xFF, 0xFFD, 0xFFF, layout.PCI_ECAM_SIZE - 1):
        for size in (1, 2, 4, 8):
            assert 0 <= bus.ecam.read(offset, size) < 1 << 8 * size
            bus.ecam.write(offset, size, (1 << 8 * size) - 1)


def test_a_second_function_marks_the_slot_multi_function() -> None:
    bus = PciBus()
    bus.add(HostBridge(), 4)
    assert bus.read(4 << 3, bits.HEADER_TYPE, 1) == 0
    bus.add(HostBridge(), 4, function=1)
    assert bus.read(4 << 3, bits.HEADER_TYPE, 1) == bits.HEADER_MULTI_FUNCTION
    assert bus.read(4 << 3, 0x0C, 4) == bits.HEADER_MULTI_FUNCTION << 16


def test_a_taken_or_impossible_place_is_the_users_error(bus: PciBus) -> None:
    with pytest.raises(UsageError, match=r"-s 0:0:0: taken by HostBridge"):
        bus.add(HostBridge(), 0)
    with pytest.raises(UsageError, match=r"-s 0:32:0: .*slot 0-31"):
        bus.add(HostBridge(), 32)


def test_interrupt_lines_are_spread_over_the_pins_left_to_pci() -> None:
    pins = {intx_pin(slot, pin) for slot in range(32) for pin in (1, 2, 3, 4)}
    assert pins == set(range(layout.PCI_IOAPIC_PIN_BASE, layout.IOAPIC_PINS))
    assert len({intx_pin(3, pin) for pin in (1, 2, 3, 4)}) == 4
    assert {intx_pin(slot, pin, 24) for slot in range(32) for pin in (1, 2, 3, 4)} == set(range(16, 24))
