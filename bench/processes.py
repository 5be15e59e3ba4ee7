"""Running a program from start to end: timed, its output read line by line, and nothing of it left behind."""

import contextlib
import os
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Final, NoReturn

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_S: Final = 3.0
_PANIC: Final = "Kernel panic - not syncing"
_TAIL_LINES: Final = 12


class BenchError(Exception):
    """A benchmark that cannot be, or failed: one line. `output` is the last of what the program printed, if any."""

    def __init__(self, text: str, output: str = "") -> None:
        super().__init__(text)
        self.output = output


class Interrupted(BaseException):
    """A signal asked us to end; everything that was started has ended."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal that ends us in order: Ctrl-C and its like, where nothing was started that would outlive us."""
    raise Interrupted(number)


@dataclass(frozen=True, slots=True)
class Line:
    """A line that a program printed, and when its end arrived: seconds since the program was started."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that has ended: `seconds` from before its start until it was gone, the exit status (negative: a
    signal's number), its output."""

    seconds: float
    status: int
    lines: Sequence[Line]

    def tail(self) -> str:
        return _tail(self.lines)


def run_to_end(
    command: Sequence[str | os.PathLike[str]],
    timeout: float,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    on_start: Callable[[int], None] | None = None,
) -> Finished:
    """Run a program without input until it ends; return what it printed (both outputs) and how long it took.
    `on_start` is told its process id, `on_line` each line as it comes.

    BenchError after `timeout` seconds or a guest's panic, Interrupted after a signal: the program, and whatever it
    started, has been ended then.
    """
    with Signals() as signals:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            if on_start is not None:
                on_start(process.pid)
            reader = _Reader(process, begin, on_line)
            seconds = reader.read(signals, begin + timeout)
            return Finished(seconds, process.wait(), reader.lines)
        finally:
            end_group(process)
            if process.stdout is not None:
                process.stdout.close()


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group of its own, and the group with it: asked first, then made to."""
    if process.returncode is not None:
        return
    # The group is signalled before its leader is reaped: until then its number is nobody else's.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    pidfd = os.pidfd_open(process.pid)
    try:
        select.select([pidfd], [], [], _GRACE_S)
    finally:
        os.close(pidfd)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Signals:
    """While this lasts, a signal that would end us raises nothing but is kept for `check()`, and wakes a selector that
    watches `fd`: so there is no moment in which a process is started and not yet known."""

    def __init__(self) -> None:
        self.fd, self._write = -1, -1
        self._caught = 0
        self._previous: dict[int, object] = {}
        self._previous_wakeup = -1

    def __enter__(self) -> "Signals":
        self.fd, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._catch) for number in _SIGNALS}
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self.fd)
        os.close(self._write)
        if kind is None:
            self.check()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = number

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self._caught:
            raise Interrupted(self._caught)


class _Reader:
    def __init__(self, process: subprocess.Popen[bytes], begin: float, on_line: Callable[[str], None] | None) -> None:
        assert process.stdout is not None
        self._pid = process.pid
        self._fd = process.stdout.fileno()
        self._begin = begin
        self._on_line = on_line
        self._rest = b""
        self.lines: list[Line] = []

    def read(self, signals: Signals, deadline: float) -> float:
        """Read until the process has ended and its output is closed; return when it had ended (seconds from begin)."""
        # Waiting with a time limit polls in Python, by up to 50 ms; a pidfd tells at once.
        pidfd = os.pidfd_open(self._pid)
        ended: float | None = None
        try:
            with selectors.DefaultSelector() as selector:
                for fd in (self._fd, pidfd, signals.fd):
                    selector.register(fd, selectors.EVENT_READ)
                while ended is None or self._fd in selector.get_map():
                    left = deadline - time.perf_counter()
                    if left <= 0:
                        raise self._late(ended, deadline)
                    ready = {key.fd for key, _ in selector.select(left)}
                    if pidfd in ready:
                        ended = time.perf_counter() - self._begin
                        selector.unregister(pidfd)
                        deadline = min(deadline, time.perf_counter() + _GRACE_S)
                    signals.check()
                    if self._fd in ready:
                        data = os.read(self._fd, 1 << 16)
                        if not data:
                            selector.unregister(self._fd)
                        self._take(data or b"\n" * bool(self._rest))
        finally:
            os.close(pidfd)
        return ended

    def _late(self, ended: float | None, deadline: float) -> BenchError:
        if ended is not None:
            return BenchError("it ended and left something behind that runs", _tail(self.lines))
        if self._rest:
            self._take(b"\n")
        return BenchError(f"not at its end after {deadline - self._begin:g} s", _tail(self.lines))

    def _take(self, data: bytes) -> None:
        at = time.perf_counter() - self._begin
        *whole, self._rest = (self._rest + data).split(b"\n")
        for raw in whole:
            text = raw.decode("utf-8", "replace")
            self.lines.append(Line(at, text))
            if self._on_line is not None:
                self._on_line(text)
            if _PANIC in text:
                raise BenchError(f"the guest panicked: {text.partition(_PANIC)[2].strip(' :')}", _tail(self.lines))


def _tail(lines: Sequence[Line]) -> str:
    return "\n".join(line.text.rstrip() for line in lines[-_TAIL_LINES:])
