"""The local APIC's timer: one-shot, periodic, TSC deadline."""

import pytest

INITIAL, CURRENT, DIVIDE, LVT = 0x380, 0x390, 0x3E0, 0x320
PERIODIC, DEADLINE_MODE, MASKED = 1 << 17, 2 << 17, 1 << 16
DEADLINE = 0x6E0


@pytest.fixture
def timer(board, cpu):
    cpu.write(DIVIDE, 4, 0xB)
    cpu.write(LVT, 4, 0xEC)
    return cpu


def take(board, vlapic):
    vector = board.take(vlapic)
    vlapic.write(0xB0, 4, 0)
    return vector


def test_one_shot_fires_once_at_its_count(board, timer):
    timer.write(INITIAL, 4, 5_000)
    board.timers.advance(4_999)
    assert timer.pending_vector() is None
    assert timer.read(CURRENT, 4) == 1
    board.timers.advance(1)
    assert take(board, timer) == 0xEC
    assert timer.read(CURRENT, 4) == 0
    board.timers.advance(100_000)
    assert timer.pending_vector() is None


@pytest.mark.parametrize(("code", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)])
def test_the_divider_stretches_the_count(board, timer, code, divisor):
    timer.write(DIVIDE, 4, code)
    timer.write(INITIAL, 4, 1_000)
    board.timers.advance(400 * divisor)
    assert timer.read(CURRENT, 4) == 600
    board.timers.advance(600 * divisor)
    assert timer.pending_vector() == 0xEC


def test_changing_the_divider_keeps_the_running_count(board, timer):
    timer.write(INITIAL, 4, 1_000)
    board.timers.advance(500)
    timer.write(DIVIDE, 4, 0)
    assert timer.read(CURRENT, 4) == 500
    board.timers.advance(999)
    assert timer.pending_vector() is None
    board.timers.advance(1)
    assert timer.pending_vector() == 0xEC


def test_periodic_fires_each_period_without_drift(board, timer):
    timer.write(LVT, 4, PERIODIC | 0xEC)
    timer.write(INITIAL, 4, 100_000)
    start = board.clock.now()
    for n in range(1, 6):
        board.timers.advance(start + n * 100_000 - board.clock.now())
        assert take(board, timer) == 0xEC
        board.timers.advance(12_345)
        assert timer.read(CURRENT, 4) == 100_000 - 12_345


def test_a_late_wake_up_keeps_the_phase_and_merges_what_was_missed(board, timer):
    timer.write(LVT, 4, PERIODIC | 0xEC)
    timer.write(INITIAL, 4, 100_000)
    board.clock.time += 350_000
    board.timers.advance(0)
    assert take(board, timer) == 0xEC
    board.timers.advance(49_999)
    assert timer.pending_vector() is None
    board.timers.advance(1)
    assert take(board, timer) == 0xEC


def test_a_period_of_nanoseconds_does_not_flood_the_host(board, timer):
    timer.write(LVT, 4, PERIODIC | 0xEC)
    timer.write(INITIAL, 4, 1)
    notified = len(board.events)
    for _ in range(1000):
        board.timers.advance(1_000)
        if board.take(timer):
            timer.write(0xB0, 4, 0)
    assert len(board.events) - notified <= 51


def test_a_masked_timer_counts_in_silence(board, timer):
    timer.write(LVT, 4, MASKED | 0xEC)
    timer.write(INITIAL, 4, 1_000)
    board.timers.advance(600)
    assert timer.read(CURRENT, 4) == 400
    board.timers.advance(600)
    assert timer.pending_vector() is None


def test_an_initial_count_of_zero_stops_the_timer(board, timer):
    timer.write(INITIAL, 4, 1_000)
    timer.write(INITIAL, 4, 0)
    assert timer.read(CURRENT, 4) == 0
    assert board.timers.pending == 0
    board.timers.advance(10_000)
    assert timer.pending_vector() is None


def test_moving_the_count_later_costs_no_new_timer_and_fires_in_time(board, timer):
    timer.write(INITIAL, 4, 1_000)
    timer.write(INITIAL, 4, 5_000)
    assert board.timers.pending == 1
    board.timers.advance(4_999)
    assert timer.pending_vector() is None
    board.timers.advance(1)
    assert timer.pending_vector() == 0xEC


def test_tsc_deadline_fires_when_the_guests_tsc_reaches_it(board, timer):
    timer.write(LVT, 4, DEADLINE_MODE | 0xEC)
    goal = board.tsc() + 2_000_000  # 1 ms at 2 GHz
    timer.wrmsr(DEADLINE, goal)
    assert timer.rdmsr(DEADLINE) == goal
    assert timer.read(CURRENT, 4) == 0
    board.timers.advance(999_999)
    assert timer.pending_vector() is None
    board.timers.advance(2)
    assert take(board, timer) == 0xEC
    assert timer.rdmsr(DEADLINE) == 0


