# cython: language_level=3
"""See codecache.pxd."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.shared cimport *
from pyhyve.cpu.bt.state cimport (
    BANK_USER, BANKS, IBT_ENTRIES, IBT_NOTED, IBT_SECOND, TLB_ENTRIES, WAY_ENTRIES, Vcpu, tlb_invalid,
)


cdef inline uint64_t _hash(uint64_t hva, uint64_t rip, uint64_t mode) noexcept nogil:
    cdef uint64_t h = hva ^ (rip >> 12) * <uint64_t>0x9E3779B97F4A7C15 ^ mode << 40 ^ mode >> 24
    return (h ^ (h >> 17)) * <uint64_t>0xD6E8FEB86659FD93 >> 20


cdef inline uint64_t _page_hash(uint64_t page) noexcept nogil:
    return ((page >> 12) * <uint64_t>0x9E3779B97F4A7C15) >> 32


cdef inline CodePage* _page_find(Cache* c, uint64_t page) noexcept nogil:
    cdef CodePage* p = c.page_hash[_page_hash(page) & c.page_hash_mask]
    while p != NULL:
        if p.hva == page:
            return p
        p = p.next
    return NULL


cdef bint code_page(Vcpu* v, uint64_t hva) noexcept nogil:
    """True if some vCPU has translated code of the page of host address `hva`."""
    cdef SharedPage* p
    if v.cache == NULL:
        return False
    p = shared_find((<Cache*>v.cache).shared, hva & ~<uint64_t>0xFFF)
    return p != NULL and p.mask != 0


cdef inline uint64_t _chunks(uint64_t offset, uint64_t length) noexcept nogil:
    """The bits of the 64-byte chunks that `length` bytes from page offset `offset` touch (clipped to the page)."""
    cdef uint64_t first = offset >> 6
    cdef uint64_t last = (offset + length - 1) >> 6
    if length == 0:
        return 0
    if last > 63:
        last = 63
    return (~<uint64_t>0 >> (63 - (last - first))) << first


cdef bint code_overlaps(Vcpu* v, uint64_t hva, uint32_t length) noexcept nogil:
    """True if bytes of [hva, hva + length), within one page, may belong to translated code of some vCPU."""
    cdef SharedPage* p
    if v.cache == NULL:
        return False
    p = shared_find((<Cache*>v.cache).shared, hva & ~<uint64_t>0xFFF)
    return p != NULL and (p.chunks & _chunks(hva & 0xFFF, length)) != 0


cdef void _unhash(Cache* c, Block* b) noexcept nogil:
    cdef Block** at = &c.hash[_hash(b.hva, b.rip, b.mode) & c.hash_mask]
    while at[0] != NULL:
        if at[0] == b:
            at[0] = b.hash_next
            return
        at = &at[0].hash_next


cdef void _drop_page(Vcpu* v, Cache* c, CodePage* p) noexcept nogil:
    cdef Block* b = p.first
    cdef Block* following
    while b != NULL:
        following = b.page2_next if b.straddle and b.hva2 == p.hva else b.page_next
        if b.mode != ~<uint64_t>0:
            _unhash(c, b)
            _ibt_drop(v, c, b)
            b.mode = ~<uint64_t>0
            v.n.blocks_dropped += 1
        b = following
    p.first = NULL
    p.chunks = 0
    v.drop_gen += 1
    v.ret_sp = v.ret_base
    shared_leave(c.shared, p.hva, c.me)


cdef void _drop_own(Vcpu* v, Cache* c, uint64_t hva, uint64_t length) noexcept nogil:
    """Drop this vCPU's blocks of a page if [hva, hva + length), within it, touches them."""
    cdef CodePage* p = _page_find(c, hva & ~<uint64_t>0xFFF)
    if p != NULL and p.chunks & _chunks(hva & 0xFFF, length):
        v.n.smc_writes += 1
        _drop_page(v, c, p)


