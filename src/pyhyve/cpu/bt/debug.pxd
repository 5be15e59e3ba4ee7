# cython: language_level=3
"""Watched addresses: the debug registers', and those of the monitor (a debugger, hooks).

Nothing is looked at while nothing is watched. A page with watched data is never in the TLB, so each access to it comes
to a helper, and the one that touches a watched byte runs in a slow block, which notes it in `Vcpu.db_pending`. Where
instructions are watched, blocks end before them, and blocks of one set of addresses are another mode's: so each
watched address is met in the dispatcher. The run loop carries out what is pending between instructions. Source: Intel
SDM vol 3, "Debug Registers", "Debug Exceptions".
"""

from libc.stdint cimport uint32_t, uint64_t

from pyhyve.cpu.bt.state cimport *

cdef enum:
    # db_pending, DR6
    DR6_BD = 1 << 13
    DR6_BS = 1 << 14
    DR6_BT = 1 << 15
    DR7_GD = 1 << 13

cdef extern from *:
    """
    #define PYHYVE_PENDING_STEP ((uint64_t)1 << 63)
    """
    const uint64_t PENDING_STEP "PYHYVE_PENDING_STEP"     # db_pending: the monitor's single step

cdef inline uint64_t watched(Vcpu* v, uint64_t first, uint64_t last, uint32_t kinds) noexcept nogil:
    """Bit n: watch n wants one of `kinds` within [first, last]. 0 if none that is enabled does."""
    cdef uint64_t found = 0
    cdef uint32_t on = 0
    cdef uint32_t k
    for k in range(v.n_watches):
        if v.watch[k].kinds & kinds and first <= v.watch[k].last and last >= v.watch[k].first:
            found |= <uint64_t>1 << k
            on |= v.watch[k].enabled
    return found if on else 0

cdef inline uint64_t data_watched(Vcpu* v, uint64_t lin, uint64_t size, int access) noexcept nogil:
    """As `watched`, for an access that has not been checked yet."""
    if not v.debug & (WATCH_READ | WATCH_WRITE):
        return 0
    return watched(v, lin, lin + size - 1, WATCH_WRITE if access == ACCESS_WRITE else WATCH_READ)

cdef inline void note_hits(Vcpu* v, uint64_t hits) noexcept nogil:
    v.db_pending |= (hits & 15) | (hits >> 4) << 32

cdef inline void note_data(Vcpu* v, uint64_t lin, uint64_t size, int access) noexcept nogil:
    """An access is made: what watches it is pending."""
    if v.debug & (WATCH_READ | WATCH_WRITE):
        note_hits(v, data_watched(v, lin, size, access))

cdef inline void note_port(Vcpu* v, uint64_t port, uint64_t size) noexcept nogil:
    if v.debug & WATCH_PORT:
        note_hits(v, watched(v, port, port + size - 1, WATCH_PORT))

cdef inline bint page_watched(Vcpu* v, uint64_t lin) noexcept nogil:
    """Is data of the page watched? Then it must not be in the TLB."""
    lin &= ~<uint64_t>0xFFF
    return v.debug & (WATCH_READ | WATCH_WRITE) and watched(v, lin, lin + 0xFFF, WATCH_READ | WATCH_WRITE) != 0

# After a change of DR0-DR3, DR7, CR4.DE or of the monitor's watches: what is enabled now, out of generated code.
cdef void debug_update(Vcpu* v) noexcept nogil
# The instruction at RIP is about to run: R_OK; R_FAULT with #DB; R_EXIT to the monitor. *alone: run it by itself.
cdef int debug_fetch(Vcpu* v, int* alone) noexcept nogil
# At an instruction boundary with something pending: R_OK (nothing to do now), R_FAULT with #DB, R_EXIT to the monitor.
cdef int debug_boundary(Vcpu* v) noexcept nogil
