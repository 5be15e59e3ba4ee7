"""Stand-ins for tests: each is the simplest thing that honours its protocol and records what it was told."""

import heapq
import itertools
from collections.abc import Callable


class FakeClock:
    """A clock that a test moves by hand (nanoseconds)."""

    def __init__(self, start: int = 0) -> None:
        self.time = start

    def now(self) -> int:
        return self.time


class _FakeTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class FakeTimers:
    """Timers on a FakeClock: `advance(ns)` moves time and makes the calls that fall due, in order."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self._heap: list[tuple[int, int, _FakeTimer]] = []
        self._serial = itertools.count()

    def call_at(self, deadline_ns: int, callback: Callable[[], None]) -> _FakeTimer:
        timer = _FakeTimer(callback)
        heapq.heappush(self._heap, (deadline_ns, next(self._serial), timer))
        return timer

    def advance(self, ns: int) -> None:
        end = self.clock.time + ns
        while self._heap and self._heap[0][0] <= end:
            deadline, _, timer = heapq.heappop(self._heap)
            self.clock.time = max(self.clock.time, deadline)
            if timer.callback is not None:
                timer.callback()
        self.clock.time = end

    @property
    def pending(self) -> int:
        """How many calls are still due."""
        return sum(1 for _, _, timer in self._heap if timer.callback is not None)


class FakePin:
    """An interrupt pin that keeps its level and counts rising edges."""

    def __init__(self) -> None:
        self.level = False
        self.edges = 0

    def set_level(self, asserted: bool) -> None:
        if asserted and not self.level:
            self.edges += 1
        self.level = asserted

    def pulse(self) -> None:
        self.set_level(True)
        self.set_level(False)


class FakeMsiSink:
    """Keeps every (addr, data) sent to it."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []

    def send_msi(self, addr: int, data: int) -> None:
        self.sent.append((addr, data))
