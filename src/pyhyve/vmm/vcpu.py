"""One virtual processor: its thread, its sleep, and the events on their way to it.

Who wants something of a vCPU sets what it wants and calls `notify()`: the vCPU looks before its next entry. `notify`
kicks the processor only while it executes the guest, and wakes the thread only while it sleeps.

Without a lock this is sound because each side writes before it reads: the vCPU raises `in_guest` (or `sleeping`) and
then looks at `attention`; a notifier raises `attention` and then looks at `in_guest` and `sleeping`.
"""

import _thread
import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from pyhyve.base.errors import HostError
from pyhyve.cpu.exits import EXTERNAL_INTERRUPT
from pyhyve.cpu.processor import INJECT_EXCEPTION, INJECT_EXTERNAL, INJECT_NMI, ApicState, Segment, VcpuBackend
from pyhyve.vmm.io.apicregs import BASE_BSP
from pyhyve.vmm.msr import MsrTable
from pyhyve.vmm.tsc import GuestTsc

RUNNING: Final = 0
HALTED: Final = 1
WAIT_SIPI: Final = 2
STATE_NAMES: Final = ("running", "halted", "wait-for-sipi")

_PR_SET_NAME: Final = 15
_TPR: Final = 0x80
_RFLAGS_IF: Final = 1 << 9
_CR0_CD_NW: Final = 0x6000_0000
_CR0_ET: Final = 0x10


class LocalApic(Protocol):
    """What a vCPU asks of its local APIC."""

    cr8: int
    page: int
    """The number of the page (gpa >> 12) that it decodes, -1 if none."""

    @property
    def base_msr(self) -> int: ...

    @property
    def state(self) -> ApicState: ...

    def pending_vector(self) -> int | None: ...

    def acknowledge(self, vector: int) -> int: ...

    def extint_enabled(self) -> bool: ...

    def acknowledge_extint(self) -> int | None: ...

    def init(self) -> None: ...

    def reset(self) -> None: ...

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...

    def rdmsr(self, msr: int) -> int: ...

    def wrmsr(self, msr: int, value: int) -> None: ...


class Pmap(Protocol):
    """Where the nested page tables are, and how new; it is told when a vCPU uses them."""

    @property
    def eptp(self) -> int: ...

    def activate(self, vcpu: int) -> int: ...

    def deactivate(self, vcpu: int) -> None: ...


_NMIS: Final = 2
"""One NMI may be on its way into its handler while another waits for the handler's end; more are lost."""
_OTHER_TABLES: Final = (1 << 64) - 1
"""A generation that the VM's own nested page tables never have."""


@dataclass(frozen=True, slots=True)
class WaitingEvents:
    """Events other than interrupts that a vCPU has not taken yet. sipi: a start-up vector, or -1."""

    init: bool
    sipi: int
    nmis: int


@runtime_checkable
class SingleSteps(Protocol):
    """An engine that can end `run()` behind each instruction."""

    def single_step(self, wanted: bool) -> None: ...


