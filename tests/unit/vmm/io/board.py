"""A board without a processor: local APICs on a bus, with clocks that the test moves."""

from collections.abc import Callable

import pytest

from pyhyve.base.errors import GuestFault
from pyhyve.base.fakes import FakeClock, FakeTimers
from pyhyve.vmm.io.apicbus import ApicBus
from pyhyve.vmm.io.apicregs import BASE_ENABLED, BASE_X2APIC, MSR_APIC_BASE, ApicFeatures
from pyhyve.vmm.io.vlapic import Vlapic

TSC_HZ = 2_000_000_000


class Board:
    """Local APICs by id, software-enabled; `events` records what each told its vCPU."""

    def __init__(self, start: int = 1_000) -> None:
        self.clock = FakeClock(start)
        self._tsc_from = start
        self.tsc_offset = 0
        self.timers = FakeTimers(self.clock)
        self.bus = ApicBus()
        self.events: list[tuple[int, str, int]] = []
        self.cpus: dict[int, Vlapic] = {}

    def tsc(self) -> int:
        """A counter that showed 2,000 when the clock was made: guests take theirs along."""
        return (self.clock.now() - self._tsc_from + 1_000) * TSC_HZ // 1_000_000_000 + self.tsc_offset

    def _event(self, apic_id: int, name: str) -> Callable[[], None]:
        def happened() -> None:
            lock = self.cpus[apic_id]._lock
            assert not lock._is_owned(), f"{name} called with the local APIC's lock held"  # type: ignore[attr-defined]
            self.events.append((apic_id, name, 0))

        return happened

    def add(
        self, apic_id: int, enable: bool = True, x2apic: bool = False, features: ApicFeatures | None = None
    ) -> Vlapic:
        vlapic = Vlapic(
            apic_id,
            self.bus,
            self.clock,
            self.timers,
            notify=self._event(apic_id, "notify"),
            tsc=self.tsc,
            tsc_hz=TSC_HZ,
            on_init=self._event(apic_id, "init"),
            on_sipi=lambda vector: self.events.append((apic_id, "sipi", vector)),
            on_nmi=self._event(apic_id, "nmi"),
            on_base=self._event(apic_id, "base"),
            features=features,
        )
        self.cpus[apic_id] = vlapic
        self.bus.attach(vlapic)
        if x2apic:
            vlapic.wrmsr(MSR_APIC_BASE, vlapic.base_msr | BASE_ENABLED | BASE_X2APIC)
            vlapic.wrmsr(0x80F, 0x1FF)
        elif enable:
            vlapic.write(0xF0, 4, 0x1FF)
        return vlapic

    def pending(self) -> dict[int, int]:
        """Deliverable vectors by APIC id."""
        found = {apic_id: vlapic.pending_vector() for apic_id, vlapic in self.cpus.items()}
        return {apic_id: vector for apic_id, vector in found.items() if vector is not None}

    def names(self, apic_id: int) -> list[str]:
        return [name for who, name, _ in self.events if who == apic_id]

    def take(self, vlapic: Vlapic) -> int | None:
        """The vCPU takes its pending interrupt."""
        vector = vlapic.pending_vector()
        if vector is not None:
            vlapic.acknowledge(vector)
        return vector


def assert_gp(call: Callable[..., object], *args: object) -> None:
    """The call answers with #GP(0)."""
    with pytest.raises(GuestFault) as caught:
        call(*args)
    assert (caught.value.vector, caught.value.error) == (13, 0)
