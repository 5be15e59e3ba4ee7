"""How a run ended: a kind, a line of detail, an exit status; never a pattern that a caller must look for in a log."""

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pyhyve.vmm.vm import Suspend, Suspended


class OutcomeKind(enum.Enum):
    POWERED_OFF = "powered-off"
    REBOOTED = "rebooted"
    """The guest asked for a reset."""
    HALTED = "halted"
    """The guest said that it halts, and did."""
    TRIPLE_FAULT = "triple-fault"
    PANICKED = "panicked"
    HUNG = "hung"
    """No progress: every processor halted with interrupts off, or spinning without an exit."""
    EXITED = "exited"
    """The guest wrote a number to a debug-exit port."""
    TIMED_OUT = "timed-out"
    STOPPED = "stopped"
    """Somebody outside ended it: a key, a signal, `Machine.stop()`."""
    ERROR = "error"
    """A bug or a limit of pyhyve's."""


EXIT_STATUS: Final = {
    OutcomeKind.POWERED_OFF: 0,
    OutcomeKind.STOPPED: 0,
    OutcomeKind.ERROR: 1,
    OutcomeKind.REBOOTED: 3,
    OutcomeKind.HALTED: 4,
    OutcomeKind.TRIPLE_FAULT: 5,
    OutcomeKind.PANICKED: 6,
    OutcomeKind.HUNG: 7,
    OutcomeKind.TIMED_OUT: 124,
}
"""Exit statuses of `pyhyve run`; 2 is a user's error, 130 and 143 are SIGINT and SIGTERM. EXITED's is the guest's."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `seconds`: host time from start to end; `report`: for an error, what a bug report needs."""

    kind: OutcomeKind
    detail: str = ""
    seconds: float = 0.0
    report: str = ""
    value: int = 0
    """What an EXITED guest wrote."""

    @property
    def exit_status(self) -> int:
        """Of the process; a guest that exited with V has (V << 1) | 1, as in QEMU, of which a process keeps 8 bits."""
        if self.kind is OutcomeKind.EXITED:
            return (self.value << 1 | 1) & 0xFF
        return EXIT_STATUS[self.kind]

    @property
    def ok(self) -> bool:
        """True if the guest ended by itself and meant to."""
        return self.kind in (OutcomeKind.POWERED_OFF, OutcomeKind.REBOOTED, OutcomeKind.HALTED, OutcomeKind.EXITED)

    def __str__(self) -> str:
        text = f"{self.kind.value}: {self.detail}" if self.detail else self.kind.value
        return f"{text} (after {self.seconds:.2f} s)"

    def to_json(self) -> dict[str, object]:
        return {
            "outcome": self.kind.value,
            "detail": self.detail,
            "seconds": round(self.seconds, 6),
            "exit_status": self.exit_status,
            **({"value": self.value} if self.kind is OutcomeKind.EXITED else {}),
            **({"report": self.report} if self.report else {}),
        }


_PANIC: Final = re.compile(r"Kernel panic - not syncing: (.*)")
_PANIC_END: Final = "---[ end Kernel panic"
_HALTED: Final = "reboot: System halted"
_TIMESTAMP: Final = re.compile(r"^\[\s*\d+\.\d+\]\s*")
_LINE_LIMIT: Final = 4096
_GATHER_LIMIT: Final = 512


class ConsoleWatch:
    """Passes on what the guest prints, and reads along: the guest's own word on why it ends.

    A guest writes a byte at a time: they are gathered to the end of a line, or until `flush()`; `on_idle` is called at
    the first, to see to that. `on_panic(last)` is called on a panic's first line, and with `last` on the one that ends
    its report.
    """

    def __init__(
        self, sink: Callable[[bytes], None], on_panic: Callable[[bool], None], on_idle: Callable[[], None]
    ) -> None:
        self._sink = sink
        self._on_panic = on_panic
        self._on_idle = on_idle
        self._pending = bytearray()
        self._line = bytearray()
        self.panic: str | None = None
        self.halted = False
        self.last_line = ""

    def write(self, data: bytes) -> None:
        """Take output from the guest. Called by one thread at a time, as `flush` is."""
        pending = self._pending
        if not pending:
            self._on_idle()
        pending += data
        if b"\n" in data or len(pending) >= _GATHER_LIMIT:
            self.flush()

    def flush(self) -> None:
        """Pass on what was gathered."""
        data = bytes(self._pending)
        if not data:
            return
        self._pending.clear()
        self._sink(data)
        line = self._line
        line += data
        if b"\n" in data or len(line) > _LINE_LIMIT:
            *lines, rest = line.split(b"\n")
            self._line = rest[-_LINE_LIMIT:]
            for each in lines:
                self._look(each)

    def _look(self, raw: bytearray) -> None:
        text = _TIMESTAMP.sub("", raw.decode("utf-8", "replace").strip())
        if not text:
            return
        self.last_line = text
        if "Kernel panic" in text:
            match = _PANIC.search(text)
            if _PANIC_END in text:
                if self.panic is not None:
                    self._on_panic(True)
            elif match is not None and self.panic is None:
                self.panic = match[1].strip()
                self._on_panic(False)
        elif _HALTED in text:
            self.halted = True


def classify(suspended: Suspended, watch: ConsoleWatch, seconds: float, *, timed_out: bool = False) -> Outcome:
    """Return the outcome, from why the monitor stopped the VM and what the guest had said before."""
    how, detail = suspended.how, suspended.detail
    if how is Suspend.ERROR:
        head, _, report = detail.partition("\n")
        return Outcome(OutcomeKind.ERROR, head, seconds, report)
    if how is Suspend.EXIT:
        return Outcome(OutcomeKind.EXITED, detail, seconds, value=suspended.value)
    if watch.panic is not None:
        return Outcome(OutcomeKind.PANICKED, watch.panic, seconds)
    if timed_out:
        return Outcome(OutcomeKind.TIMED_OUT, detail, seconds)
    if how is Suspend.HALT:
        kind = OutcomeKind.HALTED if watch.halted else OutcomeKind.HUNG
        return Outcome(kind, "" if watch.halted else detail, seconds)
    kind = {
        Suspend.POWEROFF: OutcomeKind.POWERED_OFF,
        Suspend.RESET: OutcomeKind.REBOOTED,
        Suspend.TRIPLE_FAULT: OutcomeKind.TRIPLE_FAULT,
        Suspend.HANG: OutcomeKind.HUNG,
        Suspend.REQUEST: OutcomeKind.STOPPED,
    }[how]
    return Outcome(kind, detail, seconds)
