"""The high-precision event timer: one counter of 10 MHz and 64 bits, and eight comparators.

IA-PC HPET specification, "Register Definitions". Its timers may be routed to I/O APIC pins 20 to 23 (level- or
edge-triggered), be sent as messages (FSB), or stand in for IRQ 0 and 8 (legacy replacement). Each can be made one of 32
bits.

Matches are found when somebody looks (a register, a wake-up), from the time that has passed: a late look counts all of
them, and interrupts once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

from pyhyve.base.protocols import Clock, IrqPin, MsiSink, Timers
from pyhyve.vmm.io.deadline import MIN_PERIOD_NS, Deadline

HPET_HZ: Final = 10_000_000
HPET_PERIOD_FS: Final = 100_000_000
TICK_NS: Final = 100
NUM_TIMERS: Final = 8
ROUTES: Final = 0x00F00000
"""The I/O APIC pins that a timer may be routed to: 20 to 23."""
_LOW: Final = 0xFFFFFFFF
_MASK: Final = 0xFFFFFFFF_FFFFFFFF
_NEVER: Final = 1 << 62
"""Nanoseconds; a match behind this is not worth a wake-up."""

# Registers, offsets.
CAPABILITIES: Final = 0x000
CONFIG: Final = 0x010
STATUS: Final = 0x020
COUNTER: Final = 0x0F0
TIMERS: Final = 0x100
_TIMER_CONFIG, _TIMER_COMPARATOR, _TIMER_FSB = 0, 1, 2

# "General Capabilities and ID Register".
CAP_64BIT: Final = 1 << 13
CAP_LEGACY: Final = 1 << 15
_CAP_BASE: Final = HPET_PERIOD_FS << 32 | 0x8086 << 16 | CAP_64BIT | (NUM_TIMERS - 1) << 8 | 0x01
CONFIG_ENABLE: Final = 1 << 0
CONFIG_LEGACY: Final = 1 << 1

# "Timer N Configuration and Capabilities Register".
T_LEVEL: Final = 1 << 1
T_ENABLE: Final = 1 << 2
T_PERIODIC: Final = 1 << 3
T_CAP_PERIODIC: Final = 1 << 4
T_CAP_64BIT: Final = 1 << 5
T_VALUE_SET: Final = 1 << 6
T_32BIT: Final = 1 << 8
T_ROUTE_SHIFT: Final = 9
T_ROUTE: Final = 0x1F << T_ROUTE_SHIFT
T_FSB: Final = 1 << 14
T_CAP_FSB: Final = 1 << 15
_T_WRITABLE: Final = T_LEVEL | T_ENABLE | T_PERIODIC | T_VALUE_SET | T_32BIT | T_ROUTE | T_FSB
_T_CAPABILITIES: Final = ROUTES << 32 | T_CAP_PERIODIC | T_CAP_64BIT | T_CAP_FSB


@dataclass(frozen=True, slots=True)
class HpetTimerV1:
    """`due_in`: ticks to the next match, None while the counter stands. `wake_in`: nanoseconds to the wake-up."""

    config: int
    comparator: int
    period: int
    fsb: int
    due_in: int | None
    wake_in: int | None


@dataclass(frozen=True, slots=True)
class VhpetV1:
    SCHEMA: ClassVar[tuple[str, int]] = ("vhpet", 1)
    config: int
    status: int
    counter: int
    fraction_ns: int
    timers: tuple[HpetTimerV1, ...]


class _Timer:
    """One comparator. period: what is added at each match in periodic mode, in ticks. due: the ticks after the start of
    the counter at which the next match comes, None while it stands. held: the pin it holds."""

    __slots__ = ("comparator", "config", "deadline", "due", "fsb", "held", "period", "pins")

    def __init__(self, deadline: Deadline, pins: dict[int, IrqPin]) -> None:
        self.deadline = deadline
        self.pins = pins
        self.held: IrqPin | None = None
        self.clear()

    def clear(self) -> None:
        self.config = 0
        self.comparator = _MASK
        self.period = 0
        self.fsb = 0
        self.due: int | None = None
        self.deadline.clear()

    @property
    def mask(self) -> int:
        """The bits of the counter that are compared."""
        return _LOW if self.config & T_32BIT else _MASK

    @property
    def step(self) -> int:
        """Ticks from one match to the next: the period, or until the counter has come round."""
        return self.period if self.config & T_PERIODIC and self.period else self.mask + 1

    def pass_matches(self, elapsed: int) -> bool:
        """Count the matches up to now; return whether there were any. The accumulator grows by a period at each."""
        if self.due is None or elapsed < self.due:
            return False
        step = self.step
        ticks = ((elapsed - self.due) // step + 1) * step
        self.due += ticks
        self.comparator = self.comparator + ticks & self.mask
        return True


class Vhpet:
    """The register block of 0x400 bytes.

    pin(n) makes a source of I/O APIC pin n (called here for each timer and each pin it may have). legacy_pins: sources
    that stand for IRQ 0 and IRQ 8; with them the block offers legacy replacement, and `on_legacy` is told when it
    begins and ends: the PIT and the RTC are then kept off the same lines.
    """

    __slots__ = ("_base", "_bus", "_clock", "_config", "_counter", "_legacy_pins", "_on_legacy", "_status", "_timers")

    def __init__(
        self,
        clock: Clock,
        timers: Timers,
        bus: MsiSink,
        pin: Callable[[int], IrqPin],
        legacy_pins: tuple[IrqPin, IrqPin] | None = None,
        on_legacy: Callable[[bool], None] | None = None,
    ) -> None:
        self._clock = clock
        self._bus = bus
        self._legacy_pins = legacy_pins
        self._on_legacy = on_legacy
        routes = [n for n in range(32) if ROUTES >> n & 1]
        self._timers = tuple(
            _Timer(Deadline(clock, timers, partial(self._wake, index)), {n: pin(n) for n in routes})
            for index in range(NUM_TIMERS)
        )
        self._config = 0
        self._status = 0
        self._counter = 0
        self._base = 0

    @property
    def legacy(self) -> bool:
        """True while timers 0 and 1 stand in for the PIT (IRQ 0) and the RTC (IRQ 8)."""
        return bool(self._config & CONFIG_LEGACY)

    def reset(self) -> None:
        for timer in self._timers:
            timer.clear()
        self._status = 0
        self._set_config(0)
        self._counter = 0

    def counter(self) -> int:
        """Return the main counter: 100 ns ticks, 0 <= n < 2**64."""
        if self._config & CONFIG_ENABLE:
            return self._counter + self._elapsed() & _MASK
        return self._counter

    def _elapsed(self) -> int:
        """Ticks since the counter was started."""
        return (self._clock.now() - self._base) // TICK_NS

    # -- registers ----------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Any width; what is not a register reads as 0."""
        value = self._read(offset & 0x3F8)
        return value >> (8 * (offset & 7)) & ((1 << (8 * size)) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write 32 or 64 bits, aligned; other accesses are ignored."""
        if size not in (4, 8) or offset & (size - 1):
            return
        shift = 8 * (offset & 7)
        mask = ((1 << (8 * size)) - 1) << shift
        register = offset & 0x3F8
        value = value << shift & mask
        if register == CONFIG:
            self._settle_all()
            self._set_config(self._config & ~mask | value)
        elif register == STATUS:
            self._settle_all()
            self._write_status(value)
        elif register == COUNTER:
            if not self._config & CONFIG_ENABLE:
                self._counter = self._counter & ~mask | value
        elif TIMERS <= register < TIMERS + 0x20 * NUM_TIMERS:
            index, which = divmod(register - TIMERS, 0x20)
            self._settle(index)
            self._write_timer(index, which >> 3, value, mask)

    def _read(self, register: int) -> int:
        if register == COUNTER:
            return self.counter()
        if register == CAPABILITIES:
            return _CAP_BASE | (CAP_LEGACY if self._legacy_pins else 0)
        if register == CONFIG:
            return self._config
        if register == STATUS:
            self._settle_all()
            return self._status
        if TIMERS <= register < TIMERS + 0x20 * NUM_TIMERS:
            index, which = divmod(register - TIMERS, 0x20)
            timer = self._timers[index]
            if which >> 3 == _TIMER_CONFIG:
                return timer.config & ~T_VALUE_SET | _T_CAPABILITIES
            if which >> 3 == _TIMER_COMPARATOR:
                self._settle(index)
                return timer.comparator
            if which >> 3 == _TIMER_FSB:
                return timer.fsb
        return 0

    def _set_config(self, value: int) -> None:
        """Start or stop the counter; comparators keep their values while it stands."""
        old = self._config
        new = value & (CONFIG_ENABLE | (CONFIG_LEGACY if self._legacy_pins else 0))
        if new & CONFIG_ENABLE and not old & CONFIG_ENABLE:
            self._base = self._clock.now()
        elif old & CONFIG_ENABLE and not new & CONFIG_ENABLE:
            self._counter = self.counter()
        self._config = new
        if (old ^ new) & CONFIG_LEGACY and self._on_legacy is not None:
            self._on_legacy(bool(new & CONFIG_LEGACY))
        for index in range(NUM_TIMERS):
            if (old ^ new) & CONFIG_ENABLE:
                self._start(index)
            self._drive(index)

    def _write_status(self, value: int) -> None:
        """See "General Interrupt Status Register": a 1 written drops the bit and the pin."""
        dropped = self._status & value
        self._status &= ~value
        for index in range(NUM_TIMERS):
            if dropped >> index & 1:
                self._drive(index)

    def _write_timer(self, index: int, which: int, value: int, mask: int) -> None:
        timer = self._timers[index]
        if which == _TIMER_CONFIG:
            self._write_timer_config(index, (timer.config & ~mask | value) & _T_WRITABLE)
        elif which == _TIMER_COMPARATOR:
            if mask & timer.mask:
                self._write_comparator(index, value & timer.mask, mask & timer.mask)
        elif which == _TIMER_FSB:
            timer.fsb = timer.fsb & ~mask | value

    def _write_timer_config(self, index: int, value: int) -> None:
        """A route that is not allowed reads back as 0, which is how a guest learns of it."""
        timer = self._timers[index]
        if not ROUTES >> (value >> T_ROUTE_SHIFT & 0x1F) & 1:
            value &= ~T_ROUTE
        if not value & T_PERIODIC:
            value &= ~T_VALUE_SET
        old, timer.config = timer.config, value
        timer.comparator &= timer.mask
        timer.period &= timer.mask
        if not value & T_LEVEL:
            self._status &= ~(1 << index)
        self._drive(index)
        if (old ^ value) & (T_PERIODIC | T_32BIT):
            self._start(index)
        elif (old ^ value) & (T_ENABLE | T_LEVEL):
            self._book(timer)

    def _write_comparator(self, index: int, value: int, mask: int) -> None:
        """Write the bits of `mask`. In periodic mode they are the period's, and the accumulator's too if VALUE_SET came
        before, which a write uses up. "Timer N Comparator Value Register"."""
        timer = self._timers[index]
        timer.period = timer.period & ~mask | value
        if timer.config & T_PERIODIC and not timer.config & T_VALUE_SET:
            return
        timer.config &= ~T_VALUE_SET
        timer.comparator = timer.comparator & ~mask | value
        self._start(index)

    # -- time ---------------------------------------------------------------------------------------------------------

    def _start(self, index: int) -> None:
        """Find the next match of a timer: the counter reaches the comparator in 1 tick to a whole turn."""
        timer = self._timers[index]
        if self._config & CONFIG_ENABLE:
            elapsed = self._elapsed()
            timer.due = elapsed + ((timer.comparator - self._counter - elapsed) & timer.mask or timer.mask + 1)
        else:
            timer.due = None
        self._book(timer)

    def _book(self, timer: _Timer) -> None:
        """Wake up for the next match, if it can be seen; where matches come thick, for the last of many."""
        if timer.due is None or not timer.config & (T_ENABLE | T_LEVEL):
            timer.deadline.clear()
            return
        at = self._base + timer.due * TICK_NS
        if timer.step * TICK_NS < MIN_PERIOD_NS:
            at = max(at, self._clock.now() + MIN_PERIOD_NS)
        if at < _NEVER:
            timer.deadline.set(at)
        else:
            timer.deadline.clear()

    def _settle_all(self) -> None:
        for index in range(NUM_TIMERS):
            self._settle(index)

    def _settle(self, index: int) -> None:
        """Bring a timer up to date, and interrupt once for what has come since the last look."""
        timer = self._timers[index]
        if timer.due is not None and timer.pass_matches(self._elapsed()):
            self._book(timer)
            self._interrupt(index)

    def _wake(self, index: int) -> None:
        if self._timers[index].deadline.due():
            self._settle(index)

    def _interrupt(self, index: int) -> None:
        timer = self._timers[index]
        if self._as_message(index):
            if timer.config & T_ENABLE:
                self._bus.send_msi(timer.fsb >> 32, timer.fsb & _LOW)
        elif timer.config & T_LEVEL:
            self._status |= 1 << index
            self._drive(index)
        elif timer.config & T_ENABLE:
            pin = self._pin_of(index)
            if pin is not None:
                pin.pulse()

    def _replaces(self, index: int) -> bool:
        """Whether the timer stands in for a legacy one: then its own routing has no effect."""
        return index < 2 and bool(self._config & CONFIG_LEGACY)

    def _as_message(self, index: int) -> bool:
        return bool(self._timers[index].config & T_FSB) and not self._replaces(index)

    def _pin_of(self, index: int) -> IrqPin | None:
        """The pin that the timer is routed to, None if it has no (allowed) route."""
        if self._legacy_pins is not None and self._replaces(index):
            return self._legacy_pins[index]
        timer = self._timers[index]
        return timer.pins.get(timer.config >> T_ROUTE_SHIFT & 0x1F)

    def _drive(self, index: int) -> None:
        """Hold the right pin while a level-triggered interrupt is pending, and no other."""
        timer = self._timers[index]
        pin = None
        level = timer.config & (T_LEVEL | T_ENABLE) == T_LEVEL | T_ENABLE
        if level and self._status >> index & 1 and not self._as_message(index):
            pin = self._pin_of(index)
        if pin is not timer.held:
            if timer.held is not None:
                timer.held.set_level(False)
            timer.held = pin
            if pin is not None:
                pin.set_level(True)

    # -- saved state --------------------------------------------------------------------------------------------------

    def save(self) -> VhpetV1:
        now = self._clock.now()
        running = self._config & CONFIG_ENABLE
        elapsed = self._elapsed() if running else 0
        return VhpetV1(
            config=self._config,
            status=self._status,
            counter=self.counter(),
            fraction_ns=(now - self._base) % TICK_NS if running else 0,
            timers=tuple(
                HpetTimerV1(
                    timer.config,
                    timer.comparator,
                    timer.period,
                    timer.fsb,
                    None if timer.due is None else timer.due - elapsed,
                    None if timer.deadline.at is None else timer.deadline.at - now,
                )
                for timer in self._timers
            ),
        )

    def restore(self, state: VhpetV1) -> None:
        """Take over a saved state, and hold the pins that it holds."""
        now = self._clock.now()
        if (self._config ^ state.config) & CONFIG_LEGACY and self._on_legacy is not None:
            self._on_legacy(bool(state.config & CONFIG_LEGACY))
        self._config = state.config
        self._status = state.status
        self._counter = state.counter
        self._base = now - state.fraction_ns
        for index, (timer, saved) in enumerate(zip(self._timers, state.timers, strict=True)):
            timer.config, timer.comparator = saved.config, saved.comparator
            timer.period, timer.fsb, timer.due = saved.period, saved.fsb, saved.due_in
            if saved.wake_in is None:
                timer.deadline.clear()
            else:
                timer.deadline.set(now + saved.wake_in)
            self._drive(index)
