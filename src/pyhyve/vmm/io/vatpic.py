"""The pair of 8259A interrupt controllers of a PC/AT, with the ELCR of the EISA and PCI chip sets.

Intel 8259A datasheet, "Programming the 8259A" and "Fully Nested Mode"; for the edge/level control registers ICH9
datasheet, "8259 Interrupt Controllers (PIC)", whose 8259s have no LTIM bit: ELCR takes its place. An edge stays
latched until it is acknowledged, as under bhyve; so does the slave's on the master's input 2, and what the slave has
withdrawn by then is a spurious IRQ 15.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from pyhyve.vmm.io.access import OPEN_BUS, read_bytes, write_bytes
from pyhyve.vmm.io.line import Line, LineSource

PORTS: Final = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)
_CASCADE: Final = 2
_SPURIOUS: Final = 7
_ELCR_WRITABLE: Final = (0xF8, 0xDE)
"""IRQ 0, 1, 2, 8 and 13 are edge-triggered for good."""

_ICW1: Final = 0x10
_ICW1_IC4: Final = 0x01
_ICW1_SINGLE: Final = 0x02
_ICW4_AEOI: Final = 0x02
_ICW4_SFNM: Final = 0x10
_OCW3: Final = 0x08


@dataclass(frozen=True, slots=True)
class PicV1:
    """One 8259A."""

    request: int
    service: int
    mask: int
    elcr: int
    base: int
    icw4: int
    lowest: int
    init_step: int
    needs_icw4: bool
    single: bool
    ready: bool
    read_service: bool
    poll: bool
    special_mask: bool
    rotate_aeoi: bool


@dataclass(frozen=True, slots=True)
class VatpicV1:
    SCHEMA: ClassVar[tuple[str, int]] = ("vatpic", 1)
    master: PicV1
    slave: PicV1
    levels: tuple[tuple[bool, ...], ...]
    output: bool
    slave_output: bool


class _Pic:
    """One 8259A: priorities and command words."""

    __slots__ = (
        "base", "elcr", "icw4", "init_step", "lines", "lowest", "mask", "needs_icw4", "poll", "read_service", "ready",
        "request", "rotate_aeoi", "service", "single", "special_mask",
    )  # fmt: skip

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.reset()

    def reset(self) -> None:
        self.request = 0
        self.service = 0
        self.mask = 0
        self.elcr = 0
        self.base = 0
        self.icw4 = 0
        self.lowest = 7
        self.init_step = 0
        self.needs_icw4 = False
        self.single = False
        self.ready = False
        self.read_service = False
        self.poll = False
        self.special_mask = False
        self.rotate_aeoi = False

    def resolve(self, special_nesting: int = 0) -> int:
        """The request to be served now, or -1. In-service levels block themselves and all below, except those of
        `special_nesting` (which block only what is below) and, in special mask mode, the masked ones."""
        if not self.ready:
            return -1
        requests = self.request & ~self.mask
        if not requests:
            return -1
        blocking = self.service & ~self.mask if self.special_mask else self.service
        for step in range(1, 9):
            irq = self.lowest + step & 7
            bit = 1 << irq
            if blocking & bit and not special_nesting & bit:
                return -1
            if requests & bit:
                return irq
            if blocking & bit:
                return -1
        return -1

    def accept(self, irq: int) -> None:
        """INTA for `irq`: into service (or ended at once by automatic EOI)."""
        bit = 1 << irq
        if not self.elcr & bit:
            self.request &= ~bit
        if not self.icw4 & _ICW4_AEOI:
            self.service |= bit
        elif self.rotate_aeoi:
            self.lowest = irq

    def command(self, value: int) -> None:
        """A write to the even port: ICW1, OCW2 or OCW3."""
        if value & _ICW1:
            self._icw1(value)
        elif value & _OCW3:
            if value & 0x04:
                self.poll = True
            if value & 0x02:
                self.read_service = bool(value & 0x01)
            if value & 0x40:
                self.special_mask = bool(value & 0x20)
        else:
            self._ocw2(value)

    def data(self, value: int) -> None:
        """A write to the odd port: ICW2-4 while initializing, else OCW1 (the mask)."""
        if self.init_step == 0:
            self.mask = value
            return
        if self.init_step == 2:
            self.base = value & 0xF8
            self.init_step = 3
            if not self.single:
                return
        elif self.init_step == 4:
            self.icw4 = value
        # After ICW3 (whose wiring is fixed here) or, on a single chip, after ICW2.
        if self.init_step == 3 and self.needs_icw4:
            self.init_step = 4
            return
        self.init_step = 0
        self.ready = True

    def _icw1(self, value: int) -> None:
        """Start the initialization sequence; of the requests only held level-triggered ones survive it."""
        self.request = 0
        for irq, line in enumerate(self.lines):
            if line.count and self.elcr >> irq & 1:
                self.request |= 1 << irq
        self.service = 0
        self.mask = 0
        self.icw4 = 0
        self.lowest = 7
        self.init_step = 2
        self.needs_icw4 = bool(value & _ICW1_IC4)
        self.single = bool(value & _ICW1_SINGLE)
        self.ready = False
        self.read_service = self.poll = self.special_mask = self.rotate_aeoi = False

    def _ocw2(self, value: int) -> None:
        rotate, specific, end = bool(value & 0x80), bool(value & 0x40), bool(value & 0x20)
        level = value & 7
        if end:
            irq = level if specific else self._highest_in_service()
            if irq < 0:
                return
            self.service &= ~(1 << irq)
            if rotate:
                self.lowest = irq
        elif specific:
            if rotate:
                self.lowest = level
        else:
            self.rotate_aeoi = rotate

    def _highest_in_service(self) -> int:
        """What a non-specific EOI ends; in special mask mode masked levels do not take part."""
        service = self.service & ~self.mask if self.special_mask else self.service
        for step in range(1, 9):
            irq = self.lowest + step & 7
            if service >> irq & 1:
                return irq
        return -1

    def save(self) -> PicV1:
        return PicV1(**{name: getattr(self, name) for name in PicV1.__slots__})

    def restore(self, state: PicV1) -> None:
        for name in PicV1.__slots__:
            setattr(self, name, getattr(state, name))


class Vatpic:
    """Both controllers, cascaded on IRQ 2. `notify(level)` is called when the INTR output changes."""

    __slots__ = ("_lines", "_master", "_notify", "_output", "_slave", "_slave_output")

    def __init__(self, notify: Callable[[bool], None]) -> None:
        self._notify = notify
        self._output = False
        self._slave_output = False
        self._master = _Pic()
        self._slave = _Pic()
        self._lines = [Line(self._on_change(irq)) for irq in range(16)]
        self._master.lines = self._lines[:8]
        self._slave.lines = self._lines[8:]

    def pin(self, irq: int) -> LineSource:
        """A new source of input `irq` (0-15 but 2, which is the cascade: ValueError)."""
        if not 0 <= irq < 16 or irq == _CASCADE:
            raise ValueError(f"8259 input {irq}: there are inputs 0 to 15, and 2 is the cascade")
        return self._lines[irq].source()

    def reset(self) -> None:
        """Power-up state: nothing is delivered before initialization. The pins keep their levels."""
        self._master.reset()
        self._slave.reset()
        self._slave_output = False
        self._update()

    # -- the processor's side -----------------------------------------------------------------------------------------

    def pending(self) -> bool:
        """The INTR output."""
        return self._output

    def acknowledge(self) -> int:
        """The INTA cycle: the vector to take. With nothing pending (any more) it is the spurious IRQ 7 or 15."""
        chip = self._master
        irq = self._resolve_master()
        if irq < 0:
            return chip.base | _SPURIOUS
        chip.accept(irq)
        if irq == _CASCADE and not chip.single:
            chip = self._slave
            irq = chip.resolve()
            if irq < 0:
                irq = _SPURIOUS
            else:
                chip.accept(irq)
            self._slave_output = False  # it falls in the cycle, and rises again where more is waiting
        self._update()
        return chip.base | irq

    # -- ports --------------------------------------------------------------------------------------------------------

    def read(self, port: int, size: int) -> int:
        return self._read(port) if size == 1 else read_bytes(self._read, port, size)

    def write(self, port: int, size: int, value: int) -> None:
        if size == 1:
            self._write(port, value & 0xFF)
        else:
            write_bytes(self._write, port, size, value)

    def _read(self, port: int) -> int:
        if port == 0x4D0:
            return self._master.elcr
        if port == 0x4D1:
            return self._slave.elcr
        if port & ~0x81 != 0x20:
            return OPEN_BUS
        pic = self._slave if port & 0x80 else self._master
        if pic.poll:
            return self._poll(pic)
        if port & 1:
            return pic.mask
        return pic.service if pic.read_service else pic.request

    def _poll(self, pic: _Pic) -> int:
        """See "Poll Command": the read is the acknowledge; bit 7 says that there was a request."""
        pic.poll = False
        irq = pic.resolve() if pic is self._slave else self._resolve_master()
        if irq < 0:
            return _SPURIOUS
        pic.accept(irq)
        if pic is self._slave:
            self._slave_output = False
            self._master.request &= ~(1 << _CASCADE)
        self._update()
        return 0x80 | irq

    def _write(self, port: int, value: int) -> None:
        if port == 0x4D0:
            self._write_elcr(self._master, value & _ELCR_WRITABLE[0])
        elif port == 0x4D1:
            self._write_elcr(self._slave, value & _ELCR_WRITABLE[1])
        elif port & ~0x81 == 0x20:
            pic = self._slave if port & 0x80 else self._master
            if port & 1:
                pic.data(value)
            else:
                pic.command(value)
                if value & _ICW1 and pic is self._master:
                    self._slave_output = False  # the cascade is looked at anew
        self._update()

    def _write_elcr(self, pic: _Pic, value: int) -> None:
        """Inputs that become level-triggered follow their lines from now on."""
        pic.elcr = value
        for irq, line in enumerate(pic.lines):
            bit = 1 << irq
            if value & bit:
                pic.request = pic.request | bit if line.count else pic.request & ~bit

    # -- inside -------------------------------------------------------------------------------------------------------

    def _on_change(self, irq: int) -> Callable[[bool], None]:
        bit = 1 << (irq & 7)

        def changed(asserted: bool) -> None:
            pic = self._slave if irq & 8 else self._master
            if asserted:
                pic.request |= bit
            elif pic.elcr & bit:
                pic.request &= ~bit
            self._update()

        return changed

    def _resolve_master(self) -> int:
        master = self._master
        return master.resolve(1 << _CASCADE if master.icw4 & _ICW4_SFNM else 0)

    def _update(self) -> None:
        slave_output = self._slave.resolve() >= 0
        if slave_output and not self._slave_output:
            self._master.request |= 1 << _CASCADE
        self._slave_output = slave_output
        output = self._resolve_master() >= 0
        if output != self._output:
            self._output = output
            self._notify(output)

    # -- saved state --------------------------------------------------------------------------------------------------

    def save(self) -> VatpicV1:
        levels = tuple(line.levels() for line in self._lines)
        return VatpicV1(self._master.save(), self._slave.save(), levels, self._output, self._slave_output)

    def restore(self, state: VatpicV1) -> None:
        """Take over a saved state; `notify` is not called (the local APIC restores its own pins)."""
        self._master.restore(state.master)
        self._slave.restore(state.slave)
        for line, levels in zip(self._lines, state.levels, strict=True):
            line.restore(levels)
        self._output = state.output
        self._slave_output = state.slave_output
