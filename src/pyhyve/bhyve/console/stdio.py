"""The terminal (or the pipes) that pyhyve was started on.

A terminal is put in raw mode, and put back on every way out that leaves Python a say: stop(), exit, SIGTERM, SIGHUP,
SIGQUIT, and SIGTSTP for as long as the process is stopped. From the background it is neither changed nor read.
"""

import atexit
import contextlib
import os
import signal
import sys
import termios
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

from pyhyve.bhyve.console.base import OnInput, OnQuit, Quit
from pyhyve.bhyve.console.escape import HELP, Command, EscapeFilter
from pyhyve.bhyve.console.reader import InputThread
from pyhyve.bhyve.console.writer import BoundedWriter

OUTPUT_LIMIT: Final = 4 << 20
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6


def raw_attributes(attributes: list[Any]) -> list[Any]:
    """Return terminal attributes that pass every byte both ways, unchanged and at once (cfmakeraw(3))."""
    raw = list(attributes)
    raw[_CC] = list(attributes[_CC])
    raw[_IFLAG] &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    raw[_OFLAG] &= ~termios.OPOST
    raw[_LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    raw[_CFLAG] = raw[_CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    raw[_CC][termios.VMIN] = 1
    raw[_CC][termios.VTIME] = 0
    return raw


class RawTerminal:
    """The line discipline of one terminal: `enter()` makes it raw, `leave()` puts back what was there."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.RLock()  # a signal handler may interrupt its own thread in here
        self._saved: list[Any] | None = None
        self._ended = False

    def in_foreground(self) -> bool:
        """Whether this process may change and read the terminal without being stopped for it."""
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return True  # not our controlling terminal: no job control on it

    def enter(self, again: bool = False) -> bool:
        """Go raw, if in the foreground; `again` also if it was done before. Return whether the terminal is raw."""
        with self._lock:
            if self._ended:
                return False
            if not self.in_foreground():
                self._saved = None  # the shell has put its own attributes back
                return False
            if self._saved is None or again:
                try:
                    attributes = termios.tcgetattr(self._fd)
                    if self._saved is None:
                        self._saved = attributes
                    termios.tcsetattr(self._fd, termios.TCSANOW, raw_attributes(attributes))
                except termios.error:
                    return True  # the terminal is gone; reading it will tell
            return True

    def leave(self) -> None:
        with self._lock:
            saved, self._saved = self._saved, None
            if saved is not None and self.in_foreground():
                with contextlib.suppress(termios.error):
                    termios.tcsetattr(self._fd, termios.TCSANOW, saved)

    def end(self) -> None:
        """leave(), for good."""
        with self._lock:
            self._ended = True
            self.leave()


class StdioConsole:
    """Standard input and output. Input that is no terminal is read to its end, which does not end the VM.

    Signals are handled only where start() is called on the main thread; they are given back by stop().
    """

    def __init__(self, input_fd: int = 0, output_fd: int = 1) -> None:
        # Where the program was started without one, the number may by now be anything's.
        self._in = None if input_fd == 0 and sys.__stdin__ is None else input_fd
        nowhere = output_fd == 1 and sys.__stdout__ is None
        self._writer = None if nowhere else BoundedWriter(output_fd, OUTPUT_LIMIT, self._closed)
        self._reader: InputThread | None = None
        self._terminal: RawTerminal | None = None
        self._escape = EscapeFilter()
        self._on_input: OnInput | None = None
        self._on_quit: OnQuit | None = None
        self._quit_sent = False
        self._asked_by_signal = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def write(self, data: bytes) -> None:
        if self._writer is not None:
            self._writer.write(data)

    def start(self, on_input: OnInput, on_quit: OnQuit) -> None:
        self._on_input = on_input
        self._on_quit = on_quit
        may_read = None
        if self._in is not None and os.isatty(self._in):
            terminal = self._terminal = RawTerminal(self._in)
            atexit.register(terminal.end)
            may_read = terminal.enter
        # Before the terminal is touched: a signal in between must find somebody to put it back.
        if threading.current_thread() is threading.main_thread():
            self._take_signals()
        if self._terminal is not None:
            self._terminal.enter()
        if self._writer is not None:
            self._writer.start()
        if self._in is not None:
            self._reader = InputThread(self._in, self._typed, self._input_ended, may_read)
            self._reader.start()

    def stop(self) -> None:
        if self._reader is not None:
            self._reader.stop()
            self._reader = None
        if self._writer is not None:
            self._writer.stop()
        if self._terminal is not None:
            self._terminal.end()
            atexit.unregister(self._terminal.end)
            self._terminal = None
        self._give_signals_back()

    # Input

    def _typed(self, data: bytes) -> None:
        commands: list[Command] = []
        if self._terminal is not None:
            data, commands = self._escape.feed(data)
        if data and self._on_input is not None:
            self._on_input(data)
        for command in commands:
            if command is Command.HELP:
                self.write(HELP)
            else:
                self._quit(Quit.KEY)

    def _input_ended(self) -> None:
        if self._terminal is not None:
            self._closed()

    def _closed(self) -> None:
        self._quit(Quit.CLOSED)

    def _quit(self, reason: Quit) -> None:
        if self._on_quit is not None and not self._quit_sent:
            self._quit_sent = True
            self._on_quit(reason)

    # Signals

    def _take_signals(self) -> None:
        handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = {
            signal.SIGTERM: self._on_end_signal,
            signal.SIGHUP: self._on_end_signal,
        }
        if self._terminal is not None:
            handlers[signal.SIGQUIT] = self._on_end_signal
            handlers[signal.SIGTSTP] = self._on_stop_signal
            handlers[signal.SIGCONT] = self._on_continue_signal
        for number, handler in handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) means what it says
                self._handlers[number] = signal.signal(number, handler)

    def _give_signals_back(self) -> None:
        if self._handlers and threading.current_thread() is threading.main_thread():
            for number, previous in self._handlers.items():
                signal.signal(number, previous)
            self._handlers = {}

    def _on_end_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._quit(Quit.CLOSED)  # a hangup may come twice, from the terminal and from the shell
            return
        self._asked_by_signal += 1
        if self._asked_by_signal == 1 and number == signal.SIGTERM:
            if self._on_quit is not None:
                self._on_quit(Quit.SHUTDOWN)
            return
        if not self._quit_sent:
            self._quit(Quit.TERMINATED)
            return
        # Asked before, and still here: go the hard way, but with the terminal in order.
        if self._terminal is not None:
            self._terminal.end()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        if self._terminal is not None:
            self._terminal.leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        # The process goes on here when it is continued.
        if self._terminal is not None:
            self._terminal.enter()

    def _on_continue_signal(self, number: int, frame: FrameType | None) -> None:
        if self._terminal is not None:
            self._terminal.enter(again=True)
