"""What every console is: a place for the guest's bytes, and perhaps a source of them."""

import enum
from collections.abc import Callable
from typing import Protocol


class Quit(enum.Enum):
    """Why a console asks for the end of the VM; the value is for a person.

    SHUTDOWN is a request to the guest, by its power button; the others end it where it is.
    """

    KEY = "the user left with Ctrl-A x"
    CLOSED = "the terminal was closed"
    SHUTDOWN = "a signal asked the guest to shut down"
    TERMINATED = "a signal asked it to end"


OnInput = Callable[[bytes], None]
OnQuit = Callable[[Quit], None]


class Console(Protocol):
    """The far end of a serial line.

    `on_input` and `on_quit` are called on the console's own threads (or in a signal handler on the main thread);
    `on_input` may block to slow the source down.
    """

    def write(self, data: bytes) -> None:
        """Take bytes from the guest. Never blocks and never raises; from any thread, even after stop()."""
        ...

    def start(self, on_input: OnInput, on_quit: OnQuit) -> None: ...

    def stop(self) -> None:
        """Flush what can be flushed, give the terminal back, end the threads. Harmless when repeated."""
        ...
