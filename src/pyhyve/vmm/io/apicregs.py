"""The local APIC's registers and their fields. Intel SDM vol 3, chapter "Advanced Programmable Interrupt Controller".

Registers go by `offset >> 4` of the xAPIC page, which is also `msr - 0x800` in x2APIC mode.
"""

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

APIC_VERSION: Final = 0x00060014
"""Integrated local APIC, LVT entries 0-6 (CMCI among them), no EOI-broadcast suppression."""

# "Local Vector Table".
LVTS: Final = (LVT_CMCI, LVT_TIMER, LVT_THERMAL, LVT_PMC, LVT_LINT0, LVT_LINT1, LVT_ERROR)
LVT_DELIVERY_STATUS: Final = 1 << 12
LVT_REMOTE_IRR: Final = 1 << 14
LVT_LEVEL: Final = 1 << 15
LVT_MASKED: Final = 1 << 16
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
SVR_WRITABLE: Final = 0x3FF

# "Error Handling".
ESR_SEND_ILLEGAL: Final = 1 << 5
ESR_RECEIVE_ILLEGAL: Final = 1 << 6
ESR_ILLEGAL_REGISTER: Final = 1 << 7

# "Interrupt Command Register (ICR)".
ICR_LOGICAL: Final = 1 << 11
ICR_ASSERT: Final = 1 << 14
ICR_LEVEL: Final = 1 << 15
ICR_LOW_WRITABLE: Final = 0xCCFFF
ICR_LOW_RESERVED_X2APIC: Final = 0xFFFFFFFF & ~(ICR_LOW_WRITABLE | 1 << 12)