cdef void code_written(Vcpu* v, uint64_t hva, uint32_t length) noexcept nogil:
    """Host memory [hva, hva + length) is written: drop what was translated from it (whole pages at a time), here and
    in the other vCPUs, which see it before the next interrupt that this one sends them."""
    cdef Cache* c = <Cache*>v.cache
    cdef SharedPage* p
    cdef uint64_t end = hva + length
    cdef uint64_t page, stop, others
    cdef uint32_t k
    if c == NULL or length == 0:
        return
    while hva < end:
        page = hva & ~<uint64_t>0xFFF
        stop = page + 0x1000
        if stop > end:
            stop = end
        p = shared_find(c.shared, page)
        if p != NULL and p.chunks & _chunks(hva - page, stop - hva):
            others = p.mask & ~(<uint64_t>1 << c.me)
            _drop_own(v, c, hva, stop - hva)
            k = 0
            while others:
                if others & 1 and c.shared.inboxes[k] != NULL:
                    inbox_put(c.shared.inboxes[k], hva, stop - hva)
                others >>= 1
                k += 1
        hva = stop


cdef void inbox_process(Cache* c) noexcept nogil:
    cdef Inbox* inbox = &c.inbox
    cdef Vcpu* v = c.vcpu
    cdef Message m
    cdef uint32_t n, i
    cdef uint64_t k
    if inbox.sent == inbox.done:
        return
    inbox_lock(inbox)
    n = inbox.n
    for i in range(n):
        m = inbox.messages[i]
        if m.length:
            _drop_own(v, c, m.hva, m.length)
        elif m.hva:
            _protect(v, m.hva)
    if inbox.drop_all:
        inbox.drop_all = 0
        for k in range(c.pages_used):
            if c.pages[k].chunks:
                _drop_page(v, c, &c.pages[k])
    if inbox.protect_all:
        inbox.protect_all = 0
        for k in range(2 * WAY_ENTRIES):
            v.tlb[k].tag_w = tlb_invalid(<uint32_t>k & (TLB_ENTRIES - 1))
    inbox.n = 0
    inbox.done = inbox.sent
    inbox_unlock(inbox)


cdef inline void _note_page(Vcpu* v, uint64_t lin) noexcept nogil:
    cdef uint64_t n = (lin >> 12) & 0xFFFF
    v.ibt_pages[n >> 6] |= <uint64_t>1 << (n & 63)


cdef inline uint32_t _second_slot(Block* b) noexcept nogil:
    return b.ibt_slot // IBT_ENTRIES * IBT_SECOND + b.ibt_slot % IBT_SECOND


cdef void _ibt_empty(Vcpu* v, int bank) noexcept nogil:
    cdef Cache* c = <Cache*>v.cache
    cdef uint64_t* slots = &v.ibt[bank * IBT_ENTRIES]
    cdef uint64_t i
    cdef uint64_t miss = <uint64_t>c.ibt_miss[bank]
    if v.n_ibt_used[bank] <= IBT_NOTED:
        for i in range(v.n_ibt_used[bank]):
            slots[v.ibt_used[bank * IBT_NOTED + i]] = miss
    else:
        for i in range(IBT_ENTRIES):
            slots[i] = miss
    v.n_ibt_used[bank] = 0
    if v.n_ibt_second[bank]:
        for i in range(IBT_SECOND):
            v.second_entry[bank * IBT_SECOND + i] = <uint64_t>c.ibt_none
        v.n_ibt_second[bank] = 0


cdef void _ibt_flush_all(Vcpu* v) noexcept nogil:
    cdef uint64_t i
    cdef int bank
    for bank in range(BANKS):
        _ibt_empty(v, bank)
    v.ibt_low = 0
    for i in range(1024):
        v.ibt_pages[i] = 0


