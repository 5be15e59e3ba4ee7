# cython: language_level=3
"""See apic.pxd. Intel SDM vol 3, "Advanced Programmable Interrupt Controller (APIC)"."""

from libc.stdint cimport uint32_t, uint64_t

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
    cdef int vector
    if not a.accepting:
        return -1
    vector = _highest(a.irr)
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