def test_a_tsc_deadline_in_the_past_fires_at_once(board, timer):
    timer.write(LVT, 4, DEADLINE_MODE | 0xEC)
    timer.wrmsr(DEADLINE, 1)
    assert timer.pending_vector() == 0xEC
    assert timer.rdmsr(DEADLINE) == 0


def test_a_tsc_deadline_of_zero_disarms(board, timer):
    timer.write(LVT, 4, DEADLINE_MODE | 0xEC)
    timer.wrmsr(DEADLINE, board.tsc() + 1_000)
    timer.wrmsr(DEADLINE, 0)
    board.timers.advance(10_000)
    assert timer.pending_vector() is None


def test_the_furthest_tsc_deadline_is_harmless(board, timer):
    timer.write(LVT, 4, DEADLINE_MODE | 0xEC)
    timer.wrmsr(DEADLINE, (1 << 64) - 1)
    board.timers.advance(1 << 52)
    assert timer.pending_vector() is None


def test_each_timer_register_is_dead_in_the_others_mode(board, timer):
    timer.wrmsr(DEADLINE, board.tsc() + 1)
    assert timer.rdmsr(DEADLINE) == 0
    timer.write(LVT, 4, DEADLINE_MODE | 0xEC)
    timer.write(INITIAL, 4, 10)
    assert timer.read(INITIAL, 4) == 0
    board.timers.advance(10_000)
    assert timer.pending_vector() is None


def test_leaving_a_mode_disarms(board, timer):
    timer.write(INITIAL, 4, 1_000)
    timer.write(LVT, 4, DEADLINE_MODE | 0xEC)
    timer.wrmsr(DEADLINE, board.tsc() + 10_000)
    timer.write(LVT, 4, 0xEC)
    board.timers.advance(100_000)
    assert timer.pending_vector() is None


def test_a_restored_tsc_deadline_that_has_passed_fires(board, timer):
    timer.write(LVT, 4, DEADLINE_MODE | 0xEC)
    timer.wrmsr(DEADLINE, board.tsc() + 1_000)
    state = timer.save()
    board.clock.time += 1_000_000
    timer.restore(state)
    board.timers.advance(0)
    assert timer.pending_vector() == 0xEC


@pytest.mark.parametrize("jump", [10_000_000, -1_000_000])
def test_a_deadline_moves_when_the_guest_writes_its_counter(board, timer, jump):
    """The deadline is a value of the counter, so a jump forward over it fires, and one back postpones it."""
    timer.write(0x320, 4, 0x40031)
    timer.wrmsr(0x6E0, board.tsc() + 1_000_000)
    board.tsc_offset += jump
    timer.tsc_written(jump)
    assert board.take(timer) == (0x31 if jump > 0 else None)
    board.timers.advance(500_000)
    assert board.take(timer) is None
    board.timers.advance(500_001)
    assert board.take(timer) == (None if jump > 0 else 0x31)


def test_the_reserved_timer_mode_does_not_count(board, timer):
    timer.write(0x320, 4, 0x31)
    timer.write(0x380, 4, 1_000)
    timer.write(0x320, 4, 0x60031)
    timer.write(0x380, 4, 1_000)
    board.timers.advance(1_000_000)
    assert board.take(timer) is None
    assert timer.read(0x390, 4) == 0


def test_a_one_shot_that_is_over_does_not_begin_anew_as_a_periodic_timer(board, timer):
    """Also where the event thread has not come to it yet."""
    timer.write(0x320, 4, 0x31)
    timer.write(0x380, 4, 1_000)
    board.clock.time += 1_000_000
    timer.write(0x320, 4, 0x20032)
    assert timer.read(0x390, 4) == 0
    assert board.take(timer) is not None
    board.timers.advance(1_000_000)
    assert board.take(timer) is None


@pytest.mark.parametrize("look", ["count", "deadline"])
def test_a_guest_that_sees_the_timer_at_its_end_finds_the_interrupt(board, timer, look):
    timer.write(0x320, 4, 0x40031 if look == "deadline" else 0x31)
    if look == "deadline":
        timer.wrmsr(0x6E0, board.tsc() + 1_000)
    else:
        timer.write(0x380, 4, 1_000)
    board.clock.time += 1_000_000
    assert (timer.rdmsr(0x6E0) if look == "deadline" else timer.read(0x390, 4)) == 0
    assert timer.irr == 1 << 0x31
    assert board.take(timer) == 0x31
    timer.write(0xB0, 4, 0)
    board.timers.advance(1_000_000)
    assert board.take(timer) is None


def test_an_interrupt_that_is_due_is_not_lost_to_a_new_count(board, timer):
    timer.write(0x320, 4, 0x31)
    timer.write(0x380, 4, 1_000)
    board.clock.time += 1_000_000
    timer.write(0x380, 4, 50_000)
    assert board.take(timer) == 0x31
