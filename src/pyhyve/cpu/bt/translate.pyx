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
    rorx  r11d, r10d, 7; and r11d, 0x7fe0       the TLB entry's offset
    xor   r10, gs:[r11 + tag]             on a hit: the offset in the page
    cmp   r10, 4096 - width; ja miss      wrong page, no permission, or over the page's end
    add   r10, gs:[r11 + hva]             the host address

That destroys flags. Where the guest's flags are still needed (liveness says so: about one access in four), a longer
sequence does the same by LEA, NOT, PEXT and JRCXZ, which leave flags alone.

Every way out of a block is in its cold part, behind the hot code. A block never falls through to another one: it
ends in direct jumps (patched when the target is known, only within a page) or in a jump through Vcpu.ibt.

This file decodes a block and puts its parts together. The parts are: context (what they share), kinds (what an
instruction is), liveness and sharing (found before code is made), access, copy, flow, strings and system (code for the
instructions), exits (the cold part), thunks (what the cold part calls).
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.codecache cimport (
    MODE_AC, MODE_AVX, MODE_AVX512, MODE_CPL, MODE_CSBASE_SHIFT, MODE_NOFP, MODE_REAL, MODE_SINGLE, MODE_SIZE,
    MODE_SIZE_SHIFT, MODE_SLOW,
    Block, Cache,
    block_new, cache_room, ibt_hash,
)
from pyhyve.cpu.bt.context cimport *
from pyhyve.cpu.bt.copy cimport emit_copy
from pyhyve.cpu.bt.debug cimport watched
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.exits cimport emit_stubs, go, micro_end, micro_inline, new_stub
from pyhyve.cpu.bt.flow cimport emit_branch, emit_stack
from pyhyve.cpu.bt.kinds cimport (
    bt_cmpccxadd, ends_block, is_cmpccxadd, is_jcc, is_odd_nop, is_opmask, is_vector,
)
from pyhyve.cpu.bt.liveness cimport find_liveness
from pyhyve.cpu.bt.segments cimport segments_begin
from pyhyve.cpu.bt.sharing cimport find_accesses
from pyhyve.cpu.bt.state cimport BANK_KERNEL, BANK_KERNEL_AC, BANK_USER, IBT_ENTRIES, WATCH_FETCH, Vcpu
from pyhyve.cpu.bt.strings cimport emit_string
from pyhyve.cpu.bt.system cimport emit_system

cdef enum:
    MAX_JCC = 4             # conditional branches that a block goes on behind


