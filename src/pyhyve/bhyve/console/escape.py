"""The keys that are for pyhyve and not for the guest: Ctrl-A, then a letter."""

import enum
from typing import Final

ESCAPE: Final = 0x01

HELP: Final = (
    b"\r\n"
    b"Ctrl-A x       quit: power the virtual machine off, hard\r\n"
    b"Ctrl-A h       this help\r\n"
    b"Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n"
)


class Command(enum.Enum):
    QUIT = "x"
    HELP = "h"


_COMMANDS: Final = {ord(command.value): command for command in Command} | {ord("?"): Command.HELP}


class EscapeFilter:
    """Splits typed bytes into input for the guest and commands. An escape may end one read and go on in the next."""

    def __init__(self) -> None:
        self._escaped = False

    def feed(self, data: bytes) -> tuple[bytes, list[Command]]:
        """Return (what the guest gets, commands in order). An unknown command is dropped with its escape."""
        if not self._escaped and ESCAPE not in data:
            return data, []
        out = bytearray()
        commands: list[Command] = []
        for byte in data:
            if not self._escaped:
                if byte == ESCAPE:
                    self._escaped = True
                else:
                    out.append(byte)
                continue
            self._escaped = False
            if byte == ESCAPE:
                out.append(ESCAPE)
            elif byte in _COMMANDS:
                commands.append(_COMMANDS[byte])
        return bytes(out), commands
