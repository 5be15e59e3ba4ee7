# cython: language_level=3
"""The translator: guest blocks to host code of the same instruction set.

Most instructions are copied. What changes is where their operands are:

  guest register      while generated code runs
  RSP                 host R15
  R10 R11 R15         Vcpu.gpr[] (they are the least used; host R10 and R11 are scratch)
  all others, flags,  the host's of the same name: x87, SSE and AVX state as well
  memory at [EA]      the host address that the software TLB gives for the linear address

The host's RSP stays the host's stack (signals arrive on it), GS points at the vCPU structure, and the host's DF is
clear. A memory operand becomes:

    lea   r10, [EA]                       the linear address
    mov   r11d, r10d; shr r11d, 7; and r11d, 0x7fe0     the TLB entry's offset
    xor   r10, gs:[r11 + tag]             on a hit: the offset in the page
    cmp   r10, 4096 - width; ja miss      wrong page, no permission, or over the page's end
    add   r10, gs:[r11 + hva]             the host address

That destroys flags. Where the guest's flags are still needed (liveness says so: about one access in four), a longer
sequence does the same by LEA, NOT, PEXT and JRCXZ, which leave flags alone.

Every way out of a block is in its cold part, behind the hot code. A block never falls through to another one: it
ends in direct jumps (patched when the target is known, only within a page) or in a jump through Vcpu.ibt.
"""

from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.codecache cimport (
    MODE_AC, MODE_AVX, MODE_CPL, MODE_CSBASE_SHIFT, MODE_NOFP, MODE_SINGLE, MODE_SIZE, MODE_SIZE_SHIFT, MODE_SLOW,
    Block, Cache,
    block_new, cache_room, ibt_hash,
)
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.state cimport (
    ACCESS_READ, ACCESS_WRITE, BANK_KERNEL, BANK_KERNEL_AC, BANK_USER, IBT_ENTRIES, R10, R11, R15, RAX, RBP, RCX,
    RSP, SEG_FS, SEG_GS, TLB_ENTRIES, TlbEntry, Vcpu,
)

cdef enum:
    K_MISS = 1              # TLB miss with dead flags
    K_MISS_LIVE = 2         # TLB miss, flags kept
    K_LINK = 3              # jump to a target in the page
    K_EXIT = 4              # jump to a target elsewhere
    K_POLL = 5
    K_MICRO_END = 6
    K_MICRO = 7             # an inline sequence that cannot: microcode, then behind the sequence

    MAX_STUBS = 256
    MAX_JCC = 4             # conditional branches that a block goes on behind

cdef struct Stub:
    int kind
    uint8_t* site           # rel32 that leads here
    uint8_t* resume
    uint64_t rip
    uint32_t width
    int access
    int32_t off             # of the tag compared
    int poll
    int index               # instruction

cdef struct Access:             # a memory access off an unscaled base register, found before code is made
    int valid
    int base                # guest register
    int version             # counts what may have changed the base
    int32_t off             # from the base's value (RSP: from its value at the start of this version)
    int32_t disp            # as the instruction has it
    uint32_t width
    int write

cdef struct Share:              # an access whose check later ones rely on
    int base
    int version
    int32_t lo
    int32_t hi
    int write

cdef struct T:
    Emit e
    Vcpu* v
    Cache* c
    Block* b
    uint64_t mode
    int size                # 16, 32, 64
    int bank
    int slow
    int single              # no groups of stack accesses
    int straddle
    int cpl
    uint64_t page           # linear page (RIP page) of the block
    uint64_t csbase
    int n
    int n_stubs
    int next_poll           # the jump to the next instruction must poll
    int n_shares
    Share shares[16]
    Access acc[MAX_INSNS][2]
    int version[16]
    int32_t sp              # offset of RSP from its value when its version began
    Insn insns[MAX_INSNS]
    uint64_t rips[MAX_INSNS]
    uint8_t live[MAX_INSNS + 1]     # flags that may be read at or after instruction i, before being overwritten
    Stub stubs[MAX_STUBS]

cdef inline int32_t OFF(void* field) noexcept nogil:
    return <int32_t><int64_t>field

cdef inline int32_t o_gpr(int r) noexcept nogil:
    return r * 8

cdef inline int32_t o_rip() noexcept nogil:
    return OFF(&(<Vcpu*>NULL).rip)

cdef inline int32_t o_poll() noexcept nogil:
    return OFF(&(<Vcpu*>NULL).poll)

cdef inline int32_t o_tlb() noexcept nogil:
    return OFF(&(<Vcpu*>NULL).tlb[0])

cdef inline int32_t o_ibt() noexcept nogil:
    return OFF(&(<Vcpu*>NULL).ibt[0])

cdef inline int32_t o_segbase(int s) noexcept nogil:
    return OFF(&(<Vcpu*>NULL).seg[0].base) + s * (OFF(&(<Vcpu*>NULL).seg[1].base) - OFF(&(<Vcpu*>NULL).seg[0].base))

cdef inline bint special(int r) noexcept nogil:
    """Guest registers that live in memory."""
    return r == R10 or r == R11 or r == R15

cdef inline int host_of(int r) noexcept nogil:
    """The host register of a guest register that has one."""
    return H_GSP if r == RSP else r


# --- thunks ----------------------------------------------------------------------------------------------------------

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


cdef inline void _jmp_gs(Emit* e, int32_t off) noexcept nogil:
    e1(e, 0x65)
    e3(e, 0xFF, 0x24, 0x25)
    e32(e, <uint32_t>off)


cdef inline void _align(Emit* e, int to) noexcept nogil:
    while <uint64_t>e.p & (to - 1):
        e1(e, 0xCC)


cdef uint8_t* _helper_thunk(Cache* c, Emit* e, void* function, int lin, int reload_all) noexcept nogil:
    """call'ed from a cold part: r10 = linear address, behind the call the meta data. Returns there or leaves."""
    cdef uint8_t* at
    cdef uint8_t* to_tail
    _align(e, 16)
    at = e.p + e.delta
    e2(e, 0x41, 0x5B)                            # pop r11
    _save_all(e)
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
    _jmp_gs(e, OFF(&(<Vcpu*>NULL).tmp2))
    return at


cdef void make_thunks(Cache* c, miss_fn miss, miss_fn slow, miss_fn commit, micro_fn micro) noexcept nogil:
    """Generate the fixed entry and exit code at the start of the cache."""
    cdef Emit e
    cdef int i
    e.p = c.rw
    e.delta = c.rx - c.rw
    # enter(vcpu: rdi, host code: rsi): a C function
    c.enter = e.p + e.delta
    e1(&e, 0x53)                                 # push rbx
    e1(&e, 0x55)                                 # push rbp
    for i in range(4):
        e2(&e, 0x41, 0x54 + i)                   # push r12-r15
    lea_rd(&e, H_RSP, H_RSP, -8, 1)
    st_gs(&e, H_RSP, OFF(&(<Vcpu*>NULL).host_rsp))
    st_gs(&e, H_RSI, OFF(&(<Vcpu*>NULL).tmp2))
    _load_all(&e)
    _jmp_gs(&e, OFF(&(<Vcpu*>NULL).tmp2))
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
    c.ibt_miss = e.p + e.delta
    mov_imm(&e, H_T1, LEAVE_BRANCH)
    jmp_rx(&e, c.leave)
    _align(&e, 16)
    c.link = e.p + e.delta
    e2(&e, 0x41, 0x5B)                           # pop r11
    st_gs(&e, H_T1, OFF(&(<Vcpu*>NULL).leave_arg))
    mov_imm(&e, H_T1, LEAVE_LINK)
    jmp_rx(&e, c.leave)
    _align(&e, 16)
    c.micro_end = e.p + e.delta
    e2(&e, 0x41, 0x5B)
    st_gs(&e, H_T1, OFF(&(<Vcpu*>NULL).leave_arg))
    mov_imm(&e, H_T1, LEAVE_MICRO)
    jmp_rx(&e, c.leave)
    c.miss = _helper_thunk(c, &e, <void*>miss, 1, 0)
    c.slow = _helper_thunk(c, &e, <void*>slow, 1, 0)
    c.commit = _helper_thunk(c, &e, <void*>commit, 1, 0)
    c.micro = _helper_thunk(c, &e, <void*>micro, 0, 1)
    _align(&e, 64)
    c.start = e.p
    c.at = e.p


