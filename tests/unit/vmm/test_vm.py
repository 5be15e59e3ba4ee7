"""A VM's life: start, pause, stop, hang."""

import os
import threading
import time
from pathlib import Path

import pytest
from fake_processor import Device, FakeProcessor

from pyhyve.base.errors import HostError
from pyhyve.vmm.topology import Topology
from pyhyve.vmm.vm import State, Suspend, Vm


class Ender(Device):
    def __init__(self, vm):
        self.vm = vm
        self.count = 0

    def write(self, offset, size, value):
        self.count += 1
        if value == 0xFF:
            self.vm.suspend(Suspend.POWEROFF)


def spin(cpu):
    while True:
        yield cpu.out(0x80, 1)


def sleeper(cpu):
    while True:
        yield cpu.hlt()


def test_life_cycle(make_vm):
    vm, processor = make_vm(sleeper)
    assert vm.state is State.CREATED
    vm.start()
    assert vm.state is State.RUNNING
    vm.pause()
    assert vm.state is State.PAUSED
    vm.resume()
    assert vm.state is State.RUNNING
    vm.stop("enough")
    assert vm.wait(5)
    assert vm.state is State.STOPPED
    assert vm.suspended.how is Suspend.REQUEST
    assert vm.suspended.detail == "enough"
    vm.close()
    vm.close()
    assert processor.vm.closed
    with pytest.raises(RuntimeError, match="starts once"):
        vm.start()


def test_first_reason_counts(make_vm):
    vm, _ = make_vm(sleeper)
    seen = []
    vm.on_suspend = seen.append
    vm.start()
    vm.suspend(Suspend.POWEROFF)
    vm.suspend(Suspend.RESET)
    assert vm.suspended.how is Suspend.POWEROFF
    assert [each.how for each in seen] == [Suspend.POWEROFF]


def test_engine_is_told_of_ram(make_vm):
    vm, processor = make_vm(sleeper)
    vm.start()
    assert [(gpa, length, writable) for gpa, _, length, writable in processor.vm.memory] == [(0, 16 << 20, True)]


def test_nothing_runs_while_paused(make_vm):
    vm, _ = make_vm(spin)
    ender = Ender(vm)
    vm.ports.attach(0x80, 1, ender)
    fired = []
    vm.start()
    with vm.stopped():
        count = ender.count
        now = vm.clock.now()
        vm.timers.call_at(now + 1_000_000, lambda: fired.append(True))
        with vm.stopped():
            time.sleep(0.02)
        time.sleep(0.02)
        assert ender.count == count
        assert vm.clock.now() == now
        assert not fired
    deadline = time.monotonic() + 5
    while (ender.count == count or not fired) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert ender.count > count
    assert fired


def test_guest_counter_stands_still_while_paused(make_vm):
    vm, _ = make_vm(sleeper)
    vm.start()
    tsc = vm.vcpus[0].tsc
    tsc.write(tsc.now() + 5_000_000_000_000)  # the guest may have set it
    before = tsc.now()
    vm.pause()
    time.sleep(0.05)
    vm.resume()
    assert 0 < tsc.now() - before < vm.tsc_khz * 40


def test_many_pauses_of_a_busy_vm_lose_nothing(make_vm):
    vm, _ = make_vm(spin, sleeper)
    ender = Ender(vm)
    vm.ports.attach(0x80, 1, ender)
    vm.start()
    for _ in range(200):
        with vm.stopped():
            count = ender.count
            assert ender.count == count
    assert vm.state is State.RUNNING


def test_no_wakeup_is_lost(make_vm):
    """Interrupts posted at every moment of a vCPU's way into sleep all arrive."""
    vector = 0x40
    total = 3000

    def guest(cpu):
        while True:
            yield cpu.hlt()

    vm, _processor = make_vm(guest)
    vlapic = vm.vcpus[0].vlapic
    vlapic.virtual_wire()
    vm.start()
    for n in range(total):
        vlapic.post(vector)
        deadline = time.monotonic() + 5
        while vm.vcpus[0].injected <= n:
            assert time.monotonic() < deadline, f"interrupt {n} did not arrive"
            time.sleep(0)
        vlapic.write(0xB0, 4, 0)


def test_spinning_guest_has_hung(make_vm):
    vm, _ = make_vm(lambda cpu: iter(()))
    vm.hang_ns = 200_000_000
    started = time.monotonic()
    vm.start()
    assert vm.wait(5)
    assert vm.suspended.how is Suspend.HANG
    assert time.monotonic() - started >= 0.2


def test_guest_that_makes_exits_or_sleeps_has_not_hung(make_vm):
    for script in (spin, sleeper):
        vm, _ = make_vm(script)
        vm.ports.attach(0x80, 1, Ender(vm))
        vm.hang_ns = 100_000_000
        vm.start()
        assert not vm.wait(0.4)
        vm.close()


def test_threads_have_names_and_places(make_vm):
    vm, _ = make_vm(sleeper)
    cpu = min(os.sched_getaffinity(0))
    vm.vcpus[0].pin([cpu])
    vm.start()
    deadline = time.monotonic() + 5
    while not vm.vcpus[0].native_id and time.monotonic() < deadline:
        time.sleep(0.001)
    thread = vm.vcpus[0].native_id
    time.sleep(0.02)
    assert os.sched_getaffinity(thread) == {cpu}
    assert Path(f"/proc/self/task/{thread}/comm").read_text().strip() == "vcpu0 test"


def test_pinning_to_a_cpu_that_is_not_there_is_one_line(make_vm):
    vm, _ = make_vm(sleeper)
    vm.start()
    deadline = time.monotonic() + 5
    while not vm.vcpus[0].native_id and time.monotonic() < deadline:
        time.sleep(0.001)
    with pytest.raises(HostError, match="cannot pin vCPU 0 to host CPU 1023"):
        vm.vcpus[0].pin([1023])


def test_bug_on_the_event_thread_stops_the_vm(make_vm):
    vm, _ = make_vm(sleeper)
    vm.start()
    vm.timers.call_at(0, lambda: 1 // 0)
    assert vm.wait(5)
    assert vm.suspended.how is Suspend.ERROR
    assert vm.suspended.detail.startswith("ZeroDivisionError")


def test_nothing_is_left_behind(make_vm):
    def descriptors():
        return {
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")
        }

    before, threads = descriptors(), threading.active_count()
    for _ in range(3):
        vm, _ = make_vm(sleeper, sleeper)
        vm.start()
        vm.close()
    assert threading.active_count() == threads
    assert len(descriptors() - before) <= 1


def test_machine_with_too_little_host_memory_leaves_nothing(make_vm):
    vm, processor = make_vm(sleeper)
    with pytest.raises(Exception, match="memory"):
        vm.map_ram(1 << 32, 1 << 45)
    vm.close()
    assert processor.vm.closed


def test_vm_that_was_never_started_closes():
    vm = Vm("idle", FakeProcessor(sleeper), Topology())
    vm.close()
    assert vm.state is State.STOPPED


def test_pause_asked_for_just_before_a_vcpu_looks_at_its_events_is_not_lost(make_vm):
    vm, _ = make_vm(lambda cpu: iter(()))

    class Late:
        """The VM's lock; taking it for the first time, the vCPU is asked to stop."""

        def __enter__(self):
            if not vm.vcpus[0].stop_requested:
                vm.vcpus[0].stop_requested = True
                vm.vcpus[0].notify()

        def __exit__(self, *what):
            pass

    vm._loops[0].lock = Late()
    vm.start()
    vm._threads[0].join(5)
    ended = not vm._threads[0].is_alive()
    vm.vcpus[0].notify()
    assert ended
