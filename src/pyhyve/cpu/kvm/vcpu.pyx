# cython: language_level=3
"""A KVM vCPU as the contract in pyhyve.cpu.processor wants it.

KVM differs from VT-x's raw interface in four ways, and each is settled here, so that the monitor does not see it:

1. KVM finishes an instruction that exited (OUT, MMIO, RDMSR ...) at the *next* KVM_RUN. An answered exit is therefore
   `DONE`, and whoever looks at registers before the next run makes `_settle()` enter KVM with `immediate_exit` set: it
   finishes the instruction and returns at once.
2. An I/O exit may hold several elements of a string instruction. Each is presented as an exit of its own, and KVM is
   entered again only behind the last.
3. KVM holds back an NMI by itself while NMIs are blocked, and has no exit for the end of that. So the monitor may
   always hand one over, and an NMI window is always open.
4. Memory is a set of slots, not an EPT: what the monitor maps is made a slot, and an access outside of all slots comes
   back decoded, as exits.MMIO.

No interrupt controller of the kernel is used. Source: the kernel's Documentation/virt/kvm/api.rst.
"""

import os
from collections.abc import Sequence

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.signal cimport (
    SA_ONSTACK, SA_RESTART, SIG_UNBLOCK, sigaction, sigaction_t, sigaddset, sigemptyset, sigset_t
)
from posix.unistd cimport getpid

from pyhyve.cpu.kvm.registers cimport Registers, failed
from pyhyve.cpu.kvm.uapi cimport *

from pyhyve.base.errors import HostError
from pyhyve.cpu.kvm import walk
from pyhyve.cpu.processor import (
    INJECT_EXCEPTION, INJECT_EXTERNAL, INJECT_NMI, INJECT_SOFTWARE, CpuidEntry
)

cdef extern from "<signal.h>" nogil:
    int SIGRTMIN, SIGRTMAX
    int pthread_sigmask(int how, const sigset_t* new, sigset_t* old)
    void (*SIG_DFL)(int) noexcept nogil

cdef extern from *:
    """
    #include <unistd.h>
    #include <sys/syscall.h>
    #define load_flag(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
    #define store_flag(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
    #define exchange_flag(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
    #define thread_id() ((int)syscall(SYS_gettid))
    #define signal_thread(pid, tid, sig) ((int)syscall(SYS_tgkill, (pid), (tid), (sig)))
    """
    uint8_t load_flag(uint8_t* flag) nogil
    void store_flag(uint8_t* flag, uint8_t value) nogil
    uint8_t exchange_flag(uint8_t* flag, uint8_t value) nogil
    int thread_id() nogil
    int signal_thread(int pid, int tid, int sig) nogil

cdef enum:
    X_EXTERNAL_INTERRUPT = 1     # as in pyhyve.cpu.exits
    X_TRIPLE_FAULT = 2
    X_INTERRUPT_WINDOW = 7
    X_NMI_WINDOW = 8
    X_HLT = 12
    X_IO = 30
    X_RDMSR = 31
    X_WRMSR = 32
    X_TPR_BELOW_THRESHOLD = 43
    X_ENGINE_ERROR = 255
    X_MMIO = 256

    # What has become of the last exit.
    IDLE = 0                     # nothing to finish
    DONE = 1                     # answered: KVM finishes the instruction at the next entry
    OPEN_IO = 2                  # an IN, or elements of a string, to come
    OPEN_MMIO = 3                # an MMIO read to be completed
    OPEN_MSR = 4                 # to be completed, or replaced by an injected exception

    RFLAGS_IF = 0x200

COUNTERS = (
    "entries", "settles", "kicks", "injections", "io", "mmio", "msr", "hlt", "windows", "interrupted", "errors",
)
cdef enum:
    N_ENTRIES = 0
    N_SETTLES = 1
    N_KICKS = 2
    N_INJECTIONS = 3
    N_IO = 4
    N_MMIO = 5
    N_MSR = 6
    N_HLT = 7
    N_WINDOWS = 8
    N_INTERRUPTED = 9
    N_ERRORS = 10
    N_COUNTERS = 11

cdef int kick_signal = 0


cdef void on_kick(int signal) noexcept nogil:
    """Nothing: that the signal interrupted KVM_RUN is all it is for."""


