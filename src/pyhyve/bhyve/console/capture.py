"""A console for programs: what the guest prints can be waited for and looked at, and text sent to it."""

import re
import threading
import time
from typing import Final

from pyhyve.base.errors import PyhyveError
from pyhyve.bhyve.console.base import OnInput, OnQuit

DEFAULT_LIMIT: Final = 4 << 20
TAIL: Final = 2000
_GATHER_S: Final = 0.001


class ExpectError(PyhyveError):
    """What was waited for did not come. `tail` is the end of the output (text); it is also part of the message."""

    def __init__(self, why: str, tail: str) -> None:
        shown = tail.replace("\r\n", "\n").strip("\n")
        super().__init__(f"{why}; the output ends:\n{shown}" if shown else f"{why}; there was no output")
        self.tail = tail


class ExpectTimeout(ExpectError):
    """The time was up."""


class ExpectClosed(ExpectError):
    """The VM ended first."""


class CaptureConsole:
    """Keeps the guest's output (the last `limit` bytes of it) and gives it input. Every method is thread-safe."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()  # taken by itself where speed counts: a Condition's own `with` is Python
        self._changed = threading.Condition(self._lock)
        self._buffer = bytearray()
        self._start = 0  # bytes that the guest wrote before the buffer's first
        self._cursor = 0  # bytes that the guest wrote before what expect() looks at next
        self._waiting = 0
        self._closed = False
        self._on_input: OnInput | None = None
        self._early = bytearray()

    # The Console protocol

    def write(self, data: bytes) -> None:
        with self._lock:
            self._buffer += data
            excess = len(self._buffer) - self._limit
            if excess > 0:
                excess = min(len(self._buffer), excess + self._limit // 8)
                del self._buffer[:excess]
                self._start += excess
            if self._waiting:
                self._changed.notify_all()

    def start(self, on_input: OnInput, on_quit: OnQuit) -> None:
        with self._changed:
            self._on_input = on_input
            self._closed = False
            early, self._early = bytes(self._early), bytearray()
        if early:
            on_input(early)

    def stop(self) -> None:
        with self._changed:
            self._closed = True
            self._on_input = None
            self._changed.notify_all()

    # The program's side

    def send(self, data: str | bytes) -> None:
        """Type `data` (a str as UTF-8; a line ends with the caller's own "\\n"). Before start() it is kept."""
        raw = data.encode() if isinstance(data, str) else bytes(data)
        with self._changed:
            on_input = self._on_input
            if on_input is None:
                if not self._closed:
                    self._early += raw
                return
        on_input(raw)

    def expect(self, pattern: str | re.Pattern[str], timeout: float = 30.0) -> re.Match[str]:
        """Wait for `pattern` in the output behind the last match, and return the match; the next search starts there.

        A str is looked for as it stands, a compiled pattern as a regular expression, in the output as UTF-8.
        Raise ExpectTimeout after `timeout` seconds (host time), ExpectClosed if the VM ended without it.
        """
        regex = re.compile(re.escape(pattern)) if isinstance(pattern, str) else pattern
        deadline = time.monotonic() + timeout
        with self._changed:
            self._waiting += 1
            try:
                seen = -1
                while True:
                    total = self._start + len(self._buffer)
                    if total != seen:
                        seen = total
                        match = self._search(regex)
                        if match is not None:
                            return match
                    shown = pattern if isinstance(pattern, str) else pattern.pattern
                    if self._closed:
                        raise ExpectClosed(f"the VM ended before it printed {shown!r}", self._tail())
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise ExpectTimeout(f"{shown!r} did not come in {timeout:g} s", self._tail())
                    if self._changed.wait(left) and not self._closed:
                        # A guest writes a byte at a time; search once for several.
                        self._changed.release()
                        try:
                            time.sleep(min(_GATHER_S, max(0.0, left)))
                        finally:
                            self._changed.acquire()
            finally:
                self._waiting -= 1

    def _search(self, regex: re.Pattern[str]) -> re.Match[str] | None:
        self._cursor = max(self._cursor, self._start)
        # With surrogates for what is no UTF-8, every character can be counted back into bytes.
        text = self._buffer[self._cursor - self._start :].decode(errors="surrogateescape")
        match = regex.search(text)
        if match is not None:
            self._cursor += len(text[: match.end()].encode(errors="surrogateescape"))
        return match

    @property
    def output(self) -> str:
        """Everything that the guest wrote, as far as it is kept, with U+FFFD for what is no UTF-8."""
        with self._changed:
            return self._buffer.decode(errors="replace")

    def _tail(self) -> str:
        return self._buffer[-TAIL:].decode(errors="replace")
