# cython: language_level=3
"""See apic.pxd. Intel SDM vol 3, "Advanced Programmable Interrupt Controller (APIC)"."""

from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    static inline uint64_t bt_or64(uint64_t *p, uint64_t v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
    static inline void bt_and64(uint64_t *p, uint64_t v) { __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t bt_get64(uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline uint32_t bt_get32(uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline void bt_set32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static inline void bt_set8(uint8_t *p, uint8_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static inline void bt_inc32(uint32_t *p) { __atomic_fetch_add(p, 1, __ATOMIC_SEQ_CST); }
    static inline void bt_set64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t bt_tsc(void) { return __builtin_ia32_rdtsc(); }
    static inline uint64_t bt_scale(uint64_t v, uint64_t by) { return (uint64_t)((unsigned __int128)v * by >> 32); }
    /* timer_settime() to so many nanoseconds from now */
    static inline void bt_alarm_set(int32_t alarm, uint64_t ns) {
        uint64_t spec[4] = {0, 0, ns / 1000000000, ns % 1000000000};
        long r = 223;
        register long r10 __asm__("r10") = 0;
        __asm__ __volatile__("syscall" : "+a"(r) : "D"((long)alarm), "S"(0L), "d"(spec), "r"(r10)
                             : "rcx", "r11", "memory");
    }
    static inline int bt_top(uint64_t v) { return 63 - __builtin_clzll(v); }
    /* futex(FUTEX_WAKE_PRIVATE) without the C library: the guest's vector state may be live */
    static inline void bt_futex_wake(uint32_t *word) {
        long r = 202;
        register long r10 __asm__("r10") = 0;
        __asm__ __volatile__("syscall" : "+a"(r) : "D"(word), "S"(129L), "d"(1L), "r"(r10) : "rcx", "r11", "memory");
    }
    """
    uint64_t bt_or64(uint64_t* p, uint64_t v) noexcept nogil
    void bt_and64(uint64_t* p, uint64_t v) noexcept nogil
    uint64_t bt_get64(uint64_t* p) noexcept nogil
    uint32_t bt_get32(uint32_t* p) noexcept nogil
    void bt_set32(uint32_t* p, uint32_t v) noexcept nogil
    void bt_set8(unsigned char* p, unsigned char v) noexcept nogil
    void bt_inc32(uint32_t* p) noexcept nogil
    void bt_set64(uint64_t* p, uint64_t v) noexcept nogil
    uint64_t bt_tsc() noexcept nogil
    uint64_t bt_scale(uint64_t v, uint64_t by) noexcept nogil
    void bt_alarm_set(int32_t alarm, uint64_t ns) noexcept nogil
    int bt_top(uint64_t v) noexcept nogil
    void bt_futex_wake(uint32_t* word) noexcept nogil


cdef inline int _highest(uint64_t* bits) noexcept nogil:
    cdef int i
    cdef uint64_t word
    for i in range(3, -1, -1):
        word = bt_get64(&bits[i])
        if word:
            return 64 * i + bt_top(word)
    return -1


cdef bint apic_accept(Apic* a, uint32_t vector, bint level) noexcept nogil:
    """"Interrupt Acceptance for Fixed Interrupts": TMR tells the EOI later whether it was level-triggered."""
    cdef uint64_t bit = <uint64_t>1 << (vector & 63)
    cdef int word = vector >> 6 & 3
    if level:
        bt_or64(&a.tmr[word], bit)
    elif bt_get64(&a.tmr[word]) & bit:
        bt_and64(&a.tmr[word], ~bit)
    return bt_or64(&a.irr[word], bit) & bit == 0


cdef bint apic_signal(Apic* a) noexcept nogil:
    """Either `running` is seen set, and loop_run() looks at `asked` or IRR later, or it is entered later, and does."""
    if not bt_get32(&a.running):
        return False
    bt_set32(&a.asked, 1)
    bt_set8(a.poll + 7, 0x40)
    apic_wake(a)
    return True


cdef void apic_wake(Apic* a) noexcept nogil:
    if bt_get32(&a.halted):
        bt_inc32(&a.wake)
        bt_futex_wake(&a.wake)


cdef int apic_pending(Apic* a) noexcept nogil:
    """See "Task and Processor Priorities"."""
    cdef int vector = _highest(a.irr)
    return vector if vector & 0xF0 > <int>(a.ppr & 0xF0) and vector >= 0 else -1


cdef void apic_take(Apic* a, uint32_t vector) noexcept nogil:
    cdef uint64_t bit = <uint64_t>1 << (vector & 63)
    bt_and64(&a.irr[vector >> 6 & 3], ~bit)
    a.isr[vector >> 6 & 3] |= bit
    apic_update_ppr(a)


cdef int apic_in_service(Apic* a) noexcept nogil:
    return _highest(a.isr)


cdef void apic_complete(Apic* a, uint32_t vector) noexcept nogil:
    a.isr[vector >> 6 & 3] &= ~(<uint64_t>1 << (vector & 63))
    apic_update_ppr(a)


cdef void apic_update_ppr(Apic* a) noexcept nogil:
    cdef int vector = _highest(a.isr)
    cdef uint32_t service = <uint32_t>vector if vector >= 0 else 0
    a.ppr = a.tpr if a.tpr >> 4 >= service >> 4 else service & 0xF0


# --- the timer -------------------------------------------------------------------------------------------------------

cdef inline uint64_t _now(Apic* a) noexcept nogil:
    return bt_tsc() + a.tsc_offset[0]


cdef void timer_count(Apic* a, uint32_t count) noexcept nogil:
    """See "APIC Timer"."""
    a.initial = count
    timer_cycles(a)
    timer_deadline(a, _now(a) + a.cycles if count else 0)


cdef void timer_cycles(Apic* a) noexcept nogil:
    a.cycles = bt_scale(<uint64_t>a.initial * a.divisor, a.cycles_a_tick)
    if not a.cycles and a.initial:
        a.cycles = 1


cdef void timer_rings(Apic* a) noexcept nogil:
    """What it interrupts may be about to wait, in generated code, or in Python, which looks before it runs the guest."""
    bt_set64(&a.armed, 0)
    bt_set32(&a.rang, 1)
    bt_set32(&a.asked, 1)
    bt_set8(a.poll + 7, 0x40)
    bt_inc32(&a.wake)


cdef void timer_deadline(Apic* a, uint64_t deadline) noexcept nogil:
    a.deadline = deadline
    a.rang = 1


cdef void timer_look(Apic* a) noexcept nogil:
    """The alarm may ring too early, for a deadline that has been moved; it is set anew only where it would be late."""
    cdef uint64_t now, host, at, left, armed, missed
    cdef uint32_t vector
    if not bt_get32(&a.rang):
        return
    bt_set32(&a.rang, 0)
    host = bt_tsc()
    if not a.deadline:
        return
    now = host + a.tsc_offset[0]
    if now >= a.deadline:
        if a.lvt >> 17 & 3 == TIMER_PERIODIC and a.cycles:
            # from the last deadline on, whatever the delay; what lies between merges
            at = a.deadline + a.cycles
            if at < now + (a.shortest if a.cycles < a.shortest else 1):
                missed = (now + (a.shortest if a.cycles < a.shortest else 1) - at) // a.cycles + 1
                at += missed * a.cycles
            a.deadline = at
        else:
            a.deadline = 0
        if not a.lvt & LVT_MASKED:
            vector = a.lvt & 0xFF
            if vector < 16:
                a.bad_vector = 1
            elif a.accepting:
                apic_accept(a, vector, False)
        if not a.deadline:
            return
    if not a.alarm_thread:
        a.rang = 1                               # nothing has run here yet: run() makes the alarm
        return
    left = a.deadline - now
    if left >> 50:
        left = <uint64_t>1 << 50                 # days: it rings too early, and is set again
    armed = bt_get64(&a.armed)
    if not armed or host + left < armed:
        bt_set64(&a.armed, host + left)
        bt_alarm_set(a.alarm, bt_scale(left, a.ns_a_cycle) + 1)
