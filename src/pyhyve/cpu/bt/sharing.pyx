# cython: language_level=3
"""See sharing.pxd. A register's version counts what may have changed it, so accesses with the same base and version
differ by a constant. RSP's version also survives pushes, pops and constant adds, which are kept track of."""

from libc.stdint cimport int32_t, uint32_t

from pyhyve.cpu.bt.access cimport effective_address, host_address
from pyhyve.cpu.bt.context cimport *
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.segments cimport add_alignment, add_segment
from pyhyve.cpu.bt.state cimport ACCESS_READ, ACCESS_WRITE, RAX, RBP, RCX, RSP, SEG_CS, SEG_DS, SEG_FS, SEG_SS, Vcpu
from pyhyve.cpu.bt.thunks cimport ADDEND, SHARED

# --- before code is made ---------------------------------------------------------------------------------------------

cdef inline int _word(T* t) noexcept nogil:
    return 8 if t.size == 64 else 4


cdef inline bint _flat(T* t, int seg) noexcept nogil:
    """Accesses through the segment are neither moved nor checked."""
    if t.size == 64 or seg > SEG_DS or seg == SEG_CS:
        return seg < SEG_FS and t.size == 64
    return not t.check >> seg & 1


cdef inline bint _push_reg(T* t, Insn* i) noexcept nogil:
    return i.map == 0 and 0x50 <= i.opcode <= 0x57 and i.opsize == _word(t)


cdef inline bint _pop_reg(T* t, Insn* i) noexcept nogil:
    return i.map == 0 and 0x58 <= i.opcode <= 0x5F and i.opsize == _word(t) and i.rm != RSP


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
    if i.masked or i.base > 15 or special(i.base) or i.index != REG_NONE or i.addrsize != _word(t) or i.mem_width == 0:
        return
    if i.attr & (A_MOFFS | A_BITOFF | A_NO_ACCESS) or not _flat(t, i.seg) or i.mem_width > 64:
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


cdef bint _moves_rsp(T* t, Insn* i, int32_t* by) noexcept nogil:
    """ADD or SUB of an immediate, or LEA, that only moves RSP by a constant."""
    if i.cls != C_COPY or i.enc != ENC_LEGACY or i.map != 0 or i.opsize != _word(t):
        return False
    if (i.opcode == 0x81 or i.opcode == 0x83) and i.mod == 3 and i.rm == RSP and -0x100000 < i.imm < 0x100000:
        if (i.reg & 7) == 0:
            by[0] = <int32_t>i.imm
            return True
        if (i.reg & 7) == 5:
            by[0] = -<int32_t>i.imm
            return True
        return False
    if i.opcode == 0x8D and i.reg == RSP and i.base == RSP and i.index == REG_NONE and i.addrsize == _word(t) \
            and -0x100000 < i.disp < 0x100000:
        by[0] = <int32_t>i.disp
        return True
    return False


cdef void find_accesses(T* t) noexcept nogil:
    """Fill t.acc: which accesses go off which value of which register."""
    cdef int n, r
    cdef int word = _word(t)
    cdef int32_t by = 0
    cdef Insn* i
    for r in range(16):
        t.version[r] = 0
    t.sp = 0
    t.n_shares = 0
    for n in range(t.n):
        t.acc[n][0].valid = 0
        t.acc[n][1].valid = 0
        if t.size == 16 or t.single:
            continue
        i = &t.insns[n]
        if i.cls == C_COPY:
            if i.attr & A_MEM:
                _note_operand(t, n, i.mem_access != M_READ)
            if _moves_rsp(t, i, &by):
                t.sp += by
            else:
                _note_writes(t, i)
        elif i.cls == C_STACK:
            if t.sp16 or not _flat(t, SEG_SS):
                _bump_all(t)
            elif _push_reg(t, i) or (i.map == 0 and i.opsize == word and (i.opcode == 0x68 or i.opcode == 0x6A)):
                _note(t, n, 1, RSP, -word, word, 1)
                t.sp -= word
            elif _pop_reg(t, i):
                _note(t, n, 1, RSP, 0, word, 0)
                t.sp += word
                _bump(t, i.rm)
            elif i.map == 0 and i.opcode == 0xFF and i.opsize == word and i.attr & A_MEM:
                _note_operand(t, n, 0)
                _note(t, n, 1, RSP, -word, word, 1)
                t.sp -= word
            elif i.map == 0 and i.opcode == 0xC9 and i.opsize == word:
                _note(t, n, 1, RBP, 0, word, 0)
                _bump(t, RBP)
                _bump(t, RSP)
            else:
                _bump_all(t)
        elif i.cls == C_BRANCH:
            if i.map != 0 or t.sp16 or not _flat(t, SEG_SS) or (t.size != 64 and i.opsize != word):
                continue
            if i.opcode == 0xE8 or i.opcode == 0xFF and (i.reg & 7) == 2:
                if i.opcode == 0xFF and i.attr & A_MEM:
                    _note_operand(t, n, 0)
                _note(t, n, 1, RSP, -word, word, 1)
            elif i.opcode == 0xFF and i.attr & A_MEM:
                _note_operand(t, n, 0)
            elif i.opcode == 0xC3 or i.opcode == 0xC2:
                _note(t, n, 1, RSP, 0, word, 0)
        elif i.cls != C_NOP:
            _bump_all(t)


