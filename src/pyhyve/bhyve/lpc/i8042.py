"""Where a PC has its keyboard controller: no controller, but the wire from it to the processor's reset.

A driver that probes it finds output that never ends and gives up at once (Linux: "No controller found"); code that
waits for the input buffer before it pulses the reset line finds it free. Two handlers: `.data` (port 0x60) and
`.command` (port 0x64).
"""

from collections.abc import Callable
from typing import Final

COMMAND_WRITE_OUTPUT: Final = 0xD1
COMMAND_PULSE: Final = 0xF0
"""0xF0-0xFF pulse the output lines whose bit is 0; line 0 is the processor's reset."""
OUTPUT_RESET: Final = 1 << 0
OUTPUT_A20: Final = 1 << 1

STATUS_INPUT_FULL: Final = 1 << 1
STATUS: Final = 0xFF & ~STATUS_INPUT_FULL


class I8042:
    """`on_reset` is called when the reset line is pulsed (command 0xFE) or driven low through the output port."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._awaits_output = False
        self.data = _Data(self)
        self.command = _Command(self)

    def reset(self) -> None:
        self._awaits_output = False

    def _take_command(self, command: int) -> None:
        self._awaits_output = command == COMMAND_WRITE_OUTPUT
        if command >= COMMAND_PULSE and not command & OUTPUT_RESET:
            self._on_reset()

    def _take_data(self, value: int) -> None:
        if self._awaits_output:
            self._awaits_output = False
            if not value & OUTPUT_RESET:
                self._on_reset()


class _Data:
    def __init__(self, chip: I8042) -> None:
        self._chip = chip

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self._chip._take_data(value & 0xFF)


class _Command:
    def __init__(self, chip: I8042) -> None:
        self._chip = chip

    def read(self, offset: int, size: int) -> int:
        return STATUS

    def write(self, offset: int, size: int, value: int) -> None:
        self._chip._take_command(value & 0xFF)
