# cython: language_level=3
"""See liveness.pxd."""

from libc.stdint cimport uint8_t, uint64_t

from pyhyve.cpu.bt.context cimport *
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.kinds cimport is_jcc, is_string_inline


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
    for k in range(12):
        lin = rip + t.csbase
        if (lin & ~<uint64_t>0xFFF) != t.page:
            return live | todo
        code = <const uint8_t*>((t.b.hva & ~<uint64_t>0xFFF) + (lin & 0xFFF))
        n = decode(code, 0x1000 - <int>(lin & 0xFFF), t.size, &i)
        if n <= 0 or i.cls == C_INVALID or rip + n - 1 > t.limit:
            return live | todo
        # the block relies on these bytes: a store to them drops it
        t.b.look |= <uint64_t>1 << ((lin & 0xFFF) >> 6)
        t.b.look |= <uint64_t>1 << (((lin & 0xFFF) + n - 1) >> 6 & 63)
        live |= i.flags_read & todo
        todo &= ~i.flags_killed
        if todo == 0:
            return live
        if i.cls == C_BRANCH:
            if depth > 0 and i.map == 0 and (i.opcode == 0xEB or i.opcode == 0xE9):
                return live | (_live_at(t, near_target(t, &i, rip + n + <uint64_t>i.imm), depth - 1) & todo)
            if depth > 0 and is_jcc(&i):
                live |= _live_at(t, near_target(t, &i, rip + n + <uint64_t>i.imm), depth - 1) & todo
                if live & todo == todo:
                    return live
                return live | (_live_at(t, rip + n, depth - 1) & todo)
            return live | todo
        if i.cls == C_SYSTEM or i.cls == C_STRING:
            return live | todo
        rip += n
    return live | todo


cdef void find_liveness(T* t) noexcept nogil:
    cdef int n = t.n
    cdef int live
    cdef Insn* i = &t.insns[n - 1]
    cdef uint64_t next_rip = t.rips[n - 1] + i.length
    cdef int k
    # what is live behind the last instruction matters only if nothing before kills it: looked up when needed
    live = FL_ALL
    if not t.slow:
        if i.cls == C_BRANCH:
            if i.map == 0 and (i.opcode == 0xEB or i.opcode == 0xE9 or i.opcode == 0xE8):
                live = _live_at(t, branch_target(t, n - 1), 1)
            elif is_jcc(i):
                live = _live_at(t, next_rip, 1)
                if live != FL_ALL:
                    live |= _live_at(t, branch_target(t, n - 1), 1)
        elif i.cls == C_COPY or i.cls == C_STACK or i.cls == C_NOP:
            live = _live_at(t, next_rip, 1)
    t.live[n] = <uint8_t>live
    for k in range(n - 1, -1, -1):
        i = &t.insns[k]
        live = (t.live[k + 1] & ~i.flags_killed) | i.flags_read
        if i.cls == C_BRANCH and k + 1 < n and live != FL_ALL:
            live |= _live_at(t, branch_target(t, k), 1)
        if i.cls == C_INVALID or i.cls == C_LIMIT or i.cls == C_SYSTEM or (i.cls == C_STRING and not is_string_inline(i)):
            live = FL_ALL
        t.live[k] = <uint8_t>live