# --- while it is made ------------------------------------------------------------------------------------------------

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


cdef inline void _at(T* t, int base, int32_t disp) noexcept nogil:
    """r10 is the addend; the operand is at base + disp."""
    if t.size == 64:
        t.at_index = base
        t.at_disp = disp
    else:
        t.at_index = -1
        lea_rd(&t.e, H_T1, base, disp, 0)
        lea_sib(&t.e, H_T0, H_T0, H_T1, 0, 0, 1)


cdef bint _shared(T* t, int n, int k, int32_t off, int32_t disp, uint32_t width, int live) noexcept nogil:
    """The host address of [base + disp], by a check that serves several accesses. False: this one is alone.
    `off` and `width` are of all that this access needs (a group of pushes: more than acc[n][k] says)."""
    cdef Access* a = &t.acc[n][k]
    cdef Emit* e = &t.e
    cdef Share* s
    cdef int j
    cdef int32_t lo, hi
    if not a.valid or t.single:
        return False
    for j in range(t.n_shares):
        s = &t.shares[j]
        if s.base == a.base and s.version == a.version and s.lo <= off and off + <int32_t>width <= s.hi \
                and (s.write or not a.write):
            ld_gs(e, H_T0, o_share(j))
            _at(t, host_of(a.base), disp)
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
    lea_rd(e, H_T0, host_of(a.base), disp + (lo - off), t.size == 64)
    host_address(t, n, (ACCESS_WRITE if a.write else ACCESS_READ) | SHARED | ADDEND, <uint32_t>(hi - lo), live)
    st_gs(e, H_T0, o_share(t.n_shares))
    _at(t, host_of(a.base), disp)
    t.n_shares += 1
    return True


cdef void operand_at(T* t, int n, int access, uint32_t width, int live) noexcept nogil:
    cdef Access* a = &t.acc[n][0]
    cdef Insn* i = &t.insns[n]
    if a.valid and a.width == width and _shared(t, n, 0, a.off, a.disp, width, live):
        return
    effective_address(t, i, t.rips[n] + i.length)
    add_segment(t, i.seg, access, width)
    add_alignment(t, i, width)
    if a.valid and t.size == 64:
        host_address(t, n, access | ADDEND, width, live)
        _at(t, host_of(a.base), a.disp)
    else:
        host_address(t, n, access, width, live)
        t.at_index = -1


cdef void operand(T* t, int n, int access, uint32_t width, int live) noexcept nogil:
    operand_at(t, n, access, width, live)
    if t.at_index >= 0:
        lea_sib(&t.e, H_T0, H_T0, t.at_index, 0, t.at_disp, 1)
        t.at_index = -1


cdef void stack_operand(T* t, int n, int base, int32_t disp, int access, uint32_t width, int live) noexcept nogil:
    cdef Access* a = &t.acc[n][1]
    if a.valid and _shared(t, n, 1, a.off + disp - a.disp, disp, width, live):
        return
    lea_rd(&t.e, H_T0, host_of(base), disp, t.size == 64)
    if t.sp16:
        e2(&t.e, 0x45, 0x0F)                     # movzx r10d, r10w
        e2(&t.e, 0xB7, 0xD2)
    add_segment(t, SEG_SS, access, width)
    add_alignment(t, NULL, width)
    if t.size == 64 and not t.slow:
        host_address(t, n, access | ADDEND, width, live)
        _at(t, host_of(base), disp)
    else:
        host_address(t, n, access, width, live)
        t.at_index = -1
