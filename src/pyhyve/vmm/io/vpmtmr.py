"""The ACPI power-management timer: a free-running counter of 3.579545 MHz, 32 bits wide.

ACPI specification, "Power Management Timer (PM_TMR)"; the FADT must set TMR_VAL_EXT.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

from pyhyve.base.protocols import Clock

PM_TIMER_HZ: Final = 3_579_545


@dataclass(frozen=True, slots=True)
class VpmtmrV1:
    SCHEMA: ClassVar[tuple[str, int]] = ("vpmtmr", 1)
    elapsed_ns: int


class Vpmtmr:
    """The timer's one register; it starts from 0 and is read-only."""

    __slots__ = ("_base", "_clock")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._base = clock.now()

    def counter(self) -> int:
        """Ticks of 3.579545 MHz, 0 <= n < 2**32."""
        return (self._clock.now() - self._base) * PM_TIMER_HZ // 1_000_000_000 & 0xFFFFFFFF

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
