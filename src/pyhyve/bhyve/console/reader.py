"""A thread that reads a file descriptor until its end, or until it is told to stop."""

import os
import select
import threading
from collections.abc import Callable
from typing import Final

CHUNK: Final = 4096
RECHECK_MS: Final = 500


class InputThread:
    """Passes what `fd` yields to `on_data`; calls `on_end` once at end of file or on an error, never after stop().

    `may_read`, asked before each read, says whether the descriptor may be read now (a terminal may not from the
    background); while it says no, it is asked again twice a second.
    """

    def __init__(
        self,
        fd: int,
        on_data: Callable[[bytes], None],
        on_end: Callable[[], None],
        may_read: Callable[[], bool] | None = None,
    ) -> None:
        self._fd = fd
        self._on_data = on_data
        self._on_end = on_end
        self._may_read = may_read
        self._stopping = False
        self._wake_fd = -1
        self._thread = threading.Thread(target=self._run, name="console-in", daemon=True)

    def start(self) -> None:
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; one that is held up in `on_data` is left to end by itself."""
        if self._stopping or self._wake_fd < 0:
            return
        self._stopping = True
        if self._thread.is_alive():
            os.eventfd_write(self._wake_fd, 1)
            if self._thread is not threading.current_thread():
                self._thread.join(1.0)
        if not self._thread.is_alive():
            os.close(self._wake_fd)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        paused = False
        poll.register(self._fd, select.POLLIN)
        while not self._stopping:
            if self._may_read is not None and not self._may_read():
                if not paused:
                    poll.unregister(self._fd)
                    paused = True
                poll.poll(RECHECK_MS)
                continue
            if paused:
                poll.register(self._fd, select.POLLIN)
                paused = False
            ready = dict(poll.poll())
            if self._stopping:
                return
            if self._fd not in ready or (self._may_read is not None and not self._may_read()):
                continue
            try:
                data = os.read(self._fd, CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if self._stopping:
                return
            if not data:
                self._on_end()
                return
            self._on_data(data)