cpdef int install_kick_signal() except -1:
    """Take the first real-time signal that nobody uses. Other signals' handlers are left alone."""
    global kick_signal
    cdef sigaction_t action, old
    cdef int signal
    if kick_signal:
        return 0
    for signal in range(SIGRTMIN, SIGRTMAX + 1):
        if sigaction(signal, NULL, &old) == 0 and <void*>old.sa_handler == <void*>SIG_DFL:
            memset(&action, 0, sizeof(action))
            action.sa_handler = <void (*)(int) noexcept>on_kick
            action.sa_flags = SA_RESTART | SA_ONSTACK
            sigemptyset(&action.sa_mask)
            if sigaction(signal, &action, NULL) == 0:
                kick_signal = signal
                return 0
    raise HostError("no real-time signal is free to interrupt vCPUs with")


cdef class Exit:
    """The last exit of a vCPU; fields as in processor.Exit."""

    cdef public unsigned int reason
    cdef public unsigned int length
    cdef public uint64_t qualification
    cdef public uint64_t gpa
    cdef public uint64_t gla
    cdef public unsigned int io_port
    cdef public unsigned int io_size
    cdef public bint io_in
    cdef public bint io_string
    cdef public uint64_t io_value
    cdef public unsigned int msr
    cdef public uint64_t msr_value
    cdef public uint64_t mmio_gpa
    cdef public unsigned int mmio_size
    cdef public bint mmio_write
    cdef public uint64_t mmio_value


