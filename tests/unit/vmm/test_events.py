"""The event thread: timers in order and in time, descriptors, calls from elsewhere."""

import os
import threading
import time

import pytest

from pyhyve.vmm.events import READ, Clock, EventLoop


@pytest.fixture
def loop():
    loop = EventLoop("test/events")
    loop.start()
    yield loop
    loop.stop()


class Recorder:
    def __init__(self):
        self.seen = []
        self.arrived = threading.Condition()

    def __call__(self, what):
        with self.arrived:
            self.seen.append(what)
            self.arrived.notify_all()

    def wait(self, count, timeout=5):
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.seen) >= count, timeout), self.seen
        return self.seen


def test_clock_stands_still_while_paused():
    clock = Clock()
    clock.pause()
    before = clock.now()
    time.sleep(0.01)
    clock.pause()
    assert clock.now() == before
    clock.resume()
    clock.resume()
    assert 0 <= clock.now() - before < 5_000_000


def test_timers_fire_in_the_order_of_their_deadlines(loop):
    record = Recorder()
    now = loop.clock.now()
    for delay in (30, 10, 20):
        loop.timers.call_at(now + delay * 1_000_000, lambda delay=delay: record((delay, loop.clock.now() - now)))
    seen = record.wait(3)
    assert [delay for delay, _ in seen] == [10, 20, 30]
    for delay, at in seen:
        assert delay * 1_000_000 <= at < delay * 1_000_000 + 200_000_000


def test_cancelled_timer_does_not_fire(loop):
    record = Recorder()
    now = loop.clock.now()
    timer = loop.timers.call_at(now + 5_000_000, lambda: record("cancelled"))
    timer.cancel()
    timer.cancel()
    loop.timers.call_at(now + 20_000_000, lambda: record("kept"))
    assert record.wait(1) == ["kept"]
    assert loop.timers.pending() == 0


def test_many_cancelled_timers_do_not_pile_up(loop):
    far = loop.clock.now() + 10**15
    for n in range(5000):
        loop.timers.call_at(far + n, lambda: None).cancel()
    assert len(loop.timers._heap) < 1000


def test_deadline_in_the_past_fires_at_once(loop):
    record = Recorder()
    loop.timers.call_at(-5, lambda: record("now"))
    record.wait(1, timeout=1)


def test_timers_do_not_fire_while_paused(loop):
    record = Recorder()
    loop.pause()
    loop.timers.call_at(loop.clock.now() + 1_000_000, lambda: record("late"))
    time.sleep(0.03)
    assert not record.seen
    loop.resume()
    record.wait(1)


def test_calls_from_other_threads_keep_their_order(loop):
    record = Recorder()
    for n in range(100):
        loop.call_soon(lambda n=n: record((n, threading.current_thread().name)))
    assert record.wait(100) == [(n, "test/events") for n in range(100)]


def test_ready_descriptor_is_reported_until_it_is_unwatched(loop):
    record = Recorder()
    reader, writer = os.pipe()

    def ready(events):
        assert events & READ
        record(os.read(reader, 100))

    loop.watch(reader, READ, ready)
    os.write(writer, b"one")
    assert record.wait(1) == [b"one"]
    os.write(writer, b"two")
    record.wait(2)
    loop.unwatch(reader)
    loop.unwatch(reader)
    os.write(writer, b"three")
    time.sleep(0.02)
    assert record.seen == [b"one", b"two"]
    os.close(reader)
    os.close(writer)


def test_callback_that_raises_is_reported_and_the_thread_goes_on():
    record = Recorder()
    loop = EventLoop("test/errors", record)
    loop.start()
    loop.call_soon(lambda: 1 // 0)
    loop.timers.call_at(0, lambda: [][0])
    loop.call_soon(lambda: record("after"))
    kinds = {type(each).__name__ for each in record.wait(3)}
    assert kinds == {"ZeroDivisionError", "IndexError", "str"}
    loop.stop()


def test_callbacks_hold_the_lock():
    lock = threading.RLock()
    record = Recorder()
    loop = EventLoop("test/lock", None, lock)
    loop.start()
    with lock:
        loop.call_soon(lambda: record("in"))
        time.sleep(0.02)
        assert not record.seen
    record.wait(1)
    loop.stop()


def test_stop_is_repeatable_and_never_started_is_fine():
    EventLoop("never").stop()
    loop = EventLoop("twice")
    loop.start()
    loop.stop()
    loop.stop()
    loop.call_soon(lambda: None)


def test_idle_loop_uses_no_time(loop):
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05
