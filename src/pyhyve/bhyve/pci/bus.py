"""The PCI bus: functions by requester id, and the two ways to their configuration spaces."""

import threading
from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.base.protocols import IoHandler
from pyhyve.bhyve import layout
from pyhyve.bhyve.pci import bits
from pyhyve.bhyve.pci.device import BarSpace, PciDevice

_DATA_OFFSET: Final = layout.PCI_CONFIG_DATA - layout.PCI_CONFIG_ADDRESS
_RESET_OFFSET: Final = layout.RESET_PORT - layout.PCI_CONFIG_ADDRESS


def requester_id(bus: int, slot: int, function: int) -> int:
    """Return bus<<8 | slot<<3 | function (no ARI: a function has 3 bits). Raise ValueError if one is out of range."""
    if not (0 <= bus < bits.BUSES and 0 <= slot < bits.SLOTS and 0 <= function < bits.FUNCTIONS):
        raise ValueError(f"no PCI function {bus}:{slot}:{function}: need bus 0-255, slot 0-31, function 0-7")
    return bus << 8 | slot << 3 | function


def intx_pin(slot: int, pin: int, ioapic_pins: int = layout.IOAPIC_PINS) -> int:
    """Return the I/O APIC pin of INTA-INTD (`pin` 1-4) of a slot on bus 0; the DSDT's _PRT says the same."""
    lines = ioapic_pins - layout.PCI_IOAPIC_PIN_BASE
    return layout.PCI_IOAPIC_PIN_BASE + (4 * slot + pin - 1) % lines


class PciBus:
    """Configuration accesses of all buses; where there is no function, reads are all ones.

    One lock holds off accesses from other vCPUs while a BAR moves.
    """

    def __init__(self, space: BarSpace | None = None) -> None:
        self._space = space
        self._lock = threading.RLock()
        self._functions: dict[int, PciDevice] = {}
        self.ecam = Ecam(self)

    def add(self, device: PciDevice, slot: int, function: int = 0, bus: int = 0) -> int:
        """Plug a device in and return its requester id. Raise UsageError if there is no such place or it is taken."""
        try:
            rid = requester_id(bus, slot, function)
        except ValueError as error:
            raise UsageError(f"-s {bus}:{slot}:{function}: {error}") from None
        if rid in self._functions:
            other = type(self._functions[rid]).__name__
            raise UsageError(f"-s {bus}:{slot}:{function}: taken by {other}; choose another slot or function")
        self._functions[rid] = device
        device.connect(rid, self._space)
        siblings = [other for at, other in self._functions.items() if at >> 3 == rid >> 3]
        for sibling in siblings:
            sibling.multi_function = len(siblings) > 1 or function > 0
        return rid

    @property
    def devices(self) -> list[PciDevice]:
        """All functions, by requester id."""
        return [self._functions[rid] for rid in sorted(self._functions)]

    def reset(self) -> None:
        with self._lock:
            for device in self._functions.values():
                device.reset()

    def read(self, rid: int, offset: int, size: int) -> int:
        device = self._functions.get(rid)
        if device is None:
            return (1 << 8 * size) - 1
        with self._lock:
            return device.read_config(offset, size)

    def write(self, rid: int, offset: int, size: int, value: int) -> None:
        device = self._functions.get(rid)
        if device is not None:
            with self._lock:
                device.write_config(offset, size, value)


class Ecam:
    """Memory-mapped configuration: 4 KiB for each requester id (PCI Express, "Enhanced Configuration Access")."""

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus

    def read(self, offset: int, size: int) -> int:
        return self._bus.read(offset >> 12, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._bus.write(offset >> 12, offset & 0xFFF, size, value)


class ConfigPorts:
    """Mechanism 1, ports 0xCF8-0xCFF. The address takes 32-bit accesses; the byte at 0xCF9 is `reset_control`'s."""

    def __init__(self, bus: PciBus, reset_control: IoHandler | None = None) -> None:
        self._bus = bus
        self._reset_control = reset_control
        self._address = 0

    def reset(self) -> None:
        self._address = 0

    def read(self, offset: int, size: int) -> int:
        if offset >= _DATA_OFFSET:
            if self._address & bits.ADDRESS_ENABLE:
                return self._bus.read(*self._target(offset), size)
        elif offset == 0 and size == 4:
            return self._address
        elif offset == _RESET_OFFSET and size == 1 and self._reset_control is not None:
            return self._reset_control.read(0, 1)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= _DATA_OFFSET:
            if self._address & bits.ADDRESS_ENABLE:
                self._bus.write(*self._target(offset), size, value)
        elif offset == 0 and size == 4:
            self._address = value & bits.ADDRESS_WRITABLE
        elif offset == _RESET_OFFSET and size == 1 and self._reset_control is not None:
            self._reset_control.write(0, 1, value)

    def _target(self, offset: int) -> tuple[int, int]:
        """Return (requester id, register)."""
        return self._address >> 8 & 0xFFFF, self._address & 0xFC | offset - _DATA_OFFSET
