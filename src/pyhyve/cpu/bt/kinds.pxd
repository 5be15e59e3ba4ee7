# cython: language_level=3
"""What the translator asks about an instruction beyond its class."""

from libc.stdint cimport uint8_t

from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.state cimport RSP

cdef extern from *:
    """
    /* Whether the processor (the host's, which is what guests are told) is AMD's or Hygon's. */
    static inline int bt_amd(void) {
        static int known;
        if (!known) {
            unsigned a = 0, b, c = 0, d;
            __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
            known = b == 0x68747541 || b == 0x6f677948 ? 2 : 1;
        }
        return known == 2;
    }
    static inline int bt_cmpccxadd(void) {
        static int known;
        if (!known) {
            unsigned a = 7, b, c = 1, d;
            __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
            known = a & 0x80 ? 2 : 1;
        }
        return known == 2;
    }
    """
    bint bt_amd() noexcept nogil
    bint bt_cmpccxadd() noexcept nogil

cdef inline bint is_cmpccxadd(Insn* i) noexcept nogil:
    return i.enc == ENC_VEX and i.map == 2 and 0xE0 <= i.opcode <= 0xEF

cdef inline bint is_odd_nop(Insn* i) noexcept nogil:
    """0F 0D of a register: PREFETCHW, so undefined, where the processor is AMD's; a reserved NOP elsewhere."""
    return i.opcode == 0x0D and i.mod == 3 and i.map == 1 and i.cls == C_NOP and bt_amd()

cdef inline bint is_vector(Insn* i) noexcept nogil:
    """x87, MMX, SSE or AVX: what CR0.TS and CR0.EM forbid."""
    cdef uint8_t op = i.opcode
    if i.enc != ENC_LEGACY:
        if i.map == 2 and 0xF2 <= op <= 0xF7:
            return False
        return not (i.map == 3 and op == 0xF0)
    if i.map == 0:
        return 0xD8 <= op <= 0xDF or op == 0x9B
    if i.map == 1:
        return (0x10 <= op <= 0x17 or 0x28 <= op <= 0x2F or 0x50 <= op <= 0x7F or op == 0xC2 or 0xC4 <= op <= 0xC6
                or (op == 0xAE and i.mod != 3 and 2 <= (i.reg & 7) <= 3) or 0xD0 <= op <= 0xFE)
    if i.map == 2:
        return op < 0xF0 and op != 0x80 and op != 0x81 and op != 0x82
    return True

cdef inline bint is_opmask(Insn* i) noexcept nogil:
    """AVX-512's mask registers, in VEX encoding."""
    if i.enc != ENC_VEX:
        return False
    if i.map == 1:
        return 0x41 <= i.opcode <= 0x4B or 0x90 <= i.opcode <= 0x93 or i.opcode == 0x98 or i.opcode == 0x99
    return i.map == 3 and 0x30 <= i.opcode <= 0x33

cdef inline bint is_aligned_vector(Insn* i) noexcept nogil:
    """Of instructions that access 16 bytes or more: those that demand alignment of themselves (#GP)."""
    cdef uint8_t op = i.opcode
    if i.map == 1 and (op == 0x28 or op == 0x29 or op == 0x2B or op == 0xE7 or op == 0xC7):
        return True                              # MOVAPS, MOVNTPS, MOVNTDQ, CMPXCHG16B
    if i.map == 1 and (op == 0x6F or op == 0x7F):
        return i.prefixes & (P_66 | P_F2 | P_F3) == P_66         # MOVDQA, not MOVDQU
    if i.map == 2 and op == 0x2A:
        return True                              # MOVNTDQA
    if i.enc != ENC_LEGACY:
        return False
    if i.map == 1:
        return not (op == 0x10 or op == 0x11 or op == 0xF0)      # MOVUPS, LDDQU
    if i.map == 2 and 0xC8 <= op <= 0xCD or i.map == 3 and op == 0xCC:
        return not bt_amd()                      # SHA
    return not (i.map == 3 and 0x60 <= op <= 0x63)               # PCMPESTRI and its kin

cdef inline bint is_push_reg(Insn* i) noexcept nogil:
    return i.cls == C_STACK and i.map == 0 and 0x50 <= i.opcode <= 0x57 and i.opsize == 8

cdef inline bint is_pop_reg(Insn* i) noexcept nogil:
    return i.cls == C_STACK and i.map == 0 and 0x58 <= i.opcode <= 0x5F and i.opsize == 8 and i.rm != RSP

cdef inline bint is_jcc(Insn* i) noexcept nogil:
    return i.map == 0 and 0x70 <= i.opcode <= 0x7F or i.map == 1 and 0x80 <= i.opcode <= 0x8F

cdef inline bint is_string_inline(Insn* i) noexcept nogil:
    """MOVS, STOS and LODS neither read nor write flags."""
    return i.opcode == 0xAA or i.opcode == 0xAB or i.opcode == 0xA4 or i.opcode == 0xA5 or (i.opcode & 0xFE) == 0xAC

cdef inline bint ends_block(Insn* i) noexcept nogil:
    """Microcode behind which the block cannot go on: RIP or the mode may be another."""
    cdef int op = i.opcode
    if i.cls == C_BRANCH or i.cls == C_INVALID or i.cls == C_LIMIT:
        return True
    if i.cls != C_SYSTEM:
        return False
    if i.map == 0:
        return op == 0xF4 or op == 0x8E or op == 0xE4 or op == 0xE5 or op == 0xE6 or op == 0xE7 or 0xEC <= op <= 0xEF \
            or op == 0xFB
    if i.map == 1:
        if op == 0x01 and (i.modrm == 0xD0 or i.modrm == 0xEE or i.modrm == 0xEF or i.modrm == 0xF9):
            return False                         # XGETBV, RDPKRU, WRPKRU, RDTSCP
        # MOV CR/DR, LMSW and INVLPG (0F 01), CLTS, WRMSR, SYSCALL and its kin, XSETBV
        return op == 0x00 or op == 0x01 or op == 0x05 or op == 0x06 or op == 0x07 or 0x20 <= op <= 0x23 or op == 0x30 \
            or op == 0x32 or op == 0x34 or op == 0x35 or op == 0xB2 or op == 0xB4 or op == 0xB5 or op == 0xA9 or op == 0xA1
    return False