# --- exits of a block ------------------------------------------------------------------------------------------------

cdef Stub* _stub(T* t, int kind, uint8_t* site) noexcept nogil:
    cdef Stub* s = &t.stubs[t.n_stubs]
    t.n_stubs += 1
    s.kind = kind
    s.site = site
    s.resume = NULL
    s.rip = 0
    s.poll = 0
    return s


cdef inline bint _linkable(T* t, uint64_t target) noexcept nogil:
    return not t.slow and not t.straddle and ((target + t.csbase) & ~<uint64_t>0xFFF) == t.page


cdef void _go_ibt(T* t, uint64_t target) noexcept nogil:
    """Jump to a fixed target through the table."""
    mov_imm(&t.e, H_T0, target)
    if t.slow:
        mov_imm(&t.e, H_T1, LEAVE_BRANCH)
        jmp_rx(&t.e, t.c.leave)
    else:
        _jmp_gs(&t.e, o_ibt() + <int32_t>(t.bank * IBT_ENTRIES + ibt_hash(target)) * 8)


cdef void _go_ibt_r10(T* t) noexcept nogil:
    """Jump to the guest address in r10."""
    if t.slow:
        mov_imm(&t.e, H_T1, LEAVE_BRANCH)
        jmp_rx(&t.e, t.c.leave)
        return
    mov_imm(&t.e, H_T1, 0)
    # crc32 r11, r10: a hash that leaves flags alone
    e2(&t.e, 0xF2, 0x4D)
    e3(&t.e, 0x0F, 0x38, 0xF1)
    e1(&t.e, 0xDA)
    pext_gs(&t.e, H_T1, H_T1, OFF(&(<Vcpu*>NULL).ibt_mask))
    # jmp gs:[r11 * 8 + table]
    e3(&t.e, 0x65, 0x42, 0xFF)
    e2(&t.e, 0x24, 0xDD)
    e32(&t.e, <uint32_t>(o_ibt() + t.bank * IBT_ENTRIES * 8))


cdef void _go(T* t, uint64_t target, int poll) noexcept nogil:
    """Unconditional jump to a guest address known now."""
    cdef Stub* s
    if _linkable(t, target):
        s = _stub(t, K_LINK, jmp_fwd(&t.e))
        s.rip = target
        s.poll = poll
    else:
        _go_ibt(t, target)


cdef void _jcc_go(T* t, int cc, uint64_t target, int poll) noexcept nogil:
    cdef Stub* s
    s = _stub(t, K_LINK if _linkable(t, target) else K_EXIT, jcc_fwd(&t.e, cc))
    s.rip = target
    s.poll = poll


cdef void _micro_end(T* t, int i) noexcept nogil:
    """The block ends: instruction i runs in microcode, out of generated code."""
    cdef Stub* s = _stub(t, K_MICRO_END, jmp_fwd(&t.e))
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


cdef void _micro_inline(T* t, int i) noexcept nogil:
    """Instruction i runs in microcode; the block goes on behind it."""
    call_rx(&t.e, t.c.micro)
    _put_micro_meta(t, i, NULL)


cdef void _emit_stubs(T* t) noexcept nogil:
    cdef int i
    cdef Stub* s
    cdef MissMeta* m
    cdef LinkMeta* l
    for i in range(t.n_stubs):
        s = &t.stubs[i]
        rel32_to(s.site, t.e.p)
        if s.kind == K_MISS or s.kind == K_MISS_LIVE:
            if s.kind == K_MISS:
                # xor r10, gs:[r11 + tag]: the linear address again
                e2(&t.e, 0x65, 0x4D)
                e2(&t.e, 0x33, 0x93)
                e32(&t.e, <uint32_t>s.off)
            else:
                # rcx = the tag; r10 += rcx; restore rcx
                e3(&t.e, 0x65, 0x4A, 0x8B)
                e2(&t.e, 0x0C, 0xDD)
                e32(&t.e, <uint32_t>s.off)
                lea_sib(&t.e, H_T0, H_T0, H_RCX, 0, 0, 1)
                ld_gs(&t.e, H_RCX, OFF(&(<Vcpu*>NULL).save_rcx))
            call_rx(&t.e, t.c.miss)
            m = <MissMeta*>t.e.p
            m.rip = s.rip
            m.resume = <int32_t>(s.resume - t.e.p)
            m.width = <uint16_t>s.width
            m.access = <uint8_t>s.access
            m.bank = <uint8_t>s.index
            t.e.p += sizeof(MissMeta)
        elif s.kind == K_LINK:
            mov_imm(&t.e, H_T0, s.rip)
            call_rx(&t.e, t.c.link)
            l = <LinkMeta*>t.e.p
            l.site = <int32_t>(s.site - t.e.p)
            l.poll = <uint8_t>s.poll
            t.e.p += sizeof(LinkMeta)
        elif s.kind == K_EXIT:
            _go_ibt(t, s.rip)
        elif s.kind == K_POLL:
            mov_imm(&t.e, H_T0, s.rip)
            mov_imm(&t.e, H_T1, LEAVE_POLL)
            jmp_rx(&t.e, t.c.leave)
        elif s.kind == K_MICRO:
            if s.poll:
                _flags_restore(t)
            call_rx(&t.e, t.c.micro)
            _put_micro_meta(t, s.index, s.resume)
        elif s.kind == K_MICRO_END:
            mov_imm(&t.e, H_T0, t.rips[s.index])
            call_rx(&t.e, t.c.micro_end)
            _put_micro_meta(t, s.index, NULL)


# --- memory ----------------------------------------------------------------------------------------------------------

cdef void _ea(T* t, Insn* i, uint64_t next_rip, int with_seg) noexcept nogil:
    """r10 = the linear address of the memory operand (the effective address, without `with_seg`). Keeps flags and all
    guest registers; destroys r11."""
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
    if not with_seg:
        return
    if t.size == 64:
        if i.seg == SEG_FS or i.seg == SEG_GS:
            ld_gs(e, H_T1, o_segbase(i.seg))
            lea_sib(e, H_T0, H_T0, H_T1, 0, 0, 1)
    else:
        ld_gs(e, H_T1, o_segbase(i.seg))
        lea_sib(e, H_T0, H_T0, H_T1, 0, 0, 0)


