"""The MC146818 real-time clock with its CMOS memory.

Motorola MC146818A datasheet, "Registers", "Interrupts" and "Update Cycle". Time is computed from the clock; the chip
books one wake-up, for the next interrupt that is enabled. Flags are brought up to date when they are looked at.

What the guest sets the clock to is kept as a distance from the VM's clock. The divider, which makes the seconds and the
periodic interrupts, goes on while register B's SET holds the calendar: its phase is that of `_ns`. Daylight saving
(register B, DSE) is not done; a chip of today does not do it either. The day of the week follows the date.
"""

import time
from calendar import timegm
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import ClassVar, Final

from pyhyve.base.protocols import Clock, IrqPin, Timers
from pyhyve.vmm.io.access import OPEN_BUS, read_bytes, write_bytes
from pyhyve.vmm.io.deadline import Deadline

PORTS: Final = (0x70, 0x71)
_NS: Final = 1_000_000_000
_DAY: Final = 86_400
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_SECOND: Final = 253_402_300_799
"""The end of the year 9999: the registers cannot show more."""

SECONDS, ALARM_SECONDS, MINUTES, ALARM_MINUTES, HOURS, ALARM_HOURS, WEEKDAY, DAY, MONTH, YEAR = range(10)
REG_A, REG_B, REG_C, REG_D = 0x0A, 0x0B, 0x0C, 0x0D
CENTURY: Final = 0x32
_TIME_REGISTERS: Final = frozenset((SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY))

A_UIP: Final = 0x80
A_DIVIDER: Final = 0x70
A_RUNNING: Final = 0x20
_A_HELD: Final = 0x60
"""Divider values with both upper bits set hold the divider, and so the time, in reset."""
B_SET, B_PIE, B_AIE, B_UIE, B_BINARY, B_24H = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
C_IRQ, C_PERIODIC, C_ALARM, C_UPDATE = 0x80, 0x40, 0x20, 0x10
_INTERRUPTS: Final = C_PERIODIC | C_ALARM | C_UPDATE
D_VALID: Final = 0x80
_AFTER_RESET: Final = _NS // 2
"""The first update comes half a second after the divider has been let go. "Divider Stages"."""
_UIP_NS: Final = 244_000
"""UIP is set this long before an update."""


@dataclass(frozen=True, slots=True)
class VrtcV1:
    """`ns`: the chip's time, nanoseconds since 1970 as its own hands show it (local time if so configured)."""

    SCHEMA: ClassVar[tuple[str, int]] = ("vrtc", 1)
    index: int
    memory: bytes
    ns: int
    valid: bool
    seen_second: int
    seen_tick: int


