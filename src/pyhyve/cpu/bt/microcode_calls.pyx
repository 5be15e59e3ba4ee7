# cython: language_level=3
"""SYSCALL, SYSRET, SYSENTER and SYSEXIT, each as the vendor that CPUID reports has them.

Intel has the first two in 64-bit mode alone, AMD everywhere; AMD has the other two outside of long mode alone. Sources:
Intel SDM vol 2; AMD APM vol 2, "SYSCALL and SYSRET", "SYSENTER and SYSEXIT (Legacy Mode Only)", vol 3.
"""

from libc.stdint cimport uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.microcode_ops cimport *
from pyhyve.cpu.bt.state cimport *


cdef inline void set_flat(Vcpu* v, int seg, uint32_t selector, uint32_t attr) noexcept nogil:
    """These instructions load fixed values, without a look at the descriptor tables."""
    v.seg[seg].selector = selector
    v.seg[seg].base = 0
    v.seg[seg].limit = 0xFFFFFFFFU
    v.seg[seg].attr = attr


cdef int syscall(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint64_t flags
    if not v.efer & EFER_SCE or (not v.amd and not is64(v)):
        return undefined(v)
    flags = get_rflags(v) & ~<uint64_t>F_RF
    v.n.syscalls += 1
    v.gpr[RCX] = next_rip(v, i)
    if v.efer & EFER_LMA:
        v.gpr[R11] = flags
        v.rip = v.lstar if is64(v) else v.cstar
        set_rflags(v, flags & ~v.sfmask)
        set_flat(v, SEG_CS, <uint32_t>(v.star >> 32) & 0xFFFC, 0xA09B)
    else:
        v.rip = v.star & 0xFFFFFFFFULL
        set_rflags(v, flags & ~<uint64_t>(F_VM | F_IF))
        set_flat(v, SEG_CS, <uint32_t>(v.star >> 32) & 0xFFFC, 0xC09B)
    set_flat(v, SEG_SS, (<uint32_t>(v.star >> 32) + 8) & 0xFFFC, 0xC093)
    v.cpl = 0
    update_bank(v)
    return R_OK


cdef int sysret(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint32_t base = <uint32_t>(v.star >> 48)
    if not v.efer & EFER_SCE or (not v.amd and not is64(v)):
        return undefined(v)
    if v.cpl != 0 or not v.cr0 & CR0_PE:
        return gp0(v)
    if i.rex & 8 and is64(v):
        # Intel's faults here, AMD's at the target
        if not v.amd and not canonical(v, v.gpr[RCX]):
            return gp0(v)
        v.rip = v.gpr[RCX]
        set_flat(v, SEG_CS, (base + 16) & 0xFFFF | 3, 0xA0FB)
    else:
        v.rip = v.gpr[RCX] & 0xFFFFFFFFULL
        set_flat(v, SEG_CS, base | 3, 0xC0FB)
    set_flat(v, SEG_SS, (base + 8) & 0xFFFF | 3, 0xC0F3)
    if v.efer & EFER_LMA:
        set_rflags(v, (v.gpr[R11] & 0x3C7FD7) | 2)
    else:
        v.iflag = 1
    v.cpl = 3
    update_bank(v)
    return R_OK


cdef int sysenter(Vcpu* v, Insn* i) noexcept nogil:
    cdef bint lma = (v.efer & EFER_LMA) != 0
    if v.amd and lma:
        return undefined(v)
    if not v.cr0 & CR0_PE or v.sysenter_cs & 0xFFFC == 0:
        return gp0(v)
    v.n.syscalls += 1
    v.sysflags &= ~<uint32_t>(F_VM | F_RF)
    v.iflag = 0
    set_flat(v, SEG_CS, <uint32_t>v.sysenter_cs & 0xFFFC, 0xA09B if lma else 0xC09B)
    set_flat(v, SEG_SS, (<uint32_t>v.sysenter_cs & 0xFFFC) + 8, 0xC093)
    v.gpr[RSP] = v.sysenter_esp if lma else v.sysenter_esp & 0xFFFFFFFFULL
    v.rip = v.sysenter_eip if lma else v.sysenter_eip & 0xFFFFFFFFULL
    v.cpl = 0
    update_bank(v)
    return R_OK


cdef int sysexit(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint32_t base = <uint32_t>v.sysenter_cs & 0xFFFC
    if v.amd and v.efer & EFER_LMA:
        return undefined(v)
    if base == 0 or not v.cr0 & CR0_PE or v.cpl != 0 or v.sysflags & F_VM:
        return gp0(v)
    if i.rex & 8 and is64(v):
        if not canonical(v, v.gpr[RCX]) or not canonical(v, v.gpr[RDX]):
            return gp0(v)
        v.rip = v.gpr[RDX]
        v.gpr[RSP] = v.gpr[RCX]
        set_flat(v, SEG_CS, (base + 32) | 3, 0xA0FB)
        set_flat(v, SEG_SS, (base + 40) | 3, 0xC0F3)
    else:
        v.rip = v.gpr[RDX] & 0xFFFFFFFFULL
        v.gpr[RSP] = v.gpr[RCX] & 0xFFFFFFFFULL
        set_flat(v, SEG_CS, (base + 16) | 3, 0xC0FB)
        set_flat(v, SEG_SS, (base + 24) | 3, 0xC0F3)
    v.cpl = 3
    update_bank(v)
    return R_OK
