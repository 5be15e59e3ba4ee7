# cython: language_level=3
"""See apicstate.pxd."""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from pyhyve.cpu.bt.apic cimport *

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    #define BT_ALARM (SIGRTMAX - 3)

    static void (*bt_rings)(void *apic);

    static void bt_on_alarm(int sig, siginfo_t *info, void *context) {
        if (info->si_code == SI_TIMER && info->si_value.sival_ptr)
            bt_rings(info->si_value.sival_ptr);
    }

    /* A timer of the host's kernel that interrupts this very thread. 0, or an error's number. */
    static int bt_alarm_here(void *apic, int32_t *alarm, int32_t *thread) {
        static __thread int32_t me;
        static int handled;
        struct sigevent event;
        if (!me)
            me = (int32_t)syscall(SYS_gettid);
        if (*thread == me)
            return 0;
        if (*thread)
            syscall(SYS_timer_delete, (long)*alarm);
        *thread = 0;
        if (!handled) {
            struct sigaction action;
            memset(&action, 0, sizeof action);
            action.sa_sigaction = bt_on_alarm;
            action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
            sigemptyset(&action.sa_mask);
            if (sigaction(BT_ALARM, &action, NULL))
                return errno;
            handled = 1;
        }
        memset(&event, 0, sizeof event);
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = BT_ALARM;
        event.sigev_value.sival_ptr = apic;
        event._sigev_un._tid = me;
        if (syscall(SYS_timer_create, CLOCK_MONOTONIC, &event, alarm))
            return errno;
        *thread = me;
        return 0;
    }

    static void bt_alarm_delete(int32_t *alarm, int32_t *thread) {
        if (*thread)
            syscall(SYS_timer_delete, (long)*alarm);
        *thread = 0;
    }
    """
    void (*bt_rings)(void* apic) noexcept nogil
    int bt_alarm_here(void* apic, int32_t* alarm, int32_t* thread) noexcept nogil
    void bt_alarm_delete(int32_t* alarm, int32_t* thread) noexcept nogil


cdef void _rings(void* apic) noexcept nogil:
    """In a signal handler, on the thread that the alarm is for, wherever that is."""
    cdef Apic* a = <Apic*>apic
    timer_rings(a)


bt_rings = _rings


cdef int alarm_here(Apic* a):
    cdef int32_t before = a.alarm_thread
    cdef int error = bt_alarm_here(a, &a.alarm, &a.alarm_thread)
    if a.alarm_thread != before:
        a.armed = 0
        a.rang = 1
    return error


cdef void alarm_delete(Apic* a):
    bt_alarm_delete(&a.alarm, &a.alarm_thread)


cdef BtApicState make_state(Apic* a, object owner):
    cdef BtApicState state = BtApicState.__new__(BtApicState)
    state.a = a
    state.owner = owner
    return state


cdef inline _get(uint64_t* words):
    return int.from_bytes((<char*>words)[:32], "little")


cdef inline _set(uint64_t* words, value):
    cdef bytes data = value.to_bytes(32, "little")
    memcpy(words, <char*>data, 32)


cdef class BtApicState:
    @property
    def irr(self):
        return _get(self.a.irr)

    @irr.setter
    def irr(self, value):
        _set(self.a.irr, value)

    @property
    def isr(self):
        return _get(self.a.isr)

    @isr.setter
    def isr(self, value):
        _set(self.a.isr, value)
        apic_update_ppr(self.a)

    @property
    def tmr(self):
        return _get(self.a.tmr)

    @tmr.setter
    def tmr(self, value):
        _set(self.a.tmr, value)

    @property
    def tpr(self):
        return self.a.tpr

    @tpr.setter
    def tpr(self, uint32_t value):
        self.a.tpr = value
        apic_update_ppr(self.a)

    @property
    def ppr(self):
        return self.a.ppr

    @property
    def accepting(self):
        return self.a.accepting != 0

    @accepting.setter
    def accepting(self, bint value):
        self.a.accepting = value

    @property
    def icr_low(self):
        return self.a.icr_low

    @icr_low.setter
    def icr_low(self, uint32_t value):
        self.a.icr_low = value

    @property
    def icr_high(self):
        return self.a.icr_high

    @icr_high.setter
    def icr_high(self, uint32_t value):
        self.a.icr_high = value

    @property
    def direct(self):
        return self.a.direct != 0

    @direct.setter
    def direct(self, bint value):
        self.a.direct = value

    @property
    def resting(self):
        return self.a.resting != 0

    @resting.setter
    def resting(self, bint value):
        self.a.resting = value

    @property
    def halted(self):
        return self.a.halted != 0

    @property
    def halted_cycles(self):
        return self.a.halted_cycles

    @property
    def activity(self):
        return self.a.taken + self.a.eois + self.a.ipis + self.a.halts

    def configure(self, uint32_t apic_id, bint enabled, bint x2apic, uint32_t ldr, uint32_t dfr):
        self.a.id = apic_id
        self.a.ldr = ldr
        self.a.flat = dfr >> 28 == 0xF
        self.a.mode = APIC_NOT_HERE if not enabled else APIC_X2APIC if x2apic else APIC_XAPIC

    @property
    def timer(self):
        return self

    @property
    def lvt(self):
        return self.a.lvt

    @lvt.setter
    def lvt(self, uint32_t value):
        self.a.lvt = value

    @property
    def initial(self):
        return self.a.initial

    @property
    def deadline(self):
        return self.a.deadline

    @deadline.setter
    def deadline(self, uint64_t value):
        timer_deadline(self.a, value)

    def set_clock(self, uint64_t tsc_hz, uint64_t bus_hz, uint64_t shortest_ns):
        self.a.cycles_a_tick = (tsc_hz << 32) // bus_hz
        self.a.ns_a_cycle = (<uint64_t>1000000000 << 32) // tsc_hz
        self.a.shortest = shortest_ns * tsc_hz // 1000000000

    def set_divisor(self, uint32_t divisor):
        self.a.divisor = divisor
        timer_cycles(self.a)

    def start(self, uint32_t count):
        timer_count(self.a, count)

    def look(self):
        timer_rings(self.a)
        timer_look(self.a)

    def take_error(self):
        cdef bint error = self.a.bad_vector != 0
        self.a.bad_vector = 0
        return error

    def clear(self):
        memset(self.a.irr, 0, 3 * sizeof(self.a.irr))
        self.a.tpr = self.a.ppr = 0
        self.a.icr_low = self.a.icr_high = 0

    def accept(self, uint32_t vector, bint level):
        return apic_accept(self.a, vector, level) and not apic_signal(self.a)

    def pending(self):
        return apic_pending(self.a)

    def acknowledge(self, uint32_t vector):
        apic_take(self.a, vector)

    def complete(self):
        cdef int vector = apic_in_service(self.a)
        if vector < 0:
            return -1
        apic_complete(self.a, vector)
        return vector if self.a.tmr[vector >> 6] >> (vector & 63) & 1 else -1

    def delivered(self):
        return [self.a.delivered[vector] for vector in range(256)]
