"""The I/O APIC: 24 pins without an EOI register or 32 with one, each shared and with its redirection entry.

Intel 82093AA datasheet, "Register Description", and for the EOI register (version 0x20) the ICH9 datasheet,
"I/O APIC".

Polarity. A source asserts its pin, and does not know how that looks on the wire: the board says which lines are
inverted (`active_low`: PCI's lines and the SCI). A redirection entry says what the guest takes for asserted. A pin is
`active` where its line is as the entry names it: asserted, if entry and board agree; where they differ (a guest that
believes its tables never does that), while nobody asserts it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from pyhyve.vmm.io.apicbus import EXTINT, FIXED, INIT, LOWEST_PRIORITY, NMI, SMI, ApicBus
from pyhyve.vmm.io.line import Line, LineSource

VERSION: Final = 0x11
VERSION_EOI: Final = 0x20
"""From this version on there is an EOI register."""
PINS: Final = 24
"""As many as the 82093AA has; an I/O APIC of more is one of version 0x20."""

# Memory-mapped registers, offsets.
IOREGSEL: Final = 0x00
IOWIN: Final = 0x10
EOI: Final = 0x40

# Indirect registers.
IOAPICID: Final = 0x00
IOAPICVER: Final = 0x01
IOAPICARB: Final = 0x02
IOREDTBL: Final = 0x10

# Redirection entry, "I/O Redirection Table Registers".
RTE_VECTOR: Final = 0xFF
RTE_LOGICAL: Final = 1 << 11
RTE_DELIVERY_STATUS: Final = 1 << 12
RTE_ACTIVE_LOW: Final = 1 << 13
RTE_REMOTE_IRR: Final = 1 << 14
RTE_LEVEL: Final = 1 << 15
RTE_MASKED: Final = 1 << 16
RTE_RESET: Final = RTE_MASKED
_RTE_WRITABLE: Final = 0xFF000000_0001AFFF
_RTE_EXTENDED: Final = 0x7F << 49
"""Bits 14 to 8 of the destination, where messages have such: Linux Documentation/virt/kvm/x86/cpuid.rst,
KVM_FEATURE_MSI_EXT_DEST_ID."""
_POLARITY_BIT: Final = 13
_MODES: Final = frozenset((FIXED, LOWEST_PRIORITY, SMI, NMI, INIT, EXTINT))
"""Delivery modes that are not reserved."""
_ID_MASK: Final = 0xF


def destination(entry: int) -> int:
    """The destination that a redirection entry names: 0 to 255, with extended ids to 32,767."""
    return entry >> 56 | entry >> 41 & 0x7F00


@dataclass(frozen=True, slots=True)
class VioapicV1:
    """`levels`: for each pin what its sources hold, in the order in which they were made."""

    SCHEMA: ClassVar[tuple[str, int]] = ("vioapic", 1)
    select: int
    apic_id: int
    entries: tuple[int, ...]
    levels: tuple[tuple[bool, ...], ...]


class Vioapic:
    """The register page and the pins. Callers hold the interrupt fabric's lock.

    pins: 1 to 120 (ValueError otherwise). active_low: bit n is set where the board inverts the line of pin n.
    """

    __slots__ = ("_apic_id", "_bus", "_entries", "_first_id", "_inverted", "_lines", "_select", "pins", "version")

    def __init__(self, bus: ApicBus, apic_id: int = 0, pins: int = PINS, active_low: int = 0) -> None:
        if not 1 <= pins <= 120:
            raise ValueError(f"an I/O APIC has 1 to 120 pins, not {pins}")
        self._bus = bus
        self.pins = pins
        self.version = VERSION_EOI if pins > PINS else VERSION
        self._first_id = apic_id & _ID_MASK
        self._inverted = active_low
        self._lines = [Line(self._on_change(pin)) for pin in range(pins)]
        self.reset()

    def pin(self, n: int) -> LineSource:
        """A new source of pin `n` (0 <= n < pins, else ValueError); a pin may have several."""
        if not 0 <= n < self.pins:
            raise ValueError(f"I/O APIC pin {n}: there are pins 0 to {self.pins - 1}")
        return self._lines[n].source()

    def entry(self, n: int) -> int:
        """The redirection entry of pin `n`, 64 bits, as the guest reads it.

        Delivery status is set while a level waits that no local APIC has accepted: it is sent again at the next write
        of the entry, and the next time that the pin becomes active.
        """
        entry = self._entries[n]
        if entry & (RTE_LEVEL | RTE_MASKED | RTE_REMOTE_IRR) == RTE_LEVEL and self.active(n):
            entry |= RTE_DELIVERY_STATUS
        return entry

    def asserters(self, n: int) -> int:
        """How many sources hold pin `n`."""
        return self._lines[n].count

    def active(self, n: int) -> bool:
        """Whether pin `n` is as its redirection entry's polarity wants it: see the module."""
        return (self._lines[n].count > 0) ^ self._mismatched(n, self._entries[n])

    def reset(self) -> None:
        """Registers as at power-up; the pins keep the levels that their sources hold."""
        self._select = 0
        self._apic_id = self._first_id
        self._entries = [RTE_RESET] * self.pins

    # -- registers ----------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Any width; what is not a register reads as 0."""
        register = offset & ~3
        if register == IOREGSEL:
            value = self._select
        elif register == IOWIN:
            value = self._read_indirect(self._select)
        else:
            value = 0
        return value >> (8 * (offset & 3)) & ((1 << (8 * size)) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """IOREGSEL and the EOI register are bytes, IOWIN is written as a whole: anything else is ignored."""
        if offset == IOREGSEL:
            self._select = value & 0xFF
        elif offset == IOWIN:
            if size >= 4:
                self._write_indirect(self._select, value & 0xFFFFFFFF)
        elif offset == EOI and self.version >= VERSION_EOI:
            self.eoi(value & 0xFF)

    def _read_indirect(self, index: int) -> int:
        if index >= IOREDTBL:
            pin, high = divmod(index - IOREDTBL, 2)
            if pin < self.pins:
                return self.entry(pin) >> (32 * high) & 0xFFFFFFFF
        elif index in (IOAPICID, IOAPICARB):
            # The arbitration id is loaded whenever the id is written.
            return self._apic_id << 24
        elif index == IOAPICVER:
            return (self.pins - 1) << 16 | self.version
        return 0

    def _write_indirect(self, index: int, value: int) -> None:
        if index >= IOREDTBL:
            pin, high = divmod(index - IOREDTBL, 2)
            if pin < self.pins:
                self._write_entry(pin, value << (32 * high), 0xFFFFFFFF << (32 * high))
        elif index == IOAPICID:
            self._apic_id = value >> 24 & _ID_MASK

    def _write_entry(self, pin: int, value: int, mask: int) -> None:
        """Change half an entry, then look at the pin again.

        A level that is active is sent, unless remote IRR says that it has been. An edge is sent only if the write
        itself makes one (by the polarity bit of an entry that is not masked): what came while it was masked is lost.
        Making a pin edge-triggered clears remote IRR, which is how systems without an EOI register get rid of it.
        """
        old = self._entries[pin]
        was_active = self.active(pin)
        writable = (_RTE_WRITABLE | (_RTE_EXTENDED if self._bus.extended_ids else 0)) & mask
        new = old & ~writable | value & writable
        if not new & RTE_LEVEL:
            new &= ~RTE_REMOTE_IRR
        self._entries[pin] = new
        if self.active(pin) and (new & RTE_LEVEL or not (was_active or old & RTE_MASKED)):
            self._send(pin)

    # -- pins ---------------------------------------------------------------------------------------------------------

    def _mismatched(self, pin: int, entry: int) -> bool:
        """Whether the entry's polarity is not the board's."""
        return bool((entry >> _POLARITY_BIT ^ self._inverted >> pin) & 1)

    def _on_change(self, pin: int) -> Callable[[bool], None]:
        def changed(asserted: bool) -> None:
            if asserted ^ self._mismatched(pin, self._entries[pin]):
                self._send(pin)

        return changed

    def _send(self, pin: int) -> None:
        """Send the interrupt of an active pin, if its entry lets it. Remote IRR is set once an APIC has accepted."""
        entry = self._entries[pin]
        if entry & (RTE_MASKED | RTE_REMOTE_IRR):
            return
        mode = entry >> 8 & 7
        if mode not in _MODES:
            return
        level = bool(entry & RTE_LEVEL) and mode in (FIXED, LOWEST_PRIORITY)
        if level:
            # Before delivery, so that an EOI that follows at once finds it.
            self._entries[pin] = entry | RTE_REMOTE_IRR
        accepted = self._bus.deliver(destination(entry), bool(entry & RTE_LOGICAL), mode, entry & RTE_VECTOR, level)
        if level and not accepted:
            self._entries[pin] &= ~RTE_REMOTE_IRR

    def eoi(self, vector: int) -> None:
        """A local APIC completed a level-triggered `vector`: sample its pins, send again what is still active."""
        for pin, entry in enumerate(self._entries):
            if entry & RTE_REMOTE_IRR and entry & RTE_VECTOR == vector:
                self._entries[pin] = entry & ~RTE_REMOTE_IRR
                if self.active(pin):
                    self._send(pin)

    # -- saved state --------------------------------------------------------------------------------------------------

    def save(self) -> VioapicV1:
        levels = tuple(line.levels() for line in self._lines)
        return VioapicV1(self._select, self._apic_id, tuple(self._entries), levels)

    def restore(self, state: VioapicV1) -> None:
        """Take over a saved state; nothing is sent. ValueError if it has another number of pins."""
        if len(state.entries) != self.pins:
            raise ValueError(f"state of an I/O APIC of {len(state.entries)} pins given to one of {self.pins}")
        self._select = state.select
        self._apic_id = state.apic_id
        self._entries = list(state.entries)
        for line, levels in zip(self._lines, state.levels, strict=True):
            line.restore(levels)
