# cython: language_level=3
"""See debug.pxd."""

from libc.stdint cimport uint32_t, uint64_t

from pyhyve.cpu.bt.codecache cimport MODE_WATCH_SHIFT, Cache, cache_reset
from pyhyve.cpu.bt.mmu cimport mmu_flush_all
from pyhyve.cpu.bt.state cimport *

cdef enum:
    CR4_DE = 1 << 3
    EFER_LMA = 1 << 10
    ATTR_L = 0x2000


cdef inline bint same(Watch* a, Watch* b) noexcept nogil:
    return a.first == b.first and a.last == b.last and a.kinds == b.kinds and a.enabled == b.enabled


cdef Watch register_watch(Vcpu* v, int n) noexcept nogil:
    """What DR`n` asks for. Intel SDM vol 3, "Debug Control Register (DR7)", "Breakpoint Field Recognition"."""
    cdef Watch w
    cdef uint32_t control = <uint32_t>(v.dr[7] >> (16 + 4 * n)) & 15
    cdef uint32_t length = control >> 2
    w.enabled = (v.dr[7] >> (2 * n)) & 3 != 0
    w.kinds = 0
    if control & 3 == 0:
        w.kinds = WATCH_FETCH
        length = 0
    elif control & 3 == 1:
        w.kinds = WATCH_WRITE
    elif control & 3 == 3:
        w.kinds = WATCH_READ | WATCH_WRITE
    elif v.cr4 & CR4_DE:
        w.kinds = WATCH_PORT
    if length == 2:
        length = 7
    w.first = v.dr[n] & ~<uint64_t>length
    w.last = w.first + length
    return w


cdef void debug_update(Vcpu* v) noexcept nogil:
    cdef Watch w
    cdef uint32_t now = v.debug & WATCH_STEP
    cdef uint32_t changed = 0
    cdef uint32_t n = 0
    cdef uint32_t k
    for k in range(WATCHES):
        if k < 4:
            w = register_watch(v, k)
            if not same(&w, &v.watch[k]):
                if w.enabled:
                    changed |= w.kinds
                if v.watch[k].enabled:
                    changed |= v.watch[k].kinds
                v.watch[k] = w
        elif v.watch[k].enabled & 2:
            # new from the monitor
            v.watch[k].enabled &= 1
            changed |= WATCH_READ | WATCH_WRITE | WATCH_FETCH
        if v.watch[k].enabled:
            now |= v.watch[k].kinds
            n = k + 1
    v.n_watches = 4 if 0 < n < 4 else n
    if changed & WATCH_FETCH or (now ^ v.debug) & WATCH_FETCH:
        v.watch_key = 0
        if now & WATCH_FETCH:
            if changed & WATCH_FETCH:
                v.watch_generation += 1
                if v.watch_generation & 0xFF == 0:
                    v.watch_generation += 1
                    if v.cache != NULL:
                        cache_reset(<Cache*>v.cache)
            v.watch_key = (v.watch_generation & 0xFF) << MODE_WATCH_SHIFT
    v.debug = now
    if changed & (WATCH_READ | WATCH_WRITE) and now & (WATCH_READ | WATCH_WRITE):
        mmu_flush_all(v)


cdef int debug_fetch(Vcpu* v, int* alone) noexcept nogil:
    cdef uint64_t lin = v.rip
    cdef uint64_t hits
    cdef uint32_t k
    cdef bint resume = (v.sysflags & F_RF) != 0
    v.sysflags &= ~<uint32_t>F_RF
    if v.debug & WATCH_STEP:
        alone[0] = 1
    if not v.debug & WATCH_FETCH or (v.shadow == SHADOW_SS and not v.amd):
        return R_OK                              # on AMD, MOV SS does not hold back instruction breakpoints
    if not (v.efer & EFER_LMA and v.seg[SEG_CS].attr & ATTR_L):
        lin = (lin + v.seg[SEG_CS].base) & 0xFFFFFFFFULL
    hits = watched(v, lin, lin, WATCH_FETCH)
    if not hits:
        v.watch_skip = 0
        return R_OK
    alone[0] = 1
    if hits >> 4 and v.watch_skip != lin + 1:
        v.watch_skip = lin + 1
        v.sysflags |= F_RF if resume else 0
        v.exit.reason = X_MONITOR_TRAP
        v.exit.length = 0
        v.exit.qualification = hits >> 4
        v.exit.gla = lin
        return R_EXIT
    v.watch_skip = 0
    if resume or not hits & 15:
        return R_OK
    for k in range(4):
        if hits >> k & 1 and v.watch[k].enabled:
            break
    else:
        return R_OK
    v.dr[6] = (v.dr[6] & ~<uint64_t>15) | (hits & 15)
    v.fault_vector = 1
    v.fault_has_error = 0
    v.fault_error = 0
    v.fault_addr = 0
    return R_FAULT


cdef int debug_boundary(Vcpu* v) noexcept nogil:
    cdef uint64_t pending = v.db_pending
    if v.shadow == SHADOW_SS:
        return R_OK
    if pending >> 32:
        v.db_pending = pending & 0xFFFFFFFFULL
        v.exit.reason = X_MONITOR_TRAP
        v.exit.length = 0
        v.exit.qualification = pending >> 32
        v.exit.gla = v.rip
        return R_EXIT
    v.dr[6] = (v.dr[6] & ~<uint64_t>15) | pending
    v.fault_vector = 1
    v.fault_has_error = 0
    v.fault_error = 0
    v.fault_addr = 0
    return R_FAULT