cdef void _access(T* t, int i, int access, uint32_t width, int live) noexcept nogil:
    """r10: linear address to host address, `width` bytes readable (or writable) there. Keeps guest registers, and
    flags where `live`; destroys r11."""
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
        call_rx(e, t.c.slow)
        m = <MissMeta*>e.p
        m.rip = t.rips[i]
        m.resume = <int32_t>sizeof(MissMeta)
        m.width = <uint16_t>width
        m.access = <uint8_t>access
        m.bank = <uint8_t>t.bank
        e.p += sizeof(MissMeta)
        return
    if not live:
        e3(e, 0x45, 0x89, 0xD3)                  # mov r11d, r10d
        e2(e, 0x41, 0xC1)                        # shr r11d, 7
        e2(e, 0xEB, 0x07)
        e3(e, 0x41, 0x81, 0xE3)                  # and r11d, 0x7fe0
        e32(e, (TLB_ENTRIES - 1) * sizeof(TlbEntry))
        e2(e, 0x65, 0x4D)                        # xor r10, gs:[r11 + tag]
        e2(e, 0x33, 0x93)
        e32(e, <uint32_t>tag)
        e3(e, 0x49, 0x81, 0xFA)                  # cmp r10, 4096 - width
        e32(e, 0x1000 - width)
        site = jcc_fwd(e, CC_A)
        e2(e, 0x65, 0x4D)
        if access & SHARED:
            e2(e, 0x8B, 0x93)                    # mov r10, gs:[r11 + addend]
            e32(e, <uint32_t>(table + OFF(&(<TlbEntry*>NULL).addend)))
        else:
            e2(e, 0x03, 0x93)                    # add r10, gs:[r11 + hva]
            e32(e, <uint32_t>hva)
        s = _stub(t, K_MISS, site)
    else:
        st_gs(e, H_RCX, OFF(&(<Vcpu*>NULL).save_rcx))
        pext_gs(e, H_RCX, H_T0, OFF(&(<Vcpu*>NULL).tlb_mask))
        lea_sib(e, H_RCX, -1, H_RCX, 2, 0, 1)    # lea rcx, [rcx * 4]
        e3(e, 0x65, 0x4C, 0x8B)                  # mov r11, gs:[rcx * 8 + tag]
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
        e3(e, 0x65, 0x4E, 0x8B)                  # mov r11, gs:[r11 * 8 + hva]
        if access & SHARED:
            e2(e, 0x14, 0xDD)                    # mov r10, gs:[r11 * 8 + addend]
            e32(e, <uint32_t>(table + OFF(&(<TlbEntry*>NULL).addend)))
        else:
            e2(e, 0x1C, 0xDD)
            e32(e, <uint32_t>hva)
            lea_sib(e, H_T0, H_T0, H_T1, 0, 0, 1)
        s = _stub(t, K_MISS_LIVE, site)
    s.resume = e.p
    s.rip = t.rips[i]
    s.width = width
    s.access = access
    s.off = tag
    s.index = t.bank


# --- accesses that share a check -------------------------------------------------------------------------------------

cdef void _bump(T* t, int reg) noexcept nogil:
    t.version[reg & 15] += 1
    if reg == RSP:
        t.sp = 0


cdef void _bump_all(T* t) noexcept nogil:
    cdef int r
    for r in range(16):
        t.version[r] += 1
    t.sp = 0


cdef void _note(T* t, int n, int k, int base, int32_t disp, uint32_t width, int write) noexcept nogil:
    cdef Access* a = &t.acc[n][k]
    a.valid = 1
    a.base = base
    a.version = t.version[base]
    a.disp = disp
    a.off = disp + (t.sp if base == RSP else 0)
    a.width = width
    a.write = write


cdef void _note_operand(T* t, int n, int write) noexcept nogil:
    """The memory operand of instruction n, if it is of the form [base + displacement]."""
    cdef Insn* i = &t.insns[n]
    if i.base > 15 or special(i.base) or i.index != REG_NONE or i.addrsize != 8 or i.mem_width == 0:
        return
    if i.attr & (A_MOFFS | A_BITOFF | A_NO_ACCESS) or i.seg == SEG_FS or i.seg == SEG_GS or i.mem_width > 64:
        return
    if -0x100000 < i.disp < 0x100000:
        _note(t, n, 0, i.base, <int32_t>i.disp, i.mem_width, write)


cdef void _note_writes(T* t, Insn* i) noexcept nogil:
    """Bump the version of every register that a copied instruction may write (more is harmless)."""
    cdef int op = i.opcode
    cdef int reg = 1            # does it write ModRM.reg, ModRM.rm?
    cdef int rm = 1
    cdef int implicit = 1       # may it write RAX, RCX or RDX besides?
    if i.enc == ENC_LEGACY and i.map == 0:
        if op < 0x40 and (op & 7) < 4:
            implicit = 0
            if op >= 0x38:
                reg = rm = 0                     # CMP
            elif op & 2:
                rm = 0
            else:
                reg = 0
        elif op == 0x84 or op == 0x85:           # TEST
            reg = rm = implicit = 0
        elif op == 0x88 or op == 0x89:
            reg = implicit = 0
        elif op == 0x8A or op == 0x8B or op == 0x8D or op == 0x63 or op == 0x69 or op == 0x6B:
            rm = implicit = 0
        elif 0x80 <= op <= 0x83:
            implicit = 0
            reg = 0
            if (i.reg & 7) == 7:
                rm = 0                           # CMP
        elif op == 0x86 or op == 0x87 or op == 0xC0 or op == 0xC1 or 0xC6 <= op <= 0xC7 or 0xD0 <= op <= 0xD3 \
                or op == 0xFE or op == 0xFF or 0xB0 <= op <= 0xBF:
            implicit = 0
        elif (op == 0xF6 or op == 0xF7) and (i.reg & 7) < 4:
            implicit = 0
            if (i.reg & 7) < 2:
                rm = 0                           # TEST
    elif i.enc == ENC_LEGACY and i.map == 1:
        if 0x40 <= op <= 0x4F or op == 0xAF or 0xB6 <= op <= 0xB7 or 0xBC <= op <= 0xBF:
            rm = implicit = 0
        elif 0x90 <= op <= 0x9F:
            reg = implicit = 0
        elif 0x10 <= op <= 0x17 or 0x28 <= op <= 0x2F or 0x50 <= op <= 0x7F or op == 0xC6:
            implicit = 0
    if i.attr & A_REG_GPR and reg:
        _bump(t, i.reg)
        if i.attr & A_REG_8 and i.rex == 0:
            _bump(t, i.reg & 3)
    if (i.attr & A_OPREG) or (i.attr & A_RM_GPR and rm and i.mod == 3):
        _bump(t, i.rm)
        if i.attr & A_RM_8 and i.rex == 0:
            _bump(t, i.rm & 3)
    if i.attr & A_VVVV_GPR:
        _bump(t, i.vvvv)
    if implicit:
        _bump(t, RAX)
        _bump(t, RCX)
        _bump(t, 2)


cdef bint _moves_rsp(Insn* i, int32_t* by) noexcept nogil:
    """ADD or SUB of an immediate, or LEA, that only moves RSP by a constant."""
    if i.cls != C_COPY or i.enc != ENC_LEGACY or i.map != 0 or i.opsize != 8:
        return False
    if (i.opcode == 0x81 or i.opcode == 0x83) and i.mod == 3 and i.rm == RSP and -0x100000 < i.imm < 0x100000:
        if (i.reg & 7) == 0:
            by[0] = <int32_t>i.imm
            return True
        if (i.reg & 7) == 5:
            by[0] = -<int32_t>i.imm
            return True
        return False
    if i.opcode == 0x8D and i.reg == RSP and i.base == RSP and i.index == REG_NONE and i.addrsize == 8 \
            and -0x100000 < i.disp < 0x100000:
        by[0] = <int32_t>i.disp
        return True
    return False


