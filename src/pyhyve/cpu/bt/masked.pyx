# cython: language_level=3
"""See masked.pxd."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyhyve.cpu.bt.codecache cimport code_overlaps, code_written
from pyhyve.cpu.bt.debug cimport data_watched, note_data
from pyhyve.cpu.bt.decode cimport MASKED_PACKED, MASKED_VECTOR
from pyhyve.cpu.bt.hostregs cimport bt_get_k, bt_get_ymm
from pyhyve.cpu.bt.mmu cimport MMU_CODE, mmu_page, mmu_write
from pyhyve.cpu.bt.segments cimport segment_check
from pyhyve.cpu.bt.state cimport *
from pyhyve.cpu.bt.thunks cimport MaskMeta

cdef extern from *:
    """
    static inline uint32_t bt_first_bit(uint64_t x) { return (uint32_t)__builtin_ctzll(x); }
    static inline uint32_t bt_last_bit(uint64_t x) { return 63 - (uint32_t)__builtin_clzll(x); }
    static inline uint32_t bt_count_bits(uint64_t x) {
        uint32_t n = 0;
        for (; x; x &= x - 1)
            n++;
        return n;
    }
    """
    uint32_t bt_first_bit(uint64_t x) noexcept nogil
    uint32_t bt_last_bit(uint64_t x) noexcept nogil
    uint32_t bt_count_bits(uint64_t x) noexcept nogil


cdef inline uint64_t ones(uint32_t n) noexcept nogil:
    return ~<uint64_t>0 if n >= 64 else (<uint64_t>1 << n) - 1


cdef uint64_t selected_bytes(MaskMeta* m) noexcept nogil:
    """Bit n: byte n of the operand is accessed."""
    cdef uint32_t element = 1 << (m.masked & 3)
    cdef uint32_t count = 1 << (m.masked >> 2 & 7)
    cdef uint8_t vector[32]
    cdef uint64_t mask = 0
    cdef uint64_t found = 0
    cdef uint32_t k
    if m.masked & MASKED_VECTOR:
        bt_get_ymm(m.register & 15, <uint64_t>vector)
        for k in range(count):
            mask |= <uint64_t>(vector[(k + 1) * element - 1] >> 7) << k
    else:
        bt_get_k(m.register & 7, <uint64_t>&mask)
        mask &= ones(count)
    if m.masked & MASKED_PACKED:
        return ones(bt_count_bits(mask) * element)
    while mask:
        k = bt_first_bit(mask)
        mask &= mask - 1
        found |= ones(element) << (k * element & (m.miss.width - 1))
    return found


cdef int _store_reaches_code(Vcpu* v, uint64_t hva, uint32_t length, int slow) noexcept nogil:
    """A store to a page with translated code: R_SLOW if it must be done by a slow block, where it drops that code."""
    if slow:
        code_written(v, hva, length)
    elif code_overlaps(v, hva, length):
        return R_SLOW
    return R_OK


cdef uint64_t _address(Vcpu* v, uint64_t lin, MaskMeta* m, uint64_t wanted, int* r) noexcept nogil:
    cdef uint64_t buffer = bounce_of(v, lin)
    cdef uint64_t hva1, hva2, info1, info2
    cdef uint32_t first = 0x1000 - <uint32_t>(lin & 0xFFF)      # bytes of the operand in its first page
    cdef uint32_t low, high, k
    cdef int access = m.miss.access
    cdef int bank = m.miss.bank & 3
    low = bt_first_bit(wanted)
    high = bt_last_bit(wanted) + 1
    if not m.slow and data_watched(v, lin + low, high - low, access):
        r[0] = R_SLOW
        return 0
    if ((lin + low) ^ (lin + high - 1)) >> (56 if v.cr4 & 0x1000 else 47) & 1 and lin + high > lin + low \
            and v.efer & 0x400:
        v.fault_vector = 13                      # the second page's address is not canonical
        v.fault_has_error = 1
        v.fault_error = 0
        r[0] = R_FAULT
        return 0
    info1 = info2 = 0
    r[0] = mmu_page(v, lin + low, access, bank, &hva1, &info1)
    if r[0] != R_OK:
        return 0
    if low >= first or high <= first:
        # in one page: what is outside of it is left out by the host as well
        if access == ACCESS_WRITE:
            if info1 & MMU_CODE:
                r[0] = _store_reaches_code(v, hva1, high - low, m.slow)
            return hva1 - low if r[0] == R_OK else 0
        if m.miss.width <= first:
            return hva1 - low
        for k in range(low, high):
            (<uint8_t*>buffer)[k] = (<uint8_t*>hva1)[k - low]
        return buffer
    k = first + bt_first_bit(wanted >> first)
    r[0] = mmu_page(v, lin + k, access, bank, &hva2, &info2)
    if r[0] != R_OK:
        return 0
    hva2 -= k - first
    if access == ACCESS_WRITE:
        if info1 & MMU_CODE:
            r[0] = _store_reaches_code(v, hva1, first - low, m.slow)
        if info2 & MMU_CODE and r[0] == R_OK:
            r[0] = _store_reaches_code(v, hva2, high - first, m.slow)
        if r[0] != R_OK:
            return 0
    if hva2 == hva1 + (first - low):
        return hva1 - low
    if access == ACCESS_WRITE:
        if not m.slow:
            r[0] = R_SLOW
            return 0
        v.bounce_lin = lin
        v.bounce_len = m.miss.width
        v.bounce_bank = bank
        v.bounce_mask = wanted
        return buffer
    for k in range(low, first):
        (<uint8_t*>buffer)[k] = (<uint8_t*>hva1)[k - low]
    for k in range(first, high):
        (<uint8_t*>buffer)[k] = (<uint8_t*>hva2)[k - first]
    return buffer


cdef uint64_t masked_address(Vcpu* v, uint64_t lin, MaskMeta* m, int* r) noexcept nogil:
    cdef uint64_t wanted = selected_bytes(m)
    cdef uint64_t hva
    cdef uint32_t low
    if m.miss.bank > 3:
        low = bt_first_bit(wanted) if wanted else 0
        r[0] = segment_check(v, &lin, m.miss.bank, low, bt_last_bit(wanted) + 1 - low if wanted else 0, m.miss.access)
        if wanted and r[0] != R_OK:
            return 0
    hva = _address(v, lin, m, wanted, r) if wanted else bounce_of(v, lin)
    if hva and wanted and m.slow:
        note_data(v, lin + bt_first_bit(wanted), bt_last_bit(wanted) + 1 - bt_first_bit(wanted), m.miss.access)
    return hva


cdef void masked_commit(Vcpu* v) noexcept nogil:
    """Run by run, so that an element is stored at once where it can be."""
    cdef uint64_t left = v.bounce_mask
    cdef uint64_t buffer = bounce_of(v, v.bounce_lin)
    cdef uint32_t at, n
    while left:
        at = bt_first_bit(left)
        n = bt_first_bit(~(left >> at)) if ~(left >> at) else 64
        mmu_write(v, v.bounce_lin + at, <void*>(buffer + at), n, <int>v.bounce_bank)
        left &= ~(ones(n) << at)
