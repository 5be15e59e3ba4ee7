# cython: language_level=3
"""The few host encodings that the translator makes itself.

Register numbers are the hardware's. `GS` in a name means an operand that is a field of the vCPU structure.
None of the moves touches flags. Source: Intel SDM vol 2, "Instruction Format" and the instructions' own pages.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    H_RAX = 0
    H_RCX = 1
    H_RDX = 2
    H_RBX = 3
    H_RSP = 4               # the host's stack
    H_RBP = 5
    H_RSI = 6
    H_RDI = 7
    H_T0 = 10               # scratch: linear, then host address
    H_T1 = 11               # scratch
    H_GSP = 15              # the guest's RSP
    CC_E = 4
    CC_NE = 5
    CC_A = 7

ctypedef struct Emit:
    uint8_t* p              # where the next byte goes (writable view)
    int64_t delta           # executable view minus writable view
    uint64_t state          # the vCPU structure

cdef inline void e1(Emit* e, uint32_t b) noexcept nogil:
    e.p[0] = <uint8_t>b
    e.p += 1

cdef inline void e2(Emit* e, uint32_t b0, uint32_t b1) noexcept nogil:
    e.p[0] = <uint8_t>b0
    e.p[1] = <uint8_t>b1
    e.p += 2

cdef inline void e3(Emit* e, uint32_t b0, uint32_t b1, uint32_t b2) noexcept nogil:
    e.p[0] = <uint8_t>b0
    e.p[1] = <uint8_t>b1
    e.p[2] = <uint8_t>b2
    e.p += 3

cdef inline void e16(Emit* e, uint32_t value) noexcept nogil:
    (<uint16_t*>e.p)[0] = <uint16_t>value
    e.p += 2

cdef inline void e32(Emit* e, uint32_t value) noexcept nogil:
    (<uint32_t*>e.p)[0] = value
    e.p += 4

cdef inline void e64(Emit* e, uint64_t value) noexcept nogil:
    (<uint64_t*>e.p)[0] = value
    e.p += 8

cdef inline bint fits32(uint64_t value) noexcept nogil:
    """True if the value is a sign-extended 32-bit one."""
    return <int64_t>value == <int64_t><int32_t>value

# A field of the structure is addressed off RIP: unlike one at gs:[offset], the host's processor then forwards what was
# stored to what is loaded without delay (5 cycles less, measured on Zen 4). The structure lies behind the code. Tables in
# it are at gs:[index + offset].

cdef inline void state_operand(Emit* e, int reg, int32_t off, int behind) noexcept nogil:
    """ModRM and what follows it: the field at `off`, and ModRM.reg; `behind`: bytes of immediate to come."""
    e1(e, 0x05 | (reg & 7) << 3)
    e32(e, <uint32_t><int32_t>(<int64_t>(e.state + <uint64_t><int64_t>off) - <int64_t>(e.p + e.delta + 4 + behind)))

cdef inline void op_gs(Emit* e, uint32_t op, int reg, int32_t off, int w) noexcept nogil:
    """op reg, field (or the other way round, by the opcode); w: 1 for 64 bits."""
    cdef uint32_t rex = 0x40 | (w << 3) | ((reg & 8) >> 1)
    if rex != 0x40:
        e1(e, rex)
    e1(e, op)
    state_operand(e, reg, off, 0)

cdef inline void ld_gs(Emit* e, int reg, int32_t off) noexcept nogil:
    op_gs(e, 0x8B, reg, off, 1)

cdef inline void st_gs(Emit* e, int reg, int32_t off) noexcept nogil:
    op_gs(e, 0x89, reg, off, 1)

cdef inline void st_gs_imm8(Emit* e, int32_t off, uint32_t value) noexcept nogil:
    """mov byte field, value"""
    e1(e, 0xC6)
    state_operand(e, 0, off, 1)
    e1(e, value)

cdef inline void mov_rr(Emit* e, int dst, int src) noexcept nogil:
    e3(e, 0x48 | ((src & 8) >> 1) | (dst >> 3), 0x89, 0xC0 | ((src & 7) << 3) | (dst & 7))

cdef inline void mov_rr32(Emit* e, int dst, int src) noexcept nogil:
    e3(e, 0x40 | ((src & 8) >> 1) | (dst >> 3), 0x89, 0xC0 | ((src & 7) << 3) | (dst & 7))

cdef inline void mov_imm(Emit* e, int reg, uint64_t value) noexcept nogil:
    """The shortest mov that sets all 64 bits."""
    if value <= <uint64_t>0xFFFFFFFF:
        if reg & 8:
            e1(e, 0x41)
        e1(e, 0xB8 | (reg & 7))
        e32(e, <uint32_t>value)
    elif fits32(value):
        e3(e, 0x48 | (reg >> 3), 0xC7, 0xC0 | (reg & 7))
        e32(e, <uint32_t>value)
    else:
        e2(e, 0x48 | (reg >> 3), 0xB8 | (reg & 7))
        e64(e, value)

cdef inline void op_mem(Emit* e, uint32_t op, int reg, int base, int32_t disp, int w) noexcept nogil:
    """op reg, [base + disp]"""
    cdef uint32_t rex = 0x40 | (w << 3) | ((reg & 8) >> 1) | (base >> 3)
    cdef uint32_t field = (reg & 7) << 3
    if rex != 0x40:
        e1(e, rex)
    e1(e, op)
    if disp == 0 and (base & 7) != 5:
        e1(e, field | (base & 7))
        if (base & 7) == 4:
            e1(e, 0x24)
    elif -128 <= disp <= 127:
        e1(e, 0x40 | field | (base & 7))
        if (base & 7) == 4:
            e1(e, 0x24)
        e1(e, <uint32_t>disp & 0xFF)
    else:
        e1(e, 0x80 | field | (base & 7))
        if (base & 7) == 4:
            e1(e, 0x24)
        e32(e, <uint32_t>disp)

cdef inline void lea_rd(Emit* e, int dst, int base, int32_t disp, int w) noexcept nogil:
    op_mem(e, 0x8D, dst, base, disp, w)

cdef inline void lea_sib(Emit* e, int dst, int base, int index, int scale_log, int32_t disp, int w) noexcept nogil:
    """lea dst, [base + index << scale_log + disp]; base -1: none."""
    cdef uint32_t rex = 0x40 | (w << 3) | ((dst & 8) >> 1) | ((index & 8) >> 2)
    cdef uint32_t field = (dst & 7) << 3
    if base >= 0:
        rex |= base >> 3
    if rex != 0x40:
        e1(e, rex)
    e1(e, 0x8D)
    if base < 0:
        e2(e, field | 4, (scale_log << 6) | ((index & 7) << 3) | 5)
        e32(e, <uint32_t>disp)
    elif disp == 0 and (base & 7) != 5:
        e2(e, field | 4, (scale_log << 6) | ((index & 7) << 3) | (base & 7))
    elif -128 <= disp <= 127:
        e3(e, 0x44 | field, (scale_log << 6) | ((index & 7) << 3) | (base & 7), <uint32_t>disp & 0xFF)
    else:
        e2(e, 0x84 | field, (scale_log << 6) | ((index & 7) << 3) | (base & 7))
        e32(e, <uint32_t>disp)

cdef inline void pext_gs(Emit* e, int dst, int src, int32_t off) noexcept nogil:
    """pext dst, src, field (64 bits; leaves flags alone)"""
    e3(e, 0xC4, 0x62 | (0 if dst & 8 else 0x80), 0x82 | ((~src & 15) << 3))
    e1(e, 0xF5)
    state_operand(e, dst, off, 0)

cdef inline void pdep_gs(Emit* e, int dst, int src, int32_t off) noexcept nogil:
    """pdep dst, src, field (64 bits; leaves flags alone)"""
    e3(e, 0xC4, 0x62 | (0 if dst & 8 else 0x80), 0x83 | ((~src & 15) << 3))
    e1(e, 0xF5)
    state_operand(e, dst, off, 0)

cdef inline void pext_rr(Emit* e, int dst, int src, int mask) noexcept nogil:
    """pext dst, src, mask (64 bits; leaves flags alone)"""
    e3(e, 0xC4, 0x42 | (0 if dst & 8 else 0x80) | (0 if mask & 8 else 0x20), 0x82 | ((~src & 15) << 3))
    e2(e, 0xF5, 0xC0 | ((dst & 7) << 3) | (mask & 7))

cdef inline void rorx(Emit* e, int dst, int src, int by) noexcept nogil:
    """rorx dst, src, by (64 bits; leaves flags alone)"""
    e3(e, 0xC4, 0x43 | (0 if dst & 8 else 0x80) | (0 if src & 8 else 0x20), 0xFB)
    e3(e, 0xF0, 0xC0 | ((dst & 7) << 3) | (src & 7), by)

cdef inline void rel32_to(uint8_t* site, uint8_t* target) noexcept nogil:
    """Make the rel32 at `site` reach `target` (both in the same view)."""
    (<int32_t*>site)[0] = <int32_t>(target - (site + 4))

cdef inline uint8_t* jmp_fwd(Emit* e) noexcept nogil:
    """jmp rel32 with the target to come; returns the place of the rel32."""
    e1(e, 0xE9)
    e32(e, 0)
    return e.p - 4

cdef inline uint8_t* jcc_fwd(Emit* e, int cc) noexcept nogil:
    e2(e, 0x0F, 0x80 | cc)
    e32(e, 0)
    return e.p - 4

cdef inline void jmp_rx(Emit* e, uint8_t* target) noexcept nogil:
    """jmp to an executable-view address."""
    e1(e, 0xE9)
    e32(e, <uint32_t><int32_t>(target - (e.p + e.delta + 4)))

cdef inline void thunk_rx(Emit* e, uint8_t* target) noexcept nogil:
    """To a thunk, r11 = the address behind this (a CALL would not be balanced for the host's return predictor)."""
    e3(e, 0x4C, 0x8D, 0x1D)                      # lea r11, [rip + 5]
    e32(e, 5)
    e1(e, 0xE9)
    e32(e, <uint32_t><int32_t>(target - (e.p + e.delta + 4)))

cdef inline void jmp_gs(Emit* e, int32_t off) noexcept nogil:
    """jmp field"""
    e1(e, 0xFF)
    state_operand(e, 4, off, 0)
