"""Wires between devices and interrupt controllers."""

from pyhyve.base.fakes import FakePin
from pyhyve.vmm.pins import Switch


def test_a_cut_wire_carries_nothing_and_takes_up_the_present_level() -> None:
    pin = FakePin()
    wire = Switch(pin)
    wire.set_level(True)
    wire.connect(False)
    assert not pin.level
    wire.pulse()
    assert pin.edges == 1
    wire.connect(True)
    assert not pin.level
    wire.connect(False)
    wire.set_level(True)
    assert not pin.level
    wire.connect(True)
    assert pin.level
    assert pin.edges == 2