cdef void _find_accesses(T* t) noexcept nogil:
    """Fill t.acc: which accesses go off which value of which register."""
    cdef int n, r
    cdef int32_t by = 0
    cdef Insn* i
    for r in range(16):
        t.version[r] = 0
    t.sp = 0
    t.n_shares = 0
    for n in range(t.n):
        t.acc[n][0].valid = 0
        t.acc[n][1].valid = 0
        if t.size != 64 or t.single:
            continue
        i = &t.insns[n]
        if i.cls == C_COPY:
            if i.attr & A_MEM:
                _note_operand(t, n, i.mem_access != M_READ)
            if _moves_rsp(i, &by):
                t.sp += by
            else:
                _note_writes(t, i)
        elif i.cls == C_STACK:
            if _is_push_reg(i) or (i.map == 0 and i.opsize == 8 and (i.opcode == 0x68 or i.opcode == 0x6A)):
                _note(t, n, 1, RSP, -8, 8, 1)
                t.sp -= 8
            elif _is_pop_reg(i):
                _note(t, n, 1, RSP, 0, 8, 0)
                t.sp += 8
                _bump(t, i.rm)
            elif i.map == 0 and i.opcode == 0xFF and i.opsize == 8 and i.attr & A_MEM:
                _note_operand(t, n, 0)
                _note(t, n, 1, RSP, -8, 8, 1)
                t.sp -= 8
            elif i.map == 0 and i.opcode == 0xC9 and i.opsize == 8:
                _note(t, n, 1, RBP, 0, 8, 0)
                _bump(t, RBP)
                _bump(t, RSP)
            else:
                _bump_all(t)
        elif i.cls == C_BRANCH:
            if i.map == 0 and (i.opcode == 0xE8 or i.opcode == 0xFF and (i.reg & 7) == 2):
                if i.opcode == 0xFF and i.attr & A_MEM:
                    _note_operand(t, n, 0)
                _note(t, n, 1, RSP, -8, 8, 1)
            elif i.map == 0 and i.opcode == 0xFF and i.attr & A_MEM:
                _note_operand(t, n, 0)
            elif i.map == 0 and (i.opcode == 0xC3 or i.opcode == 0xC2):
                _note(t, n, 1, RSP, 0, 8, 0)
        elif i.cls != C_NOP:
            _bump_all(t)


cdef inline int32_t o_share(int k) noexcept nogil:
    return OFF(&(<Vcpu*>NULL).share[0]) + 8 * k


cdef int _share_range(T* t, int n, int k, Access* a, int32_t* lo, int32_t* hi) noexcept nogil:
    """How many later accesses one check of [lo, hi) would serve."""
    cdef int m, j
    cdef int found = 0
    cdef Access* b
    cdef int32_t new_lo, new_hi
    for m in range(n, t.n):
        for j in range(2):
            b = &t.acc[m][j]
            if not b.valid or (m == n and j <= k) or b.base != a.base or b.version != a.version \
                    or (b.write and not a.write):
                continue
            new_lo = b.off if b.off < lo[0] else lo[0]
            new_hi = b.off + <int32_t>b.width if b.off + <int32_t>b.width > hi[0] else hi[0]
            if new_hi - new_lo > 512:
                continue
            lo[0] = new_lo
            hi[0] = new_hi
            found += 1
    return found


cdef bint _shared(T* t, int n, int k, int32_t off, int32_t disp, uint32_t width, int live) noexcept nogil:
    """r10 = host address of [base + disp], by a check that serves several accesses. False: this one is alone.
    `off` and `width` are of all that this access needs (a group of pushes: more than acc[n][k] says)."""
    cdef Access* a = &t.acc[n][k]
    cdef Emit* e = &t.e
    cdef Share* s
    cdef Access wide
    cdef int j
    cdef int32_t lo, hi
    if not a.valid or t.single:
        return False
    for j in range(t.n_shares):
        s = &t.shares[j]
        if s.base == a.base and s.version == a.version and s.lo <= off and off + <int32_t>width <= s.hi \
                and (s.write or not a.write):
            ld_gs(e, H_T0, o_share(j))
            lea_sib(e, H_T0, H_T0, host_of(a.base), 0, disp, 1)
            return True
    if t.n_shares >= 16:
        return False
    lo = off
    hi = off + <int32_t>width
    if not _share_range(t, n, k, a, &lo, &hi):
        return False
    s = &t.shares[t.n_shares]
    s.base = a.base
    s.version = a.version
    s.lo = lo
    s.hi = hi
    s.write = a.write
    lea_rd(e, H_T0, host_of(a.base), disp + (lo - off), 1)
    _access(t, n, (ACCESS_WRITE if a.write else ACCESS_READ) | SHARED, <uint32_t>(hi - lo), live)
    st_gs(e, H_T0, o_share(t.n_shares))
    lea_sib(e, H_T0, H_T0, host_of(a.base), 0, disp, 1)
    t.n_shares += 1
    return True


cdef void _operand(T* t, int n, int access, uint32_t width, int live) noexcept nogil:
    """r10 = host address of instruction n's memory operand."""
    cdef Access* a = &t.acc[n][0]
    if a.valid and a.width == width and _shared(t, n, 0, a.off, a.disp, width, live):
        return
    _ea(t, &t.insns[n], t.rips[n] + t.insns[n].length, 1)
    _access(t, n, access, width, live)


cdef void _stack_operand(T* t, int n, int base, int32_t disp, int access, uint32_t width, int live) noexcept nogil:
    """r10 = host address of [base + disp], `width` bytes of stack."""
    cdef Access* a = &t.acc[n][1]
    if a.valid and _shared(t, n, 1, a.off + disp - a.disp, disp, width, live):
        return
    lea_rd(&t.e, H_T0, host_of(base), disp, 1)
    _access(t, n, access, width, live)


cdef void _commit(T* t, int i) noexcept nogil:
    """In a slow block, behind a store: carry a bounced store out."""
    cdef MissMeta* m
    if not t.slow:
        return
    call_rx(&t.e, t.c.commit)
    m = <MissMeta*>t.e.p
    m.rip = t.rips[i]
    m.resume = <int32_t>sizeof(MissMeta)
    m.width = 0
    m.access = ACCESS_WRITE
    m.bank = <uint8_t>t.bank
    t.e.p += sizeof(MissMeta)


# --- copied instructions ---------------------------------------------------------------------------------------------

cdef inline bint _is_vector(Insn* i) noexcept nogil:
    """x87, MMX, SSE or AVX: what CR0.TS and CR0.EM forbid."""
    cdef uint8_t op = i.opcode
    if i.enc != ENC_LEGACY:
        if i.map == 2 and 0xF2 <= op <= 0xF7:
            return False
        return not (i.map == 3 and op == 0xF0)
    if i.map == 0:
        return 0xD8 <= op <= 0xDF or op == 0x9B
    if i.map == 1:
        return (0x10 <= op <= 0x17 or 0x28 <= op <= 0x2F or 0x50 <= op <= 0x7F or op == 0xC2 or 0xC4 <= op <= 0xC6
                or (op == 0xAE and i.mod != 3 and 2 <= (i.reg & 7) <= 3) or 0xD0 <= op <= 0xFE)
    if i.map == 2:
        return op < 0xF0 and op != 0x80 and op != 0x81 and op != 0x82
    return True


cdef inline bint _is_opmask(Insn* i) noexcept nogil:
    """AVX-512's mask registers, in VEX encoding: not reported to guests."""
    if i.enc != ENC_VEX:
        return False
    if i.map == 1:
        return 0x41 <= i.opcode <= 0x4B or 0x90 <= i.opcode <= 0x93 or i.opcode == 0x98 or i.opcode == 0x99
    return i.map == 3 and 0x30 <= i.opcode <= 0x33


cdef inline bint _is_simd_66(Insn* i) noexcept nogil:
    """True if a 66 prefix selects the instruction rather than the operand size."""
    if i.map == 0:
        return False
    if i.map == 1:
        return _is_vector(i)
    if i.map == 2:
        return not (op_is_gpr_0f38(i.opcode))
    return True


cdef inline bint op_is_gpr_0f38(uint8_t op) noexcept nogil:
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


