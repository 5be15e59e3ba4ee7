"""The run loop: enter the guest, and hand each exit to its handler, found by a table indexed by the reason.

The I/O exit is the path that matters: a device in Python gets hundreds of thousands of accesses a second through it.
Nothing is looked up there that the constructor could look up, and nothing is allocated but what the handler returns.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final, Protocol

from pyhyve.base.errors import GuestFault
from pyhyve.cpu import exits
from pyhyve.cpu.processor import GPR_NAMES, CpuidEntry
from pyhyve.vmm.bus import ONES, MmioBus, PortBus
from pyhyve.vmm.cpuid import CPUID_APIC
from pyhyve.vmm.io.apicbus import ApicBus
from pyhyve.vmm.io.apicregs import BASE_ENABLED
from pyhyve.vmm.vcpu import RUNNING, Vcpu

REASONS: Final = 257
# Hypercalls and their errors (Linux Documentation/virt/kvm/x86/hypercalls.rst).
_SEND_IPI: Final = 10
_EPERM: Final = 1
_ENOSYS: Final = 1000
_EFER_LMA: Final = 1 << 10
_CODE_64: Final = 1 << 13

# Intel SDM vol 3, "Exit Qualification for EPT Violations" (7: a linear address led there, 8: it was that address's own
# translation) and "Page-Fault Exceptions".
_QUALIFICATION_ADDRESS: Final = 1 << 7 | 1 << 8
_IN_PAGE_WALK: Final = 1 << 7
_PF_PRESENT: Final = 1 << 0
_PF_USER: Final = 1 << 2
_PF_RESERVED: Final = 1 << 3


class Memory(Protocol):
    """What the run loop asks of the guest's address space."""

    def fault(self, gpa: int, access: int) -> bool:
        """Make the page there accessible; False if that address is not memory (or not writable)."""
        ...

    def read(self, gpa: int, length: int) -> bytes: ...

    def write(self, gpa: int, data: bytes) -> None: ...


class Emulator(Protocol):
    """Instruction emulation, loaded when the first guest needs it."""

    def emulate(self) -> None:
        """Carry out the instruction at RIP, which the processor handed over, and go past it."""
        ...


class Monitor(Protocol):
    """What the run loop asks of the VM it works for."""

    timing: bool
    apic_bus: ApicBus

    def triple_fault(self, vcpu: Vcpu) -> None: ...

    def engine_error(self, vcpu: Vcpu, message: str) -> None: ...

    def halted_for_good(self, vcpu: Vcpu) -> None: ...

    def crash(self, vcpu: Vcpu, error: BaseException) -> None: ...

    def park(self, vcpu: Vcpu) -> None:
        """Wait while the VM is paused."""
        ...

    def wake(self, mask: int) -> None:
        """Make vCPU n look at what is pending for it, for each bit n of `mask`."""
        ...