cdef bint undefined_here(Vcpu* v, Insn* i, uint64_t mode) noexcept nogil:
    """An instruction that CPUID does not report, or whose registers the guest has not enabled."""
    cdef int feature = i.feature & (V_LENGTH - 1)
    if not v.features >> feature & 1:
        if feature != FT_LZCNT and (feature != FT_BMI1 or i.enc != ENC_LEGACY):
            return True
        i.prefixes &= ~<uint8_t>P_F3             # LZCNT and TZCNT are BSR and BSF there
    if i.feature & V_LENGTH and not v.features >> FT_AVX512VL & 1:
        return True
    if mode & MODE_REAL and i.enc != ENC_LEGACY:
        return True
    if i.enc == ENC_EVEX or is_opmask(i):
        return not mode & MODE_AVX512
    if is_cmpccxadd(i) and not bt_cmpccxadd():
        return True                              # with three registers, a #UD in generated code would come in the middle
    return i.enc == ENC_VEX and not mode & MODE_AVX and is_vector(i)


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
    jmp_rx(e, t.c.ibt_miss[t.bank])
    mov_rr(e, H_RCX, H_T1)
    b.entry_poll = e.p + e.delta
    if not t.live[0]:
        e2(e, 0x48, 0x83)                        # cmp qword [poll], 0
        state_operand(e, 7, o_poll(), 1)
        e1(e, 0)
        s = new_stub(t, K_POLL, jcc_fwd(e, CC_NE))
        s.rip = b.rip
    else:
        mov_rr(e, H_T1, H_RCX)
        ld_gs(e, H_RCX, o_poll())
        e2(e, 0xE3, 8)
        mov_rr(e, H_RCX, H_T1)
        s = new_stub(t, K_POLL, jmp_fwd(e))
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
    t.csbase = (mode >> MODE_CSBASE_SHIFT & <uint64_t>0xFFFFFFFF) if t.size != 64 else 0
    segments_begin(&t)
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
        if n <= 0 or rip + n - 1 > t.limit:
            t.insns[0].cls = C_LIMIT
            n = n if n > 0 else 15
        elif undefined_here(v, &t.insns[0], mode) or is_odd_nop(&t.insns[0]):
            t.insns[0].cls = C_INVALID
        t.rips[0] = rip
        t.n = 1
        t.insns[0].length = <uint8_t>n
        pc = rip + n
    else:
        while t.n < limit:
            if t.n and v.debug & WATCH_FETCH and watched(v, pc + t.csbase, pc + t.csbase, WATCH_FETCH):
                break
            i = &t.insns[t.n]
            n = decode(at, left, t.size, i)
            if n == 0:
                if t.n == 0:
                    straddle_needed[0] = 1
                    return NULL
                break
            if n < 0:
                i.cls = C_LIMIT
                i.length = 15
                n = 15
            if pc + n - 1 > t.limit:
                if t.n:
                    break
                i.cls = C_LIMIT
            elif i.cls != C_LIMIT and (i.feature or i.enc) and undefined_here(v, i, mode) or (
                    i.cls == C_NOP and is_odd_nop(i)):
                i.cls = C_INVALID
            t.rips[t.n] = pc
            t.n += 1
            pc += n
            at += n
            left -= n
            if i.cls == C_BRANCH and is_jcc(i) and n_jcc < MAX_JCC and left > 0 and t.n < limit:
                n_jcc += 1
                continue
            if ends_block(i) and not (i.map == 0 and i.opcode == 0xFB and i.cls == C_SYSTEM):
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
    t.e.state = <uint64_t>v
    find_liveness(&t)
    find_accesses(&t)
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
        if mode & MODE_NOFP and (i.cls == C_COPY) and is_vector(i):
            micro_end(&t, k)
            done = 1
            break
        if i.cls == C_COPY:
            emit_copy(&t, k)
        elif i.cls == C_NOP:
            pass
        elif i.cls == C_STACK:
            if not emit_stack(&t, k, &took):
                if t.slow:
                    micro_end(&t, k)
                    done = 1
                    break
                micro_inline(&t, k)
        elif i.cls == C_BRANCH:
            if not emit_branch(&t, k):
                micro_end(&t, k)
                done = 1
                break
            if k + 1 == t.n or not is_jcc(i) or t.next_poll >= 0:
                done = 1
                break
        elif i.cls == C_INVALID or i.cls == C_LIMIT:
            micro_end(&t, k)
            done = 1
            break
        elif i.cls == C_STRING and emit_string(&t, k):
            pass
        else:
            if not emit_system(&t, k):
                if t.slow or ends_block(i):
                    micro_end(&t, k)
                    done = 1
                    break
                micro_inline(&t, k)
        k += took
        if took > 1 and t.insns[k - 1].cls == C_BRANCH:
            done = 1                             # POPs with their RET
            break
        if t.next_poll >= 0 and k > t.next_poll and t.insns[k - 1].cls != C_BRANCH:
            # the instruction behind STI is done
            go(&t, t.rips[k - 1] + t.insns[k - 1].length, 1)
            done = 1
            k = t.n
            break
        if t.n_stubs > MAX_STUBS - 24:
            go(&t, t.rips[k - 1] + t.insns[k - 1].length, 0)
            done = 1
            break
    if not done:
        pc = t.rips[t.n - 1] + t.insns[t.n - 1].length
        if t.size != 64:
            pc &= <uint64_t>0xFFFFFFFF
        go(&t, pc, 0)
    b.end = t.e.p + t.e.delta
    while <uint64_t>t.e.p & 15:
        e1(&t.e, 0xCC)
    if not t.slow:
        c.at = t.e.p
    t.e.p = c.cold
    emit_stubs(&t)
    while <uint64_t>t.e.p & 7:
        e1(&t.e, 0xCC)
    b.marks = <uint16_t*>t.e.p
    for k in range(2 * n_marks):
        b.marks[k] = marks[k]
    t.e.p += 4 * n_marks
    b.n_insns = n_marks
    b.guest_len = <uint32_t>(t.rips[t.n - 1] + t.insns[t.n - 1].length - rip)
    if not t.slow:
        c.cold = t.e.p
    v.n.blocks_translated += 1
    v.n.insns_translated += t.n
    return b
