"""The 8254 interval timer of a PC/AT: channel 0 drives IRQ 0, channel 2 the speaker, port 0x61 gates it.

Intel 8254 datasheet, "Mode Definitions" and "Read Operations"; ICH9 datasheet, "NMI Status and Control Register" for
port 0x61. Counts are computed from the clock, nothing runs between events. A count takes effect when it is written
(modes 2 and 3 start a new period at once), without the one clock that the chip takes to load it.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

from pyhyve.base.protocols import Clock, IrqPin, Timers
from pyhyve.vmm.io.access import OPEN_BUS, read_bytes, write_bytes
from pyhyve.vmm.io.deadline import MIN_PERIOD_NS, Deadline

PIT_HZ: Final = 1_193_182
PORTS: Final = (0x40, 0x41, 0x42, 0x43, 0x61)
_NS: Final = 1_000_000_000
_MIN_PERIOD: Final = MIN_PERIOD_NS * PIT_HZ // _NS + 1
_REFRESH: Final = 18
"""Half a period of the refresh request that bit 4 of port 0x61 shows: 15 microseconds."""

_LOW, _HIGH, _BOTH = 1, 2, 3
_GATE2: Final = 0x01
_PORT61_WRITABLE: Final = 0x0F


@dataclass(frozen=True, slots=True)
class PitChannelV1:
    """`elapsed`: ticks since the count was (re)started; the rest is as in `_Channel`."""

    mode: int
    access: int
    bcd: bool
    count: int
    elapsed: int
    held: int | None
    triggered: bool
    gate: bool
    low_byte: int | None
    read_high: bool
    latched: int | None
    status: int | None


@dataclass(frozen=True, slots=True)
class VatpitV1:
    SCHEMA: ClassVar[tuple[str, int]] = ("vatpit", 1)
    channels: tuple[PitChannelV1, ...]
    port61: int
    irq0_level: bool


class _Channel:
    """One counter. Times (`now`, `start`) are ticks of the 8254's clock since the VM's began.

    count: the initial count, 1-65536, 0 before one is written. start: when counting (re)started. held: the ticks
    counted so far while the gate holds the count, else None. triggered: modes 1 and 5 have seen a rising gate.
    """

    __slots__ = (
        "access", "bcd", "count", "gate", "held", "latched", "low_byte", "mode", "read_high", "start", "status",
        "triggered",
    )  # fmt: skip

    def __init__(self, gate: bool) -> None:
        self.gate = gate
        self.start = 0
        self.count = 0
        self.low_byte: int | None = None
        self.latched: int | None = None
        self.status: int | None = None
        self.control(3, _BOTH, False)

    def control(self, mode: int, access: int, bcd: bool) -> None:
        """A control word: the output goes to its initial state and a new count is awaited."""
        self.mode = mode
        self.access = access
        self.bcd = bcd
        self.count = 0
        self.held: int | None = 0
        self.triggered = False
        self.low_byte = None
        self.read_high = False
        self.latched = None
        self.status = None

    def load(self, value: int, now: int) -> None:
        """Start with the count written (two bytes, binary or BCD; 0 is the largest)."""
        if self.bcd:
            value = sum((value >> 4 * digit & 15) * 10**digit for digit in range(4))
        self.count = value or (10_000 if self.bcd else 0x10000)
        if self.mode in (1, 5):
            return  # the count is used from the next trigger on
        self.start = now
        self.held = None if self.gate else 0

    def set_gate(self, gate: bool, now: int) -> None:
        """See "Gate Pin Operations": a level in modes 0 and 4, an edge in 1 and 5, both in 2 and 3."""
        if gate == self.gate:
            return
        self.gate = gate
        mode = self.mode
        if mode in (1, 5):
            if gate and self.count:
                self.start = now
                self.held = None
                self.triggered = True
        elif not gate:
            self.held = self.elapsed(now) if mode in (0, 4) else 0
        elif self.count:
            self.start = now - (self.held or 0)
            self.held = None

    def elapsed(self, now: int) -> int:
        """Ticks counted since the start."""
        return now - self.start if self.held is None else self.held

    def output(self, now: int) -> bool:
        if not self.count:
            return self.mode != 0
        ticks = self.elapsed(now)
        mode = self.mode
        if mode == 0:
            return ticks >= self.count
        if self.held is not None:
            return True
        if mode == 1:
            return ticks >= self.count
        if mode == 2:
            return ticks % self.count != self.count - 1
        if mode == 3:
            return ticks % self.count < (self.count + 1) >> 1
        return ticks != self.count

    def value(self, now: int) -> int:
        """The counting element, two bytes as they are read."""
        if not self.count:
            return 0
        ticks = self.elapsed(now)
        modulus = 10_000 if self.bcd else 0x10000
        if self.mode == 2:
            value = self.count - ticks % self.count
        elif self.mode == 3:
            half = (self.count + 1) >> 1
            phase = ticks % self.count
            value = (self.count & ~1) - 2 * (phase if phase < half else phase - half)
        else:
            value = self.count - ticks
        value %= modulus
        if self.bcd:
            value = int(str(value), 16)
        return value

    def latch_status(self, now: int) -> None:
        if self.status is None:
            null = 0 if self.count else 0x40
            self.status = self.output(now) << 7 | null | self.access << 4 | self.mode << 1 | self.bcd

    def latch_count(self, now: int) -> None:
        if self.latched is None:
            self.latched = self.value(now)

    def read(self, now: int) -> int:
        """One byte: a latched status first, then a latched count, else the count as it runs."""
        if self.status is not None:
            status, self.status = self.status, None
            return status
        value = self.value(now) if self.latched is None else self.latched
        if self.access == _BOTH:
            high = self.read_high
            self.read_high = not high
            if high:
                self.latched = None
        else:
            high = self.access == _HIGH
            self.latched = None
        return value >> 8 if high else value & 0xFF

    def write(self, value: int, now: int) -> bool:
        """One byte of a count; True when the count is complete and has been loaded."""
        if self.access == _LOW:
            self.load(value, now)
        elif self.access == _HIGH:
            self.load(value << 8, now)
        elif self.low_byte is None:
            self.low_byte = value
            if self.mode == 0:
                self.count = 0  # "Mode 0": the first byte disables counting
            return False
        else:
            self.load(value << 8 | self.low_byte, now)
            self.low_byte = None
        return True

    def next_event(self, now: int) -> int | None:
        """When the output rises next, None if it does not by itself."""
        if not self.count or self.held is not None or self.mode in (1, 5):
            return None
        ticks = self.elapsed(now)
        if self.mode in (0, 4):
            if ticks >= self.count:
                return None
            ticks = self.count
        else:
            if self.count < _MIN_PERIOD:
                ticks += _MIN_PERIOD
            ticks = (ticks // self.count + 1) * self.count
        return self.start + ticks

    def save(self, now: int) -> PitChannelV1:
        return PitChannelV1(
            self.mode, self.access, self.bcd, self.count, now - self.start, self.held, self.triggered, self.gate,
            self.low_byte, self.read_high, self.latched, self.status,
        )  # fmt: skip

    def restore(self, state: PitChannelV1, now: int) -> None:
        self.mode, self.access, self.bcd, self.count = state.mode, state.access, state.bcd, state.count
        self.start = now - state.elapsed
        self.held, self.triggered, self.gate = state.held, state.triggered, state.gate
        self.low_byte, self.read_high = state.low_byte, state.read_high
        self.latched, self.status = state.latched, state.status


class Vatpit:
    """The three counters and port 0x61. `irq0` is held in mode 0 after terminal count and pulsed in the others."""

    __slots__ = ("_channels", "_clock", "_deadline", "_irq0", "_irq0_level", "_port61")

    def __init__(self, clock: Clock, timers: Timers, irq0: IrqPin) -> None:
        self._clock = clock
        self._irq0 = irq0
        self._irq0_level = False
        self._deadline = Deadline(clock, timers, self._wake)
        self._channels = (_Channel(True), _Channel(True), _Channel(False))
        self._port61 = 0

    def reset(self) -> None:
        self._channels = (_Channel(True), _Channel(True), _Channel(False))
        self._port61 = 0
        self._deadline.clear()
        self._drive(False)

    def output(self, channel: int) -> bool:
        """The OUT line of a channel (0-2)."""
        return self._channels[channel].output(self._ticks())

    def _ticks(self) -> int:
        return self._clock.now() * PIT_HZ // _NS

    # -- ports --------------------------------------------------------------------------------------------------------

    def read(self, port: int, size: int) -> int:
        return self._read(port) if size == 1 else read_bytes(self._read, port, size)

    def write(self, port: int, size: int, value: int) -> None:
        if size == 1:
            self._write(port, value & 0xFF)
        else:
            write_bytes(self._write, port, size, value)

    def _read(self, port: int) -> int:
        now = self._ticks()
        if 0x40 <= port <= 0x42:
            return self._channels[port - 0x40].read(now)
        if port == 0x61:
            refresh = now // _REFRESH & 1
            return self._port61 | refresh << 4 | self._channels[2].output(now) << 5
        return OPEN_BUS

    def _write(self, port: int, value: int) -> None:
        now = self._ticks()
        if 0x40 <= port <= 0x42:
            if self._channels[port - 0x40].write(value, now):
                if port == 0x40:
                    self._restart(now)
            elif port == 0x40 and self._channels[0].mode == 0:
                self._restart(now)
        elif port == 0x43:
            self._control(value, now)
        elif port == 0x61:
            self._port61 = value & _PORT61_WRITABLE
            self._channels[2].set_gate(bool(value & _GATE2), now)

    def _control(self, value: int, now: int) -> None:
        """See "Control Word Format", "Counter Latch Command", "Read-Back Command"."""
        select, access, mode = value >> 6, value >> 4 & 3, value >> 1 & 7
        if select == 3:
            for index, channel in enumerate(self._channels):
                if value >> (index + 1) & 1:
                    if not value & 0x20:
                        channel.latch_count(now)
                    if not value & 0x10:
                        channel.latch_status(now)
        elif access == 0:
            self._channels[select].latch_count(now)
        else:
            self._channels[select].control(mode & 3 if mode > 5 else mode, access, bool(value & 1))
            if select == 0:
                self._restart(now)

    # -- IRQ 0 --------------------------------------------------------------------------------------------------------

    def _restart(self, now: int) -> None:
        """Channel 0 was programmed: the line falls (mode 0 holds it) and the next event is booked."""
        self._drive(False)
        self._book(now)

    def _book(self, now: int) -> None:
        at = self._channels[0].next_event(now)
        if at is None:
            self._deadline.clear()
        else:
            self._deadline.set(-(-at * _NS // PIT_HZ))

    def _wake(self) -> None:
        if not self._deadline.due():
            return
        if self._channels[0].mode == 0:
            self._drive(True)
        else:
            self._irq0.pulse()
            self._book(self._ticks())

    def _drive(self, level: bool) -> None:
        if level != self._irq0_level:
            self._irq0_level = level
            self._irq0.set_level(level)

    # -- saved state --------------------------------------------------------------------------------------------------

    def save(self) -> VatpitV1:
        now = self._ticks()
        return VatpitV1(tuple(channel.save(now) for channel in self._channels), self._port61, self._irq0_level)

    def restore(self, state: VatpitV1) -> None:
        now = self._ticks()
        for channel, saved in zip(self._channels, state.channels, strict=True):
            channel.restore(saved, now)
        self._port61 = state.port61
        self._drive(state.irq0_level)
        self._book(now)
