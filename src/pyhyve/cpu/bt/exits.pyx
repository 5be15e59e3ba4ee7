# cython: language_level=3
"""See exits.pxd."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.codecache cimport ibt_hash
from pyhyve.cpu.bt.context cimport *
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.state cimport ACCESS_WRITE, IBT_ENTRIES, WAY_ENTRIES, TlbEntry, Vcpu
from pyhyve.cpu.bt.thunks cimport ADDEND, GROUP, SHARED, ibt_r10, LEAVE_BRANCH, LEAVE_POLL, LinkMeta, MicroMeta, MissMeta, put_mask


cdef inline bint _linkable(T* t, uint64_t target) noexcept nogil:
    return not t.slow and not t.straddle and ((target + t.csbase) & ~<uint64_t>0xFFF) == t.page


cdef void _go_ibt(T* t, uint64_t target) noexcept nogil:
    """Jump to a fixed target through the table."""
    mov_imm(&t.e, H_T0, target)
    if t.slow:
        mov_imm(&t.e, H_T1, LEAVE_BRANCH)
        jmp_rx(&t.e, t.c.leave)
    else:
        jmp_gs(&t.e, o_ibt() + <int32_t>(t.bank * IBT_ENTRIES + ibt_hash(target)) * 8)


cdef void go_ibt_r10(T* t) noexcept nogil:
    """Jump to the guest address in r10."""
    if t.slow:
        mov_imm(&t.e, H_T1, LEAVE_BRANCH)
        jmp_rx(&t.e, t.c.leave)
        return
    ibt_r10(&t.e, t.bank)


cdef void go(T* t, uint64_t target, int poll) noexcept nogil:
    """Unconditional jump to a guest address known now."""
    cdef Stub* s
    if _linkable(t, target):
        s = new_stub(t, K_LINK, jmp_fwd(&t.e))
        s.rip = target
        s.poll = poll
    else:
        _go_ibt(t, target)


cdef void _pad(T* t, uint64_t next_rip) noexcept nogil:
    """Behind a CALL, where the host's RET comes back to: on to the block at `next_rip`, if r10 says that. Flags are
    kept: who returns to another place may need them."""
    cdef Emit* e = &t.e
    mov_rr(e, H_T1, H_RCX)
    if fits32(0 - next_rip):
        lea_rd(e, H_RCX, H_T0, <int32_t>(0 - next_rip), 1)
    else:
        mov_imm(e, H_RCX, 0 - next_rip)
        lea_sib(e, H_RCX, H_RCX, H_T0, 0, 0, 1)
    e2(e, 0xE3, 8)                               # jrcxz over the next two
    mov_rr(e, H_RCX, H_T1)
    jmp_rx(e, t.c.ret_wrong[t.bank])
    mov_rr(e, H_RCX, H_T1)
    go(t, next_rip, 1)


cdef void call_go(T* t, uint64_t target, int poll, uint64_t next_rip) noexcept nogil:
    cdef Stub* s
    if t.slow:
        _go_ibt(t, target)
        return
    if _linkable(t, target):
        e1(&t.e, 0xE8)
        e32(&t.e, 0)
        s = new_stub(t, K_LINK, t.e.p - 4)
        s.rip = target
        s.poll = poll
    else:
        mov_imm(&t.e, H_T0, target)
        e1(&t.e, 0xFF)                           # call slot
        state_operand(&t.e, 2, o_ibt() + <int32_t>(t.bank * IBT_ENTRIES + ibt_hash(target)) * 8, 0)
    _pad(t, next_rip)


cdef void call_r10(T* t, uint64_t next_rip) noexcept nogil:
    if t.slow:
        go_ibt_r10(t)
        return
    ibt_r10(&t.e, t.bank)
    # the CALL of that JMP: /2 in place of /4
    (t.e.p - 6)[0] = 0x14
    _pad(t, next_rip)


cdef void ret_r10(T* t) noexcept nogil:
    if t.slow:
        go_ibt_r10(t)
    else:
        e1(&t.e, 0xC3)


cdef void jcc_go(T* t, int cc, uint64_t target, int poll) noexcept nogil:
    cdef Stub* s
    s = new_stub(t, K_LINK if _linkable(t, target) else K_EXIT, jcc_fwd(&t.e, cc))
    s.rip = target
    s.poll = poll


cdef void micro_end(T* t, int i) noexcept nogil:
    """The block ends: instruction i runs in microcode, out of generated code."""
    cdef Stub* s = new_stub(t, K_MICRO_END, jmp_fwd(&t.e))
    s.index = i


cdef void _put_micro_meta(T* t, int i, uint8_t* resume) noexcept nogil:
    cdef MicroMeta* m = <MicroMeta*>t.e.p
    m.rip = t.rips[i]
    m.resume = 0
    m.pad = 0
    m.insn = t.insns[i]
    t.e.p += sizeof(MicroMeta)
    if resume == NULL:
        m.resume = <int32_t>sizeof(MicroMeta)
    else:
        m.resume = <int32_t>(resume - <uint8_t*>m)


cdef void micro_inline(T* t, int i) noexcept nogil:
    """Instruction i runs in microcode; the block goes on behind it."""
    cdef Stub* s = new_stub(t, K_MICRO, jmp_fwd(&t.e))
    s.index = i
    s.resume = t.e.p


cdef void _link(T* t, uint8_t* thunk, uint64_t rip, uint8_t* site, int poll) noexcept nogil:
    """Leave, to go on at `rip`; the dispatcher makes the jump at `site` lead there directly."""
    cdef LinkMeta* l
    mov_imm(&t.e, H_T0, rip)
    thunk_rx(&t.e, thunk)
    l = <LinkMeta*>t.e.p
    l.site = <int32_t>(site - t.e.p)
    l.poll = <uint8_t>poll
    t.e.p += sizeof(LinkMeta)


cdef void _second_way(T* t, Stub* s) noexcept nogil:
    """As the hot code did, with r10 and r11 as they are now."""
    cdef Emit* e = &t.e
    cdef int32_t way = WAY_ENTRIES * <int32_t>sizeof(TlbEntry)
    cdef int32_t entry = way + s.off - (OFF(&(<TlbEntry*>NULL).tag_w) if s.access & ACCESS_WRITE else 0)
    cdef uint8_t* miss
    cdef uint8_t* promote
    e1(e, 0x65)                                  # xor r10, gs:[r11 + tag]
    e3(e, 0x4D, 0x33, 0x93)
    e32(e, <uint32_t>(way + s.off))
    e3(e, 0x49, 0x81, 0xFA)                      # cmp r10, 4096 - width
    e32(e, 0x1000 - s.width)
    miss = jcc_fwd(e, CC_A)
    e2(e, 0x48, 0xFF)                            # dec second_left: every so often the helper promotes the entry
    state_operand(e, 1, OFF(&(<Vcpu*>NULL).second_left), 0)
    promote = jcc_fwd(e, CC_E)
    e1(e, 0x65)                                  # mov r10, gs:[r11 + addend], or add r10, gs:[r11 + hva]
    e3(e, 0x4D, 0x8B if s.access & ADDEND else 0x03, 0x93)
    e32(e, <uint32_t>(entry + (OFF(&(<TlbEntry*>NULL).addend) if s.access & ADDEND else OFF(&(<TlbEntry*>NULL).hva))))
    rel32_to(jmp_fwd(e), s.resume)
    rel32_to(miss, e.p)
    rel32_to(promote, e.p)
    e1(e, 0x65)
    e3(e, 0x4D, 0x33, 0x93)
    e32(e, <uint32_t>(way + s.off))


cdef void emit_stubs(T* t) noexcept nogil:
    cdef int i
    cdef Stub* s
    cdef MissMeta* m
    cdef uint8_t* over_end
    for i in range(t.n_stubs):
        s = &t.stubs[i]
        rel32_to(s.site, t.e.p)
        if s.kind == K_MISS or s.kind == K_MISS_LIVE:
            if s.kind == K_MISS:
                # xor r10, [r11 + tag]: the linear address again
                e1(&t.e, 0x65)
                e3(&t.e, 0x4D, 0x33, 0x93)
                e32(&t.e, <uint32_t>s.off)
                if not s.masked:
                    _second_way(t, s)
            else:
                # rcx = the tag; r10 += rcx; restore rcx
                e1(&t.e, 0x65)
                e2(&t.e, 0x4A, 0x8B)
                e2(&t.e, 0x0C, 0xDD)
                e32(&t.e, <uint32_t>s.off)
                lea_sib(&t.e, H_T0, H_T0, H_RCX, 0, 0, 1)
                ld_gs(&t.e, H_RCX, OFF(&(<Vcpu*>NULL).save_rcx))
            over_end = NULL
            if s.kind == K_MISS and t.size == 64 and s.access & (GROUP | SHARED) and not s.masked:
                # a range over the page's end: on in the block that checks access by access
                e3(&t.e, 0x45, 0x89, 0xD3)       # mov r11d, r10d
                e3(&t.e, 0x41, 0x81, 0xE3)       # and r11d, 4095
                e32(&t.e, 0xFFF)
                e3(&t.e, 0x41, 0x81, 0xFB)       # cmp r11d, 4096 - width
                e32(&t.e, 0x1000 - s.width)
                over_end = jcc_fwd(&t.e, CC_A)
            thunk_rx(&t.e, t.c.masked if s.masked else t.c.miss)
            m = <MissMeta*>t.e.p
            m.rip = s.rip
            m.resume = <int32_t>(s.resume - t.e.p)
            m.width = <uint16_t>s.width
            m.access = <uint8_t>s.access
            m.bank = <uint8_t>s.index
            t.e.p += sizeof(MissMeta)
            if s.masked:
                put_mask(&t.e, s.masked, 0)
            if over_end != NULL:
                rel32_to(over_end, t.e.p)
                _link(t, t.c.single, s.rip, over_end, 0)
        elif s.kind == K_LINK:
            _link(t, t.c.link, s.rip, s.site, s.poll)
        elif s.kind == K_EXIT:
            _go_ibt(t, s.rip)
        elif s.kind == K_POLL:
            mov_imm(&t.e, H_T0, s.rip)
            mov_imm(&t.e, H_T1, LEAVE_POLL)
            jmp_rx(&t.e, t.c.leave)
        elif s.kind == K_MICRO:
            if s.poll:
                flags_restore(t)
            thunk_rx(&t.e, t.c.micro)
            _put_micro_meta(t, s.index, s.resume)
        elif s.kind == K_MICRO_END:
            mov_imm(&t.e, H_T0, t.rips[s.index])
            thunk_rx(&t.e, t.c.micro_end)
            _put_micro_meta(t, s.index, NULL)
