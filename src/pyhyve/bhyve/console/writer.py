"""A bounded queue of output with a thread that drains it to a file descriptor."""

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Final

CHUNK: Final = 4096
"""At most PIPE_BUF: what poll() calls writable takes it without blocking."""
GATHER_S: Final = 0.002
"""A guest writes a byte at a time: the thread waits this long after the first, to write a line and not a byte."""
FLUSH_S: Final = 2.0


class BoundedWriter:
    """`write()` never blocks; when `limit` bytes wait, the oldest give way and a note says how many.

    The descriptor stays the caller's. `on_closed` is called once, on the thread, when nobody can read any more.
    """

    def __init__(
        self, fd: int, limit: int, on_closed: Callable[[], None] | None = None, flush_s: float = FLUSH_S
    ) -> None:
        self._flush_s = flush_s
        self._fd = fd
        self._limit = limit
        self._on_closed = on_closed
        self._lock = threading.Lock()
        self._buffer = bytearray()
        self._dropped = 0
        self._idle = True
        self._broken = False
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._wake_fd = -1
        self._thread: threading.Thread | None = None
        self._deadline = float("inf")

    def start(self) -> None:
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="console-out", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        with self._lock:
            if self._broken:
                return
            buffer = self._buffer
            buffer += data
            excess = len(buffer) - self._limit
            if excess > 0:
                # A little more than needed, so that a stuck terminal does not cost a move of the queue per byte.
                excess = min(len(buffer), excess + self._limit // 8)
                del buffer[:excess]
                self._dropped += excess
            idle = self._idle
            self._idle = False
        if idle:
            self._wake.set()

    def stop(self) -> None:
        """Write what waits, for at most `flush_s` seconds, and end the thread."""
        thread = self._thread
        if thread is None:
            return
        self._thread = None
        self._deadline = time.monotonic() + self._flush_s
        self._stopping.set()
        self._wake.set()
        os.eventfd_write(self._wake_fd, 1)
        if thread is not threading.current_thread():
            thread.join(self._flush_s + 0.5)
        with self._lock:
            self._broken = True
            self._buffer.clear()
        if not thread.is_alive():
            os.close(self._wake_fd)

    def _run(self) -> None:
        try:
            while True:
                self._wake.wait()
                self._wake.clear()
                self._stopping.wait(GATHER_S)
                if not self._drain():
                    return
                if self._stopping.is_set():
                    return
        except OSError:
            with self._lock:
                self._broken = True
                self._buffer.clear()
            if self._on_closed is not None and not self._stopping.is_set():
                self._on_closed()

    def _drain(self) -> bool:
        """Write until the queue is empty. Return False when stop()'s patience has ended first."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        poll.register(self._wake_fd, select.POLLIN)
        while chunk := self._take():
            view = memoryview(chunk)
            while view:
                if self._stopping.is_set():
                    left = self._deadline - time.monotonic()
                    if left <= 0 or not self._wait_writable(left):
                        return False
                else:
                    ready = dict(poll.poll())
                    if self._fd not in ready:
                        os.eventfd_read(self._wake_fd)
                        continue
                try:
                    view = view[os.write(self._fd, view[:CHUNK]) :]
                except BlockingIOError:
                    continue
        return True

    def _wait_writable(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(seconds * 1000))

    def _take(self) -> bytes:
        with self._lock:
            if self._dropped:
                note = f"\r\n[{self._dropped} bytes of console output lost: the reader is too slow]\r\n".encode()
                self._dropped = 0
                return note
            chunk = bytes(self._buffer[:CHUNK])
            del self._buffer[:CHUNK]
            self._idle = not chunk
            return chunk
