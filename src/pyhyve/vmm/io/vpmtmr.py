"""The ACPI power-management timer: a free-running counter of 3.579545 MHz, 24 or 32 bits wide.

ACPI specification, "Power Management Timer (PM_TMR)"; the FADT's TMR_VAL_EXT tells of 32 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from pyhyve.base.protocols import Clock, Timers
from pyhyve.vmm.io.deadline import Deadline

PM_TIMER_HZ: Final = 3_579_545
_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class VpmtmrV1:
    SCHEMA: ClassVar[tuple[str, int]] = ("vpmtmr", 1)
    elapsed_ns: int


class Vpmtmr:
    """The timer's one register; it starts from 0 and is read-only.

    `on_carry` is called whenever the highest bit changes: each 2.3 s with 24 bits, each 10 min with 32. That sets
    TMR_STS. ValueError for another number of bits.
    """

    __slots__ = ("_base", "_clock", "_deadline", "_on_carry", "bits")

    def __init__(self, clock: Clock, timers: Timers, on_carry: Callable[[], None], bits: int = 32) -> None:
        if bits not in (24, 32):
            raise ValueError(f"a PM timer has 24 or 32 bits, not {bits}")
        self._clock = clock
        self._on_carry = on_carry
        self.bits = bits
        self._base = clock.now()
        self._deadline = Deadline(clock, timers, self._wake)
        self._book()

    def counter(self) -> int:
        """Ticks of 3.579545 MHz, 0 <= n < 2**bits."""
        return self._ticks() & (1 << self.bits) - 1

    def _ticks(self) -> int:
        return (self._clock.now() - self._base) * PM_TIMER_HZ // _NS

    def _book(self) -> None:
        """Wake up for the next change of the highest bit."""
        at = (self._ticks() >> self.bits - 1) + 1 << self.bits - 1
        self._deadline.set(self._base - (-at * _NS // PM_TIMER_HZ))

    def _wake(self) -> None:
        if self._deadline.due():
            self._book()
            self._on_carry()

    def read(self, offset: int, size: int) -> int:
        if offset >= 4:
            return (1 << (8 * size)) - 1
        return self.counter() >> (8 * offset) & ((1 << (8 * size)) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """The register is read-only."""

    def save(self) -> VpmtmrV1:
        return VpmtmrV1(self._clock.now() - self._base)

    def restore(self, state: VpmtmrV1) -> None:
        self._base = self._clock.now() - state.elapsed_ns
        self._book()
