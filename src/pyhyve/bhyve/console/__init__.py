"""Consoles: where the guest's serial line ends."""

from collections.abc import Callable, Mapping
from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.bhyve.console.base import Console, OnInput, OnQuit, Quit
from pyhyve.bhyve.console.capture import CaptureConsole, ExpectClosed, ExpectError, ExpectTimeout
from pyhyve.bhyve.console.file import FileConsole
from pyhyve.bhyve.console.null import NullConsole
from pyhyve.bhyve.console.pty import PtyConsole
from pyhyve.bhyve.console.stdio import StdioConsole

__all__ = [
    "CONSOLES",
    "CaptureConsole",
    "Console",
    "ExpectClosed",
    "ExpectError",
    "ExpectTimeout",
    "OnInput",
    "OnQuit",
    "Quit",
    "open_console",
]

CONSOLES: Final[Mapping[str, Callable[[], Console]]] = {
    "stdio": StdioConsole,
    "pty": PtyConsole,
    "none": NullConsole,
}
"""The kinds that take no argument; `file:PATH` is the one that does."""

_CHOICES: Final = "stdio, pty, file:PATH or none"


def open_console(spec: str) -> Console:
    """Return the console that `spec` names: stdio, pty, file:PATH or none. It is not started.

    Raise UsageError for anything else, and where the file cannot be written.
    """
    kind, colon, argument = spec.partition(":")
    if kind == "file":
        if not argument:
            raise UsageError(f"--console {spec}: no path; write file:PATH")
        return FileConsole(argument)
    if kind in CONSOLES:
        if colon:
            raise UsageError(f"--console {spec}: {kind!r} takes no argument; write --console {kind}")
        return CONSOLES[kind]()
    import difflib

    near = difflib.get_close_matches(kind.lower(), [*CONSOLES, "file"], n=1)
    meant = {"file": "file:PATH"}.get(near[0], near[0]) if near else ""
    hint = f"did you mean {meant!r}? It can be" if meant else "it can be"
    raise UsageError(f"--console: unknown console {spec!r}; {hint} {_CHOICES}")
