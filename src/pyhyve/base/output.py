"""Lines for whoever started us. Where nobody reads them any more, the exit status alone tells."""

import os
from typing import TextIO


def say(text: str, stream: TextIO | None) -> None:
    """Print a line. Harmless on a stream that is closed, or whose other end is."""
    if stream is None:
        return
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        silence(stream)


def silence(stream: TextIO | None) -> None:
    """Let what waits in a broken stream go nowhere: else Python complains of it at its end, and changes the status."""
    if stream is None:
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass
