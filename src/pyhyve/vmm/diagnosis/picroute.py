"""From an input of the 8259 pair to the bootstrap processor, by its INTR line."""

from typing import Final

from pyhyve.base.explanation import Stage
from pyhyve.vmm.diagnosis.processor import MODES, Cpu, cpus, delivered_stage, entry_stages
from pyhyve.vmm.diagnosis.snapshot import Snapshot
from pyhyve.vmm.io.apicbus import EXTINT
from pyhyve.vmm.io.apicregs import LVT_LINT0, LVT_MASKED
from pyhyve.vmm.io.vatpic import PicV1, Vatpic

CASCADE: Final = 2
INPUTS: Final = 16
_SPURIOUS: Final = 15
_SPECIAL_NESTING: Final = 0x10


def has_input(irq: int) -> bool:
    return 0 <= irq < INPUTS and irq != CASCADE


def _chip(snapshot: Snapshot, irq: int) -> tuple[PicV1, int, str]:
    """The chip of an input, its bit there, and its name."""
    if irq < 8:
        return snapshot.pic.master, irq, "master 8259"
    return snapshot.pic.slave, irq - 8, "slave 8259"


def vector_of(snapshot: Snapshot, irq: int) -> int:
    pic, line, _ = _chip(snapshot, irq)
    return pic.base | line


def is_open(snapshot: Snapshot, irq: int) -> bool:
    """Whether the 8259s would pass the input on: initialized and not masked."""
    pic, line, _ = _chip(snapshot, irq)
    master = snapshot.pic.master
    through = pic is master or (master.ready and not master.mask >> CASCADE & 1)
    return pic.ready and not pic.mask >> line & 1 and through


def waits(snapshot: Snapshot, irq: int) -> bool:
    """Whether the 8259s have the input's request and raise INTR, be it for this one or for another."""
    pic, line, _ = _chip(snapshot, irq)
    return (snapshot.pic.output and bool(pic.request >> line & 1)) or is_spurious(snapshot, irq)


def is_spurious(snapshot: Snapshot, irq: int) -> bool:
    """Whether IRQ 15 comes though nothing asks for it: the slave has withdrawn what the master still asks for."""
    slave = snapshot.pic.slave
    if irq != _SPURIOUS or slave.request & ~slave.mask & 1 << 7:
        return False
    return _next(snapshot) == vector_of(snapshot, irq)


def _next(snapshot: Snapshot) -> int | None:
    """The vector that the 8259s would give now, None if INTR is low."""
    if not snapshot.pic.output:
        return None
    # The chip itself knows best: a copy is acknowledged.
    copy = Vatpic(lambda level: None)
    copy.restore(snapshot.pic)
    return copy.acknowledge()


def _first(snapshot: Snapshot, bootstrap: Cpu, vector: int) -> str:
    """What the bootstrap processor would take before `vector`."""
    if bootstrap.vcpu.next_vector is not None:
        return f"vector {bootstrap.vcpu.next_vector:#x} of its local APIC"
    chosen = _next(snapshot)
    return "" if chosen in (None, vector) else f"vector {chosen:#x} of the 8259s"


def input_stages(snapshot: Snapshot, irq: int) -> list[Stage]:
    """All stages of an ISA interrupt on its way through the 8259s."""
    pic, line, chip = _chip(snapshot, irq)
    levels = snapshot.pic.levels[irq]
    asserters = sum(levels)
    bit = 1 << line
    requested = bool(pic.request & bit)
    spurious = is_spurious(snapshot, irq)
    masked = bool(pic.mask & bit)
    in_service = bool(pic.service & bit)
    stages = [_line_stage(irq, asserters, len(levels), quiet=not (requested or in_service or masked or spurious))]
    reason = ""
    if not pic.ready:
        reason = f"the {chip} has not been initialized (no ICW1 to ICW4 since power-up, or not all of them)"
    stages.append(Stage(f"{chip} set-up", f"base vector {pic.base:#x}" if pic.ready else "not initialized", reason))
    kind = "level" if pic.elcr & bit else "edge"
    reason = ""
    if kind == "edge" and asserters and not requested and not in_service and not masked:
        reason = (
            f"IRQ {irq} is edge-triggered at the {chip} and has stayed high since its last edge: it must fall first"
        )
    stages.append(Stage(f"{chip} trigger", f"{kind}-triggered (ELCR {pic.elcr:#04x})", reason, {"elcr": pic.elcr}))
    words = f"{'requested' if requested else 'not requested'} (IRR {pic.request:#04x})"
    if spurious:
        words += "; spurious: the slave has withdrawn what it asked the master for"
    stages.append(Stage(f"{chip} IRR", words, "", {"irr": pic.request}))
    reason = f"IRQ {irq} is masked at the {chip} (IMR {pic.mask:#04x})" if masked and not spurious else ""
    stages.append(Stage(f"{chip} IMR", f"{'masked' if masked else 'open'} (IMR {pic.mask:#04x})", reason))
    service = _service_stage(pic, line, f"IRQ {irq}", chip, requested)
    stages.append(Stage(service.name, service.state, "", service.registers) if spurious else service)
    if chip.startswith("slave"):
        stages += _cascade_stages(snapshot.pic.master, spurious or (requested and not masked))
    waiting = waits(snapshot, irq)
    bootstrap = cpus(snapshot)[0]
    stages.append(_intr_stage(bootstrap, snapshot.pic.output, waiting))
    vector = pic.base | line
    stages += entry_stages(bootstrap, f"IRQ {irq} (vector {vector:#x})", waiting, _first(snapshot, bootstrap, vector))
    return [*stages, delivered_stage(bootstrap, vector)]


