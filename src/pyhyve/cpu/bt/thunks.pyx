# cython: language_level=3
"""See thunks.pxd. A thunk saves the guest's registers to the vCPU structure, calls or leaves, and loads them again."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from pyhyve.cpu.bt.codecache cimport Cache
from pyhyve.cpu.bt.context cimport OFF, o_gpr, o_ibt, o_rip
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.state cimport BANKS, IBT_ENTRIES, IBT_SECOND, R10, R11, RAX, RSP, Vcpu


cdef void _save_all(Emit* e) noexcept nogil:
    """Guest registers and flags from the host's to the structure. Destroys RAX."""
    cdef int r
    st_gs(e, H_RAX, o_gpr(RAX))
    e1(e, 0x9F)                                  # lahf
    e3(e, 0x0F, 0x90, 0xC0)                      # seto al
    op_gs(e, 0x88, 4, OFF(&(<Vcpu*>NULL).flags_lo), 0)      # ah
    op_gs(e, 0x88, 0, OFF(&(<Vcpu*>NULL).flags_of), 0)      # al
    for r in range(1, 15):
        if r == RSP or r == R10 or r == R11:
            continue
        st_gs(e, r, o_gpr(r))
    st_gs(e, H_GSP, o_gpr(RSP))


cdef void _load_flags(Emit* e) noexcept nogil:
    op_gs(e, 0x8A, 0, OFF(&(<Vcpu*>NULL).flags_of), 0)      # mov al
    e2(e, 0x04, 0x7F)                            # add al, 127: OF if al was 1
    op_gs(e, 0x8A, 4, OFF(&(<Vcpu*>NULL).flags_lo), 0)      # mov ah
    e1(e, 0x9E)                                  # sahf


cdef void _load_all(Emit* e) noexcept nogil:
    cdef int r
    _load_flags(e)
    for r in range(0, 15):
        if r == RSP or r == R10 or r == R11:
            continue
        ld_gs(e, r, o_gpr(r))
    ld_gs(e, H_GSP, o_gpr(RSP))


cdef inline void _align(Emit* e, int to) noexcept nogil:
    while <uint64_t>e.p & (to - 1):
        e1(e, 0xCC)


cdef uint8_t* _helper_thunk(Cache* c, Emit* e, void* function, int lin, int reload_all) noexcept nogil:
    """From a cold part: r10 = linear address, r11 = the meta data. Goes back there or leaves."""
    cdef uint8_t* at
    cdef uint8_t* to_tail
    _align(e, 16)
    at = e.p + e.delta
    _save_all(e)
    st_gs(e, H_RSP, OFF(&(<Vcpu*>NULL).ret_sp))
    ld_gs(e, H_RSP, OFF(&(<Vcpu*>NULL).host_rsp))
    mov_imm(e, H_RDI, <uint64_t>c.vcpu)
    if lin:
        mov_rr(e, H_RSI, H_T0)
        mov_rr(e, H_RDX, H_T1)
    else:
        mov_rr(e, H_RSI, H_T1)
    mov_imm(e, H_RAX, <uint64_t>function)
    e2(e, 0xFF, 0xD0)                            # call rax
    e3(e, 0x48, 0x85, 0xC0)                      # test rax, rax
    to_tail = jcc_fwd(e, CC_E)
    rel32_to(to_tail, c.leave_tail - e.delta)
    ld_gs(e, H_RSP, OFF(&(<Vcpu*>NULL).ret_sp))
    mov_rr(e, H_T0, H_RAX)
    if reload_all:
        _load_all(e)
    else:
        _load_flags(e)
        ld_gs(e, H_RAX, o_gpr(0))
        ld_gs(e, H_RCX, o_gpr(1))
        ld_gs(e, H_RDX, o_gpr(2))
        ld_gs(e, H_RSI, o_gpr(6))
        ld_gs(e, H_RDI, o_gpr(7))
        ld_gs(e, 8, o_gpr(8))
        ld_gs(e, 9, o_gpr(9))
    jmp_gs(e, OFF(&(<Vcpu*>NULL).tmp2))
    return at


cdef void _hash_r10(Emit* e, int32_t mask) noexcept nogil:
    """r11 = CRC32 of r10 & the field: a hash that leaves flags alone"""
    mov_imm(e, H_T1, 0)
    e2(e, 0xF2, 0x4D)                            # crc32 r11, r10
    e3(e, 0x0F, 0x38, 0xF1)
    e1(e, 0xDA)
    pext_gs(e, H_T1, H_T1, mask)


cdef void ibt_r10(Emit* e, int bank) noexcept nogil:
    _hash_r10(e, OFF(&(<Vcpu*>NULL).ibt_mask))
    e1(e, 0x65)                                  # jmp gs:[r11 * 8 + table]
    e2(e, 0x42, 0xFF)
    e2(e, 0x24, 0xDD)
    e32(e, <uint32_t>(o_ibt() + bank * IBT_ENTRIES * 8))