cdef void _copy(T* t, int n) noexcept nogil:
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

    if i.opcode == 0x8D and i.map == 0 and i.enc == ENC_LEGACY:
        _lea(t, n)
        return
    if i.attr & A_NO_ACCESS and i.attr & A_MEM:
        return                                   # (prefetch and the like: C_NOP)
    # an 8-bit operand AH-BH: no REX may be emitted
    high8 = 0
    if i.rex == 0 or t.size != 64:
        if (i.attr & A_REG_8 and 4 <= reg <= 7) or (i.attr & A_RM_8 and 4 <= rm <= 7 and (i.mod == 3 or i.attr & A_OPREG)):
            high8 = 1

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
            _ea(t, i, next_rip, 1)
            ld_gs(e, H_T1, OFF(&(<Vcpu*>NULL).tmp1))
            lea_sib(e, H_T0, H_T0, H_T1, 3 if i.opsize == 8 else (2 if i.opsize == 4 else 1), 0, 1 if t.size == 64 else 0)
            _access(t, n, ACCESS_READ if i.mem_access == M_READ else ACCESS_WRITE, i.opsize, live)
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
            _operand(t, n, ACCESS_READ if i.mem_access == M_READ else ACCESS_WRITE, i.mem_width, live)
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
        else:
            k |= 0 if rm & 8 else 0x20
        k |= i.map
        e2(e, 0xC4, k)
        k = i.evex_p[1]
        if _vex_is_c5(i):
            k = i.evex_p[0] & 0x7F               # C5: W = 0
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
                    rex |= 0x41
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
            e1(e, ((reg & 7) << 3) | (base & 7))         # [r10] or [rdi]: neither needs SIB nor displacement
        else:
            e1(e, 0xC0 | ((reg & 7) << 3) | (rm & 7))
    if not (i.attr & A_MOFFS):
        for k in range(i.imm_size):
            e1(e, i.bytes[i.imm_off + k])

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
        _commit(t, n)


cdef inline bint _vex_is_c5(Insn* i) noexcept nogil:
    """C5 P opcode; in C4 P0 P1 opcode, P0 cannot be C5 (no map 5)."""
    return i.bytes[i.opcode_off - 2] == 0xC5


cdef void _lea(T* t, int n) noexcept nogil:
    cdef Insn* i = &t.insns[n]
    cdef Emit* e = &t.e
    cdef int dst = i.reg
    cdef int h
    _ea(t, i, t.rips[n] + i.length, 0)
    h = host_of(dst)
    if special(dst):
        if i.opsize == 8:
            st_gs(e, H_T0, o_gpr(dst))
        elif i.opsize == 4:
            mov_rr32(e, H_T0, H_T0)
            st_gs(e, H_T0, o_gpr(dst))
        else:
            e1(e, 0x66)                          # mov word gs:[slot], r10w: the operand-size prefix stands before GS's
            op_gs(e, 0x89, H_T0, o_gpr(dst), 0)
        return
    if i.opsize == 8:
        mov_rr(e, h, H_T0)
    elif i.opsize == 4:
        mov_rr32(e, h, H_T0)
    else:
        e1(e, 0x66)
        mov_rr32(e, h, H_T0)


# --- stack and branches, 64-bit mode ---------------------------------------------------------------------------------

cdef void _push_host(T* t, int n, int32_t below, int host) noexcept nogil:
    """Store host register (r11 or a guest's) at r10 + below."""
    op_mem(&t.e, 0x89, host, H_T0, below, 1)


cdef bint _is_push_reg(Insn* i) noexcept nogil:
    return i.cls == C_STACK and i.map == 0 and 0x50 <= i.opcode <= 0x57 and i.opsize == 8


cdef bint _is_pop_reg(Insn* i) noexcept nogil:
    return i.cls == C_STACK and i.map == 0 and 0x58 <= i.opcode <= 0x5F and i.opsize == 8 and i.rm != RSP


cdef int _pushes(T* t, int n) noexcept nogil:
    """A run of PUSH register: one check for all. Returns how many instructions it took."""
    cdef Emit* e = &t.e
    cdef int count = 1
    cdef int k, r
    if not t.single:
        while n + count < t.n and count < 8 and _is_push_reg(&t.insns[n + count]) \
                and t.insns[n + count].rm != RSP and t.insns[n].rm != RSP:
            count += 1
    _stack_operand(t, n, RSP, -8 * count, ACCESS_WRITE | (GROUP if count > 1 else 0), 8 * count, t.live[n])
    for k in range(count):
        r = t.insns[n + k].rm
        if special(r):
            ld_gs(e, H_T1, o_gpr(r))
            r = H_T1
        else:
            r = host_of(r)
        op_mem(e, 0x89, r, H_T0, 8 * (count - 1 - k), 1)
    _commit(t, n)
    lea_rd(e, H_GSP, H_GSP, -8 * count, 1)
    return count


cdef int _pops(T* t, int n) noexcept nogil:
    """A run of POP register, and a RET behind it. Returns how many instructions it took."""
    cdef Emit* e = &t.e
    cdef int count = 1
    cdef int ret = 0
    cdef int k, r
    cdef Insn* i
    if not t.single:
        while n + count < t.n and count < 8 and _is_pop_reg(&t.insns[n + count]):
            count += 1
        if n + count < t.n and count < 8:
            i = &t.insns[n + count]
            if i.cls == C_BRANCH and i.map == 0 and i.opcode == 0xC3 and i.opsize == 8:
                ret = 1
    _stack_operand(t, n, RSP, 0, ACCESS_READ | (GROUP if count + ret > 1 else 0), 8 * (count + ret), t.live[n])
    for k in range(count):
        r = t.insns[n + k].rm
        if special(r):
            op_mem(e, 0x8B, H_T1, H_T0, 8 * k, 1)
            st_gs(e, H_T1, o_gpr(r))
        else:
            op_mem(e, 0x8B, host_of(r), H_T0, 8 * k, 1)
    if ret:
        op_mem(e, 0x8B, H_T0, H_T0, 8 * count, 1)
    lea_rd(e, H_GSP, H_GSP, 8 * (count + ret), 1)
    if ret:
        _go_ibt_r10(t)
    return count + ret


cdef void _store_imm64(T* t, uint64_t value) noexcept nogil:
    """mov qword [r10], value; destroys r11"""
    if fits32(value):
        e3(&t.e, 0x49, 0xC7, 0x02)
        e32(&t.e, <uint32_t>value)
    else:
        mov_imm(&t.e, H_T1, value)
        op_mem(&t.e, 0x89, H_T1, H_T0, 0, 1)


cdef bint _stack(T* t, int n, int* took) noexcept nogil:
    """PUSH, POP and LEAVE that are run natively (64-bit mode). False: microcode."""
    cdef Insn* i = &t.insns[n]
    cdef Emit* e = &t.e
    took[0] = 1
    if t.size != 64 or i.opsize != 8:
        return False
    if _is_push_reg(i):
        took[0] = _pushes(t, n)
        return True
    if _is_pop_reg(i):
        took[0] = _pops(t, n)
        return True
    if i.map == 0 and (i.opcode == 0x68 or i.opcode == 0x6A):
        _stack_operand(t, n, RSP, -8, ACCESS_WRITE, 8, t.live[n])
        _store_imm64(t, <uint64_t>i.imm)
        _commit(t, n)
        lea_rd(e, H_GSP, H_GSP, -8, 1)
        return True
    if i.map == 0 and i.opcode == 0xFF and (i.reg & 7) == 6 and i.attr & A_MEM:
        _operand(t, n, ACCESS_READ, 8, t.live[n])
        op_mem(e, 0x8B, H_T1, H_T0, 0, 1)
        st_gs(e, H_T1, OFF(&(<Vcpu*>NULL).tmp0))
        _stack_operand(t, n, RSP, -8, ACCESS_WRITE, 8, t.live[n])
        ld_gs(e, H_T1, OFF(&(<Vcpu*>NULL).tmp0))
        op_mem(e, 0x89, H_T1, H_T0, 0, 1)
        _commit(t, n)
        lea_rd(e, H_GSP, H_GSP, -8, 1)
        return True
    if i.map == 0 and i.opcode == 0xC9:
        _stack_operand(t, n, RBP, 0, ACCESS_READ, 8, t.live[n])
        op_mem(e, 0x8B, H_T1, H_T0, 0, 1)
        lea_rd(e, H_GSP, H_RBP, 8, 1)
        mov_rr(e, H_RBP, H_T1)
        return True
    return False


