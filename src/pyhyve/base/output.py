"""Lines for whoever started us. Where nobody reads them any more, the exit status alone tells."""

import os
from collections.abc import Mapping
from typing import Any, TextIO


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


def table(figures: Mapping[str, Any], indent: str = "") -> str:
    """Return nested figures as aligned lines."""
    lines = []
    for name, value in figures.items():
        label = f"{indent}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            if value:
                lines += [f"{label}:", table(value, indent + "  ")]
        elif isinstance(value, float):
            lines.append(f"{label:<34}{value:>16,.6f}")
        elif isinstance(value, int):
            lines.append(f"{label:<34}{value:>16,}")
        else:
            lines.append(f"{label:<34}{value!s:>16}")
    return "\n".join(lines)
