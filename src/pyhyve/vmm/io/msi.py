"""Message-signalled interrupts: the only place that knows what the bits of `addr` and `data` mean.

Intel SDM vol 3, "Message Address Register Format" and "Message Data Register Format".
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

MSI_BASE: Final = 0xFEE
REDIRECTION_HINT: Final = 1 << 3
DESTINATION_LOGICAL: Final = 1 << 2
DATA_ASSERT: Final = 1 << 14
DATA_LEVEL: Final = 1 << 15


@dataclass(frozen=True, slots=True)
class MsiMessage:
    """A decoded message: destination 0-255, vector 0-255, delivery mode 0-7."""

    dest: int
    logical: bool
    mode: int
    vector: int
    level: bool
    """Level-triggered (data bit 15)."""
    asserted: bool
    """For a level-triggered message, whether it asserts (data bit 14); always True for an edge."""


@lru_cache(maxsize=4096)
def decode_msi(addr: int, data: int) -> MsiMessage | None:
    """What the guest's `addr` and `data` ask for, or None if `addr` is not the interrupt window (0xFEExxxxx).

    The destination is logical only when the redirection hint and the destination mode are both set: with RH clear the
    DM bit is ignored.
    """
    if addr >> 20 != MSI_BASE:
        return None
    both = REDIRECTION_HINT | DESTINATION_LOGICAL
    level = bool(data & DATA_LEVEL)
    return MsiMessage(
        dest=addr >> 12 & 0xFF,
        logical=addr & both == both,
        mode=data >> 8 & 7,
        vector=data & 0xFF,
        level=level,
        asserted=not level or bool(data & DATA_ASSERT),
    )
