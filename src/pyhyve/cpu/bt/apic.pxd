# cython: language_level=3
"""The hot part of a local APIC, carried out by the processor itself: as VT-x does with its virtual-APIC page.

The monitor's local APIC keeps IRR, ISR, TMR, the priorities and the ICR here (pyhyve.cpu.processor.ApicState). So the
processor can deliver an interrupt, complete one (EOI), send a fixed one to another vCPU and wait in HLT without Python.
Whatever else there is to an access, it leaves to the monitor, untouched.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

cdef enum:
    APIC_NOT_HERE = 0       # Apic.mode: the monitor carries everything out
    APIC_XAPIC = 1
    APIC_X2APIC = 2

cdef struct Apic:
    uint64_t irr[4]         # any thread sets bits, atomically; the rest is the vCPU's thread's, but for what is said
    uint64_t isr[4]
    uint64_t tmr[4]         # as irr
    uint32_t tpr
    uint32_t ppr
    uint32_t accepting      # enabled, by hardware and software
    uint32_t direct         # the processor may do what this is for; 0: all of it goes through the monitor
    uint32_t mode           # APIC_*
    uint32_t id
    uint32_t ldr            # as the register shows it
    uint32_t flat           # xAPIC: DFR says flat, not cluster
    uint32_t icr_low
    uint32_t icr_high
    uint32_t running        # its vCPU is in loop_run(), which looks at IRR before it leaves or waits
    uint32_t halted         # it waits in HLT there
    uint32_t wake           # futex: counts what it is woken for
    uint32_t asked          # by others: look at IRR (their byte 7 of `poll` brings it here)
    uint32_t window         # this waits for an interrupt window
    uint32_t monitor_window # the monitor does
    uint8_t* poll           # Vcpu.poll, as bytes
    uint64_t* tsc_offset    # of the Vcpu
    # the timer; times are the guest's TSC
    uint64_t deadline       # 0: it does not run
    uint64_t cycles         # what `initial` takes
    uint32_t initial        # as the register shows it
    uint32_t divisor
    uint32_t lvt            # the timer's LVT entry
    uint32_t rang           # the alarm has rung, or the deadline is another: look at it
    uint64_t armed          # the host's TSC when the alarm rings; 0: not set
    uint64_t cycles_a_tick  # of the local APIC's bus, in units of 2**-32
    uint64_t ns_a_cycle     # in units of 2**-32
    uint64_t shortest       # cycles: timers do not come oftener
    uint32_t bad_vector     # the timer's vector was below 16: an error that ESR has not yet
    int32_t alarm           # a timer of the host's kernel, for thread `alarm_thread`; valid if that is not 0
    int32_t alarm_thread
    uint32_t resting        # the monitor says: go on with a HLT
    uint64_t halts
    uint64_t halted_cycles
    uint64_t eois
    uint64_t ipis
    uint64_t taken          # interrupts that were delivered here
    uint64_t delivered[256] # the same by vector

cdef enum:
    LVT_MASKED = 1 << 16
    TIMER_PERIODIC = 1      # the entry's bits 18:17
    TIMER_DEADLINE = 2
    TIMER_RESERVED = 3

# Start the timer with a count, or stop it with 0; in TSC-deadline mode it goes by timer_deadline().
cdef void timer_count(Apic* a, uint32_t count) noexcept nogil
cdef void timer_deadline(Apic* a, uint64_t deadline) noexcept nogil
# The divisor has changed.
cdef void timer_cycles(Apic* a) noexcept nogil
# The alarm has rung, for this thread.
cdef void timer_rings(Apic* a) noexcept nogil
# Look at the deadline, if there is reason to: post the interrupt, set the host's alarm. The vCPU's thread only.
cdef void timer_look(Apic* a) noexcept nogil

# IRR gets `vector`, from any thread; true if it did not have it.
cdef bint apic_accept(Apic* a, uint32_t vector, bint level) noexcept nogil
# Behind apic_accept: make the vCPU look. False if it is not in loop_run(): then the monitor must.
cdef bint apic_signal(Apic* a) noexcept nogil
# For kick(): out of HLT.
cdef void apic_wake(Apic* a) noexcept nogil
# The vector that would be delivered now, or -1.
cdef int apic_pending(Apic* a) noexcept nogil
# IRR to ISR.
cdef void apic_take(Apic* a, uint32_t vector) noexcept nogil
# The highest vector in service, or -1.
cdef int apic_in_service(Apic* a) noexcept nogil
cdef void apic_complete(Apic* a, uint32_t vector) noexcept nogil
cdef void apic_update_ppr(Apic* a) noexcept nogil