class Vrtc:
    """Ports 0x70 and 0x71. `now()` is the host's time of day in seconds since 1970, asked at start and by `resync`;
    from then on the VM's clock drives the time. `utc` False: the chip shows the host's local time."""

    __slots__ = (
        "_clock", "_deadline", "_index", "_irq8", "_memory", "_now", "_offset", "_seen_second", "_seen_tick", "_utc",
        "_valid",
    )  # fmt: skip

    def __init__(
        self,
        clock: Clock,
        timers: Timers,
        irq8: IrqPin,
        now: Callable[[], float] = time.time,
        utc: bool = True,
    ) -> None:
        self._clock = clock
        self._irq8 = irq8
        self._now = now
        self._utc = utc
        self._deadline = Deadline(clock, timers, self._wake)
        self._index = 0
        self._memory = bytearray(128)
        self._memory[REG_A] = A_RUNNING | 6
        self._memory[REG_B] = B_24H
        self._memory[REG_D] = D_VALID
        self._valid = True
        self.resync()

    def reset(self) -> None:
        """A system reset: interrupts off and their flags clear; time and memory go on. "Reset"."""
        self._index = 0
        self._memory[REG_B] &= ~(B_PIE | B_AIE | B_UIE)
        self._memory[REG_C] = 0
        self._update_irq()

    def resync(self) -> None:
        """Set the time from the host's (at start, and after a pause if the guest should notice nothing)."""
        seconds = self._now()
        if not self._utc:
            seconds += time.localtime(seconds).tm_gmtoff
        self._offset = int(seconds * _NS) - self._clock.now()
        self._valid = True
        self._seen_second = self._ns() // _NS
        self._seen_tick = self._tick()
        self._refresh_time()
        self._book()

    # -- memory -------------------------------------------------------------------------------------------------------

    def nvram(self, index: int) -> int:
        """A byte of the CMOS memory (0-127), without side effects."""
        return self._memory[index]

    def set_nvram(self, index: int, value: int) -> None:
        """Set a byte of the CMOS memory behind the clock's registers (14-127, else ValueError)."""
        if not 14 <= index < 128:
            raise ValueError(f"CMOS byte {index}: bytes 14 to 127 can be set")
        self._memory[index] = value & 0xFF

    def set_memory_size(self, low: int, high: int = 0) -> None:
        """Say how much RAM there is: `low` bytes below 4 GiB, `high` bytes from 4 GiB on.

        The registers that firmware reads: 0x15 base KiB, 0x17 and 0x30 KiB from 1 MiB (at most 64 MiB), 0x34 units of
        64 KiB from 16 MiB, 0x5B units of 64 KiB from 4 GiB.
        """
        extended = min(max(low - (1 << 20), 0) >> 10, 0xFFFF)
        above_16m = min(max(low - (16 << 20), 0) >> 16, 0xFFFF)
        above_4g = min(high >> 16, 0xFFFFFF)
        for index, size, value in (
            (0x15, 2, 640),
            (0x17, 2, extended),
            (0x30, 2, extended),
            (0x34, 2, above_16m),
            (0x5B, 3, above_4g),
        ):
            self._memory[index : index + size] = value.to_bytes(size, "little")

    # -- ports --------------------------------------------------------------------------------------------------------

    def read(self, port: int, size: int) -> int:
        return self._read(port) if size == 1 else read_bytes(self._read, port, size)

    def write(self, port: int, size: int, value: int) -> None:
        if size == 1:
            self._write(port, value & 0xFF)
        else:
            write_bytes(self._write, port, size, value)

    def _read(self, port: int) -> int:
        if port != 0x71:
            return OPEN_BUS
        index = self._index
        if index == REG_C:
            self._catch_up()
            flags = self._memory[REG_C]
            self._memory[REG_C] = 0
            self._update_irq()
            self._book()
            return flags
        if index in _TIME_REGISTERS:
            self._refresh_time()
        elif index == REG_A:
            updating = self._running() and -self._ns() % _NS <= _UIP_NS
            return self._memory[REG_A] | (A_UIP if updating else 0)
        return self._memory[index]

    def _write(self, port: int, value: int) -> None:
        if port == 0x70:
            self._index = value & 0x7F
        elif port == 0x71:
            self._write_register(self._index, value)

    def _write_register(self, index: int, value: int) -> None:
        memory = self._memory
        if index in _TIME_REGISTERS:
            self._catch_up()
            self._refresh_time()
            memory[index] = value
            if self._free():
                self._take_time()
        elif index == REG_A:
            self._change_control(index, value & ~A_UIP)
        elif index == REG_B:
            self._change_control(index, value & ~B_UIE if value & B_SET else value)
        elif index in (ALARM_SECONDS, ALARM_MINUTES, ALARM_HOURS):
            self._catch_up()
            memory[index] = value
        elif index > REG_D:
            memory[index] = value
        self._book()

    def _change_control(self, index: int, value: int) -> None:
        """Change register A or B. Halting leaves the time in its registers; going on takes it from there."""
        self._catch_up()
        self._refresh_time()
        divided, ran = self._dividing(), self._free()
        formats = self._memory[REG_B] & (B_BINARY | B_24H)
        self._memory[index] = value
        if self._dividing() and not divided:
            self._offset += _AFTER_RESET - self._ns() % _NS
            self._seen_second = self._ns() // _NS
        self._seen_tick = self._tick()
        if self._free():
            if not ran:
                self._take_time()
            elif formats != self._memory[REG_B] & (B_BINARY | B_24H):
                self._refresh_time()
        self._update_irq()

    # -- time ---------------------------------------------------------------------------------------------------------

    def _dividing(self) -> bool:
        return self._memory[REG_A] & _A_HELD != _A_HELD

    def _free(self) -> bool:
        """Nothing holds the calendar, unless it makes no sense."""
        return self._dividing() and not self._memory[REG_B] & B_SET

    def _running(self) -> bool:
        """The calendar is updated each second."""
        return self._valid and self._free()

    def _ns(self) -> int:
        return self._clock.now() + self._offset

    def _encode(self, value: int) -> int:
        return value if self._memory[REG_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int | None:
        """A register's number, None if it is no BCD."""
        if self._memory[REG_B] & B_BINARY:
            return value
        high, low = value >> 4, value & 15
        return high * 10 + low if high < 10 and low < 10 else None

    def _decode_hour(self, value: int) -> int | None:
        if self._memory[REG_B] & B_24H:
            hour = self._decode(value)
            return hour if hour is not None and hour < 24 else None
        hour = self._decode(value & 0x7F)
        if hour is None or not 1 <= hour <= 12:
            return None
        return hour % 12 + (12 if value & 0x80 else 0)

    def _encode_hour(self, hour: int) -> int:
        if self._memory[REG_B] & B_24H:
            return self._encode(hour)
        return self._encode((hour + 11) % 12 + 1) | (0x80 if hour >= 12 else 0)

    def _refresh_time(self) -> None:
        """Bring the time registers up to date, unless they are held."""
        if not self._running():
            return
        at = _EPOCH + timedelta(seconds=min(self._ns() // _NS, _LAST_SECOND))
        memory, encode = self._memory, self._encode
        memory[SECONDS] = encode(at.second)
        memory[MINUTES] = encode(at.minute)
        memory[HOURS] = self._encode_hour(at.hour)
        memory[WEEKDAY] = encode(at.isoweekday() % 7 + 1)
        memory[DAY] = encode(at.day)
        memory[MONTH] = encode(at.month)
        memory[YEAR] = encode(at.year % 100)
        memory[CENTURY] = encode(at.year // 100)

    def _take_time(self) -> None:
        """Set the clock to what the registers say; the divider goes on. Nonsense stops it until it makes sense."""
        memory, decode = self._memory, self._decode
        fields = [decode(memory[index]) for index in (CENTURY, YEAR, MONTH, DAY, MINUTES, SECONDS)]
        hour = self._decode_hour(memory[HOURS])
        self._valid = False
        if hour is None or None in fields:
            return
        century, year, month, day, minute, second = (field or 0 for field in fields)
        try:
            at = datetime(century * 100 + year, month, day, hour, minute, second, tzinfo=UTC)
        except ValueError:
            return
        self._offset += timegm(at.timetuple()) * _NS - self._ns() // _NS * _NS
        self._valid = True
        self._seen_second = self._ns() // _NS
        self._seen_tick = self._tick()

    # -- interrupts ---------------------------------------------------------------------------------------------------

    def _frequency(self) -> int:
        """The periodic rate in Hz, 0 for none. "Periodic Interrupt Rate"."""
        rate = self._memory[REG_A] & 15
        if rate == 0:
            return 0
        return 32768 >> (rate + 6 if rate < 3 else rate - 1)

    def _tick(self) -> int:
        return self._ns() * self._frequency() // _NS

    def _next_alarm(self, after: int) -> int | None:
        """The first second later than `after` that matches the alarm registers, None if none ever does.

        A value of 0xC0 or more matches anything. "Time, Calendar, and Alarm Locations".
        """
        memory = self._memory
        wanted: list[int | None] = []
        for register, limit in ((ALARM_HOURS, 24), (ALARM_MINUTES, 60), (ALARM_SECONDS, 60)):
            raw = memory[register]
            if raw >= 0xC0:
                wanted.append(None)
                continue
            value = self._decode_hour(raw) if register == ALARM_HOURS else self._decode(raw)
            if value is None or value >= limit:
                return None
            wanted.append(value)
        want_hour, want_minute, want_second = wanted
        at = after + 1
        while True:
            hour, minute, second = at % _DAY // 3600, at % 3600 // 60, at % 60
            if want_hour is not None and hour != want_hour:
                at += (want_hour - hour) % 24 * 3600 - minute * 60 - second
            elif want_minute is not None and minute != want_minute:
                at += (want_minute - minute) % 60 * 60 - second
            elif want_second is not None and second != want_second:
                at += (want_second - second) % 60
            else:
                return at

    def _catch_up(self) -> None:
        """Set the flags of what has happened since the last look."""
        if not self._dividing():
            return
        flags = 0
        second = self._ns() // _NS
        if second > self._seen_second and self._running():
            flags |= C_UPDATE
            alarm = self._next_alarm(self._seen_second)
            if alarm is not None and alarm <= second:
                flags |= C_ALARM
            self._seen_second = second
        tick = self._tick()
        if tick > self._seen_tick:
            flags |= C_PERIODIC
            self._seen_tick = tick
        if flags:
            self._memory[REG_C] |= flags
            self._update_irq()

    def _update_irq(self) -> None:
        memory = self._memory
        flags = memory[REG_C] & _INTERRUPTS
        raised = bool(flags & memory[REG_B])
        memory[REG_C] = flags | (C_IRQ if raised else 0)
        self._irq8.set_level(raised)

    def _book(self) -> None:
        """Wake up for the earliest enabled event; not while IRQ 8 is held, since reading register C books again."""
        enabled = self._memory[REG_B] & _INTERRUPTS
        if not enabled or not self._dividing() or self._memory[REG_C] & C_IRQ:
            self._deadline.clear()
            return
        events = []
        running = self._running()
        if enabled & B_UIE and running:
            events.append((self._seen_second + 1) * _NS)
        if enabled & B_AIE and running:
            alarm = self._next_alarm(self._seen_second)
            if alarm is not None:
                events.append(alarm * _NS)
        frequency = self._frequency()
        if enabled & B_PIE and frequency:
            events.append(-(-(self._seen_tick + 1) * _NS // frequency))
        if events:
            self._deadline.set(min(events) - self._offset)
        else:
            self._deadline.clear()

    def _wake(self) -> None:
        if self._deadline.due():
            self._catch_up()
            self._book()

    # -- saved state --------------------------------------------------------------------------------------------------

    def save(self) -> VrtcV1:
        return VrtcV1(self._index, bytes(self._memory), self._ns(), self._valid, self._seen_second, self._seen_tick)

    def restore(self, state: VrtcV1) -> None:
        """Take over a saved state, and hold IRQ 8 if it does."""
        self._index = state.index
        self._memory = bytearray(state.memory)
        self._offset = state.ns - self._clock.now()
        self._valid = state.valid
        self._seen_second = state.seen_second
        self._seen_tick = state.seen_tick
        self._update_irq()
        self._book()