class RunLoop:
    """Runs one vCPU until it is asked to stop."""

    def __init__(
        self,
        vm: Monitor,
        vcpu: Vcpu,
        ports: PortBus,
        mmio: MmioBus,
        memory: Memory,
        lock: AbstractContextManager[object],
        emulator: Callable[["RunLoop"], Emulator],
        cpuid: Sequence[CpuidEntry],
    ) -> None:
        self.vm = vm
        self.vcpu = vcpu
        self.mmio = mmio
        self.memory = memory
        self.lock = lock
        self.ports = ports
        self.exit = vcpu.backend.exit
        self._emulator_factory = emulator
        self._emulator: Emulator | None = None
        self._cpuid = {(entry.leaf, entry.subleaf): entry for entry in cpuid}
        # Looked up once for the hot paths.
        self._port_read = ports.read
        self._port_write = ports.write
        self._port_base = ports.base
        self._complete_io = vcpu.backend.complete_io
        self._complete_rdmsr = vcpu.backend.complete_rdmsr
        self._complete_wrmsr = vcpu.backend.complete_wrmsr
        self._msr_readers = vcpu.msrs.readers
        self._msr_writers = vcpu.msrs.writers
        self.table: list[Callable[[], None]] = [self._unexpected] * REASONS
        for reason, handler in (
            (exits.EXTERNAL_INTERRUPT, self._kicked),
            (exits.TRIPLE_FAULT, self._triple_fault),
            (exits.INTERRUPT_WINDOW, vcpu.interrupt_window_opened),
            (exits.NMI_WINDOW, vcpu.nmi_window_opened),
            (exits.CPUID, self._cpuid_exit),
            (exits.TASK_SWITCH, self._task_switch),
            (exits.HLT, self._hlt),
            (exits.VMCALL, self._vmcall),
            (exits.CR_ACCESS, self._cr_access),
            (exits.IO, self._io),
            (exits.RDMSR, self._rdmsr),
            (exits.WRMSR, self._wrmsr),
            (exits.MWAIT, self._skip),
            (exits.MONITOR_TRAP, self._nothing),
            (exits.PAUSE, self._pause),
            (exits.TPR_BELOW_THRESHOLD, self._tpr_below_threshold),
            (exits.EPT_VIOLATION, self._ept_violation),
            (exits.WBINVD, self._skip),
            (exits.APIC_WRITE, self._apic_write),
            (exits.MMIO, self._mmio),
            (exits.ENGINE_ERROR, self._engine_error),
        ):
            self.table[reason] = handler

    def run(self) -> None:
        """Run the vCPU on the calling thread until `stop_requested`. A handler's bug stops the VM."""
        vcpu = self.vcpu
        try:
            while not vcpu.stop_requested:
                self._run()
                if not vcpu.stop_requested:
                    self.vm.park(vcpu)
        except Exception as error:
            # Whatever a device model got wrong, the VM ends with a report rather than with a thread that is gone.
            self.vm.crash(vcpu, error)

    def _run(self) -> None:
        """Run until the VM pauses or stops."""
        vcpu = self.vcpu
        enter = vcpu.backend.run
        table = self.table
        counts = vcpu.exits
        lock = self.lock
        now = time.perf_counter_ns if self.vm.timing else None
        left = entered = 0
        while True:
            if vcpu.attention:
                # Before anything is looked at: what is asked for from here on raises it again.
                vcpu.attention = False
                # In between the vCPU counts as using the page tables: a kick brings it here, where it lets go of them.
                vcpu.leave_tables()
                if vcpu.stop_requested or vcpu.park_requested:
                    return
                with lock:
                    vcpu.attend()
                if vcpu.state != RUNNING:
                    left = 0
                    vcpu.sleep()
                    continue
                vcpu.enter_tables()
            vcpu.in_guest = True
            if vcpu.attention:
                vcpu.in_guest = False
                continue
            if now is None:
                reason = enter()
                vcpu.in_guest = False
            else:
                entered = now()
                if left:
                    vcpu.handler_ns += entered - left
                reason = enter()
                vcpu.in_guest = False
                left = now()
                vcpu.guest_ns += left - entered
            counts[reason] += 1
            try:
                with lock:
                    table[reason]()
            except GuestFault as fault:
                vcpu.inject_exception(fault.vector, fault.error, fault.addr)

    # -- hot: ports and MSRs -------------------------------------------------------------------------------------------

    def _io(self) -> None:
        exit_ = self.exit
        port = exit_.io_port
        if exit_.io_string:
            self._emulate()
        elif exit_.io_in:
            size = exit_.io_size
            self._complete_io(self._port_read[port](port - self._port_base[port], size) & ONES[size])
        else:
            self._port_write[port](port - self._port_base[port], exit_.io_size, exit_.io_value)

    def _rdmsr(self) -> None:
        msr = self.exit.msr
        reader = self._msr_readers.get(msr)
        if reader is None:
            self._complete_rdmsr(self.vcpu.msrs.read(msr))
        else:
            self._complete_rdmsr(reader(msr))

    def _wrmsr(self) -> None:
        exit_ = self.exit
        msr = exit_.msr
        writer = self._msr_writers.get(msr)
        if writer is None:
            self.vcpu.msrs.write(msr, exit_.msr_value)
        else:
            writer(msr, exit_.msr_value)
        self._complete_wrmsr()

    def _kicked(self) -> None:
        self.vcpu.attention = True

    def _nothing(self) -> None:
        """The exit itself was all there was to it."""

    # -- memory --------------------------------------------------------------------------------------------------------

    def _ept_violation(self) -> None:
        exit_ = self.exit
        gpa = exit_.gpa
        if not self.is_device(gpa) and self.memory.fault(gpa, exit_.qualification & 7):
            return
        if self.vcpu.backend.injection_pending():
            # An event's gate, or the stack that it goes on, is no memory: it cannot be delivered, nor can a fault.
            self._triple_fault()
        elif exit_.qualification & _QUALIFICATION_ADDRESS == _IN_PAGE_WALK:
            # An entry of the guest's page tables read where nothing is: all ones, which sets reserved bits.
            user = self.vcpu.backend.get_segment("ss").attr >> 5 & 3 == 3
            raise GuestFault(14, _PF_PRESENT | _PF_RESERVED | (_PF_USER if user else 0), exit_.gla)
        else:
            self._emulate()

    def _mmio(self) -> None:
        exit_ = self.exit
        if exit_.mmio_write:
            self.write_device(exit_.mmio_gpa, exit_.mmio_size, exit_.mmio_value)
        else:
            self.vcpu.backend.complete_mmio(self.read_device(exit_.mmio_gpa, exit_.mmio_size))

    def _emulate(self) -> None:
        emulator = self._emulator
        if emulator is None:
            emulator = self._emulator = self._emulator_factory(self)
        emulator.emulate()

    def is_device(self, gpa: int) -> bool:
        page = gpa >> 12
        return page == self.vcpu.vlapic.page or self.mmio.has_page(page)

    def read_device(self, gpa: int, size: int) -> int:
        """Read what is not memory: the vCPU's own local APIC, or a device on the bus."""
        if gpa >> 12 == self.vcpu.vlapic.page:
            return self.vcpu.read_apic(gpa & 0xFFF, size)
        return self.mmio.read(gpa, size)

    def write_device(self, gpa: int, size: int, value: int) -> None:
        if gpa >> 12 == self.vcpu.vlapic.page:
            self.vcpu.write_apic(gpa & 0xFFF, size, value)
        else:
            self.mmio.write(gpa, size, value)

    def read_port(self, port: int, size: int) -> int:
        return self._port_read[port](port - self._port_base[port], size) & ONES[size]

    def write_port(self, port: int, size: int, value: int) -> None:
        self._port_write[port](port - self._port_base[port], size, value)

    # -- the rest ------------------------------------------------------------------------------------------------------

    def _hlt(self) -> None:
        if self.vcpu.halt():
            self.vm.halted_for_good(self.vcpu)

    def _pause(self) -> None:
        """A spinning vCPU lets other threads of the host go first."""
        self.vcpu.backend.skip(self.exit.length)
        time.sleep(0)

    def _skip(self) -> None:
        """Instructions that have nothing to do here: WBINVD, MWAIT."""
        self.vcpu.backend.skip(self.exit.length)

    def _cpuid_exit(self) -> None:
        backend = self.vcpu.backend
        leaf, subleaf = backend.get_gpr(0) & 0xFFFF_FFFF, backend.get_gpr(1) & 0xFFFF_FFFF
        entry = self._cpuid.get((leaf, None)) or self._cpuid.get((leaf, subleaf))
        eax, ebx, ecx, edx = (entry.eax, entry.ebx, entry.ecx, entry.edx) if entry is not None else (0, 0, 0, 0)
        if leaf == 0xB and entry is None:
            ecx, edx = subleaf & 0xFF, self._cpuid[0xB, 0].edx
        if leaf == 1 and not self.vcpu.vlapic.base_msr & BASE_ENABLED:
            edx &= ~CPUID_APIC
        for index, value in enumerate((eax, ecx, edx, ebx)):
            backend.set_gpr(index, value)
        backend.skip(self.exit.length)

    def _vmcall(self) -> None:
        backend = self.vcpu.backend
        backend.set("rax", self._hypercall() & ONES[8])
        backend.skip(self.exit.length)

    def _hypercall(self) -> int:
        """Carry out a hypercall; return what the guest gets: an error is negative.

        The IPI is not announced (IPIs between vCPUs need no exit on some engines), but there for who asks.
        """
        get = self.vcpu.backend.get
        code = self.vcpu.backend.get_segment("cs")
        if code.selector & 3 and get("cr0") & 1:
            return -_EPERM
        bits = 64 if get("efer") & _EFER_LMA and code.attr & _CODE_64 else 32
        mask = (1 << bits) - 1
        number, low, high, first, command = (get(name) & mask for name in ("rax", "rbx", "rcx", "rdx", "rsi"))
        if number == _SEND_IPI:
            return self.vm.apic_bus.send_to_many(low | high << bits, first, command)
        return -_ENOSYS

    def _cr_access(self) -> None:
        """CR8, by the local APIC (qualification: Intel SDM vol 3, "Exit Qualification for Control-Register Accesses");
        nothing else is intercepted."""
        qualification = self.exit.qualification
        backend = self.vcpu.backend
        if qualification & 0xF != 8:
            raise RuntimeError(f"an exit for CR{qualification & 0xF}, which nobody asked for")
        gpr = qualification >> 8 & 0xF
        if qualification >> 4 & 3:
            self.vcpu.load_task_priority()
            backend.set_gpr(gpr, self.vcpu.vlapic.cr8)
        else:
            value = backend.get_gpr(gpr)
            if value & ~0xF:
                raise GuestFault(13, 0)
            self.vcpu.vlapic.cr8 = value
            self.vcpu.store_task_priority()
        backend.skip(self.exit.length)

    def _tpr_below_threshold(self) -> None:
        self.vcpu.load_task_priority()
        self.vcpu.attention = True

    def _apic_write(self) -> None:
        self.vm.wake(self.exit.qualification)

    def _triple_fault(self) -> None:
        self.vm.triple_fault(self.vcpu)

    def _engine_error(self) -> None:
        self.vm.engine_error(self.vcpu, self.vcpu.backend.message())

    def _task_switch(self) -> None:
        """Intel SDM vol 3, "Exit Qualification for Task Switches"."""
        qualification = self.exit.qualification
        source = ("CALL", "IRET", "JMP", "a task gate in the IDT")[qualification >> 30 & 3]
        message = f"a task switch by {source} (selector {qualification & 0xFFFF:#x}), which hardware does and we do not"
        self.vm.engine_error(self.vcpu, message)

    def _unexpected(self) -> None:
        exit_ = self.exit
        name = exits.NAMES.get(exit_.reason, str(exit_.reason))
        raise RuntimeError(f"an exit that nobody asked for: {name}, qualification {exit_.qualification:#x}")


def dump_registers(vcpu: Vcpu) -> str:
    """Return a few lines with the vCPU's registers, for a report; the vCPU must not be running."""
    backend = vcpu.backend
    lines = [f"vCPU {vcpu.index}: rip {backend.get('rip'):016x} rflags {backend.get('rflags'):08x}"]
    for start in range(0, 16, 4):
        lines.append(" ".join(f"{name:>3} {backend.get(name):016x}" for name in GPR_NAMES[start : start + 4]))
    lines.append(" ".join(f"{name} {backend.get(name):x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer")))
    lines.append(
        " ".join(
            f"{name} {segment.selector:04x}:{segment.base:x}"
            for name in ("cs", "ss", "ds", "fs", "gs", "tr")
            for segment in (backend.get_segment(name),)
        )
    )
    return "\n".join(lines)
