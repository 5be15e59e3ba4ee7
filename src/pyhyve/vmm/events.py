"""The event thread of a VM: timers on the VM's clock, file descriptors, and calls handed over by other threads.

One thread a VM waits in epoll. Everything that is not a vCPU runs here: chip timers, the terminal, sockets. A callback
must not block; one that raises is a bug in a device, and goes to `on_error`.
"""

import ctypes
import heapq
import itertools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Final

from pyhyve.base.errors import HostError

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT

_CLOCK_MONOTONIC: Final = 1
_TFD_TIMER_ABSTIME: Final = 1
_TFD_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC
_NEVER: Final = 1 << 63
_SECOND: Final = 1_000_000_000


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_int64), ("tv_nsec", ctypes.c_int64))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


# os.timerfd_create came with Python 3.13. PyDLL keeps the GIL: neither call blocks, and both are on hot paths.
_libc: Final = ctypes.PyDLL(None, use_errno=True)


class Clock:
    """Host-monotonic time in ns that stands still while paused."""

    def __init__(self) -> None:
        self._lag = time.monotonic_ns()
        self._frozen: int | None = None

    def now(self) -> int:
        """Nanoseconds since the clock was made, without the time spent paused."""
        frozen = self._frozen
        return time.monotonic_ns() - self._lag if frozen is None else frozen

    def pause(self) -> None:
        if self._frozen is None:
            self._frozen = time.monotonic_ns() - self._lag

    def resume(self) -> None:
        if self._frozen is not None:
            self._lag = time.monotonic_ns() - self._frozen
            self._frozen = None

    @property
    def paused(self) -> bool:
        return self._frozen is not None

    def host_deadline(self, deadline_ns: int) -> int:
        """Return CLOCK_MONOTONIC's time of a time of this clock."""
        return deadline_ns + self._lag


class TimerHandle:
    """A pending call. `cancel()` may come from any thread; a call that has already begun is not undone."""

    __slots__ = ("callback", "owner")

    def __init__(self, owner: "Timers", callback: Callable[[], None]) -> None:
        self.owner = owner
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback = None
            self.owner.cancelled += 1


