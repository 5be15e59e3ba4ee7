"""Why an interrupt was not delivered: which of the stages on its way holds it.

Works on a snapshot alone, so that it tells of a running machine what it tells of a saved one. The stages are in the
order of the way; the verdict is about the first that holds, but for masks: what the guest does not want is the reason
even where nothing asserts the line.
"""

from collections.abc import Sequence
from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.base.explanation import Explanation, Stage
from pyhyve.vmm.diagnosis import ioapicroute, picroute
from pyhyve.vmm.diagnosis.ioapicroute import PinState, target_stages
from pyhyve.vmm.diagnosis.processor import MODES, NMI_WORDS, Cpu, cpus, entry_stages, times
from pyhyve.vmm.diagnosis.snapshot import Snapshot
from pyhyve.vmm.io.apicbus import FIXED, NMI
from pyhyve.vmm.io.apicregs import (
    LVT_CMCI,
    LVT_ERROR,
    LVT_LINT0,
    LVT_LINT1,
    LVT_MASKED,
    LVT_PMC,
    LVT_THERMAL,
    LVT_TIMER,
)
from pyhyve.vmm.io.msi import decode_msi

_LVT_NAMES: Final = {
    LVT_TIMER: "timer",
    LVT_LINT0: "LINT0",
    LVT_LINT1: "LINT1",
    LVT_ERROR: "error",
    LVT_THERMAL: "thermal",
    LVT_PMC: "performance counter",
    LVT_CMCI: "CMCI",
}
_MASKS: Final = ("I/O APIC mask", "master 8259 IMR", "slave 8259 IMR")


def explain_irq(snapshot: Snapshot, irq: int, vcpu: int | None = None) -> Explanation:
    """Explain an ISA interrupt (0 to 15) or a global system interrupt, which is a pin of the I/O APIC.

    vcpu: of several destinations, look at this one only. UsageError for a number that there is not.
    """
    pins = len(snapshot.ioapic.entries)
    if not 0 <= irq < pins:
        raise UsageError(f"IRQ {irq}: this machine has 0 to {pins - 1}")
    _check_vcpu(snapshot, vcpu)
    pin = snapshot.isa_pins.get(irq, irq)
    subject = f"IRQ {irq}" if pin == irq else f"IRQ {irq} (I/O APIC pin {pin})"
    state = PinState.of(snapshot, pin)
    stages = _only(ioapicroute.pin_stages(snapshot, pin), vcpu)
    if vcpu is not None and all(cpu.vcpu.index != vcpu for cpu in state.targets) and not state.masked:
        stages.append(Stage("destination", f"not vCPU {vcpu}", f"I/O APIC pin {pin} does not name vCPU {vcpu}"))
    taken = sum(cpu.vcpu.delivered[state.vector] for cpu in state.targets) if state.fixed else 0
    waiting = state.fixed and any(cpu.pending(state.vector) for cpu in state.targets)
    if not picroute.has_input(irq):
        return _conclude(subject, stages, f"vector {state.vector:#x}", taken, waiting)
    legacy = picroute.input_stages(snapshot, irq)
    if state.masked and not state.under_way:
        if picroute.is_open(snapshot, irq):
            vector = picroute.vector_of(snapshot, irq)
            # The way that the guest uses comes first: the other one's mask is no reason.
            count = snapshot.vcpus[0].delivered[vector]
            waiting = picroute.waits(snapshot, irq)
            what = f"vector {vector:#x}, from the 8259s,"
            return _conclude(subject, [*legacy, *_quiet(stages)], what, count, waiting)
        both = f"{subject} is masked at the I/O APIC (pin {pin}, entry {state.entry:#x}) and does not pass the 8259s"
        reason = next((stage.reason for stage in legacy[1:] if stage.holds), "")
        return Explanation(subject, f"{both}: {reason}.", "I/O APIC mask", (*stages, *legacy))
    return _conclude(subject, [*stages, *_quiet(legacy)], f"vector {state.vector:#x}", taken, waiting)


