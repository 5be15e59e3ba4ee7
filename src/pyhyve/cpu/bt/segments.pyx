# cython: language_level=3
"""See segments.pxd. Sources: Intel SDM vol 3, "Limit Checking", "Type Checking", "Alignment Check Exception (#AC)"."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyhyve.cpu.bt.codecache cimport (
    MODE_ALIGN_SHIFT, MODE_CHECK_SHIFT, MODE_LIMIT_SHIFT, MODE_SP16_SHIFT
)
from pyhyve.cpu.bt.context cimport *
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.kinds cimport is_aligned_vector
from pyhyve.cpu.bt.microcode_ops cimport AC, ATTR_DB, ATTR_UNUSABLE, GP, SS, canonical, fault_code, linear_checked, protected
from pyhyve.cpu.bt.state cimport *

# --- modes -----------------------------------------------------------------------------------------------------------

cdef inline uint64_t _guard_bit() noexcept nogil:
    return <uint64_t>1 << GUARD_LOG


cdef void segments_init(Vcpu* v) noexcept nogil:
    v.guard_bit = _guard_bit()
    segments_forget(v)


cdef void segments_forget(Vcpu* v) noexcept nogil:
    v.cs_limits[0] = 0xFFFFFFFF
    v.cs_limits[1] = 0xFFFF
    v.n_cs_limits = 2
    v.cs_limit = 0


cdef uint64_t _limit_index(Vcpu* v) noexcept nogil:
    cdef uint32_t limit = v.seg[SEG_CS].limit
    cdef uint32_t k
    if v.cs_limits[v.cs_limit] == limit:
        return v.cs_limit
    for k in range(v.n_cs_limits):
        if v.cs_limits[k] == limit:
            v.cs_limit = k
            return k
    if v.n_cs_limits == CS_LIMITS_FULL:
        return CS_LIMITS_FULL
    v.cs_limits[v.n_cs_limits] = limit
    v.cs_limit = v.n_cs_limits
    v.n_cs_limits += 1
    return v.cs_limit


cdef uint64_t segments_mode(Vcpu* v) noexcept nogil:
    cdef uint64_t mode = 0
    cdef uint64_t bit = _guard_bit()
    cdef uint64_t within
    cdef uint32_t attr
    cdef bint typed = protected(v)
    cdef bint readable, writable
    cdef Segment* s
    cdef int k
    for k in range(SEG_GS + 1):
        s = &v.seg[k]
        attr = s.attr
        within = bit - <uint64_t>s.limit - 1 - s.base
        readable = not attr & ATTR_UNUSABLE and attr & 12 != 4
        writable = readable
        if typed and (attr & 8 or not attr & 2):
            writable = False
            if attr & 10 == 8:
                readable = False
        v.guard_read[k] = within if readable else bit - s.base
        v.guard_write[k] = within if writable else bit - s.base
        v.guard_open[k] = 0 if writable and s.limit == <uint32_t>0xFFFFFFFF else bit
        if (v.guard_open[k] or s.base) and k <= SEG_DS and k != SEG_CS:
            mode |= 1 << (MODE_CHECK_SHIFT + (k - 1 if k else 0))
    if not v.seg[SEG_SS].attr & ATTR_DB:
        mode |= <uint64_t>1 << MODE_SP16_SHIFT
    return mode | _limit_index(v) << MODE_LIMIT_SHIFT


cdef void segments_begin(T* t) noexcept nogil:
    t.guard = 0
    t.align = t.mode >> MODE_ALIGN_SHIFT & 1
    t.check = 0
    t.sp16 = 0
    t.limit = ~<uint64_t>0
    if t.size != 64:
        t.check = <int>(t.mode >> MODE_CHECK_SHIFT) & 7
        t.check = t.check & 1 | (t.check & 6) << 1
        t.sp16 = t.mode >> MODE_SP16_SHIFT & 1
        t.limit = t.v.cs_limits[t.mode >> MODE_LIMIT_SHIFT & CS_LIMITS_FULL]
    if t.align:
        t.single = 1


# --- generated code --------------------------------------------------------------------------------------------------

cdef inline int32_t _o_guard(int seg, int access) noexcept nogil:
    return (OFF(&(<Vcpu*>NULL).guard_write[0]) if access & ACCESS_WRITE else OFF(&(<Vcpu*>NULL).guard_read[0])) + 8 * seg


cdef void add_segment(T* t, int seg, int access, uint32_t width) noexcept nogil:
    cdef Emit* e = &t.e
    if t.size == 64:
        if seg == SEG_FS or seg == SEG_GS:
            ld_gs(e, H_T1, o_segbase(seg))
            lea_sib(e, H_T0, H_T0, H_T1, 0, 0, 1)
        return
    t.guard |= (seg + 1) << 2                    # a miss looks at flat segments too: the end of 4 GiB
    if seg <= SEG_DS and seg != SEG_CS and not t.check >> seg & 1:
        return
    ld_gs(e, H_T1, o_segbase(seg))
    if seg >= SEG_FS and t.size == 32:
        # mostly with a limit of 4 GiB (thread-local data): no more than that is looked at
        lea_sib(e, H_T0, H_T0, H_T1, 0, 0, 0)
        ld_gs(e, H_T1, OFF(&(<Vcpu*>NULL).guard_open[0]) + 8 * seg)
        lea_sib(e, H_T0, H_T0, H_T1, 0, 0, 1)
        return
    lea_sib(e, H_T0, H_T0, H_T1, 0, 0, 1)
    ld_gs(e, H_T1, _o_guard(seg, access))
    lea_sib(e, H_T1, H_T0, H_T1, 0, <int32_t>width - 1, 1)
    mov_rr32(e, H_T0, H_T0)
    rorx(e, H_T1, H_T1, GUARD_LOG)
    pdep_gs(e, H_T1, H_T1, OFF(&(<Vcpu*>NULL).guard_bit))
    lea_sib(e, H_T0, H_T0, H_T1, 0, 0, 1)


cdef inline int _alignment(Insn* i, uint32_t width) noexcept nogil:
    """Logarithm of the alignment that #AC demands of an access. Instructions that demand more by themselves give #GP."""
    if i != NULL and width >= 16:
        if is_aligned_vector(i):
            return 0
        if i.enc == ENC_EVEX and i.map == 2 and (i.opcode == 0x8A or i.opcode == 0x8B or i.opcode == 0x63):
            return (2 if i.opcode & 0x80 else 0) + (i.evex_p[1] >> 7)      # VCOMPRESS: element by element
    if width & 15 == 0:
        return 4
    if width & 7 == 0 or width == 10:
        return 3
    if width & 3 == 0:
        return 2
    return 1 if width & 1 == 0 else 0


