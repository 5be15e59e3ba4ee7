# cython: language_level=3
"""See strings.pxd."""

from libc.stdint cimport int32_t, uint8_t, uint32_t

from pyhyve.cpu.bt.access cimport host_address
from pyhyve.cpu.bt.context cimport *
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.exits cimport flags_restore, flags_save, new_stub
from pyhyve.cpu.bt.state cimport ACCESS_READ, ACCESS_WRITE, TLB_ENTRIES, TlbEntry, Vcpu


cdef void _string_page(T* t, int pointer, int access, int size_log, int32_t keep, uint8_t** sites, int* n) noexcept nogil:
    """r10 = host address of [pointer], all rcx elements within its page, else to a slow exit. Destroys r11, flags."""
    cdef Emit* e = &t.e
    cdef int32_t table = o_tlb() + t.bank * TLB_ENTRIES * <int32_t>sizeof(TlbEntry)
    mov_rr(e, H_T0, pointer)
    e3(e, 0xC4, 0x43, 0x7B)                      # rorx r11d, r10d, 7
    e3(e, 0xF0, 0xDA, 0x07)
    e3(e, 0x41, 0x81, 0xE3)                      # and r11d, 0x7fe0
    e32(e, (TLB_ENTRIES - 1) * sizeof(TlbEntry))
    e1(e, 0x65)                                  # xor r10, gs:[r11 + tag]
    e3(e, 0x4D, 0x33, 0x93)
    e32(e, <uint32_t>(table + (OFF(&(<TlbEntry*>NULL).tag_w) if access == ACCESS_WRITE else 0)))
    e3(e, 0x49, 0x81, 0xFA)                      # cmp r10, 4095
    e32(e, 0xFFF)
    sites[n[0]] = jcc_fwd(e, CC_A)
    n[0] += 1
    e1(e, 0x65)                                  # mov r11, gs:[r11 + hva]
    e3(e, 0x4D, 0x8B, 0x9B)
    e32(e, <uint32_t>(table + OFF(&(<TlbEntry*>NULL).hva)))
    st_gs(e, H_T1, keep)
    lea_sib(e, H_T1, H_T0, H_RCX, size_log, 0, 1)
    e3(e, 0x49, 0x81, 0xFB)                      # cmp r11, 4096
    e32(e, 0x1000)
    sites[n[0]] = jcc_fwd(e, CC_A)
    n[0] += 1
    op_gs(e, 0x03, H_T0, keep, 1)                # add r10, [keep]