cdef uint8_t* _second_way(Cache* c, Emit* e, int bank) noexcept nogil:
    """Look r10 up in the second way, which keeps the targets' RIPs beside their code."""
    cdef uint8_t* at
    _align(e, 16)
    at = e.p + e.delta
    st_gs(e, H_RCX, OFF(&(<Vcpu*>NULL).save_rcx))
    _hash_r10(e, OFF(&(<Vcpu*>NULL).second_mask))
    e1(e, 0x65)                                  # mov rcx, gs:[r11 * 8 + rip]
    e2(e, 0x4A, 0x8B)
    e2(e, 0x0C, 0xDD)
    e32(e, <uint32_t>(OFF(&(<Vcpu*>NULL).second_rip[0]) + bank * IBT_SECOND * 8))
    e3(e, 0x48, 0xF7, 0xD1)                      # not rcx
    lea_sib(e, H_RCX, H_RCX, H_T0, 0, 1, 1)
    e2(e, 0xE3, 12)                              # jrcxz over the next two
    ld_gs(e, H_RCX, OFF(&(<Vcpu*>NULL).save_rcx))
    jmp_rx(e, c.ibt_none)
    ld_gs(e, H_RCX, OFF(&(<Vcpu*>NULL).save_rcx))
    e1(e, 0x65)                                  # jmp gs:[r11 * 8 + entry]
    e2(e, 0x42, 0xFF)
    e2(e, 0x24, 0xDD)
    e32(e, <uint32_t>(OFF(&(<Vcpu*>NULL).second_entry[0]) + bank * IBT_SECOND * 8))
    return at


cdef void make_thunks(Cache* c, miss_fn miss, miss_fn masked, miss_fn slow, miss_fn commit,
                      micro_fn micro) noexcept nogil:
    """Generate the fixed entry and exit code at the start of the cache."""
    cdef Emit e
    cdef int i
    e.p = c.rw
    e.delta = c.rx - c.rw
    e.state = <uint64_t>c.vcpu
    # enter(vcpu: rdi, host code: rsi): a C function
    c.enter = e.p + e.delta
    e1(&e, 0x53)                                 # push rbx
    e1(&e, 0x55)                                 # push rbp
    for i in range(4):
        e2(&e, 0x41, 0x54 + i)                   # push r12-r15
    lea_rd(&e, H_RSP, H_RSP, -8, 1)
    st_gs(&e, H_RSP, OFF(&(<Vcpu*>NULL).host_rsp))
    st_gs(&e, H_RSI, OFF(&(<Vcpu*>NULL).tmp2))
    ld_gs(&e, H_RSP, OFF(&(<Vcpu*>NULL).ret_sp))
    _load_all(&e)
    jmp_gs(&e, OFF(&(<Vcpu*>NULL).tmp2))
    # leave: r10 = guest RIP, r11 = reason
    _align(&e, 16)
    c.leave = e.p + e.delta
    st_gs(&e, H_T0, o_rip())
    st_gs(&e, H_T1, OFF(&(<Vcpu*>NULL).leave_reason))
    _save_all(&e)
    c.leave_tail = e.p + e.delta
    ld_gs(&e, H_RSP, OFF(&(<Vcpu*>NULL).host_rsp))
    lea_rd(&e, H_RSP, H_RSP, 8, 1)
    for i in range(3, -1, -1):
        e2(&e, 0x41, 0x5C + i)                   # pop r15-r12
    e1(&e, 0x5D)
    e1(&e, 0x5B)
    e1(&e, 0xC3)
    # a target that the table does not have: r10 = guest RIP
    _align(&e, 16)
    c.ibt_none = e.p + e.delta
    mov_imm(&e, H_T1, LEAVE_BRANCH)
    jmp_rx(&e, c.leave)
    for i in range(BANKS):
        c.ibt_miss[i] = _second_way(c, &e, i)
    for i in range(BANKS):
        # RET found the return stack's end: all forgotten, to where r10 says
        _align(&e, 16)
        c.ret_empty[i] = e.p + e.delta
        ld_gs(&e, H_RSP, OFF(&(<Vcpu*>NULL).ret_base))
        # RET went to another place than r10 says
        c.ret_wrong[i] = e.p + e.delta
        ibt_r10(&e, i)
    _align(&e, 16)
    c.link = e.p + e.delta
    st_gs(&e, H_T1, OFF(&(<Vcpu*>NULL).leave_arg))
    mov_imm(&e, H_T1, LEAVE_LINK)
    jmp_rx(&e, c.leave)
    _align(&e, 16)
    c.single = e.p + e.delta
    st_gs(&e, H_T1, OFF(&(<Vcpu*>NULL).leave_arg))
    mov_imm(&e, H_T1, LEAVE_SINGLE)
    jmp_rx(&e, c.leave)
    _align(&e, 16)
    c.micro_end = e.p + e.delta
    st_gs(&e, H_T1, OFF(&(<Vcpu*>NULL).leave_arg))
    mov_imm(&e, H_T1, LEAVE_MICRO)
    jmp_rx(&e, c.leave)
    c.miss = _helper_thunk(c, &e, <void*>miss, 1, 0)
    c.masked = _helper_thunk(c, &e, <void*>masked, 1, 0)
    c.slow = _helper_thunk(c, &e, <void*>slow, 1, 0)
    c.commit = _helper_thunk(c, &e, <void*>commit, 1, 0)
    c.micro = _helper_thunk(c, &e, <void*>micro, 0, 1)
    _align(&e, 64)
    c.start = e.p
    c.at = e.p
