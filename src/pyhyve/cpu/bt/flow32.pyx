# cython: language_level=3
"""See flow32.pxd. RSP is host R15; as a 16-bit stack pointer only its low word moves, as a 32-bit one its upper half
becomes 0. With a flat stack, runs of PUSH and of POP share one check, as in 64-bit mode."""

from libc.stdint cimport int32_t, uint32_t, uint64_t

from pyhyve.cpu.bt.access cimport commit_store
from pyhyve.cpu.bt.context cimport *
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.exits cimport go, go_ibt_r10
from pyhyve.cpu.bt.sharing cimport operand, stack_operand
from pyhyve.cpu.bt.state cimport ACCESS_READ, ACCESS_WRITE, RBP, RSP, SEG_SS, Vcpu
from pyhyve.cpu.bt.thunks cimport GROUP

# --- the stack -------------------------------------------------------------------------------------------------------

cdef void _set_sp(T* t, int base, int32_t disp) noexcept nogil:
    """The stack pointer becomes base + disp. Destroys r11 where it is SP."""
    cdef Emit* e = &t.e
    if t.sp16:
        lea_rd(e, H_T1, base, disp, 0)
        e1(e, 0x66)                              # mov r15w, r11w
        e3(e, 0x45, 0x89, 0xDF)
    else:
        lea_rd(e, H_GSP, base, disp, 0)


cdef inline void _store(Emit* e, int reg, int32_t disp, int size) noexcept nogil:
    """mov [r10 + disp], reg"""
    if size == 2:
        e1(e, 0x66)
    op_mem(e, 0x89, reg, H_T0, disp, 0)


cdef inline void _load(Emit* e, int reg, int size) noexcept nogil:
    """mov reg, [r10], zero-extended"""
    if size == 2:
        e2(e, 0x40 | ((reg & 8) >> 1) | 1, 0x0F)     # movzx r32, word [r10]
        e2(e, 0xB7, ((reg & 7) << 3) | 2)
    else:
        op_mem(e, 0x8B, reg, H_T0, 0, 0)


cdef inline void _to_register(Emit* e, int reg, int size) noexcept nogil:
    """mov reg, r10, of the operand's size"""
    if size == 2:
        e1(e, 0x66)
    mov_rr32(e, reg, H_T0)


cdef inline bint _in_run(T* t, Insn* i, int first) noexcept nogil:
    """PUSH (first = 50) or POP (58) of a 32-bit register but ESP."""
    return i.cls == C_STACK and i.map == 0 and first <= i.opcode <= first + 7 and i.opsize == 4 and i.rm != RSP


cdef int _run(T* t, int n, int first) noexcept nogil:
    """How many instructions from n on are PUSH (or POP) that may share a check: 1 where none may."""
    cdef int count = 1
    if t.single or t.sp16 or t.check >> SEG_SS & 1 or not _in_run(t, &t.insns[n], first):
        return 1
    while n + count < t.n and count < 8 and _in_run(t, &t.insns[n + count], first):
        count += 1
    return count


cdef void _push_imm(T* t, int n, uint32_t value, int size) noexcept nogil:
    cdef Emit* e = &t.e
    stack_operand(t, n, RSP, -size, ACCESS_WRITE, size, t.live[n])
    if size == 2:
        e1(e, 0x66)
    e3(e, 0x41, 0xC7, 0x02)                      # mov [r10], imm
    if size == 2:
        e16(e, value & 0xFFFF)
    else:
        e32(e, value)
    commit_store(t, n)
    _set_sp(t, H_GSP, -size)


cdef void _push_tmp0(T* t, int n, int size) noexcept nogil:
    cdef Emit* e = &t.e
    stack_operand(t, n, RSP, -size, ACCESS_WRITE, size, t.live[n])
    ld_gs(e, H_T1, OFF(&(<Vcpu*>NULL).tmp0))
    _store(e, H_T1, 0, size)
    commit_store(t, n)
    _set_sp(t, H_GSP, -size)


cdef bint _push_all(T* t, int n) noexcept nogil:
    """PUSHAD. What it would fault on is found by microcode, word by word."""
    cdef int r
    if t.single or t.sp16 or t.check >> SEG_SS & 1 or t.insns[n].opsize != 4:
        return False
    stack_operand(t, n, RSP, -32, ACCESS_WRITE | GROUP, 32, t.live[n])
    for r in range(8):
        _store(&t.e, host_of(r), 28 - 4 * r, 4)
    commit_store(t, n)
    _set_sp(t, H_GSP, -32)
    return True