cdef void _ibt_drop(Vcpu* v, Cache* c, Block* b) noexcept nogil:
    cdef uint32_t second = _second_slot(b)
    if v.ibt[b.ibt_slot] == <uint64_t>b.entry_ind:
        v.ibt[b.ibt_slot] = <uint64_t>c.ibt_miss[b.ibt_slot // IBT_ENTRIES]
    if v.second_entry[second] == <uint64_t>b.entry_poll:
        v.second_entry[second] = <uint64_t>c.ibt_none


cdef void ibt_flush(Vcpu* v, int keep_global) noexcept nogil:
    """Empty the indirect-branch table; with `keep_global` the supervisor's targets stay, if all are in the upper half of
    the address space (where what a kernel maps is global)."""
    if v.cache == NULL:
        return
    v.ret_sp = v.ret_base
    if not keep_global or v.ibt_low:
        _ibt_flush_all(v)
    else:
        _ibt_empty(v, BANK_USER)


cdef void ibt_flush_page(Vcpu* v, uint64_t lin) noexcept nogil:
    """A linear page may be mapped otherwise. Most pages hold no code: only if this one may have, all targets go."""
    cdef uint64_t n = (lin >> 12) & 0xFFFF
    if v.cache != NULL and v.ibt_pages[n >> 6] >> (n & 63) & 1:
        _ibt_flush_all(v)
    v.ret_sp = v.ret_base


cdef Block* ibt_get(Vcpu* v, uint64_t mode) noexcept nogil:
    cdef uint32_t slot = v.bank * IBT_ENTRIES + ibt_hash(v.rip)
    cdef Block* b = <Block*>v.ibt_block[slot]
    if b == NULL or v.ibt[slot] != <uint64_t>b.entry_ind or b.rip != v.rip or b.mode != mode:
        return NULL
    return b


cdef void ibt_set(Vcpu* v, Block* b) noexcept nogil:
    cdef Cache* c = <Cache*>v.cache
    cdef uint32_t bank = b.ibt_slot // IBT_ENTRIES
    cdef uint32_t second = _second_slot(b)
    cdef Block* old
    if v.ibt[b.ibt_slot] == <uint64_t>b.entry_ind:
        return
    if v.ibt[b.ibt_slot] != <uint64_t>c.ibt_miss[bank]:
        old = <Block*>v.ibt_block[b.ibt_slot]
        v.second_rip[second] = old.rip
        v.second_entry[second] = <uint64_t>old.entry_poll
        v.n_ibt_second[bank] += 1
    elif v.n_ibt_used[bank] < IBT_NOTED:
        v.ibt_used[bank * IBT_NOTED + v.n_ibt_used[bank]] = <uint16_t>(b.ibt_slot % IBT_ENTRIES)
        v.n_ibt_used[bank] += 1
    else:
        v.n_ibt_used[bank] = IBT_NOTED + 1
    v.ibt[b.ibt_slot] = <uint64_t>b.entry_ind
    v.ibt_block[b.ibt_slot] = b
    if not b.rip >> 63 and b.ibt_slot // IBT_ENTRIES != BANK_USER:
        v.ibt_low = 1
    _note_page(v, b.rip + (b.mode >> MODE_CSBASE_SHIFT & <uint64_t>0xFFFFFFFF))
    if b.straddle:
        _note_page(v, b.rip + (b.mode >> MODE_CSBASE_SHIFT & <uint64_t>0xFFFFFFFF) + 0x1000)


cdef Block* block_find(Cache* c, uint64_t hva, uint64_t rip, uint64_t mode) noexcept nogil:
    cdef Block* b = c.hash[_hash(hva, rip, mode) & c.hash_mask]
    while b != NULL:
        if b.hva == hva and b.rip == rip and b.mode == mode:
            return b
        b = b.hash_next
    return NULL


cdef Block* block_new(Cache* c) noexcept nogil:
    """A zeroed block; NULL when the pool is used up (the caller resets the cache)."""
    cdef Block* b
    cdef uint64_t* words
    cdef size_t i
    if c.pool_used >= c.pool_size:
        return NULL
    b = &c.pool[c.pool_used]
    c.pool_used += 1
    words = <uint64_t*>b
    for i in range(sizeof(Block) // 8):
        words[i] = 0
    return b


cdef CodePage* _page_make(Cache* c, uint64_t page) noexcept nogil:
    cdef CodePage* p = _page_find(c, page)
    cdef uint64_t h
    if p != NULL:
        return p
    p = &c.pages[c.pages_used]
    c.pages_used += 1
    h = _page_hash(page) & c.page_hash_mask
    p.hva = page
    p.chunks = 0
    p.first = NULL
    p.next = c.page_hash[h]
    c.page_hash[h] = p
    return p


cdef void _protect(Vcpu* v, uint64_t page) noexcept nogil:
    """From now on every write to the page takes the slow path."""
    cdef uint32_t i
    for i in range(2 * WAY_ENTRIES):
        if v.tlb[i].hva == page:
            v.tlb[i].tag_w = tlb_invalid(i & (TLB_ENTRIES - 1))


cdef void _tell_others(Cache* c, uint64_t page) noexcept nogil:
    """Let every other vCPU pass a safe point; `page`, where not 0, they protect."""
    cdef uint64_t tickets[SHARED_VCPUS]
    cdef uint32_t k
    cdef uint32_t spins = 0
    for k in range(c.shared.n_vcpus):
        tickets[k] = 0
        if <int>k != c.me and c.shared.inboxes[k] != NULL:
            tickets[k] = inbox_put(c.shared.inboxes[k], page, 0)
    for k in range(c.shared.n_vcpus):
        while tickets[k] and c.shared.inboxes[k] != NULL and waiting_for(c.shared.inboxes[k], tickets[k]):
            inbox_process(c)
            spins += 1
            if spins & 63:
                cpu_relax()
            else:
                cpu_yield()


cdef int _add_to_page(Cache* c, uint64_t page, uint64_t chunks, CodePage** out) noexcept nogil:
    """0: no room; 1: nobody need be told; 2: others must pass a safe point; 3: they must protect the page."""
    cdef CodePage* p = _page_make(c, page)
    cdef bint fresh
    cdef SharedPage* sp = shared_enter(c.shared, page, c.me, &fresh)
    cdef int told = 1
    if sp == NULL:
        return 0
    if fresh:
        _protect(c.vcpu, page)
        told = 3
    elif chunks & ~sp.chunks:
        told = 2
    if chunks & ~sp.chunks:
        shared_add_chunks(c.shared, sp, chunks)
    p.chunks |= chunks
    out[0] = p
    return told


cdef bint block_add(Cache* c, Block* b) noexcept nogil:
    cdef uint64_t h = _hash(b.hva, b.rip, b.mode) & c.hash_mask
    cdef uint64_t page = b.hva & ~<uint64_t>0xFFF
    cdef CodePage* p = NULL
    cdef uint64_t first_len = b.guest_len
    cdef int told, told2
    if b.straddle:
        first_len = 0x1000 - (b.hva & 0xFFF)
    told = _add_to_page(c, page, _chunks(b.hva & 0xFFF, first_len) | b.look, &p)
    if not told:
        return False
    b.hash_next = c.hash[h]
    c.hash[h] = b
    b.page_next = p.first
    p.first = b
    if c.shared.n_vcpus > 1 and told > 1:
        _tell_others(c, page if told == 3 else 0)
    if b.straddle and b.hva2 == page:
        b.hva2 = 0
    if b.straddle and b.hva2 != 0:
        told2 = _add_to_page(c, b.hva2, _chunks(0, b.guest_len - first_len), &p)
        if not told2:
            return False
        b.page2_next = p.first
        p.first = b
        if c.shared.n_vcpus > 1 and told2 > 1:
            _tell_others(c, b.hva2 if told2 == 3 else 0)
    return True


cdef void cache_reset(Cache* c) noexcept nogil:
    """Drop every block. Nothing of the cache may be running."""
    cdef uint64_t i
    for i in range(c.hash_mask + 1):
        c.hash[i] = NULL
    for i in range(c.page_hash_mask + 1):
        c.page_hash[i] = NULL
    c.pool_used = 0
    c.pages_used = 0
    c.at = c.start
    c.cold = cold_start(c)
    c.generation += 1
    c.vcpu.drop_gen += 1
    c.vcpu.n.cache_flushes += 1
    shared_leave_all(c.shared, c.me)
    for i in range(BANKS):                       # every slot, the first time too
        c.vcpu.n_ibt_used[i] = IBT_NOTED + 1
        c.vcpu.n_ibt_second[i] = 1
    _ibt_flush_all(c.vcpu)


cdef bint cache_room(Cache* c, uint64_t bytes) noexcept nogil:
    return c.at + bytes <= cold_start(c) and c.cold + bytes <= c.rw + c.size and c.pages_used + 2 <= c.pages_size and c.pool_used < c.pool_size


cdef Block* block_at_host(Cache* c, uint64_t rx) noexcept nogil:
    """The block whose code holds host address `rx` (slow: for signals only)."""
    cdef uint64_t i
    for i in range(c.pool_used):
        if <uint64_t>c.pool[i].entry_ind <= rx < <uint64_t>c.pool[i].end:
            return &c.pool[i]
    return NULL
