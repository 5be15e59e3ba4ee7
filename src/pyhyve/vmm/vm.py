"""A virtual machine's life: created, running, paused, stopped; its vCPUs, their threads, and why it ended.

The VM has one device lock. It is held around every exit's handler and every callback of the event thread, so that chips
and devices need none of their own; nobody waits for anything while holding it.
"""

import enum
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from pyhyve.cpu import exits
from pyhyve.cpu.processor import Capabilities, CpuidEntry, KeepsApicState, Processor
from pyhyve.vmm import hostcpu
from pyhyve.vmm.bus import MmioBus, PortBus
from pyhyve.vmm.cpufeatures import check_wanted, of_the_monitor, without
from pyhyve.vmm.cpuid import CpuidPolicy, limited
from pyhyve.vmm.events import EventLoop
from pyhyve.vmm.io.apicbus import ApicBus
from pyhyve.vmm.io.apicregs import ApicFeatures
from pyhyve.vmm.io.vlapic import APIC_BUS_HZ, Vlapic
from pyhyve.vmm.memory.vmspace import Vmspace
from pyhyve.vmm.msr import MsrTable
from pyhyve.vmm.runloop import Emulator, RunLoop, dump_registers
from pyhyve.vmm.topology import Topology
from pyhyve.vmm.tsc import GuestTsc, PvClock
from pyhyve.vmm.vcpu import RUNNING, WAIT_SIPI, SingleSteps, Vcpu

_JOIN_S: Final = 5.0
_RFLAGS_IF: Final = 1 << 9


class State(enum.Enum):
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


class Suspend(enum.Enum):
    """Why a VM stopped, as the monitor sees it (bhyve's vm_suspend_how, and what it has no name for)."""

    POWEROFF = "powered-off"
    RESET = "reset"
    HALT = "halt"
    """Every vCPU is halted with interrupts off."""
    TRIPLE_FAULT = "triple-fault"
    EXIT = "exit"
    """The guest wrote a number to a debug-exit port."""
    HANG = "hang"
    """The guest spins without an exit."""
    ERROR = "error"
    """A bug, or a limit of the processor."""
    REQUEST = "request"
    """Somebody outside asked for the end."""


@dataclass(frozen=True, slots=True)
class Suspended:
    """Why and by which vCPU (-1: none); `detail` is one line or, for an error, a report of several."""

    how: Suspend
    vcpu: int = -1
    detail: str = ""
    value: int = 0
    """What the guest wrote (EXIT)."""


@runtime_checkable
class LimitsCpuid(Protocol):
    """An engine that cannot run every feature of the host says so."""

    def supported_cpuid(self) -> Sequence[CpuidEntry]: ...


class InterruptController(Protocol):
    """The 8259 pair, as the bootstrap processor sees it."""

    def pending(self) -> bool: ...

    def acknowledge(self) -> int: ...


