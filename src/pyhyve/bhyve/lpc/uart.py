"""A 16550A: the serial port that a PC's kernels print on before they can do anything else.

Only the chip is here: no bus, no lock, no VM. Whoever wires it serializes the calls, gives it a pin and a sink, and
feeds its receiver no faster than `room()` allows. Bytes leave at once (no baud rate is kept), so the transmitter is
always empty.

Source: National Semiconductor PC16550D data sheet, "Registers" and "FIFO Interrupt Mode Operation".
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from pyhyve.base.protocols import IrqPin

FIFO_DEPTH: Final = 16

# Register offsets; 0 and 1 are the divisor latch while LCR.DLAB is set.
RBR: Final = 0
THR: Final = 0
IER: Final = 1
IIR: Final = 2
FCR: Final = 2
LCR: Final = 3
MCR: Final = 4
LSR: Final = 5
MSR: Final = 6
SCR: Final = 7

IER_RX_DATA: Final = 0x01
IER_TX_EMPTY: Final = 0x02
IER_LINE_STATUS: Final = 0x04
IER_MODEM_STATUS: Final = 0x08
IER_MASK: Final = 0x0F

IIR_NONE: Final = 0x01
IIR_MODEM_STATUS: Final = 0x00
IIR_TX_EMPTY: Final = 0x02
IIR_RX_DATA: Final = 0x04
IIR_LINE_STATUS: Final = 0x06
IIR_RX_TIMEOUT: Final = 0x0C
IIR_FIFOS: Final = 0xC0

FCR_ENABLE: Final = 0x01
FCR_RX_RESET: Final = 0x02
FCR_DMA: Final = 0x08
FCR_TRIGGER: Final = 0xC0
TRIGGER_LEVELS: Final = (1, 4, 8, 14)

LCR_DLAB: Final = 0x80

MCR_DTR: Final = 0x01
MCR_RTS: Final = 0x02
MCR_OUT1: Final = 0x04
MCR_OUT2: Final = 0x08
MCR_LOOPBACK: Final = 0x10
MCR_MASK: Final = 0x1F

LSR_DATA_READY: Final = 0x01
LSR_OVERRUN: Final = 0x02
LSR_THR_EMPTY: Final = 0x20
LSR_TX_IDLE: Final = 0x40

MSR_DELTA_CTS: Final = 0x01
MSR_DELTA_DSR: Final = 0x02
MSR_TRAILING_RI: Final = 0x04
MSR_DELTA_DCD: Final = 0x08
MSR_CTS: Final = 0x10
MSR_DSR: Final = 0x20
MSR_RI: Final = 0x40
MSR_DCD: Final = 0x80

_PEER_LINES: Final = MSR_CTS | MSR_DSR | MSR_DCD
_BYTES: Final = tuple(bytes((value,)) for value in range(256))


@dataclass(frozen=True, slots=True)
class UartV1:
    """Everything that a guest can tell one 16550A from another by."""

    SCHEMA: ClassVar = ("uart-16550", 1)

    ier: int
    fcr: int
    lcr: int
    mcr: int
    lsr: int
    msr: int
    scr: int
    divisor: int
    tx_interrupt: bool
    fifo: bytes


class Uart:
    """16550A registers only: no bus, lock or VM. `irq` is level-high; each transmitted byte is passed to `sink`.

    The interrupt does not go through MCR.OUT2, which gates it on a PC's board, not in the chip.
    """

    def __init__(self, irq: IrqPin, sink: Callable[[bytes], None]) -> None:
        self._irq = irq
        self._sink = sink
        self.on_room: Callable[[], None] | None = None
        """Called when the receiver has run empty or has begun to listen, at the end of the access that did it."""
        self.on_flushed: Callable[[bytes], None] | None = None
        """Called with what came from the line and the guest has now thrown away unread."""
        self._fifo: deque[int] = deque()
        self._line = False
        self._reset_registers()

    def _reset_registers(self) -> None:
        self._ier = 0
        self._fcr = 0
        self._lcr = 0
        self._mcr = 0
        self._lsr = LSR_THR_EMPTY | LSR_TX_IDLE
        self._msr = _PEER_LINES
        self._scr = 0
        self._divisor = 1
        self._tx_interrupt = False
        self._direct = True  # THR is reached, and leads outside: neither DLAB nor loopback
        self._fifo.clear()
        self._looped = False  # the receiver holds what the guest itself sent

    def reset(self) -> None:
        """Master reset: registers as at power-on, receiver empty, interrupt dropped."""
        self._reset_registers()
        self._update_irq()

    # The guest's side

    def read(self, offset: int, size: int) -> int:
        """Return `size` bytes of registers from `offset` (0-7), little-endian; beyond the chip, all ones."""
        if offset == LSR and size == 1:
            value = self._lsr
            if value & LSR_OVERRUN:
                self._lsr = value & ~LSR_OVERRUN
                self._update_irq()
            return value
        value = 0
        for i in range(size):
            value |= self._read_register(offset + i) << 8 * i
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Store the low `size` bytes of `value` in the registers from `offset`; beyond the chip they are dropped."""
        if offset == THR and size == 1 and self._direct:
            self._sink(_BYTES[value & 0xFF])
            if self._ier & IER_TX_EMPTY and not self._tx_interrupt:
                self._tx_interrupt = True
                self._update_irq()
            return
        for i in range(size):
            self._write_register(offset + i, value >> 8 * i & 0xFF)

    def _read_register(self, offset: int) -> int:
        dlab = self._lcr & LCR_DLAB
        if offset == RBR:
            return self._divisor & 0xFF if dlab else self._read_rbr()
        if offset == IER:
            return self._divisor >> 8 if dlab else self._ier
        if offset == IIR:
            cause = self._cause()
            if cause == IIR_TX_EMPTY:
                self._tx_interrupt = False
                self._update_irq()
            return cause | (IIR_FIFOS if self._fcr & FCR_ENABLE else 0)
        if offset == LCR:
            return self._lcr
        if offset == MCR:
            return self._mcr
        if offset == LSR:
            return self.read(LSR, 1)
        if offset == MSR:
            value = self._msr
            self._msr &= 0xF0
            self._update_irq()
            return value
        if offset == SCR:
            return self._scr
        return 0xFF

    def _read_rbr(self) -> int:
        if not self._fifo:
            return 0
        value = self._fifo.popleft()
        if not self._fifo:
            self._looped = False
            self._lsr &= ~LSR_DATA_READY
        self._update_irq()
        if not self._fifo:
            self._tell_room()
        return value

    def _write_register(self, offset: int, value: int) -> None:
        dlab = self._lcr & LCR_DLAB
        if offset == THR:
            if dlab:
                self._divisor = self._divisor & 0xFF00 | value
            else:
                self._transmit(value)
        elif offset == IER:
            if dlab:
                self._divisor = self._divisor & 0x00FF | value << 8
            else:
                self._write_ier(value & IER_MASK)
        elif offset == FCR:
            self._write_fcr(value)
        elif offset == LCR:
            self._lcr = value
            self._direct = not (value & LCR_DLAB or self._mcr & MCR_LOOPBACK)
        elif offset == MCR:
            self._write_mcr(value & MCR_MASK)
        elif offset == SCR:
            self._scr = value

    def _transmit(self, value: int) -> None:
        if self._mcr & MCR_LOOPBACK:
            self._looped = True
            self._push(value)
        else:
            self._sink(_BYTES[value])
        self._tx_interrupt = True
        self._update_irq()

    def _write_ier(self, value: int) -> None:
        risen = value & ~self._ier
        self._ier = value
        if risen & IER_TX_EMPTY:
            self._tx_interrupt = True  # the transmitter is empty now, and always
        self._update_irq()
        if risen & IER_RX_DATA:
            self._tell_room()

    def _write_fcr(self, value: int) -> None:
        toggled = (value ^ self._fcr) & FCR_ENABLE
        # The other bits are taken only together with the enable bit.
        self._fcr = value & (FCR_ENABLE | FCR_DMA | FCR_TRIGGER) if value & FCR_ENABLE else 0
        emptied = bool(self._fifo) and bool(toggled or (self._fcr and value & FCR_RX_RESET))
        flushed = bytes(self._fifo) if emptied and not self._looped else b""
        if emptied:
            self._fifo.clear()
            self._looped = False
            self._lsr &= ~LSR_DATA_READY
        self._update_irq()
        if flushed and self.on_flushed is not None:
            self.on_flushed(flushed)
        if emptied:
            self._tell_room()

    def _write_mcr(self, value: int) -> None:
        before = self._mcr
        listened = self.listening
        self._mcr = value
        self._direct = not (value & MCR_LOOPBACK or self._lcr & LCR_DLAB)
        if value & MCR_LOOPBACK:
            lines = (
                (MSR_CTS if value & MCR_RTS else 0)
                | (MSR_DSR if value & MCR_DTR else 0)
                | (MSR_RI if value & MCR_OUT1 else 0)
                | (MSR_DCD if value & MCR_OUT2 else 0)
            )
        else:
            lines = _PEER_LINES
        self._set_modem_lines(lines)
        self._update_irq()
        if (before & MCR_LOOPBACK and not value & MCR_LOOPBACK) or (self.listening and not listened):
            self._tell_room()

    def _set_modem_lines(self, lines: int) -> None:
        changed = (self._msr ^ lines) & 0xF0
        deltas = (changed >> 4) & (MSR_DELTA_CTS | MSR_DELTA_DSR | MSR_DELTA_DCD)
        if changed & MSR_RI and not lines & MSR_RI:
            deltas |= MSR_TRAILING_RI
        self._msr = lines | self._msr & 0x0F | deltas

    # The receiver's side

    def receive(self, data: bytes) -> None:
        """Take bytes from the line. What exceeds `room()` is lost, as in hardware, and sets the overrun bit."""
        if self._mcr & MCR_LOOPBACK:
            return  # the receiver is cut off from the line
        for value in data:
            self._push(value)
        self._update_irq()

    def room(self) -> int:
        """Return how many bytes `receive()` takes now without loss: 0-16, or 0-1 while the FIFO is off."""
        if self._mcr & MCR_LOOPBACK:
            return 0
        return self._capacity() - len(self._fifo)

    @property
    def listening(self) -> bool:
        """Whether the guest shows that it wants input: it takes receive interrupts, or it holds RTS.

        Input given to a kernel before that is what its driver throws away when it opens the port.
        """
        return bool(self._ier & IER_RX_DATA or self._mcr & MCR_RTS) and not self._mcr & MCR_LOOPBACK

    def _capacity(self) -> int:
        return FIFO_DEPTH if self._fcr & FCR_ENABLE else 1

    def _push(self, value: int) -> None:
        if len(self._fifo) < self._capacity():
            self._fifo.append(value)
            self._lsr |= LSR_DATA_READY
            return
        self._lsr |= LSR_OVERRUN
        if not self._fcr & FCR_ENABLE:
            self._fifo[0] = value  # without a FIFO the newer character replaces the one not read

    def _tell_room(self) -> None:
        if self.on_room is not None:
            self.on_room()

    # Interrupts

    def _cause(self) -> int:
        """Return the identification of the pending interrupt of highest priority, or IIR_NONE.

        Characters below the trigger level have no more to wait for when `receive()` returns: they time out at once.
        """
        ier = self._ier
        if ier & IER_LINE_STATUS and self._lsr & LSR_OVERRUN:
            return IIR_LINE_STATUS
        if ier & IER_RX_DATA and self._fifo:
            if self._fcr & FCR_ENABLE and len(self._fifo) < TRIGGER_LEVELS[self._fcr >> 6]:
                return IIR_RX_TIMEOUT
            return IIR_RX_DATA
        if ier & IER_TX_EMPTY and self._tx_interrupt:
            return IIR_TX_EMPTY
        if ier & IER_MODEM_STATUS and self._msr & 0x0F:
            return IIR_MODEM_STATUS
        return IIR_NONE

    def _update_irq(self) -> None:
        line = self._cause() != IIR_NONE
        if line != self._line:
            self._line = line
            self._irq.set_level(line)

    # State

    def save(self) -> UartV1:
        return UartV1(
            ier=self._ier,
            fcr=self._fcr,
            lcr=self._lcr,
            mcr=self._mcr,
            lsr=self._lsr,
            msr=self._msr,
            scr=self._scr,
            divisor=self._divisor,
            tx_interrupt=self._tx_interrupt,
            fifo=bytes(self._fifo),
        )

    def restore(self, state: UartV1) -> None:
        """Become what was saved, and drive the pin accordingly."""
        self._ier = state.ier
        self._fcr = state.fcr
        self._lcr = state.lcr
        self._mcr = state.mcr
        self._lsr = state.lsr
        self._msr = state.msr
        self._scr = state.scr
        self._divisor = state.divisor
        self._tx_interrupt = state.tx_interrupt
        self._fifo = deque(state.fifo)
        self._direct = not (state.lcr & LCR_DLAB or state.mcr & MCR_LOOPBACK)
        self._update_irq()
