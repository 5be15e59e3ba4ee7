"""Which vCPUs are in the guest, and since which generation of the nested page tables."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic


class GuestActivity:
    """FreeBSD's pm_active, with the generation that each vCPU entered the guest with.

    A vCPU's thread brackets each stay in the guest by `enter` and `leave`; both take no lock unless somebody waits.
    """

    def __init__(self, generation: Callable[[], int], kick: Callable[[], None]) -> None:
        self._generation = generation
        self._kick = kick
        self._inside: dict[int, int] = {}
        self._changed = threading.Condition()
        self._waiting = 0
        self._closed_to_guests = 0
        self._exclusive = threading.RLock()
        self.seen = False
        """True once any vCPU has entered: from then on it is known when nobody uses a retired table any more."""

    def enter(self, vcpu: int) -> int:
        """Go into the guest; return the generation to flush to. Waits while somebody has the guest stopped."""
        self.seen = True
        while True:
            generation = self._generation()
            self._inside[vcpu] = generation
            if self._closed_to_guests:
                self.leave(vcpu)
                with self._changed:
                    while self._closed_to_guests:
                        self._changed.wait()
            elif generation == self._generation():
                return generation

    def leave(self, vcpu: int) -> None:
        """The vCPU is back in the monitor. Harmless if it was not in the guest."""
        self._inside.pop(vcpu, None)
        if self._waiting:
            with self._changed:
                self._changed.notify_all()

    def any_inside(self) -> bool:
        return bool(self._inside)

    def oldest(self) -> int | None:
        """The oldest generation that a vCPU may still use; None if no vCPU ever said."""
        if not self.seen:
            return None
        return min(list(self._inside.values()), default=self._generation())

    def wait_flushed(self, generation: int, timeout: float | None = None) -> bool:
        """Wait until no vCPU in the guest uses a translation older than `generation`; False after `timeout` seconds.

        Not to be called by a vCPU's thread between its `enter` and `leave`.
        """
        return self._wait(lambda: all(g >= generation for g in list(self._inside.values())), timeout)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """No vCPU is in the guest while this lasts. Nests; not for a vCPU's thread between `enter` and `leave`."""
        with self._exclusive:
            self._closed_to_guests += 1
            try:
                while not self._wait(lambda: not self._inside, 0.01):
                    self._kick()
                yield
            finally:
                with self._changed:
                    self._closed_to_guests -= 1
                    self._changed.notify_all()

    def _wait(self, reached: Callable[[], bool], timeout: float | None) -> bool:
        if reached():
            return True
        deadline = None if timeout is None else monotonic() + timeout
        self._kick()
        with self._changed:
            self._waiting += 1
            try:
                while not reached():
                    left = None if deadline is None else deadline - monotonic()
                    if left is not None and left <= 0:
                        return False
                    self._changed.wait(left)
            finally:
                self._waiting -= 1
        return True
