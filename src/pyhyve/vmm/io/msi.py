"""Message-signalled interrupts: the only place that knows what the bits of `addr` and `data` mean.

Intel SDM vol 3, "Message Address Register Format" and "Message Data Register Format".
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

MSI_BASE: Final = 0xFEE
REDIRECTION_HINT: Final = 1 << 3
DESTINATION_LOGICAL: Final = 1 << 2
REMAPPABLE: Final = 1 << 4
DATA_ASSERT: Final = 1 << 14
DATA_LEVEL: Final = 1 << 15
_RESERVED_MODES: Final = (3, 6)


@dataclass(frozen=True, slots=True)
class MsiMessage:
    """A decoded message: destination 0-255 (extended: 0-32767), vector 0-255, delivery mode (not a reserved one)."""

    dest: int
    logical: bool
    mode: int
    vector: int
    level: bool
    """Level-triggered (data bit 15)."""
    asserted: bool
    """For a level-triggered message, whether it asserts (data bit 14); always True for an edge."""


@lru_cache(maxsize=4096)
def decode_msi(addr: int, data: int, extended: bool = False) -> MsiMessage | None:
    """What the guest's `addr` and `data` ask for, or None if that is no interrupt: another address than the interrupt
    window (0xFEExxxxx), or a reserved delivery mode.

    The destination is logical only when the redirection hint and the destination mode are both set: with RH clear the
    DM bit is ignored. RH is a hint: fixed interrupts go to all that the destination names, lowest-priority ones to one.

    extended: address bits 11:5 are bits 14:8 of the destination; bit 4 marks another format, which is no interrupt.
    (Linux Documentation/virt/kvm/x86/cpuid.rst, KVM_FEATURE_MSI_EXT_DEST_ID.)
    """
    mode = data >> 8 & 7
    if addr >> 20 != MSI_BASE or mode in _RESERVED_MODES or (extended and addr & REMAPPABLE):
        return None
    both = REDIRECTION_HINT | DESTINATION_LOGICAL
    level = bool(data & DATA_LEVEL)
    return MsiMessage(
        dest=addr >> 12 & 0xFF | (addr << 3 & 0x7F00 if extended else 0),
        logical=addr & both == both,
        mode=mode,
        vector=data & 0xFF,
        level=level,
        asserted=not level or bool(data & DATA_ASSERT),
    )
