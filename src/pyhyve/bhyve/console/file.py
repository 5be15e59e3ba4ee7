"""The guest's output, kept in a file. There is no input."""

import contextlib
import os
from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.bhyve.console.base import OnInput, OnQuit
from pyhyve.bhyve.console.writer import BoundedWriter

OUTPUT_LIMIT: Final = 16 << 20


class FileConsole:
    """Writes to `path`, made anew."""

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UsageError(
                f"--console file:{path}: cannot be written: {error.strerror}; name a file that can"
            ) from error
        self._writer = BoundedWriter(self._fd, OUTPUT_LIMIT)
        self._open = True

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def start(self, on_input: OnInput, on_quit: OnQuit) -> None:
        self._writer.start()

    def stop(self) -> None:
        self._writer.stop()
        if self._open:
            self._open = False
            with contextlib.suppress(OSError):
                os.close(self._fd)
