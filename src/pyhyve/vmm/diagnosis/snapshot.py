"""The state of everything that an interrupt passes, at one moment: what a diagnosis is made from."""

from collections.abc import Mapping
from dataclasses import dataclass

from pyhyve.vmm.io.vatpic import Vatpic, VatpicV1
from pyhyve.vmm.io.vioapic import RTE_LOGICAL, Vioapic, VioapicV1, destination
from pyhyve.vmm.io.vlapic import Vlapic, VlapicV1
from pyhyve.vmm.vcpu import HALTED, STATE_NAMES, Vcpu
from pyhyve.vmm.vm import State, Vm

_RFLAGS_IF = 1 << 9


@dataclass(frozen=True, slots=True)
class VcpuSnapshot:
    """A vCPU between two instructions. state: a word of `vcpu.STATE_NAMES`.

    interrupts_on: RFLAGS.IF. event_pending: an event is on its way into its handler. interruptible, nmi_allowed: what
    the processor says of external interrupts and NMIs. nmis: NMIs that wait; sipi: a start-up vector that waits, or -1.
    next_vector: what its local APIC would have it take now, or None. delivered: external interrupts taken, by vector.
    ago: how many ns ago the last of a vector was taken, if a trace has seen it.
    """

    index: int
    state: str
    interrupts_on: bool
    event_pending: bool
    interruptible: bool
    nmi_allowed: bool
    rflags: int
    rip: int
    nmis: int
    init_pending: bool
    sipi: int
    next_vector: int | None
    delivered: tuple[int, ...]
    nmis_delivered: int
    ago: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """active: for each pin of the I/O APIC, whether it is as its entry's polarity has it; targets: ids of the local
    APICs that its entry names. isa_pins: the pins of those ISA interrupts that have not the pin of their number.
    last_dropped, last_undelivered: as in `ApicBus`."""

    paused: bool
    ended: bool
    vcpus: tuple[VcpuSnapshot, ...]
    vlapics: tuple[VlapicV1, ...]
    ioapic: VioapicV1
    active: tuple[bool, ...]
    targets: tuple[tuple[int, ...], ...]
    pic: VatpicV1
    isa_pins: Mapping[int, int]
    dropped: int
    last_dropped: tuple[int, int] | None
    undelivered: int
    last_undelivered: tuple[int, bool, int, int] | None


def take(
    vm: Vm, vioapic: Vioapic, vatpic: Vatpic, isa_pins: Mapping[int, int], last: Mapping[tuple[int, int], int]
) -> Snapshot:
    """Look at a VM, which stands still for the moment (for good, if it is paused or has ended). From any thread but a
    vCPU's. last: when each vCPU took each vector last, as far as that is known."""
    paused = vm.state is State.PAUSED
    with vm.stopped():
        if vm.state is State.STOPPED:
            vm.join()
        with vm.lock:
            bus = vm.apic_bus
            ioapic = vioapic.save()
            return Snapshot(
                paused=paused,
                ended=vm.state is State.STOPPED,
                # First, because it lets each local APIC know of its processor's CR8.
                vlapics=tuple(_vlapic(vcpu) for vcpu in vm.vcpus),
                vcpus=tuple(_vcpu(vcpu, last, vm.clock.now()) for vcpu in vm.vcpus),
                ioapic=ioapic,
                active=tuple(vioapic.active(pin) for pin in range(vioapic.pins)),
                targets=tuple(
                    tuple(target.apic_id for target in bus.targets(destination(entry), bool(entry & RTE_LOGICAL)))
                    for entry in ioapic.entries
                ),
                pic=vatpic.save(),
                isa_pins=isa_pins,
                dropped=bus.dropped,
                last_dropped=bus.last_dropped,
                undelivered=bus.undelivered,
                last_undelivered=bus.last_undelivered,
            )


def _vlapic(vcpu: Vcpu) -> VlapicV1:
    assert isinstance(vcpu.vlapic, Vlapic)
    vcpu.load_task_priority()
    return vcpu.vlapic.save()


def _vcpu(vcpu: Vcpu, last: Mapping[tuple[int, int], int], now: int) -> VcpuSnapshot:
    backend = vcpu.backend
    rflags = backend.get("rflags")
    waiting = vcpu.waiting_events()
    return VcpuSnapshot(
        index=vcpu.index,
        # A processor that is to go on with a HLT has not begun to.
        state=STATE_NAMES[HALTED if vcpu.vlapic.state.resting else vcpu.state],
        interrupts_on=bool(rflags & _RFLAGS_IF),
        event_pending=backend.injection_pending(),
        interruptible=backend.interruptible(),
        nmi_allowed=backend.nmi_allowed(),
        rflags=rflags,
        rip=backend.get("rip"),
        nmis=waiting.nmis,
        init_pending=waiting.init,
        sipi=waiting.sipi,
        next_vector=vcpu.vlapic.pending_vector(),
        delivered=tuple(vcpu.delivered),
        nmis_delivered=vcpu.nmis_delivered,
        ago={vector: now - time for (index, vector), time in last.items() if index == vcpu.index},
    )