class Timers:
    """Calls at absolute times of a Clock, behind one timerfd."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.cancelled = 0
        self._heap: list[tuple[int, int, TimerHandle]] = []
        self._serial = itertools.count()
        self._lock = threading.Lock()
        self._armed = _NEVER
        self._spec = _Itimerspec()
        self._spec_ref = ctypes.byref(self._spec)
        self._settime = _libc.timerfd_settime
        self.fd: int = _libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS)
        if self.fd < 0:
            raise HostError(f"cannot make a timer: {os.strerror(ctypes.get_errno())}")

    def call_at(self, deadline_ns: int, callback: Callable[[], None]) -> TimerHandle:
        """Call `callback` on the event thread when the clock reaches `deadline_ns`."""
        timer = TimerHandle(self, callback)
        with self._lock:
            heapq.heappush(self._heap, (deadline_ns, next(self._serial), timer))
            if deadline_ns < self._armed:
                self._arm(deadline_ns)
            elif self.cancelled > 256 and self.cancelled * 2 > len(self._heap):
                self._heap = [entry for entry in self._heap if entry[2].callback is not None]
                heapq.heapify(self._heap)
                self.cancelled = 0
        return timer

    def run_due(self) -> None:
        """Make the calls that have fallen due, in the order of their deadlines. Event thread only."""
        clock = self.clock
        while True:
            with self._lock:
                heap = self._heap
                while heap and heap[0][2].callback is None:
                    heapq.heappop(heap)
                    self.cancelled = max(0, self.cancelled - 1)
                if not heap or clock.paused:
                    self._armed = _NEVER
                    return
                deadline = heap[0][0]
                if deadline > clock.now():
                    self._arm(deadline)
                    return
                timer = heapq.heappop(heap)[2]
                callback = timer.callback
                timer.callback = None
            if callback is not None:
                callback()

    def rearm(self) -> None:
        """Arm for the earliest deadline: after the clock was resumed."""
        with self._lock:
            self._armed = _NEVER
            if self._heap and not self.clock.paused:
                self._arm(self._heap[0][0])

    def pending(self) -> int:
        """Return how many calls are still due."""
        with self._lock:
            return sum(1 for entry in self._heap if entry[2].callback is not None)

    def close(self) -> None:
        with self._lock:
            self._heap.clear()
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1

    def _arm(self, deadline_ns: int) -> None:
        self._armed = deadline_ns
        if self.fd < 0 or self.clock.paused:
            return
        value = self._spec.it_value
        # 0 would disarm; the past fires at once.
        value.tv_sec, value.tv_nsec = divmod(max(1, self.clock.host_deadline(deadline_ns)), _SECOND)
        self._settime(self.fd, _TFD_TIMER_ABSTIME, self._spec_ref, None)


class EventLoop:
    """The event thread, with its clock and timers. Every callback is called with `lock` held."""

    def __init__(
        self,
        name: str,
        on_error: Callable[[BaseException], None] | None = None,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self.clock = Clock()
        self.timers = Timers(self.clock)
        self.on_error = on_error
        self._lock = nullcontext() if lock is None else lock
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._calls: deque[Callable[[], None]] = deque()
        self._watches: dict[int, Callable[[int], None]] = {}
        self._stopping = False
        self._closed = False
        self._epoll.register(self._wake, READ)
        # Edge-triggered: an expiry is told once, so nobody has to read the descriptor.
        self._epoll.register(self.timers.fd, READ | select.EPOLLET)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the event thread, soon; from any thread. Calls keep their order."""
        self._calls.append(callback)
        if not self._closed:
            os.eventfd_write(self._wake, 1)

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(events)` on the event thread whenever `fd` is ready for READ or WRITE (or has hung up).

        Watching an fd again replaces its events and callback. Files that epoll cannot watch raise PermissionError.
        """
        known = fd in self._watches
        self._watches[fd] = callback
        try:
            if known:
                self._epoll.modify(fd, events)
            else:
                self._epoll.register(fd, events)
        except OSError:
            del self._watches[fd]
            raise

    def unwatch(self, fd: int) -> None:
        """Forget `fd`; harmless if it is not watched or already closed."""
        if self._watches.pop(fd, None) is not None:
            with suppress(OSError):
                self._epoll.unregister(fd)

    def pause(self) -> None:
        """Stop the clock: no timer fires until `resume()`. Descriptors are still served."""
        self.clock.pause()

    def resume(self) -> None:
        self.clock.resume()
        self.timers.rearm()

    def in_thread(self) -> bool:
        """True on the event thread itself."""
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """End the thread and release the descriptors. Idempotent; pending calls are dropped."""
        self._stopping = True
        if self._closed:
            return
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            if self.in_thread():
                return
            self._thread.join()
        self._closed = True
        self._epoll.close()
        os.close(self._wake)
        self.timers.close()

    def _run(self) -> None:
        timer_fd = self.timers.fd
        poll = self._epoll.poll
        lock = self._lock
        while not self._stopping:
            for fd, events in poll():
                try:
                    with lock:
                        if fd == timer_fd:
                            self.timers.run_due()
                        elif fd == self._wake:
                            self._run_calls()
                        else:
                            callback = self._watches.get(fd)
                            if callback is not None:
                                callback(events)
                except Exception as error:
                    # A device's bug must not take the other devices' thread with it: the VM is stopped by the owner.
                    if self.on_error is None:
                        raise
                    self.on_error(error)
                    # What was behind it in the queue is still to be done.
                    if fd == timer_fd:
                        self.timers.rearm()
                    elif fd == self._wake:
                        os.eventfd_write(self._wake, 1)

    def _run_calls(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        calls = self._calls
        while calls:
            calls.popleft()()