def explain_vector(snapshot: Snapshot, vector: int, vcpu: int | None = None) -> Explanation:
    """Explain a vector (0 to 255) at one vCPU, or at all that could take it."""
    if not 0 <= vector <= 255:
        raise UsageError(f"vector {vector:#x}: vectors are 0 to 255")
    _check_vcpu(snapshot, vcpu)
    everyone = [cpu for cpu in cpus(snapshot) if vcpu is None or cpu.vcpu.index == vcpu]
    subject = f"vector {vector:#x}" if vcpu is None else f"vector {vector:#x} at vCPU {vcpu}"
    sources = _sources(snapshot, vector, everyone)
    busy = [cpu for cpu in everyone if cpu.pending(vector) or cpu.in_service(vector)]
    taken = sum(cpu.vcpu.delivered[vector] for cpu in everyone)
    what = f"vector {vector:#x}"
    if busy:
        stages = [*_quiet(sources), *(stage for cpu in busy for stage in target_stages(cpu, vector))]
        return _conclude(subject, stages, what, taken, any(cpu.pending(vector) for cpu in busy))
    for pin in range(len(snapshot.ioapic.entries)):
        named = {cpu.vcpu.index for cpu in PinState.of(snapshot, pin).targets}
        if _pin_has(snapshot, pin, vector) and (vcpu is None or vcpu in named):
            stages = _only(ioapicroute.pin_stages(snapshot, pin), vcpu)
            return _conclude(subject, [*sources, *stages], what, taken)
    for irq in range(picroute.INPUTS):
        if _input_has(snapshot, irq, vector) and vcpu in (None, 0):
            stages = [*sources, *picroute.input_stages(snapshot, irq)]
            return _conclude(subject, stages, what, taken, picroute.waits(snapshot, irq))
    stages = [*sources, *_message_stages(snapshot, vector)]
    for cpu in everyone:
        stages += target_stages(cpu, vector)
    if sources or any(stage.holds for stage in stages):
        return _conclude(subject, stages, what, taken)
    if vector < 16:
        verdict = f"{subject} is an exception's or reserved: no local APIC accepts vectors 0 to 15"
    else:
        verdict = (
            f"{subject} does not wait anywhere, and no I/O APIC pin, local vector or 8259 input is set to it: "
            f"only an IPI or a message could bring it; {times(taken)}"
        )
    return Explanation(subject, f"{verdict}.", None, tuple(stages))


def explain_nmi(snapshot: Snapshot, vcpu: int = 0) -> Explanation:
    """Explain the non-maskable interrupt of a vCPU."""
    _check_vcpu(snapshot, vcpu)
    cpu = cpus(snapshot)[vcpu]
    subject = f"NMI of vCPU {vcpu}"
    state = cpu.vcpu
    lvt = cpu.vlapic.regs[LVT_LINT1]
    high = cpu.vlapic.lint[1]
    mode, masked = lvt >> 8 & 7, bool(lvt & LVT_MASKED)
    words = f"LINT1 {'high' if high else 'low'}: {MODES[mode]}{', masked' if masked else ''} (LVT {lvt:#x})"
    reason = ""
    if high and not state.nmis and cpu.hardware_enabled and (masked or mode != NMI):
        reason = f"LINT1 of vCPU {vcpu} is asserted, but {'masked' if masked else 'not set to NMI'} (LVT {lvt:#x})"
    stages = [Stage("LINT1", words, reason, {"lint1": lvt})]
    reason = "" if state.nmis else f"no NMI waits for vCPU {vcpu}"
    stages.append(Stage("NMI latch", f"{state.nmis} waiting", reason, {"count": state.nmis}))
    waiting = bool(state.nmis)
    # IF has no say in NMIs, and what has is asked below.
    stages += [stage for stage in entry_stages(cpu, NMI_WORDS, waiting) if "RFLAGS" not in stage.name]
    blocked = waiting and not state.nmi_allowed and not state.event_pending
    reason = f"NMIs are blocked at vCPU {vcpu}: a handler of one runs until its IRET (rip {state.rip:#x})"
    stages.append(Stage("NMI blocking", "blocked" if blocked else "not blocked", reason if blocked else ""))
    count = state.nmis_delivered
    stages.append(Stage("delivered", times(count), "", {"count": count}))
    return _conclude(subject, stages, NMI_WORDS, count, waiting)


# -- sources -----------------------------------------------------------------------------------------------------------


def _pin_has(snapshot: Snapshot, pin: int, vector: int) -> bool:
    state = PinState.of(snapshot, pin)
    return state.fixed and state.vector == vector and (bool(state.entry & 0xFF) or not state.masked)


def _input_has(snapshot: Snapshot, irq: int, vector: int) -> bool:
    if not picroute.has_input(irq):
        return False
    wired = picroute.is_open(snapshot, irq) or picroute.is_spurious(snapshot, irq)
    return wired and picroute.vector_of(snapshot, irq) == vector


