"""The ACPI tables that a guest finds in low memory, and where.

Source: ACPI 6.5, "ACPI Software Programming Model", "ACPI System Description Tables"; PCI Firmware Specification,
"MCFG Table Description"; IA-PC HPET Specification, "The ACPI 2.0 HPET Description Table".
"""

import struct
from collections.abc import Sequence
from typing import Final

from pyhyve.bhyve import layout
from pyhyve.bhyve.acpi import dsdt
from pyhyve.bhyve.pci.bits import BUSES
from pyhyve.vmm.io.deadline import MIN_PERIOD_NS
from pyhyve.vmm.io.vhpet import TICK_NS

OEM_ID: Final = b"BHYVE "
CREATOR_ID: Final = b"PYHV"
CREATOR_REVISION: Final = 1

_ALIGN: Final = 64  # what the FACS asks for; the others are given the same
_HEADER_SIZE: Final = 36
_RSDP_SIZE: Final = 36
_RSDP_V1_SIZE: Final = 20

# Generic address structures: the address spaces, and access sizes.
_IO_SPACE: Final = 1
_MEMORY_SPACE: Final = 0
_ACCESS: Final = {1: 1, 2: 2, 4: 3}

FADT_WBINVD: Final = 1 << 0
FADT_PROC_C1: Final = 1 << 2
FADT_NO_SLEEP_BUTTON: Final = 1 << 5
FADT_NO_RTC_WAKE: Final = 1 << 6
FADT_TIMER_32_BIT: Final = 1 << 8
FADT_RESET_REGISTER: Final = 1 << 10
FADT_HEADLESS: Final = 1 << 12
FADT_PHYSICAL_DESTINATIONS: Final = 1 << 19
"""Physical destinations suit any number of processors; the tables are the same for all."""

BOOT_LEGACY_DEVICES: Final = 1 << 0
BOOT_8042: Final = 1 << 1
BOOT_NO_VGA: Final = 1 << 2
BOOT_NO_ASPM: Final = 1 << 4

_NO_C2: Final = 101
_NO_C3: Final = 1001
_RESET_VALUE: Final = 0x06
_RTC_CENTURY: Final = 0x32
_HYPERVISOR: Final = b"bhyve".ljust(8, b"\0")

MADT_LAPIC: Final = 0
MADT_IOAPIC: Final = 1
MADT_SOURCE_OVERRIDE: Final = 2
MADT_LAPIC_NMI: Final = 4
MADT_X2APIC: Final = 9
MADT_X2APIC_NMI: Final = 10
MADT_PCAT_COMPATIBLE: Final = 1
MADT_ENABLED: Final = 1
_ACTIVE_HIGH_EDGE: Final = 0x5
_ACTIVE_LOW_LEVEL: Final = 0xF
_ALL_PROCESSORS: Final = 0xFF
_LAPIC_IDS: Final = 255
"""From this APIC id on, only an x2APIC entry can name a processor."""

HPET_BLOCK_ID: Final = 0x8086_A701
"""The low half of the HPET's capability register: Intel, 8 comparators, a counter of 64 bits, legacy replacement."""

HPET_MINIMUM_TICKS: Final = MIN_PERIOD_NS // TICK_NS
"""Periods of fewer ticks are merged."""


def build_acpi(
    apic_ids: Sequence[int],
    high_ram: int = 0,
    com: Sequence[layout.SerialPort] = (layout.COM1,),
    *,
    fwcfg: bool = False,
    ioapic_pins: int = layout.IOAPIC_PINS,
) -> list[tuple[int, bytes]]:
    """Return (gpa, table) for a machine whose processors have these APIC ids, the RSDP first.

    `high_ram` is the RAM from 4 GiB up (bytes); `com` the serial ports it has; `fwcfg` tells of QEMU's firmware
    configuration device, `ioapic_pins` how far PCI's interrupt lines go. Raise ValueError if the tables do not fit
    below 1 MiB (those of some 1,000 processors do not).
    """
    if not apic_ids:
        raise ValueError("no processors: need at least 1")
    placed: list[tuple[int, bytes]] = []
    free = layout.RSDP + _RSDP_SIZE

    def place(table: bytes) -> int:
        nonlocal free
        gpa = -(-free // _ALIGN) * _ALIGN
        free = gpa + len(table)
        if free > layout.ACPI_LIMIT:
            raise ValueError(f"ACPI tables for {len(apic_ids)} processors do not fit below {layout.ACPI_LIMIT:#x}")
        placed.append((gpa, table))
        return gpa

    facs = place(build_facs())
    definition = place(table(b"DSDT", 2, b"BVDSDT", dsdt.build(high_ram, com, fwcfg=fwcfg, ioapic_pins=ioapic_pins)))
    entries = [
        place(build_fadt(facs, definition)),
        place(build_madt(apic_ids)),
        place(build_hpet()),
        place(build_mcfg()),
    ]
    xsdt = place(table(b"XSDT", 1, b"BVXSDT", struct.pack(f"<{len(entries)}Q", *entries)))
    return [(layout.RSDP, build_rsdp(xsdt)), *placed]


def checksum(data: bytes | bytearray) -> int:
    """Return the byte that makes the sum of `data` and itself zero."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, oem_table_id: bytes, body: bytes) -> bytes:
    """Put the common header, with its checksum, before `body`."""
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        signature,
        _HEADER_SIZE + len(body),
        revision,
        0,
        OEM_ID,
        oem_table_id.ljust(8),
        1,
        CREATOR_ID,
        CREATOR_REVISION,
    )
    return header[:9] + bytes((checksum(header + body),)) + header[10:] + body


def build_rsdp(xsdt: int) -> bytes:
    """Return revision 2's root pointer; there is no RSDT."""
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, _RSDP_SIZE, xsdt, 0))
    data[8] = checksum(data[:_RSDP_V1_SIZE])
    data[32] = checksum(data)
    return bytes(data)


