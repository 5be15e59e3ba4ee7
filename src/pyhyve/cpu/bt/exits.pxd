# cython: language_level=3
"""The ways out of a block. The hot code jumps to stubs, which stand behind it: misses, links to other blocks, polls,
and microcode."""

from libc.stdint cimport uint8_t, uint64_t

from pyhyve.cpu.bt.context cimport OFF, Stub, T
from pyhyve.cpu.bt.emit cimport *
from pyhyve.cpu.bt.state cimport Vcpu

cdef inline Stub* new_stub(T* t, int kind, uint8_t* site) noexcept nogil:
    """A way out of the block: `site` is the rel32 of the jump to it. What is not set here is by kind."""
    cdef Stub* s = &t.stubs[t.n_stubs]
    t.n_stubs += 1
    s.kind = kind
    s.site = site
    s.resume = NULL
    s.rip = 0
    s.poll = 0
    s.masked = 0
    return s

cdef inline void flags_save(T* t) noexcept nogil:
    """Arithmetic flags to tmp0; destroys r11 only."""
    mov_rr(&t.e, H_T1, H_RAX)
    e1(&t.e, 0x9F)                               # lahf
    e3(&t.e, 0x0F, 0x90, 0xC0)                   # seto al
    st_gs(&t.e, H_RAX, OFF(&(<Vcpu*>NULL).tmp0))
    mov_rr(&t.e, H_RAX, H_T1)

cdef inline void flags_restore(T* t) noexcept nogil:
    mov_rr(&t.e, H_T1, H_RAX)
    ld_gs(&t.e, H_RAX, OFF(&(<Vcpu*>NULL).tmp0))
    e2(&t.e, 0x04, 0x7F)                         # add al, 127
    e1(&t.e, 0x9E)                               # sahf
    mov_rr(&t.e, H_RAX, H_T1)

# Jump to the guest address in r10.
cdef void go_ibt_r10(T* t) noexcept nogil
# CALL: jump there by the host's CALL, so that the host's RET comes back to a pad that goes on at `next_rip`.
cdef void call_go(T* t, uint64_t target, int poll, uint64_t next_rip) noexcept nogil
cdef void call_r10(T* t, uint64_t next_rip) noexcept nogil
# RET: jump to the guest address in r10, by the host's RET.
cdef void ret_r10(T* t) noexcept nogil
# Jump to a guest address known now, always or by a condition; `poll`: by way of the target's polling entry.
cdef void go(T* t, uint64_t target, int poll) noexcept nogil
cdef void jcc_go(T* t, int cc, uint64_t target, int poll) noexcept nogil
# Instruction i runs in microcode: the block ends there, or goes on behind it.
cdef void micro_end(T* t, int i) noexcept nogil
cdef void micro_inline(T* t, int i) noexcept nogil
# Generate the cold part.
cdef void emit_stubs(T* t) noexcept nogil