cdef inline uint64_t _target(T* t, int n) noexcept nogil:
    cdef Insn* i = &t.insns[n]
    cdef uint64_t target = t.rips[n] + i.length + <uint64_t>i.imm
    if t.size == 64:
        return target
    if i.opsize == 2:
        return target & 0xFFFF
    return target & <uint64_t>0xFFFFFFFF


cdef void _load_rm64(T* t, int n) noexcept nogil:
    """tmp0 and r10 = the 64-bit r/m operand of an indirect branch."""
    cdef Insn* i = &t.insns[n]
    cdef Emit* e = &t.e
    if i.attr & A_MEM:
        _operand(t, n, ACCESS_READ, 8, t.live[n])
        op_mem(e, 0x8B, H_T0, H_T0, 0, 1)
    elif special(i.rm):
        ld_gs(e, H_T0, o_gpr(i.rm))
    else:
        mov_rr(e, H_T0, host_of(i.rm))


cdef inline bint _is_jcc(Insn* i) noexcept nogil:
    return i.map == 0 and 0x70 <= i.opcode <= 0x7F or i.map == 1 and 0x80 <= i.opcode <= 0x8F


cdef bint _branch(T* t, int n) noexcept nogil:
    """Near branches that are run natively. False: microcode. The block ends here, but for a conditional branch."""
    cdef Insn* i = &t.insns[n]
    cdef Emit* e = &t.e
    cdef uint64_t next_rip = t.rips[n] + i.length
    cdef uint64_t target
    cdef int back
    cdef uint8_t* skip
    cdef int op = i.opcode
    cdef int sti = 1 if t.next_poll >= 0 else 0     # STI stands before it
    if t.size != 64:
        next_rip &= <uint64_t>0xFFFFFFFF
    if _is_jcc(i):
        target = _target(t, n)
        _jcc_go(t, op & 15, target, target <= t.rips[n] or sti)
        if n + 1 == t.n or sti:
            _go(t, next_rip, sti)
        return True
    if i.map != 0:
        return False
    if op == 0xEB or op == 0xE9:
        target = _target(t, n)
        _go(t, target, target <= t.rips[n] or sti)
        return True
    if 0xE0 <= op <= 0xE3 and i.addrsize >= 4:
        target = _target(t, n)
        back = target <= t.rips[n] or sti
        if i.addrsize == 4:
            e1(e, 0x67)
        e2(e, op, 0x05)
        skip = jmp_fwd(e)
        _go(t, target, back)
        rel32_to(skip, e.p)
        _go(t, next_rip, sti)
        return True
    if t.size != 64:
        return False
    if op == 0xE8:
        _stack_operand(t, n, RSP, -8, ACCESS_WRITE, 8, t.live[n])
        _store_imm64(t, next_rip)
        _commit(t, n)
        lea_rd(e, H_GSP, H_GSP, -8, 1)
        target = _target(t, n)
        _go(t, target, target <= t.rips[n] or sti)
        return True
    if op == 0xC3 or op == 0xC2:
        _stack_operand(t, n, RSP, 0, ACCESS_READ, 8, t.live[n])
        op_mem(e, 0x8B, H_T0, H_T0, 0, 1)
        lea_rd(e, H_GSP, H_GSP, 8 + (<int32_t>(i.imm & 0xFFFF) if op == 0xC2 else 0), 1)
        _go_ibt_r10(t)
        return True
    if op == 0xFF and i.opsize == 8:
        if (i.reg & 7) == 4:
            _load_rm64(t, n)
            _go_ibt_r10(t)
            return True
        if (i.reg & 7) == 2:
            _load_rm64(t, n)
            st_gs(e, H_T0, OFF(&(<Vcpu*>NULL).tmp0))
            _stack_operand(t, n, RSP, -8, ACCESS_WRITE, 8, t.live[n])
            _store_imm64(t, next_rip)
            _commit(t, n)
            lea_rd(e, H_GSP, H_GSP, -8, 1)
            ld_gs(e, H_T0, OFF(&(<Vcpu*>NULL).tmp0))
            _go_ibt_r10(t)
            return True
    return False


# --- string instructions, 64-bit mode --------------------------------------------------------------------------------

cdef void _flags_save(T* t) noexcept nogil:
    """Arithmetic flags to tmp0; destroys r11 only."""
    mov_rr(&t.e, H_T1, H_RAX)
    e1(&t.e, 0x9F)                               # lahf
    e3(&t.e, 0x0F, 0x90, 0xC0)                   # seto al
    st_gs(&t.e, H_RAX, OFF(&(<Vcpu*>NULL).tmp0))
    mov_rr(&t.e, H_RAX, H_T1)


cdef void _flags_restore(T* t) noexcept nogil:
    mov_rr(&t.e, H_T1, H_RAX)
    ld_gs(&t.e, H_RAX, OFF(&(<Vcpu*>NULL).tmp0))
    e2(&t.e, 0x04, 0x7F)                         # add al, 127
    e1(&t.e, 0x9E)                               # sahf
    mov_rr(&t.e, H_RAX, H_T1)


cdef void _string_page(T* t, int pointer, int access, int size_log, int32_t keep, uint8_t** sites, int* n) noexcept nogil:
    """r10 = host address of [pointer], all rcx elements within its page, else to a slow exit. Destroys r11, flags."""
    cdef Emit* e = &t.e
    cdef int32_t table = o_tlb() + t.bank * TLB_ENTRIES * <int32_t>sizeof(TlbEntry)
    mov_rr(e, H_T0, pointer)
    e3(e, 0x45, 0x89, 0xD3)                      # mov r11d, r10d
    e2(e, 0x41, 0xC1)                            # shr r11d, 7
    e2(e, 0xEB, 0x07)
    e3(e, 0x41, 0x81, 0xE3)                      # and r11d, 0x7fe0
    e32(e, (TLB_ENTRIES - 1) * sizeof(TlbEntry))
    e2(e, 0x65, 0x4D)                            # xor r10, gs:[r11 + tag]
    e2(e, 0x33, 0x93)
    e32(e, <uint32_t>(table + (OFF(&(<TlbEntry*>NULL).tag_w) if access == ACCESS_WRITE else 0)))
    e3(e, 0x49, 0x81, 0xFA)                      # cmp r10, 4095
    e32(e, 0xFFF)
    sites[n[0]] = jcc_fwd(e, CC_A)
    n[0] += 1
    e2(e, 0x65, 0x4D)                            # mov r11, gs:[r11 + hva]
    e2(e, 0x8B, 0x9B)
    e32(e, <uint32_t>(table + OFF(&(<TlbEntry*>NULL).hva)))
    st_gs(e, H_T1, keep)
    lea_sib(e, H_T1, H_T0, H_RCX, size_log, 0, 1)
    e3(e, 0x49, 0x81, 0xFB)                      # cmp r11, 4096
    e32(e, 0x1000)
    sites[n[0]] = jcc_fwd(e, CC_A)
    n[0] += 1
    op_gs(e, 0x03, H_T0, keep, 1)                # add r10, gs:[keep]


