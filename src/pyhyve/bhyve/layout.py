"""Every guest address, once: memory, memory-mapped chips, I/O ports and interrupt lines of the machine.

The map is bhyve's, so that guests, tables and people that know the original find things where they look for them:

    0                    low RAM, up to 3 GiB; the first MiB is a PC's (below)
    LOW_RAM_LIMIT        32-bit PCI memory window, up to the configuration space
    PCI_ECAM_BASE        PCI Express configuration space, 256 MiB
    0xFEC0_0000...       I/O APIC, HPET, local APIC
    BOOTROM_LIMIT        4 GiB: a boot ROM ends here
    HIGH_RAM_BASE        the rest of RAM
    pci_mem64_base()     64-bit PCI memory window

Addresses, lengths and limits are bytes; a `*_LIMIT` is the first address that does not belong.
"""

from typing import Final, NamedTuple

PAGE_SIZE: Final = 4096
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# --- RAM ---------------------------------------------------------------------------------------------------------

LOW_RAM_LIMIT: Final = 3 * GIB
"""RAM below 4 GiB ends here at the latest; 1 GiB is left to PCI windows and chips."""

HIGH_RAM_BASE: Final = 4 * GIB
"""RAM that does not fit below goes on here: the first address behind the chips and the boot ROM."""


def split_ram(size: int) -> tuple[int, int]:
    """Return (low, high), bytes of RAM from address 0 and from HIGH_RAM_BASE, for `size` bytes of RAM."""
    low = min(size, LOW_RAM_LIMIT)
    return low, size - low


# --- The first MiB -----------------------------------------------------------------------------------------------
# The loader's structures lie in conventional memory, above the interrupt table and the BIOS data area (the first
# 0x500 bytes), each on a page of its own. The kernel owns them from its first instruction on.

CONVENTIONAL_LIMIT: Final = 640 * 1024
"""Conventional memory ends where the PC's video memory starts (0xA0000)."""

BOOT_GDT: Final = 0x1000
BOOT_STACK_TOP: Final = 0x7000
"""The entry state's stack grows down from the zero page to the GDT's page."""
ZERO_PAGE: Final = 0x7000
"""struct boot_params, one page (Linux Documentation/arch/x86/boot.rst, "64-bit BOOT PROTOCOL")."""
BOOT_PAGE_TABLES: Final = 0x8000
"""PML4, then its tables; see boot.linux for how many (BOOT_PAGE_TABLES_LIMIT bounds them)."""
BOOT_PAGE_TABLES_LIMIT: Final = 0x20000
COMMAND_LINE: Final = 0x20000
COMMAND_LINE_LIMIT: Final = 0x30000

BIOS_BASE: Final = 0xF0000
"""System ROM area of a PC; the guest finds firmware tables here and must not use it as RAM."""
BIOS_LIMIT: Final = 0x100000
MPTABLE_BASE: Final = 0xF0000
SMBIOS_BASE: Final = 0xF1000
ACPI_BASE: Final = 0xF2400
"""The RSDP, then all tables, as in bhyve. On a 16-byte boundary between 0xE0000 and 0xFFFFF, where a guest scans
(ACPI specification, "Finding the RSDP on IA-PC Systems")."""
BIOS_STUBS: Final = 0xFFE00
"""What real-mode interrupt vectors lead to, where a BIOS would have started the kernel."""

BIOS_RESET: Final = 0xFFFF0
"""F000:FFF0, where a PC's BIOS starts: a guest jumps there to be started anew."""

ACPI_LIMIT: Final = BIOS_STUBS
RSDP: Final = ACPI_BASE

KERNEL_BASE: Final = 1 * MIB
"""Lowest address of a kernel's code: the first RAM that a PC's devices do not interrupt."""

MIN_RAM: Final = 16 * MIB
"""Less cannot hold a 64-bit Linux kernel (its preferred address is 16 MiB; 1 MiB is the machine's own)."""

# --- PCI ---------------------------------------------------------------------------------------------------------

PCI_MEM32_BASE: Final = LOW_RAM_LIMIT
PCI_ECAM_BASE: Final = 0xE000_0000
PCI_ECAM_SIZE: Final = 256 * MIB
"""256 buses, 32 slots, 8 functions, 4 KiB each."""
PCI_MEM32_LIMIT: Final = PCI_ECAM_BASE
PCI_MEM64_SIZE: Final = 32 * GIB
PCI_IO_BASE: Final = 0x2000
"""I/O BARs start above the fixed ports of the chips below."""
PCI_IO_LIMIT: Final = 0x1_0000


