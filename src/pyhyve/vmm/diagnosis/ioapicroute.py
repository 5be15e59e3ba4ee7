"""From a pin of the I/O APIC to the local APICs that its entry names."""

from dataclasses import dataclass

from pyhyve.base.explanation import Stage
from pyhyve.vmm.diagnosis.processor import (
    MODES,
    Cpu,
    acceptance_stages,
    cpus,
    delivered_stage,
    enabled_stage,
    entry_stages,
)
from pyhyve.vmm.diagnosis.snapshot import Snapshot
from pyhyve.vmm.io.apicbus import EXTINT, FIXED, LOWEST_PRIORITY, NMI
from pyhyve.vmm.io.apicregs import SVR, SVR_EOI_SUPPRESSED
from pyhyve.vmm.io.vioapic import (
    RTE_ACTIVE_LOW,
    RTE_LEVEL,
    RTE_LOGICAL,
    RTE_MASKED,
    RTE_REMOTE_IRR,
    RTE_VECTOR,
    destination,
)

_MOST_SHOWN = 16
"""Of destinations: a broadcast may have hundreds."""


@dataclass(frozen=True, slots=True)
class PinState:
    """A pin and its redirection entry, decoded."""

    pin: int
    entry: int
    asserters: int
    sources: int
    active: bool
    targets: tuple[Cpu, ...]

    @classmethod
    def of(cls, snapshot: Snapshot, pin: int) -> "PinState":
        levels = snapshot.ioapic.levels[pin]
        named = snapshot.targets[pin]
        targets = tuple(cpu for cpu in cpus(snapshot) if cpu.vlapic.apic_id in named)
        return cls(pin, snapshot.ioapic.entries[pin], sum(levels), len(levels), snapshot.active[pin], targets)

    @property
    def vector(self) -> int:
        return self.entry & RTE_VECTOR

    @property
    def mode(self) -> int:
        return self.entry >> 8 & 7

    @property
    def level(self) -> bool:
        return bool(self.entry & RTE_LEVEL) and self.fixed

    @property
    def fixed(self) -> bool:
        return self.mode in (FIXED, LOWEST_PRIORITY)

    @property
    def masked(self) -> bool:
        return bool(self.entry & RTE_MASKED)

    @property
    def under_way(self) -> bool:
        """Whether a target has it in IRR or ISR: then the pin has done its part."""
        return self.fixed and any(cpu.pending(self.vector) or cpu.in_service(self.vector) for cpu in self.targets)


def pin_stages(snapshot: Snapshot, pin: int) -> list[Stage]:
    """All stages of a pin's interrupt, from its sources to each vCPU that it may go to."""
    state = PinState.of(snapshot, pin)
    stages = [
        _line_stage(state),
        _polarity_stage(state),
        _mask_stage(state),
        _trigger_stage(state),
        _mode_stage(state),
        _remote_irr_stage(state),
        _destination_stage(snapshot, state),
    ]
    if state.fixed:
        accepting = any(cpu.hardware_enabled and cpu.software_enabled for cpu in state.targets)
        for cpu in state.targets[:_MOST_SHOWN]:
            stages += target_stages(cpu, state.vector, all_must=not accepting)
    return stages


def target_stages(cpu: Cpu, vector: int, all_must: bool = True) -> list[Stage]:
    """From a local APIC that is to take `vector`, to the vCPU. all_must: no other would take it in its place."""
    enabled = enabled_stage(cpu)
    waiting, next_vector = cpu.pending(vector), cpu.vcpu.next_vector
    if enabled.holds and (not all_must or (waiting and next_vector is not None)):
        # Another destination takes it, or it was accepted before.
        enabled = Stage(enabled.name, enabled.state, "", enabled.registers)
    first = "" if next_vector in (None, vector) else f"vector {next_vector:#x}"
    stages = [enabled, *acceptance_stages(cpu, vector)]
    stages += entry_stages(cpu, f"vector {vector:#x}", waiting and not cpu.in_service(vector), first)
    return [*stages, delivered_stage(cpu, vector)]


