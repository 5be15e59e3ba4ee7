# cython: language_level=3
"""Virtual-8086 mode extensions and protected-mode virtual interrupts: the virtual interrupt flag (RFLAGS.VIF).

Source: Intel SDM vol 3, "8086 Emulation": "Virtual-8086 Mode Extensions", "Protected-Mode Virtual Interrupts".
"""

from libc.stdint cimport uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.microcode_ops cimport CR4_PVI, CR4_VME, gp0, iopl
from pyhyve.cpu.bt.state cimport F_DF, F_IF, F_IOPL, F_NT, F_TF, F_VIF, F_VIP, F_VM, R_OK, Vcpu, get_rflags

cdef inline bint vm_restricted(Vcpu* v) noexcept nogil:
    """Virtual-8086 mode in which PUSHF, POPF, IRET and INT are not the program's own."""
    return v.sysflags & F_VM and iopl(v) < 3

cdef inline int vme_usable(Vcpu* v, uint32_t size) noexcept nogil:
    """In such a program: may an instruction with this operand size work on VIF?"""
    return R_OK if v.cr4 & CR4_VME and size == 2 else gp0(v)

cdef inline uint64_t vme_flags(Vcpu* v) noexcept nogil:
    """FLAGS as the program sees them."""
    return (get_rflags(v) & ~<uint64_t>F_IF) | F_IOPL | (F_IF if v.sysflags & F_VIF else 0)

cdef inline int vme_check(Vcpu* v, uint64_t flags) noexcept nogil:
    """May the program load these FLAGS?"""
    return gp0(v) if flags & F_TF or (flags & F_IF and v.sysflags & F_VIP) else R_OK

cdef void vme_load(Vcpu* v, uint64_t flags) noexcept nogil
# CLI and STI with too little privilege.
cdef int vme_cli_sti(Vcpu* v, Insn* i) noexcept nogil
# INT n in virtual-8086 mode with CR4.VME: *done if the 8086 program's own handler has it.
cdef int vme_interrupt(Vcpu* v, uint32_t vector, uint64_t rip, bint* done) noexcept nogil
