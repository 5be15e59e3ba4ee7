"""What every command of the package does alike: one line for what goes wrong, and an exit status."""

import sys
from collections.abc import Callable, Sequence
from typing import Final

from pyhyve.base.errors import PyhyveError
from pyhyve.base.output import say, silence

USER_ERROR: Final = 2
INTERRUPTED: Final = 130


def run_command(name: str, command: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
    """Call `command` with the arguments (those of the process, unless given); return the exit status."""
    try:
        return command(list(sys.argv[1:] if argv is None else argv))
    except PyhyveError as error:
        return _complain(name, str(error), USER_ERROR)
    except KeyboardInterrupt:
        return _complain(name, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody to tell.
        for stream in (sys.stdout, sys.stderr):
            silence(stream)
        return 1


def _complain(name: str, text: str, status: int) -> int:
    # One line, and nothing for the terminal to obey, whatever a file's name is made of.
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    say(f"{name}: {shown}", sys.stderr)
    return status
