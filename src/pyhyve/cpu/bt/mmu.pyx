# cython: language_level=3
"""Guest page walks, each step through the EPT, and the software TLB that generated code hits.

Which TLB entries were filled is kept in bit maps, one of local and one of global entries for each bank, so a flush
costs what was filled since the last one, not the size of the table.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.codecache cimport code_page, code_written, ibt_flush, ibt_flush_page
from pyhyve.cpu.bt.debug cimport note_data, page_watched
from pyhyve.cpu.bt.state cimport *

cdef extern from *:
    """
    /* Other processors write the same tables: accessed and dirty bits are set by compare-exchange. */
    static inline uint64_t bt_load64(uint64_t p) { return __atomic_load_n((uint64_t *)p, __ATOMIC_RELAXED); }
    static inline uint32_t bt_load32(uint64_t p) { return __atomic_load_n((uint32_t *)p, __ATOMIC_RELAXED); }
    static inline int bt_cas64(uint64_t p, uint64_t old, uint64_t val) {
        return __atomic_compare_exchange_n((uint64_t *)p, &old, val, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    static inline int bt_cas32(uint64_t p, uint32_t old, uint32_t val) {
        return __atomic_compare_exchange_n((uint32_t *)p, &old, val, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    static inline uint32_t bt_ctz(uint64_t x) { return (uint32_t)__builtin_ctzll(x); }
    #define BT_PAGE_MASK (~(uint64_t)0xFFF)
    #define BT_FRAME_MASK ((uint64_t)0x000FFFFFFFFFF000)
    """
    const uint64_t PAGE_MASK "BT_PAGE_MASK"
    const uint64_t FRAME_MASK "BT_FRAME_MASK"    # bits 12-51 of a paging-structure entry
    uint64_t bt_load64(uint64_t p) noexcept nogil
    uint32_t bt_load32(uint64_t p) noexcept nogil
    bint bt_cas64(uint64_t p, uint64_t old, uint64_t val) noexcept nogil
    uint32_t bt_ctz(uint64_t x) noexcept nogil
    bint bt_cas32(uint64_t p, uint32_t old, uint32_t val) noexcept nogil

cdef enum:
    # Page-table entry bits. Intel SDM vol 3, "Paging-Structure Entries".
    PTE_P = 0x1
    PTE_W = 0x2
    PTE_U = 0x4
    PTE_A = 0x20
    PTE_D = 0x40
    PTE_PS = 0x80
    PTE_G = 0x100
    # Page-fault error code. Intel SDM vol 3, "Page-Fault Exceptions".
    PF_P = 1
    PF_W = 2
    PF_U = 4
    PF_RSVD = 8
    PF_I = 16
    PF_PK = 32

    EPT_R = 1
    EPT_W = 2
    EPT_X = 4
    EPT_PS = 0x80
    EPT_A = 0x100
    EPT_D = 0x200
    EPTP_AD = 0x40

    CR0_WP = 1 << 16
    CR4_PSE = 1 << 4
    CR4_PAE = 1 << 5
    CR4_PGE = 1 << 7
    CR4_LA57 = 1 << 12
    CR4_SMEP = 1 << 20
    CR4_SMAP = 1 << 21
    CR4_PKE = 1 << 22
    EFER_LMA = 1 << 10
    EFER_NXE = 1 << 11

    # The arrays ept_cache_tag and ept_cache_val: slots of 2 MiB mappings, slots of 4 KiB mappings; behind them
    # housekeeping, in words of ept_cache_tag ...
    EPT_LARGE_SLOTS = 64
    EPT_SMALL = 64
    EPT_SMALL_SLOTS = 64
    KEEP_TLB = 128           # + bank * 32 (+ 16: global): bit maps of the TLB entries that were filled
    KEEP_FETCH = 224         # (+ 8: global): of the fetch entries
    TLB_WORDS = 16
    FETCH_WORDS = 8
    # ... and of ept_cache_val (from 224 on microcode's)
    KEEP_LARGE = 128         # 16 words: filter of the 4 MiB regions where large pages were entered
    KEEP_HUGE = 144          # 4 words: filter of the 1 GiB regions where 1 GiB pages were
    KEEP_END = 148

    MMU_HUGE = 16            # of *info, not told outside: a 1 GiB page


# ---------------------------------------------------------------------------------------------------------------------
# The EPT

cdef int ept_violation(Vcpu* v, uint64_t gpa, uint32_t need, uint32_t perms, uint64_t gla, int final,
                       uint32_t reason) noexcept nogil:
    v.exit.reason = reason
    v.exit.length = 0
    v.exit.qualification = need | (perms << 3) | 0x80 | (<uint32_t>final << 8)
    v.exit.gpa = gpa
    v.exit.gla = gla
    return R_EXIT


cdef int ept_walk(Vcpu* v, uint64_t gpa, uint32_t need, uint64_t gla, int final, uint64_t* hva,
                  uint32_t* perms_out) noexcept nogil:
    """Intel SDM vol 3, "EPT Translation Mechanism"; a frame number is a host virtual address."""
    cdef uint64_t at[4]
    cdef uint64_t entry[4]
    cdef uint64_t table, e, offset, want
    cdef uint32_t perms
    cdef int level, n, k, slot
    cdef bint ad = (v.eptp & EPTP_AD) != 0
    if gpa >> 48 or v.eptp & FRAME_MASK == 0:
        return ept_violation(v, gpa, need, 0, gla, final, X_EPT_VIOLATION)
    while True:
        table = v.eptp & FRAME_MASK
        perms = EPT_R | EPT_W | EPT_X
        n = 0
        level = 3
        while True:
            at[n] = table + ((gpa >> (12 + 9 * level)) & 511) * 8
            e = bt_load64(at[n])
            entry[n] = e
            n += 1
            perms &= <uint32_t>e & 7
            if e & 7 == 0:
                return ept_violation(v, gpa, need, 0, gla, final, X_EPT_VIOLATION)
            if e & 3 == EPT_W or (level == 3 and e & EPT_PS):
                return ept_violation(v, gpa, need, 0, gla, final, X_EPT_MISCONFIG)
            if level == 0 or e & EPT_PS:
                break
            table = e & FRAME_MASK
            level -= 1
        if perms & need != need:
            return ept_violation(v, gpa, need, perms, gla, final, X_EPT_VIOLATION)
        if ad:
            for k in range(n):
                want = EPT_A
                if k == n - 1 and need & EPT_W:
                    want |= EPT_D
                if entry[k] & want != want:
                    if not bt_cas64(at[k], entry[k], entry[k] | want):
                        break
                    entry[k] |= want
            else:
                k = n
            if k != n:
                continue
            if not entry[n - 1] & EPT_D:
                perms &= ~<uint32_t>EPT_W
        break
    offset = gpa & ((<uint64_t>1 << (12 + 9 * level)) - 1)
    table = (entry[n - 1] & FRAME_MASK) + offset
    if level:
        slot = <int>((gpa >> 21) & (EPT_LARGE_SLOTS - 1))
        v.ept_cache_tag[slot] = (gpa >> 21 << 1) | 1
        v.ept_cache_val[slot] = (table - (gpa & 0x1FFFFF)) | perms
    else:
        slot = <int>(EPT_SMALL + ((gpa >> 12) & (EPT_SMALL_SLOTS - 1)))
        v.ept_cache_tag[slot] = (gpa >> 12 << 1) | 1
        v.ept_cache_val[slot] = (table & PAGE_MASK) | perms
    hva[0] = table
    perms_out[0] = perms
    return R_OK


cdef int mmu_ept(Vcpu* v, uint64_t gpa, uint32_t need, uint64_t gla, int final, uint64_t* hva,
                 uint32_t* perms) noexcept nogil:
    """`perms` on return: what is allowed without another walk (W only with the dirty bit set, if the EPT has them)."""
    cdef uint64_t slot = (gpa >> 21) & (EPT_LARGE_SLOTS - 1)
    cdef uint64_t val
    if gpa >> 12 == v.apic_page:
        return ept_violation(v, gpa, need, 0, gla, final, X_EPT_VIOLATION)
    if v.ept_cache_tag[slot] == ((gpa >> 21 << 1) | 1):
        val = v.ept_cache_val[slot]
        if val & need == need:
            hva[0] = (val & PAGE_MASK) + (gpa & 0x1FFFFF)
            perms[0] = <uint32_t>val & 7
            return R_OK
    else:
        slot = EPT_SMALL + ((gpa >> 12) & (EPT_SMALL_SLOTS - 1))
        if v.ept_cache_tag[slot] == ((gpa >> 12 << 1) | 1):
            val = v.ept_cache_val[slot]
            if val & need == need:
                hva[0] = (val & PAGE_MASK) + (gpa & 0xFFF)
                perms[0] = <uint32_t>val & 7
                return R_OK
    return ept_walk(v, gpa, need, gla, final, hva, perms)


# ---------------------------------------------------------------------------------------------------------------------
# Guest page tables

cdef int page_fault(Vcpu* v, uint64_t lin, int access, int bank, uint32_t error) noexcept nogil:
    if access == ACCESS_WRITE:
        error |= PF_W
    elif access == ACCESS_FETCH and (v.cr4 & CR4_SMEP or (v.efer & EFER_NXE and v.cr4 & CR4_PAE)):
        error |= PF_I
    if bank == BANK_USER:
        error |= PF_U
    v.fault_vector = 14
    v.fault_has_error = 1
    v.fault_error = error
    v.fault_addr = lin
    return R_FAULT


cdef inline bint denied(Vcpu* v, uint64_t rights, bint nx, int access, int bank) noexcept nogil:
    """Intel SDM vol 3, "Determination of Access Rights"; `rights`: W and U as all levels grant them."""
    if bank == BANK_USER:
        if not rights & PTE_U:
            return True
        if access == ACCESS_WRITE:
            return not rights & PTE_W
        return access == ACCESS_FETCH and nx
    if access == ACCESS_FETCH:
        return nx or (rights & PTE_U and v.cr4 & CR4_SMEP)
    if rights & PTE_U and v.cr4 & CR4_SMAP and bank == BANK_KERNEL:
        return True
    return access == ACCESS_WRITE and not rights & PTE_W and v.cr0 & CR0_WP


cdef inline uint32_t key_denies(Vcpu* v, uint64_t leaf, uint64_t rights, int bank) noexcept nogil:
    """What the page's protection key takes away: bit ACCESS_READ for all data accesses, bit ACCESS_WRITE for writes.
    Intel SDM vol 3, "Protection Keys"."""
    cdef uint32_t bits
    if not rights & PTE_U or not v.cr4 & CR4_PKE or not v.efer & EFER_LMA:
        return 0
    bits = <uint32_t>(v.pkru >> (leaf >> 59 & 15) * 2) & 3
    v.tlb_keys |= <uint64_t>1 << (leaf >> 59 & 15)
    if bits & 1:
        return 1 << ACCESS_READ | 1 << ACCESS_WRITE
    return 1 << ACCESS_WRITE if bits & 2 and (bank == BANK_USER or v.cr0 & CR0_WP) else 0


cdef inline bint may_write(Vcpu* v, uint64_t rights, int bank) noexcept nogil:
    """For an access that was not denied: would a write from the same bank be allowed too?"""
    return rights & PTE_W or (bank != BANK_USER and not v.cr0 & CR0_WP)


cdef int walk64(Vcpu* v, uint64_t lin, int access, int bank, uint64_t* gpa, uint64_t* info) noexcept nogil:
    """PAE, 4-level and 5-level tables."""
    cdef uint64_t where[5]
    cdef uint64_t at[5]
    cdef uint64_t entry[5]
    cdef uint64_t table, e, reserved, large, rights, want, upper
    cdef uint32_t perms, keys
    cdef int level, top, n, k, r, shift
    cdef bint lma = (v.efer & EFER_LMA) != 0
    cdef bint nx
    # Reserved in every entry: bits from MAXPHYADDR to 51, and XD unless EFER.NXE; without long mode bits 52-62 too.
    upper = v.maxphyaddr if v.maxphyaddr else 52
    reserved = ((<uint64_t>1 << 52) - 1) & ~((<uint64_t>1 << upper) - 1)
    if not v.efer & EFER_NXE:
        reserved |= <uint64_t>1 << 63
    if not lma:
        reserved |= <uint64_t>0x7FF << 52
        top = 2
    else:
        top = 4 if v.cr4 & CR4_LA57 else 3
    while True:
        if lma:
            table = v.cr3 & FRAME_MASK
        else:
            table = v.cr3 & 0xFFFFFFE0ULL
        rights = PTE_W | PTE_U
        nx = False
        n = 0
        level = top
        while True:
            shift = 12 + 9 * level
            where[n] = table + ((lin >> shift) & 511) * 8
            r = mmu_ept(v, where[n], EPT_R, lin, 0, &at[n], &perms)
            if r != R_OK:
                return r
            e = bt_load64(at[n])
            if not e & PTE_P:
                return page_fault(v, lin, access, bank, 0)
            if e & reserved:
                return page_fault(v, lin, access, bank, PF_P | PF_RSVD)
            if level == 2 and not lma:
                # A PDPTE of PAE paging has no rights, no accessed bit, and reserved bits of its own.
                if e & 0x80000000000001E6ULL:
                    return page_fault(v, lin, access, bank, PF_P | PF_RSVD)
                table = e & FRAME_MASK
                level = 1
                continue
            entry[n] = e
            n += 1
            rights &= e
            if e >> 63:
                nx = True
            if level == 0:
                break
            if e & PTE_PS:
                large = ((<uint64_t>1 << shift) - 1) & ~<uint64_t>0x1FFF
                if level > 2 or e & large:
                    return page_fault(v, lin, access, bank, PF_P | PF_RSVD)
                break
            table = e & FRAME_MASK
            level -= 1
        keys = key_denies(v, e, rights, bank)
        if keys >> access & 1:
            return page_fault(v, lin, access, bank, PF_P | PF_PK)
        if denied(v, rights, nx, access, bank):
            return page_fault(v, lin, access, bank, PF_P)
        for k in range(n):
            want = PTE_A
            if k == n - 1 and access == ACCESS_WRITE:
                want |= PTE_D
            if entry[k] & want != want:
                # The EPT must let us write the table, and gets its own dirty bit on the way.
                r = mmu_ept(v, where[k], EPT_R | EPT_W, lin, 0, &at[k], &perms)
                if r != R_OK:
                    return r
                if not bt_cas64(at[k], entry[k], entry[k] | want):
                    break
                entry[k] |= want
        else:
            k = n
        if k == n:
            break
    e = entry[n - 1]
    large = (<uint64_t>1 << shift) - 1
    gpa[0] = (e & FRAME_MASK & ~large) | (lin & large)
    info[0] = ((MMU_GLOBAL if e & PTE_G and v.cr4 & CR4_PGE else 0)
               | (MMU_WRITABLE if e & PTE_D and may_write(v, rights, bank) and not keys >> ACCESS_WRITE & 1 else 0)
               | (0 if level == 0 else (MMU_LARGE if level == 1 else MMU_HUGE)))
    return R_OK


cdef int walk32(Vcpu* v, uint64_t lin, int access, int bank, uint64_t* gpa, uint64_t* info) noexcept nogil:
    """Two-level tables of 32-bit entries, with 4 MiB pages if CR4.PSE (addresses up to 40 bits by PSE-36)."""
    cdef uint64_t pde_at, pte_at, where, rights
    cdef uint32_t pde, pte, leaf, want, perms
    cdef int r
    while True:
        r = mmu_ept(v, (v.cr3 & 0xFFFFF000ULL) + ((lin >> 22) & 1023) * 4, EPT_R, lin, 0, &pde_at, &perms)
        if r != R_OK:
            return r
        pde = bt_load32(pde_at)
        if not pde & PTE_P:
            return page_fault(v, lin, access, bank, 0)
        rights = pde & (PTE_W | PTE_U)
        if pde & PTE_PS and v.cr4 & CR4_PSE:
            if pde & 0x200000:
                return page_fault(v, lin, access, bank, PF_P | PF_RSVD)
            if denied(v, rights, False, access, bank):
                return page_fault(v, lin, access, bank, PF_P)
            want = PTE_A | (PTE_D if access == ACCESS_WRITE else 0)
            if pde & want != want:
                r = mmu_ept(v, (v.cr3 & 0xFFFFF000ULL) + ((lin >> 22) & 1023) * 4, EPT_R | EPT_W, lin, 0, &pde_at,
                            &perms)
                if r != R_OK:
                    return r
                if not bt_cas32(pde_at, pde, pde | want):
                    continue
            leaf = pde | want
            gpa[0] = (leaf & 0xFFC00000ULL) | (<uint64_t>(leaf & 0x1FE000) << 19) | (lin & 0x3FFFFF)
            info[0] = MMU_LARGE
            break
        where = (pde & 0xFFFFF000ULL) + ((lin >> 12) & 1023) * 4
        r = mmu_ept(v, where, EPT_R, lin, 0, &pte_at, &perms)
        if r != R_OK:
            return r
        pte = bt_load32(pte_at)
        if not pte & PTE_P:
            return page_fault(v, lin, access, bank, 0)
        rights &= pte
        if denied(v, rights, False, access, bank):
            return page_fault(v, lin, access, bank, PF_P)
        if not pde & PTE_A:
            r = mmu_ept(v, (v.cr3 & 0xFFFFF000ULL) + ((lin >> 22) & 1023) * 4, EPT_R | EPT_W, lin, 0, &pde_at, &perms)
            if r != R_OK:
                return r
            if not bt_cas32(pde_at, pde, pde | PTE_A):
                continue
        want = PTE_A | (PTE_D if access == ACCESS_WRITE else 0)
        if pte & want != want:
            r = mmu_ept(v, where, EPT_R | EPT_W, lin, 0, &pte_at, &perms)
            if r != R_OK:
                return r
            if not bt_cas32(pte_at, pte, pte | want):
                continue
        leaf = pte | want
        gpa[0] = (leaf & 0xFFFFF000ULL) | (lin & 0xFFF)
        info[0] = 0
        break
    if leaf & PTE_G and v.cr4 & CR4_PGE:
        info[0] |= MMU_GLOBAL
    if leaf & PTE_D and may_write(v, rights, bank):
        info[0] |= MMU_WRITABLE
    return R_OK


cdef int translate(Vcpu* v, uint64_t lin, int access, int bank, uint64_t* hva, uint64_t* info,
                   uint64_t* gpa) noexcept nogil:
    cdef int r
    cdef uint32_t perms, need
    cdef int64_t high
    if not v.cr0 >> 31 & 1:
        gpa[0] = lin & 0xFFFFFFFFULL
        info[0] = MMU_WRITABLE
    else:
        v.n.page_walks += 1
        if v.cr4 & CR4_PAE:
            if v.efer & EFER_LMA:
                high = (<int64_t>lin) >> (56 if v.cr4 & CR4_LA57 else 47)
                if high != 0 and high != -1:
                    v.fault_vector = 13
                    v.fault_has_error = 1
                    v.fault_error = 0
                    return R_FAULT
            r = walk64(v, lin, access, bank, gpa, info)
        else:
            r = walk32(v, lin, access, bank, gpa, info)
        if r != R_OK:
            return r
    need = EPT_R if access == ACCESS_READ else (EPT_R | EPT_W if access == ACCESS_WRITE else EPT_X)
    r = mmu_ept(v, gpa[0], need, lin, 1, hva, &perms)
    if r != R_OK:
        if access == ACCESS_WRITE:
            v.exit.qualification &= ~<uint64_t>EPT_R
        return r
    if not perms & EPT_W:
        info[0] &= ~<uint64_t>MMU_WRITABLE
    return R_OK


cdef int mmu_translate(Vcpu* v, uint64_t lin, int access, int bank, uint64_t* hva, uint64_t* info,
                       uint64_t* gpa) noexcept nogil:
    cdef uint64_t h = 0
    cdef uint64_t f = 0
    cdef uint64_t g = 0
    cdef int r = translate(v, lin, access, bank, &h, &f, &g)
    if hva != NULL:
        hva[0] = h
    if info != NULL:
        info[0] = f
    if gpa != NULL:
        gpa[0] = g
    return r


# ---------------------------------------------------------------------------------------------------------------------
# The TLB

cdef inline void set_bit(uint64_t* words, uint64_t bit) noexcept nogil:
    words[bit >> 6] |= <uint64_t>1 << (bit & 63)


cdef inline bint test_bit(uint64_t* words, uint64_t bit) noexcept nogil:
    return words[bit >> 6] >> (bit & 63) & 1


cdef inline uint64_t* noted(Vcpu* v, int way, int bank, int side) noexcept nogil:
    """The bit map of the local (side 0) or global entries of a way."""
    return (&v.second_noted[0] if way else &v.ept_cache_tag[KEEP_TLB]) + (bank * 2 + side) * TLB_WORDS


cdef inline void note_filled(uint64_t* words, int n, uint64_t index, uint64_t info) noexcept nogil:
    """Two bit maps of n words: of local entries, and of global ones behind it. An entry stands in one of them."""
    cdef uint64_t bit = <uint64_t>1 << (index & 63)
    words += index >> 6
    if info & MMU_GLOBAL:
        words[0] &= ~bit
        words[n] |= bit
    else:
        words[0] |= bit
        words[n] &= ~bit


cdef inline void note_large(Vcpu* v, uint64_t lin, uint64_t info) noexcept nogil:
    """INVLPG drops a whole large page: remember where those are, so that it need not search for small ones."""
    if info & MMU_LARGE:
        set_bit(&v.ept_cache_val[KEEP_LARGE], lin >> 22 & 1023)
    elif info & MMU_HUGE:
        set_bit(&v.ept_cache_val[KEEP_HUGE], lin >> 30 & 255)


cdef inline void drop(TlbEntry* e, uint32_t index) noexcept nogil:
    e.tag_r = tlb_invalid(index)
    e.tag_w = tlb_invalid(index)


cdef uint64_t mmu_promote(Vcpu* v, uint64_t lin, uint32_t width, int bank, int access) noexcept nogil:
    """The host address of what the second way has, which changes places with the first one's; 0 if it has not."""
    cdef uint32_t index = <uint32_t>(lin >> 12) & (TLB_ENTRIES - 1)
    cdef TlbEntry* e = &v.tlb[bank * TLB_ENTRIES + index]
    cdef TlbEntry first = e[0]
    cdef uint64_t* a
    cdef uint64_t* b
    cdef uint64_t differ
    cdef int side
    if mmu_hit(v, lin, width, bank, access) == NULL:
        return 0
    v.second_left = SECOND_HITS
    if first.tag_r != lin & PAGE_MASK:
        e[0] = e[WAY_ENTRIES]
        e[WAY_ENTRIES] = first
        for side in range(2):
            a = noted(v, 0, bank, side) + (index >> 6)
            b = noted(v, 1, bank, side) + (index >> 6)
            differ = (a[0] ^ b[0]) & <uint64_t>1 << (index & 63)
            a[0] ^= differ
            b[0] ^= differ
    return e.hva + (lin & 0xFFF)


cdef bint enter(Vcpu* v, uint64_t lin, int access, int bank, uint64_t hva, uint64_t info) noexcept nogil:
    """Fill the TLB entry of `lin`; True if the page holds translated code and a write was asked for."""
    cdef uint32_t index = <uint32_t>(lin >> 12) & (TLB_ENTRIES - 1)
    cdef TlbEntry* e = &v.tlb[bank * TLB_ENTRIES + index]
    cdef uint64_t page = lin & PAGE_MASK
    cdef bint code = False
    cdef TlbEntry* second = e + WAY_ENTRIES
    hva &= PAGE_MASK
    if e.tag_r != page:
        if e.tag_r != tlb_invalid(index):
            second[0] = e[0]                     # pages that share an index do not push each other out
            note_filled(noted(v, 1, bank, 0), TLB_WORDS, index,
                        MMU_GLOBAL if test_bit(noted(v, 0, bank, 1), index) else 0)
        elif second.tag_r == page:
            drop(second, index)
    e.tag_r = page
    e.tag_w = tlb_invalid(index)
    e.hva = hva
    if info & MMU_WRITABLE:
        code = code_page(v, hva)
        if not code:
            e.tag_w = page
    e.addend = hva - page
    if v.debug and page_watched(v, lin):
        e.tag_r = e.tag_w = tlb_invalid(index)
    note_filled(noted(v, 0, bank, 0), TLB_WORDS, index, info)
    if info & (MMU_LARGE | MMU_HUGE):
        note_large(v, lin, info)
    return code and access == ACCESS_WRITE


cdef int mmu_fill(Vcpu* v, uint64_t lin, int access, int bank) noexcept nogil:
    cdef uint64_t hva, info, gpa
    cdef int r
    if access == ACCESS_WRITE:
        v.n.tlb_misses_w += 1
    else:
        v.n.tlb_misses_r += 1
    r = translate(v, lin, access, bank, &hva, &info, &gpa)
    if r != R_OK:
        return r
    if enter(v, lin, access, bank, hva, info):
        return R_SLOW
    return R_OK


cdef int mmu_page(Vcpu* v, uint64_t lin, int access, int bank, uint64_t* hva, uint64_t* info) noexcept nogil:
    cdef uint64_t* p = mmu_hit(v, lin, 1, bank, access)
    cdef uint64_t gpa
    cdef int r
    info[0] = 0
    if p != NULL:
        hva[0] = <uint64_t>p
        return R_OK
    if access == ACCESS_WRITE:
        v.n.tlb_misses_w += 1
    else:
        v.n.tlb_misses_r += 1
    r = translate(v, lin, access, bank, hva, info, &gpa)
    if r == R_OK:
        info[0] = MMU_CODE if enter(v, lin, access, bank, hva[0], info[0]) else 0
    return r


cdef int mmu_fetch(Vcpu* v, uint64_t lin, int bank, uint64_t* hva_page, uint64_t* info) noexcept nogil:
    cdef uint64_t page = lin & PAGE_MASK
    cdef uint64_t index = (lin >> 12) & (FETCH_ENTRIES - 1)
    cdef FetchEntry* f = &v.fetch[index]
    cdef uint64_t user = 0x100 if bank == BANK_USER else 0
    cdef uint64_t hva, bits, gpa
    cdef int r
    if f.lin == page | 1 and f.info & 0x100 == user:
        hva_page[0] = f.hva
        info[0] = f.info & MMU_GLOBAL
        return R_OK
    v.n.tlb_misses_x += 1
    r = translate(v, lin, ACCESS_FETCH, bank, &hva, &bits, &gpa)
    if r != R_OK:
        return r
    f.lin = page | 1
    f.hva = hva & PAGE_MASK
    f.info = (bits & MMU_GLOBAL) | user
    note_filled(&v.ept_cache_tag[KEEP_FETCH], FETCH_WORDS, index, bits)
    if bits & (MMU_LARGE | MMU_HUGE):
        note_large(v, lin, bits)
    hva_page[0] = f.hva
    info[0] = bits & MMU_GLOBAL
    return R_OK


# ---------------------------------------------------------------------------------------------------------------------
# Flushes

cdef void drop_noted(Vcpu* v, int side) noexcept nogil:
    """Drop what was filled: local entries (0) or global ones (1)."""
    cdef uint64_t* words
    cdef uint64_t bits
    cdef uint32_t index
    cdef int n, k
    for n in range(2 * BANKS):
        words = noted(v, n // BANKS, n % BANKS, side)
        for k in range(TLB_WORDS):
            bits = words[k]
            if not bits:
                continue
            words[k] = 0
            while bits:
                index = k * 64 + <uint32_t>bt_ctz(bits)
                bits &= bits - 1
                drop(&v.tlb[n * TLB_ENTRIES + index], index)
    words = &v.ept_cache_tag[KEEP_FETCH + side * FETCH_WORDS]
    for k in range(FETCH_WORDS):
        bits = words[k]
        words[k] = 0
        while bits:
            v.fetch[k * 64 + bt_ctz(bits)].lin = 0
            bits &= bits - 1


cdef void mmu_flush_all(Vcpu* v) noexcept nogil:
    cdef int k
    v.n.tlb_flushes += 1
    drop_noted(v, 0)
    drop_noted(v, 1)
    for k in range(KEEP_LARGE, KEEP_END):
        v.ept_cache_val[k] = 0
    ibt_flush(v, 0)


cdef void mmu_load_pkru(Vcpu* v, uint32_t value) noexcept nogil:
    cdef uint64_t changed = v.pkru ^ value
    cdef int k
    v.pkru = value
    for k in range(16):
        if changed >> 2 * k & 3 and v.tlb_keys >> k & 1:
            # code is fetched whatever the key is: the branch table stays
            v.n.tlb_flushes += 1
            v.tlb_keys = 0
            drop_noted(v, 0)
            drop_noted(v, 1)
            return


cdef void mmu_flush_nonglobal(Vcpu* v) noexcept nogil:
    v.n.tlb_flushes += 1
    drop_noted(v, 0)
    ibt_flush(v, 1)


cdef void drop_region(Vcpu* v, uint64_t lin, int shift) noexcept nogil:
    """Drop every entry of the naturally aligned region of 2**shift bytes about `lin`."""
    cdef uint64_t* words
    cdef uint64_t bits
    cdef uint32_t index
    cdef TlbEntry* e
    cdef FetchEntry* f
    cdef int n, k
    for n in range(2 * BANKS):
        words = noted(v, n // BANKS, n % BANKS, 0)
        for k in range(TLB_WORDS):
            bits = words[k] | words[k + TLB_WORDS]
            while bits:
                index = k * 64 + <uint32_t>bt_ctz(bits)
                bits &= bits - 1
                e = &v.tlb[n * TLB_ENTRIES + index]
                if (e.tag_r ^ lin) >> shift == 0:
                    drop(e, index)
    for k in range(FETCH_ENTRIES):
        f = &v.fetch[k]
        if f.lin and (f.lin ^ lin) >> shift == 0:
            f.lin = 0
    ibt_flush(v, 0)


cdef void mmu_flush_page(Vcpu* v, uint64_t lin) noexcept nogil:
    cdef uint32_t index = <uint32_t>(lin >> 12) & (TLB_ENTRIES - 1)
    cdef FetchEntry* f = &v.fetch[(lin >> 12) & (FETCH_ENTRIES - 1)]
    cdef uint64_t page = lin & PAGE_MASK
    cdef TlbEntry* e
    cdef int bank
    v.n.tlb_flushes += 1
    if test_bit(&v.ept_cache_val[KEEP_HUGE], lin >> 30 & 255):
        drop_region(v, lin, 30)
        return
    if test_bit(&v.ept_cache_val[KEEP_LARGE], lin >> 22 & 1023):
        drop_region(v, lin, 22)
        return
    for bank in range(BANKS):
        e = &v.tlb[bank * TLB_ENTRIES + index]
        if e.tag_r == page:
            drop(e, index)
        if e[WAY_ENTRIES].tag_r == page:
            drop(e + WAY_ENTRIES, index)
    if f.lin == page | 1:
        f.lin = 0
    ibt_flush_page(v, lin)


cdef void mmu_flush_ept(Vcpu* v) noexcept nogil:
    cdef int k
    for k in range(EPT_SMALL + EPT_SMALL_SLOTS):
        v.ept_cache_tag[k] = 0
    mmu_flush_all(v)


cdef void mmu_load_cr3(Vcpu* v, uint64_t value) noexcept nogil:
    v.n.cr3_writes += 1
    v.cr3 = value & ~(<uint64_t>1 << 63)
    mmu_flush_nonglobal(v)


cdef void mmu_init(Vcpu* v) noexcept nogil:
    cdef int k
    v.apic_page = ~<uint64_t>0
    for k in range(256):
        v.ept_cache_tag[k] = 0
        v.ept_cache_val[k] = 0
    v.second_left = SECOND_HITS
    for k in range(2 * WAY_ENTRIES):
        drop(&v.tlb[k], k & (TLB_ENTRIES - 1))
        v.tlb[k].addend = 0
    for k in range(FETCH_ENTRIES):
        v.fetch[k].lin = 0
        v.fetch[k].info = 0


# ---------------------------------------------------------------------------------------------------------------------
# Guest memory by linear address

cdef inline void move(uint64_t to, uint64_t source, uint64_t size) noexcept nogil:
    """Single accesses of the natural sizes: the guest expects them not to tear."""
    if size == 8:
        (<uint64_t*>to)[0] = (<uint64_t*>source)[0]
    elif size == 4:
        (<uint32_t*>to)[0] = (<uint32_t*>source)[0]
    elif size == 2:
        (<uint16_t*>to)[0] = (<uint16_t*>source)[0]
    elif size == 1:
        (<uint8_t*>to)[0] = (<uint8_t*>source)[0]
    elif size <= 64 and size & 7 == 0:
        while size:
            (<uint64_t*>to)[0] = (<uint64_t*>source)[0]
            to += 8
            source += 8
            size -= 8
    else:
        bt_copy(<void*>to, <void*>source, size)


cdef inline uint64_t page_after(Vcpu* v, uint64_t lin) noexcept nogil:
    lin = (lin & PAGE_MASK) + 4096
    return lin if v.efer & EFER_LMA else lin & 0xFFFFFFFFULL


cdef int probe(Vcpu* v, uint64_t lin, uint64_t size, int access, int bank) noexcept nogil:
    cdef uint64_t hva, info, step
    cdef int r
    while size:
        r = mmu_page(v, lin, access, bank, &hva, &info)
        if r != R_OK:
            return r
        step = 4096 - (lin & 0xFFF)
        if step >= size:
            break
        size -= step
        lin = page_after(v, lin)
    return R_OK


cdef int mmu_probe_read(Vcpu* v, uint64_t lin, uint64_t size, int bank) noexcept nogil:
    if mmu_hit(v, lin, <uint32_t>size if size <= 4096 else 8192, bank, ACCESS_READ) != NULL:
        return R_OK
    return probe(v, lin, size, ACCESS_READ, bank)


cdef int mmu_probe_write(Vcpu* v, uint64_t lin, uint64_t size, int bank) noexcept nogil:
    if mmu_hit(v, lin, <uint32_t>size if size <= 4096 else 8192, bank, ACCESS_WRITE) != NULL:
        return R_OK
    return probe(v, lin, size, ACCESS_WRITE, bank)


cdef int mmu_read(Vcpu* v, uint64_t lin, void* buf, uint64_t size, int bank) noexcept nogil:
    cdef uint64_t* p
    cdef uint64_t first, second, info, step
    cdef int r
    if size <= 4096:
        p = mmu_hit(v, lin, <uint32_t>size, bank, ACCESS_READ)
        if p != NULL:
            move(<uint64_t>buf, <uint64_t>p, size)
            return R_OK
        note_data(v, lin, size, ACCESS_READ)
    else:
        r = probe(v, lin, size, ACCESS_READ, bank)
        if r != R_OK:
            return r
    while size:
        r = mmu_page(v, lin, ACCESS_READ, bank, &first, &info)
        if r != R_OK:
            return r
        step = 4096 - (lin & 0xFFF)
        if step >= size:
            move(<uint64_t>buf, first, size)
            break
        if size - step <= 4096:
            r = mmu_page(v, page_after(v, lin), ACCESS_READ, bank, &second, &info)
            if r != R_OK:
                return r
            move(<uint64_t>buf, first, step)
            move(<uint64_t>buf + step, second, size - step)
            break
        move(<uint64_t>buf, first, step)
        buf = <void*>(<uint64_t>buf + step)
        size -= step
        lin = page_after(v, lin)
    return R_OK


cdef int mmu_write(Vcpu* v, uint64_t lin, const void* buf, uint64_t size, int bank) noexcept nogil:
    cdef uint64_t* p
    cdef uint64_t source = <uint64_t>buf
    cdef uint64_t first, second, info, info2, step
    cdef int r
    if size <= 4096:
        p = mmu_hit(v, lin, <uint32_t>size, bank, ACCESS_WRITE)
        if p != NULL:
            move(<uint64_t>p, source, size)
            return R_OK
        note_data(v, lin, size, ACCESS_WRITE)
    else:
        r = probe(v, lin, size, ACCESS_WRITE, bank)
        if r != R_OK:
            return r
    while size:
        r = mmu_page(v, lin, ACCESS_WRITE, bank, &first, &info)
        if r != R_OK:
            return r
        step = 4096 - (lin & 0xFFF)
        if step >= size:
            move(first, source, size)
            if info & MMU_CODE:
                code_written(v, first, <uint32_t>size)
            break
        if size - step <= 4096:
            r = mmu_page(v, page_after(v, lin), ACCESS_WRITE, bank, &second, &info2)
            if r != R_OK:
                return r
            move(first, source, step)
            move(second, source + step, size - step)
            if info & MMU_CODE:
                code_written(v, first, <uint32_t>step)
            if info2 & MMU_CODE:
                code_written(v, second, <uint32_t>(size - step))
            break
        move(first, source, step)
        if info & MMU_CODE:
            code_written(v, first, <uint32_t>step)
        source += step
        size -= step
        lin = page_after(v, lin)
    return R_OK
