"""A pseudo-terminal that any terminal program can be pointed at, now or later, once or again."""

import contextlib
import os
import sys
import termios
from collections.abc import Callable
from typing import Final

from pyhyve.base.errors import HostError
from pyhyve.bhyve.console.base import OnInput, OnQuit
from pyhyve.bhyve.console.reader import InputThread
from pyhyve.bhyve.console.stdio import raw_attributes
from pyhyve.bhyve.console.writer import BoundedWriter

OUTPUT_LIMIT: Final = 256 << 10
"""What somebody who connects late is shown of the past, at most."""
FLUSH_S: Final = 0.2
"""Perhaps nobody reads at all."""


def _announce(path: str) -> None:
    print(f"console: {path}", file=sys.stderr, flush=True)


class PtyConsole:
    """The guest's side of a new pty; `.path` is the other, announced at start(). Closing that one ends nothing."""

    def __init__(self, announce: Callable[[str], None] = _announce) -> None:
        self._announce = announce
        try:
            self._master, self._slave = os.openpty()
        except OSError as error:
            raise HostError(f"--console pty: no pseudo-terminal to be had: {error.strerror}") from error
        # Our own slave stays open, so that a user who leaves is no hangup, and one who comes finds it raw.
        termios.tcsetattr(self._slave, termios.TCSANOW, raw_attributes(termios.tcgetattr(self._slave)))
        os.set_blocking(self._master, False)
        self.path = os.ttyname(self._slave)
        self._writer = BoundedWriter(self._master, OUTPUT_LIMIT, flush_s=FLUSH_S)
        self._reader: InputThread | None = None
        self._open = True

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def start(self, on_input: OnInput, on_quit: OnQuit) -> None:
        self._announce(self.path)
        self._writer.start()
        self._reader = InputThread(self._master, on_input, lambda: None)
        self._reader.start()

    def stop(self) -> None:
        if self._reader is not None:
            self._reader.stop()
            self._reader = None
        self._writer.stop()
        if self._open:
            self._open = False
            for fd in (self._slave, self._master):
                with contextlib.suppress(OSError):
                    os.close(fd)
