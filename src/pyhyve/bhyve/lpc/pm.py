"""ACPI's fixed hardware: PM1a event and control blocks, GPE0, the SMI command port, and the power button.

Only the chip: the PM timer is `vmm.io.vpmtmr`, at its own port between the blocks; it tells of its carries. Three
handlers, each with offsets from its own range: the object itself for PM1a (6 bytes), `.gpe0` (4 bytes) and
`.smi_command` (1 byte).

Source: ACPI 6.5, "ACPI Hardware Specification", "ACPI Register Model".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from pyhyve.base.protocols import IrqPin
from pyhyve.bhyve.layout import ACPI_DISABLE, ACPI_ENABLE, PM1_SLEEP_S5

# Offsets in the PM1a range: event block (status, enable), then control block.
PM1_STATUS: Final = 0
PM1_ENABLE: Final = 2
PM1_CONTROL: Final = 4
PM1_LENGTH: Final = 6

STS_TIMER: Final = 1 << 0
STS_BUS_MASTER: Final = 1 << 4
STS_GLOBAL: Final = 1 << 5
STS_POWER_BUTTON: Final = 1 << 8
STS_SLEEP_BUTTON: Final = 1 << 9
STS_RTC: Final = 1 << 10
STS_WAKE: Final = 1 << 15
STS_MASK: Final = STS_TIMER | STS_BUS_MASTER | STS_GLOBAL | STS_POWER_BUTTON | STS_SLEEP_BUTTON | STS_RTC | STS_WAKE
EN_MASK: Final = STS_TIMER | STS_GLOBAL | STS_POWER_BUTTON | STS_SLEEP_BUTTON | STS_RTC

CNT_SCI_ENABLE: Final = 1 << 0
CNT_BUS_MASTER_RELOAD: Final = 1 << 1
CNT_SLEEP_TYPE_SHIFT: Final = 10
CNT_SLEEP_TYPE: Final = 7 << CNT_SLEEP_TYPE_SHIFT
CNT_SLEEP_ENABLE: Final = 1 << 13


@dataclass(frozen=True, slots=True)
class PowerManagementV1:
    SCHEMA: ClassVar = ("acpi-pm", 1)

    status: int
    enable: int
    control: int
    gpe_status: int
    gpe_enable: int


class PowerManagement:
    """PM1a registers and what hangs on them. `sci` is level-triggered; `on_poweroff` is called when S5 is entered."""

    def __init__(self, sci: IrqPin, on_poweroff: Callable[[], None]) -> None:
        self._sci = sci
        self._on_poweroff = on_poweroff
        self._status = 0
        self._enable = 0
        self._control = 0
        self._gpe_status = 0
        self._gpe_enable = 0
        self._line = False
        self.gpe0 = _Gpe0(self)
        self.smi_command = _SmiCommand(self)

    def reset(self) -> None:
        """Registers as at power-on; the SCI is dropped."""
        self.restore(PowerManagementV1(0, 0, 0, 0, 0))

    def read(self, offset: int, size: int) -> int:
        block = self._status | self._enable << 16 | self._control << 32 | 0xFFFF << 48
        return block >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        for i in range(size):
            self._write_byte(offset + i, value >> 8 * i & 0xFF)
        self._update_sci()
        if self._control & CNT_SLEEP_ENABLE:
            self._control &= ~CNT_SLEEP_ENABLE  # it reads as zero
            if (self._control & CNT_SLEEP_TYPE) >> CNT_SLEEP_TYPE_SHIFT == PM1_SLEEP_S5:
                self._on_poweroff()

    def _write_byte(self, offset: int, value: int) -> None:
        shift = 8 * (offset & 1)
        register = offset & ~1
        if register == PM1_STATUS:
            self._status &= ~(value << shift)
        elif register == PM1_ENABLE:
            self._enable = (self._enable & ~(0xFF << shift) | value << shift) & EN_MASK
        elif register == PM1_CONTROL:
            keep = CNT_BUS_MASTER_RELOAD | CNT_SLEEP_TYPE | CNT_SLEEP_ENABLE
            written = value << shift & keep
            # SCI_EN is the firmware's: it follows the SMI command port.
            self._control = self._control & ~(0xFF << shift & keep) | written

    def press_power_button(self) -> bool:
        """Latch the button. Return whether the guest listens for it (else nobody will act on the press)."""
        self._status |= STS_POWER_BUTTON
        self._update_sci()
        return bool(self._control & CNT_SCI_ENABLE and self._enable & STS_POWER_BUTTON)

    def timer_carried(self) -> None:
        """Latch that the PM timer's highest bit has changed."""
        self._status |= STS_TIMER
        self._update_sci()

    def raise_gpe(self, bit: int) -> None:
        """Latch general-purpose event `bit` (0-15)."""
        self._gpe_status |= 1 << bit & 0xFFFF
        self._update_sci()

    def set_acpi_mode(self, enabled: bool) -> None:
        """Give the fixed hardware to the operating system, as the SMI command port does, or take it back."""
        self._control = self._control & ~CNT_SCI_ENABLE | (CNT_SCI_ENABLE if enabled else 0)
        self._update_sci()

    def _update_sci(self) -> None:
        event = self._status & self._enable or self._gpe_status & self._gpe_enable
        line = bool(self._control & CNT_SCI_ENABLE and event)
        if line != self._line:
            self._line = line
            self._sci.set_level(line)

    def save(self) -> PowerManagementV1:
        return PowerManagementV1(self._status, self._enable, self._control, self._gpe_status, self._gpe_enable)

    def restore(self, state: PowerManagementV1) -> None:
        """Become what was saved, and drive the SCI accordingly."""
        self._status = state.status
        self._enable = state.enable
        self._control = state.control
        self._gpe_status = state.gpe_status
        self._gpe_enable = state.gpe_enable
        self._update_sci()


class _Gpe0:
    """The GPE0 block: two bytes of status, two of enable."""

    def __init__(self, pm: PowerManagement) -> None:
        self._pm = pm

    def read(self, offset: int, size: int) -> int:
        block = self._pm._gpe_status | self._pm._gpe_enable << 16
        return block >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        for i in range(size):
            byte = value >> 8 * i & 0xFF
            shift = 8 * (offset + i & 1)
            if offset + i < 2:
                self._pm._gpe_status &= ~(byte << shift)
            elif offset + i < 4:
                self._pm._gpe_enable = self._pm._gpe_enable & ~(0xFF << shift) | byte << shift
        self._pm._update_sci()


class _SmiCommand:
    """The port through which an operating system asks the firmware for ACPI mode."""

    def __init__(self, pm: PowerManagement) -> None:
        self._pm = pm

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        command = value & 0xFF
        if command == ACPI_ENABLE:
            self._pm.set_acpi_mode(True)
        elif command == ACPI_DISABLE:
            self._pm.set_acpi_mode(False)
