"""The DSDT's contents: what a guest cannot probe for and has to be told.

The machine has no LPC bridge yet, so the ISA chips stand under the root bridge itself.
"""

from collections.abc import Sequence
from typing import Final

from pyhyve.bhyve import layout
from pyhyve.bhyve.acpi import aml
from pyhyve.bhyve.pci.bits import BUSES, SLOTS
from pyhyve.bhyve.pci.bus import intx_pin

_CONFIG_PORTS: Final = 8
_PINS: Final = 4
_ANY_FUNCTION: Final = 0xFFFF


def build(
    high_ram: int,
    com: Sequence[layout.SerialPort],
    *,
    fwcfg: bool = False,
    ioapic_pins: int = layout.IOAPIC_PINS,
) -> bytes:
    """Return the definition block's terms for `high_ram` bytes of RAM above 4 GiB, these serial ports, and fw_cfg."""
    return b"".join(
        (
            # SLP_TYP for PM1a and PM1b, then two reserved.
            aml.name("\\_S5", aml.package(aml.integer(layout.PM1_SLEEP_S5), aml.ZERO, aml.ZERO, aml.ZERO)),
            # The guest says 1 when it has turned from the 8259s to the I/O APIC.
            aml.name("\\PICM", aml.ZERO),
            aml.method("\\_PIC", 1, aml.store(aml.ARG0, "\\PICM")),
            aml.scope(
                "\\_SB",
                _root_bridge(high_ram, com, ioapic_pins),
                *((_fwcfg(),) if fwcfg else ()),
                _hpet(),
                _motherboard(),
            ),
        )
    )


def _root_bridge(high_ram: int, com: Sequence[layout.SerialPort], ioapic_pins: int) -> bytes:
    mem64 = layout.pci_mem64_base(high_ram)
    ports_behind = layout.PCI_CONFIG_ADDRESS + _CONFIG_PORTS
    routes = [_route(slot, pin, ioapic_pins) for slot in range(SLOTS) for pin in range(_PINS)]
    crs = aml.resources(
        aml.bus_window(0, BUSES - 1),
        aml.io(layout.PCI_CONFIG_ADDRESS, _CONFIG_PORTS),
        aml.io_window(0, layout.PCI_CONFIG_ADDRESS - 1),
        aml.io_window(ports_behind, layout.PCI_IO_LIMIT - 1),
        aml.memory_window32(layout.PCI_MEM32_BASE, layout.PCI_MEM32_LIMIT),
        aml.memory_window64(mem64, mem64 + layout.PCI_MEM64_SIZE),
    )
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.ZERO),
        aml.name("_BBN", aml.ZERO),
        aml.name("_CRS", crs),
        aml.name("APRT", aml.package(*routes)),
        # The 8259s get none of PCI's lines.
        aml.method("_PRT", 0, aml.if_(aml.path("\\PICM"), aml.return_(aml.path("APRT"))), aml.return_(aml.package())),
        aml.device(
            "PIC",
            aml.name("_HID", aml.eisa_id("PNP0000")),
            aml.name(
                "_CRS",
                aml.resources(
                    aml.io(layout.PIC_MASTER_PORT, 2),
                    aml.io(layout.PIC_SLAVE_PORT, 2),
                    aml.io(layout.PIC_ELCR_PORT, 2),
                    aml.irq(2),
                ),
            ),
        ),
        aml.device(
            "TIMR",
            aml.name("_HID", aml.eisa_id("PNP0100")),
            aml.name("_CRS", aml.resources(aml.io(layout.PIT_PORT, 4), aml.irq(layout.PIT_IRQ))),
        ),
        aml.device(
            "RTC",
            aml.name("_HID", aml.eisa_id("PNP0B00")),
            aml.name("_CRS", aml.resources(aml.io(layout.RTC_PORT, 2), aml.irq(layout.RTC_IRQ))),
        ),
        *(_serial(layout.COM.index(port) + 1, port) for port in com),
    )


def _route(slot: int, pin: int, ioapic_pins: int) -> bytes:
    """One entry of _PRT: the interrupt of INTA-INTD (0-3) of any function in a slot, wired and not to be chosen."""
    address = aml.integer(slot << 16 | _ANY_FUNCTION)
    return aml.package(address, aml.integer(pin), aml.ZERO, aml.integer(intx_pin(slot, pin + 1, ioapic_pins)))


def _serial(number: int, port: layout.SerialPort) -> bytes:
    return aml.device(
        f"COM{number}",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(number)),
        aml.name("_CRS", aml.resources(aml.io(port.port, layout.COM_SIZE), aml.irq(port.irq))),
    )


def _fwcfg() -> bytes:
    """Source: QEMU docs/specs/fw_cfg, "Guest-side DMA Interface"."""
    return aml.device(
        "FWCF",
        aml.name("_HID", aml.string("QEMU0002")),
        aml.name("_STA", aml.integer(0x0B)),
        aml.name("_CRS", aml.resources(aml.io(layout.FWCFG_SELECTOR_PORT, layout.FWCFG_SIZE))),
    )


def _hpet() -> bytes:
    return aml.device(
        "HPET",
        aml.name("_HID", aml.eisa_id("PNP0103")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resources(aml.memory32(layout.HPET_BASE, layout.HPET_SIZE))),
    )


def _motherboard() -> bytes:
    """What belongs to no other device and must not be given to one."""
    return aml.device(
        "MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.ZERO),
        aml.name(
            "_CRS",
            aml.resources(
                aml.io(layout.PIT_NMISC_PORT, 1),
                aml.io(layout.POST_PORT, 1),
                aml.io(layout.FAST_A20_PORT, 1),
                aml.io(layout.SMI_CMD_PORT, 1),
                aml.io(layout.PM_BASE, layout.GPE0_PORT + layout.GPE0_SIZE - layout.PM_BASE),
                aml.memory32(layout.PCI_ECAM_BASE, layout.PCI_ECAM_SIZE),
            ),
        ),
    )
