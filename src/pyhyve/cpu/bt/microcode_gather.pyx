# cython: language_level=3
"""See microcode_gather.pxd.

Elements are done from the lowest on, and each clears its mask: what a fault or an exit leaves goes on there. The
registers are the host's own, so they are stored, changed in memory, and loaded again. Source: Intel SDM vol 2,
"VPGATHERDD/VPGATHERQD" and their kin, "VPSCATTERDD/VPSCATTERDQ/VPSCATTERQD/VPSCATTERQQ"; vol 1, "Vector SIB (VSIB)
Memory Addressing".
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.hostregs cimport bt_get_k, bt_get_ymm, bt_get_zmm, bt_set_k, bt_set_ymm, bt_set_zmm
from pyhyve.cpu.bt.microcode_ops cimport *
from pyhyve.cpu.bt.mmu cimport bt_fill, mmu_read, mmu_write
from pyhyve.cpu.bt.state cimport *


cdef int element(Vcpu* v, Insn* i, uint8_t* index, uint32_t k, uint32_t size, int access, uint64_t* lin) noexcept nogil:
    """The linear address of element k."""
    cdef uint64_t offset = <uint64_t>i.disp
    if i.base != REG_NONE:
        offset += v.gpr[i.base]
    if i.opcode & 1:
        offset += (<uint64_t*>index)[k] * i.scale
    else:
        offset += <uint64_t><int64_t>(<int32_t*>index)[k] * i.scale
    return linear(v, i.seg, offset & size_mask(i.addrsize), size, access, lin)


cdef int gather(Vcpu* v, Insn* i) noexcept nogil:
    """VPGATHERDD/DQ/QD/QQ, VGATHERDPS/DPD/QPS/QPD (VEX, 0F 38 90-93): elements of reg from base + index * scale where
    vvvv's elements have the sign bit."""
    cdef uint8_t dest[32]
    cdef uint8_t mask[32]
    cdef uint8_t index[32]
    cdef uint32_t size = 8 if i.rex & 8 else 4
    cdef uint32_t length = 32 if i.evex_p[1] & 4 else 16
    cdef uint32_t n = length / (8 if i.rex & 8 or i.opcode & 1 else 4)
    cdef uint64_t lin = 0
    cdef uint32_t k, done
    cdef int r = R_OK
    if not protected(v) or not v.cr4 & CR4_OSXSAVE or v.xcr0 & 6 != 6 or i.prefixes & P_66 == 0:
        return undefined(v)
    if i.reg == i.index or i.reg == i.vvvv or i.index == i.vvvv:
        return undefined(v)
    if v.cr0 & CR0_TS:
        return fault(v, NM)
    bt_get_ymm(i.reg & 15, <uint64_t>dest)
    bt_get_ymm(i.vvvv & 15, <uint64_t>mask)
    bt_get_ymm(i.index & 15, <uint64_t>index)
    for k in range(n):
        if mask[k * size + size - 1] & 0x80:
            r = element(v, i, index, k, size, ACCESS_READ, &lin)
            if r == R_OK:
                r = mmu_read(v, lin, dest + k * size, size, v.bank)
            if r != R_OK:
                break
        bt_fill(mask + k * size, 0, size)
    if r == R_OK:
        done = n * size
        bt_fill(dest + done, 0, 32 - done)
        bt_fill(mask, 0, 32)
    if r == R_OK or not v.vector_state & 0xE0:
        bt_set_ymm(i.reg & 15, <uint64_t>dest)
        bt_set_ymm(i.vvvv & 15, <uint64_t>mask)
    else:
        # only a gather that is done clears what is above
        _set_low(i.reg & 15, dest)
        _set_low(i.vvvv & 15, mask)
    return r if r != R_OK else advance(v, i)


cdef void _set_low(int reg, uint8_t* low) noexcept nogil:
    """Set bits 0 to 255 of a ZMM register."""
    cdef uint8_t whole[64]
    cdef int k
    bt_get_zmm(reg, <uint64_t>whole)
    for k in range(32):
        whole[k] = low[k]
    bt_set_zmm(reg, <uint64_t>whole)


cdef inline uint32_t elements(Insn* i) noexcept nogil:
    """Elements of an EVEX gather or scatter: as many as the wider of data and index leave."""
    return (16 << (i.evex_p[2] >> 5 & 3)) / (8 if i.rex & 8 or i.opcode & 1 else 4)


cdef int gather_evex(Vcpu* v, Insn* i) noexcept nogil:
    """The same in EVEX encoding: an opmask register selects, whose bits are cleared one by one. (What must differ and
    which mask is none, the decoder has checked.)"""
    cdef uint8_t dest[64]
    cdef uint8_t index[64]
    cdef uint32_t size = 8 if i.rex & 8 else 4
    cdef uint32_t n = elements(i)
    cdef uint64_t mask = 0
    cdef uint64_t lin = 0
    cdef uint32_t k
    cdef int r = R_OK
    if v.cr0 & CR0_TS:
        return fault(v, NM)
    bt_get_k(i.evex_p[2] & 7, <uint64_t>&mask)
    bt_get_zmm(i.reg, <uint64_t>dest)
    bt_get_zmm(i.index, <uint64_t>index)
    for k in range(n):
        if mask >> k & 1:
            r = element(v, i, index, k, size, ACCESS_READ, &lin)
            if r == R_OK:
                r = mmu_read(v, lin, dest + k * size, size, v.bank)
            if r != R_OK:
                break
            mask &= ~(<uint64_t>1 << k)
    if r == R_OK:
        bt_fill(dest + n * size, 0, 64 - n * size)
        mask = 0
    bt_set_zmm(i.reg, <uint64_t>dest)
    bt_set_k(i.evex_p[2] & 7, <uint64_t>&mask)
    return r if r != R_OK else advance(v, i)


cdef int scatter(Vcpu* v, Insn* i) noexcept nogil:
    """VPSCATTERDD/DQ/QD/QQ, VSCATTERDPS/DPD/QPS/QPD (EVEX, 0F 38 A0-A3). Elements that overlap are stored in order."""
    cdef uint8_t data[64]
    cdef uint8_t index[64]
    cdef uint32_t size = 8 if i.rex & 8 else 4
    cdef uint32_t n = elements(i)
    cdef uint64_t mask = 0
    cdef uint64_t lin = 0
    cdef uint32_t k
    cdef int r = R_OK
    if v.cr0 & CR0_TS:
        return fault(v, NM)
    bt_get_k(i.evex_p[2] & 7, <uint64_t>&mask)
    bt_get_zmm(i.reg, <uint64_t>data)
    bt_get_zmm(i.index, <uint64_t>index)
    for k in range(n):
        if mask >> k & 1:
            r = element(v, i, index, k, size, ACCESS_WRITE, &lin)
            if r == R_OK:
                r = mmu_write(v, lin, data + k * size, size, v.bank)
            if r != R_OK:
                break
            mask &= ~(<uint64_t>1 << k)
    if r == R_OK:
        mask = 0
    bt_set_k(i.evex_p[2] & 7, <uint64_t>&mask)
    return r if r != R_OK else advance(v, i)
