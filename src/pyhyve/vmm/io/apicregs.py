"""The local APIC's registers and their fields. Intel SDM vol 3, chapter "Advanced Programmable Interrupt Controller".

Registers go by `offset >> 4` of the xAPIC page, which is also `msr - 0x800` in x2APIC mode.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

APIC_DEFAULT_BASE: Final = 0xFEE00000

MSR_APIC_BASE: Final = 0x1B
MSR_TSC_DEADLINE: Final = 0x6E0
MSR_X2APIC_FIRST: Final = 0x800
MSR_X2APIC_LAST: Final = 0x8FF

# IA32_APIC_BASE, "Local APIC Status and Location".
BASE_BSP: Final = 1 << 8
BASE_X2APIC: Final = 1 << 10
BASE_ENABLED: Final = 1 << 11
BASE_MODE: Final = BASE_ENABLED | BASE_X2APIC

# "Local APIC Register Address Map".
ID, VERSION, TPR, APR, PPR, EOI, RRD, LDR, DFR, SVR = 0x02, 0x03, 0x08, 0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0x0F
ISR0, TMR0, IRR0, ESR = 0x10, 0x18, 0x20, 0x28
LVT_CMCI, ICR_LOW, ICR_HIGH = 0x2F, 0x30, 0x31
LVT_TIMER, LVT_THERMAL, LVT_PMC, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x32, 0x33, 0x34, 0x35, 0x36, 0x37
TIMER_INITIAL, TIMER_CURRENT, TIMER_DIVIDE, SELF_IPI = 0x38, 0x39, 0x3E, 0x3F

# "Local APIC Version Register".
VERSION_INTEGRATED: Final = 0x14
VERSION_MAX_LVT: Final = 16
"""Where the number of the last LVT entry stands."""
VERSION_EOI_SUPPRESSION: Final = 1 << 24

# "Local Vector Table".
LVTS: Final = (LVT_CMCI, LVT_TIMER, LVT_THERMAL, LVT_PMC, LVT_LINT0, LVT_LINT1, LVT_ERROR)
LVT_DELIVERY_STATUS: Final = 1 << 12
LVT_ACTIVE_LOW: Final = 1 << 13
LVT_REMOTE_IRR: Final = 1 << 14
LVT_LEVEL: Final = 1 << 15
LVT_MASKED: Final = 1 << 16
LVT_TIMER_DEADLINE: Final = 1 << 18
LVT_WRITABLE: Final = {
    LVT_CMCI: 0x107FF,
    LVT_TIMER: 0x700FF,
    LVT_THERMAL: 0x107FF,
    LVT_PMC: 0x107FF,
    LVT_LINT0: 0x1A7FF,
    LVT_LINT1: 0x1A7FF,
    LVT_ERROR: 0x100FF,
}

# "Spurious-Interrupt Vector Register (SVR)".
SVR_ENABLED: Final = 1 << 8
SVR_NO_FOCUS: Final = 1 << 9
SVR_EOI_SUPPRESSED: Final = 1 << 12
SVR_WRITABLE: Final = 0x13FF

# "Error Handling".
ESR_REDIRECTABLE: Final = 1 << 4
ESR_SEND_ILLEGAL: Final = 1 << 5
ESR_RECEIVE_ILLEGAL: Final = 1 << 6
ESR_ILLEGAL_REGISTER: Final = 1 << 7

# "Interrupt Command Register (ICR)".
ICR_LOGICAL: Final = 1 << 11
ICR_ASSERT: Final = 1 << 14
ICR_LEVEL: Final = 1 << 15
ICR_SHORTHAND: Final = 3 << 18
ICR_LOW_WRITABLE: Final = 0xCCFFF
ICR_LOW_RESERVED_X2APIC: Final = 0xFFFFFFFF & ~(ICR_LOW_WRITABLE | 1 << 12)


@dataclass(frozen=True, slots=True)
class ApicFeatures:
    """What a local APIC has, in agreement with CPUID and IA32_MCG_CAP. phys_bits: MAXPHYADDR, 36 to 52.

    eoi_suppression: only where every I/O APIC has an EOI register.
    """

    phys_bits: int = 52
    x2apic: bool = True
    tsc_deadline: bool = True
    cmci: bool = True
    eoi_suppression: bool = True

    @property
    def version(self) -> int:
        """The version register: an integrated local APIC, its last LVT entry, its features."""
        suppression = VERSION_EOI_SUPPRESSION if self.eoi_suppression else 0
        return VERSION_INTEGRATED | (6 if self.cmci else 5) << VERSION_MAX_LVT | suppression

    @property
    def lvts(self) -> tuple[int, ...]:
        return tuple(index for index in LVTS if index != LVT_CMCI or self.cmci)

    @property
    def base_reserved(self) -> int:
        """Bits of IA32_APIC_BASE that must be clear."""
        writable = BASE_BSP | BASE_ENABLED | (BASE_X2APIC if self.x2apic else 0)
        return ~(writable | (1 << self.phys_bits) - (1 << 12))

    def writable(self, index: int) -> int:
        """The bits of a register that keep what is written."""
        if index == SVR:
            return SVR_WRITABLE if self.eoi_suppression else SVR_WRITABLE & ~SVR_EOI_SUPPRESSED
        if index == LVT_TIMER and not self.tsc_deadline:
            return LVT_WRITABLE[index] & ~LVT_TIMER_DEADLINE
        return LVT_WRITABLE[index]


@lru_cache(maxsize=32)
def x2apic_reserved(features: ApicFeatures) -> tuple[int, ...]:
    """For each x2APIC MSR what must be clear in a write: reserved bits, not those that are only read.

    "x2APIC Register Address Space"; a register that cannot be written has all of them.
    """
    writable: Mapping[int, int] = {
        TPR: 0xFF,
        SVR: features.writable(SVR),
        ICR_LOW: ~ICR_LOW_RESERVED_X2APIC,
        TIMER_INITIAL: 0xFFFFFFFF,
        TIMER_DIVIDE: 0xB,
        SELF_IPI: 0xFF,
        **{
            index: features.writable(index)
            | LVT_DELIVERY_STATUS
            | (LVT_REMOTE_IRR if index in (LVT_LINT0, LVT_LINT1) else 0)
            for index in features.lvts
        },
    }
    return tuple(~writable.get(index, 0) for index in range(256))
