"""The two buses, and the wires to the interrupt controllers."""

import threading

import pytest
from fake_processor import Device

from pyhyve.base.fakes import FakePin
from pyhyve.vmm.bus import MmioBus, PortBus
from pyhyve.vmm.pins import FabricPin, FanOut


class Answer(Device):
    def __init__(self, value):
        self.value = value
        self.log = []

    def read(self, offset, size):
        self.log.append((offset, size))
        return self.value

    def write(self, offset, size, value):
        self.log.append((offset, size, value))


def test_ports_belong_to_one_handler_only():
    bus = PortBus()
    bus.attach(0x10, 4, Answer(1))
    with pytest.raises(ValueError, match="0x12 is already taken"):
        bus.attach(0x12, 1, Answer(2))
    with pytest.raises(ValueError, match="are not I/O ports"):
        bus.attach(0xFFFF, 2, Answer(2))
    bus.detach(0x10, 4)
    bus.detach(0x10, 4)
    bus.attach(0x12, 1, Answer(2))
    assert bus.read[0x12](0, 1) == 2
    assert bus.read[0x10](0x10, 1) == 0xFF


def test_devices_share_a_page():
    bus = MmioBus()
    first, second = Answer(1), Answer(2)
    bus.attach(0x1000, 0x10, first)
    bus.attach(0x1010, 0x10, second)
    assert (bus.read(0x100F, 1), bus.read(0x1010, 1)) == (1, 2)
    assert bus.read(0x1020, 4) == 0xFFFFFFFF
    bus.write(0x1020, 4, 0)
    assert bus.unclaimed == {1: 2}
    assert first.log == [(0xF, 1)]
    with pytest.raises(ValueError, match="overlaps the device at 0x1000"):
        bus.attach(0x1008, 4, Answer(3))
    with pytest.raises(ValueError, match="no address range"):
        bus.attach(0x2000, 0, Answer(3))


def test_large_range_is_found_beside_small_ones():
    bus = MmioBus()
    large, small = Answer(1), Answer(2)
    bus.attach(0xE000_0000, 256 << 20, large)
    bus.attach(0xFED0_0000, 0x400, small)
    assert bus.has_page(0xE0000)
    assert bus.has_page(0xEFFFF)
    assert not bus.has_page(0xF0000)
    assert bus.read(0xE123_4568, 4) == 1
    assert large.log == [(0x123_4568, 4)]
    with pytest.raises(ValueError, match="overlaps"):
        bus.attach(0xE800_0000, 4, Answer(3))
    with pytest.raises(ValueError, match="overlaps"):
        bus.attach(0xF000_0000, 0x1000_0000, Answer(3))
    bus.detach(0xE000_0000, 256 << 20)
    bus.attach(0xE800_0000, 4, Answer(3))
    bus.detach(0xE800_0000, 4)
    assert not bus.has_page(0xE8000)


def test_answers_are_cut_to_the_accesss_size():
    bus = MmioBus()
    bus.attach(0x1000, 8, Answer(0x1122334455))
    assert bus.read(0x1000, 2) == 0x4455


def test_fan_out_drives_every_input():
    pins = FakePin(), FakePin()
    line = FanOut(*pins)
    line.set_level(True)
    assert [pin.level for pin in pins] == [True, True]
    line.set_level(False)
    line.pulse()
    assert [pin.edges for pin in pins] == [2, 2]


def test_fabric_pin_drives_at_once_where_the_lock_is_free():
    pin, lock = FakePin(), threading.RLock()
    wire = FabricPin(pin, lock, lambda call: pytest.fail("not needed"))
    wire.set_level(True)
    assert pin.level
    with lock:
        wire.set_level(False)
    assert not pin.level


def test_fabric_pin_never_waits_and_the_last_level_wins():
    pin, lock = FakePin(), threading.RLock()
    deferred = []
    wire = FabricPin(pin, lock, deferred.append)
    held, release = threading.Event(), threading.Event()

    def holder():
        with lock:
            held.set()
            release.wait()

    thread = threading.Thread(target=holder)
    thread.start()
    held.wait()
    wire.set_level(True)
    wire.set_level(False)
    wire.set_level(True)
    assert not pin.level
    release.set()
    thread.join()
    wire.set_level(False)
    assert len(deferred) == 3
    for call in deferred:
        call()
    assert not pin.level, "what came later is not undone"
