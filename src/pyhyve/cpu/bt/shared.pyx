# cython: language_level=3
"""See shared.pxd."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    static inline void bt_lock(uint32_t *lock) {
        while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE))
            while (__atomic_load_n(lock, __ATOMIC_RELAXED))
                __builtin_ia32_pause();
    }
    static inline void bt_unlock(uint32_t *lock) { __atomic_store_n(lock, 0, __ATOMIC_RELEASE); }
    static inline void bt_store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static inline uint32_t bt_load32(uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline uint64_t bt_load64(uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline void bt_store8(uint8_t *p, uint8_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static inline void bt_add32(uint32_t *p, uint32_t v) { __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
    static inline void bt_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    static inline uint64_t bt_clock(void) { return __builtin_ia32_rdtsc(); }
    static inline void bt_pause(void) { __builtin_ia32_pause(); }
    /* sched_yield without the C library: the guest's vector state is live */
    static inline void bt_yield(void) {
        long r = 24;
        __asm__ __volatile__("syscall" : "+a"(r) : : "rcx", "r11", "memory");
    }
    """
    void bt_lock(uint32_t* lock) noexcept nogil
    void bt_unlock(uint32_t* lock) noexcept nogil
    void bt_store32(uint32_t* p, uint32_t v) noexcept nogil
    uint32_t bt_load32(uint32_t* p) noexcept nogil
    uint64_t bt_load64(uint64_t* p) noexcept nogil
    void bt_store8(uint8_t* p, uint8_t v) noexcept nogil
    void bt_add32(uint32_t* p, uint32_t v) noexcept nogil
    void bt_fence() noexcept nogil
    uint64_t bt_clock() noexcept nogil
    void bt_pause() noexcept nogil
    void bt_yield() noexcept nogil

cdef enum:
    LONG_YIELD = 2000000        # cycles of the TSC: about a millisecond


cdef inline uint64_t _slot(uint64_t page) noexcept nogil:
    return ((page >> 12) * <uint64_t>0x9E3779B97F4A7C15) >> 40 & (SHARED_PAGES - 1)


cdef SharedPage* shared_find(Shared* s, uint64_t page) noexcept nogil:
    """The page's entry, or NULL. Needs no lock: entries are only added, and their address is written last."""
    cdef uint64_t at = _slot(page)
    while True:
        if s.pages[at].hva == page:
            return &s.pages[at]
        if s.pages[at].hva == 0:
            return NULL
        at = (at + 1) & (SHARED_PAGES - 1)


cdef SharedPage* shared_enter(Shared* s, uint64_t page, int me, bint* fresh) noexcept nogil:
    """`fresh` is set if no vCPU had code of the page: the others must be told to protect it."""
    cdef SharedPage* p
    cdef uint64_t at
    cdef uint64_t bit = <uint64_t>1 << me
    fresh[0] = False
    p = shared_find(s, page)
    if p != NULL and bt_load64(&p.mask) & bit:
        return p
    bt_lock(&s.lock)
    p = shared_find(s, page)
    if p == NULL:
        if s.n_pages >= SHARED_PAGES - SHARED_PAGES // 8:
            bt_unlock(&s.lock)
            return NULL
        at = _slot(page)
        while s.pages[at].hva != 0:
            at = (at + 1) & (SHARED_PAGES - 1)
        p = &s.pages[at]
        p.chunks = 0
        p.mask = 0
        p.hva = page
        s.n_pages += 1
    fresh[0] = p.mask == 0
    p.mask |= bit
    bt_unlock(&s.lock)
    return p


cdef void shared_add_chunks(Shared* s, SharedPage* p, uint64_t chunks) noexcept nogil:
    bt_lock(&s.lock)
    p.chunks |= chunks
    bt_unlock(&s.lock)


cdef void shared_leave(Shared* s, uint64_t page, int me) noexcept nogil:
    """vCPU `me` has no blocks of the page any more."""
    cdef SharedPage* p = shared_find(s, page)
    if p == NULL:
        return
    bt_lock(&s.lock)
    p.mask &= ~(<uint64_t>1 << me)
    if p.mask == 0:
        p.chunks = 0
    bt_unlock(&s.lock)


cdef void shared_leave_all(Shared* s, int me) noexcept nogil:
    cdef uint64_t i
    bt_lock(&s.lock)
    for i in range(SHARED_PAGES):
        if s.pages[i].hva != 0:
            s.pages[i].mask &= ~(<uint64_t>1 << me)
            if s.pages[i].mask == 0:
                s.pages[i].chunks = 0
    bt_unlock(&s.lock)


cdef uint64_t inbox_put(Inbox* to, uint64_t hva, uint64_t length) noexcept nogil:
    cdef uint64_t ticket
    bt_lock(&to.lock)
    if length == 0 and hva == 0:
        pass
    elif length == 0 and to.n >= INBOX // 2:
        to.protect_all = 1
    elif to.n < INBOX:
        to.messages[to.n].hva = hva
        to.messages[to.n].length = length
        to.n += 1
    else:
        to.drop_all = 1
    to.sent += 1
    ticket = to.sent
    bt_unlock(&to.lock)
    bt_store8(to.poll + 5, 1)
    return ticket


cdef void inbox_lock(Inbox* inbox) noexcept nogil:
    bt_lock(&inbox.lock)


cdef void inbox_unlock(Inbox* inbox) noexcept nogil:
    bt_unlock(&inbox.lock)


cdef void set_in_guest(Inbox* inbox, uint32_t value) noexcept nogil:
    bt_store32(&inbox.in_guest, value)


cdef bint waiting_for(Inbox* inbox, uint64_t ticket) noexcept nogil:
    """True while the owner may still act on what it knew before the message."""
    return bt_load32(&inbox.in_guest) != 0 and bt_load64(&inbox.done) < ticket


cdef void cpu_fence() noexcept nogil:
    bt_fence()


cdef void cpu_relax() noexcept nogil:
    bt_pause()


cdef void cpu_yield() noexcept nogil:
    bt_yield()


cdef void spin_yield(Shared* s) noexcept nogil:
    bt_add32(&s.yielding, 1)
    bt_yield()
    bt_add32(&s.yielding, 0xFFFFFFFF)


cdef void give_back(Shared* s, uint64_t* not_before) noexcept nogil:
    cdef uint64_t start, spent
    if not bt_load32(&s.yielding):
        return
    start = bt_clock()
    if start < not_before[0]:
        return
    bt_yield()
    spent = bt_clock() - start
    if spent > LONG_YIELD:
        not_before[0] = start + 2 * spent       # somebody else had the processor: keep it as long now
