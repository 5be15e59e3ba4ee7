"""The terminal: raw while the VM runs, and as it was on every way out. A process of its own, on a pty of its own."""

import fcntl
import os
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator

import pytest

CHILD = """
import os, signal, sys, threading, time
from pyhyve.bhyve.console.stdio import StdioConsole

quits, done = [], threading.Event()
console = StdioConsole()
mode = sys.argv[1]
if mode == "background" and (job := os.fork()):
    # The shell's part: read lines until "fg", then give the terminal to the job's group.
    os.setpgid(job, job)
    while sys.stdin.readline() != "fg\\n":
        pass
    os.tcsetpgrp(0, job)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    status = os.waitpid(job, 0)[1]
    os._exit(os.waitstatus_to_exitcode(status))
if mode == "background":
    while os.getpgrp() != os.getpid():
        time.sleep(0.001)

def quit(reason):
    quits.append(reason.name)
    if mode != "deaf":
        done.set()

console.start(lambda data: console.write(b"got " + data.hex().encode() + b";"), quit)
console.write(b"ready;")
if mode == "exit":
    time.sleep(0.1)
    sys.exit(3)
if mode == "raise":
    time.sleep(0.1)
    raise KeyboardInterrupt
done.wait()
console.stop()
print(*quits, file=sys.stderr, flush=True)
"""


class Session:
    """A child that is the leader of the session whose terminal is a new pty."""

    def __init__(self, mode: str) -> None:
        self.master, self.slave = os.openpty()
        slave = self.slave

        def take_terminal() -> None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.cooked = termios.tcgetattr(slave)
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD, mode],
            stdin=slave,
            stdout=slave,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=take_terminal,
            text=True,
        )
        self.expect(b"ready;")

    def expect(self, wanted: bytes) -> bytes:
        got = b""
        deadline = time.monotonic() + 20
        while wanted not in got:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{wanted!r} did not come after {got!r}"
            got += os.read(self.master, 4096)
        return got

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    @property
    def is_raw(self) -> bool:
        local = termios.tcgetattr(self.slave)[3]
        return not local & (termios.ICANON | termios.ECHO | termios.ISIG)

    @property
    def is_restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.cooked

    def end(self) -> str:
        """Wait for the child and return what it said at the end."""
        return self.child.communicate(timeout=20)[1].strip()


Start = Callable[[str], Session]


@pytest.fixture
def start() -> Iterator[Start]:
    sessions: list[Session] = []

    def start(mode: str = "") -> Session:
        sessions.append(Session(mode))
        return sessions[-1]

    yield start
    for session in sessions:
        if session.child.poll() is None:
            session.child.kill()
            session.child.communicate()
        for fd in (session.master, session.slave):
            if fd >= 0:
                os.close(fd)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_every_key_reaches_the_guest_unchanged(start: Start) -> None:
    session = start("")
    assert session.is_raw
    session.type(b"\x03\x1a\x04\r\n\x11\x13\x7f")
    assert session.expect(b"got 031a040d0a11137f;")


def test_ctrl_a_x_quits_and_restores(start: Start) -> None:
    session = start("")
    session.type(b"\x01x")
    assert session.end() == "KEY"
    assert session.child.returncode == 0
    assert session.is_restored


def test_ctrl_a_h_helps_and_ctrl_a_twice_sends_it(start: Start) -> None:
    session = start("")
    session.type(b"\x01h")
    session.expect(b"Ctrl-A x       quit")
    session.type(b"\x01\x01")
    session.expect(b"got 01;")


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGTERM, "SHUTDOWN"), (signal.SIGQUIT, "TERMINATED"), (signal.SIGHUP, "CLOSED")]
)
def test_a_signal_asks_for_the_end_and_restores(start: Start, number: signal.Signals, said: str) -> None:
    session = start("")
    session.child.send_signal(number)
    assert session.end() == said
    assert session.is_restored


def test_a_third_signal_ends_a_vm_that_does_not_listen_and_restores(start: Start) -> None:
    """After the request to the guest, and that to the monitor."""
    session = start("deaf")
    for _ in range(2):
        session.child.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert session.child.poll() is None
    session.child.send_signal(signal.SIGTERM)
    session.end()
    assert session.child.returncode == -signal.SIGTERM
    assert session.is_restored


@pytest.mark.parametrize(("mode", "status"), [("exit", 3), ("raise", -signal.SIGINT)])
def test_a_program_that_ends_without_stop_restores(start: Start, mode: str, status: int) -> None:
    session = start(mode)
    session.end()
    assert session.child.returncode == status
    assert session.is_restored


def test_a_closed_terminal_asks_for_the_end(start: Start) -> None:
    session = start("")
    os.close(session.slave)
    os.close(session.master)
    session.slave = session.master = -1
    assert session.end() == "CLOSED"
    assert session.child.returncode == 0


def test_stopped_and_continued_the_terminal_is_given_back_and_taken_again(start: Start) -> None:
    session = start("")
    session.child.send_signal(signal.SIGTSTP)
    assert os.waitid(os.P_PID, session.child.pid, os.WSTOPPED) is not None
    assert session.is_restored
    session.child.send_signal(signal.SIGCONT)
    wait_for(lambda: session.is_raw)
    session.type(b"\x03")
    session.expect(b"got 03;")
    session.type(b"\x01x")
    assert session.end() == "KEY"
    assert session.is_restored


def test_in_the_background_the_terminal_is_neither_changed_nor_read_until_it_is_ours(start: Start) -> None:
    session = start("background")
    assert session.is_restored
    session.type(b"for the shell\n")
    session.expect(b"for the shell")  # the terminal's own echo
    time.sleep(0.7)
    assert session.child.poll() is None
    session.type(b"fg\n")
    wait_for(lambda: session.is_raw)
    session.type(b"\x03")
    session.expect(b"got 03;")
    session.type(b"\x01x")
    assert session.end() == "KEY"