def _line_stage(state: PinState) -> Stage:
    held = f"held by {state.asserters} of {state.sources} sources"
    reason = ""
    if not state.asserters and not state.active and not state.under_way and not state.masked:
        reason = f"nothing asserts I/O APIC pin {state.pin} (none of its {state.sources} sources), and nothing waits"
        if not state.sources:
            reason = f"no device is wired to I/O APIC pin {state.pin}"
    return Stage("pin", f"I/O APIC pin {state.pin}, {held}", reason, {"asserters": state.asserters})


def _polarity_stage(state: PinState) -> Stage:
    kind = "active low" if state.entry & RTE_ACTIVE_LOW else "active high"
    reason = ""
    if state.asserters and not state.active and not state.under_way and not state.masked:
        reason = (
            f"I/O APIC pin {state.pin} is asserted, but its entry's polarity ({kind}) is not that of its line, "
            "which so counts as idle"
        )
    words = f"{kind}: the pin is {'active' if state.active else 'idle'}"
    return Stage("I/O APIC polarity", words, reason, {"entry": state.entry, "active": int(state.active)})


def _mask_stage(state: PinState) -> Stage:
    reason = ""
    if state.masked and not state.under_way:
        asserted = f", while {state.asserters} of its sources assert it" if state.asserters else ""
        if not state.sources:
            asserted = ", and no device is wired to it"
        reason = f"I/O APIC pin {state.pin} is masked (entry {state.entry:#x}, bit 16){asserted}"
    return Stage("I/O APIC mask", "masked" if state.masked else "open", reason, {"entry": state.entry})


def _trigger_stage(state: PinState) -> Stage:
    """An edge-triggered pin that stays high has sent its one interrupt."""
    kind = "level" if state.entry & RTE_LEVEL else "edge"
    reason = ""
    if kind == "edge" and state.active and not state.under_way and not state.masked:
        reason = (
            f"I/O APIC pin {state.pin} is edge-triggered and has stayed active since its last edge "
            f"(held by {state.asserters} of {state.sources} sources): it must go idle first"
        )
    return Stage("I/O APIC trigger", f"{kind}-triggered", reason, {"entry": state.entry})


def _mode_stage(state: PinState) -> Stage:
    words = MODES[state.mode]
    reason = ""
    if state.fixed:
        words = f"{words}, vector {state.vector:#x}"
        if state.vector < 16 and not state.masked:
            reason = f"I/O APIC pin {state.pin} has the illegal vector {state.vector:#x}: no local APIC accepts 0 to 15"
    elif state.mode not in (NMI, EXTINT) and not state.masked:
        reason = f"I/O APIC pin {state.pin} has the delivery mode {words}, which carries no interrupt here"
    return Stage("I/O APIC mode", words, reason, {"entry": state.entry})


def _remote_irr_stage(state: PinState) -> Stage:
    waiting = bool(state.entry & RTE_REMOTE_IRR)
    reason = ""
    if waiting and not state.under_way:
        reason = (
            f"I/O APIC pin {state.pin} waits for an EOI of vector {state.vector:#x} (remote IRR), which no local APIC "
            "has pending or in service: that EOI is lost"
        )
        quiet = [cpu.label for cpu in state.targets if cpu.vlapic.regs[SVR] & SVR_EOI_SUPPRESSED]
        if quiet:
            reason = (
                f"I/O APIC pin {state.pin} waits for its own EOI register to be written with vector {state.vector:#x} "
                f"(remote IRR): {', '.join(quiet)} does not broadcast EOIs (SVR bit 12)"
            )
    return Stage("I/O APIC remote IRR", "set" if waiting else "clear", reason, {"entry": state.entry})


def _destination_stage(snapshot: Snapshot, state: PinState) -> Stage:
    dest = destination(state.entry)
    logical = bool(state.entry & RTE_LOGICAL)
    kind = "logical" if logical else "physical"
    everyone = [cpu.destination() for cpu in cpus(snapshot)[:_MOST_SHOWN]]
    reason = ""
    if not state.targets and not state.masked:
        reason = f"I/O APIC pin {state.pin}'s {kind} destination {dest:#x} names no local APIC ({'; '.join(everyone)})"
    named = ", ".join(f"vCPU {cpu.vcpu.index}" for cpu in state.targets) or "nobody"
    words = f"{kind} {dest:#x}: {named}; {'; '.join(everyone)}"
    return Stage("destination", words, reason, {"destination": dest, "logical": int(logical)})
