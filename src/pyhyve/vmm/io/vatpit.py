"""The 8254 interval timer of a PC/AT: channel 0 drives IRQ 0, channel 2 the speaker, port 0x61 gates it.

Intel 8254 datasheet, "Mode Definitions" and "Read Operations"; ICH9 datasheet, "NMI Status and Control Register" for
port 0x61. Counts are computed from the clock, nothing runs between events. A count is loaded by a pulse of the 8254's
clock: the next one, the one behind a trigger, or the last one of a period, as the mode has it.
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
    """The fields are `_Channel`'s."""

    mode: int
    access: int
    bcd: bool
    count: int
    start: int
    held: int | None
    written: int
    load_at: int | None
    at_boundary: bool
    risen: int | None
    gate: bool
    low_byte: int | None
    read_high: bool
    latched: int | None
    status: int | None


@dataclass(frozen=True, slots=True)
class VatpitV1:
    """`elapsed_ns`: the chip's age, in which its channels' times are. `seen`: the last edge that IRQ 0 was given.
    `wake_in`: nanoseconds to the next one."""

    SCHEMA: ClassVar[tuple[str, int]] = ("vatpit", 1)
    elapsed_ns: int
    channels: tuple[PitChannelV1, ...]
    port61: int
    irq0_level: bool
    seen: int
    wake_in: int | None


