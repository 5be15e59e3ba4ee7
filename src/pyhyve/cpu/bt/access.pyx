# cython: language_level=3
"""See access.pxd. The two forms of the check, with flags dead and live, are explained in translate.pyx."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.context cimport *
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.exits cimport new_stub
from pyhyve.cpu.bt.state cimport ACCESS_WRITE, TLB_ENTRIES, TlbEntry, Vcpu
from pyhyve.cpu.bt.thunks cimport ADDEND, MissMeta


cdef void effective_address(T* t, Insn* i, uint64_t next_rip) noexcept nogil:
    """r10 = the memory operand's offset in its segment. Keeps flags and all guest registers; destroys r11."""
    cdef Emit* e = &t.e
    cdef int base = i.base
    cdef int index = i.index
    cdef int scale_log = 0
    cdef int w = 1 if i.addrsize == 8 else 0
    cdef uint64_t value
    cdef int64_t disp = i.disp
    if i.scale == 2:
        scale_log = 1
    elif i.scale == 4:
        scale_log = 2
    elif i.scale == 8:
        scale_log = 3
    if i.attr & A_MOFFS:
        base = REG_NONE
        index = REG_NONE
    if base == REG_RIP:
        value = next_rip + <uint64_t>disp
        if i.addrsize == 4:
            value &= <uint64_t>0xFFFFFFFF
        mov_imm(e, H_T0, value)
    elif base == REG_NONE and index == REG_NONE:
        value = <uint64_t>disp
        if i.addrsize == 4:
            value &= <uint64_t>0xFFFFFFFF
        elif i.addrsize == 2:
            value &= 0xFFFF
        mov_imm(e, H_T0, value)
    else:
        if base != REG_NONE:
            if special(base):
                ld_gs(e, H_T0, o_gpr(base))
                base = H_T0
            else:
                base = host_of(base)
        else:
            base = -1
        if index != REG_NONE:
            if special(index):
                ld_gs(e, H_T1, o_gpr(index))
                index = H_T1
            else:
                index = host_of(index)
            lea_sib(e, H_T0, base, index, scale_log, <int32_t>disp, w)
        elif disp == 0 and base == H_T0 and w:
            pass
        elif disp == 0 and w:
            mov_rr(e, H_T0, base)
        else:
            lea_rd(e, H_T0, base, <int32_t>disp, w)
        if i.addrsize == 2:
            e2(e, 0x45, 0x0F)                    # movzx r10d, r10w
            e2(e, 0xB7, 0xD2)


cdef void host_address(T* t, int i, int access, uint32_t width, int live) noexcept nogil:
    """r10: linear address to host address (with ADDEND: to what is to be added to the linear one), `width` bytes readable
    (or writable) there. Keeps guest registers, and flags where `live`; destroys r11."""
    cdef Emit* e = &t.e
    cdef Stub* s
    cdef MissMeta* m
    cdef int32_t table = o_tlb() + t.bank * TLB_ENTRIES * <int32_t>sizeof(TlbEntry)
    cdef int32_t tag = table
    cdef int32_t hva = table + OFF(&(<TlbEntry*>NULL).hva)
    cdef uint8_t* site
    if access & ACCESS_WRITE:
        tag += OFF(&(<TlbEntry*>NULL).tag_w)
    if width == 0:
        width = 1
    if t.slow:
        thunk_rx(e, t.c.slow)
        m = <MissMeta*>e.p
        m.rip = t.rips[i]
        m.resume = <int32_t>sizeof(MissMeta)
        m.width = <uint16_t>width
        m.access = <uint8_t>access
        m.bank = <uint8_t>(t.bank | t.guard)
        t.guard = 0
        e.p += sizeof(MissMeta)
        return
    if not live:
        e3(e, 0xC4, 0x43, 0x7B)                      # rorx r11d, r10d, 7
        e3(e, 0xF0, 0xDA, 0x07)
        e3(e, 0x41, 0x81, 0xE3)                  # and r11d, 0x7fe0
        e32(e, (TLB_ENTRIES - 1) * sizeof(TlbEntry))
        e1(e, 0x65)                              # xor r10, gs:[r11 + tag]
        e3(e, 0x4D, 0x33, 0x93)
        e32(e, <uint32_t>tag)
        e3(e, 0x49, 0x81, 0xFA)                  # cmp r10, 4096 - width
        e32(e, 0x1000 - width)
        site = jcc_fwd(e, CC_A)
        e1(e, 0x65)
        if access & ADDEND:
            e3(e, 0x4D, 0x8B, 0x93)              # mov r10, gs:[r11 + addend]
            e32(e, <uint32_t>(table + OFF(&(<TlbEntry*>NULL).addend)))
        else:
            e3(e, 0x4D, 0x03, 0x93)              # add r10, gs:[r11 + hva]
            e32(e, <uint32_t>hva)
        s = new_stub(t, K_MISS, site)
    else:
        st_gs(e, H_RCX, OFF(&(<Vcpu*>NULL).save_rcx))
        pext_gs(e, H_RCX, H_T0, OFF(&(<Vcpu*>NULL).tlb_mask))
        lea_sib(e, H_RCX, -1, H_RCX, 2, 0, 1)    # lea rcx, [rcx * 4]
        e1(e, 0x65)                              # mov r11, gs:[rcx * 8 + tag]
        e2(e, 0x4C, 0x8B)
        e2(e, 0x1C, 0xCD)
        e32(e, <uint32_t>tag)
        e3(e, 0x49, 0xF7, 0xD3)                  # not r11
        lea_sib(e, H_T0, H_T0, H_T1, 0, 1, 1)    # lea r10, [r10 + r11 + 1]: the offset in the page
        lea_rd(e, H_T1, H_T0, <int32_t>width - 1, 1)
        pext_gs(e, H_T1, H_T1, OFF(&(<Vcpu*>NULL).page_mask))
        e3(e, 0x4C, 0x87, 0xD9)                  # xchg rcx, r11
        e2(e, 0xE3, 0x05)                        # jrcxz hit
        site = jmp_fwd(e)
        ld_gs(e, H_RCX, OFF(&(<Vcpu*>NULL).save_rcx))
        e1(e, 0x65)
        e2(e, 0x4E, 0x8B)
        if access & ADDEND:
            e2(e, 0x14, 0xDD)                    # mov r10, [r11 * 8 + addend]
            e32(e, <uint32_t>(table + OFF(&(<TlbEntry*>NULL).addend)))
        else:
            e2(e, 0x1C, 0xDD)                    # mov r11, [r11 * 8 + hva]
            e32(e, <uint32_t>hva)
            lea_sib(e, H_T0, H_T0, H_T1, 0, 0, 1)
        s = new_stub(t, K_MISS_LIVE, site)
    s.resume = e.p
    s.rip = t.rips[i]
    s.width = width
    s.access = access
    s.off = tag
    s.index = t.bank | t.guard
    t.guard = 0


cdef void commit_store(T* t, int i) noexcept nogil:
    """In a slow block, behind a store: carry a bounced store out."""
    cdef MissMeta* m
    if not t.slow:
        return
    thunk_rx(&t.e, t.c.commit)
    m = <MissMeta*>t.e.p
    m.rip = t.rips[i]
    m.resume = <int32_t>sizeof(MissMeta)
    m.width = 0
    m.access = ACCESS_WRITE
    m.bank = <uint8_t>t.bank
    t.e.p += sizeof(MissMeta)