def pci_mem64_base(high_ram: int) -> int:
    """Return where the 64-bit PCI window starts: above `high_ram` bytes of high RAM, aligned to its own size."""
    end = HIGH_RAM_BASE + high_ram
    return -(-end // PCI_MEM64_SIZE) * PCI_MEM64_SIZE


PCI_CONFIG_ADDRESS: Final = 0xCF8
PCI_CONFIG_DATA: Final = 0xCFC

# --- Memory-mapped chips -----------------------------------------------------------------------------------------

IOAPIC_BASE: Final = 0xFEC0_0000
IOAPIC_SIZE: Final = PAGE_SIZE
IOAPIC_PINS: Final = 32
"""0-15 are the ISA lines, from 16 on they take PCI's INTx lines."""
IOAPIC_PIN_CHOICES: Final = (24, IOAPIC_PINS)
HPET_BASE: Final = 0xFED0_0000
HPET_SIZE: Final = 1024
"""IA-PC HPET specification, "Register Overview": 1 KiB of registers."""
LAPIC_BASE: Final = 0xFEE0_0000
"""IA32_APIC_BASE's value at reset (Intel SDM vol 3, "Local APIC Status and Location")."""
LAPIC_SIZE: Final = PAGE_SIZE
BOOTROM_LIMIT: Final = 4 * GIB
BOOTROM_MAX_SIZE: Final = 16 * MIB
"""A boot ROM ends at 4 GiB, so that the reset vector 0xFFFF_FFF0 lies in it, and may not reach down to the chips."""

# --- I/O ports ---------------------------------------------------------------------------------------------------

PIC_MASTER_PORT: Final = 0x20
PIC_SLAVE_PORT: Final = 0xA0
PIC_ELCR_PORT: Final = 0x4D0
"""Edge/level control of the two PICs: 0x4D0 and 0x4D1."""
PIT_PORT: Final = 0x40
"""Counters 0-2 at 0x40-0x42, the control word at 0x43."""
PIT_NMISC_PORT: Final = 0x61
"""NMI status and control: gate and output of counter 2."""
KBC_DATA_PORT: Final = 0x60
KBC_STATUS_PORT: Final = 0x64
RTC_PORT: Final = 0x70
"""Index at 0x70 (bit 7 masks NMI), data at 0x71."""
POST_PORT: Final = 0x80
FAST_A20_PORT: Final = 0x92
SMI_CMD_PORT: Final = 0xB2
"""Writing ACPI_ENABLE here hands the power registers to the guest; ACPI_DISABLE takes them back."""
ACPI_ENABLE: Final = 0xA0
ACPI_DISABLE: Final = 0xA1
BVM_CONSOLE_PORT: Final = 0x220
BVM_DEBUG_PORT: Final = 0x224
FWCFG_SELECTOR_PORT: Final = 0x510
FWCFG_DATA_PORT: Final = 0x511
FWCFG_DMA_PORT: Final = 0x514
FWCFG_SIZE: Final = 12
RESET_PORT: Final = 0xCF9
"""Reset control register: 0x06 is a hard reset. It lies inside PCI_CONFIG_ADDRESS's four bytes; only byte accesses
are its own."""

PM_BASE: Final = 0x400
PM1_EVENT_PORT: Final = PM_BASE
"""Status (2 bytes), then enable (2 bytes)."""
PM1_EVENT_SIZE: Final = 4
PM1_CONTROL_PORT: Final = PM_BASE + 4
PM1_CONTROL_SIZE: Final = 2
PM_TIMER_PORT: Final = PM_BASE + 8
PM_TIMER_SIZE: Final = 4
GPE0_PORT: Final = PM_BASE + 12
GPE0_SIZE: Final = 4

PM1_SLEEP_S5: Final = 5
"""SLP_TYP of soft-off, as the DSDT's _S5 says and PM1 control decodes."""


class SerialPort(NamedTuple):
    """Where a UART sits: its first of eight ports and its ISA interrupt line."""

    port: int
    irq: int


COM: Final = (SerialPort(0x3F8, 4), SerialPort(0x2F8, 3), SerialPort(0x3E8, 4), SerialPort(0x2E8, 3))
"""COM1 to COM4, at the PC's places; COM1 is Linux's ttyS0."""
COM1: Final = COM[0]
COM_SIZE: Final = 8

# --- Interrupt lines ---------------------------------------------------------------------------------------------

PIT_IRQ: Final = 0
PIT_IOAPIC_PIN: Final = 2
"""The PC wires the timer to I/O APIC pin 2; the MADT carries the override."""
KBC_IRQ: Final = 1
RTC_IRQ: Final = 8
SCI_IRQ: Final = 9
"""ACPI's system control interrupt: level, active low; the MADT carries the override."""
PCI_IOAPIC_PIN_BASE: Final = 16
IOAPIC_ACTIVE_LOW: Final = ~((1 << PCI_IOAPIC_PIN_BASE) - 1) | 1 << SCI_IRQ
"""The lines (a bit each) that are low while asserted: the SCI, by the MADT, and PCI's, which a guest knows."""


# --- What the guest is told --------------------------------------------------------------------------------------

E820_RAM: Final = 1
E820_RESERVED: Final = 2


class MemoryRange(NamedTuple):
    """An entry of the firmware's memory map."""

    base: int
    size: int
    kind: int


def memory_map(low_ram: int, high_ram: int) -> tuple[MemoryRange, ...]:
    """Return the e820 map, ascending, for RAM as `split_ram` gives it (`low_ram` above 1 MiB)."""
    ranges = [
        MemoryRange(0, CONVENTIONAL_LIMIT, E820_RAM),
        MemoryRange(BIOS_BASE, BIOS_LIMIT - BIOS_BASE, E820_RESERVED),
        MemoryRange(BIOS_LIMIT, low_ram - BIOS_LIMIT, E820_RAM),
        # Linux believes MCFG only where the firmware's map reserves what it names.
        MemoryRange(PCI_ECAM_BASE, PCI_ECAM_SIZE, E820_RESERVED),
        MemoryRange(IOAPIC_BASE, IOAPIC_SIZE, E820_RESERVED),
        MemoryRange(HPET_BASE, PAGE_SIZE, E820_RESERVED),
        MemoryRange(LAPIC_BASE, LAPIC_SIZE, E820_RESERVED),
    ]
    if high_ram:
        ranges.append(MemoryRange(HIGH_RAM_BASE, high_ram, E820_RAM))
    return tuple(ranges)