class _Channel:
    """One counter. Times (`now`, `start`) are ticks of the 8254's clock since its power-up; `settle` comes first.

    count: what the counting element was loaded with, 1-65536, 0 before the first load. start: when that was (in mode 3,
    when the high half began). held: the ticks counted so far while the count stands, else None. written: a count that
    waits to be loaded, 0 if there is none. load_at: when that (or the old count again) is loaded, None if nothing has
    asked for it yet. at_boundary: by the end of a period, or half of one. risen: the last rise of the output before
    `start`.
    """

    __slots__ = (
        "access", "at_boundary", "bcd", "count", "gate", "held", "latched", "load_at", "low_byte", "mode", "read_high",
        "risen", "start", "status", "written",
    )  # fmt: skip

    def __init__(self, gate: bool) -> None:
        self.gate = gate
        self.control(3, _BOTH, False)

    def control(self, mode: int, access: int, bcd: bool) -> None:
        """A control word: the output goes to its initial state and a new count is awaited."""
        self.mode = mode
        self.access = access
        self.bcd = bcd
        self.count = 0
        self.start = 0
        self.held: int | None = 0
        self.written = 0
        self.load_at: int | None = None
        self.at_boundary = False
        self.risen: int | None = None
        self.low_byte: int | None = None
        self.read_high = False
        self.latched: int | None = None
        self.status: int | None = None

    # -- loading ------------------------------------------------------------------------------------------------------

    def settle(self, now: int) -> None:
        """Load the counting element, if the time has come."""
        at = self.load_at
        if at is None or now < at:
            return
        self.risen = self.last_rise(at)
        into_low_half = self.mode == 3 and self.at_boundary and not self._ends_low_half(at)
        self.count = self.written or self.count
        self.start = at - (self.count + 1 >> 1) if into_low_half else at
        self.written = 0
        self.load_at = None
        self.at_boundary = False
        self.held = None if self.gate or self.mode in (1, 5) else 0

    def _ends_low_half(self, at: int) -> bool:
        return (at - self.start) % self.count == 0

    def _take(self, value: int, now: int) -> None:
        """A whole count has been written (two bytes, binary or BCD; 0 is the largest)."""
        if self.bcd:
            value = sum((value >> 4 * digit & 15) * 10**digit for digit in range(4))
        self.written = value or (10_000 if self.bcd else 0x10000)
        if self.mode in (1, 5) or self.load_at is not None:
            return  # by the next trigger; as asked for already
        if self.mode in (0, 4) or not self.count:
            self.load_at = now + 1
        elif self.held is None:
            self.load_at = self._boundary(now)
            self.at_boundary = True

    def _boundary(self, now: int) -> int:
        """The end of this period (mode 2) or half period (mode 3)."""
        periods, phase = divmod(now - self.start, self.count)
        begun = self.start + periods * self.count
        half = self.count + 1 >> 1
        return begun + half if self.mode == 3 and phase < half else begun + self.count

    def set_gate(self, gate: bool, now: int) -> None:
        """See "Gate Pin Operations": a level in modes 0 and 4, an edge in 1 and 5, both in 2 and 3."""
        if gate == self.gate:
            return
        self.gate = gate
        if self.mode in (0, 4):
            if not gate:
                self._hold(now)
            elif self.held is not None and not self._half_written():
                self.start = now - self.held
                self.held = None
        elif gate:
            if self.written or self.count:
                self.load_at = now + 1
                self.at_boundary = False
        elif self.mode in (2, 3):
            self._hold(now)
            if self.at_boundary:
                self.load_at = None
                self.at_boundary = False

    def _half_written(self) -> bool:
        """Mode 0: the first byte of a count stops the old one."""
        return self.mode == 0 and self.low_byte is not None

    def _hold(self, now: int) -> None:
        if self.held is None:
            self.held = now - self.start

    def write(self, value: int, now: int) -> None:
        """One byte of a count."""
        if self.access == _LOW:
            self._take(value, now)
        elif self.access == _HIGH:
            self._take(value << 8, now)
        elif self.low_byte is None:
            self.low_byte = value
            if self.mode == 0:
                self._hold(now)
        else:
            self._take(value << 8 | self.low_byte, now)
            self.low_byte = None

    # -- counting -----------------------------------------------------------------------------------------------------

    def elapsed(self, now: int) -> int:
        """Ticks counted since the start."""
        return now - self.start if self.held is None else self.held

    def output(self, now: int) -> bool:
        mode = self.mode
        if mode == 0:
            new = self.written or self.low_byte is not None
            return bool(self.count) and not new and self.elapsed(now) >= self.count
        if not self.count:
            return True
        ticks = self.elapsed(now)
        if mode == 1:
            return ticks >= self.count
        if mode in (4, 5):
            return ticks != self.count
        if self.held is not None:
            return True
        phase = ticks % self.count
        return phase != self.count - 1 if mode == 2 else phase < self.count + 1 >> 1

    def value(self, now: int) -> int:
        """The counting element, two bytes as they are read."""
        if not self.count:
            return 0
        ticks = self.elapsed(now)
        if self.mode == 2:
            value = self.count - ticks % self.count
        elif self.mode == 3:
            half = self.count + 1 >> 1
            phase = ticks % self.count
            value = (self.count & ~1) - 2 * (phase if phase < half else phase - half)
        else:
            value = self.count - ticks
        if self.bcd:
            return int(str(value % 10_000), 16)
        return value % 0x10000

    def last_rise(self, now: int) -> int | None:
        """When the output rose last by counting, None if it has not since the control word."""
        if not self.count or self.held is not None:
            return self.risen
        ticks = now - self.start
        if self.mode in (2, 3):
            periods = ticks // self.count
            return self.start + periods * self.count if periods else self.risen
        after = self._one_shot_rise(self.count)
        return self.start + after if ticks >= after else self.risen

    def _one_shot_rise(self, count: int) -> int:
        """Ticks from a load to the rise, in modes 0, 1, 4 and 5."""
        return count + 1 if self.mode in (4, 5) else count

    def next_rise(self, now: int) -> int | None:
        """When the output rises next by counting, as far as is known; None if it does not."""
        if self.load_at is not None:
            count = self.written or self.count
            if self.at_boundary:
                whole = self.mode == 2 or self._ends_low_half(self.load_at)
                return self.load_at if whole else self.load_at + (count >> 1)
            return self.load_at + (count if self.mode in (2, 3) else self._one_shot_rise(count))
        if not self.count or self.held is not None:
            return None
        ticks = now - self.start
        if self.mode in (2, 3):
            if self.count < _MIN_PERIOD:
                ticks += _MIN_PERIOD
            return self.start + (ticks // self.count + 1) * self.count
        after = self._one_shot_rise(self.count)
        return None if ticks >= after else self.start + after

    # -- reading ------------------------------------------------------------------------------------------------------

    def latch_status(self, now: int) -> None:
        if self.status is None:
            null = 0x40 if self.written or not self.count else 0
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

    def save(self) -> PitChannelV1:
        return PitChannelV1(**{name: getattr(self, name) for name in PitChannelV1.__slots__})

    def restore(self, state: PitChannelV1) -> None:
        for name in PitChannelV1.__slots__:
            setattr(self, name, getattr(state, name))


class Vatpit:
    """The three counters and port 0x61. `irq0` is held in mode 0 after terminal count and pulsed in the others."""

    __slots__ = ("_base", "_channels", "_clock", "_deadline", "_irq0", "_irq0_level", "_port61", "_seen")

    def __init__(self, clock: Clock, timers: Timers, irq0: IrqPin) -> None:
        self._clock = clock
        self._base = clock.now()
        self._irq0 = irq0
        self._irq0_level = False
        self._deadline = Deadline(clock, timers, self._wake)
        self._channels = (_Channel(True), _Channel(True), _Channel(False))
        self._port61 = 0
        self._seen = 0

    def reset(self) -> None:
        self._channels = (_Channel(True), _Channel(True), _Channel(False))
        self._port61 = 0
        self._deadline.clear()
        self._drive(False)

    def output(self, channel: int) -> bool:
        """The OUT line of a channel (0-2)."""
        return self._channels[channel].output(self._settle())

    def _settle(self) -> int:
        """Return the present tick, with every channel up to date."""
        now = (self._clock.now() - self._base) * PIT_HZ // _NS
        for channel in self._channels:
            channel.settle(now)
        return now

    # -- ports --------------------------------------------------------------------------------------------------------

    def read(self, port: int, size: int) -> int:
        return self._read(port) if size == 1 else read_bytes(self._read, port, size)

    def write(self, port: int, size: int, value: int) -> None:
        if size == 1:
            self._write(port, value & 0xFF)
        else:
            write_bytes(self._write, port, size, value)

    def _read(self, port: int) -> int:
        now = self._settle()
        if 0x40 <= port <= 0x42:
            return self._channels[port - 0x40].read(now)
        if port == 0x61:
            refresh = now // _REFRESH & 1
            return self._port61 | refresh << 4 | self._channels[2].output(now) << 5
        return OPEN_BUS

    def _write(self, port: int, value: int) -> None:
        now = self._settle()
        self._give_edge(now)
        if 0x40 <= port <= 0x42:
            self._channels[port - 0x40].write(value, now)
        elif port == 0x43:
            self._control(value, now)
        elif port == 0x61:
            self._port61 = value & _PORT61_WRITABLE
            self._channels[2].set_gate(bool(value & _GATE2), now)
        if port in (0x40, 0x43):
            channel = self._channels[0]
            self._drive(channel.mode == 0 and channel.output(now))
            self._book(now)

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

    # -- IRQ 0 --------------------------------------------------------------------------------------------------------

    def _book(self, now: int) -> None:
        """Wake up for the next edge of channel 0."""
        at = self._channels[0].next_rise(now)
        if at is None:
            self._deadline.clear()
        else:
            self._deadline.set(self._base - (-at * _NS // PIT_HZ))

    def _wake(self) -> None:
        if self._deadline.due():
            now = self._settle()
            self._give_edge(now)
            self._book(now)

    def _give_edge(self, now: int) -> None:
        """Interrupt once for all edges of channel 0 since the last one that was given: a late wake-up merges them."""
        channel = self._channels[0]
        rise = channel.last_rise(now)
        if rise is None or rise <= self._seen:
            return
        self._seen = rise
        if channel.mode == 0:
            self._drive(channel.output(now))
        else:
            self._irq0.pulse()

    def _drive(self, level: bool) -> None:
        if level != self._irq0_level:
            self._irq0_level = level
            self._irq0.set_level(level)

    # -- saved state --------------------------------------------------------------------------------------------------

    def save(self) -> VatpitV1:
        now = self._clock.now()
        return VatpitV1(
            now - self._base,
            tuple(channel.save() for channel in self._channels),
            self._port61,
            self._irq0_level,
            self._seen,
            None if self._deadline.at is None else self._deadline.at - now,
        )

    def restore(self, state: VatpitV1) -> None:
        """Take over a saved state, and hold IRQ 0 if it did."""
        now = self._clock.now()
        self._base = now - state.elapsed_ns
        for channel, saved in zip(self._channels, state.channels, strict=True):
            channel.restore(saved)
        self._port61 = state.port61
        self._drive(state.irq0_level)
        self._seen = state.seen
        if state.wake_in is None:
            self._deadline.clear()
        else:
            self._deadline.set(now + state.wake_in)