class Vcpu:
    """A vCPU of a VM. `lock` is the VM's device lock: held around everything but the guest's own execution and sleep.

    The wiring (`vlapic`, `msrs`, `tsc`) is set by the VM before the thread starts.
    """

    vlapic: LocalApic
    msrs: MsrTable
    tsc: GuestTsc

    def __init__(self, index: int, backend: VcpuBackend, pmap: Pmap, extint: Callable[[], bool] | None) -> None:
        self.index = index
        self.backend = backend
        self.state = RUNNING if index == 0 else WAIT_SIPI
        self.attention = True
        """Something is to be looked at before the next entry."""
        self.in_guest = False
        self.sleeping = False
        self.stop_requested = False
        self.park_requested = False
        self.dead = False
        """Halted with interrupts off: only an NMI, an INIT or a reset gets it out."""
        self.ept_generation = -1
        self.exits: list[int] = [0] * 257
        self._delivered: list[int] = [0] * 256
        self.nmis_delivered = 0
        self.guest_ns = 0
        self.handler_ns = 0
        self.native_id = 0
        self._pmap = pmap
        self._extint = extint
        """Whether the legacy interrupt controllers hold an interrupt; None where they are wired to another vCPU."""
        self._init_pending = False
        self._sipi_vector = -1
        self._nmis = 0
        self._window = False
        self._nmi_window = False
        self._wake = _thread.allocate_lock()
        self._wake.acquire()
        self._affinity: frozenset[int] | None = None

    # -- from any thread -----------------------------------------------------------------------------------------------

    def notify(self) -> None:
        """Make the vCPU look at what is pending for it, soon."""
        self.attention = True
        if self.in_guest:
            self.backend.kick()
        elif self.sleeping:
            self.wake()

    def wake(self) -> None:
        with suppress(RuntimeError):  # it has been woken already
            self._wake.release()

    def post_init(self) -> None:
        """An INIT arrived."""
        self._sipi_vector = -1
        self._init_pending = True
        self.notify()

    def post_sipi(self, vector: int) -> None:
        """A start-up IPI arrived; only a vCPU that waits for one (or is about to, after an INIT) takes it."""
        if self.state == WAIT_SIPI or self._init_pending:
            self._sipi_vector = vector & 0xFF
            self.notify()

    def post_nmi(self) -> None:
        self._nmis = min(self._nmis + 1, _NMIS)
        self.notify()

    def waiting_events(self) -> WaitingEvents:
        """What a diagnosis shows; while the vCPU runs, a moment's view."""
        return WaitingEvents(self._init_pending, self._sipi_vector, self._nmis)

    def pin(self, host_cpus: Iterable[int]) -> None:
        """Run only on these host CPUs, now or as soon as the thread starts. HostError if the host has none of them."""
        self._affinity = frozenset(host_cpus)
        if self.native_id:
            self._apply_affinity()

    @property
    def host_cpus(self) -> frozenset[int]:
        """The host CPUs that it may run on: as its thread has it, once there is one."""
        if self.native_id:
            with suppress(ProcessLookupError):  # the thread has ended
                return frozenset(os.sched_getaffinity(self.native_id))
        return self._affinity if self._affinity is not None else frozenset(os.sched_getaffinity(0))

    # -- on the vCPU's thread ------------------------------------------------------------------------------------------

    def begin_thread(self, name: str) -> None:
        """First thing on the vCPU's own thread: its name, as the host's tools show it, and its host CPUs."""
        self.native_id = threading.get_native_id()
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode("utf-8", "replace")[:15], 0, 0, 0)
        self._apply_affinity()

    def _apply_affinity(self) -> None:
        if self._affinity is None:
            return
        try:
            os.sched_setaffinity(self.native_id, self._affinity)
        except OSError as error:
            cpus = ", ".join(map(str, sorted(self._affinity)))
            raise HostError(f"cannot pin vCPU {self.index} to host CPU {cpus}: {error.strerror}") from None

    def sleep(self) -> None:
        """Wait for `notify()`, at no cost to the host."""
        self.sleeping = True
        if not self.attention:
            self._wake.acquire()
        self.sleeping = False

    @property
    def injected(self) -> int:
        """How many external interrupts the guest took."""
        return sum(self.delivered)

    @property
    def delivered(self) -> Sequence[int]:
        """The same, by vector."""
        by_processor = self.vlapic.state.delivered()
        return [n + m for n, m in zip(self._delivered, by_processor, strict=True)] if by_processor else self._delivered

    @property
    def idle(self) -> bool:
        """Halted, waiting for an interrupt."""
        return (self.state == HALTED and not self.dead) or self.vlapic.state.halted

    @property
    def halted_ns(self) -> int:
        """How long the processor has waited in HLT by itself: a part of `guest_ns`."""
        return self.vlapic.state.halted_cycles * 1_000_000 // self.tsc.khz

    @property
    def progress(self) -> int:
        """A number that grows as long as the guest does anything that the processor does not do alone; kicks aside."""
        return sum(self.exits) - self.exits[EXTERNAL_INTERRUPT] + self.vlapic.state.activity

    @property
    def eptp(self) -> int:
        return self._pmap.eptp

    def step(self, eptp: int) -> int:
        """Run the instruction at RIP with other nested page tables, or bring the guest to the handler of its fault;
        return the exit's reason, MONITOR_TRAP if that was possible. The engine must be able to `single_step`."""
        backend = self.backend
        assert isinstance(backend, SingleSteps)
        backend.request_interrupt_window(False)
        backend.request_nmi_window(False)
        backend.set_ept(eptp, _OTHER_TABLES)
        backend.single_step(True)
        try:
            while (reason := backend.run()) == EXTERNAL_INTERRUPT:
                self.attention = True
        finally:
            backend.single_step(False)
            backend.set_ept(self._pmap.eptp, self.ept_generation)
            backend.request_interrupt_window(self._window)
            backend.request_nmi_window(self._nmi_window)
        return reason

    def enter_tables(self) -> None:
        """Say that the guest's nested page tables are in use, and flush if they are newer than those used last."""
        generation = self._pmap.activate(self.index)
        if generation != self.ept_generation:
            self.ept_generation = generation
            self.backend.set_ept(self._pmap.eptp, generation)

    def leave_tables(self) -> None:
        """Say that the nested page tables are not in use: not even a cached translation."""
        self._pmap.deactivate(self.index)

    def attend(self) -> None:
        """Look at what is pending and prepare the next entry; called with the device lock held, `attention` cleared."""
        backend = self.backend
        apic = self.vlapic.state
        if apic.resting:
            apic.resting = False
            self.state = HALTED
        if self._init_pending:
            self._take_init()
        if self.state == WAIT_SIPI:
            if self._sipi_vector < 0:
                return
            self._take_sipi()
        if self._nmis:
            self._take_nmi()
        self.load_task_priority()
        vlapic = self.vlapic
        vector = vlapic.pending_vector()
        wanted = False
        if vector is not None and not apic.direct:
            if backend.interruptible():
                vector = vlapic.acknowledge(vector)
                backend.inject(vector, INJECT_EXTERNAL)
                self._delivered[vector] += 1
                self.state = RUNNING
                wanted = vlapic.pending_vector() is not None
            else:
                wanted = True
        elif self._extint is not None and self._extint() and vlapic.extint_enabled():
            if backend.interruptible():
                vector = vlapic.acknowledge_extint()
                if vector is not None:
                    backend.inject(vector, INJECT_EXTERNAL)
                    self._delivered[vector] += 1
                    self.state = RUNNING
            else:
                wanted = True
        if wanted is not self._window:
            self._window = wanted
            backend.request_interrupt_window(wanted)
        if self.state == HALTED and apic.direct and apic.accepting and not wanted and backend.interruptible():
            # The processor goes on with the HLT: it delivers what ends it.
            apic.resting = True
            self.state = RUNNING

    def load_task_priority(self) -> None:
        """Tell the local APIC of the guest's CR8: the processor may have changed it without an exit."""
        self.vlapic.cr8 = self.backend.get("cr8")

    def store_task_priority(self) -> None:
        """Tell the processor of the local APIC's task priority: CR8 is TPR bits 7:4."""
        self.backend.set("cr8", self.vlapic.cr8)

    def apic_base_changed(self) -> None:
        """Tell the processor where the local APIC's page is now, and whether CPUID shows a local APIC."""
        self.backend.set("apic_base", self.vlapic.base_msr)

    def read_apic(self, offset: int, size: int) -> int:
        """Read the xAPIC page."""
        self.load_task_priority()
        return self.vlapic.read(offset, size)

    def write_apic(self, offset: int, size: int, value: int) -> None:
        if offset == _TPR:
            self.load_task_priority()
            self.vlapic.write(offset, size, value)
            self.store_task_priority()
        else:
            self.vlapic.write(offset, size, value)

    def read_apic_msr(self, msr: int) -> int:
        """Read an MSR of the local APIC that shows the task priority."""
        self.load_task_priority()
        return self.vlapic.rdmsr(msr)

    def write_apic_msr(self, msr: int, value: int) -> None:
        """Write an MSR of the local APIC that changes the task priority."""
        self.load_task_priority()
        self.vlapic.wrmsr(msr, value)
        self.store_task_priority()

    def halt(self) -> bool:
        """The guest executed HLT. Return True if nothing but an NMI, an INIT or a reset can wake it."""
        self.state = HALTED
        self.attention = True
        self.dead = not self.backend.get("rflags") & _RFLAGS_IF and not self._nmis and not self._init_pending
        return self.dead

    def inject_exception(self, vector: int, error: int | None = None, addr: int = 0) -> None:
        """Make the guest take an exception at its present RIP; `addr` is CR2 for a page fault."""
        if vector == 14:
            self.backend.set("cr2", addr)
        self.backend.inject(vector, INJECT_EXCEPTION, error)

    def interrupt_window_opened(self) -> None:
        self.attention = True

    def nmi_window_opened(self) -> None:
        self.attention = True
        self._nmi_window = False
        self.backend.request_nmi_window(False)

    def _take_nmi(self) -> None:
        if self.backend.nmi_allowed() and not self.backend.injection_pending():
            self._nmis -= 1
            self.dead = False
            self.state = RUNNING
            self.backend.inject(2, INJECT_NMI)
            self.nmis_delivered += 1
        else:
            self._nmis = 1
        if self._nmis and not self._nmi_window:
            self._nmi_window = True
            self.backend.request_nmi_window(True)

    def _take_init(self) -> None:
        self._init_pending = False
        self._nmis = 0
        self.dead = False
        self.vlapic.init()
        keep_cache_bits = self.backend.get("cr0") & _CR0_CD_NW
        reset_registers(self.backend)
        self.backend.set("cr0", keep_cache_bits | _CR0_ET)
        # The bootstrap processor goes on at the reset vector; the others wait ("MP Initialization Protocol").
        self.state = RUNNING if self.vlapic.base_msr & BASE_BSP else WAIT_SIPI

    def _take_sipi(self) -> None:
        vector, self._sipi_vector = self._sipi_vector, -1
        self.backend.set_segment("cs", Segment(vector << 8, vector << 12, 0xFFFF, 0x9B))
        self.backend.set("rip", 0)
        self.state = RUNNING


