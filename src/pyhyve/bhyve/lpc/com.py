"""A serial port of the machine: a UART, the lock around it, and the console at the other end of its line."""

import threading
from typing import Final

from pyhyve.base.protocols import IrqPin
from pyhyve.bhyve.console.base import Console
from pyhyve.bhyve.lpc.uart import Uart, UartV1

BACKLOG_LIMIT: Final = 64 << 10


class ComPort:
    """The port's IoHandler (8 ports). What is typed faster than the guest reads, or before it listens, waits here.

    `receive()` is a console's `on_input`: it blocks its thread while BACKLOG_LIMIT bytes wait, until close().
    """

    def __init__(self, irq: IrqPin, console: Console) -> None:
        self._lock = threading.RLock()  # the chip calls back for more input in the middle of an access
        self._less = threading.Condition(self._lock)
        self._backlog = bytearray()
        self._closed = False
        self.uart = Uart(irq, console.write)
        self.uart.on_room = self._refill
        self.uart.on_flushed = self._take_back

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            return self.uart.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            self.uart.write(offset, size, value)

    def receive(self, data: bytes) -> None:
        with self._lock:
            while len(self._backlog) >= BACKLOG_LIMIT and not self._closed:
                self._less.wait()
            if not self._closed:
                self._backlog += data
                self._refill()

    def close(self) -> None:
        """Let go of a console that waits in receive(); no input is taken any more."""
        with self._lock:
            self._closed = True
            self._less.notify_all()

    def reset(self) -> None:
        with self._lock:
            self.uart.reset()

    def save(self) -> UartV1:
        with self._lock:
            return self.uart.save()

    def restore(self, state: UartV1) -> None:
        with self._lock:
            self.uart.restore(state)

    def _refill(self) -> None:
        if self._backlog and self.uart.listening and (room := self.uart.room()):
            data = bytes(self._backlog[:room])
            del self._backlog[:room]
            self._less.notify_all()
            self.uart.receive(data)

    def _take_back(self, data: bytes) -> None:
        """A driver that opens its port empties the FIFO after it has begun to listen. A real line has brought nothing
        by then, so the bytes count as not sent yet."""
        self._backlog[:0] = data
