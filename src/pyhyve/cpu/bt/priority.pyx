# cython: language_level=3
"""See priority.pxd.

Generated code looks memory accesses up before it runs the instruction, so it meets a page fault first. The processor
sees x87 exceptions that wait, and operands that are not aligned, before it (found by comparison with the host's).
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyhyve.cpu.bt.codecache cimport MODE_SIZE_SHIFT
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.kinds cimport bt_amd
from pyhyve.cpu.bt.mmu cimport bt_copy, mmu_fetch
from pyhyve.cpu.bt.state cimport *

cdef extern from *:
    """
    static inline unsigned bt_fsw(void) {
        unsigned short fsw;
        __asm__ __volatile__("fnstsw %0" : "=m"(fsw));
        return fsw;
    }
    static inline unsigned bt_mxcsr(void) {
        unsigned mxcsr;
        __asm__ __volatile__("stmxcsr %0" : "=m"(mxcsr));
        return mxcsr;
    }
    """
    uint32_t bt_fsw() noexcept nogil
    uint32_t bt_mxcsr() noexcept nogil

cdef enum:
    FSW_ES = 0x80           # an unmasked exception waits
    MXCSR_MM = 0x20000      # AMD's misaligned SSE mode


cdef inline void _fault(Vcpu* v, uint32_t vector, int has_error) noexcept nogil:
    v.fault_vector = vector
    v.fault_has_error = has_error
    v.fault_error = 0
    v.fault_addr = 0


cdef bint _instruction(Vcpu* v, Insn* i) noexcept nogil:
    """Decode what stands at RIP once more."""
    cdef uint8_t code[16]
    cdef uint64_t page, info
    cdef uint64_t lin = v.rip
    cdef int mode = 64
    cdef uint32_t first
    if not (v.efer & 0x400 and v.seg[SEG_CS].attr & 0x2000):
        mode = 32 if v.cr0 & 1 and not v.sysflags & F_VM and v.seg[SEG_CS].attr & 0x4000 else 16
        lin = (lin + v.seg[SEG_CS].base) & <uint64_t>0xFFFFFFFF
    first = 0x1000 - <uint32_t>(lin & 0xFFF)
    if first > 15:
        first = 15
    i.length = 0
    if mmu_fetch(v, lin, v.bank, &page, &info) == R_OK:
        bt_copy(code, <void*>(page + (lin & 0xFFF)), first)
        if decode(code, first, mode, i) == 0 and mmu_fetch(v, lin + first, v.bank, &page, &info) == R_OK:
            bt_copy(code + first, <void*>page, 15 - first)
            decode(code, 15, mode, i)
    return i.length != 0


cdef bint _aligned(Insn* i) noexcept nogil:
    """The memory operand must be aligned, by its width."""
    cdef uint8_t op = i.opcode
    if i.mem_width < 16 or i.mem_width & (i.mem_width - 1):
        return False
    if i.enc == ENC_LEGACY:
        if i.map == 1:
            return not (op == 0x10 or op == 0x11 or (i.prefixes & P_F3 and (op == 0x6F or op == 0x7F)) or op == 0xF0)
        if i.map == 2 and 0xC8 <= op <= 0xCD or i.map == 3 and op == 0xCC:
            return not bt_amd()                  # SHA
        return i.map == 2 or (i.map == 3 and not 0x60 <= op <= 0x63)
    if i.map == 1:
        return op == 0x28 or op == 0x29 or op == 0x2B or op == 0xE7 or (
            (op == 0x6F or op == 0x7F) and i.prefixes & P_66 and not i.prefixes & (P_F2 | P_F3))
    return i.map == 2 and op == 0x2A and i.prefixes & P_66


cdef bint _waits(Insn* i) noexcept nogil:
    """An x87 or MMX instruction that looks for waiting exceptions."""
    cdef uint8_t op = i.opcode
    if i.enc != ENC_LEGACY:
        return False
    if i.map == 0:
        if not 0xD8 <= op <= 0xDF:
            return False
        # FNSTENV, FNSTCW, FNSAVE, FNSTSW do not
        return not (op == 0xD9 and (i.reg & 7) >= 6) and not (op == 0xDD and (i.reg & 7) >= 6)
    if i.prefixes & (P_66 | P_F2 | P_F3):
        return i.map == 1 and (op == 0x2C or op == 0x2D) and not i.prefixes & (P_F2 | P_F3)
    if i.map == 1:
        return op == 0x2C or op == 0x2D or 0x60 <= op <= 0x7F or op == 0xC4 or 0xD1 <= op <= 0xFE
    if i.map == 2:
        return op <= 0x0B or 0x1C <= op <= 0x1E
    return i.map == 3 and op == 0x0F


cdef void access_fault(Vcpu* v, uint64_t lin, uint32_t width, int access) noexcept nogil:
    cdef Insn i
    cdef uint64_t addr = v.fault_addr
    cdef uint64_t error = v.fault_error
    cdef uint32_t vector = v.fault_vector
    cdef uint32_t has_error = v.fault_has_error
    if vector != 13 and width < 16 and not bt_fsw() & FSW_ES:
        return
    if not _instruction(v, &i):
        return
    v.fault_vector = vector
    v.fault_has_error = has_error
    v.fault_error = error
    v.fault_addr = addr
    if i.cls == C_COPY and i.attr & A_MEM:
        if _waits(&i) and bt_fsw() & FSW_ES:
            _fault(v, 16, 0)
            return
        if lin & (i.mem_width - 1) and _aligned(&i) and not bt_mxcsr() & MXCSR_MM:
            _fault(v, 13, 1)
            return
    if vector != 13 or not v.mode_key & (2 << MODE_SIZE_SHIFT):
        return
    # through SS, an address that is not canonical is #SS
    if (i.cls == C_STACK or i.cls == C_BRANCH) and not (
            i.attr & A_MEM and access == (ACCESS_WRITE if i.opcode == 0x8F else ACCESS_READ)):
        _fault(v, 12, 1)                         # not the operand of PUSH, POP, CALL or JMP, but the stack itself
    elif i.attr & A_MEM and i.seg == SEG_SS:
        _fault(v, 12, 1)
    else:
        _fault(v, 13, 1)
