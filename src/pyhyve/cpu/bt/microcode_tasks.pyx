# cython: language_level=3
"""Task switches by hardware, to 16- and 32-bit tasks, by every way that leads to one.

The switch is in three steps. What can fail in the old task is checked, with every store probed; the old task is saved;
the new one is loaded, and its segment registers are checked in the order of the manual, in the new task. An exit to the
monitor (memory that is not there yet) can come before the new task is loaded only, and takes back what must be, so that
the instruction runs again. Source: Intel SDM vol 3, "Task Switching" (its table gives the checks) and "Task Linking".
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.debug cimport DR6_BT, debug_update
from pyhyve.cpu.bt.microcode_ops cimport *
from pyhyve.cpu.bt.microcode_segments cimport *
from pyhyve.cpu.bt.mmu cimport mmu_load_cr3, mmu_probe_write, mmu_read, mmu_write
from pyhyve.cpu.bt.state cimport *

cdef enum:
    # Offsets in a TSS
    WIDE_SAVED = 0x20        # EIP to GS
    WIDE_SAVED_BYTES = 64
    WIDE_BYTES = 104
    NARROW_SAVED = 0x0E      # IP to DS
    NARROW_SAVED_BYTES = 28
    NARROW_BYTES = 44

    BUSY = 2                 # of a TSS descriptor's type
    DR7_LOCAL = 0x155        # L0-L3 and LE

cdef struct Task:
    uint32_t cr3
    uint32_t eip
    uint32_t eflags
    uint32_t gpr[8]
    uint32_t selector[7]     # ES CS SS DS FS GS, LDTR
    uint32_t trap

cdef struct Loaded:          # a descriptor of the new task, and what reading it gave
    uint64_t d
    int result               # R_OK, R_BAD, or R_FAULT with
    uint32_t vector
    uint64_t error
    uint64_t addr


cdef int read_task(Vcpu* v, uint64_t base, bint wide, Task* t) noexcept nogil:
    cdef uint32_t words[26]
    cdef uint16_t halves[22]
    cdef int k, r
    if wide:
        r = mmu_read(v, base, words, WIDE_BYTES, BANK_KERNEL)
        t.cr3 = words[7]
        t.eip = words[8]
        t.eflags = words[9]
        for k in range(8):
            t.gpr[k] = words[10 + k]
        for k in range(7):
            t.selector[k] = words[18 + k] & 0xFFFF
        t.trap = words[25] & 1
        return r
    r = mmu_read(v, base, halves, NARROW_BYTES, BANK_KERNEL)
    t.cr3 = t.trap = 0
    t.eip = halves[7]
    t.eflags = halves[8]
    for k in range(8):
        t.gpr[k] = halves[9 + k] | 0xFFFF0000U
    for k in range(4):
        t.selector[k] = halves[17 + k]
    t.selector[SEG_FS] = t.selector[SEG_GS] = 0
    t.selector[SEG_LDTR] = halves[21]
    return r


cdef int save_task(Vcpu* v, bint wide, uint64_t rip, uint64_t flags) noexcept nogil:
    """Into the TSS that TR names, which has been probed."""
    cdef uint32_t words[16]
    cdef uint16_t halves[14]
    cdef uint64_t at = v.seg[SEG_TR].base + (WIDE_SAVED if wide else NARROW_SAVED)
    cdef int k, r
    if wide:
        r = mmu_read(v, at, words, WIDE_SAVED_BYTES, BANK_KERNEL)
        if r != R_OK:
            return r
        words[0] = <uint32_t>rip
        words[1] = <uint32_t>flags
        for k in range(8):
            words[2 + k] = <uint32_t>v.gpr[k]
        for k in range(6):
            words[10 + k] = (words[10 + k] & 0xFFFF0000U) | v.seg[k].selector
        return mmu_write(v, at, words, WIDE_SAVED_BYTES, BANK_KERNEL)
    halves[0] = <uint16_t>rip
    halves[1] = <uint16_t>flags
    for k in range(8):
        halves[2 + k] = <uint16_t>v.gpr[k]
    for k in range(4):
        halves[10 + k] = <uint16_t>v.seg[k].selector
    return mmu_write(v, at, halves, NARROW_SAVED_BYTES, BANK_KERNEL)


cdef inline uint64_t type_byte(Vcpu* v, uint32_t selector) noexcept nogil:
    return v.gdtr.base + (selector & 0xFFF8) + 5


cdef int mark(Vcpu* v, uint32_t selector, bint busy) noexcept nogil:
    """Set or clear a TSS descriptor's busy bit."""
    cdef uint8_t byte
    cdef int r = mmu_read(v, type_byte(v, selector), &byte, 1, BANK_KERNEL)
    if r != R_OK:
        return r
    byte = <uint8_t>((byte | BUSY) if busy else (byte & ~BUSY))
    return mmu_write(v, type_byte(v, selector), &byte, 1, BANK_KERNEL)


