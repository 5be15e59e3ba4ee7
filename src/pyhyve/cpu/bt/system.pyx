# cython: language_level=3
"""See system.pxd."""

from libc.stdint cimport uint32_t

from pyhyve.cpu.bt.codecache cimport MODE_TSD
from pyhyve.cpu.bt.context cimport *
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.state cimport SEG_GS, Vcpu


cdef bint emit_system(T* t, int n) noexcept nogil:
    """Emit the instruction inline. False: microcode."""
    cdef Insn* i = &t.insns[n]
    cdef Emit* e = &t.e
    if t.slow:
        return False
    if i.map == 0:
        if i.opcode == 0xFA and t.cpl == 0:      # CLI
            st_gs_imm8(e, OFF(&(<Vcpu*>NULL).iflag), 0)
            return True
        if i.opcode == 0xFC or i.opcode == 0xFD:  # CLD, STD
            st_gs_imm8(e, OFF(&(<Vcpu*>NULL).dflag), i.opcode & 1)
            return True
        if i.opcode == 0xFB and t.cpl == 0 and n + 1 < t.n and t.insns[n + 1].cls in (C_COPY, C_NOP, C_STACK, C_BRANCH):
            # STI: the block ends behind the next instruction (a run of pops counts as one), and whatever it goes to
            # polls, so that a wanted interrupt window is seen
            st_gs_imm8(e, OFF(&(<Vcpu*>NULL).iflag), 1)
            e3(e, 0x44, 0x0F, 0xB6)              # movzx r11d, byte [window]
            state_operand(e, H_T1, OFF(&(<Vcpu*>NULL).window), 0)
            op_gs(e, 0x88, H_T1, o_poll() + 6, 0)
            t.next_poll = n + 1
            return True
        return False
    if i.map == 0 and i.opcode == 0x8C and i.mod == 3 and i.opsize != 2 and not special(i.rm) and (i.reg & 7) <= SEG_GS:
        op_gs(e, 0x8B, host_of(i.rm), OFF(&(<Vcpu*>NULL).seg[i.reg & 7].selector), 0)
        return True
    if i.map == 1 and i.opcode == 0x01 and i.modrm == 0xF8 and t.size == 64 and t.cpl == 0:      # SWAPGS
        ld_gs(e, H_T0, OFF(&(<Vcpu*>NULL).kernel_gs_base))
        ld_gs(e, H_T1, o_segbase(SEG_GS))
        st_gs(e, H_T0, o_segbase(SEG_GS))
        st_gs(e, H_T1, OFF(&(<Vcpu*>NULL).kernel_gs_base))
        return True
    if i.map == 1 and i.opcode == 0x31 and not t.mode & MODE_TSD:    # RDTSC
        e2(e, 0x0F, 0x31)
        # r10 = rdx << 32 (rorx), rax = rax + r10 + offset
        e3(e, 0xC4, 0x63, 0xFB)
        e3(e, 0xF0, 0xD2, 32)
        lea_sib(e, H_RAX, H_RAX, H_T0, 0, 0, 1)
        ld_gs(e, H_T0, OFF(&(<Vcpu*>NULL).tsc_offset))
        lea_sib(e, H_RAX, H_RAX, H_T0, 0, 0, 1)
        # rdx = rax >> 32
        e3(e, 0xC4, 0xE3, 0xFB)
        e3(e, 0xF0, 0xD0, 32)
        e2(e, 0x89, 0xD2)                        # mov edx, edx
        e2(e, 0x89, 0xC0)                        # mov eax, eax
        return True
    return False
