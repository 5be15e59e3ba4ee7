# cython: language_level=3
"""See microcode_xsave.pxd.

The guest's x87 and vector state is live in the host's registers while this runs, so the host's own instruction does
the work, on a bounce buffer of ours; images from the guest are checked before, so that it cannot fault. The layout of
the components is the host's, and the guest's CPUID says so. PKRU is not in the host's registers (it would apply to the
monitor), so its component is put in here, behind the host's last one. There are no supervisor components: IA32_XSS is
always 0, and XSAVES and XRSTORS are XSAVEC and XRSTOR with a few more checks. Source: Intel SDM vol 1, "Managing State
Using the XSAVE Feature Set".
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.microcode_ops cimport *
from pyhyve.cpu.bt.mmu cimport bt_fill, mmu_load_pkru, mmu_probe_read, mmu_probe_write, mmu_read, mmu_write
from pyhyve.cpu.bt.state cimport *

cdef extern from *:
    """
    #define BT_XSTATE(insn, at, mask) \\
        __asm__ __volatile__(insn " (%0)" : : "r"(at), "a"((uint32_t)(mask)), "d"((uint32_t)((mask) >> 32)) : "memory")
    static inline void bt_xsave(uint64_t at, uint64_t mask) { BT_XSTATE("xsave64", at, mask); }
    static inline void bt_xsavec(uint64_t at, uint64_t mask) { BT_XSTATE("xsavec64", at, mask); }
    static inline void bt_xrstor(uint64_t at, uint64_t mask) { BT_XSTATE("xrstor64", at, mask); }
    static inline void bt_image(uint64_t at) { __asm__ __volatile__("fxsave64 (%0)" : : "r"(at) : "memory"); }
    static inline void bt_host_cpuid(uint32_t leaf, uint32_t sub, uint32_t *out) {
        __asm__ __volatile__("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(sub));
    }
    """
    void bt_xsave(uint64_t at, uint64_t mask) noexcept nogil
    void bt_xsavec(uint64_t at, uint64_t mask) noexcept nogil
    void bt_xrstor(uint64_t at, uint64_t mask) noexcept nogil
    void bt_image(uint64_t at) noexcept nogil
    void bt_host_cpuid(uint32_t leaf, uint32_t sub, uint32_t* out) noexcept nogil

cdef enum:
    HEADER = 512             # XSAVE header: XSTATE_BV, XCOMP_BV, reserved
    EXTENDED = 576
    MXCSR_MASK = 28
    COMPONENTS = 10          # x87 SSE AVX - - opmask ZMM_Hi256 Hi16_ZMM - PKRU: as many as XCR0 can have here
    PKRU = 9

cdef uint32_t component_size[COMPONENTS]
cdef uint32_t component_offset[COMPONENTS]      # in the standard format
cdef uint32_t component_align[COMPONENTS]
cdef uint32_t mxcsr_bad


cdef void learn_layout() noexcept nogil:
    """The host's own layout; where it has no PKRU, that lies behind everything else (as vmm/cpuid.py says too)."""
    cdef uint32_t out[4]
    cdef char image[528]
    cdef uint64_t at = (<uint64_t>image + 15) & ~<uint64_t>15
    cdef uint32_t end = EXTENDED
    cdef int k
    global mxcsr_bad
    for k in range(2, COMPONENTS):
        bt_host_cpuid(0xD, k, out)
        component_size[k] = out[0]
        component_offset[k] = out[1]
        component_align[k] = out[2] & 2
        if k < PKRU and out[0] + out[1] > end and out[2] & 1 == 0:
            end = out[0] + out[1]
    if component_size[PKRU] == 0:
        component_size[PKRU] = 8
        component_offset[PKRU] = end
        component_align[PKRU] = 0
    bt_image(at)
    mxcsr_bad = ~(<uint32_t*>(at + MXCSR_MASK))[0] if (<uint32_t*>(at + MXCSR_MASK))[0] else ~<uint32_t>0xFFBF


learn_layout()


cdef uint32_t mxcsr_reserved() noexcept nogil:
    return mxcsr_bad


cdef void places(uint64_t mask, bint compact, uint32_t* offset, uint32_t* size) noexcept nogil:
    """Where the components of an image are, and its size. `mask`: of the compacted format XCOMP_BV's."""
    cdef uint32_t at = EXTENDED
    cdef int k
    for k in range(2, COMPONENTS):
        if not mask >> k & 1:
            continue
        if not compact:
            offset[k] = component_offset[k]
            if offset[k] + component_size[k] > at:
                at = offset[k] + component_size[k]
            continue
        if component_align[k]:
            at = (at + 63) & ~<uint32_t>63
        offset[k] = at
        at += component_size[k]
    size[0] = at


cdef void init_components(Vcpu* v, uint64_t mask) noexcept nogil:
    cdef uint64_t at = bounce(v)
    bt_fill(<void*>at, 0, EXTENDED)
    (<uint16_t*>at)[0] = 0x37F
    (<uint32_t*>(at + MXCSR))[0] = 0x1F80
    bt_xrstor(at, mask)


cdef int operand(Vcpu* v, Insn* i, uint32_t size, int access, uint32_t align, uint32_t parts,
                 uint64_t* lin) noexcept nogil:
    cdef int r = linear(v, i.seg, effective(v, i), size, access, lin)
    if r == R_OK:
        r = aligned(v, lin[0], parts)
    if r == R_OK and lin[0] & (align - 1):
        return gp0(v)
    return r


cdef inline uint64_t requested(Vcpu* v) noexcept nogil:
    """RFBM: what EDX:EAX asks for of what XCR0 enables."""
    return ((v.gpr[RDX] << 32) | (v.gpr[RAX] & 0xFFFFFFFFULL)) & v.xcr0


cdef int xsave(Vcpu* v, Insn* i, int kind) noexcept nogil:
    """The legacy area and the header are read and written back, so that what the instruction leaves alone stays. Of the
    rest only components that it stores are written: all requested ones, or those that are in use."""
    cdef uint64_t at = bounce(v)
    cdef uint64_t mask = requested(v)
    cdef uint64_t* header = <uint64_t*>(at + HEADER)
    cdef uint32_t offset[COMPONENTS]
    cdef uint64_t lin = 0
    cdef uint64_t stored
    cdef uint32_t size, start, end
    cdef int k, r
    if not v.cr4 & CR4_OSXSAVE:
        return undefined(v)
    if v.cr0 & CR0_TS:
        return fault(v, NM)
    places(mask, kind == SAVE_COMPACT, offset, &size)
    r = operand(v, i, size, ACCESS_WRITE, 64, 1, &lin)
    if r == R_OK:
        r = mmu_probe_write(v, lin, size, v.bank)
    if r == R_OK:
        r = mmu_read(v, lin, <void*>at, EXTENDED, v.bank)
    if r != R_OK:
        return r
    if kind == SAVE_COMPACT:
        bt_xsavec(at, mask & HOST_STATE)
    else:
        bt_xsave(at, mask & HOST_STATE)
    if mask & 1:
        hide_pointers(at)
    if mask & PKRU_STATE:
        header[0] &= ~<uint64_t>PKRU_STATE
        if v.pkru:
            header[0] |= PKRU_STATE
        if kind == SAVE_COMPACT:
            header[1] |= PKRU_STATE
        (<uint64_t*>(at + offset[PKRU]))[0] = v.pkru
    stored = mask if kind == SAVE_STANDARD else mask & header[0]
    start = 0
    end = EXTENDED
    for k in range(2, COMPONENTS):
        if stored >> k & 1:
            if offset[k] != end:
                r = mmu_write(v, lin + start, <void*>(at + start), end - start, v.bank)
                if r != R_OK:
                    return r
                start = offset[k]
            end = offset[k] + component_size[k]
    r = mmu_write(v, lin + start, <void*>(at + start), end - start, v.bank)
    return r if r != R_OK else advance(v, i)


cdef int xrstor(Vcpu* v, Insn* i, bint supervisor) noexcept nogil:
    cdef uint64_t at = bounce(v)
    cdef uint64_t mask = requested(v)
    cdef uint64_t* header = <uint64_t*>(at + HEADER)
    cdef uint32_t offset[COMPONENTS]
    cdef uint64_t lin = 0
    cdef uint64_t have, form
    cdef uint32_t size
    cdef int k, r
    if not v.cr4 & CR4_OSXSAVE:
        return undefined(v)
    if v.cr0 & CR0_TS:
        return fault(v, NM)
    r = operand(v, i, EXTENDED, ACCESS_READ, 64, 1, &lin)
    if r == R_OK:
        r = mmu_read(v, lin, <void*>at, EXTENDED, v.bank)
    if r != R_OK:
        return r
    have = header[0]
    form = header[1]
    if form >> 63:
        form &= ~(<uint64_t>1 << 63)
        for k in range(2, 8):
            if header[k]:
                return gp0(v)
        if form & ~v.xcr0 or have & ~form:
            return gp0(v)
        places(form, True, offset, &size)
        if mask & have & 2 and (<uint32_t*>(at + MXCSR))[0] & mxcsr_bad:
            return gp0(v)
        header[1] &= ~<uint64_t>PKRU_STATE
    else:
        if supervisor or have & ~v.xcr0 or form or header[2]:
            return gp0(v)
        places(have & mask, False, offset, &size)
        if mask & 6 and (<uint32_t*>(at + MXCSR))[0] & mxcsr_bad:
            return gp0(v)
    if size > EXTENDED:
        r = operand(v, i, size, ACCESS_READ, 64, 1, &lin)
        if r == R_OK:
            r = mmu_probe_read(v, lin, size, v.bank)
        if r != R_OK:
            return r
    for k in range(2, COMPONENTS):
        if have & mask & <uint64_t>1 << k:
            r = mmu_read(v, lin + offset[k], <void*>(at + offset[k]), component_size[k], v.bank)
            if r != R_OK:
                return r
    header[0] &= ~<uint64_t>PKRU_STATE
    bt_xrstor(at, mask & HOST_STATE)
    if mask & PKRU_STATE:
        mmu_load_pkru(v, (<uint32_t*>(at + offset[PKRU]))[0] if have & PKRU_STATE else 0)
    return advance(v, i)


cdef int group9(Vcpu* v, Insn* i) noexcept nogil:
    cdef int op = i.reg & 7
    if op == 4:
        return xsave(v, i, SAVE_COMPACT)
    if op != 3 and op != 5:
        return undefined(v)
    if not v.cr4 & CR4_OSXSAVE:
        return undefined(v)
    if v.cpl:
        return gp0(v)
    return xrstor(v, i, True) if op == 3 else xsave(v, i, SAVE_COMPACT)


cdef int pkru(Vcpu* v, Insn* i) noexcept nogil:
    """0F 01 EE, EF."""
    if not v.cr4 & CR4_PKE:
        return undefined(v)
    if <uint32_t>v.gpr[RCX] or (i.modrm == 0xEF and <uint32_t>v.gpr[RDX]):
        return gp0(v)
    if i.modrm == 0xEF:
        mmu_load_pkru(v, <uint32_t>v.gpr[RAX])
    else:
        v.gpr[RAX] = v.pkru
        v.gpr[RDX] = 0
    return advance(v, i)