cdef class Vcpu(Registers):
    """One vCPU. KVM wants its calls from one thread at a time; `kick` alone may come from any.

    peek(gpa, size): reads guest memory, None where there is none.
    """

    cdef readonly Exit exit
    cdef object peek
    cdef int state
    cdef bint deferred           # KVM came back with another exit while it was to finish the last one
    cdef bint fresh              # the run page's answers are of an exit, not of a new vCPU
    cdef uint32_t io_left        # elements behind the one presented
    cdef uint8_t* io_data        # the element presented, in the run page
    # The event that the monitor injects
    cdef bint event, event_has_error
    cdef bint handed_over        # KVM may hold an event that is not delivered yet
    cdef int event_vector, event_kind
    cdef uint32_t event_error
    cdef bint nmi_window
    # Shared with threads that kick
    cdef uint8_t kicked, running
    cdef int tid
    cdef uint64_t counter[N_COUNTERS]

    def __init__(self, vm_fd: int, page_size: int, xsave_size: int, vcpu_id: int, peek: object) -> None:
        self.exit = Exit()
        self.peek = peek

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        self._alive()
        cdef int result, number
        if load_flag(&self.kicked):
            return self._interrupted()
        if self.nmi_window and not self.event:
            return self._report(X_NMI_WINDOW)
        if self.io_left:
            self.io_left -= 1
            self.io_data += self.exit.io_size
            return self._present_io()
        if self.state == OPEN_MSR:
            self._cancel_msr()
        if self.state != IDLE and (self.event or self.dirty_apic_base) and not self.deferred:
            self._settle()                # this comes behind the instruction, so finish that first
        if self.deferred:
            self.deferred = False
            result = self._decode()
            if result:
                return result
        if self.page.request_interrupt_window and self.state == IDLE and self.interruptible():
            return self._report(X_INTERRUPT_WINDOW)
        if not self._write_registers() or self.event and not self._hand_over():
            self.exit.qualification = self.error
            return self._report(X_ENGINE_ERROR)
        cdef int tid = thread_id()
        if tid != self.tid:
            self._adopt_thread(tid)
        while True:
            with nogil:
                # kick() sets immediate_exit, then looks at `running`; here it is the other way round. So either KVM
                # sees immediate_exit, or kick() sees that there is a thread to send the signal to.
                store_flag(&self.running, 1)
                result = ioctl(self.fd, KVM_RUN, <unsigned long>0)
                number = errno
                store_flag(&self.running, 0)
            self.counter[N_ENTRIES] += 1
            self._entered()
            if result < 0:
                if number == EINTR:
                    return self._interrupted()
                self.exit.qualification = number
                self.text = f"KVM_RUN: {os.strerror(number)}"
                return self._report(X_ENGINE_ERROR)
            result = self._decode()
            if result:
                return result

    cdef void _entered(self) noexcept:
        """KVM ran: forget what was known of the vCPU."""
        self._forget()
        self.state = IDLE
        self.fresh = True

    cdef int _report(self, int reason) noexcept:
        self.exit.reason = reason
        if reason == X_INTERRUPT_WINDOW or reason == X_NMI_WINDOW:
            self.counter[N_WINDOWS] += 1
        elif reason == X_ENGINE_ERROR:
            self.counter[N_ERRORS] += 1
        return reason

    cdef int _interrupted(self) noexcept:
        """Take the kick. In this order a kick() that comes in between is either this one or seen by the next run()."""
        store_flag(&self.page.immediate_exit, 0)
        store_flag(&self.kicked, 0)
        self.counter[N_INTERRUPTED] += 1
        return self._report(X_EXTERNAL_INTERRUPT)

    cdef int _adopt_thread(self, int tid) except -1:
        """Run on this thread from now on: kicks go to it, and it must not block their signal."""
        cdef sigset_t kick
        sigemptyset(&kick)
        sigaddset(&kick, kick_signal)
        pthread_sigmask(SIG_UNBLOCK, &kick, NULL)
        self.tid = tid
        return 0

    def kick(self) -> None:
        if self.page == NULL:
            return
        if exchange_flag(&self.kicked, 1):
            return
        self.counter[N_KICKS] += 1
        store_flag(&self.page.immediate_exit, 1)
        if load_flag(&self.running):
            signal_thread(getpid(), self.tid, kick_signal)

    cdef int _decode(self) except -1:
        """Fill in `exit` from the run page. 0: nothing for the monitor, enter again."""
        cdef kvm_run* page = self.page
        cdef Exit exit = self.exit
        cdef uint32_t reason = page.exit_reason
        if reason == KVM_EXIT_IO:
            exit.io_port = page.io.port
            exit.io_size = page.io.size
            exit.io_in = page.io.direction != KVM_EXIT_IO_OUT
            exit.io_string = False
            self.io_data = <uint8_t*>page + page.io.data_offset
            self.io_left = page.io.count - 1
            if exit.io_in:
                memset(self.io_data, 0xFF, page.io.count * page.io.size)
            return self._present_io()
        if reason == KVM_EXIT_MMIO:
            self.counter[N_MMIO] += 1
            exit.mmio_gpa = page.mmio.phys_addr
            exit.mmio_size = page.mmio.len
            exit.mmio_write = page.mmio.is_write != 0
            exit.mmio_value = 0
            if exit.mmio_write:
                memcpy(&exit.mmio_value, page.mmio.data, min(page.mmio.len, 8))
                self.state = DONE
            else:
                memset(page.mmio.data, 0xFF, 8)
                self.state = OPEN_MMIO
            return self._report(X_MMIO)
        if reason == KVM_EXIT_HLT:
            self.counter[N_HLT] += 1
            return self._report(X_HLT)
        if reason == KVM_EXIT_X86_RDMSR or reason == KVM_EXIT_X86_WRMSR:
            page.msr.error = 1
            self.state = OPEN_MSR
            # A value that hardware refuses in an MSR of our own is #GP, as it is without a monitor. (The x2APIC's MSRs
            # cannot be filtered; without a local APIC in the kernel they come this way.)
            if page.msr.reason & KVM_MSR_EXIT_REASON_INVAL and not 0x800 <= page.msr.index <= 0x8FF:
                self.state = DONE
                return 0
            self.counter[N_MSR] += 1
            exit.msr = page.msr.index
            if reason == KVM_EXIT_X86_RDMSR:
                exit.msr_value = 0
                return self._report(X_RDMSR)
            exit.msr_value = page.msr.data
            return self._report(X_WRMSR)
        if reason == KVM_EXIT_IRQ_WINDOW_OPEN:
            return self._report(X_INTERRUPT_WINDOW)
        if reason == KVM_EXIT_SHUTDOWN:
            return self._report(X_TRIPLE_FAULT)
        if reason == KVM_EXIT_SET_TPR:
            return self._report(X_TPR_BELOW_THRESHOLD)
        if reason == KVM_EXIT_INTR:
            return self._interrupted()
        self._describe(reason)
        return self._report(X_ENGINE_ERROR)

    cdef int _present_io(self) noexcept:
        """The element at io_data is the exit now."""
        cdef Exit exit = self.exit
        exit.io_value = 0
        if not exit.io_in:
            memcpy(&exit.io_value, self.io_data, exit.io_size)
        self.state = OPEN_IO if exit.io_in or self.io_left else DONE
        self.counter[N_IO] += 1
        return self._report(X_IO)

    cdef int _describe(self, uint32_t reason) except -1:
        """What went wrong, for message()."""
        cdef kvm_run* page = self.page
        cdef Exit exit = self.exit
        if reason == KVM_EXIT_INTERNAL_ERROR:
            exit.qualification = page.emulation_failure.suberror
            self.text = f"KVM internal error {page.emulation_failure.suberror}"
            if page.emulation_failure.suberror == KVM_INTERNAL_ERROR_EMULATION:
                self._load_regs()
                self.text = f"KVM cannot emulate the instruction at rip {self.regs.rip:#x}"
                if page.emulation_failure.ndata >= 3 and page.emulation_failure.flags & 1:
                    size = min(page.emulation_failure.insn_size, 15)
                    self.text += ": " + bytes(page.emulation_failure.insn_bytes[:size]).hex(" ")
        elif reason == KVM_EXIT_FAIL_ENTRY:
            exit.qualification = page.fail_entry.hardware_entry_failure_reason
            self.text = f"the processor refuses to enter the guest: reason {exit.qualification:#x}"
        else:
            exit.qualification = page.hw.hardware_exit_reason
            self.text = f"KVM exit {reason} is not one that was asked for"
        return 0

    # -- finishing the last exit --------------------------------------------------------------------------------------

    cdef int _settle(self) except -1:
        """Let KVM finish the last exit's instruction without running on."""
        self._alive()
        store_flag(&self.page.immediate_exit, 1)
        cdef int result = ioctl(self.fd, KVM_RUN, <unsigned long>0)
        cdef int number = errno
        store_flag(&self.page.immediate_exit, 0)
        if load_flag(&self.kicked):       # one that came meanwhile must not be lost
            store_flag(&self.page.immediate_exit, 1)
        self.counter[N_SETTLES] += 1
        self._entered()
        self.io_left = 0
        if result == 0 and self.page.exit_reason != KVM_EXIT_INTR:
            self.deferred = True          # the same instruction has more: run() will say so
        elif result < 0 and number != EINTR:
            raise HostError(f"KVM: cannot finish an instruction: {os.strerror(number)}")
        return 0

    cdef int _before_read(self) except -1:
        self._alive()
        if self.state == DONE:
            self._settle()
        return 0

    cdef int _before_change(self) except -1:
        self._alive()
        if self.state == OPEN_MSR:
            self._cancel_msr()
        elif self.state != IDLE:
            self._settle()
        return 0

    cdef int _cancel_msr(self) except -1:
        """Undo an RDMSR or WRMSR that nobody completed: KVM makes #GP of it, and we drop that again."""
        cdef kvm_vcpu_events events
        self.page.msr.error = 1
        self._settle()
        self._get_events(&events)
        events.exception.injected = 0
        events.exception.pending = 0
        self._set_events(&events)
        return 0

    def complete_io(self, value: int) -> None:
        self._alive()
        if self.state != OPEN_IO or not self.exit.io_in:
            raise RuntimeError("complete_io: the last exit is no IN that is to be completed")
        cdef uint64_t data = value & 0xFFFFFFFF
        memcpy(self.io_data, &data, self.exit.io_size)
        if not self.io_left:
            self.state = DONE

    def complete_mmio(self, value: int) -> None:
        self._alive()
        if self.state == DONE and self.exit.reason == X_MMIO:
            return
        if self.state != OPEN_MMIO:
            raise RuntimeError("complete_mmio: the last exit is no MMIO read that is to be completed")
        cdef uint64_t data = value & 0xFFFFFFFFFFFFFFFF
        memcpy(self.page.mmio.data, &data, 8)
        self.state = DONE

    def complete_rdmsr(self, value: int) -> None:
        self._complete_msr(X_RDMSR, value & 0xFFFFFFFFFFFFFFFF)

    def complete_wrmsr(self) -> None:
        self._complete_msr(X_WRMSR, 0)

    cdef int _complete_msr(self, unsigned int reason, uint64_t value) except -1:
        self._alive()
        if self.state != OPEN_MSR or self.exit.reason != reason:
            raise RuntimeError("the last exit is no MSR access of that kind that is to be completed")
        if reason == X_RDMSR:
            self.page.msr.data = value
        self.page.msr.error = 0
        self.state = DONE
        return 0

    # -- events -------------------------------------------------------------------------------------------------------

    cdef int _get_events(self, kvm_vcpu_events* events) except -1:
        self._alive()
        if ioctl(self.fd, KVM_GET_VCPU_EVENTS, events):
            raise failed("cannot read pending events")
        return 0

    cdef int _set_events(self, kvm_vcpu_events* events) except -1:
        if ioctl(self.fd, KVM_SET_VCPU_EVENTS, events):
            raise failed("cannot set pending events")
        return 0

    def inject(self, vector: int, kind: int, error: int | None = None) -> None:
        self._alive()
        if self.event:
            raise RuntimeError(f"inject: vector {self.event_vector} is still to be delivered")
        if kind not in (INJECT_EXTERNAL, INJECT_NMI, INJECT_EXCEPTION, INJECT_SOFTWARE):
            raise ValueError(f"inject: unknown kind {kind}")
        if not 0 <= vector <= (31 if kind == INJECT_EXCEPTION else 255):
            raise ValueError(f"inject: no such vector: {vector}")
        self.event_vector = vector
        self.event_kind = kind
        self.event_has_error = error is not None
        self.event_error = 0 if error is None else error & 0xFFFFFFFF
        self.event = True

    cdef bint _hand_over(self) except -1:
        """Give the injected event to KVM. False, with `text`, if it does not take it."""
        cdef kvm_vcpu_events events
        cdef kvm_interrupt interrupt
        cdef int result
        if self.event_kind == INJECT_NMI:
            result = ioctl(self.fd, KVM_NMI, <unsigned long>0)
        elif self.event_kind == INJECT_EXCEPTION:
            self._get_events(&events)
            events.exception.injected = 1
            events.exception.pending = 0
            events.exception.nr = self.event_vector
            events.exception.has_error_code = self.event_has_error
            events.exception.error_code = self.event_error
            result = ioctl(self.fd, KVM_SET_VCPU_EVENTS, &events)
        else:
            # A software interrupt is delivered from the present RIP; KVM's own kind would run an INT instruction.
            interrupt.irq = self.event_vector
            result = ioctl(self.fd, KVM_INTERRUPT, &interrupt)
        if result:
            self.error = errno
            self.text = f"KVM does not take vector {self.event_vector}: {os.strerror(self.error)}"
            return False
        self.event = False
        self.handed_over = self.event_kind != INJECT_NMI
        self.counter[N_INJECTIONS] += 1
        return True

    def injection_pending(self) -> bool:
        cdef kvm_vcpu_events events
        if self.event:
            return True
        if self.handed_over:
            self._get_events(&events)
            self.handed_over = bool(events.exception.injected or events.exception.pending or events.interrupt.injected)
        return self.handed_over

    cpdef bint interruptible(self) except? -1:
        cdef kvm_vcpu_events events
        self._alive()
        if self.event:
            return False
        if self.fresh and not self.dirty_regs:        # as of the last exit, and nothing was changed since
            return self.page.ready_for_interrupt_injection != 0
        self._load_regs()
        if not self.regs.rflags & RFLAGS_IF:
            return False
        self._get_events(&events)
        return not (events.exception.injected or events.exception.pending or events.interrupt.injected
                    or events.interrupt.shadow)

    def nmi_allowed(self) -> bool:
        return not self.event

    def request_interrupt_window(self, wanted: bool) -> None:
        self._alive()
        self.page.request_interrupt_window = 1 if wanted else 0

    def request_nmi_window(self, wanted: bool) -> None:
        self.nmi_window = wanted

    # -- the rest -----------------------------------------------------------------------------------------------------

    def skip(self, length: int) -> None:
        cdef kvm_vcpu_events events
        self._before_change()
        self._load_regs()
        self.regs.rip += <uint64_t>length
        self.dirty_regs = True
        self._get_events(&events)
        if events.interrupt.shadow:
            events.interrupt.shadow = 0
            self._set_events(&events)

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        self._alive()
        # KVM takes the first entry that fits: those for one subleaf before those for all.
        ordered = sorted(entries, key=lambda entry: entry.subleaf is None)
        data = bytearray(sizeof(kvm_cpuid2) + len(ordered) * sizeof(kvm_cpuid_entry2))
        cdef uint8_t[::1] view = data
        cdef kvm_cpuid2* header = <kvm_cpuid2*>&view[0]
        cdef kvm_cpuid_entry2* slot = <kvm_cpuid_entry2*>(&view[0] + sizeof(kvm_cpuid2))
        header.nent = len(ordered)
        for entry in ordered:
            slot.function = entry.leaf
            if entry.subleaf is not None:
                slot.index = entry.subleaf
                slot.flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            slot.eax = entry.eax
            slot.ebx = entry.ebx
            slot.ecx = entry.ecx
            slot.edx = entry.edx
            slot += 1
        if ioctl(self.fd, KVM_SET_CPUID2, header):
            raise failed(f"cannot set {len(ordered)} CPUID answers (they cannot change once the vCPU has run)")

    def set_ept(self, eptp: int, generation: int) -> None:
        """Nothing: KVM's memory is the VM's slots, and the kernel keeps its own tables in step with them."""

    def invalidate_code(self, hva: int, length: int) -> None:
        """Nothing: hardware sees its own code change."""

    def translate(self, gla: int, access: int = 0) -> int | None:
        self._load_sregs()
        return walk.translate(
            walk.Paging(self.sregs.cr0, self.sregs.cr3, self.sregs.cr4, self.sregs.efer), self.peek, gla, access
        )

    def counters(self) -> dict[str, int]:
        return {name: self.counter[<int>index] for index, name in enumerate(COUNTERS)}

    def message(self) -> str:
        return self.text
