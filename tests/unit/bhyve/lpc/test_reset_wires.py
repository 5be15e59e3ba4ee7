"""The ways in which a guest resets a PC, and the small ports beside them."""

import pytest

from pyhyve.bhyve.lpc.i8042 import I8042, STATUS_INPUT_FULL
from pyhyve.bhyve.lpc.port92 import A20, SystemControl
from pyhyve.bhyve.lpc.post import PostCode
from pyhyve.bhyve.lpc.reset import ResetControl


class Wire:
    def __init__(self) -> None:
        self.resets = 0

    def pull(self) -> None:
        self.resets += 1


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.mark.parametrize("value", [0x04, 0x06, 0x0E])
def test_cf9_resets_when_its_cpu_bit_rises(wire: Wire, value: int) -> None:
    control = ResetControl(wire.pull)
    control.write(0, 1, value & ~4)
    assert wire.resets == 0
    control.write(0, 1, value)
    assert wire.resets == 1
    control.write(0, 1, value)
    assert wire.resets == 1
    assert control.read(0, 1) == value


def test_port_92_resets_when_its_bit_rises_and_keeps_a20_open(wire: Wire) -> None:
    control = SystemControl(wire.pull)
    control.write(0, 1, 0)
    assert control.read(0, 1) & A20
    control.write(0, 1, 1)
    assert wire.resets == 1


def test_port_92_gates_a20(wire: Wire) -> None:
    lines: list[bool] = []
    control = SystemControl(wire.pull, lines.append)
    for value in (A20, 0, 0, A20, 1, A20 | 1):
        control.write(0, 1, value)
    assert lines == [False, True, False, True]
    assert control.read(0, 1) == A20
    assert wire.resets == 2


@pytest.mark.parametrize(("command", "resets"), [(0xFE, 1), (0xF0, 1), (0xFF, 0), (0xFD, 0), (0xAA, 0), (0x20, 0)])
def test_keyboard_controller_pulses_reset(wire: Wire, command: int, resets: int) -> None:
    I8042(wire.pull).command.write(0, 1, command)
    assert wire.resets == resets


def test_keyboard_controller_output_port_drives_reset(wire: Wire) -> None:
    chip = I8042(wire.pull)
    chip.data.write(0, 1, 0x00)
    assert wire.resets == 0
    chip.command.write(0, 1, 0xD1)
    chip.data.write(0, 1, 0xDF)  # the A20 gate's traditional opening
    assert wire.resets == 0
    chip.command.write(0, 1, 0xD1)
    chip.data.write(0, 1, 0xFE)
    assert wire.resets == 1


def test_a_probe_finds_no_keyboard_controller_but_a_free_input_buffer(wire: Wire) -> None:
    chip = I8042(wire.pull)
    for _ in range(100):
        assert chip.command.read(0, 1) & 1  # output that never ends: no controller
        assert chip.data.read(0, 1) == 0xFF
    assert not chip.command.read(0, 1) & STATUS_INPUT_FULL


def test_post_code_is_kept() -> None:
    post = PostCode()
    post.write(0, 1, 0x5A)
    assert post.code == post.read(0, 1) == 0x5A