def build_facs() -> bytes:
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def _address(port: int, size: int) -> bytes:
    """A generic address structure of `size` bytes of I/O; port 0 is none."""
    if not port:
        return bytes(12)
    return struct.pack("<BBBBQ", _IO_SPACE, 8 * size, 0, _ACCESS[min(size, 4)], port)


def build_fadt(facs: int, definition: int) -> bytes:
    """Return revision 6's fixed description: a PC's fixed hardware, as `lpc.pm`, `lpc.reset` and `vmm.io` have it."""
    body = struct.pack(
        "<IIBBHIBBBBIIIIIIIIBBBBBBBBHHHHBBBBBHBI",
        facs,
        definition,
        0,
        0,  # preferred profile: unspecified
        layout.SCI_IRQ,
        layout.SMI_CMD_PORT,
        layout.ACPI_ENABLE,
        layout.ACPI_DISABLE,
        0,  # S4BIOS_REQ
        0,  # PSTATE_CNT
        layout.PM1_EVENT_PORT,
        0,
        layout.PM1_CONTROL_PORT,
        0,
        0,  # PM2
        layout.PM_TIMER_PORT,
        layout.GPE0_PORT,
        0,  # GPE1
        layout.PM1_EVENT_SIZE,
        layout.PM1_CONTROL_SIZE,
        0,
        layout.PM_TIMER_SIZE,
        layout.GPE0_SIZE,
        0,
        0,  # GPE1_BASE
        0,  # CST_CNT
        _NO_C2,
        _NO_C3,
        0,  # FLUSH_SIZE: WBINVD serves
        0,  # FLUSH_STRIDE
        0,  # DUTY_OFFSET
        0,  # DUTY_WIDTH
        0,  # DAY_ALRM
        0,  # MON_ALRM
        _RTC_CENTURY,
        BOOT_LEGACY_DEVICES | BOOT_NO_VGA | BOOT_NO_ASPM,
        0,
        FADT_WBINVD
        | FADT_PROC_C1
        | FADT_NO_SLEEP_BUTTON
        | FADT_NO_RTC_WAKE
        | FADT_TIMER_32_BIT
        | FADT_RESET_REGISTER
        | FADT_HEADLESS
        | FADT_PHYSICAL_DESTINATIONS,
    )
    body += _address(layout.RESET_PORT, 1)
    body += struct.pack("<BHB", _RESET_VALUE, 0, 0)
    body += struct.pack("<QQ", facs, definition)
    body += _address(layout.PM1_EVENT_PORT, layout.PM1_EVENT_SIZE)
    body += _address(0, 0)
    body += _address(layout.PM1_CONTROL_PORT, layout.PM1_CONTROL_SIZE)
    body += _address(0, 0)
    body += _address(0, 0)
    body += _address(layout.PM_TIMER_PORT, layout.PM_TIMER_SIZE)
    body += _address(layout.GPE0_PORT, layout.GPE0_SIZE)
    body += _address(0, 0)
    body += _address(0, 0)  # sleep control: hardware-reduced machines only
    body += _address(0, 0)
    body += _HYPERVISOR
    return table(b"FACP", 6, b"BVFACP", body)


def build_madt(apic_ids: Sequence[int]) -> bytes:
    """Return the table of interrupt controllers; a processor's ACPI id is its number, from 0."""
    entries = []
    for number, apic_id in enumerate(apic_ids):
        if apic_id < _LAPIC_IDS and number < _LAPIC_IDS:
            entries.append(struct.pack("<BBBBI", MADT_LAPIC, 8, number, apic_id, MADT_ENABLED))
        else:
            entries.append(struct.pack("<BBHIII", MADT_X2APIC, 16, 0, apic_id, MADT_ENABLED, number))
    entries.append(struct.pack("<BBBBII", MADT_IOAPIC, 12, 0, 0, layout.IOAPIC_BASE, 0))
    entries.append(_override(layout.PIT_IRQ, layout.PIT_IOAPIC_PIN, _ACTIVE_HIGH_EDGE))
    entries.append(_override(layout.SCI_IRQ, layout.SCI_IRQ, _ACTIVE_LOW_LEVEL))
    entries.append(struct.pack("<BBBHB", MADT_LAPIC_NMI, 6, _ALL_PROCESSORS, _ACTIVE_HIGH_EDGE, 1))
    if max(apic_ids) >= _LAPIC_IDS:
        entries.append(struct.pack("<BBHIB3x", MADT_X2APIC_NMI, 12, _ACTIVE_HIGH_EDGE, 0xFFFF_FFFF, 1))
    head = struct.pack("<II", layout.LAPIC_BASE, MADT_PCAT_COMPATIBLE)
    return table(b"APIC", 3, b"BVMADT", head + b"".join(entries))


def _override(irq: int, pin: int, flags: int) -> bytes:
    return struct.pack("<BBBBIH", MADT_SOURCE_OVERRIDE, 10, 0, irq, pin, flags)


def build_hpet() -> bytes:
    address = struct.pack("<BBBBQ", _MEMORY_SPACE, 0, 0, 0, layout.HPET_BASE)
    return table(b"HPET", 1, b"BVHPET", struct.pack("<I12sBHB", HPET_BLOCK_ID, address, 0, HPET_MINIMUM_TICKS, 0))


def build_mcfg() -> bytes:
    return table(b"MCFG", 1, b"BVMCFG", struct.pack("<QQHBBI", 0, layout.PCI_ECAM_BASE, 0, 0, BUSES - 1, 0))
