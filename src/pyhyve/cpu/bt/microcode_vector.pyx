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
    MXCSR, SAVE_IN_USE, SAVE_STANDARD, bounce, hide_pointers, mxcsr_reserved, xrstor, xsave,
)
from pyhyve.cpu.bt.mmu cimport bt_fill, mmu_probe_read, mmu_probe_write, mmu_read, mmu_write
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


cdef struct Image:
    uint64_t lin                 # where it begins
    uint64_t rest                # where it goes on behind the end of the address size
    uint32_t first               # bytes in front of that


cdef int check_image(Vcpu* v, Insn* i, uint64_t offset, uint32_t size, int access, uint64_t* lin) noexcept nogil:
    cdef int r = linear(v, i.seg, offset, size, access, lin)
    if r != R_OK:
        return r
    return mmu_probe_write(v, lin[0], size, v.bank) if access == ACCESS_WRITE else mmu_probe_read(v, lin[0], size, v.bank)


cdef int find_image(Vcpu* v, Insn* i, uint32_t size, int access, uint32_t head, uint32_t align, Image* m) noexcept nogil:
    """Check an image in the order of AMD's processors: the segment and the alignment of its first `head` bytes, its last
    byte, then the rest; where it need not be aligned, the page of the first bytes comes before the last byte."""
    cdef uint64_t mask = size_mask(i.addrsize)
    cdef uint64_t offset = effective(v, i)
    cdef uint64_t last = (offset + size - 1) & mask
    cdef uint64_t end = 0
    cdef int r = linear(v, i.seg, offset, head, access, &m.lin)
    if r == R_OK:
        r = aligned(v, m.lin, head)
    if r == R_OK and m.lin & (align - 1):
        return gp0(v)
    if r == R_OK and align == 1:
        r = check_image(v, i, offset, head, access, &m.lin)
    if r == R_OK:
        r = check_image(v, i, last, 1, access, &end)
    if r != R_OK:
        return r
    m.first = size if last >= offset else <uint32_t>(mask - offset + 1)
    r = check_image(v, i, offset, m.first, access, &m.lin)
    if r == R_OK and m.first < size:
        r = check_image(v, i, 0, size - m.first, access, &m.rest)
    return r


cdef int read_image(Vcpu* v, Image* m, uint64_t at, uint32_t size) noexcept nogil:
    cdef uint32_t first = m.first if m.first < size else size
    cdef int r = mmu_read(v, m.lin, <void*>at, first, v.bank)
    if r == R_OK and first < size:
        r = mmu_read(v, m.rest, <void*>(at + first), size - first, v.bank)
    return r


cdef int write_image(Vcpu* v, Image* m, uint64_t at, uint32_t size) noexcept nogil:
    cdef uint32_t first = m.first if m.first < size else size
    cdef int r = mmu_write(v, m.lin, <void*>at, first, v.bank)
    if r == R_OK and first < size:
        r = mmu_write(v, m.rest, <void*>(at + first), size - first, v.bank)
    return r


cdef int fxsave(Vcpu* v, Insn* i) noexcept nogil:
    """Bytes from 416 on are the program's own; in 32-bit modes XMM8-15 are not stored either."""
    cdef uint64_t at = bounce(v)
    cdef Image image
    cdef int r
    if v.cr0 & CR0_EM:
        return undefined(v)
    if v.cr0 & CR0_TS:
        return fault(v, NM)
    r = find_image(v, i, 512, ACCESS_WRITE, 4, 16, &image)
    if r != R_OK:
        return r
    bt_fxsave(at)
    hide_pointers(at)
    r = write_image(v, &image, at, 416 if is64(v) else 288)
    return r if r != R_OK else advance(v, i)


cdef int fxrstor(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint64_t at = bounce(v)
    cdef Image image
    cdef int r
    if v.cr0 & CR0_EM:
        return undefined(v)
    if v.cr0 & CR0_TS:
        return fault(v, NM)
    r = find_image(v, i, 512, ACCESS_READ, 4, 16, &image)
    if r != R_OK:
        return r
    bt_fxsave(at)                                 # what the image does not hold stays
    r = read_image(v, &image, at, 512 if is64(v) else 288)
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
    cdef Image image
    cdef int r
    if v.cr0 & (CR0_EM | CR0_TS):
        return fault(v, NM)
    if load and x87_pending():
        return fault(v, MF)
    r = find_image(v, i, size, ACCESS_READ if load else ACCESS_WRITE, 2 if small else 4, 1, &image)
    if r != R_OK:
        return r
    if load:
        r = read_image(v, &image, at, size)
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
    # storing changes the unit: nothing may fault behind it
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
    r = write_image(v, &image, at, size)
    return r if r != R_OK else advance(v, i)


cdef int masked_store(Vcpu* v, Insn* i) noexcept nogil:
    """MASKMOVQ, MASKMOVDQU, VMASKMOVDQU (0F F7): bytes of reg to DS:rDI where rm's bytes have bit 7."""
    cdef uint8_t data[16]
    cdef uint8_t mask[16]
    cdef uint64_t base = v.gpr[RDI] & size_mask(i.addrsize)
    cdef uint64_t lin[2]
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
    for k in range(0, n, 8):
        r = linear(v, i.seg, (base + k) & size_mask(i.addrsize), 8, ACCESS_WRITE, &lin[k >> 3])
        if r == R_OK:
            r = aligned(v, lin[k >> 3], 8)
        if r == R_OK and v.amd:
            # whatever the mask is (the SDM leaves it open)
            r = mmu_probe_write(v, lin[k >> 3], 8, v.bank)
        if r != R_OK:
            return r
    for k in range(n):
        if mask[k] & 0x80:
            r = mmu_probe_write(v, lin[k >> 3] + (k & 7), 1, v.bank)
            if r != R_OK:
                return r
    for k in range(n):
        if mask[k] & 0x80:
            r = mmu_write(v, lin[k >> 3] + (k & 7), &data[k], 1, v.bank)
            if r != R_OK:
                return r
    return advance(v, i)
