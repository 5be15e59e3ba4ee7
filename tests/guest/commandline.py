"""The command as its users run it: a process, perhaps on a terminal of its own, and what it leaves behind."""

import fcntl
import os
import re
import select
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import pyhyve

_SOURCE: Final = Path(pyhyve.__file__).resolve().parents[1]
_MARK: Final = "PYHYVE_TEST_RUN"
TIMEOUT_S: Final = 60.0


@dataclass(frozen=True)
class Ended:
    """What a command came to."""

    status: int
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """The one line of a user's error; fails if it is not exactly that."""
        assert self.stderr.startswith("pyhyve: "), self.stderr
        assert self.stderr.endswith("\n"), self.stderr
        assert self.stderr.count("\n") == 1, self.stderr
        return self.stderr.removeprefix("pyhyve: ").rstrip("\n")


class CommandLine:
    """Runs `pyhyve ARGUMENTS`. Every process gets a runtime, a temporary and a current directory under `place`."""

    def __init__(self, place: Path) -> None:
        self.runtime = place / "runtime"
        self.temporary = place / "temporary"
        self.current = place / "current"
        for directory in (self.runtime, self.temporary, self.current):
            directory.mkdir()
        self._mark = uuid.uuid4().hex
        self._started: list[subprocess.Popen[str]] = []
        self.terminals: list[Terminal] = []

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(_SOURCE),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "TMPDIR": str(self.temporary),
            _MARK: self._mark,
        }

    @staticmethod
    def command(arguments: Sequence[object]) -> list[str]:
        return [sys.executable, "-W", "error", "-m", "pyhyve.cli.main", *map(str, arguments)]

    def start(
        self, *arguments: object, environment: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen[str]:
        """Start it with nothing to read; what it prints is kept in pipes unless told otherwise."""
        options: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "start_new_session": True,
            "errors": "replace",
            **popen,
        }
        process = subprocess.Popen(
            self.command(arguments),
            env={**self.environment, **(environment or {})},
            cwd=self.current,
            text=True,
            **options,
        )
        self._started.append(process)
        return process

    def run(self, *arguments: object, timeout: float = TIMEOUT_S, **popen: Any) -> Ended:
        """Run it to its end."""
        return self.finish(self.start(*arguments, **popen), timeout)

    @staticmethod
    def finish(process: subprocess.Popen[str], timeout: float = TIMEOUT_S) -> Ended:
        stdout, stderr = process.communicate(timeout=timeout)
        return Ended(process.returncode, stdout or "", stderr or "")

    def on_terminal(self, *arguments: object) -> "Terminal":
        """Start it as the leader of the session of a new terminal."""
        terminal = Terminal(self, arguments)
        self.terminals.append(terminal)
        return terminal

    def left_behind(self) -> list[str]:
        """Processes and files that the commands made and that are still there."""
        found = [f"file {path}" for path in (*self.runtime.rglob("*"), *self.temporary.rglob("*")) if not path.is_dir()]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes()
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if f"{_MARK}={self._mark}".encode() in environment.split(b"\0") and state != "Z":
                    found.append(f"process {entry.name}")
        return found

    def close(self) -> None:
        """End what a failed test has left running."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        for terminal in self.terminals:
            terminal.close()


class Terminal:
    """A pseudo-terminal with pyhyve on its inner end and the test at its outer one."""

    def __init__(self, commands: CommandLine, arguments: Sequence[object]) -> None:
        self.master, self.slave = os.openpty()
        self.cooked = termios.tcgetattr(self.slave)
        slave = self.slave

        def take_terminal() -> None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = commands.start(
            *arguments, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_terminal, close_fds=True
        )
        self.seen = b""

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    @property
    def is_restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.cooked

    def expect(self, pattern: bytes, timeout: float = TIMEOUT_S) -> re.Match[bytes]:
        """Wait for `pattern` behind the last match."""
        return expect(self.master, pattern, self, timeout)

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        """Wait for the end and return the exit status, taking in what is printed meanwhile."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it did not end; it printed {self.seen[-2000:]!r}"
            self.drain(0.05)
        self.drain(0)
        return self.process.returncode

    def drain(self, seconds: float) -> None:
        while self.master >= 0 and select.select([self.master], [], [], seconds)[0]:
            self.seen += os.read(self.master, 65536)
            seconds = 0

    def hang_up(self) -> None:
        """Close the outer end, as a terminal window that is closed does."""
        os.close(self.slave)
        os.close(self.master)
        self.master = self.slave = -1

    def close(self) -> None:
        if self.master >= 0:
            self.hang_up()


class Line:
    """The outer end of a terminal that somebody else made."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        self.seen = b""

    def expect(self, pattern: bytes, timeout: float = TIMEOUT_S) -> re.Match[bytes]:
        return expect(self.fd, pattern, self, timeout)

    def type(self, data: bytes) -> None:
        os.write(self.fd, data)

    def close(self) -> None:
        os.close(self.fd)


def expect(fd: int, pattern: bytes, reader: "Terminal | Line", timeout: float) -> re.Match[bytes]:
    deadline = time.monotonic() + timeout
    while (match := re.search(pattern, reader.seen)) is None:
        ready = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]
        assert ready, f"{pattern!r} did not come after {reader.seen[-2000:]!r}"
        try:
            data = os.read(fd, 65536)
        except OSError:
            data = b""
        assert data, f"the terminal was closed before {pattern!r} came after {reader.seen[-2000:]!r}"
        reader.seen += data
    reader.seen = reader.seen[match.end() :]
    return match


def read_until(stream: IO[str], pattern: str) -> re.Match[str]:
    """Read lines until one matches."""
    seen = ""
    for line in stream:
        match = re.search(pattern, line)
        if match is not None:
            return match
        seen += line
    raise AssertionError(f"{pattern!r} did not come; it ended after {seen[-2000:]!r}")