cdef bint _string(T* t, int n) noexcept nogil:
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
    if t.size != 64 or t.slow or i.addrsize != 8 or i.prefixes & P_SEG or i.map != 0:
        return False
    if not (op == 0xAA or op == 0xAB or op == 0xA4 or op == 0xA5 or ((op & 0xFE) == 0xAC and not rep)):
        return False
    # With REP nothing below can fault, so live flags may stand in tmp0; alone, they stay where they are.
    if live and rep:
        _flags_save(t)
    if rep or not live:
        e1(e, 0x65)                              # cmp byte gs:[dflag], 0
        e3(e, 0x80, 0x3C, 0x25)
        e32(e, <uint32_t>OFF(&(<Vcpu*>NULL).dflag))
        e1(e, 0)
        sites[n_sites] = jcc_fwd(e, CC_NE)
    else:
        mov_rr(e, H_T1, H_RCX)
        e3(e, 0x65, 0x0F, 0xB6)                  # movzx ecx, byte gs:[dflag]
        e2(e, 0x0C, 0x25)
        e32(e, <uint32_t>OFF(&(<Vcpu*>NULL).dflag))
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
            _access(t, n, ACCESS_READ, i.opsize, live)
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
            _access(t, n, ACCESS_WRITE, i.opsize, live)
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
        _flags_restore(t)
    for k in range(n_sites):
        s = _stub(t, K_MICRO, sites[k])
        s.index = n
        s.resume = e.p
        s.poll = live and rep
    return True


# --- system instructions that are worth inline code ------------------------------------------------------------------

cdef bint _system(T* t, int n) noexcept nogil:
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
            e2(e, 0x65, 0x44)                    # movzx r11d, byte gs:[window]
            e3(e, 0x0F, 0xB6, 0x1C)
            e1(e, 0x25)
            e32(e, <uint32_t>OFF(&(<Vcpu*>NULL).window))
            op_gs(e, 0x88, H_T1, o_poll() + 6, 0)
            t.next_poll = n + 1
            return True
        return False
    if i.map == 1 and i.opcode == 0x31:          # RDTSC (CR4.TSD is not honoured: see docs/limits.md)
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


cdef bint _ends_block(Insn* i) noexcept nogil:
    """Microcode behind which the block cannot go on: RIP or the mode may be another."""
    cdef int op = i.opcode
    if i.cls == C_BRANCH or i.cls == C_INVALID:
        return True
    if i.cls != C_SYSTEM:
        return False
    if i.map == 0:
        return op == 0xF4 or op == 0x8E or op == 0xE4 or op == 0xE5 or op == 0xE6 or op == 0xE7 or 0xEC <= op <= 0xEF \
            or op == 0xFB
    if i.map == 1:
        # MOV CR/DR, LMSW and INVLPG (0F 01), CLTS, WRMSR, SYSCALL and its kin, XSETBV
        return op == 0x00 or op == 0x01 or op == 0x05 or op == 0x06 or op == 0x07 or 0x20 <= op <= 0x23 or op == 0x30 \
            or op == 0x32 or op == 0x34 or op == 0x35 or op == 0xB2 or op == 0xB4 or op == 0xB5 or op == 0xA9 or op == 0xA1
    return False


# --- flags -----------------------------------------------------------------------------------------------------------

cdef int _live_at(T* t, uint64_t rip, int depth) noexcept nogil:
    """Flags that may be read from `rip` on before they are overwritten, looking a few instructions ahead in the page."""
    cdef Insn i
    cdef int live = 0
    cdef int todo = FL_ALL
    cdef int k, n
    cdef uint64_t lin
    cdef const uint8_t* code
    if t.straddle:
        return FL_ALL
    for k in range(6):
        lin = rip + t.csbase
        if (lin & ~<uint64_t>0xFFF) != t.page:
            return live | todo
        code = <const uint8_t*>((t.b.hva & ~<uint64_t>0xFFF) + (lin & 0xFFF))
        n = decode(code, 0x1000 - <int>(lin & 0xFFF), t.size, &i)
        if n <= 0 or i.cls == C_INVALID:
            return live | todo
        live |= i.flags_read & todo
        todo &= ~i.flags_killed
        if todo == 0:
            return live
        if i.cls == C_BRANCH:
            if depth > 0 and i.map == 0 and (i.opcode == 0xEB or i.opcode == 0xE9):
                return live | (_live_at(t, rip + n + <uint64_t>i.imm, depth - 1) & todo)
            if depth > 0 and _is_jcc(&i):
                live |= _live_at(t, rip + n + <uint64_t>i.imm, depth - 1) & todo
                if live & todo == todo:
                    return live
                return live | (_live_at(t, rip + n, depth - 1) & todo)
            return live | todo
        if i.cls == C_SYSTEM or i.cls == C_STRING:
            return live | todo
        rip += n
    return live | todo


cdef inline bint _string_inline(Insn* i) noexcept nogil:
    """MOVS, STOS and LODS neither read nor write flags."""
    return i.opcode == 0xAA or i.opcode == 0xAB or i.opcode == 0xA4 or i.opcode == 0xA5 or (i.opcode & 0xFE) == 0xAC


cdef void _liveness(T* t) noexcept nogil:
    cdef int n = t.n
    cdef int live
    cdef Insn* i = &t.insns[n - 1]
    cdef uint64_t next_rip = t.rips[n - 1] + i.length
    cdef int k
    # what is live behind the last instruction matters only if nothing before kills it: looked up when needed
    live = FL_ALL
    if t.size == 64 and not t.slow:
        if i.cls == C_BRANCH:
            if i.map == 0 and (i.opcode == 0xEB or i.opcode == 0xE9 or i.opcode == 0xE8):
                live = _live_at(t, _target(t, n - 1), 1)
            elif _is_jcc(i):
                live = _live_at(t, next_rip, 1)
                if live != FL_ALL:
                    live |= _live_at(t, _target(t, n - 1), 1)
        elif i.cls == C_COPY or i.cls == C_STACK or i.cls == C_NOP:
            live = _live_at(t, next_rip, 1)
    t.live[n] = <uint8_t>live
    for k in range(n - 1, -1, -1):
        i = &t.insns[k]
        live = (t.live[k + 1] & ~i.flags_killed) | i.flags_read
        if i.cls == C_BRANCH and k + 1 < n and live != FL_ALL:
            live |= _live_at(t, _target(t, k), 1) if t.size == 64 else FL_ALL
        if i.cls == C_INVALID or i.cls == C_SYSTEM or (i.cls == C_STRING and not _string_inline(i)):
            live = FL_ALL
        t.live[k] = <uint8_t>live


# --- the block -------------------------------------------------------------------------------------------------------

