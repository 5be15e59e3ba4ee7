# cython: language_level=3
"""The memory management unit: guest page walks through the EPT, the software TLB, and guest memory by linear address.

All functions run without the GIL, touch general registers only, and answer an R_* code of state.pxd: R_FAULT leaves
the exception in `v.fault_*`, R_EXIT leaves the exit in `v.exit`. A linear address is already truncated to 32 bits
outside 64-bit mode. Sources: Intel SDM vol 3, "Paging" and "The Extended Page Table Mechanism (EPT)".

Housekeeping that must live with the vCPU (bit maps of filled TLB entries, filters of what was entered) shares the arrays
`ept_cache_tag` and `ept_cache_val` with the EPT cache; nothing else may write them. `mmu_init` must run once on a new
(zeroed) Vcpu, before anything else here.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from pyhyve.cpu.bt.state cimport *

cdef enum:
    # *info of mmu_translate and mmu_fetch
    MMU_GLOBAL = 1           # the guest mapping is global
    MMU_WRITABLE = 2         # writable from this bank now: D set, W on all levels, the EPT lets it
    MMU_LARGE = 4            # the guest maps it by a large page
    MMU_CODE = 8             # (mmu_page, write accesses) the page holds translated code: call code_written

cdef extern from *:
    """
    #ifndef PYHYVE_BT_COPY
    #define PYHYVE_BT_COPY
    /* No libc, no vector registers: these run while the guest's own vector state is live. */
    static inline void bt_copy(void *to, const void *from, uint64_t n) {
        __asm__ __volatile__("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    }
    static inline void bt_fill(void *to, uint8_t byte, uint64_t n) {
        __asm__ __volatile__("rep stosb" : "+D"(to), "+c"(n) : "a"(byte) : "memory");
    }
    #endif
    """
    void bt_copy(void* to, const void* source, uint64_t n) noexcept nogil
    void bt_fill(void* to, uint8_t byte, uint64_t n) noexcept nogil

# Make a zeroed Vcpu's TLBs, lists and caches empty.
cdef void mmu_init(Vcpu* v) noexcept nogil

# Walk the guest's tables for `lin` and the EPT for the result: host address of the byte, MMU_* bits, guest-physical
# address. Sets A, and D for a write. Not canonical: #GP(0). Any of the three outputs may be NULL.
cdef int mmu_translate(Vcpu* v, uint64_t lin, int access, int bank, uint64_t* hva, uint64_t* info,
                       uint64_t* gpa) noexcept nogil

# Translate and enter the page into the bank's TLB. R_SLOW: a write is allowed, but the page holds translated code, so
# that the write bank refuses it (do it by mmu_write or a slow block).
cdef int mmu_fill(Vcpu* v, uint64_t lin, int access, int bank) noexcept nogil

# Where the byte at `lin` is, through the TLB. For writes *info has MMU_CODE if the page holds translated code; the
# caller then calls code_written. Other bits of *info mean nothing. Valid until the next flush.
cdef int mmu_page(Vcpu* v, uint64_t lin, int access, int bank, uint64_t* hva, uint64_t* info) noexcept nogil

# Any size, any number of pages; every page is probed before the first byte moves.
cdef int mmu_read(Vcpu* v, uint64_t lin, void* buf, uint64_t size, int bank) noexcept nogil
cdef int mmu_write(Vcpu* v, uint64_t lin, const void* buf, uint64_t size, int bank) noexcept nogil
cdef int mmu_probe_read(Vcpu* v, uint64_t lin, uint64_t size, int bank) noexcept nogil
cdef int mmu_probe_write(Vcpu* v, uint64_t lin, uint64_t size, int bank) noexcept nogil

# For the dispatcher: the page that holds the code at `lin` (*hva_page is its first byte); *info has MMU_GLOBAL.
cdef int mmu_fetch(Vcpu* v, uint64_t lin, int bank, uint64_t* hva_page, uint64_t* info) noexcept nogil

# Guest-physical access of `need` (bits: 1 read, 2 write, 4 fetch) to its host address. `gla` and `final` (1: the
# access itself, 0: a page walk's) are for the exit only.
cdef int mmu_ept(Vcpu* v, uint64_t gpa, uint32_t need, uint64_t gla, int final, uint64_t* hva,
                 uint32_t* perms) noexcept nogil

# Load the protection keys' rights, and drop what the TLB has of pages whose rights change.
cdef void mmu_load_pkru(Vcpu* v, uint32_t value) noexcept nogil

cdef void mmu_flush_all(Vcpu* v) noexcept nogil
cdef void mmu_flush_nonglobal(Vcpu* v) noexcept nogil
cdef void mmu_flush_page(Vcpu* v, uint64_t lin) noexcept nogil
# The EPT changed: drops everything that came through it, TLBs included.
cdef void mmu_flush_ept(Vcpu* v) noexcept nogil

# MOV to CR3: `value` is checked by the caller but for the PCID no-flush bit 63, which is taken off here.
cdef void mmu_load_cr3(Vcpu* v, uint64_t value) noexcept nogil

cdef inline uint64_t* mmu_hit(Vcpu* v, uint64_t lin, uint32_t size, int bank, int access) noexcept nogil:
    """Host address of `size` bytes at `lin` if the TLB has them in one page, else NULL."""
    cdef TlbEntry* e = &v.tlb[bank * TLB_ENTRIES + ((lin >> 12) & (TLB_ENTRIES - 1))]
    cdef uint64_t tag = e.tag_w if access == ACCESS_WRITE else e.tag_r
    if tag != lin & ~<uint64_t>0xFFF:
        e += WAY_ENTRIES
        tag = e.tag_w if access == ACCESS_WRITE else e.tag_r
    if tag == lin & ~<uint64_t>0xFFF and (lin & 0xFFF) + size <= 4096:
        return <uint64_t*>(e.hva + (lin & 0xFFF))
    return NULL

# For an access that missed the first way.
cdef uint64_t mmu_promote(Vcpu* v, uint64_t lin, uint32_t width, int bank, int access) noexcept nogil

cdef inline int read_u8(Vcpu* v, uint64_t lin, int bank, uint8_t* out) noexcept nogil:
    cdef uint8_t* p = <uint8_t*>mmu_hit(v, lin, 1, bank, ACCESS_READ)
    if p != NULL:
        out[0] = p[0]
        return R_OK
    return mmu_read(v, lin, out, 1, bank)

cdef inline int read_u16(Vcpu* v, uint64_t lin, int bank, uint16_t* out) noexcept nogil:
    cdef uint16_t* p = <uint16_t*>mmu_hit(v, lin, 2, bank, ACCESS_READ)
    if p != NULL:
        out[0] = p[0]
        return R_OK
    return mmu_read(v, lin, out, 2, bank)

cdef inline int read_u32(Vcpu* v, uint64_t lin, int bank, uint32_t* out) noexcept nogil:
    cdef uint32_t* p = <uint32_t*>mmu_hit(v, lin, 4, bank, ACCESS_READ)
    if p != NULL:
        out[0] = p[0]
        return R_OK
    return mmu_read(v, lin, out, 4, bank)

cdef inline int read_u64(Vcpu* v, uint64_t lin, int bank, uint64_t* out) noexcept nogil:
    cdef uint64_t* p = mmu_hit(v, lin, 8, bank, ACCESS_READ)
    if p != NULL:
        out[0] = p[0]
        return R_OK
    return mmu_read(v, lin, out, 8, bank)