class Vm:
    """One virtual machine: processors, memory, buses, local APICs, event thread. Devices are attached by the caller."""

    def __init__(
        self,
        name: str,
        processor: Processor,
        topology: Topology,
        *,
        timing: bool = False,
        cpu_features: Mapping[str, bool] | None = None,
        directed_eoi: bool = True,
    ) -> None:
        """directed_eoi: every I/O APIC will have an EOI register, so the local APICs need not send all EOIs there."""
        self.name = name
        self.timing = timing
        """Measure the time spent in the guest and in handlers."""
        self.lock: Final = threading.RLock()
        self.state = State.CREATED
        self.suspended: Suspended | None = None
        self.on_suspend: Callable[[Suspended], None] | None = None
        """Called once, on the thread that stops the VM, with nothing to wait for."""
        self.hang_ns = 20_000_000_000
        """A guest that spins this long without an exit has hung; 0: never."""
        self.vcpus: list[Vcpu] = []
        self._loops: list[RunLoop] = []
        hostcpu.start_measuring()
        self.capabilities: Capabilities = processor.capabilities()
        self.events = EventLoop(f"{name}/events", self._event_error, self.lock)
        self.clock = self.events.clock
        self.timers = self.events.timers
        self.memory = Vmspace(self.capabilities, self.kick)
        self.memory.on_host_write = self._host_wrote
        self.ports = PortBus()
        self.mmio = MmioBus()
        self.apic_bus = ApicBus()
        self._host_cpuid: hostcpu.CpuidFunction = hostcpu.cpuid
        if isinstance(processor, LimitsCpuid):
            self._host_cpuid = limited(hostcpu.cpuid, processor.supported_cpuid())
        self.processor = processor.create_vm()
        self._threads: list[threading.Thread] = []
        self._pic: InterruptController | None = None
        self._stopped = threading.Event()
        self._parking = threading.Condition()
        self._parked: set[int] = set()
        self._pauses = 0
        self._started_ns = 0
        self._closed = False
        self._watchdog_exits: list[int] = []
        self._watchdog_since = 0
        try:
            self._make_vcpus(topology, cpu_features or {}, directed_eoi)
        except BaseException:
            self.close()
            raise

    def _make_vcpus(self, topology: Topology, cpu_features: Mapping[str, bool], directed_eoi: bool) -> None:
        rdtsc = hostcpu.rdtsc_function()
        khz = hostcpu.tsc_khz()
        host, capabilities = without(self._host_cpuid, self.capabilities, cpu_features)
        policy = CpuidPolicy(host, capabilities, topology, khz, APIC_BUS_HZ // 1000, **of_the_monitor(cpu_features))
        self.cpuid: CpuidPolicy = policy
        apic_features = ApicFeatures(
            policy.physical_bits, policy.x2apic, policy.tsc_deadline, cmci=policy.intel, eoi_suppression=directed_eoi
        )
        self.apic_bus.extended_ids = policy.msi_ext_dest_id
        check_wanted(cpu_features, policy.reported(), self.capabilities.name)
        self.tsc_khz = khz
        self._tsc_start = rdtsc()
        for index, apic_id in enumerate(topology.apic_ids):
            backend = self.processor.create_vcpu(index)
            vcpu = Vcpu(index, backend, self.memory.pmap, self._extint_pending if index == 0 else None)
            tsc = GuestTsc(backend, rdtsc, khz)
            tsc.set_offset(-self._tsc_start)
            vlapic = Vlapic(
                apic_id,
                self.apic_bus,
                self.clock,
                self.timers,
                vcpu.notify,
                tsc.now,
                tsc.hz,
                vcpu.post_init,
                vcpu.post_sipi,
                vcpu.post_nmi,
                vcpu.apic_base_changed,
                backend.apic if isinstance(backend, KeepsApicState) else None,
                apic_features,
            )
            self.apic_bus.attach(vlapic)
            vcpu.tsc = tsc
            tsc.on_write = vlapic.tsc_written
            vcpu.vlapic = vlapic
            vcpu.msrs = MsrTable(
                backend,
                vlapic,
                tsc,
                PvClock(tsc, self.clock, self.memory),
                intel=policy.intel,
                hardware=policy.hardware,
                phys_bits=policy.physical_bits,
                cmci=apic_features.cmci,
            )
            vcpu.msrs.share_task_priority(vcpu.read_apic_msr, vcpu.write_apic_msr)
            entries: Sequence[CpuidEntry] = policy.entries(apic_id)
            backend.set_cpuid(entries)
            vcpu.apic_base_changed()
            loop = RunLoop(self, vcpu, self.ports, self.mmio, self.memory, self.lock, _emulator, entries)
            vlapic.state.direct = isinstance(backend, KeepsApicState)
            self.vcpus.append(vcpu)
            self._loops.append(loop)

    # -- wiring --------------------------------------------------------------------------------------------------------

    def map_ram(self, gpa: int, size: int) -> None:
        """Put zeroed RAM at `gpa`. UsageError if the host has less."""
        self.memory.map_ram(gpa, size)

    def attach_pic(self, pic: InterruptController) -> None:
        """Make the 8259 pair the source of external interrupts of the bootstrap processor."""
        self._pic = pic
        self.apic_bus.extint = pic.acknowledge

    def _extint_pending(self) -> bool:
        pic = self._pic
        return pic is not None and pic.pending()

    def wake(self, mask: int) -> None:
        """Make vCPU n look at what is pending for it, for each bit n of `mask`."""
        while mask:
            lowest = mask & -mask
            self.vcpus[lowest.bit_length() - 1].notify()
            mask ^= lowest

    def kick(self) -> None:
        """Make every vCPU look at what is new: for instance the nested page tables."""
        for vcpu in self.vcpus:
            vcpu.notify()

    def _host_wrote(self, hva: int, length: int) -> None:
        """The monitor or a device stored to guest memory: what was translated from there is stale."""
        for vcpu in self.vcpus:
            vcpu.backend.invalidate_code(hva, length)

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the event thread and the vCPUs. Only once."""
        if self.state is not State.CREATED:
            raise RuntimeError(f"a VM starts once; this one is {self.state.value}")
        for gpa, hva, length, writable in self.memory.ram_ranges():
            self.processor.map_memory(gpa, hva, length, writable)
        self._started_ns = time.monotonic_ns()
        self.state = State.RUNNING
        self.events.start()
        for vcpu, loop in zip(self.vcpus, self._loops, strict=True):
            thread = threading.Thread(
                target=self._vcpu_thread, args=(vcpu, loop), name=f"{self.name}/vcpu{vcpu.index}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        if self.hang_ns:
            self._watch()

    def _vcpu_thread(self, vcpu: Vcpu, loop: RunLoop) -> None:
        try:
            vcpu.begin_thread(f"vcpu{vcpu.index} {self.name}")
        except Exception as error:
            self.crash(vcpu, error)
            return
        loop.run()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the VM has stopped; return whether it has."""
        return self._stopped.wait(timeout)

    def stop(self, detail: str = "") -> None:
        """Stop the VM from outside. Idempotent."""
        self.suspend(Suspend.REQUEST, detail=detail)

    def suspend(self, how: Suspend, vcpu: int = -1, detail: str = "", value: int = 0) -> None:
        """Stop the VM: the first reason counts. From any thread; does not wait for the vCPUs."""
        with self.lock:
            if self.suspended is not None:
                return
            self.suspended = suspended = Suspended(how, vcpu, detail, value)
            self.state = State.STOPPED
        for each in self.vcpus:
            each.stop_requested = True
            each.notify()
        with self._parking:
            self._parking.notify_all()
        if self.on_suspend is not None:
            self.on_suspend(suspended)
        self._stopped.set()

    def pause(self) -> None:
        """Stop the guest's processors and its time; return when every vCPU is out of the guest.

        Counts: each needs its `resume()`. Not for a vCPU's own thread. Harmless on a VM that does not run.
        """
        with self._parking:
            self._pauses += 1
            if self.state is not State.RUNNING:
                return
            self.state = State.PAUSED
            for vcpu in self.vcpus:
                vcpu.park_requested = True
                vcpu.notify()
            self.events.pause()
            while len(self._parked) < len(self.vcpus) and self.state is State.PAUSED:
                self._parking.wait()

    def resume(self) -> None:
        with self._parking:
            if not self._pauses:
                raise RuntimeError("resume() without pause()")
            self._pauses -= 1
            if self._pauses or self.state is not State.PAUSED:
                return
            paused_at = self.clock.now()
            self.events.resume()
            for vcpu in self.vcpus:
                # The guest's counter goes on from where its clock does.
                vcpu.tsc.rebase(self._tsc_at(paused_at))
                vcpu.park_requested = False
            self.state = State.RUNNING
            self._watchdog_since = 0
            self._parking.notify_all()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The guest stands still while this lasts (and looks the same afterwards)."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def _tsc_at(self, clock_ns: int) -> int:
        """What a guest's counter, had nobody written it, shows at a time of the VM's clock."""
        return clock_ns * self.tsc_khz // 1_000_000

    def park(self, vcpu: Vcpu) -> None:
        """On a vCPU's thread: wait while the VM is paused."""
        with self._parking:
            self._parked.add(vcpu.index)
            self._parking.notify_all()
            while vcpu.park_requested and not vcpu.stop_requested:
                self._parking.wait()
            self._parked.discard(vcpu.index)
            vcpu.attention = True

    def join(self) -> bool:
        """Wait for the vCPUs' threads after the VM has stopped; False if one does not end."""
        deadline = time.monotonic() + _JOIN_S
        current = threading.current_thread()
        for thread, vcpu in zip(self._threads, self.vcpus, strict=False):  # a start may have failed half-way
            while thread is not current and thread.is_alive() and time.monotonic() < deadline:
                thread.join(0.2)
                if thread.is_alive():
                    vcpu.notify()
        return not any(thread.is_alive() and thread is not current for thread in self._threads)

    def close(self) -> None:
        """Stop the VM and release everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.suspend(Suspend.REQUEST)
        ended = self.join()
        self.events.stop()
        if ended:
            self.processor.close()
            self.memory.close()

    # -- what the run loop reports -------------------------------------------------------------------------------------

    def triple_fault(self, vcpu: Vcpu) -> None:
        rip = vcpu.backend.get("rip")
        self.suspend(Suspend.TRIPLE_FAULT, vcpu.index, f"triple fault at rip {rip:#x}")

    def engine_error(self, vcpu: Vcpu, message: str) -> None:
        self.suspend(Suspend.ERROR, vcpu.index, f"{message}\n{dump_registers(vcpu)}")

    def crash(self, vcpu: Vcpu, error: BaseException) -> None:
        report = "".join(traceback.format_exception(error)).rstrip()
        self.suspend(Suspend.ERROR, vcpu.index, f"{_one_line(error)}\n{report}\n{dump_registers(vcpu)}")

    def halted_for_good(self, vcpu: Vcpu) -> None:
        """A vCPU is halted with interrupts off; if the others are too (or were never started), nothing can happen."""
        if all(each.dead or each.state == WAIT_SIPI for each in self.vcpus):
            rip = vcpu.backend.get("rip")
            self.suspend(Suspend.HALT, vcpu.index, f"halted with interrupts off at rip {rip:#x}")

    def _event_error(self, error: BaseException) -> None:
        report = "".join(traceback.format_exception(error)).rstrip()
        self.suspend(Suspend.ERROR, detail=f"{_one_line(error)}\n{report}")

    # -- the watchdog --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        self.timers.call_at(self.clock.now() + max(self.hang_ns // 8, 1_000_000), self._check_progress)

    def _check_progress(self) -> None:
        """Stop a VM whose vCPUs all spin (or are dead) and make no exit but for our kicks."""
        if self.state is State.STOPPED:
            return
        progress = [vcpu.progress for vcpu in self.vcpus]
        now = self.clock.now()
        idle = any(vcpu.idle for vcpu in self.vcpus)
        spinning = [vcpu for vcpu in self.vcpus if vcpu.state == RUNNING]
        if progress != self._watchdog_exits or not spinning or idle or not self._watchdog_since:
            self._watchdog_exits = progress
            self._watchdog_since = now
        elif now - self._watchdog_since >= self.hang_ns:
            seconds = self.hang_ns / 1e9
            self.suspend(Suspend.HANG, spinning[0].index, f"no exit in {seconds:g} s")
            return
        self._watch()

    # -- statistics ----------------------------------------------------------------------------------------------------

    def exit_counts(self) -> dict[str, int]:
        """Return how often each reason brought the guest out, over all vCPUs; reasons that never came are left out."""
        counts: dict[str, int] = {}
        for reason in range(len(self.vcpus[0].exits) if self.vcpus else 0):
            total = sum(vcpu.exits[reason] for vcpu in self.vcpus)
            if total:
                counts[exits.NAMES.get(reason, str(reason))] = total
        return counts


def _emulator(loop: RunLoop) -> Emulator:
    """Load instruction emulation (and its decoder) when the first guest needs it."""
    from pyhyve.vmm.assist import Assistant
    from pyhyve.vmm.instruction import InstructionEmulator

    steps = isinstance(loop.vcpu.backend, SingleSteps)
    assistant = Assistant(loop.vcpu, loop, loop.memory.fault) if steps else None
    return InstructionEmulator(loop.vcpu, loop.memory, loop, assistant)


def _one_line(error: BaseException) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