def reset_registers(backend: VcpuBackend) -> None:
    """Give a vCPU the state after INIT (Intel SDM vol 3, "Processor State After Reset"); the FPU keeps its own."""
    backend.request_interrupt_window(False)
    backend.set("efer", 0)
    for name, value in (
        ("cr0", 0x6000_0010), ("cr2", 0), ("cr3", 0), ("cr4", 0), ("cr8", 0), ("rflags", 2), ("rip", 0xFFF0),
        ("dr0", 0), ("dr1", 0), ("dr2", 0), ("dr3", 0), ("dr6", 0xFFFF_0FF0), ("dr7", 0x400),
    ):  # fmt: skip
        backend.set(name, value)
    for index in range(16):
        backend.set_gpr(index, 0)
    backend.set("rdx", 0x600)
    for name in ("es", "ss", "ds", "fs", "gs"):
        backend.set_segment(name, Segment())
    backend.set_segment("cs", Segment(0xF000, 0xFFFF_0000, 0xFFFF, 0x9B))
    backend.set_segment("ldtr", Segment(0, 0, 0xFFFF, 0x82))
    backend.set_segment("tr", Segment(0, 0, 0xFFFF, 0x8B))
    backend.set_table("gdtr", 0, 0xFFFF)
    backend.set_table("idtr", 0, 0xFFFF)