cdef bint _pop_all(T* t, int n) noexcept nogil:
    cdef int r
    if t.single or t.sp16 or t.check >> SEG_SS & 1 or t.insns[n].opsize != 4:
        return False
    stack_operand(t, n, RSP, 0, ACCESS_READ | GROUP, 32, t.live[n])
    for r in range(8):
        if r != RSP:
            op_mem(&t.e, 0x8B, r, H_T0, 28 - 4 * r, 0)
    _set_sp(t, H_GSP, 32)
    return True


cdef bint emit_stack32(T* t, int n, int* took) noexcept nogil:
    cdef Insn* i = &t.insns[n]
    cdef Emit* e = &t.e
    cdef int op = i.opcode
    cdef int size = i.opsize
    cdef int k
    if i.map != 0:
        return False
    if 0x50 <= op <= 0x57:
        took[0] = _run(t, n, 0x50)
        stack_operand(t, n, RSP, -size * took[0], ACCESS_WRITE | (GROUP if took[0] > 1 else 0), size * took[0], t.live[n])
        for k in range(took[0]):
            _store(e, host_of(t.insns[n + k].rm), size * (took[0] - 1 - k), size)
        commit_store(t, n)
        _set_sp(t, H_GSP, -size * took[0])
        return True
    if 0x58 <= op <= 0x5F:
        took[0] = _run(t, n, 0x58)
        stack_operand(t, n, RSP, 0, ACCESS_READ | (GROUP if took[0] > 1 else 0), size * took[0], t.live[n])
        if took[0] == 1:
            _load(e, H_T0, size)
            _set_sp(t, H_GSP, size)
            _to_register(e, host_of(i.rm), size)
            return True
        for k in range(took[0]):
            op_mem(e, 0x8B, t.insns[n + k].rm, H_T0, 4 * k, 0)
        _set_sp(t, H_GSP, 4 * took[0])
        return True
    if op == 0x68 or op == 0x6A:
        _push_imm(t, n, <uint32_t>i.imm, size)
        return True
    if op == 0xFF and (i.reg & 7) == 6:
        if i.attr & A_MEM:
            operand(t, n, ACCESS_READ, size, t.live[n])
            _load(e, H_T1, size)
        else:
            mov_rr32(e, H_T1, host_of(i.rm))
        st_gs(e, H_T1, OFF(&(<Vcpu*>NULL).tmp0))
        _push_tmp0(t, n, size)
        return True
    if op == 0xC9:                               # LEAVE
        stack_operand(t, n, RBP, 0, ACCESS_READ, size, t.live[n])
        _load(e, H_T0, size)
        _set_sp(t, H_RBP, size)
        _to_register(e, H_RBP, size)
        return True
    if op == 0x60:
        return _push_all(t, n)
    if op == 0x61:
        return _pop_all(t, n)
    return False


# --- branches --------------------------------------------------------------------------------------------------------

cdef bint emit_branch32(T* t, int n) noexcept nogil:
    cdef Insn* i = &t.insns[n]
    cdef Emit* e = &t.e
    cdef uint32_t next_rip = <uint32_t>(t.rips[n] + i.length)
    cdef uint64_t target
    cdef int size = i.opsize
    cdef int sti = 1 if t.next_poll >= 0 else 0
    if i.map != 0:
        return False
    if i.opcode == 0xE8:
        target = branch_target(t, n)             # within the limit: see emit_branch
        _push_imm(t, n, next_rip, size)
        go(t, target, target <= t.rips[n] or sti)
        return True
    if t.limit < (<uint64_t>0xFFFF if size == 2 else <uint64_t>0xFFFFFFFF):
        return False                             # a target that is not known may be over the limit
    if i.opcode == 0xC3 or i.opcode == 0xC2:
        stack_operand(t, n, RSP, 0, ACCESS_READ, size, t.live[n])
        _load(e, H_T0, size)
        _set_sp(t, H_GSP, size + (<int32_t>(i.imm & 0xFFFF) if i.opcode == 0xC2 else 0))
        go_ibt_r10(t)
        return True
    if i.opcode == 0xFF and ((i.reg & 7) == 4 or (i.reg & 7) == 2):
        if i.attr & A_MEM:
            operand(t, n, ACCESS_READ, size, t.live[n])
            _load(e, H_T0, size)
        elif size == 2:
            e2(e, 0x44 | (host_of(i.rm) >> 3), 0x0F)     # movzx r10d, r16
            e2(e, 0xB7, 0xD0 | (host_of(i.rm) & 7))
        else:
            mov_rr32(e, H_T0, host_of(i.rm))
        if (i.reg & 7) == 2:
            st_gs(e, H_T0, OFF(&(<Vcpu*>NULL).tmp0))
            _push_imm(t, n, next_rip, size)
            ld_gs(e, H_T0, OFF(&(<Vcpu*>NULL).tmp0))
        go_ibt_r10(t)
        return True
    return False