cdef void add_alignment(T* t, Insn* i, uint32_t width) noexcept nogil:
    cdef Emit* e = &t.e
    cdef int log = _alignment(i, width) if t.align else 0
    if log == 0:
        return
    t.guard |= log << 5
    mov_imm(e, H_T1, (1 << log) - 1)
    pext_rr(e, H_T1, H_T0, H_T1)
    rorx(e, H_T1, H_T1, 4)
    lea_sib(e, H_T0, H_T0, H_T1, 0, 0, 1)


# --- helpers ---------------------------------------------------------------------------------------------------------

cdef int segment_check(Vcpu* v, uint64_t* lin, int bank, uint32_t first, uint32_t width, int access) noexcept nogil:
    cdef int seg = (bank >> 2 & 7) - 1
    cdef uint64_t off = lin[0] & ((<uint64_t>1 << (bank >> 5)) - 1)
    cdef uint64_t ignored = 0
    cdef int r
    lin[0] -= off << 60
    if seg >= 0:
        lin[0] &= 0xFFFFFFFFULL
        r = linear_checked(v, &v.seg[seg], (lin[0] - v.seg[seg].base + first) & 0xFFFFFFFFULL, width, access, &ignored,
                           SS if seg == SEG_SS else GP)
        if r != R_OK:
            return r
    if off and (seg >= 0 or canonical(v, lin[0]) and canonical(v, lin[0] + width - 1)):
        return fault_code(v, AC, 0)
    return R_OK
