# cython: language_level=3
"""Far JMP, CALL and RET, in every mode, and call gates.

Sources: Intel SDM vol 3, "Privilege Levels" and "Call Gates"; vol 2 for the instructions.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.microcode_ops cimport *
from pyhyve.cpu.bt.microcode_segments cimport *
from pyhyve.cpu.bt.microcode_tasks cimport TASK_CALL, TASK_JMP, task_switch, through_task_gate
from pyhyve.cpu.bt.mmu cimport mmu_write, read_u64
from pyhyve.cpu.bt.state cimport *


cdef int far_transfer(Vcpu* v, Insn* i, uint32_t selector, uint64_t offset, uint32_t size, bint call) noexcept nogil:
    cdef uint64_t sp = v.gpr[RSP]
    cdef uint64_t d = 0
    cdef uint64_t value
    cdef uint32_t code, rpl, kind
    cdef int r
    selector &= 0xFFFF
    code = selector & 0xFFFC
    rpl = selector & 3
    if protected(v):
        if code == 0:
            return gp0(v)
        r = read_descriptor(v, selector, &d)
        if r == R_BAD:
            return fault_code(v, GP, code)
        if r != R_OK:
            return r
        if not desc_segment(d):
            kind = desc_type(d)
            if kind == 12 or (kind == 4 and not v.efer & EFER_LMA):
                return through_gate(v, i, selector, d, call)
            if not v.efer & EFER_LMA and kind == 5:
                return through_task_gate(v, selector, d, TASK_CALL if call else TASK_JMP, next_rip(v, i))
            if not v.efer & EFER_LMA and (kind == 1 or kind == 9):
                if desc_dpl(d) < v.cpl or desc_dpl(d) < rpl:
                    return fault_code(v, GP, code)
                return task_switch(v, selector, TASK_CALL if call else TASK_JMP, next_rip(v, i), get_rflags(v), NULL)
            return fault_code(v, GP, code)
        if not desc_is_code(d):
            return fault_code(v, GP, code)
        if desc_type(d) & DESC_CONFORMING:
            if desc_dpl(d) > v.cpl:
                return fault_code(v, GP, code)
        elif rpl > v.cpl or desc_dpl(d) != v.cpl:
            return fault_code(v, GP, code)
        if v.efer & EFER_LMA and desc_long(d) and desc_db(d):
            return fault_code(v, GP, code)
        if not desc_present(d):
            return fault_code(v, NP, code)
        r = check_target(v, d, offset)
        if r != R_OK:
            return r
    elif offset > v.seg[SEG_CS].limit:
        return gp0(v)
    if call:
        value = v.seg[SEG_CS].selector
        r = push_to(v, &sp, &value, size)
        if r != R_OK:
            return r
        value = next_rip(v, i)
        r = push_to(v, &sp, &value, size)
        if r != R_OK:
            return r
        set_sp(v, sp)
    if protected(v):
        set_segment(v, SEG_CS, code | v.cpl, d)
    else:
        set_real(v, SEG_CS, selector)
    v.rip = offset
    return R_OK


cdef int through_gate(Vcpu* v, Insn* i, uint32_t gate_selector, uint64_t gate, bint call) noexcept nogil:
    """A call gate: 16- or 32-bit, or in long mode 64-bit."""
    cdef bint lma = (v.efer & EFER_LMA) != 0
    cdef uint32_t code = gate_selector & 0xFFFC
    cdef uint32_t selector, size, dpl, count, k
    cdef uint64_t offset, d, high, sp, old_sp, lin
    cdef uint64_t frame[4]
    cdef uint32_t params[31]
    cdef uint8_t legacy[4 * 35]
    cdef Segment ss
    cdef int r
    d = high = sp = 0
    if desc_dpl(gate) < v.cpl or desc_dpl(gate) < gate_selector & 3:
        return fault_code(v, GP, code)
    if not desc_present(gate):
        return fault_code(v, NP, code)
    offset = gate & 0xFFFF
    if desc_type(gate) == 12:
        offset |= (gate >> 48) << 16
    size = 4 if desc_type(gate) == 12 else 2
    if lma:
        size = 8
        if (gate_selector | 7) + 8 > (v.seg[SEG_LDTR].limit if gate_selector & 4 else v.gdtr.limit):
            return fault_code(v, GP, code)
        r = read_u64(v, descriptor_at(v, gate_selector) + 8, BANK_KERNEL, &high)
        if r != R_OK:
            return r
        if (high >> 40) & 0x1F:
            return fault_code(v, GP, code)
        offset |= high << 32
    selector = <uint32_t>(gate >> 16) & 0xFFFF
    code = selector & 0xFFFC
    if code == 0:
        return gp0(v)
    r = read_descriptor(v, selector, &d)
    if r == R_BAD:
        return fault_code(v, GP, code)
    if r != R_OK:
        return r
    dpl = desc_dpl(d)
    if not desc_is_code(d) or dpl > v.cpl or (lma and (not desc_long(d) or desc_db(d))):
        return fault_code(v, GP, code)
    if not call and not desc_type(d) & DESC_CONFORMING and dpl != v.cpl:
        return fault_code(v, GP, code)
    if not desc_present(d):
        return fault_code(v, NP, code)
    r = check_target(v, d, offset)
    if r != R_OK:
        return r
    if not call or dpl == v.cpl or desc_type(d) & DESC_CONFORMING:
        if call:
            sp = v.gpr[RSP]
            frame[0] = v.seg[SEG_CS].selector
            frame[1] = next_rip(v, i)
            for k in range(2):
                r = push_to(v, &sp, &frame[k], size)
                if r != R_OK:
                    return r
            set_sp(v, sp)
        set_segment(v, SEG_CS, code | v.cpl, d)
        v.rip = offset
        return R_OK

    # to an inner ring, on its stack
    if lma:
        r = tss_pointer(v, 4 + dpl * 8, 0, &sp)
        if r != R_OK:
            return r
        frame[0] = next_rip(v, i)
        frame[1] = v.seg[SEG_CS].selector
        frame[2] = v.gpr[RSP]
        frame[3] = v.seg[SEG_SS].selector
        sp -= 32
        r = mmu_write(v, sp, frame, 32, BANK_KERNEL)
        if r == R_FAULT and v.fault_vector == GP:
            v.fault_vector = SS
        if r != R_OK:
            return r
        set_null(v, SEG_SS, dpl)
        v.gpr[RSP] = sp
    else:
        r = inner_stack(v, dpl, 0, &ss, &sp)
        if r != R_OK:
            return r
        count = <uint32_t>(gate >> 32) & 31
        old_sp = v.gpr[RSP]
        for k in range(count):
            params[k] = 0
            r = pop_from(v, &old_sp, &params[k], size)
            if r != R_OK:
                return r
        put(legacy, 0, size, next_rip(v, i))
        put(legacy, 1, size, v.seg[SEG_CS].selector)
        for k in range(count):
            put(legacy, 2 + k, size, params[k])
        put(legacy, 2 + count, size, v.gpr[RSP] & sp_mask(v))
        put(legacy, 3 + count, size, v.seg[SEG_SS].selector)
        count = (4 + count) * size
        sp = (sp - count) & (0xFFFFFFFFULL if ss.attr & ATTR_DB else 0xFFFFULL)
        r = linear_checked(v, &ss, sp, count, ACCESS_WRITE, &lin, SS)
        if r != R_OK:
            v.fault_error = ss.selector & 0xFFFC
            return r
        r = mmu_write(v, lin, legacy, count, BANK_KERNEL)
        if r != R_OK:
            return r
        v.seg[SEG_SS] = ss
        set_sp(v, sp)
    set_segment(v, SEG_CS, code | dpl, d)
    v.cpl = <uint8_t>dpl
    update_bank(v)
    v.rip = offset
    return R_OK


cdef inline void put(uint8_t* frame, uint32_t slot, uint32_t size, uint64_t value) noexcept nogil:
    if size == 2:
        (<uint16_t*>frame)[slot] = <uint16_t>value
    else:
        (<uint32_t*>frame)[slot] = <uint32_t>value


cdef int far_return(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint32_t size = operand_size(v, i)
    cdef uint32_t extra = <uint32_t>i.imm & 0xFFFF if i.opcode == 0xCA else 0
    cdef uint64_t sp = v.gpr[RSP]
    cdef uint64_t offset, selector, new_sp, new_ss, d, ss
    cdef uint32_t rpl
    cdef int r
    offset = selector = new_sp = new_ss = d = ss = 0
    # as AMD's processors have it: the selectors first, all that is there to load before any check
    r = pop_slot(v, sp, 1, &selector, size)
    if r == R_OK:
        r = pop_slot(v, sp, 0, &offset, size)
    sp += 2 * size + extra
    if r == R_OK and protected(v) and selector & 3 != v.cpl:
        r = pop_slot(v, sp, 1, &new_ss, size)
        if r == R_OK:
            r = pop_slot(v, sp, 0, &new_sp, size)
    if r != R_OK:
        return r
    selector &= 0xFFFF
    if not protected(v):
        if offset > v.seg[SEG_CS].limit:
            return gp0(v)
        set_sp(v, sp)
        set_real(v, SEG_CS, <uint32_t>selector)
        v.rip = offset
        return R_OK
    r = check_return_cs(v, <uint32_t>selector, &d)
    if r == R_OK:
        r = check_target(v, d, offset)
    if r != R_OK:
        return r
    rpl = <uint32_t>selector & 3
    if rpl == v.cpl:
        set_sp(v, sp)
        set_segment(v, SEG_CS, <uint32_t>selector, d)
        v.rip = offset
        return R_OK
    new_ss &= 0xFFFF
    r = check_return_ss(v, <uint32_t>new_ss, rpl, v.efer & EFER_LMA and desc_long(d) and rpl != 3, &ss)
    if r != R_OK:
        return r
    set_segment(v, SEG_CS, <uint32_t>selector, d)
    if ss:
        set_segment(v, SEG_SS, <uint32_t>new_ss, ss)
    else:
        set_null(v, SEG_SS, <uint32_t>new_ss)
    v.cpl = <uint8_t>rpl
    update_bank(v)
    set_sp(v, new_sp + extra)
    drop_inner_segments(v)
    v.rip = offset
    return R_OK
