# cython: language_level=3
"""See flow.pxd."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from pyhyve.cpu.bt.access cimport commit_store
from pyhyve.cpu.bt.context cimport *
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.exits cimport call_go, call_r10, go, go_ibt_r10, jcc_go, ret_r10
from pyhyve.cpu.bt.flow32 cimport emit_branch32, emit_stack32
from pyhyve.cpu.bt.kinds cimport is_jcc, is_pop_reg, is_push_reg
from pyhyve.cpu.bt.sharing cimport operand_at, stack_operand
from pyhyve.cpu.bt.state cimport ACCESS_READ, ACCESS_WRITE, RBP, RSP, Vcpu
from pyhyve.cpu.bt.thunks cimport GROUP

# --- stack -----------------------------------------------------------------------------------------------------------

cdef int _pushes(T* t, int n) noexcept nogil:
    """A run of PUSH register: one check for all. Returns how many instructions it took."""
    cdef Emit* e = &t.e
    cdef int count = 1
    cdef int k, r
    if not t.single:
        while n + count < t.n and count < 8 and is_push_reg(&t.insns[n + count]) \
                and t.insns[n + count].rm != RSP and t.insns[n].rm != RSP:
            count += 1
    stack_operand(t, n, RSP, -8 * count, ACCESS_WRITE | (GROUP if count > 1 else 0), 8 * count, t.live[n])
    for k in range(count):
        r = t.insns[n + k].rm
        if special(r):
            ld_gs(e, H_T1, o_gpr(r))
            r = H_T1
        else:
            r = host_of(r)
        at_op(t, 0x89, r, 8 * (count - 1 - k))
    commit_store(t, n)
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
        while n + count < t.n and count < 8 and is_pop_reg(&t.insns[n + count]):
            count += 1
        if n + count < t.n and count < 8:
            i = &t.insns[n + count]
            if i.cls == C_BRANCH and i.map == 0 and i.opcode == 0xC3 and i.opsize == 8:
                ret = 1
    stack_operand(t, n, RSP, 0, ACCESS_READ | (GROUP if count + ret > 1 else 0), 8 * (count + ret), t.live[n])
    for k in range(count):
        r = t.insns[n + k].rm
        if special(r):
            at_op(t, 0x8B, H_T1, 8 * k)
            st_gs(e, H_T1, o_gpr(r))
        else:
            at_op(t, 0x8B, host_of(r), 8 * k)
    if ret:
        at_op(t, 0x8B, H_T0, 8 * count)
    lea_rd(e, H_GSP, H_GSP, 8 * (count + ret), 1)
    if ret:
        ret_r10(t)
    return count + ret


cdef void _store_imm64(T* t, uint64_t value) noexcept nogil:
    """mov qword [the checked operand], value; destroys r11"""
    if fits32(value):
        at_op(t, 0xC7, 0, 0)
        e32(&t.e, <uint32_t>value)
    else:
        mov_imm(&t.e, H_T1, value)
        at_op(t, 0x89, H_T1, 0)


cdef bint emit_stack(T* t, int n, int* took) noexcept nogil:
    """PUSH, POP and LEAVE that are run natively. False: microcode."""
    cdef Insn* i = &t.insns[n]
    cdef Emit* e = &t.e
    took[0] = 1
    if t.size != 64:
        return emit_stack32(t, n, took)
    if i.opsize != 8:
        return False
    if is_push_reg(i):
        took[0] = _pushes(t, n)
        return True
    if is_pop_reg(i):
        took[0] = _pops(t, n)
        return True
    if i.map == 0 and i.opcode == 0x5C and i.rm == RSP:
        stack_operand(t, n, RSP, 0, ACCESS_READ, 8, t.live[n])
        at_op(t, 0x8B, H_GSP, 0)
        return True
    if i.map == 0 and (i.opcode == 0x68 or i.opcode == 0x6A):
        stack_operand(t, n, RSP, -8, ACCESS_WRITE, 8, t.live[n])
        _store_imm64(t, <uint64_t>i.imm)
        commit_store(t, n)
        lea_rd(e, H_GSP, H_GSP, -8, 1)
        return True
    if i.map == 0 and i.opcode == 0xFF and (i.reg & 7) == 6 and i.attr & A_MEM:
        operand_at(t, n, ACCESS_READ, 8, t.live[n])
        at_op(t, 0x8B, H_T1, 0)
        st_gs(e, H_T1, OFF(&(<Vcpu*>NULL).tmp0))
        stack_operand(t, n, RSP, -8, ACCESS_WRITE, 8, t.live[n])
        ld_gs(e, H_T1, OFF(&(<Vcpu*>NULL).tmp0))
        at_op(t, 0x89, H_T1, 0)
        commit_store(t, n)
        lea_rd(e, H_GSP, H_GSP, -8, 1)
        return True
    if i.map == 0 and i.opcode == 0xC9:
        stack_operand(t, n, RBP, 0, ACCESS_READ, 8, t.live[n])
        at_op(t, 0x8B, H_T1, 0)
        lea_rd(e, H_GSP, H_RBP, 8, 1)
        mov_rr(e, H_RBP, H_T1)
        return True
    return False


# --- branches --------------------------------------------------------------------------------------------------------

cdef void _load_rm64(T* t, int n) noexcept nogil:
    """tmp0 and r10 = the 64-bit r/m operand of an indirect branch."""
    cdef Insn* i = &t.insns[n]
    cdef Emit* e = &t.e
    if i.attr & A_MEM:
        operand_at(t, n, ACCESS_READ, 8, t.live[n])
        at_op(t, 0x8B, H_T0, 0)
    elif special(i.rm):
        ld_gs(e, H_T0, o_gpr(i.rm))
    else:
        mov_rr(e, H_T0, host_of(i.rm))


cdef bint emit_branch(T* t, int n) noexcept nogil:
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
        if branch_target(t, n) > t.limit and (is_jcc(i) or i.map == 0 and (0xE0 <= op <= 0xE3 or 0xE8 <= op <= 0xEB)):
            return False                         # #GP if it is taken
    if is_jcc(i):
        target = branch_target(t, n)
        jcc_go(t, op & 15, target, target <= t.rips[n] or sti)
        if n + 1 == t.n or sti:
            go(t, next_rip, sti)
        return True
    if i.map != 0:
        return False
    if op == 0xEB or op == 0xE9:
        target = branch_target(t, n)
        go(t, target, target <= t.rips[n] or sti)
        return True
    if 0xE0 <= op <= 0xE3 and i.addrsize >= 4:
        target = branch_target(t, n)
        back = target <= t.rips[n] or sti
        if i.addrsize == 4:
            e1(e, 0x67)
        if i.prefixes & (P_F2 | P_F3):
            e1(e, 0xF2 if i.prefixes & P_F2 else 0xF3)       # some processors take LOOPNE's condition from these
        e2(e, op, 0x05)
        skip = jmp_fwd(e)
        go(t, target, back)
        rel32_to(skip, e.p)
        go(t, next_rip, sti)
        return True
    if t.size != 64:
        return emit_branch32(t, n)
    if i.opsize != 8:
        return False
    if op == 0xE8:
        stack_operand(t, n, RSP, -8, ACCESS_WRITE, 8, t.live[n])
        _store_imm64(t, next_rip)
        commit_store(t, n)
        lea_rd(e, H_GSP, H_GSP, -8, 1)
        target = branch_target(t, n)
        call_go(t, target, target <= t.rips[n] or sti, next_rip)
        return True
    if op == 0xC3 or op == 0xC2:
        stack_operand(t, n, RSP, 0, ACCESS_READ, 8, t.live[n])
        at_op(t, 0x8B, H_T0, 0)
        lea_rd(e, H_GSP, H_GSP, 8 + (<int32_t>(i.imm & 0xFFFF) if op == 0xC2 else 0), 1)
        ret_r10(t)
        return True
    if op == 0xFF:
        if (i.reg & 7) == 4:
            _load_rm64(t, n)
            go_ibt_r10(t)
            return True
        if (i.reg & 7) == 2:
            _load_rm64(t, n)
            st_gs(e, H_T0, OFF(&(<Vcpu*>NULL).tmp0))
            stack_operand(t, n, RSP, -8, ACCESS_WRITE, 8, t.live[n])
            _store_imm64(t, next_rip)
            commit_store(t, n)
            lea_rd(e, H_GSP, H_GSP, -8, 1)
            ld_gs(e, H_T0, OFF(&(<Vcpu*>NULL).tmp0))
            call_r10(t, next_rip)
            return True
    return False