cdef int look_up(Vcpu* v, uint32_t selector, Loaded* out) noexcept nogil:
    """Read a descriptor, and make sure of its accessed bit. R_EXIT, or R_OK with all else in *out."""
    out.d = 0
    out.result = R_BAD
    if selector & 0xFFFC == 0:
        return R_OK
    out.result = read_descriptor(v, selector, &out.d)
    if out.result == R_OK and desc_segment(out.d) and not desc_type(out.d) & DESC_ACCESSED:
        out.result = mmu_probe_write(v, (v.seg[SEG_LDTR].base if selector & 4 else v.gdtr.base)
                                     + (selector & 0xFFF8) + 5, 1, BANK_KERNEL)
    out.vector = v.fault_vector
    out.error = v.fault_error
    out.addr = v.fault_addr
    return R_EXIT if out.result == R_EXIT else R_OK


cdef int complain(Vcpu* v, Loaded* l, uint32_t vector, uint32_t code) noexcept nogil:
    """The fault of a selector that cannot be loaded: what reading its descriptor met, or `vector`."""
    if l.result == R_FAULT:
        fault_code(v, l.vector, <uint32_t>l.error)
        v.fault_addr = l.addr
        return R_FAULT
    return fault_code(v, vector, code)


cdef void set_ldt(Vcpu* v, uint32_t selector, Loaded* l) noexcept nogil:
    cdef Segment* s = &v.seg[SEG_LDTR]
    s.selector = selector
    if l.result == R_OK and not selector & 4 and (l.d >> 40) & 0x9F == 0x82:
        s.base = desc_base(l.d)
        s.limit = desc_limit(l.d)
        s.attr = desc_attr(l.d)
    else:
        s.base = s.limit = 0
        s.attr = ATTR_UNUSABLE


