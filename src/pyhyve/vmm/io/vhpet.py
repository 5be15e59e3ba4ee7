"""The high-precision event timer: one counter of 10 MHz and eight comparators, all of 32 bits.

IA-PC HPET specification, "Register Definitions". The first device here with level-triggered interrupts: its timers may
be routed to I/O APIC pins 20 to 23, as messages (FSB), or to IRQ 0 and 8 (legacy replacement).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

from pyhyve.base.protocols import Clock, IrqPin, MsiSink, Timers
from pyhyve.vmm.io.deadline import Deadline, next_period

HPET_HZ: Final = 10_000_000
HPET_PERIOD_FS: Final = 100_000_000
TICK_NS: Final = 100
NUM_TIMERS: Final = 8
ROUTES: Final = 0x00F00000
"""The I/O APIC pins that a timer may be routed to: 20 to 23."""
_MASK: Final = 0xFFFFFFFF

# Registers, offsets.
CAPABILITIES: Final = 0x000
CONFIG: Final = 0x010
STATUS: Final = 0x020
COUNTER: Final = 0x0F0
TIMERS: Final = 0x100
_TIMER_CONFIG, _TIMER_COMPARATOR, _TIMER_FSB = 0, 1, 2

# "General Capabilities and ID Register".
_CAP_LEGACY: Final = 1 << 15
_CAP_BASE: Final = HPET_PERIOD_FS << 32 | 0x8086 << 16 | (NUM_TIMERS - 1) << 8 | 0x01
CONFIG_ENABLE: Final = 1 << 0
CONFIG_LEGACY: Final = 1 << 1

# "Timer N Configuration and Capabilities Register".
T_LEVEL: Final = 1 << 1
T_ENABLE: Final = 1 << 2
T_PERIODIC: Final = 1 << 3
T_CAP_PERIODIC: Final = 1 << 4
T_VALUE_SET: Final = 1 << 6
T_32BIT: Final = 1 << 8
T_ROUTE_SHIFT: Final = 9
T_ROUTE: Final = 0x1F << T_ROUTE_SHIFT
T_FSB: Final = 1 << 14
T_CAP_FSB: Final = 1 << 15
_T_WRITABLE: Final = T_LEVEL | T_ENABLE | T_PERIODIC | T_VALUE_SET | T_32BIT | T_ROUTE | T_FSB
_T_CAPABILITIES: Final = ROUTES << 32 | T_CAP_PERIODIC | T_CAP_FSB


@dataclass(frozen=True, slots=True)
class HpetTimerV1:
    """`due_in`: nanoseconds to the deadline, None if there is none."""

    config: int
    comparator: int
    period: int
    fsb: int
    due_in: int | None


@dataclass(frozen=True, slots=True)
class VhpetV1:
    SCHEMA: ClassVar[tuple[str, int]] = ("vhpet", 1)
    config: int
    status: int
    counter: int
    fraction_ns: int
    timers: tuple[HpetTimerV1, ...]


class _Timer:
    """One comparator. period: what is added at each match in periodic mode, in ticks. held: the pin it holds."""

    __slots__ = ("comparator", "config", "deadline", "fsb", "held", "period", "pins")

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
        self.deadline.clear()


class Vhpet:
    """The register block of 0x400 bytes.

    pin(n) makes a source of I/O APIC pin n (called here for each timer and each pin it may have). legacy_pins: sources
    that stand for IRQ 0 and IRQ 8; with them the block offers legacy replacement, and whoever wires the PIT and the RTC
    consults `legacy` to keep them off the same lines.
    """

    __slots__ = ("_base", "_bus", "_clock", "_config", "_counter", "_legacy_pins", "_status", "_timers")

    def __init__(
        self,
        clock: Clock,
        timers: Timers,
        bus: MsiSink,
        pin: Callable[[int], IrqPin],
        legacy_pins: tuple[IrqPin, IrqPin] | None = None,
    ) -> None:
        self._clock = clock
        self._bus = bus
        self._legacy_pins = legacy_pins
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
        self._config = 0
        self._status = 0
        self._counter = 0
        for index, timer in enumerate(self._timers):
            timer.clear()
            self._drive(index)

    def counter(self) -> int:
        """Return the main counter: 100 ns ticks, 0 <= n < 2**32."""
        if self._config & CONFIG_ENABLE:
            return (self._counter + (self._clock.now() - self._base) // TICK_NS) & _MASK
        return self._counter

    # -- registers ----------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
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
            self._write_config(self._config & ~mask | value)
        elif register == STATUS:
            self._write_status(value)
        elif register == COUNTER:
            if not self._config & CONFIG_ENABLE:
                self._counter = (self._counter & ~mask | value) & _MASK
        elif TIMERS <= register < TIMERS + 0x20 * NUM_TIMERS:
            index, which = divmod(register - TIMERS, 0x20)
            self._write_timer(index, which >> 3, value, mask)

    def _read(self, register: int) -> int:
        if register == COUNTER:
            return self.counter()
        if register == CAPABILITIES:
            return _CAP_BASE | (_CAP_LEGACY if self._legacy_pins else 0)
        if register == CONFIG:
            return self._config
        if register == STATUS:
            return self._status
        if TIMERS <= register < TIMERS + 0x20 * NUM_TIMERS:
            index, which = divmod(register - TIMERS, 0x20)
            timer = self._timers[index]
            if which >> 3 == _TIMER_CONFIG:
                return timer.config | _T_CAPABILITIES
            if which >> 3 == _TIMER_COMPARATOR:
                return timer.comparator
            if which >> 3 == _TIMER_FSB:
                return timer.fsb
        return 0

    def _write_config(self, value: int) -> None:
        """Start or stop the counter; comparators keep their values while it stands."""
        old = self._config
        new = value & (CONFIG_ENABLE | (CONFIG_LEGACY if self._legacy_pins else 0))
        if new & CONFIG_ENABLE and not old & CONFIG_ENABLE:
            self._base = self._clock.now()
        elif old & CONFIG_ENABLE and not new & CONFIG_ENABLE:
            self._counter = self.counter()
        self._config = new
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
            if mask & _MASK:
                self._write_comparator(index, value & _MASK)
        elif which == _TIMER_FSB:
            timer.fsb = timer.fsb & ~mask | value

    def _write_timer_config(self, index: int, value: int) -> None:
        """A route that is not allowed reads back as 0, which is how a guest learns of it."""
        timer = self._timers[index]
        if not ROUTES >> (value >> T_ROUTE_SHIFT & 0x1F) & 1:
            value &= ~T_ROUTE
        old, timer.config = timer.config, value
        if not value & T_LEVEL:
            self._status &= ~(1 << index)
        self._drive(index)
        if (old ^ value) & T_PERIODIC:
            self._start(index)

    def _write_comparator(self, index: int, value: int) -> None:
        """In periodic mode a write gives the period, and the comparator too if it follows VAL_SET. "Timer N Comparator
        Value Register"."""
        timer = self._timers[index]
        timer.period = value
        if not timer.config & T_PERIODIC:
            timer.comparator = value
        elif timer.config & T_VALUE_SET:
            timer.config &= ~T_VALUE_SET
            timer.comparator = value
        self._start(index)

    # -- time ---------------------------------------------------------------------------------------------------------

    def _start(self, index: int) -> None:
        """Book the next match of a timer: the counter reaches the comparator in 1 to 2**32 ticks."""
        timer = self._timers[index]
        if not self._config & CONFIG_ENABLE:
            timer.deadline.clear()
            return
        now = self._clock.now()
        elapsed = (now - self._base) // TICK_NS
        ticks = (timer.comparator - self._counter - elapsed) & _MASK or 1 << 32
        timer.deadline.set(self._base + (elapsed + ticks) * TICK_NS)

    def _wake(self, index: int) -> None:
        timer = self._timers[index]
        at = timer.deadline.at
        if not timer.deadline.due() or at is None or not self._config & CONFIG_ENABLE:
            return
        if timer.config & T_PERIODIC:
            if timer.period:
                following = next_period(at, timer.period * TICK_NS, self._clock.now())
                timer.comparator = (timer.comparator + (following - at) // TICK_NS) & _MASK
                timer.deadline.set(following)
        else:
            self._start(index)
        self._interrupt(index)

    def _interrupt(self, index: int) -> None:
        timer = self._timers[index]
        if timer.config & T_FSB:
            if timer.config & T_ENABLE:
                self._bus.send_msi(timer.fsb >> 32, timer.fsb & _MASK)
        elif timer.config & T_LEVEL:
            self._status |= 1 << index
            self._drive(index)
        elif timer.config & T_ENABLE:
            pin = self._pin_of(index)
            if pin is not None:
                pin.pulse()

    def _pin_of(self, index: int) -> IrqPin | None:
        """The pin that the timer is routed to, None if it has no (allowed) route."""
        if self._legacy_pins is not None and self._config & CONFIG_LEGACY and index < 2:
            return self._legacy_pins[index]
        timer = self._timers[index]
        return timer.pins.get(timer.config >> T_ROUTE_SHIFT & 0x1F)

    def _drive(self, index: int) -> None:
        """Hold the right pin while a level-triggered interrupt is pending, and no other."""
        timer = self._timers[index]
        pin = None
        if self._status >> index & 1 and timer.config & (T_LEVEL | T_ENABLE | T_FSB) == T_LEVEL | T_ENABLE:
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
                    None if timer.deadline.at is None else timer.deadline.at - now,
                )
                for timer in self._timers
            ),
        )

    def restore(self, state: VhpetV1) -> None:
        now = self._clock.now()
        self._config = state.config
        self._status = state.status
        self._counter = state.counter
        self._base = now - state.fraction_ns
        for index, (timer, saved) in enumerate(zip(self._timers, state.timers, strict=True)):
            timer.config, timer.comparator = saved.config, saved.comparator
            timer.period, timer.fsb = saved.period, saved.fsb
            if saved.due_in is None:
                timer.deadline.clear()
            else:
                timer.deadline.set(now + saved.due_in)
            self._drive(index)
