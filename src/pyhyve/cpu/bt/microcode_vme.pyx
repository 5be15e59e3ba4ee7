# cython: language_level=3
"""See microcode_vme.pxd."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.microcode_ops cimport *
from pyhyve.cpu.bt.microcode_segments cimport set_real
from pyhyve.cpu.bt.mmu cimport mmu_read, mmu_write, read_u8, read_u16
from pyhyve.cpu.bt.state cimport *


cdef void vme_load(Vcpu* v, uint64_t flags) noexcept nogil:
    cdef uint64_t mask = F_ARITH | F_TF | F_DF | F_NT
    set_rflags(v, (get_rflags(v) & ~(mask | F_VIF)) | (flags & mask) | (F_VIF if flags & F_IF else 0))


cdef int vme_cli_sti(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint64_t needed = CR4_VME if v.sysflags & F_VM else CR4_PVI
    if not v.cr4 & needed or v.cpl != 3:
        return gp0(v)
    if i.opcode == 0xFA:
        v.sysflags &= ~<uint32_t>F_VIF
    elif v.sysflags & F_VIP:
        return gp0(v)
    else:
        v.sysflags |= F_VIF
    return advance(v, i)


cdef int vme_interrupt(Vcpu* v, uint32_t vector, uint64_t rip, bint* done) noexcept nogil:
    """The bitmap's 32 bytes stand before the I/O permission bit map; a clear bit leaves the interrupt to the program."""
    cdef uint16_t io_map = 0
    cdef uint16_t entry[2]
    cdef uint16_t frame[3]
    cdef uint8_t byte = 0
    cdef uint32_t at
    cdef uint64_t flags = get_rflags(v)
    cdef uint64_t sp = (v.gpr[RSP] - 6) & 0xFFFF
    cdef uint64_t lin = 0
    cdef int r
    done[0] = False
    if v.seg[SEG_TR].attr & 8 == 0 or v.seg[SEG_TR].limit < 103:
        return gp0(v)
    r = read_u16(v, v.seg[SEG_TR].base + 102, BANK_KERNEL, &io_map)
    if r != R_OK:
        return r
    at = <uint32_t>io_map - 32 + (vector >> 3)
    if at > v.seg[SEG_TR].limit:
        return gp0(v)
    r = read_u8(v, v.seg[SEG_TR].base + at, BANK_KERNEL, &byte)
    if r != R_OK or byte >> (vector & 7) & 1:
        return r
    r = mmu_read(v, vector * 4, entry, 4, BANK_KERNEL)
    if r != R_OK:
        return r
    if iopl(v) < 3:
        flags = vme_flags(v)
    frame[0] = <uint16_t>rip
    frame[1] = <uint16_t>v.seg[SEG_CS].selector
    frame[2] = <uint16_t>flags
    r = linear(v, SEG_SS, sp, 6, ACCESS_WRITE, &lin)
    if r == R_OK:
        r = mmu_write(v, lin, frame, 6, v.bank)
    if r != R_OK:
        return r
    if iopl(v) < 3:
        v.sysflags &= ~<uint32_t>(F_TF | F_VIF)
    else:
        v.sysflags &= ~<uint32_t>F_TF
        v.iflag = 0
    set_sp(v, sp)
    set_real(v, SEG_CS, entry[1])
    v.rip = entry[0]
    done[0] = True
    return R_OK