cdef int load_segments(Vcpu* v, Task* t, Loaded* l, uint32_t ext) noexcept nogil:
    """The checks in the new task, in the order of the SDM's table; segment registers are usable one by one."""
    cdef uint32_t cs = t.selector[SEG_CS]
    cdef uint32_t ss = t.selector[SEG_SS]
    cdef uint32_t code, type_, k
    cdef uint64_t d = l[SEG_CS].d
    code = t.selector[SEG_LDTR] & 0xFFFC | ext
    if t.selector[SEG_LDTR] & 0xFFFC:
        if l[SEG_LDTR].result != R_OK or t.selector[SEG_LDTR] & 4 or (l[SEG_LDTR].d >> 40) & 0x1F != 2:
            return complain(v, &l[SEG_LDTR], TS, code)
    code = cs & 0xFFFC | ext
    if l[SEG_CS].result == R_OK and desc_is_code(d):
        if desc_dpl(d) > (cs & 3) if desc_type(d) & DESC_CONFORMING else desc_dpl(d) != cs & 3:
            return fault_code(v, TS, code)
    code = ss & 0xFFFC | ext
    d = l[SEG_SS].d
    if l[SEG_SS].result != R_OK or not desc_writable_data(d):
        return complain(v, &l[SEG_SS], TS, code)
    if not desc_present(d):
        return fault_code(v, SS, code)
    if desc_dpl(d) != v.cpl:
        return fault_code(v, TS, code)
    if t.selector[SEG_LDTR] & 0xFFFC and not desc_present(l[SEG_LDTR].d):
        return fault_code(v, TS, t.selector[SEG_LDTR] & 0xFFFC | ext)
    code = cs & 0xFFFC | ext
    if l[SEG_CS].result != R_OK or not desc_is_code(l[SEG_CS].d):
        return complain(v, &l[SEG_CS], TS, code)
    if not desc_present(l[SEG_CS].d):
        return fault_code(v, NP, code)
    set_segment(v, SEG_CS, cs, l[SEG_CS].d)
    if ss & 3 != v.cpl:
        return fault_code(v, TS, ss & 0xFFFC | ext)
    set_segment(v, SEG_SS, ss, d)
    for k in range(SEG_ES, SEG_GS + 1):
        if k == SEG_CS or k == SEG_SS or t.selector[k] & 0xFFFC == 0:
            continue
        code = t.selector[k] & 0xFFFC | ext
        d = l[k].d
        type_ = desc_type(d)
        if l[k].result != R_OK or not desc_segment(d) or type_ & 10 == DESC_CODE:
            return complain(v, &l[k], TS, code)
        if not desc_present(d):
            return fault_code(v, NP, code)
        if type_ & 12 != 12 and (desc_dpl(d) < v.cpl or desc_dpl(d) < t.selector[k] & 3):
            return fault_code(v, TS, code)
        set_segment(v, <int>k, t.selector[k], d)
    return R_OK