def _sources(snapshot: Snapshot, vector: int, everyone: Sequence[Cpu]) -> list[Stage]:
    """What is programmed to bring a vector: I/O APIC pins, local vectors, inputs of the 8259s."""
    stages = []
    for pin, entry in enumerate(snapshot.ioapic.entries):
        if _pin_has(snapshot, pin, vector):
            stages.append(Stage("source", f"I/O APIC pin {pin}", "", {"entry": entry}))
    for irq in range(picroute.INPUTS):
        if _input_has(snapshot, irq, vector):
            stages.append(Stage("source", f"IRQ {irq} of the 8259s"))
    for cpu in everyone:
        for index, name in _LVT_NAMES.items():
            lvt = cpu.vlapic.regs[index]
            if lvt & 0xFF == vector and (index == LVT_TIMER or lvt >> 8 & 7 == FIXED) and lvt & 0xFF:
                stages.append(_lvt_stage(cpu, index, name, lvt))
                if index == LVT_TIMER:
                    stages.append(_timer_stage(cpu, bool(lvt & LVT_MASKED)))
    return stages


def _lvt_stage(cpu: Cpu, index: int, name: str, lvt: int) -> Stage:
    masked = bool(lvt & LVT_MASKED)
    reason = f"{cpu.label}'s local vector of the {name} is masked (LVT {lvt:#x}, bit 16)" if masked else ""
    words = f"{'masked' if masked else 'open'}, vector {lvt & 0xFF:#x} (LVT {lvt:#x})"
    return Stage(f"{cpu.label} LVT {name}", words, reason, {"lvt": lvt})


def _timer_stage(cpu: Cpu, masked: bool) -> Stage:
    timer = cpu.vlapic.timer
    mode = ("one-shot", "periodic", "TSC-deadline", "reserved mode")[timer.mode & 3]
    registers = {"initial": timer.initial, "tsc_deadline": timer.tsc_deadline}
    name = f"{cpu.label} timer"
    if timer.left is None:
        reason = "" if masked else f"{cpu.label}'s local timer ({mode}) is not armed"
        return Stage(name, f"{mode}, not armed", reason, registers)
    due = f"due in {timer.left / 1000:,.1f} us" if timer.left >= 0 else "due"
    return Stage(name, f"{mode}, {due}", "", registers)


def _message_stages(snapshot: Snapshot, vector: int) -> list[Stage]:
    """The last messages that came to nothing, where they may have been this one."""
    stages = []
    if snapshot.last_dropped is not None:
        addr, data = snapshot.last_dropped
        words = f"{snapshot.dropped} dropped; the last: address {addr:#x}, data {data:#x}"
        reason = ""
        if data & 0xFF == vector:
            reason = f"a message with its vector went to address {addr:#x}, which is no interrupt message (0xfeexxxxx)"
            if decode_msi(addr, data) is not None:
                reason = f"a message with its vector (address {addr:#x}, data {data:#x}) was dropped"
        stages.append(Stage("messages dropped", words, reason, {"address": addr, "data": data}))
    if snapshot.last_undelivered is not None:
        dest, logical, mode, last = snapshot.last_undelivered
        kind = "logical" if logical else "physical"
        target = f"{kind} destination {dest:#x}"
        words = f"{snapshot.undelivered} for nobody; the last: vector {last:#x}, {MODES[mode]}, {target}"
        everyone = "; ".join(cpu.destination() for cpu in cpus(snapshot))
        reason = ""
        if last == vector and mode == FIXED:
            reason = f"it was sent to the {target}, where no local APIC accepted it ({everyone})"
        stages.append(Stage("messages for nobody", words, reason, {"destination": dest, "vector": last}))
    return stages


# -- the verdict -------------------------------------------------------------------------------------------------------


def _conclude(subject: str, stages: Sequence[Stage], what: str, taken: int, waiting: bool = False) -> Explanation:
    """Make the verdict: the stage that holds, or that none does."""
    holding = [stage for stage in stages if stage.holds]
    first = next((stage for stage in holding if stage.name in _MASKS), holding[0] if holding else None)
    if first is not None:
        return Explanation(subject, f"{subject}: {first.reason}; {times(taken)}.", first.name, tuple(stages))
    how = f"nothing holds it: {what} waits and is taken at the next entry" if waiting else "nothing holds or awaits it"
    return Explanation(subject, f"{subject}: {how}; {times(taken)}.", None, tuple(stages))


def _quiet(stages: Sequence[Stage]) -> list[Stage]:
    """The same stages, where they are no reason: the interrupt does not go there, or is past them."""
    return [Stage(stage.name, stage.state, "", stage.registers) for stage in stages]


def _only(stages: list[Stage], vcpu: int | None) -> list[Stage]:
    """Leave out other vCPUs' stages."""
    if vcpu is None:
        return stages
    mine = f"vCPU {vcpu} "
    return [stage for stage in stages if not stage.name.startswith("vCPU ") or stage.name.startswith(mine)]


def _check_vcpu(snapshot: Snapshot, vcpu: int | None) -> None:
    count = len(snapshot.vcpus)
    if vcpu is not None and not 0 <= vcpu < count:
        raise UsageError(f"vCPU {vcpu}: this machine has 0 to {count - 1}")
