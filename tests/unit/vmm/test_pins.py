"""Wires between devices and interrupt controllers."""

from pyhyve.base.fakes import FakePin
from pyhyve.vmm.pins import FanOut, Switch


def test_one_line_reaches_all_its_inputs() -> None:
    first, second = FakePin(), FakePin()
    line = FanOut(first, second)
    line.set_level(True)
    assert first.level
    assert second.level
    line.set_level(False)
    line.pulse()
    assert (first.edges, second.edges) == (2, 2)
    assert not first.level


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