cdef bint emit_string(T* t, int n) noexcept nogil:
    """STOS and MOVS, alone or with REP, forward and within a page; what is not so goes to microcode from the cold
    part. LODS too, without REP. False: microcode always."""
    cdef Insn* i = &t.insns[n]
    cdef Emit* e = &t.e
    cdef int op = i.opcode
    cdef int live = t.live[n + 1]
    cdef int rep = i.prefixes & (P_F3 | P_F2)
    cdef int size_log = 0 if i.opsize == 1 else (1 if i.opsize == 2 else (2 if i.opsize == 4 else 3))
    cdef uint8_t* sites[8]
    cdef int n_sites = 0
    cdef int32_t keep1 = OFF(&(<Vcpu*>NULL).tmp1)
    cdef int32_t keep2 = OFF(&(<Vcpu*>NULL).save_rax)
    cdef int k
    cdef Stub* s
    if t.size != 64 or t.slow or t.align or i.addrsize != 8 or i.prefixes & P_SEG or i.map != 0:
        return False
    if not (op == 0xAA or op == 0xAB or op == 0xA4 or op == 0xA5 or ((op & 0xFE) == 0xAC and not rep)):
        return False
    # With REP nothing below can fault, so live flags may stand in tmp0; alone, they stay where they are.
    if live and rep:
        flags_save(t)
    if rep or not live:
        e1(e, 0x80)                              # cmp byte [dflag], 0
        state_operand(e, 7, OFF(&(<Vcpu*>NULL).dflag), 1)
        e1(e, 0)
        sites[n_sites] = jcc_fwd(e, CC_NE)
    else:
        mov_rr(e, H_T1, H_RCX)
        e2(e, 0x0F, 0xB6)                        # movzx ecx, byte [dflag]
        state_operand(e, H_RCX, OFF(&(<Vcpu*>NULL).dflag), 0)
        e2(e, 0xE3, 8)                           # jrcxz over the next two
        mov_rr(e, H_RCX, H_T1)
        sites[n_sites] = jmp_fwd(e)
        mov_rr(e, H_RCX, H_T1)
    n_sites += 1
    if rep:
        e3(e, 0x48, 0x81, 0xF9)                  # cmp rcx, a page's worth
        e32(e, 0x1000 >> size_log)
        sites[n_sites] = jcc_fwd(e, CC_A)
        n_sites += 1
        if op == 0xA4 or op == 0xA5:
            _string_page(t, H_RSI, ACCESS_READ, size_log, keep1, sites, &n_sites)
            st_gs(e, H_T0, keep1)
            _string_page(t, H_RDI, ACCESS_WRITE, size_log, keep2, sites, &n_sites)
            lea_sib(e, H_T1, H_RSI, H_RCX, size_log, 0, 1)
            st_gs(e, H_T1, keep2)
            lea_sib(e, H_T1, H_RDI, H_RCX, size_log, 0, 1)
            ld_gs(e, H_RSI, keep1)
            mov_rr(e, H_RDI, H_T0)
        else:
            _string_page(t, H_RDI, ACCESS_WRITE, size_log, keep1, sites, &n_sites)
            lea_sib(e, H_T1, H_RDI, H_RCX, size_log, 0, 1)
            mov_rr(e, H_RDI, H_T0)
        if i.opsize == 2:
            e1(e, 0x66)
        e1(e, 0xF3)
        if i.opsize == 8:
            e1(e, 0x48)
        e1(e, op)
        mov_rr(e, H_RDI, H_T1)
        if op == 0xA4 or op == 0xA5:
            ld_gs(e, H_RSI, keep2)
    else:
        if op >= 0xA4 and op <= 0xA5 or op >= 0xAC:
            mov_rr(e, H_T0, H_RSI)
            host_address(t, n, ACCESS_READ, i.opsize, live)
        if op == 0xAC or op == 0xAD:
            if i.opsize == 2:
                e1(e, 0x66)
            op_mem(e, 0x8A if i.opsize == 1 else 0x8B, H_RAX, H_T0, 0, 1 if i.opsize == 8 else 0)
            lea_rd(e, H_RSI, H_RSI, i.opsize, 1)
        else:
            if op <= 0xA5:
                if i.opsize == 1:
                    e2(e, 0x45, 0x0F)            # movzx r11d, byte [r10]
                    e2(e, 0xB6, 0x1A)
                elif i.opsize == 2:
                    e2(e, 0x45, 0x0F)
                    e2(e, 0xB7, 0x1A)
                else:
                    op_mem(e, 0x8B, H_T1, H_T0, 0, 1 if i.opsize == 8 else 0)
                st_gs(e, H_T1, keep1)
            mov_rr(e, H_T0, H_RDI)
            host_address(t, n, ACCESS_WRITE, i.opsize, live)
            if op <= 0xA5:
                ld_gs(e, H_T1, keep1)
                k = H_T1
            else:
                k = H_RAX
            if i.opsize == 2:
                e1(e, 0x66)
            op_mem(e, 0x88 if i.opsize == 1 else 0x89, k, H_T0, 0, 1 if i.opsize == 8 else 0)
            lea_rd(e, H_RDI, H_RDI, i.opsize, 1)
            if op <= 0xA5:
                lea_rd(e, H_RSI, H_RSI, i.opsize, 1)
    if live and rep:
        flags_restore(t)
    for k in range(n_sites):
        s = new_stub(t, K_MICRO, sites[k])
        s.index = n
        s.resume = e.p
        s.poll = live and rep
    return True
