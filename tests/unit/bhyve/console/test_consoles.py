"""The consoles that are not the terminal, and the names of all."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyhyve.base.errors import UsageError
from pyhyve.bhyve.console import Quit, open_console
from pyhyve.bhyve.console.escape import Command, EscapeFilter
from pyhyve.bhyve.console.file import FileConsole
from pyhyve.bhyve.console.null import NullConsole
from pyhyve.bhyve.console.pty import PtyConsole
from pyhyve.bhyve.console.stdio import StdioConsole
from pyhyve.bhyve.console.writer import BoundedWriter


def nothing(_: object) -> None:
    pass


def read_until(fd: int, wanted: bytes, seconds: float = 10) -> bytes:
    got = b""
    deadline = time.monotonic() + seconds
    while wanted not in got:
        ready, _, _ = select.select([fd], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"{wanted!r} did not come after {got!r}"
        got += os.read(fd, 65536)
    return got


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- Names -------------------------------------------------------------------------------------------------------


def test_each_name_opens_its_console(tmp_path: Path) -> None:
    assert isinstance(open_console("stdio"), StdioConsole)
    assert isinstance(open_console("none"), NullConsole)
    for spec, kind in (("pty", PtyConsole), (f"file:{tmp_path}/out", FileConsole)):
        console = open_console(spec)
        assert isinstance(console, kind)
        console.stop()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("stido", "did you mean 'stdio'"),
        ("fil:x", "did you mean 'file:PATH'"),
        ("PTY", "did you mean 'pty'"),
        ("", "stdio, pty, file:PATH or none"),
        ("quux", "unknown console 'quux'; it can be stdio"),
        ("file", "no path"),
        ("file:", "no path"),
        ("pty:3", "takes no argument"),
        ("file:/no/such/directory/out", "No such file or directory"),
    ],
)
def test_a_wrong_name_is_one_line_that_says_what_would_be_right(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_console(spec)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# --- Escape ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "guest", "commands"),
    [
        ([b"plain"], b"plain", []),
        ([b"a\x01xb"], b"ab", [Command.QUIT]),
        ([b"\x01", b"x"], b"", [Command.QUIT]),
        ([b"\x01\x01x"], b"\x01x", []),
        ([b"\x01h\x01?"], b"", [Command.HELP, Command.HELP]),
        ([b"\x01zq"], b"q", []),
    ],
)
def test_escape_keys_are_taken_out_of_the_input(typed: list[bytes], guest: bytes, commands: list[Command]) -> None:
    keys = EscapeFilter()
    got, seen = b"", []
    for data in typed:
        out, found = keys.feed(data)
        got += out
        seen += found
    assert (got, seen) == (guest, commands)


# --- Writer ------------------------------------------------------------------------------------------------------


def test_a_reader_that_does_not_read_never_blocks_the_guest_and_loses_the_oldest() -> None:
    out, into = os.pipe()
    writer = BoundedWriter(into, 100_000)
    writer.start()
    started = time.monotonic()
    for n in range(50_000):
        writer.write(b"%06d\n" % n)
    assert time.monotonic() - started < 5
    got = read_until(out, b"049999\n")
    assert b"bytes of console output lost" in got
    numbers = [int(line) for line in got.split() if len(line) == 6 and line.isdigit()]
    assert numbers == sorted(numbers)
    assert len(numbers) < 50_000
    writer.stop()
    os.close(into)
    os.close(out)


def test_stop_writes_what_waits() -> None:
    out, into = os.pipe()
    writer = BoundedWriter(into, 1 << 20)
    writer.start()
    writer.write(b"last words")
    writer.stop()
    writer.stop()
    writer.write(b"too late")
    os.close(into)
    assert os.read(out, 100) == b"last words"
    assert os.read(out, 100) == b""
    os.close(out)


def test_stop_does_not_wait_for_ever_for_a_stuck_reader() -> None:
    out, into = os.pipe()
    writer = BoundedWriter(into, 1 << 20, flush_s=0.1)
    writer.start()
    writer.write(bytes(500_000))
    started = time.monotonic()
    writer.stop()
    assert time.monotonic() - started < 2
    os.close(into)
    os.close(out)


def test_a_reader_that_goes_away_is_reported_once() -> None:
    out, into = os.pipe()
    closed: list[bool] = []
    writer = BoundedWriter(into, 1 << 20, lambda: closed.append(True))
    writer.start()
    os.close(out)
    writer.write(b"anybody?")
    wait_for(lambda: bool(closed))
    writer.write(b"anybody?")
    writer.stop()
    assert closed == [True]
    os.close(into)


# --- Consoles ----------------------------------------------------------------------------------------------------


def test_a_file_gets_everything(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(b"from the last time")
    console = open_console(f"file:{path}")
    console.start(nothing, nothing)
    for n in range(1000):
        console.write(b"line %d\n" % n)
    console.stop()
    assert path.read_bytes() == b"".join(b"line %d\n" % n for n in range(1000))


def test_a_pty_shows_the_past_to_who_comes_late_and_outlives_who_leaves() -> None:
    paths: list[str] = []
    got = bytearray()
    quits: list[Quit] = []
    console = PtyConsole(paths.append)
    console.start(got.extend, quits.append)
    assert paths == [console.path]
    console.write(b"booted\r\n")
    for text in (b"root\r", b"\x01x\x03\x04"):
        terminal = os.open(console.path, os.O_RDWR | os.O_NOCTTY)
        console.write(b"login: ")
        read_until(terminal, b"login: ")
        os.write(terminal, text)
        wait_for(lambda text=text: got.endswith(text))  # type: ignore[misc]
        os.close(terminal)
    assert got == b"root\r\x01x\x03\x04"
    assert not quits
    console.stop()
    console.stop()


def test_a_pty_that_nobody_opens_blocks_nobody() -> None:
    console = PtyConsole(nothing)
    console.start(nothing, nothing)
    for _ in range(1000):
        console.write(bytes(1000))
    started = time.monotonic()
    console.stop()
    assert time.monotonic() - started < 5


def test_piped_input_reaches_the_guest_whole_and_its_end_ends_nothing() -> None:
    stdin, feed = os.pipe()
    show, stdout = os.pipe()
    got = bytearray()
    quits: list[Quit] = []
    console = StdioConsole(stdin, stdout)
    console.start(got.extend, quits.append)
    os.write(feed, b"a script \x01x\n")
    os.close(feed)
    wait_for(lambda: got == b"a script \x01x\n")
    console.write(b"its output")
    assert read_until(show, b"its output")
    time.sleep(0.02)
    assert not quits
    console.stop()
    for fd in (stdin, stdout, show):
        os.close(fd)


def test_output_that_nobody_can_read_any_more_asks_for_the_end() -> None:
    stdin, feed = os.pipe()
    show, stdout = os.pipe()
    quits: list[Quit] = []
    console = StdioConsole(stdin, stdout)
    console.start(nothing, quits.append)
    os.close(show)
    console.write(b"anybody?")
    wait_for(lambda: quits == [Quit.CLOSED])
    console.stop()
    for fd in (stdin, stdout, feed):
        os.close(fd)


def test_a_program_started_without_standard_input_or_output_has_none() -> None:
    program = """
import os, sys
taken = os.open("/dev/null", os.O_RDWR), os.open("/dev/null", os.O_RDWR)  # the numbers are somebody else's now
assert taken == (0, 1)
from pyhyve.bhyve.console.stdio import StdioConsole
quits = []
console = StdioConsole()
console.start(quits.append, quits.append)
console.write(b"x")
console.stop()
sys.exit(len(quits))
"""
    closed = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&- >&-', sys.executable, program], check=False)
    assert closed.returncode == 0


def test_consoles_leave_no_descriptors_behind(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for spec in ("pty", f"file:{tmp_path}/out", "none"):
        console = PtyConsole(nothing) if spec == "pty" else open_console(spec)
        console.start(nothing, nothing)
        console.write(b"x")
        console.stop()
    assert set(os.listdir("/proc/self/fd")) == before
