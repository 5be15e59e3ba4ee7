"""ACPI's fixed hardware at its registers."""

import pytest

from pyhyve.base.fakes import FakePin
from pyhyve.bhyve import layout
from pyhyve.bhyve.lpc import pm as chip
from pyhyve.bhyve.lpc.pm import PowerManagement


class Board:
    def __init__(self) -> None:
        self.sci = FakePin()
        self.poweroffs = 0
        self.pm = PowerManagement(self.sci, self._poweroff)

    def _poweroff(self) -> None:
        self.poweroffs += 1


@pytest.fixture
def board() -> Board:
    return Board()


def enter_acpi_mode(board: Board) -> None:
    board.pm.smi_command.write(0, 1, layout.ACPI_ENABLE)


def test_the_smi_command_port_gives_and_takes_acpi_mode(board: Board) -> None:
    assert not board.pm.read(chip.PM1_CONTROL, 2) & chip.CNT_SCI_ENABLE
    enter_acpi_mode(board)
    assert board.pm.read(chip.PM1_CONTROL, 2) & chip.CNT_SCI_ENABLE
    board.pm.smi_command.write(0, 1, layout.ACPI_DISABLE)
    assert not board.pm.read(chip.PM1_CONTROL, 2) & chip.CNT_SCI_ENABLE


def test_a_write_to_control_leaves_acpi_mode_alone(board: Board) -> None:
    enter_acpi_mode(board)
    board.pm.write(chip.PM1_CONTROL, 2, chip.CNT_BUS_MASTER_RELOAD)
    assert board.pm.read(chip.PM1_CONTROL, 2) == chip.CNT_SCI_ENABLE | chip.CNT_BUS_MASTER_RELOAD


def test_entering_s5_powers_off(board: Board) -> None:
    s5 = layout.PM1_SLEEP_S5 << chip.CNT_SLEEP_TYPE_SHIFT
    board.pm.write(chip.PM1_CONTROL, 2, s5)
    assert board.poweroffs == 0
    board.pm.write(chip.PM1_CONTROL, 2, s5 | chip.CNT_SLEEP_ENABLE)
    assert board.poweroffs == 1
    assert board.pm.read(chip.PM1_CONTROL, 2) == s5  # SLP_EN reads as zero


@pytest.mark.parametrize("sleep_type", [0, 1, 3, 7])
def test_other_sleep_types_do_nothing(board: Board, sleep_type: int) -> None:
    board.pm.write(chip.PM1_CONTROL, 2, sleep_type << chip.CNT_SLEEP_TYPE_SHIFT | chip.CNT_SLEEP_ENABLE)
    assert board.poweroffs == 0


def test_sleep_enable_written_as_a_byte_powers_off(board: Board) -> None:
    board.pm.write(chip.PM1_CONTROL + 1, 1, (layout.PM1_SLEEP_S5 << 10 | chip.CNT_SLEEP_ENABLE) >> 8)
    assert board.poweroffs == 1


def test_the_power_button_raises_a_level_sci_until_its_status_is_cleared(board: Board) -> None:
    enter_acpi_mode(board)
    board.pm.write(chip.PM1_ENABLE, 2, chip.STS_POWER_BUTTON)
    assert board.pm.press_power_button()
    assert board.sci.level
    assert board.pm.read(chip.PM1_STATUS, 2) == chip.STS_POWER_BUTTON
    board.pm.write(chip.PM1_STATUS, 2, chip.STS_TIMER)
    assert board.sci.level
    board.pm.write(chip.PM1_STATUS, 2, chip.STS_POWER_BUTTON)
    assert not board.sci.level
    assert board.pm.read(chip.PM1_STATUS, 2) == 0


def test_a_press_that_nobody_listens_for_is_latched_and_reported_so(board: Board) -> None:
    assert not board.pm.press_power_button()
    assert not board.sci.level
    board.pm.write(chip.PM1_ENABLE, 2, chip.STS_POWER_BUTTON)
    assert not board.sci.level
    enter_acpi_mode(board)
    assert board.sci.level


def test_the_pm_timers_carry_raises_the_sci_if_enabled(board: Board) -> None:
    enter_acpi_mode(board)
    board.pm.timer_carried()
    assert board.pm.read(chip.PM1_STATUS, 2) == chip.STS_TIMER
    assert not board.sci.level
    board.pm.write(chip.PM1_ENABLE, 2, chip.STS_TIMER)
    assert board.sci.level
    board.pm.write(chip.PM1_STATUS, 2, chip.STS_TIMER)
    assert not board.sci.level


def test_status_and_enable_can_be_reached_together(board: Board) -> None:
    board.pm.write(chip.PM1_STATUS, 4, 0xFFFF_0000)
    assert board.pm.read(chip.PM1_STATUS, 4) == chip.EN_MASK << 16


def test_general_purpose_events_share_the_sci(board: Board) -> None:
    enter_acpi_mode(board)
    board.pm.gpe0.write(2, 2, 1 << 9)
    board.pm.raise_gpe(3)
    assert not board.sci.level
    board.pm.raise_gpe(9)
    assert board.sci.level
    assert board.pm.gpe0.read(0, 4) == 1 << 25 | 1 << 9 | 1 << 3
    board.pm.gpe0.write(1, 1, 1 << 1)
    assert not board.sci.level
    assert board.pm.gpe0.read(0, 2) == 1 << 3


def test_restore_brings_back_registers_and_sci(board: Board) -> None:
    enter_acpi_mode(board)
    board.pm.write(chip.PM1_ENABLE, 2, chip.STS_POWER_BUTTON)
    board.pm.press_power_button()
    other = Board()
    other.pm.restore(board.pm.save())
    assert other.sci.level
    assert other.pm.save() == board.pm.save()
    other.pm.reset()
    assert not other.sci.level
    assert other.pm.read(0, 4) == 0
