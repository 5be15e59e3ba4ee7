# cython: language_level=3
"""FXSAVE and FXRSTOR, MXCSR, FNSAVE and FNSTENV, MASKMOVQ and MASKMOVDQU. (XSAVE and its kin: microcode_xsave.pyx.)

The guest's x87 and vector state is live in the host's registers while this runs, so the host's own instruction does
the work, on a bounce buffer of ours; images from the guest are checked before, so that it cannot fault. Instruction
and data pointers of the x87 unit would be host addresses: they are cleared in every image.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.hostregs cimport bt_get_mm, bt_get_xmm
from pyhyve.cpu.bt.microcode_ops cimport *
from pyhyve.cpu.bt.microcode_xsave cimport (
    MXCSR, SAVE_IN_USE, SAVE_STANDARD, bounce, hide_pointers, mxcsr_reserved, operand, xrstor, xsave,
)
from pyhyve.cpu.bt.mmu cimport bt_fill, mmu_probe_write, mmu_read, mmu_write
from pyhyve.cpu.bt.state cimport *

cdef extern from *:
    """
    #define BT_AT(insn, at) __asm__ __volatile__(insn " (%0)" : : "r"(at) : "memory")
    static inline void bt_fxsave(uint64_t at) { BT_AT("fxsave64", at); }
    static inline void bt_fxrstor(uint64_t at) { BT_AT("fxrstor64", at); }
    static inline void bt_fnstenv(uint64_t at) { BT_AT("fnstenv", at); }
    static inline void bt_fnstenv16(uint64_t at) { BT_AT("data16 fnstenv", at); }
    static inline void bt_fldenv(uint64_t at) { BT_AT("fldenv", at); }
    static inline void bt_fldenv16(uint64_t at) { BT_AT("data16 fldenv", at); }
    static inline void bt_fnsave(uint64_t at) { BT_AT("fnsave", at); }
    static inline void bt_fnsave16(uint64_t at) { BT_AT("data16 fnsave", at); }
    static inline void bt_frstor(uint64_t at) { BT_AT("frstor", at); }
    static inline void bt_frstor16(uint64_t at) { BT_AT("data16 frstor", at); }
    static inline void bt_ldmxcsr(uint64_t at) { BT_AT("ldmxcsr", at); }
    static inline void bt_stmxcsr(uint64_t at) { BT_AT("stmxcsr", at); }
    static inline uint32_t bt_fnstsw(void) {
        uint16_t status;
        __asm__ __volatile__("fnstsw %0" : "=a"(status));
        return status;
    }
    """
    void bt_fxsave(uint64_t at) noexcept nogil
    void bt_fxrstor(uint64_t at) noexcept nogil
    void bt_fnstenv(uint64_t at) noexcept nogil
    void bt_fnstenv16(uint64_t at) noexcept nogil
    void bt_fldenv(uint64_t at) noexcept nogil
    void bt_fldenv16(uint64_t at) noexcept nogil
    void bt_fnsave(uint64_t at) noexcept nogil
    void bt_fnsave16(uint64_t at) noexcept nogil
    void bt_frstor(uint64_t at) noexcept nogil
    void bt_frstor16(uint64_t at) noexcept nogil
    void bt_ldmxcsr(uint64_t at) noexcept nogil
    void bt_stmxcsr(uint64_t at) noexcept nogil
    uint32_t bt_fnstsw() noexcept nogil

cdef inline bint x87_pending() noexcept nogil:
    """An unmasked x87 exception waits: the next waiting instruction, were it ours, would raise it on the host."""
    return bt_fnstsw() & 0x80 != 0


cdef int fxsave(Vcpu* v, Insn* i) noexcept nogil:
    """Bytes from 416 on are the program's own; in 32-bit modes XMM8-15 are not stored either."""
    cdef uint64_t at = bounce(v)
    cdef uint64_t lin = 0
    cdef int r
    if v.cr0 & CR0_EM:
        return undefined(v)
    if v.cr0 & CR0_TS:
        return fault(v, NM)
    r = operand(v, i, 512, ACCESS_WRITE, 16, 4, &lin)
    if r != R_OK:
        return r
    bt_fxsave(at)
    hide_pointers(at)
    r = mmu_write(v, lin, <void*>at, 416 if is64(v) else 288, v.bank)
    return r if r != R_OK else advance(v, i)


