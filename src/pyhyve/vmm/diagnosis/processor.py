"""The last part of the way: from a local APIC's IRR, or the 8259's INTR, into a vCPU."""

from dataclasses import dataclass
from typing import Final

from pyhyve.base.explanation import Stage
from pyhyve.vmm.diagnosis.histogram import duration
from pyhyve.vmm.diagnosis.snapshot import Snapshot, VcpuSnapshot
from pyhyve.vmm.io.apicregs import BASE_ENABLED, BASE_X2APIC, DFR, ID, LDR, SVR, SVR_ENABLED, TPR
from pyhyve.vmm.io.vlapic import VlapicV1

MODES: Final = ("fixed", "lowest priority", "SMI", "reserved", "NMI", "INIT", "start-up", "ExtINT")
"""Delivery modes, as an I/O APIC entry, an LVT entry and a message have them."""
NMI_WORDS: Final = "the NMI"


@dataclass(frozen=True, slots=True)
class Cpu:
    """A vCPU with its local APIC, by the moment's snapshot."""

    vcpu: VcpuSnapshot
    vlapic: VlapicV1
    paused: bool
    ended: bool

    @property
    def label(self) -> str:
        return f"vCPU {self.vcpu.index}"

    def pending(self, vector: int) -> bool:
        return bool(self.vlapic.irr >> vector & 1)

    def in_service(self, vector: int) -> bool:
        return bool(self.vlapic.isr >> vector & 1)

    @property
    def x2apic(self) -> bool:
        return bool(self.vlapic.base & BASE_X2APIC)

    @property
    def hardware_enabled(self) -> bool:
        return bool(self.vlapic.base & BASE_ENABLED)

    @property
    def software_enabled(self) -> bool:
        return bool(self.vlapic.regs[SVR] & SVR_ENABLED)

    def destination(self) -> str:
        """What it answers to: its id and logical id."""
        regs = self.vlapic.regs
        if self.x2apic:
            return f"APIC {self.vlapic.apic_id}: x2APIC, LDR {regs[LDR]:#x}"
        model = "flat" if regs[DFR] >> 28 == 0xF else "cluster"
        return f"APIC {regs[ID] >> 24}: {model}, LDR {regs[LDR] >> 24:#04x}, DFR {regs[DFR]:#x}"


def cpus(snapshot: Snapshot) -> tuple[Cpu, ...]:
    return tuple(
        Cpu(vcpu, vlapic, snapshot.paused, snapshot.ended)
        for vcpu, vlapic in zip(snapshot.vcpus, snapshot.vlapics, strict=True)
    )


def vectors(bits: int) -> str:
    """Return the vectors that are set in 256 bits, in words."""
    numbers = [f"{vector:#x}" for vector in range(256) if bits >> vector & 1]
    return ", ".join(numbers) if numbers else "none"


def enabled_stage(cpu: Cpu) -> Stage:
    """The local APIC's two switches."""
    base, svr = cpu.vlapic.base, cpu.vlapic.regs[SVR]
    registers = {"apic_base": base, "svr": svr}
    mode = "x2APIC mode" if cpu.x2apic else "xAPIC mode"
    name = f"{cpu.label} local APIC"
    if not cpu.hardware_enabled:
        reason = f"{cpu.label}'s local APIC is switched off in IA32_APIC_BASE ({base:#x})"
        return Stage(name, "off by hardware", reason, registers)
    if not cpu.software_enabled:
        reason = f"{cpu.label}'s local APIC is disabled by software (SVR {svr:#x}, bit 8 is clear)"
        return Stage(name, f"{mode}, off by software (SVR {svr:#x})", reason, registers)
    return Stage(name, f"{mode}, on (SVR {svr:#x})", "", registers)


