# cython: language_level=3
"""See copy_evex.pxd. Source: Intel SDM vol 2, "Intel AVX-512 Encoding"."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.access cimport commit_store, effective_address, host_address
from pyhyve.cpu.bt.context cimport *
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.kinds cimport is_aligned_vector
from pyhyve.cpu.bt.segments cimport add_alignment, add_segment
from pyhyve.cpu.bt.sharing cimport operand
from pyhyve.cpu.bt.state cimport ACCESS_READ, ACCESS_WRITE
from pyhyve.cpu.bt.thunks cimport MaskMeta, MissMeta, put_mask


cdef void masked_operand(T* t, int n, int live) noexcept nogil:
    """Checked as a whole, because that nearly always succeeds; a miss looks at the mask."""
    cdef Insn* i = &t.insns[n]
    cdef int access = ACCESS_READ if i.mem_access == M_READ else ACCESS_WRITE
    cdef int masked = i.masked | (i.vvvv if i.masked & MASKED_VECTOR else i.evex_p[2] & 7) << 8
    cdef MissMeta* m
    effective_address(t, i, t.rips[n] + i.length)
    add_segment(t, i.seg, access, i.mem_width)
    if not i.masked & MASKED_VECTOR and not is_aligned_vector(i):
        add_alignment(t, NULL, 1 << (i.masked & 3))          # by its elements
    if not t.slow:
        host_address(t, n, access, i.mem_width, live)
        t.stubs[t.n_stubs - 1].masked = masked
        return
    thunk_rx(&t.e, t.c.masked)
    m = <MissMeta*>t.e.p
    m.rip = t.rips[n]
    m.resume = <int32_t>sizeof(MaskMeta)
    m.width = i.mem_width
    m.access = <uint8_t>access
    m.bank = <uint8_t>(t.bank | t.guard)
    t.guard = 0
    t.e.p += sizeof(MissMeta)
    put_mask(&t.e, masked, 1)


cdef inline int _scratch(T* t, int guest, int scratch) noexcept nogil:
    """A host register that holds the guest's: its own, or `scratch` loaded with it."""
    if not special(guest):
        return host_of(guest)
    ld_gs(&t.e, scratch, o_gpr(guest))
    return scratch


cdef void emit_evex(T* t, int n) noexcept nogil:
    """At most one operand is a general register, so with the memory operand in r10, r11 is free for it."""
    cdef Insn* i = &t.insns[n]
    cdef Emit* e = &t.e
    cdef bint mem = (i.attr & A_MEM) != 0
    cdef int reg = i.reg
    cdef int rm = i.rm
    cdef int live = t.live[n] | i.flags_read
    cdef int store = -1             # guest register that lives in memory
    cdef int k
    if mem:
        if i.masked:
            masked_operand(t, n, live)
        else:
            operand(t, n, ACCESS_READ if i.mem_access == M_READ else ACCESS_WRITE, i.mem_width, live)
        rm = H_T0
    if i.attr & A_REG_GPR:
        store = reg if special(reg) else -1
        reg = _scratch(t, reg, H_T1)
    elif i.attr & A_RM_GPR and not mem:
        store = rm if special(rm) else -1
        rm = _scratch(t, rm, H_T1)
    # R X B R' 0 map; W vvvv 1 pp; z length b V' aaa; the register bits are inverted
    e1(e, 0x62)
    k = i.evex_p[0] & 7
    k |= (0 if reg & 8 else 0x80) | (0 if reg & 16 else 0x10)
    k |= 0 if rm & 8 else 0x20
    k |= 0 if not mem and rm & 16 else 0x40
    e1(e, k)
    k = (i.evex_p[1] & 0x87) | (~i.vvvv & 15) << 3
    if i.attr & A_W0:
        k &= 0x7F
    e1(e, k)
    e1(e, (i.evex_p[2] & 0xF7) | (0 if i.vvvv & 16 else 8))
    e1(e, i.opcode)
    e1(e, (0 if mem else 0xC0) | (reg & 7) << 3 | (rm & 7))
    for k in range(i.imm_size):
        e1(e, i.bytes[i.imm_off + k])
    if store >= 0:
        st_gs(e, H_T1, o_gpr(store))
    if mem and i.mem_access & M_WRITE:
        commit_store(t, n)
