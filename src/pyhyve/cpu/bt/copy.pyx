# cython: language_level=3
"""See copy.pxd."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyhyve.cpu.bt.access cimport commit_store, effective_address, host_address
from pyhyve.cpu.bt.context cimport *
from pyhyve.cpu.bt.copy_evex cimport emit_evex, masked_operand
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.kinds cimport is_vector
from pyhyve.cpu.bt.sharing cimport operand, operand_at
from pyhyve.cpu.bt.segments cimport add_alignment, add_segment
from pyhyve.cpu.bt.state cimport ACCESS_READ, ACCESS_WRITE, RAX, Vcpu


cdef inline bint _is_simd_66(Insn* i) noexcept nogil:
    """True if a 66 prefix selects the instruction rather than the operand size."""
    if i.map == 0:
        return False
    if i.map == 1:
        # and fences, CLFLUSH and CLWB; MOVNTI; CMPXCHG8B
        return is_vector(i) or i.opcode == 0xAE or i.opcode == 0xC3 or i.opcode == 0xC7
    if i.map == 2:
        return not (_is_gpr_0f38(i.opcode))
    return True


cdef inline bint _is_gpr_0f38(uint8_t op) noexcept nogil:
    return op == 0xF0 or op == 0xF1


cdef int _load_operand(T* t, int guest, int* used, int* rbx_saved) noexcept nogil:
    """A host register that holds the guest register: itself, or a scratch register loaded with it. `used` has bit 0 for
    r10, bit 1 for r11, bit 2 for the spilled r14."""
    cdef int h
    if not special(guest):
        return host_of(guest)
    if not used[0] & 2:
        used[0] |= 2
        h = H_T1
    elif not used[0] & 1:
        used[0] |= 1
        h = H_T0
    else:
        used[0] |= 4
        rbx_saved[0] = 1
        st_gs(&t.e, 14, OFF(&(<Vcpu*>NULL).tmp1))
        h = 14
    ld_gs(&t.e, h, o_gpr(guest))
    return h


cdef void emit_copy(T* t, int n) noexcept nogil:
    """Emit an instruction of class C_COPY with its operands where they are."""
    cdef Insn* i = &t.insns[n]
    cdef Emit* e = &t.e
    cdef uint64_t next_rip = t.rips[n] + i.length
    cdef int used = 0
    cdef int spill = 0
    cdef int mem = i.attr & A_MEM and not (i.attr & A_NO_ACCESS)
    cdef int reg = i.reg
    cdef int rm = i.rm
    cdef int vvvv = i.vvvv
    cdef int reg_special = -1       # guest registers to be stored back
    cdef int rm_special = -1
    cdef int vvvv_special = -1
    cdef int rex
    cdef int rdi_for_rsp = 0
    cdef int legacy_base = 0        # memory base is rdi, for instructions that cannot have REX
    cdef int high8
    cdef int k
    cdef int base = H_T0
    cdef int emit66
    cdef int opcode = i.opcode
    cdef uint32_t modrm = i.modrm
    cdef int live = t.live[n] | i.flags_read
    cdef int st_reg, st_rm

    t.at_index = -1
    if i.opcode == 0x8D and i.map == 0 and i.enc == ENC_LEGACY:
        _lea(t, n)
        return
    if i.attr & A_NO_ACCESS and i.attr & A_MEM:
        return                                   # (prefetch and the like: C_NOP)
    if i.enc == ENC_EVEX:
        emit_evex(t, n)
        return
    # an 8-bit operand AH-BH: no REX may be emitted
    high8 = 0
    if i.rex == 0 or t.size != 64:
        if (i.attr & A_REG_8 and 4 <= reg <= 7) or (i.attr & A_RM_8 and 4 <= rm <= 7 and (i.mod == 3 or i.attr & A_OPREG)):
            high8 = 1

    if t.size != 64 and i.enc == ENC_VEX and i.map == 1 and opcode == 0x77:
        # VZEROUPPER, VZEROALL: of XMM0-7 alone. vmovaps xmmN, xmmN; vxorps xmmN, xmmN, xmmN
        for k in range(8):
            if i.evex_p[1 if i.bytes[i.opcode_off - 2] != 0xC5 else 0] & 4:
                e2(e, 0xC5, 0xF8 - (k << 3))
                e2(e, 0x57, 0xC0 | k * 9)
            else:
                e2(e, 0xC5, 0xF8)
                e2(e, 0x28, 0xC0 | k * 9)
        return

    # 1. the memory operand's host address in r10
    if mem:
        if i.attr & A_BITOFF:
            # the bit offset selects a word relative to the operand
            if special(reg):
                ld_gs(e, H_T1, o_gpr(reg))
                k = H_T1
            else:
                k = host_of(reg)
            if i.opsize == 8:
                mov_rr(e, H_T1, k)
            elif i.opsize == 4:
                e3(e, 0x4C | (k >> 3), 0x63, 0xC0 | (3 << 3) | (k & 7))        # movsxd r11, r32
            else:
                e2(e, 0x4C | (k >> 3), 0x0F)                                   # movsx r11, r16
                e2(e, 0xBF, 0xC0 | (3 << 3) | (k & 7))
            mov_imm(e, H_T0, 6 if i.opsize == 8 else (5 if i.opsize == 4 else 4))
            # sarx r11, r11, r10
            e3(e, 0xC4, 0x42, 0xAA)
            e2(e, 0xF7, 0xDB)
            st_gs(e, H_T1, OFF(&(<Vcpu*>NULL).tmp1))
            effective_address(t, i, next_rip)
            ld_gs(e, H_T1, OFF(&(<Vcpu*>NULL).tmp1))
            lea_sib(e, H_T0, H_T0, H_T1, 3 if i.opsize == 8 else (2 if i.opsize == 4 else 1), 0, i.addrsize == 8)
            if i.addrsize == 2:
                e2(e, 0x45, 0x0F)                # movzx r10d, r10w
                e2(e, 0xB7, 0xD2)
            add_segment(t, i.seg, ACCESS_READ if i.mem_access == M_READ else ACCESS_WRITE, i.opsize)
            add_alignment(t, i, i.opsize)
            host_address(t, n, ACCESS_READ if i.mem_access == M_READ else ACCESS_WRITE, i.opsize, live)
            # r11 = the offset within the word
            if special(reg):
                ld_gs(e, H_T1, o_gpr(reg))
            else:
                mov_rr(e, H_T1, host_of(reg))
            pext_gs(e, H_T1, H_T1, OFF(&(<Vcpu*>NULL).bit_mask[0]))
            used = 3
            reg = H_T1
            if i.opsize != 8:
                # 16- and 32-bit forms take the offset modulo their width
                if i.opsize == 4:
                    # shlx by 32+27 and back would do as well; pext of the low five bits
                    pext_gs(e, H_T1, H_T1, OFF(&(<Vcpu*>NULL).bit_mask[0]) + 8)
                else:
                    pext_gs(e, H_T1, H_T1, OFF(&(<Vcpu*>NULL).bit_mask[0]) + 16)
        else:
            if i.masked:
                masked_operand(t, n, live)
            elif high8 or i.attr & A_VVVV_GPR:
                operand(t, n, ACCESS_READ if i.mem_access == M_READ else ACCESS_WRITE, i.mem_width, live)
            else:
                operand_at(t, n, ACCESS_READ if i.mem_access == M_READ else ACCESS_WRITE, i.mem_width, live)
            used |= 1

    # 2. registers
    if not (i.attr & A_BITOFF and mem):
        if i.attr & A_REG_GPR and not (high8 and i.attr & A_REG_8):
            if special(reg):
                reg_special = reg
            reg = _load_operand(t, reg, &used, &spill)
            if high8 and reg & 8:
                # MOVZX ESP, AH: RSP's host register cannot be named together with AH
                st_gs(e, H_RDI, OFF(&(<Vcpu*>NULL).tmp1))
                mov_rr(e, H_RDI, reg)
                reg = H_RDI
                rdi_for_rsp = 1
    if i.attr & (A_RM_GPR | A_OPREG) and not mem and not (high8 and i.attr & A_RM_8):
        if special(rm) and rm == reg_special:
            rm = reg
        else:
            if special(rm):
                rm_special = rm
            rm = _load_operand(t, rm, &used, &spill)
    if i.attr & A_VVVV_GPR:
        if special(vvvv) and vvvv == reg_special:
            vvvv = reg
        elif special(vvvv) and vvvv == rm_special:
            vvvv = rm
        else:
            if special(vvvv):
                vvvv_special = vvvv
            vvvv = _load_operand(t, vvvv, &used, &spill)

    # 3. the instruction
    if mem and high8:
        st_gs(e, H_RDI, OFF(&(<Vcpu*>NULL).tmp1))
        mov_rr(e, H_RDI, H_T0)
        base = H_RDI
        legacy_base = 1
    if i.enc == ENC_VEX:
        # always the three-byte form
        k = 0
        k |= 0 if reg & 8 else 0x80
        k |= 0x40
        if mem:
            k |= 0 if base & 8 else 0x20
            if t.at_index >= 8:
                k &= ~0x40
        else:
            k |= 0 if rm & 8 else 0x20
        k |= i.map
        e2(e, 0xC4, k)
        k = i.evex_p[1]
        if _vex_is_c5(i):
            k = i.evex_p[0] & 0x7F               # C5: W = 0
        if i.attr & A_W0:
            k &= 0x7F
        k = (k & 0x87) | ((~vvvv & 15) << 3)
        e2(e, k, opcode)
    else:
        if i.prefixes & P_LOCK:
            e1(e, 0xF0)
        if _is_simd_66(i):
            emit66 = i.prefixes & P_66
        else:
            emit66 = i.opsize == 2
            if t.size == 64:
                emit66 = i.prefixes & P_66
            elif i.map == 2 and i.prefixes & P_F2:
                emit66 = (i.prefixes & P_66 != 0) == (t.size == 32)     # CRC32: the size of its source
        if emit66:
            e1(e, 0x66)
        if i.prefixes & P_F2:
            e1(e, 0xF2)
        if i.prefixes & P_F3:
            e1(e, 0xF3)
        rex = 0
        if t.size == 64:
            rex = i.rex & 0x48                   # W, and whether there was one at all (SPL-DIL)
            if i.rex:
                rex |= 0x40
        if i.attr & A_MOFFS:
            # mov al/eax/rax, [r10] and back: 8A 8B 88 89
            opcode = 0x8A + (opcode & 1) if opcode < 0xA2 else 0x88 + (opcode & 1)
            reg = RAX
            modrm = 0
        elif t.size != 64 and i.map == 0 and 0x40 <= opcode <= 0x4F:
            # INC and DEC of a register: FF /0 and /1
            modrm = 0xC0 | ((opcode & 8))
            rm = rm & 15
            opcode = 0xFF
            reg = 1 if modrm & 8 else 0
            if rm & 8:
                rex |= 0x41
            if rex:
                e1(e, rex)
            e2(e, 0xFF, 0xC0 | (reg << 3) | (rm & 7))
            if rm_special >= 0:
                st_gs(e, rm, o_gpr(rm_special))
            return
        if i.attr & A_OPREG:
            if rm & 8:
                rex |= 0x41
        elif i.attr & (A_MODRM | A_MOFFS):
            if reg & 8:
                rex |= 0x44
            if mem:
                if base & 8:
                    rex |= at_rex(t)
            elif rm & 8:
                rex |= 0x41
        if rex:
            e1(e, rex)
        if i.map >= 1:
            e1(e, 0x0F)
        if i.map == 2:
            e1(e, 0x38)
        elif i.map == 3:
            e1(e, 0x3A)
        if i.attr & A_OPREG:
            e1(e, (opcode & 0xF8) | (rm & 7))
        else:
            e1(e, opcode)
    if i.attr & (A_MODRM | A_MOFFS) and not (i.attr & A_OPREG):
        if mem:
            if base == H_T0:
                at_modrm(t, reg, 0)
            else:
                e1(e, ((reg & 7) << 3) | (base & 7))     # [rdi]
        else:
            e1(e, 0xC0 | ((reg & 7) << 3) | (rm & 7))
    if not (i.attr & A_MOFFS):
        for k in range(i.imm_size):
            e1(e, i.bytes[i.imm_off + k])
        if t.size != 64 and i.enc == ENC_VEX and i.map == 3 and 0x4A <= opcode <= 0x4C:
            (e.p - 1)[0] &= 0x7F                 # the fourth register's high bit counts in 64-bit code alone

    # 4. registers that live in memory go back
    if rdi_for_rsp:
        mov_rr(e, H_GSP, H_RDI)
        ld_gs(e, H_RDI, OFF(&(<Vcpu*>NULL).tmp1))
    if legacy_base:
        ld_gs(e, H_RDI, OFF(&(<Vcpu*>NULL).tmp1))
    if reg_special >= 0:
        st_gs(e, reg, o_gpr(reg_special))
    if rm_special >= 0:
        st_gs(e, rm, o_gpr(rm_special))
    if vvvv_special >= 0:
        st_gs(e, vvvv, o_gpr(vvvv_special))
    if spill:
        ld_gs(e, 14, OFF(&(<Vcpu*>NULL).tmp1))
    if mem and i.mem_access & M_WRITE:
        commit_store(t, n)


cdef inline bint _vex_is_c5(Insn* i) noexcept nogil:
    """C5 P opcode; in C4 P0 P1 opcode, P0 cannot be C5 (no map 5)."""
    return i.bytes[i.opcode_off - 2] == 0xC5


cdef void _lea(T* t, int n) noexcept nogil:
    cdef Insn* i = &t.insns[n]
    cdef Emit* e = &t.e
    cdef int dst = i.reg
    cdef int h
    effective_address(t, i, t.rips[n] + i.length)
    h = host_of(dst)
    if special(dst):
        if i.opsize == 8:
            st_gs(e, H_T0, o_gpr(dst))
        elif i.opsize == 4:
            mov_rr32(e, H_T0, H_T0)
            st_gs(e, H_T0, o_gpr(dst))
        else:
            e1(e, 0x66)                          # mov word [slot], r10w
            op_gs(e, 0x89, H_T0, o_gpr(dst), 0)
        return
    if i.opsize == 8:
        mov_rr(e, h, H_T0)
    elif i.opsize == 4:
        mov_rr32(e, h, H_T0)
    else:
        e1(e, 0x66)
        mov_rr32(e, h, H_T0)