cdef void _entries(T* t) noexcept nogil:
    """The three entries: indirect (r10 must be the block's RIP), polling, direct."""
    cdef Emit* e = &t.e
    cdef Block* b = t.b
    cdef Stub* s
    b.entry_ind = e.p + e.delta
    if t.slow:
        b.entry_poll = b.entry_direct = b.entry_ind
        return
    # Who comes by the table may be looking for another block of the same slot, which needs the flags: keep them.
    mov_rr(e, H_T1, H_RCX)
    if fits32(0 - b.rip):
        lea_rd(e, H_RCX, H_T0, <int32_t>(0 - b.rip), 1)
    else:
        mov_imm(e, H_RCX, 0 - b.rip)
        lea_sib(e, H_RCX, H_RCX, H_T0, 0, 0, 1)
    e2(e, 0xE3, 8)                               # jrcxz over the next two
    mov_rr(e, H_RCX, H_T1)
    jmp_rx(e, t.c.ibt_miss)
    mov_rr(e, H_RCX, H_T1)
    b.entry_poll = e.p + e.delta
    if not t.live[0]:
        e1(e, 0x65)                              # cmp qword gs:[poll], 0
        e3(e, 0x48, 0x83, 0x3C)
        e1(e, 0x25)
        e32(e, <uint32_t>o_poll())
        e1(e, 0)
        s = _stub(t, K_POLL, jcc_fwd(e, CC_NE))
        s.rip = b.rip
    else:
        mov_rr(e, H_T1, H_RCX)
        ld_gs(e, H_RCX, o_poll())
        e2(e, 0xE3, 8)
        mov_rr(e, H_RCX, H_T1)
        s = _stub(t, K_POLL, jmp_fwd(e))
        s.rip = b.rip
        mov_rr(e, H_RCX, H_T1)
    b.entry_direct = e.p + e.delta


cdef Block* translate(Cache* c, uint64_t rip, const uint8_t* code, int avail, uint64_t hva2, uint64_t mode,
                      int* straddle_needed) noexcept nogil:
    cdef T t
    cdef Block* b
    cdef Insn* i
    cdef uint8_t joined[32]
    cdef const uint8_t* at = code
    cdef int left = avail
    cdef int n, k, took, limit
    cdef uint64_t pc = rip
    cdef uint16_t* mark
    cdef uint8_t* rx0
    cdef int n_jcc = 0
    cdef Vcpu* v = c.vcpu

    straddle_needed[0] = 0
    t.v = v
    t.c = c
    t.mode = mode
    t.slow = 1 if mode & MODE_SLOW else 0
    t.single = 1 if mode & (MODE_SINGLE | MODE_SLOW) else 0
    t.straddle = 0
    k = (mode & MODE_SIZE) >> MODE_SIZE_SHIFT
    t.size = 16 if k == 0 else (32 if k == 1 else 64)
    t.cpl = mode & MODE_CPL
    t.bank = BANK_USER if t.cpl == 3 else (BANK_KERNEL_AC if mode & MODE_AC else BANK_KERNEL)
    t.csbase = (mode >> MODE_CSBASE_SHIFT) if t.size != 64 else 0
    t.page = (rip + t.csbase) & ~<uint64_t>0xFFF
    t.n = 0
    t.n_stubs = 0
    t.next_poll = -1
    limit = 1 if t.slow else MAX_INSNS

    # decode
    if hva2:
        for k in range(avail):
            joined[k] = code[k]
        for k in range(15 - avail):
            joined[avail + k] = (<const uint8_t*>hva2)[k]
        n = decode(joined, 15, t.size, &t.insns[0])
        if n > avail:
            t.straddle = 1
        if n <= 0:
            t.insns[0].cls = C_INVALID
            n = 1
        t.rips[0] = rip
        t.n = 1
        t.insns[0].length = <uint8_t>n
        pc = rip + n
    else:
        while t.n < limit:
            i = &t.insns[t.n]
            n = decode(at, left, t.size, i)
            if n == 0:
                if t.n == 0:
                    straddle_needed[0] = 1
                    return NULL
                break
            if n < 0:
                i.cls = C_INVALID
                i.length = 15
                n = 15
            if i.enc == ENC_EVEX or _is_opmask(i) or (i.enc == ENC_VEX and not mode & MODE_AVX and _is_vector(i)):
                i.cls = C_INVALID
            t.rips[t.n] = pc
            t.n += 1
            pc += n
            at += n
            left -= n
            if i.cls == C_BRANCH and _is_jcc(i) and n_jcc < MAX_JCC and left > 0 and t.n < limit:
                n_jcc += 1
                continue
            if i.cls == C_BRANCH or i.cls == C_INVALID or (_ends_block(i) and not (
                    i.map == 0 and i.opcode == 0xFB and i.cls == C_SYSTEM)):
                break
            if left <= 0:
                break
    if not cache_room(c, MAX_BLOCK_BYTES):
        return NULL
    b = block_new(c)
    if b == NULL:
        return NULL
    t.b = b
    b.rip = rip
    b.hva = <uint64_t>code
    b.mode = mode
    b.straddle = t.straddle
    b.hva2 = hva2 if t.straddle else 0
    b.ibt_slot = <uint32_t>(t.bank * IBT_ENTRIES) + ibt_hash(rip)
    t.e.p = c.at
    t.e.delta = c.rx - c.rw
    _liveness(&t)
    _find_accesses(&t)
    _entries(&t)

    # marks: two bytes of host offset and two of guest offset for each instruction, kept before the next block
    rx0 = b.entry_ind
    cdef uint16_t marks[2 * (MAX_INSNS + 1)]
    cdef int n_marks = 0
    cdef int done = 0
    k = 0
    while k < t.n:
        i = &t.insns[k]
        marks[2 * n_marks] = <uint16_t>(t.e.p + t.e.delta - rx0)
        marks[2 * n_marks + 1] = <uint16_t>(t.rips[k] - rip)
        n_marks += 1
        took = 1
        if mode & MODE_NOFP and (i.cls == C_COPY) and _is_vector(i):
            _micro_end(&t, k)
            done = 1
            break
        if i.cls == C_COPY:
            _copy(&t, k)
        elif i.cls == C_NOP:
            pass
        elif i.cls == C_STACK:
            if not _stack(&t, k, &took):
                if t.slow:
                    _micro_end(&t, k)
                    done = 1
                    break
                _micro_inline(&t, k)
        elif i.cls == C_BRANCH:
            if not _branch(&t, k):
                _micro_end(&t, k)
                done = 1
                break
            if k + 1 == t.n or not _is_jcc(i) or t.next_poll >= 0:
                done = 1
                break
        elif i.cls == C_INVALID:
            _micro_end(&t, k)
            done = 1
            break
        elif i.cls == C_STRING and _string(&t, k):
            pass
        else:
            if not _system(&t, k):
                if t.slow or _ends_block(i):
                    _micro_end(&t, k)
                    done = 1
                    break
                _micro_inline(&t, k)
        k += took
        if took > 1 and t.insns[k - 1].cls == C_BRANCH:
            done = 1                             # POPs with their RET
            break
        if t.next_poll >= 0 and k > t.next_poll and t.insns[k - 1].cls != C_BRANCH:
            # the instruction behind STI is done
            _go(&t, t.rips[k - 1] + t.insns[k - 1].length, 1)
            done = 1
            k = t.n
            break
        if t.n_stubs > MAX_STUBS - 24:
            _go(&t, t.rips[k - 1] + t.insns[k - 1].length, 0)
            done = 1
            break
    if not done:
        pc = t.rips[t.n - 1] + t.insns[t.n - 1].length
        if t.size != 64:
            pc &= <uint64_t>0xFFFFFFFF
        _go(&t, pc, 0)
    b.end = t.e.p + t.e.delta
    _emit_stubs(&t)
    while <uint64_t>t.e.p & 7:
        e1(&t.e, 0xCC)
    b.marks = <uint16_t*>t.e.p
    for k in range(2 * n_marks):
        b.marks[k] = marks[k]
    t.e.p += 4 * n_marks
    b.n_insns = n_marks
    b.guest_len = <uint32_t>(t.rips[t.n - 1] + t.insns[t.n - 1].length - rip)
    while <uint64_t>t.e.p & 15:
        e1(&t.e, 0xCC)
    if not t.slow:
        c.at = t.e.p
    v.n.blocks_translated += 1
    v.n.insns_translated += t.n
    return b