def _line_stage(irq: int, asserters: int, sources: int, quiet: bool) -> Stage:
    reason = ""
    if quiet and not asserters:
        reason = f"nothing asserts IRQ {irq} (none of its {sources} sources), and nothing waits"
    return Stage("ISA line", f"IRQ {irq}, held by {asserters} of {sources} sources", reason, {"asserters": asserters})


def _service_stage(pic: PicV1, line: int, what: str, chip: str, waiting: bool) -> Stage:
    """Levels in service block themselves and those of lower priority ("Fully Nested Mode")."""
    words = f"ISR {pic.service:#04x}, lowest priority {pic.lowest}"
    if pic.special_mask:
        words += ", special mask mode"
    blocking = pic.service & ~pic.mask if pic.special_mask else pic.service
    reason = ""
    if blocking >> line & 1:
        reason = f"{what} is in service at the {chip} (ISR {pic.service:#04x}): no EOI has come"
    elif waiting:
        for step in range(1, 9):
            other = pic.lowest + step & 7
            if other == line:
                break
            if blocking >> other & 1:
                reason = f"the {chip}'s input {other}, of higher priority, is in service (ISR {pic.service:#04x})"
                break
    return Stage(f"{chip} ISR", words, reason, {"isr": pic.service, "lowest": pic.lowest})


def _cascade_stages(master: PicV1, waiting: bool) -> list[Stage]:
    bit = 1 << CASCADE
    masked = bool(master.mask & bit)
    reason = f"the cascade (IRQ 2) is masked at the master 8259 (IMR {master.mask:#04x})" if masked else ""
    stages = [Stage("master 8259 IMR", f"{'masked' if masked else 'open'} (IMR {master.mask:#04x})", reason)]
    service = _service_stage(master, CASCADE, "the cascade (IRQ 2)", "master 8259", waiting)
    if master.icw4 & _SPECIAL_NESTING and master.service & bit:
        service = Stage(service.name, f"{service.state}, special fully nested", "", service.registers)
    return [*stages, service]


def _intr_stage(cpu: Cpu, output: bool, waiting: bool) -> Stage:
    """The 8259s' output and the local APIC's pin that it is on."""
    lvt = cpu.vlapic.regs[LVT_LINT0]
    mode = lvt >> 8 & 7
    level = "high" if output else "low"
    reason = ""
    if not cpu.hardware_enabled:
        words = f"INTR {level}, straight to {cpu.label} (its local APIC is off)"
    else:
        masked = bool(lvt & LVT_MASKED)
        words = f"INTR {level}; LINT0 of {cpu.label}: {MODES[mode]}{', masked' if masked else ''} (LVT {lvt:#x})"
        if cpu.vlapic.extint_latched:
            words += ", an ExtINT message waits"
        elif masked:
            off = "" if cpu.software_enabled else "; while an APIC is disabled by software, every LVT entry is masked"
            reason = f"the 8259s' INTR is masked at LINT0 of {cpu.label} (LVT {lvt:#x}{off})"
        elif mode != EXTINT:
            reason = f"LINT0 of {cpu.label} has the delivery mode {MODES[mode]}, not ExtINT (LVT {lvt:#x})"
    return Stage("8259 INTR", words, reason if waiting else "", {"lint0": lvt, "output": int(output)})