cdef int task_switch(Vcpu* v, uint32_t selector, int source, uint64_t rip, uint64_t flags, TaskEvent* event) noexcept nogil:
    cdef uint32_t ext = event.ext if event != NULL else 0
    cdef uint32_t code = selector & 0xFFFC | ext
    cdef uint32_t bad = TS if source == TASK_IRET else GP
    cdef uint32_t old = v.seg[SEG_TR].selector
    cdef bint nested = source == TASK_CALL or source == TASK_EVENT
    cdef bint old_wide = v.seg[SEG_TR].attr & 8
    cdef bint wide
    cdef uint64_t d = 0
    cdef uint64_t cr3 = v.cr3
    cdef uint64_t sp, error
    cdef uint16_t link = <uint16_t>old
    cdef Segment ldt = v.seg[SEG_LDTR]
    cdef Loaded l[7]
    cdef Task t
    cdef int k, r
    selector &= 0xFFFF
    # in the old task
    if selector & 4 or selector & 0xFFFC == 0:
        return fault_code(v, bad, code)
    r = read_descriptor(v, selector, &d)
    if r == R_BAD or (r == R_OK and (d >> 40) & 0x17 != (3 if source == TASK_IRET else 1)):
        return fault_code(v, bad, code)
    if r != R_OK:
        return r
    if not desc_present(d):
        return fault_code(v, NP, code)
    wide = desc_type(d) & 8
    if desc_limit(d) < (WIDE_BYTES - 1 if wide else NARROW_BYTES - 1):
        return fault_code(v, TS, code)
    if v.seg[SEG_TR].limit < (WIDE_SAVED + WIDE_SAVED_BYTES - 1 if old_wide else NARROW_SAVED + NARROW_SAVED_BYTES - 1):
        return fault_code(v, TS, old & 0xFFFC | ext)
    r = read_task(v, desc_base(d), wide, &t)
    if r == R_OK:
        r = mmu_probe_write(v, v.seg[SEG_TR].base + (WIDE_SAVED if old_wide else NARROW_SAVED),
                            WIDE_SAVED_BYTES if old_wide else NARROW_SAVED_BYTES, BANK_KERNEL)
    if r == R_OK and nested:
        r = mmu_probe_write(v, desc_base(d), 2, BANK_KERNEL)
    if r == R_OK and source != TASK_IRET:
        r = mmu_probe_write(v, type_byte(v, selector), 1, BANK_KERNEL)
    if r == R_OK and not nested:
        r = mmu_probe_write(v, type_byte(v, old), 1, BANK_KERNEL)
    if r != R_OK:
        return r
    if source == TASK_IRET:
        flags &= ~<uint64_t>F_NT
    r = save_task(v, old_wide, rip, flags)
    if r != R_OK:
        return r
    if not nested:
        mark(v, old, False)
    else:
        mmu_write(v, desc_base(d), &link, 2, BANK_KERNEL)
    if source != TASK_IRET:
        mark(v, selector, True)
    # what the new task's selectors name, in its address space
    if wide and v.cr0 >> 31 & 1:
        mmu_load_cr3(v, t.cr3)
    if not t.eflags & F_VM:
        r = look_up(v, t.selector[SEG_LDTR], &l[SEG_LDTR])
        set_ldt(v, t.selector[SEG_LDTR], &l[SEG_LDTR])
        for k in range(6):
            if r == R_OK:
                r = look_up(v, t.selector[k], &l[k])
    else:
        r = look_up(v, t.selector[SEG_LDTR], &l[SEG_LDTR])
        set_ldt(v, t.selector[SEG_LDTR], &l[SEG_LDTR])
    if r != R_OK:
        if wide and v.cr0 >> 31 & 1:
            mmu_load_cr3(v, cr3)
        v.seg[SEG_LDTR] = ldt
        if source != TASK_IRET:
            mark(v, selector, False)
        if not nested:
            mark(v, old, True)
        return r
    # in the new task
    v.seg[SEG_TR].selector = selector
    v.seg[SEG_TR].base = desc_base(d)
    v.seg[SEG_TR].limit = desc_limit(d)
    v.seg[SEG_TR].attr = desc_attr(d) | BUSY
    v.cr0 |= CR0_TS
    if v.dr[7] & DR7_LOCAL:
        v.dr[7] &= ~<uint64_t>DR7_LOCAL
        debug_update(v)
    for k in range(8):
        v.gpr[k] = t.gpr[k]
    v.rip = t.eip
    set_rflags(v, t.eflags | (F_NT if nested else 0))
    v.shadow = 0
    if t.eflags & F_VM:
        v.cpl = 3
        update_bank(v)
        for k in range(6):
            set_real(v, k, t.selector[k])
        if t.selector[SEG_LDTR] & 0xFFFC and v.seg[SEG_LDTR].attr & ATTR_UNUSABLE:
            return complain(v, &l[SEG_LDTR], TS, t.selector[SEG_LDTR] & 0xFFFC | ext)
    else:
        v.cpl = <uint8_t>(t.selector[SEG_CS] & 3)
        update_bank(v)
        for k in range(6):
            v.seg[k].selector = t.selector[k]
            v.seg[k].base = v.seg[k].limit = 0
            v.seg[k].attr = ATTR_UNUSABLE
        r = load_segments(v, &t, l, ext)
        if r != R_OK:
            return r
    if event != NULL and event.has_error:
        sp = v.gpr[RSP]
        error = event.error
        r = push_to(v, &sp, &error, 4 if wide else 2)
        if r != R_OK:
            if r == R_FAULT and v.fault_vector == SS:
                v.fault_error |= ext
            return r
        set_sp(v, sp)
    if v.rip > v.seg[SEG_CS].limit:
        return fault_code(v, GP, ext)
    if t.trap:
        v.db_pending |= DR6_BT
    return R_OK


cdef int through_task_gate(Vcpu* v, uint32_t selector, uint64_t gate, int source, uint64_t rip) noexcept nogil:
    if desc_dpl(gate) < v.cpl or desc_dpl(gate) < selector & 3:
        return fault_code(v, GP, selector & 0xFFFC)
    if not desc_present(gate):
        return fault_code(v, NP, selector & 0xFFFC)
    return task_switch(v, <uint32_t>(gate >> 16) & 0xFFFF, source, rip, get_rflags(v), NULL)