def acceptance_stages(cpu: Cpu, vector: int) -> list[Stage]:
    """From IRR to the processor's door: IRR, ISR, priorities."""
    pending, in_service = cpu.pending(vector), cpu.in_service(vector)
    irr, isr, tpr = cpu.vlapic.irr, cpu.vlapic.isr, cpu.vlapic.regs[TPR]
    highest = isr.bit_length() - 1 if isr else 0
    name = cpu.label
    irr_state = f"{vector:#x} {'waits' if pending else 'does not wait'}; waiting: {vectors(irr)}"
    stages = [Stage(f"{name} IRR", irr_state, "", {"irr": irr, "tmr": cpu.vlapic.tmr})]

    reason = ""
    if in_service:
        reason = f"{name} has vector {vector:#x} in service: its handler has not written EOI"
    elif pending and highest >> 4 >= vector >> 4 and highest >> 4 > tpr >> 4:
        reason = (
            f"{name} has vector {highest:#x} in service, of priority class {highest >> 4} "
            f"(that of {vector:#x} is {vector >> 4}), until its EOI"
        )
    stages.append(Stage(f"{name} ISR", f"in service: {vectors(isr)}", reason, {"isr": isr}))

    reason = ""
    if pending and not in_service and tpr >> 4 >= vector >> 4:
        reason = (
            f"{name}'s task priority (TPR {tpr:#x}, CR8 {tpr >> 4}) blocks priority class {vector >> 4}, "
            f"that of vector {vector:#x}"
        )
    ppr = tpr if tpr >> 4 >= highest >> 4 else highest & 0xF0
    priority = f"PPR {ppr:#04x}, TPR {tpr:#04x} (CR8 {tpr >> 4}); class of {vector:#x} is {vector >> 4}"
    stages.append(Stage(f"{name} priority", priority, reason, {"tpr": tpr, "ppr": ppr}))
    return stages


def entry_stages(cpu: Cpu, what: str, waiting: bool, first: str = "") -> list[Stage]:
    """The vCPU itself. `what` wants in, if it is `waiting`; where nothing waits, nothing is held. first: what it would
    take before that."""
    vcpu = cpu.vcpu
    stages = [_state_stage(cpu, what, waiting)]
    interrupts = "on" if vcpu.interrupts_on else "off"
    reason = ""
    if waiting and not vcpu.interrupts_on and vcpu.state != "wait-for-sipi":
        where = "and has halted" if vcpu.state == "halted" else f"at rip {vcpu.rip:#x}"
        reason = f"{cpu.label} runs with interrupts off (RFLAGS.IF is 0) {where}; {what} waits"
    registers = {"rflags": vcpu.rflags, "rip": vcpu.rip}
    stages.append(Stage(f"{cpu.label} RFLAGS.IF", f"interrupts {interrupts}, rip {vcpu.rip:#x}", reason, registers))

    shadow = vcpu.interrupts_on and not vcpu.interruptible and not vcpu.event_pending
    reason = f"{cpu.label} is in the shadow of STI or MOV SS, for one instruction; {what} waits" if shadow else ""
    stages.append(Stage(f"{cpu.label} shadow", "STI or MOV SS" if shadow else "none", reason if waiting else ""))

    words = f"{first or 'nothing'} first"
    if vcpu.event_pending:
        words = "an event is on its way"
        first = "the event that is on its way into its handler"
    elif vcpu.nmis and vcpu.nmi_allowed and what != NMI_WORDS:
        first, words = "an NMI", "an NMI first"
    reason = f"{cpu.label} takes {first} first; {what} waits" if waiting and first else ""
    stages.append(Stage(f"{cpu.label} entry", words, reason))
    return stages


def _state_stage(cpu: Cpu, what: str, waiting: bool) -> Stage:
    vcpu = cpu.vcpu
    name = f"{cpu.label} state"
    words = vcpu.state
    reason = ""
    if vcpu.state == "wait-for-sipi":
        reason = f"{cpu.label} waits for a start-up IPI: nobody has started it"
    elif vcpu.init_pending:
        words, reason = (
            f"{words}, an INIT waits",
            f"an INIT resets {cpu.label} first; {what} is lost" if waiting else "",
        )
    elif cpu.ended:
        words, reason = f"{words}, the VM has ended", f"the VM has ended; {what} waits" if waiting else ""
    elif cpu.paused:
        words, reason = f"{words}, the VM is paused", f"the VM is paused; {what} waits" if waiting else ""
    return Stage(name, words, reason, {"sipi_waits": vcpu.sipi >= 0, "init_waits": vcpu.init_pending})


def delivered_stage(cpu: Cpu, vector: int) -> Stage:
    count = cpu.vcpu.delivered[vector]
    words = f"vector {vector:#x} {times(count)}"
    ago = cpu.vcpu.ago.get(vector)
    if ago is None:
        return Stage(f"{cpu.label} delivered", words, "", {"count": count})
    words += f", the last time {duration(ago)} ago"
    return Stage(f"{cpu.label} delivered", words, "", {"count": count, "ago_ns": ago})


def times(count: int) -> str:
    """Say how often something was delivered."""
    return "never taken" if not count else "taken once" if count == 1 else f"taken {count:,} times"
