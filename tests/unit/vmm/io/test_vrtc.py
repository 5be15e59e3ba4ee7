"""The real-time clock: time, formats, interrupts, memory."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhyve.base.fakes import FakeClock, FakePin, FakeTimers
from pyhyve.vmm.io.vrtc import Vrtc

SECOND = 1_000_000_000
START = int(datetime(2024, 2, 29, 23, 59, 50, tzinfo=UTC).timestamp())  # a Thursday
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02


class Bench:
    def __init__(self, start=START):
        self.clock = FakeClock(777)
        self.timers = FakeTimers(self.clock)
        self.irq8 = FakePin()
        self.rtc = Vrtc(self.clock, self.timers, self.irq8, now=lambda: start)

    def get(self, index):
        self.rtc.write(0x70, 1, index)
        return self.rtc.read(0x71, 1)

    def put(self, index, value):
        self.rtc.write(0x70, 1, index)
        self.rtc.write(0x71, 1, value)

    def time(self):
        """Century, year, month, day, hour, minute, second as the registers show them."""
        return tuple(self.get(index) for index in (0x32, 9, 8, 7, 4, 2, 0))


@pytest.fixture
def bench():
    return Bench()


def test_the_time_is_the_hosts_in_bcd_and_24_hours(bench):
    assert bench.time() == (0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x50)
    assert bench.get(6) == 5
    assert bench.get(0x0D) == 0x80


def test_time_goes_on_by_the_vms_clock(bench):
    bench.timers.advance(10 * SECOND)
    assert bench.time() == (0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x00)
    assert bench.get(6) == 6


@pytest.mark.parametrize(("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_twelve_hour_format(hour, shown):
    bench = Bench(int(datetime(2024, 1, 1, hour, tzinfo=UTC).timestamp()))
    bench.put(0x0B, 0)
    assert bench.get(4) == shown
    bench.put(0x0B, SET)
    bench.put(4, shown)
    bench.put(0x0B, H24 | BINARY | SET)
    bench.put(0x0B, 0)
    assert bench.get(4) == shown


def test_binary_format(bench):
    bench.put(0x0B, H24 | BINARY)
    assert bench.time() == (20, 24, 2, 29, 23, 59, 50)


def test_setting_the_time_takes_effect_when_set_is_released(bench):
    bench.put(0x0B, H24 | BINARY | SET)
    for index, value in ((0x32, 19), (9, 99), (8, 12), (7, 31), (4, 23), (2, 59), (0, 58)):
        bench.put(index, value)
    bench.timers.advance(10 * SECOND)
    assert bench.time() == (19, 99, 12, 31, 23, 59, 58)
    bench.put(0x0B, H24 | BINARY)
    bench.timers.advance(2 * SECOND)
    assert bench.time() == (20, 0, 1, 1, 0, 0, 0)


def test_a_register_written_without_set_changes_at_once(bench):
    bench.put(2, 0x30)
    bench.timers.advance(SECOND)
    assert bench.time()[-2:] == (0x30, 0x51)


def test_the_phase_of_the_seconds_outlives_a_new_time(bench):
    bench.timers.advance(SECOND * 3 // 4)
    bench.put(0x0B, H24 | SET)
    bench.put(0, 0x10)
    bench.timers.advance(2 * SECOND)
    bench.put(0x0B, H24)
    bench.timers.advance(SECOND // 4 - 1)
    assert bench.get(0) == 0x10
    bench.timers.advance(1)
    assert bench.get(0) == 0x11
    bench.timers.advance(SECOND // 2)
    bench.put(2, 0x30)  # and that of a register written on its own
    bench.timers.advance(SECOND // 2)
    assert bench.time()[-2:] == (0x30, 0x12)


def test_the_first_update_comes_half_a_second_after_the_dividers_reset(bench):
    bench.timers.advance(SECOND // 4)
    bench.put(0x0A, 0x70)
    bench.put(0, 0x10)
    bench.timers.advance(5 * SECOND)
    assert bench.get(0) == 0x10
    assert not bench.get(0x0A) & 0x80
    bench.put(0x0A, 0x26)
    bench.timers.advance(SECOND // 2 - 1)
    assert bench.get(0) == 0x10
    bench.timers.advance(1)
    assert bench.get(0) == 0x11


def test_daylight_saving_is_not_done(bench):
    rtc = Bench(int(datetime(2024, 3, 31, 1, 59, 59, tzinfo=UTC).timestamp()))
    rtc.put(0x0B, H24 | 0x01)
    assert rtc.get(0x0B) & 0x01
    rtc.timers.advance(SECOND)
    assert rtc.time()[-3:] == (0x02, 0, 0)


MOMENTS = st.datetimes(min_value=datetime(1, 1, 1), max_value=datetime(9999, 12, 30))


@given(MOMENTS, st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_any_time_is_set_shown_and_counted_on_in_every_format(moment, binary, h24, later):
    """The calendar's rules are Python's."""
    moment = moment.replace(microsecond=0)
    bench = Bench()
    formats = (BINARY if binary else 0) | (H24 if h24 else 0)

    def shown(at):
        def code(value):
            return value if binary else int(str(value), 16)

        hour = code(at.hour) if h24 else code(at.hour % 12 or 12) | (0x80 if at.hour >= 12 else 0)
        date = tuple(code(value) for value in (at.year // 100, at.year % 100, at.month, at.day))
        return (*date, hour, code(at.minute), code(at.second))

    bench.put(0x0B, formats | SET)
    for index, value in zip((0x32, 9, 8, 7, 4, 2, 0), shown(moment), strict=True):
        bench.put(index, value)
    bench.put(0x0B, formats)
    assert bench.time() == shown(moment)
    later = min(later, int((datetime(9999, 12, 31) - moment).total_seconds()))
    bench.timers.advance(later * SECOND)
    after = moment + timedelta(seconds=later)
    assert bench.time() == shown(after)
    assert bench.get(6) == after.isoweekday() % 7 + 1


def test_nonsense_stops_the_clock_until_it_makes_sense(bench):
    bench.put(8, 0x13)
    bench.timers.advance(5 * SECOND)
    assert bench.get(8) == 0x13
    assert bench.get(0) == 0x50
    bench.put(8, 0x03)
    bench.timers.advance(SECOND)
    assert bench.time() == (0x20, 0x24, 0x03, 0x29, 0x23, 0x59, 0x51)


def test_uip_is_up_just_before_an_update(bench):
    bench.timers.advance(SECOND - 244_001)
    assert not bench.get(0x0A) & 0x80
    bench.timers.advance(1)
    assert bench.get(0x0A) & 0x80
    bench.timers.advance(244_000)
    bench.put(0x0B, H24 | SET)
    bench.timers.advance(SECOND - 1)
    assert not bench.get(0x0A) & 0x80


def test_the_host_time_is_asked_only_at_start_and_by_resync(bench):
    bench.timers.advance(5 * SECOND)
    assert bench.get(0) == 0x55
    bench.rtc.resync()
    assert bench.get(0) == 0x50


def test_local_time_is_shown_where_the_guest_wants_it(monkeypatch):
    import time

    monkeypatch.setenv("TZ", "XYZ-3")
    time.tzset()
    try:
        rtc = Vrtc(FakeClock(), FakeTimers(FakeClock()), FakePin(), now=lambda: START, utc=False)
        rtc.write(0x70, 1, 4)
        assert rtc.read(0x71, 1) == 0x02
    finally:
        monkeypatch.undo()
        time.tzset()


# -- interrupts


def test_update_ended_interrupts_each_second_once_c_is_read(bench):
    bench.put(0x0B, H24 | UIE)
    bench.timers.advance(SECOND - 1)
    assert not bench.irq8.level
    bench.timers.advance(1)
    assert bench.irq8.level
    assert bench.get(0x0C) & 0xB0 == 0x90
    assert not bench.irq8.level
    assert bench.get(0x0C) == 0
    bench.timers.advance(SECOND)
    assert bench.irq8.edges == 2


def test_an_alarm_fires_at_its_time_of_day(bench):
    for index, value in ((5, 0x00), (3, 0x00), (1, 0x05)):
        bench.put(index, value)
    bench.put(0x0B, H24 | AIE)
    bench.timers.advance(15 * SECOND - 1)
    assert not bench.irq8.level
    bench.timers.advance(1)
    assert bench.irq8.level
    assert bench.get(0x0C) & 0xB0 == 0xB0
    bench.timers.advance(86_400 * SECOND)
    assert bench.irq8.edges == 2


def test_an_alarm_with_wildcards_fires_each_minute(bench):
    for index, value in ((5, 0xFF), (3, 0xC0), (1, 0x30)):
        bench.put(index, value)
    bench.put(0x0B, H24 | AIE)
    for n in range(3):
        bench.timers.advance(40 * SECOND if n == 0 else 60 * SECOND)
        assert bench.irq8.level
        bench.get(0x0C)
    assert bench.irq8.edges == 3


def test_an_alarm_that_never_comes_is_never_booked(bench):
    bench.put(1, 0x99)
    bench.put(0x0B, H24 | AIE)
    bench.timers.advance(100_000 * SECOND)
    assert bench.irq8.edges == 0
    assert bench.timers.pending == 0


@pytest.mark.parametrize(("rate", "hz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)])
def test_periodic_interrupts_keep_their_rate(bench, rate, hz):
    bench.put(0x0A, 0x20 | rate)
    bench.put(0x0B, H24 | PIE)
    end = bench.clock.now() + 2 * SECOND
    count = 0
    while bench.clock.now() < end:
        bench.timers.advance(SECOND // hz // 2)
        if bench.irq8.level:
            count += 1
            assert bench.get(0x0C) & 0xC0 == 0xC0
    assert abs(count - 2 * hz) <= 1


ALARM = st.one_of(st.just(0xFF), st.just(0xC0), st.integers(0, 59))


@given(st.integers(0, 86_399), ALARM, ALARM, ALARM)
def test_an_alarm_is_where_all_three_registers_match(start, hour, minute, second):
    bench = Bench(start)
    bench.put(0x0B, H24 | BINARY)
    for index, value in ((5, hour), (3, minute), (1, second)):
        bench.put(index, value)
    bench.put(0x0B, H24 | BINARY | AIE)
    hours = range(24) if hour >= 0xC0 else [hour] if hour < 24 else []
    minutes = range(60) if minute >= 0xC0 else [minute]
    seconds = range(60) if second >= 0xC0 else [second]
    matches = (h * 3600 + m * 60 + s for h in hours for m in minutes for s in seconds)
    distance = min(((match - start - 1) % 86_400 + 1 for match in matches), default=None)
    if distance is None:
        assert bench.timers.pending == 0
        return
    bench.timers.advance(distance * SECOND - 1)
    assert not bench.irq8.level
    bench.timers.advance(1)
    assert bench.irq8.level


def test_periodic_interrupts_go_on_while_the_calendar_is_held(bench):
    bench.put(0x0A, 0x2F)
    bench.put(0x0B, H24 | PIE | SET)
    bench.timers.advance(SECOND // 2)
    assert bench.get(0x0C) == 0xC0
    bench.timers.advance(SECOND // 2)
    assert bench.get(0x0C) == 0xC0
    bench.put(0x0A, 0x7F)
    bench.timers.advance(5 * SECOND)
    assert bench.get(0x0C) == 0


def test_periodic_interrupts_that_nobody_took_are_one_and_the_next_keeps_its_time(bench):
    bench.put(0x0B, H24 | PIE)  # 1,024 Hz
    bench.clock.time += SECOND // 100 * 35
    bench.timers.advance(0)
    assert bench.get(0x0C) & 0xC0 == 0xC0
    assert bench.get(0x0C) == 0
    edges = bench.irq8.edges
    bench.timers.advance(-(-359 * SECOND // 1024) - SECOND // 100 * 35 - 1)
    assert bench.irq8.edges == edges
    bench.timers.advance(1)
    assert bench.irq8.edges == edges + 1


def test_flags_are_raised_for_a_guest_that_polls(bench):
    bench.get(0x0C)
    bench.timers.advance(SECOND)
    assert bench.get(0x0C) & 0x50 == 0x50
    assert bench.get(0x0C) == 0
    assert bench.timers.pending == 0


def test_enabling_an_interrupt_whose_flag_is_up_raises_it(bench):
    bench.timers.advance(SECOND)
    bench.put(0x0B, H24 | UIE)
    assert bench.irq8.level


def test_set_stops_update_interrupts(bench):
    bench.put(0x0B, H24 | SET | UIE)
    assert not bench.get(0x0B) & UIE
    bench.timers.advance(5 * SECOND)
    assert bench.irq8.edges == 0


def test_reset_drops_interrupts_and_keeps_time_and_memory(bench):
    bench.put(0x0B, H24 | UIE)
    bench.put(0x40, 0xAB)
    bench.timers.advance(SECOND)
    bench.rtc.reset()
    assert not bench.irq8.level
    assert bench.get(0x40) == 0xAB
    assert bench.get(0) == 0x51


# -- memory


def test_cmos_memory_keeps_what_is_written(bench):
    bench.put(0x0E, 0x12)
    bench.put(0x7F, 0x34)
    assert (bench.get(0x0E), bench.get(0x7F)) == (0x12, 0x34)
    bench.rtc.set_nvram(0x50, 0x56)
    assert bench.get(0x50) == 0x56
    with pytest.raises(ValueError, match="14 to 127"):
        bench.rtc.set_nvram(0x0A, 0)


def test_memory_size_registers(bench):
    bench.rtc.set_memory_size(3 << 30, 5 << 30)
    assert bench.get(0x15) | bench.get(0x16) << 8 == 640
    assert bench.get(0x17) | bench.get(0x18) << 8 == 0xFFFF
    assert bench.get(0x34) | bench.get(0x35) << 8 == ((3 << 30) - (16 << 20)) >> 16
    assert bench.get(0x5B) | bench.get(0x5C) << 8 | bench.get(0x5D) << 16 == (5 << 30) >> 16


def test_the_nmi_bit_is_no_part_of_the_index(bench):
    bench.put(0x80 | 0x40, 0x77)
    assert bench.get(0x40) == 0x77
    assert bench.rtc.read(0x70, 1) == 0xFF


def test_no_access_raises(bench):
    for index in range(256):
        for value in (0x00, 0x7F, 0x80, 0x99, 0xFF):
            bench.put(index, value)
            bench.get(index)
            bench.timers.advance(10_000_000)
    bench.rtc.write(0x70, 2, 0xFFFF)
    bench.rtc.write(0x70, 4, 0)
    assert bench.rtc.read(0x70, 4) & 0xFF == 0xFF


def test_the_last_second_of_the_registers_is_survived(bench):
    bench.put(0x0B, H24 | SET)
    for index, value in ((0x32, 0x99), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x59)):
        bench.put(index, value)
    bench.put(0x0B, H24)
    bench.timers.advance(5 * SECOND)
    assert bench.time() == (0x99, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59)


def test_state_survives_save_and_restore(bench):
    bench.put(0x0B, H24 | UIE)
    bench.put(0x40, 0xAB)
    bench.timers.advance(SECOND // 2)
    state = bench.rtc.save()
    other = Bench(start=0)
    other.clock.time = 99 * SECOND
    other.rtc.restore(state)
    assert other.rtc.save() == state
    assert other.time() == bench.time()
    assert other.get(0x40) == 0xAB
    other.timers.advance(SECOND // 2 - 1)
    assert not other.irq8.level
    other.timers.advance(1)
    assert other.irq8.level