cdef int fxrstor(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint64_t at = bounce(v)
    cdef uint64_t lin = 0
    cdef int r
    if v.cr0 & CR0_EM:
        return undefined(v)
    if v.cr0 & CR0_TS:
        return fault(v, NM)
    r = operand(v, i, 512, ACCESS_READ, 16, 4, &lin)
    if r != R_OK:
        return r
    bt_fxsave(at)                                 # what the image does not hold stays
    r = mmu_read(v, lin, <void*>at, 512 if is64(v) else 288, v.bank)
    if r != R_OK:
        return r
    if (<uint32_t*>(at + MXCSR))[0] & mxcsr_reserved():
        return gp0(v)
    bt_fxrstor(at)
    return advance(v, i)


cdef int mxcsr(Vcpu* v, Insn* i) noexcept nogil:
    """LDMXCSR, STMXCSR, where they are not run natively."""
    cdef uint64_t at = bounce(v)
    cdef int r
    if v.cr0 & CR0_EM or not v.cr4 & CR4_OSFXSR:
        return undefined(v)
    if v.cr0 & CR0_TS:
        return fault(v, NM)
    if i.reg & 7 == 3:
        bt_stmxcsr(at)
        r = write_mem(v, i, 4, <void*>at)
        return r if r != R_OK else advance(v, i)
    r = read_mem(v, i, 4, <void*>at)
    if r != R_OK:
        return r
    if (<uint32_t*>at)[0] & mxcsr_reserved():
        return gp0(v)
    bt_ldmxcsr(at)
    return advance(v, i)


cdef int group15(Vcpu* v, Insn* i) noexcept nogil:
    """0F AE with a memory operand."""
    cdef int op = i.reg & 7
    if op == 0:
        return fxsave(v, i)
    if op == 1:
        return fxrstor(v, i)
    if op == 2 or op == 3:
        return mxcsr(v, i)
    if op == 4 or op == 6:
        return xsave(v, i, SAVE_STANDARD if op == 4 else SAVE_IN_USE)
    if op == 5:
        return xrstor(v, i, False)
    return undefined(v)


cdef int fpu_environment(Vcpu* v, Insn* i) noexcept nogil:
    """FLDENV (D9 /4), FNSTENV (D9 /6), FRSTOR (DD /4), FNSAVE (DD /6), in the 14- and 28-byte layouts of protected
    mode. The image has no pointers, so real mode's layout differs only in an opcode field that is zero too."""
    cdef bint small = operand_size(v, i) == 2
    cdef bint whole = i.opcode == 0xDD
    cdef bint load = i.reg & 7 == 4
    cdef uint32_t head = 14 if small else 28
    cdef uint32_t size = head + (80 if whole else 0)
    cdef uint64_t at = bounce(v)
    cdef uint64_t lin = 0
    cdef int r
    if v.cr0 & (CR0_EM | CR0_TS):
        return fault(v, NM)
    if load and x87_pending():
        return fault(v, MF)
    r = operand(v, i, size, ACCESS_READ if load else ACCESS_WRITE, 1, 2 if small else 4, &lin)
    if r != R_OK:
        return r
    if load:
        r = mmu_read(v, lin, <void*>at, size, v.bank)
        if r != R_OK:
            return r
        if whole:
            if small:
                bt_frstor16(at)
            else:
                bt_frstor(at)
        elif small:
            bt_fldenv16(at)
        else:
            bt_fldenv(at)
        return advance(v, i)
    r = mmu_probe_write(v, lin, size, v.bank)     # storing changes the unit: nothing may fault behind it
    if r != R_OK:
        return r
    if whole:
        if small:
            bt_fnsave16(at)
        else:
            bt_fnsave(at)
    elif small:
        bt_fnstenv16(at)
    else:
        bt_fnstenv(at)
    bt_fill(<void*>(at + (6 if small else 12)), 0, 8 if small else 16)
    r = mmu_write(v, lin, <void*>at, size, v.bank)
    return r if r != R_OK else advance(v, i)


cdef int masked_store(Vcpu* v, Insn* i) noexcept nogil:
    """MASKMOVQ, MASKMOVDQU, VMASKMOVDQU (0F F7): bytes of reg to DS:rDI where rm's bytes have bit 7."""
    cdef uint8_t data[16]
    cdef uint8_t mask[16]
    cdef uint64_t base = v.gpr[RDI] & size_mask(i.addrsize)
    cdef uint64_t lin = 0
    cdef int n = 16 if i.prefixes & P_66 else 8
    cdef int k, r
    if v.cr0 & CR0_EM:
        return undefined(v)
    if v.cr0 & CR0_TS:
        return fault(v, NM)
    if n == 16:
        bt_get_xmm(i.reg & 15, <uint64_t>data)
        bt_get_xmm(i.rm & 15, <uint64_t>mask)
    else:
        if x87_pending():
            return fault(v, MF)
        bt_get_mm(i.reg & 7, <uint64_t>data)
        bt_get_mm(i.rm & 7, <uint64_t>mask)
    r = linear(v, i.seg, base, n, ACCESS_WRITE, &lin)
    if r == R_OK:
        r = aligned(v, lin, 8)
    if r != R_OK:
        return r
    if v.amd:
        # whatever the mask is (the SDM leaves it open)
        r = mmu_probe_write(v, lin, n, v.bank)
        if r != R_OK:
            return r
    for k in range(n):
        if mask[k] & 0x80:
            r = mmu_probe_write(v, lin + k, 1, v.bank)
            if r != R_OK:
                return r
    for k in range(n):
        if mask[k] & 0x80:
            r = mmu_write(v, lin + k, &data[k], 1, v.bank)
            if r != R_OK:
                return r
    return advance(v, i)
