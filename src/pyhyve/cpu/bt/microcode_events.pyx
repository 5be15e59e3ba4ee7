# cython: language_level=3
"""Exceptions and interrupts through the IDT, and IRET.

Nothing of the vCPU changes before every check and every access has passed. Sources: Intel SDM vol 3, "Interrupt and
Exception Handling", "Exception and Interrupt Handling in 64-bit Mode" and "Conditions for Generating a Double Fault";
vol 2 for IRET.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.debug cimport DR7_GD
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.microcode_ops cimport *
from pyhyve.cpu.bt.microcode_segments cimport *
from pyhyve.cpu.bt.microcode_tasks cimport TASK_EVENT, TASK_IRET, TaskEvent, task_switch
from pyhyve.cpu.bt.microcode_vme cimport vm_restricted, vme_check, vme_interrupt, vme_load, vme_usable
from pyhyve.cpu.bt.mmu cimport mmu_hit, mmu_read, mmu_write, read_u16
from pyhyve.cpu.bt.state cimport *


cdef inline void enter_handler(Vcpu* v, bint interrupt_gate) noexcept nogil:
    v.sysflags &= ~<uint32_t>(F_TF | F_NT | F_RF | F_VM)
    if interrupt_gate:
        v.iflag = 0
    v.shadow = 0


# ---------------------------------------------------------------------------------------------------------------------
# Delivery

cdef int deliver64(Vcpu* v, uint32_t vector, bint software, bint has_error, uint32_t error, uint64_t rip,
                   uint64_t flags) noexcept nogil:
    """Intel SDM vol 3, "64-Bit Mode IDT" and "Stack Switching in IA-32e Mode"."""
    cdef uint32_t ext = 0 if software else 1
    cdef uint32_t code = vector * 8 + 2 + ext
    cdef uint64_t gate[2]
    cdef uint64_t frame[6]
    cdef uint64_t d, sp, target
    cdef uint32_t selector, kind, cpl, ist, words
    cdef uint64_t* p
    cdef int r
    d = sp = 0
    if vector * 16 + 15 > v.idtr.limit:
        return fault_code(v, GP, code)
    r = mmu_read(v, v.idtr.base + vector * 16, gate, 16, BANK_KERNEL)
    if r != R_OK:
        return r
    kind = <uint32_t>(gate[0] >> 40) & 0x1F
    if kind & 0x1E != 0xE or (software and desc_dpl(gate[0]) < v.cpl):
        return fault_code(v, GP, code)
    if not desc_present(gate[0]):
        return fault_code(v, NP, code)
    target = (gate[0] & 0xFFFF) | (gate[0] >> 48 << 16) | (gate[1] << 32)
    selector = <uint32_t>(gate[0] >> 16) & 0xFFFC
    if selector == 0:
        return fault_code(v, GP, ext)
    r = read_descriptor(v, selector, &d)
    if r == R_BAD:
        return fault_code(v, GP, selector | ext)
    if r != R_OK:
        return r
    cpl = desc_dpl(d)
    if not desc_is_code(d) or cpl > v.cpl or not desc_long(d) or desc_db(d):
        return fault_code(v, GP, selector | ext)
    if not desc_present(d):
        return fault_code(v, NP, selector | ext)
    if desc_type(d) & DESC_CONFORMING:
        cpl = v.cpl
    ist = <uint32_t>(gate[0] >> 32) & 7
    if ist:
        r = tss_pointer(v, 0x1C + ist * 8, ext, &sp)
    elif cpl < v.cpl:
        r = tss_pointer(v, 4 + cpl * 8, ext, &sp)
    else:
        sp = v.gpr[RSP]
    if r != R_OK:
        return r
    if not canonical(v, target):
        return fault_code(v, GP, ext)
    words = 6 if has_error else 5
    sp = (sp & ~<uint64_t>15) - words * 8
    p = frame
    if has_error:
        p[0] = error
        p += 1
    p[0] = rip
    p[1] = v.seg[SEG_CS].selector
    p[2] = flags
    p[3] = v.gpr[RSP]
    p[4] = v.seg[SEG_SS].selector
    r = mmu_write(v, sp, frame, words * 8, BANK_KERNEL if cpl < 3 else BANK_USER)
    if r != R_OK:
        if r == R_FAULT and v.fault_vector == GP:
            return fault_code(v, SS, ext)
        return r
    set_segment(v, SEG_CS, selector | cpl, d)
    if cpl != v.cpl:
        set_null(v, SEG_SS, cpl)
        v.cpl = <uint8_t>cpl
        update_bank(v)
    v.gpr[RSP] = sp
    v.rip = target
    enter_handler(v, kind == 0xE)
    return R_OK


cdef inline void put(uint8_t* frame, uint32_t* at, uint32_t size, uint64_t value) noexcept nogil:
    """Add a word to a frame that is built in the order it is popped."""
    if size == 2:
        (<uint16_t*>(frame + at[0]))[0] = <uint16_t>value
    else:
        (<uint32_t*>(frame + at[0]))[0] = <uint32_t>value
    at[0] += size


cdef int deliver32(Vcpu* v, uint32_t vector, bint software, bint has_error, uint32_t error, uint64_t rip,
                   uint64_t flags) noexcept nogil:
    """Intel SDM vol 3, "Exception- or Interrupt-Handler Procedures"; from virtual-8086 mode too."""
    cdef uint32_t ext = 0 if software else 1
    cdef uint32_t code = vector * 8 + 2 + ext
    cdef uint64_t gate, d, sp, target, lin
    cdef uint32_t selector, kind, cpl, size, n, k
    cdef uint8_t frame[40]
    cdef bint inner, vm = (v.sysflags & F_VM) != 0
    cdef TaskEvent event
    cdef Segment ss
    cdef int r
    gate = d = sp = lin = 0
    if vector * 8 + 7 > v.idtr.limit:
        return fault_code(v, GP, code)
    r = mmu_read(v, v.idtr.base + vector * 8, &gate, 8, BANK_KERNEL)
    if r != R_OK:
        return r
    kind = <uint32_t>(gate >> 40) & 0x1F
    if kind != 5 and kind & 0x16 != 6:
        return fault_code(v, GP, code)
    if software and desc_dpl(gate) < v.cpl:
        return fault_code(v, GP, code)
    if not desc_present(gate):
        return fault_code(v, NP, code)
    selector = <uint32_t>(gate >> 16) & 0xFFFC
    if kind == 5:
        event.ext = ext
        event.has_error = has_error
        event.error = error
        return task_switch(v, <uint32_t>(gate >> 16), TASK_EVENT, rip, flags, &event)
    size = 4 if kind & 8 else 2
    target = gate & 0xFFFF
    if size == 4:
        target |= gate >> 48 << 16
    if selector == 0:
        return fault_code(v, GP, ext)
    r = read_descriptor(v, selector, &d)
    if r == R_BAD:
        return fault_code(v, GP, selector | ext)
    if r != R_OK:
        return r
    cpl = desc_dpl(d)
    if not desc_is_code(d) or cpl > v.cpl:
        return fault_code(v, GP, selector | ext)
    if not desc_present(d):
        return fault_code(v, NP, selector | ext)
    if desc_type(d) & DESC_CONFORMING:
        cpl = v.cpl
    if vm and cpl != 0:
        return fault_code(v, GP, selector | ext)
    if target > desc_limit(d):
        return fault_code(v, GP, ext)
    inner = cpl < v.cpl
    if inner:
        r = inner_stack(v, cpl, ext, &ss, &sp)
        if r != R_OK:
            return r
    else:
        ss = v.seg[SEG_SS]
        sp = v.gpr[RSP]
    n = 0
    if has_error:
        put(frame, &n, size, error)
    put(frame, &n, size, rip)
    put(frame, &n, size, v.seg[SEG_CS].selector)
    put(frame, &n, size, flags)
    if inner:
        put(frame, &n, size, v.gpr[RSP] & (0xFFFFFFFFULL if size == 4 else 0xFFFFULL))
        put(frame, &n, size, v.seg[SEG_SS].selector)
        if vm:
            put(frame, &n, size, v.seg[SEG_ES].selector)
            put(frame, &n, size, v.seg[SEG_DS].selector)
            put(frame, &n, size, v.seg[SEG_FS].selector)
            put(frame, &n, size, v.seg[SEG_GS].selector)
    sp = (sp - n) & (0xFFFFFFFFULL if ss.attr & ATTR_DB else 0xFFFFULL)
    r = linear_checked(v, &ss, sp, n, ACCESS_WRITE, &lin, SS)
    if r != R_OK:
        v.fault_error = (ss.selector & 0xFFFC if inner else 0) | ext
        return r
    r = mmu_write(v, lin, frame, n, BANK_KERNEL if cpl < 3 else BANK_USER)
    if r != R_OK:
        return r
    if vm:
        set_null(v, SEG_ES, 0)
        set_null(v, SEG_DS, 0)
        set_null(v, SEG_FS, 0)
        set_null(v, SEG_GS, 0)
    enter_handler(v, kind & 1 == 0)
    if inner:
        v.seg[SEG_SS] = ss
        v.cpl = <uint8_t>cpl
        update_bank(v)
    set_segment(v, SEG_CS, selector | cpl, d)
    if ss.attr & ATTR_DB:
        v.gpr[RSP] = sp
    else:
        v.gpr[RSP] = (v.gpr[RSP] & ~<uint64_t>0xFFFF) | sp
    v.rip = target
    return R_OK


cdef int deliver_real(Vcpu* v, uint32_t vector, uint64_t rip, uint64_t flags) noexcept nogil:
    """Intel SDM vol 3, "Interrupt and Exception Handling" of "Real-Address Mode Operation"."""
    cdef uint16_t words[2]
    cdef uint16_t frame[3]
    cdef uint64_t sp = (v.gpr[RSP] - 6) & sp_mask(v)
    cdef uint64_t lin = 0
    cdef int r
    if vector * 4 + 3 > v.idtr.limit:
        return fault(v, GP)
    r = mmu_read(v, v.idtr.base + vector * 4, words, 4, BANK_KERNEL)
    if r != R_OK:
        return r
    frame[0] = <uint16_t>rip
    frame[1] = <uint16_t>v.seg[SEG_CS].selector
    frame[2] = <uint16_t>flags
    r = linear_checked(v, &v.seg[SEG_SS], sp, 6, ACCESS_WRITE, &lin, SS)
    if r == R_OK:
        r = mmu_write(v, lin, frame, 6, v.bank)
    if r != R_OK:
        return r
    set_sp(v, sp)
    set_real(v, SEG_CS, words[1])
    v.rip = words[0]
    v.iflag = 0
    v.acflag = 0
    v.sysflags &= ~<uint32_t>(F_TF | F_RF)
    v.shadow = 0
    update_bank(v)
    return R_OK


cdef int deliver(Vcpu* v, uint32_t vector, bint software, bint has_error, uint32_t error, uint64_t rip,
                 uint64_t flags) noexcept nogil:
    if v.efer & EFER_LMA:
        return deliver64(v, vector, software, has_error, error, rip, flags)
    if v.cr0 & CR0_PE:
        return deliver32(v, vector, software, has_error, error, rip, flags)
    return deliver_real(v, vector, rip, flags)


cdef inline bint contributory(uint32_t vector) noexcept nogil:
    return vector == DE or 10 <= vector <= 13


cdef int settle(Vcpu* v, uint32_t vector, bint first) noexcept nogil:
    """Deliver the exception in v.fault_*, which came up while `vector` was delivered (or, `first`, on its own)."""
    cdef uint32_t second
    cdef uint64_t flags
    cdef int r
    while True:
        v.n.guest_faults += 1
        second = v.fault_vector
        if second == PF:
            v.cr2 = v.fault_addr
            v.n.guest_page_faults += 1
        if not first:
            if vector == DF:
                v.exit.reason = X_TRIPLE_FAULT
                v.exit.length = 0
                v.exit.qualification = 0
                return R_EXIT
            if (contributory(vector) and contributory(second)) or (
                    vector == PF and (second == PF or contributory(second))):
                second = DF
                v.fault_error = 0
                v.fault_has_error = 1
        first = False
        vector = second
        # A fault's image has RF set, so that an instruction breakpoint does not hit again; a trap's has not.
        flags = get_rflags(v)
        if vector == DB:
            flags |= v.fault_addr & F_RF
            v.dr[7] &= ~<uint64_t>DR7_GD
        elif vector != BP and vector != OF:
            flags |= F_RF
        r = deliver(v, vector, False, v.fault_has_error != 0, <uint32_t>v.fault_error, v.rip, flags)
        if r != R_FAULT:
            return r


cdef int event_exception(Vcpu* v) noexcept nogil:
    return settle(v, 0, True)


cdef int event_interrupt(Vcpu* v, uint32_t vector, bint software, bint has_error, uint64_t error) noexcept nogil:
    cdef uint64_t flags = get_rflags(v)
    # Of exceptions, only those with an error code and #DE are more than benign.
    cdef bint exception = has_error or (not software and vector == DE)
    cdef int r
    if exception:
        flags |= F_RF
    r = deliver(v, vector, software, has_error, <uint32_t>error, v.rip, flags)
    if r == R_FAULT:
        # Interrupts are benign: what came up takes their place.
        r = settle(v, vector if exception else 2, False)
    if r == R_OK and vector == 2 and not software:
        v.nmi_blocked = 1
    return r


# ---------------------------------------------------------------------------------------------------------------------
# INT, IRET

cdef int software_interrupt(Vcpu* v, Insn* i, uint32_t vector) noexcept nogil:
    """INT n, INT3, INTO, INT1; only INT1 passes gates whose DPL is less than CPL."""
    cdef uint64_t pending = v.db_pending & 15
    cdef int r
    cdef bint done
    if v.sysflags & F_VM and i.opcode == 0xCD:
        if v.cr4 & CR4_VME:
            r = vme_interrupt(v, vector, next_rip(v, i), &done)
            if r != R_OK or done:
                return r
        if iopl(v) < 3:
            return gp0(v)
    r = deliver(v, vector, i.opcode != 0xF1, False, 0, next_rip(v, i), get_rflags(v))
    if i.opcode == 0xF1 and r == R_OK:
        v.dr[7] &= ~<uint64_t>DR7_GD
        if pending:
            # what MOV SS held back comes with it
            v.dr[6] = (v.dr[6] & ~<uint64_t>15) | pending
            v.db_pending &= ~pending
    return r


cdef void load_flags(Vcpu* v, uint64_t flags, uint32_t size) noexcept nogil:
    """RFLAGS as IRET changes it, by the privilege at which it runs."""
    cdef uint64_t mask = F_ARITH | F_TF | F_DF | F_NT
    if size != 2:
        mask |= F_RF | F_AC | F_ID
    if v.cpl == 0:
        mask |= F_IOPL
        if size != 2:
            mask |= F_VIF | F_VIP
    if v.cpl <= iopl(v):
        mask |= F_IF
    set_rflags(v, (get_rflags(v) & ~mask) | (flags & mask))


cdef int iret_real(Vcpu* v, Insn* i) noexcept nogil:
    """Real mode, and virtual-8086 mode."""
    cdef uint32_t size = operand_size(v, i)
    cdef uint64_t sp = v.gpr[RSP]
    cdef uint64_t word[3]
    cdef uint64_t mask
    cdef int k, r
    cdef bint restricted = vm_restricted(v)
    if restricted and vme_usable(v, size) != R_OK:
        return R_FAULT
    for k in range(2, -1, -1):
        r = pop_slot(v, sp, k, &word[k], size)
        if r != R_OK:
            return r
    sp += 3 * size
    if word[0] > v.seg[SEG_CS].limit:
        return gp0(v)
    if restricted and vme_check(v, word[2]) != R_OK:
        return R_FAULT
    set_sp(v, sp)
    mask = F_ARITH | F_TF | F_DF | F_NT | F_IF
    if not v.sysflags & F_VM:
        mask |= F_IOPL
    if size == 4:
        mask |= F_RF | F_AC | F_ID
    if restricted:
        vme_load(v, word[2])
    else:
        set_rflags(v, (get_rflags(v) & ~mask) | (word[2] & mask))
    set_real(v, SEG_CS, <uint32_t>word[1])
    v.rip = word[0]
    update_bank(v)
    v.nmi_blocked = 0
    return R_OK


cdef int iret_to_vm(Vcpu* v, uint64_t rip, uint64_t cs, uint64_t flags, uint64_t sp) noexcept nogil:
    """IRET at CPL 0 with VM set in the image: six more words are on the stack."""
    cdef uint64_t word[6]
    cdef int k, r
    for k in range(6):
        word[k] = 0
        r = pop_from(v, &sp, &word[k], 4)
        if r != R_OK:
            return r
    if rip > 0xFFFF:
        return gp0(v)
    set_rflags(v, flags)
    v.cpl = 3
    update_bank(v)
    set_real(v, SEG_CS, <uint32_t>cs)
    v.gpr[RSP] = word[0]
    set_real(v, SEG_SS, <uint32_t>word[1])
    set_real(v, SEG_ES, <uint32_t>word[2])
    set_real(v, SEG_DS, <uint32_t>word[3])
    set_real(v, SEG_FS, <uint32_t>word[4])
    set_real(v, SEG_GS, <uint32_t>word[5])
    v.rip = rip
    v.nmi_blocked = 0
    return R_OK


cdef int return_frame(Vcpu* v, uint64_t sp, uint64_t* word, uint32_t size, bint whole) noexcept nogil:
    """RIP, CS, RFLAGS, and if it is all or the privilege changes RSP and SS; in the order in which AMD's processors load
    them, which is before any check."""
    cdef int k, r
    for k in range(2, -1, -1):
        r = pop_slot(v, sp, k, &word[k], size)
        if r != R_OK:
            return r
    if not whole and (word[1] & 3 == v.cpl or (size == 4 and word[2] & F_VM and v.cpl == 0)):
        return R_OK
    for k in range(4, 2, -1):
        r = pop_slot(v, sp, k, &word[k], size)
        if r != R_OK:
            return r
    return R_OK


cdef int iret(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint32_t size = operand_size(v, i)
    cdef uint64_t sp = v.gpr[RSP]
    cdef uint64_t word[5]
    cdef uint64_t* p
    cdef uint64_t d, ss
    cdef uint32_t selector, rpl
    cdef uint16_t link
    cdef bint outer, long_target
    cdef int k, r
    if not protected(v):
        return iret_real(v, i)
    v.nmi_blocked = 0                            # even if it faults
    if v.sysflags & F_NT:
        if v.efer & EFER_LMA:
            return gp0(v)
        r = read_u16(v, v.seg[SEG_TR].base, BANK_KERNEL, &link)
        return r if r != R_OK else task_switch(v, link, TASK_IRET, next_rip(v, i), get_rflags(v), NULL)
    d = ss = 0
    if is64(v):
        if size == 8 and not sp & 7:
            p = mmu_hit(v, sp, 40, v.bank, ACCESS_READ)
        else:
            p = NULL
        if p != NULL:
            for k in range(5):
                word[k] = p[k]
        else:
            r = return_frame(v, sp, word, size, True)
            if r != R_OK:
                return r
        outer = True
    else:
        r = return_frame(v, sp, word, size, False)
        if r != R_OK:
            return r
        sp += 3 * size
        if size == 4 and word[2] & F_VM and v.cpl == 0 and not v.efer & EFER_LMA:
            return iret_to_vm(v, word[0], word[1], word[2], sp)
        outer = word[1] & 3 > v.cpl
    selector = <uint32_t>word[1] & 0xFFFF
    rpl = selector & 3
    r = check_return_cs(v, selector, &d)
    if r == R_OK:
        r = check_target(v, d, word[0])
    if r != R_OK:
        return r
    if outer:
        long_target = v.efer & EFER_LMA and desc_long(d)
        r = check_return_ss(v, <uint32_t>word[4] & 0xFFFF, rpl, long_target and rpl != 3, &ss)
        if r != R_OK:
            return r
    load_flags(v, word[2], size)
    outer = outer or is64(v)
    set_segment(v, SEG_CS, selector, d)
    if outer:
        if ss:
            set_segment(v, SEG_SS, <uint32_t>word[4] & 0xFFFF, ss)
        else:
            set_null(v, SEG_SS, <uint32_t>word[4] & 0xFFFF)
        set_sp(v, word[3])
    else:
        set_sp(v, sp)
    if rpl != v.cpl:
        v.cpl = <uint8_t>rpl
        drop_inner_segments(v)
    update_bank(v)
    v.rip = word[0]
    v.nmi_blocked = 0
    return R_OK
