"""Progress on standard error: a line that moves on a terminal, one line a step elsewhere."""

import sys
from typing import Final

_MIB: Final = 1 << 20


class Progress:
    """Called with (step, done, total), bytes; a total of 0 is unknown."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._step = ""
        self._shown = ""

    def __call__(self, step: str, done: int, total: int) -> None:
        if step != self._step:
            self.finish()
            self._step = step
            self._show(f"{step} ...")
        if self._terminal and total:
            self._show(f"{step} ... {done / _MIB:.1f} of {total / _MIB:.1f} MiB")

    def finish(self) -> None:
        """End the line of the present step."""
        if self._terminal and self._shown:
            print(file=sys.stderr)
        self._step = self._shown = ""

    def _show(self, text: str) -> None:
        if not self._terminal:
            print(f"pyhyve: {text}", file=sys.stderr, flush=True)
        elif text != self._shown:
            print(f"\r\033[Kpyhyve: {text}", end="", file=sys.stderr, flush=True)
        self._shown = text
