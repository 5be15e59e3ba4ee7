"""What joins the local APICs: it finds the destinations of an interrupt message and brings EOIs to the I/O APICs.

Intel SDM vol 3, "Determining IPI Destination" and "Interrupt Distribution Mechanisms".
"""

from collections.abc import Callable
from dataclasses import dataclass
from errno import EINVAL
from typing import ClassVar, Final, Protocol

from pyhyve.vmm.io.apicregs import ICR_SHORTHAND
from pyhyve.vmm.io.msi import decode_msi

# Delivery modes: the same three bits in the ICR, the LVT, a redirection entry and MSI data.
FIXED: Final = 0
LOWEST_PRIORITY: Final = 1
SMI: Final = 2
NMI: Final = 4
INIT: Final = 5
STARTUP: Final = 6
EXTINT: Final = 7

BROADCAST: Final = 0xFF
BROADCAST_X2APIC: Final = 0xFFFFFFFF


class LocalApic(Protocol):
    """What the bus asks of a local APIC."""

    @property
    def apic_id(self) -> int: ...

    @property
    def enabled(self) -> bool:
        """Hardware- and software-enabled: fixed interrupts are accepted."""
        ...

    @property
    def ppr(self) -> int: ...

    @property
    def physical_id(self) -> int:
        """What a physical destination calls it now: the guest may have written the ID register."""
        ...

    def is_focus(self, vector: int) -> bool:
        """Whether it has the vector in hand and, by that, a claim to a lowest-priority interrupt."""
        ...

    def accepts_logical(self, dest: int) -> bool: ...

    def receive(self, mode: int, vector: int, level: bool) -> bool: ...


class EoiListener(Protocol):
    """An I/O APIC, as seen from the bus."""

    def eoi(self, vector: int) -> None: ...


@dataclass(frozen=True, slots=True)
class ApicBusV1:
    SCHEMA: ClassVar[tuple[str, int]] = ("apicbus", 1)
    dropped: int
    undelivered: int


class ApicBus:
    """All local APICs of a VM, by id. An `MsiSink`.

    dropped: MSIs that were no interrupt message; last_dropped: (address, data) of the last one. undelivered: interrupts
    that no local APIC accepted; last_undelivered: (destination, logical, delivery mode, vector) of the last one.
    extint: the INTA cycle: asks the 8259 pair for a vector; None where there is no 8259.
    extended_ids: messages have destinations of 15 bits; the guest must have been told.
    """

    __slots__ = (
        "_by_id",
        "_ioapics",
        "_vlapics",
        "dropped",
        "extended_ids",
        "extint",
        "last_dropped",
        "last_undelivered",
        "undelivered",
    )  # fmt: skip

    def __init__(self) -> None:
        self._vlapics: tuple[LocalApic, ...] = ()
        self._by_id: dict[int, tuple[LocalApic, ...]] = {}
        self._ioapics: tuple[EoiListener, ...] = ()
        self.dropped = 0
        self.undelivered = 0
        self.extended_ids = False
        self.last_dropped: tuple[int, int] | None = None
        self.last_undelivered: tuple[int, bool, int, int] | None = None
        self.extint: Callable[[], int] | None = None

    def attach(self, vlapic: LocalApic) -> None:
        """Add a local APIC; its id must be new (ValueError)."""
        if any(other.apic_id == vlapic.apic_id for other in self._vlapics):
            raise ValueError(f"local APIC id {vlapic.apic_id} is already on the bus")
        self._vlapics = (*self._vlapics, vlapic)
        self.renumber()

    def renumber(self) -> None:
        """A local APIC has another id than before; several may have the same."""
        by_id: dict[int, tuple[LocalApic, ...]] = {}
        for vlapic in self._vlapics:
            by_id[vlapic.physical_id] = (*by_id.get(vlapic.physical_id, ()), vlapic)
        self._by_id = by_id

    def attach_ioapic(self, ioapic: EoiListener) -> None:
        """Send the EOIs of level-triggered vectors to `ioapic` too."""
        self._ioapics = (*self._ioapics, ioapic)

    def send_msi(self, addr: int, data: int) -> None:
        """Deliver a message by the guest's own `addr` and `data`; one that is no interrupt message is counted."""
        message = decode_msi(addr, data, self.extended_ids)
        if message is None:
            self.dropped += 1
            self.last_dropped = (addr, data)
        elif message.asserted:
            self.deliver(message.dest, message.logical, message.mode, message.vector, message.level)

    def deliver(
        self, dest: int, logical: bool, mode: int, vector: int, level_trigger: bool, x2apic: bool = False
    ) -> int:
        """Deliver to every local APIC that `dest` names; return how many accepted.

        `x2apic`: `dest` has the sender's 32-bit format (an ICR in x2APIC mode), else 8 bits. Every receiver reads a
        logical destination by its own mode: flat, cluster or x2APIC.
        """
        targets = self.targets(dest, logical, x2apic)
        if mode == LOWEST_PRIORITY and len(targets) > 1:
            targets = self._lowest_priority(targets, vector)
        accepted = 0
        for target in targets:
            accepted += target.receive(mode, vector, level_trigger)
        if not accepted:
            self.undelivered += 1
            self.last_undelivered = (dest, logical, mode, vector)
        return accepted

    def targets(self, dest: int, logical: bool, x2apic: bool = False) -> tuple[LocalApic, ...]:
        """Every local APIC that `dest` names, as `deliver` reads it."""
        if dest == (BROADCAST_X2APIC if x2apic else BROADCAST):
            return self._vlapics
        if logical:
            return tuple(vlapic for vlapic in self._vlapics if vlapic.accepts_logical(dest))
        return self._by_id.get(dest, ())

    def deliver_all(self, mode: int, vector: int, exclude: LocalApic | None) -> None:
        """The ICR's shorthands "all including self" and, with `exclude`, "all excluding self"."""
        for target in self._vlapics:
            if target is not exclude:
                target.receive(mode, vector, False)

    def send_to_many(self, bits: int, first: int, command: int) -> int:
        """The paravirtual IPI: to the local APICs of the ids first + n, for each bit n of `bits`.

        `command` is the low half of an ICR: fixed or NMI, without a shorthand. Return how many accepted, or -EINVAL.
        """
        mode, vector = command >> 8 & 7, command & 0xFF
        if command & ICR_SHORTHAND or mode not in (FIXED, NMI):
            return -EINVAL
        accepted = 0
        while bits:
            lowest = bits & -bits
            bits ^= lowest
            for target in self._by_id.get(first + lowest.bit_length() - 1, ()):
                accepted += target.receive(mode, vector, False)
        return accepted

    def eoi(self, vector: int) -> None:
        """A level-triggered vector was completed: every I/O APIC hears of it."""
        for ioapic in self._ioapics:
            ioapic.eoi(vector)

    def save(self) -> ApicBusV1:
        return ApicBusV1(self.dropped, self.undelivered)

    def restore(self, state: ApicBusV1) -> None:
        self.dropped = state.dropped
        self.undelivered = state.undelivered

    @staticmethod
    def _lowest_priority(targets: tuple[LocalApic, ...], vector: int) -> tuple[LocalApic, ...]:
        """The focus processor, or one enabled target of the lowest processor priority; equals share the vectors.

        "Lowest Priority Delivery Mode", "Arbitration Mechanisms".
        """
        enabled = [target for target in targets if target.enabled]
        if not enabled:
            return ()
        for target in enabled:
            if target.is_focus(vector):
                return (target,)
        lowest = min(target.ppr >> 4 for target in enabled)
        equals = [target for target in enabled if target.ppr >> 4 == lowest]
        return (equals[vector % len(equals)],)
