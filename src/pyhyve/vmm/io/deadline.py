"""One absolute deadline over `Timers`, made for chips that move theirs far more often than they reach them."""

from collections.abc import Callable

from pyhyve.base.protocols import Clock, Timer, Timers


class Deadline:
    """A deadline in the Clock's nanoseconds; `at` is None when there is none.

    Moving it later is free: the call already booked finds out that it is early and books again. The wake-up must begin
    with `if not deadline.due(): return`, which also swallows a call that was on its way when it was cancelled.
    """

    __slots__ = ("_booked", "_clock", "_timer", "_timers", "_wake", "at")

    def __init__(self, clock: Clock, timers: Timers, wake: Callable[[], None]) -> None:
        self._clock = clock
        self._timers = timers
        self._wake = wake
        self._timer: Timer | None = None
        self._booked = 0
        self.at: int | None = None

    def set(self, at: int) -> None:
        """Move the deadline to `at` (nanoseconds of the Clock; one that has passed is called as soon as may be)."""
        self.at = at
        if self._timer is not None:
            if self._booked <= at:
                return
            self._timer.cancel()
        self._book(at)

    def clear(self) -> None:
        """There is no deadline any more."""
        self.at = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def due(self) -> bool:
        """In the wake-up: True, once, if the deadline has been reached (it is then cleared)."""
        self._timer = None
        at = self.at
        if at is None:
            return False
        if self._clock.now() < at:
            self._book(at)
            return False
        self.at = None
        return True

    def _book(self, at: int) -> None:
        self._booked = at
        self._timer = self._timers.call_at(at, self._wake)


MIN_PERIOD_NS = 20_000
"""A guest may program periods of nanoseconds; wake-ups come no oftener than this, and what falls between merges."""


def next_period(previous: int, period: int, now: int) -> int:
    """The first of previous + k * period (k >= 1) that is after `now`; no drift, whatever the delay of a wake-up."""
    nxt = previous + period
    earliest = now + 1 if period >= MIN_PERIOD_NS else now + MIN_PERIOD_NS
    if nxt < earliest:
        nxt += -((nxt - earliest) // period) * period
    return nxt
