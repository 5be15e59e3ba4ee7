# cython: language_level=3
"""See loop.pxd. Everything here runs while the guest's vector state is live in the host's registers: general registers
only, no call into the C library."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.codecache cimport *
from pyhyve.cpu.bt.debug cimport (
    DR6_BS, PENDING_STEP, data_watched, debug_boundary, debug_fetch, note_data,
)
from pyhyve.cpu.bt.decode cimport C_BRANCH, C_COPY, C_INVALID, C_LIMIT, Insn
from pyhyve.cpu.bt.direct cimport direct_deliver, direct_enter, direct_exit, direct_leave, direct_rest
from pyhyve.cpu.bt.masked cimport bounce_of, masked_address, masked_commit
from pyhyve.cpu.bt.microcode cimport deliver_exception, deliver_interrupt, microcode
from pyhyve.cpu.bt.mmu cimport MMU_CODE, bt_copy, mmu_fetch, mmu_fill, mmu_page, mmu_promote, mmu_write
from pyhyve.cpu.bt.priority cimport access_fault
from pyhyve.cpu.bt.segments cimport CS_LIMITS_FULL, segment_check, segments_forget, segments_mode
from pyhyve.cpu.bt.shared cimport cpu_fence, give_back, set_in_guest, spin_yield
from pyhyve.cpu.bt.state cimport *
from pyhyve.cpu.bt.translate cimport *

ctypedef void (*enter_fn)(Vcpu*, void*) noexcept nogil


cdef inline uint64_t compute_mode(Vcpu* v) noexcept nogil:
    """The mode key of the code that runs now."""
    cdef uint64_t mode = v.cpl
    cdef uint32_t attr = v.seg[SEG_CS].attr
    if v.efer & 0x400 and attr & 0x2000:
        mode |= 2 << MODE_SIZE_SHIFT
    else:
        if attr & 0x4000:
            mode |= 1 << MODE_SIZE_SHIFT
        if not v.cr0 & 1 or v.sysflags & F_VM:
            mode |= MODE_REAL
        mode |= (v.seg[SEG_CS].base & <uint64_t>0xFFFFFFFF) << MODE_CSBASE_SHIFT | segments_mode(v)
    if v.acflag:
        if v.cpl != 3:
            mode |= MODE_AC
        elif v.cr0 & (1 << 18):
            mode |= <uint64_t>1 << MODE_ALIGN_SHIFT
    if v.cr0 & 0xC:
        mode |= MODE_NOFP
    if v.cr4 & (1 << 18) and v.xcr0 & 4:
        mode |= MODE_AVX
        if v.xcr0 & 0xE0:
            mode |= MODE_AVX512
    if v.cr4 & 4 and v.cpl == 3:
        mode |= MODE_TSD
    return mode | v.watch_key


cdef inline void _fault(Vcpu* v, uint32_t vector, int has_error) noexcept nogil:
    v.fault_vector = vector
    v.fault_has_error = has_error
    v.fault_error = 0
    v.fault_addr = 0


# --- helpers called by generated code --------------------------------------------------------------------------------

cdef uint64_t _two_pages(Vcpu* v, uint64_t lin, uint32_t width, int access, int bank, int slow, int* r) noexcept nogil:
    """Where an access over a page's end goes: host address (contiguous pages, or the bounce buffer); 0 with *r set."""
    cdef uint64_t hva1, hva2, info1, info2, buffer
    cdef uint32_t first = 0x1000 - <uint32_t>(lin & 0xFFF)
    cdef uint64_t second = lin + first
    info1 = info2 = 0
    if (lin ^ (lin + width - 1)) >> (56 if v.cr4 & 0x1000 else 47) & 1 and v.efer & 0x400 and lin + width > lin \
            and width != 10:
        _fault(v, 13, 1)                         # the second page's address is not canonical
        r[0] = R_FAULT
        return 0
    r[0] = mmu_page(v, lin, access, bank, &hva1, &info1)
    if r[0] != R_OK:
        return 0
    if not v.mode_key & (2 << MODE_SIZE_SHIFT):
        second &= <uint64_t>0xFFFFFFFF
    r[0] = mmu_page(v, second, access, bank, &hva2, &info2)
    if r[0] != R_OK:
        return 0
    if access == ACCESS_WRITE and (info1 | info2) & MMU_CODE:
        if not slow and (code_overlaps(v, hva1, first) or code_overlaps(v, hva2, width - first)):
            r[0] = R_SLOW
            return 0
        if slow:
            code_written(v, hva1, first)
            code_written(v, hva2, width - first)
    if hva2 == hva1 + first:
        return hva1
    if access == ACCESS_WRITE and not slow:
        r[0] = R_SLOW
        return 0
    # with the alignment of the guest's address, which some instructions check
    buffer = bounce_of(v, lin)
    bt_copy(<void*>buffer, <void*>hva1, first)
    bt_copy(<void*>(buffer + first), <void*>hva2, width - first)
    if access == ACCESS_WRITE:
        v.bounce_lin = lin
        v.bounce_len = width
        v.bounce_bank = bank
        v.bounce_mask = 0
    return buffer


cdef uint64_t _leave_access(Vcpu* v, int r, int group, uint64_t lin, uint32_t width, int access) noexcept nogil:
    cdef Cache* c = <Cache*>v.cache
    cdef Block* b
    cdef uint64_t page, info
    if group:
        # what one of several accesses met is found again, exactly, by the instruction alone: in the block that checks
        # them one by one, without leaving generated code where there is one already
        if v.mode_key & (2 << MODE_SIZE_SHIFT) and mmu_fetch(v, v.rip, v.bank, &page, &info) == R_OK:
            b = block_find(c, page + (v.rip & 0xFFF), v.rip, v.mode_key | MODE_SINGLE)
            if b != NULL and not b.straddle:
                v.tmp2 = <uint64_t>b.entry_direct
                return 1
        v.leave_reason = LEAVE_SINGLE
        v.leave_arg = 0
    elif r == R_EXIT:
        v.leave_reason = LEAVE_EXIT
    elif r == R_SLOW:
        v.leave_reason = LEAVE_SLOW
    else:
        v.leave_reason = LEAVE_FAULT
        access_fault(v, lin, width, access)
    return 0


cdef uint64_t _h_miss(Vcpu* v, uint64_t lin, MissMeta* m) noexcept nogil:
    """A TLB miss in a block: returns the host address and goes on, or leaves."""
    cdef uint64_t hva, info
    cdef int r
    cdef int access = m.access & 3
    cdef int group = m.access & (GROUP | SHARED)
    cdef uint64_t sub = lin if m.access & ADDEND else 0
    cdef int bank = m.bank & 3
    cdef uint32_t width = m.width
    v.rip = m.rip
    v.tmp2 = <uint64_t>m + <uint64_t><int64_t>m.resume
    if m.bank > 3 and segment_check(v, &lin, m.bank, 0, width, access) != R_OK:
        return _leave_access(v, R_FAULT, group, lin, width, access)
    if data_watched(v, lin, width, access):
        return _leave_access(v, R_SLOW, group, lin, width, access)
    if (lin & 0xFFF) + width > 0x1000:
        hva = _two_pages(v, lin, width, access, bank, 0, &r)
        if hva and (not m.access & SHARED or access == ACCESS_READ and hva != bounce_of(v, lin)
                    and (v.mode_key & (2 << MODE_SIZE_SHIFT) or lin + width <= <uint64_t>1 << 32)):
            return hva - sub
        if hva:
            r = R_SLOW
        return _leave_access(v, r, group, lin, width, access)
    hva = mmu_promote(v, lin, width, bank, access)
    if hva:
        return hva - sub
    r = mmu_fill(v, lin, access, bank)
    if r == R_OK:
        return v.tlb[bank * TLB_ENTRIES + ((lin >> 12) & (TLB_ENTRIES - 1))].hva + (lin & 0xFFF) - sub
    if r == R_SLOW and not m.access & SHARED:
        r = mmu_page(v, lin, access, bank, &hva, &info)
        if r == R_OK:
            if not code_overlaps(v, hva, width):
                return hva - sub
            r = R_SLOW
    return _leave_access(v, r, group, lin, width, access)


cdef uint64_t _h_masked(Vcpu* v, uint64_t lin, MaskMeta* m) noexcept nogil:
    """An access under a mask, which no TLB entry allows as a whole."""
    cdef int r = R_OK
    cdef uint64_t hva
    v.rip = m.miss.rip
    v.tmp2 = <uint64_t>m + <uint64_t><int64_t>m.miss.resume
    hva = masked_address(v, lin, m, &r)
    return hva if hva else _leave_access(v, r, 0, lin, m.miss.width, m.miss.access)


cdef uint64_t _h_slow(Vcpu* v, uint64_t lin, MissMeta* m) noexcept nogil:
    """Every access of a slow block."""
    cdef uint64_t hva
    cdef uint64_t info = 0
    cdef int bank = m.bank & 3
    cdef int r
    v.rip = m.rip
    v.tmp2 = <uint64_t>m + <uint64_t><int64_t>m.resume
    if m.bank > 3 and segment_check(v, &lin, m.bank, 0, m.width, m.access) != R_OK:
        return _leave_access(v, R_FAULT, 0, lin, m.width, m.access)
    if (lin & 0xFFF) + m.width > 0x1000:
        hva = _two_pages(v, lin, m.width, m.access, bank, 1, &r)
    else:
        hva = 0
        r = mmu_page(v, lin, m.access, bank, &hva, &info)
        if r == R_OK and info & MMU_CODE and m.access == ACCESS_WRITE:
            code_written(v, hva, m.width)
    if r != R_OK:
        return _leave_access(v, r, 0, lin, m.width, m.access)
    note_data(v, lin, m.width, m.access)
    return hva


cdef uint64_t _h_commit(Vcpu* v, uint64_t lin, MissMeta* m) noexcept nogil:
    """Behind a slow block's store: carry the bounce buffer out."""
    v.tmp2 = <uint64_t>m + <uint64_t><int64_t>m.resume
    if v.bounce_len:
        if v.bounce_mask:
            masked_commit(v)
        else:
            mmu_write(v, v.bounce_lin, <void*>bounce_of(v, v.bounce_lin), v.bounce_len, <int>v.bounce_bank)
        v.bounce_len = 0
    return 1


cdef uint64_t _h_micro(Vcpu* v, MicroMeta* m) noexcept nogil:
    """Run one instruction in microcode in the middle of a block."""
    cdef uint64_t dropped = v.drop_gen
    cdef int r
    v.rip = m.rip
    v.n.microcode += 1
    (<Cache*>v.cache).micro_ops[((m.insn.map & 3) << 8) | m.insn.opcode] += 1
    if m.insn.opcode == 0x90 and (<Cache*>v.cache).shared.n_vcpus > 1:
        # PAUSE: the vCPU that is waited for may have no host processor
        (<Cache*>v.cache).pauses += 1
        if ((<Cache*>v.cache).pauses & 31) == 0:
            spin_yield((<Cache*>v.cache).shared)
    r = microcode(v, &m.insn)
    if r != R_OK:
        v.leave_reason = LEAVE_EXIT if r == R_EXIT else LEAVE_FAULT
        return 0
    if v.rip != m.rip + m.insn.length or v.poll or v.drop_gen != dropped or v.shadow or v.sysflags & F_TF \
            or v.db_pending or compute_mode(v) != v.mode_key or (v.window and v.iflag):
        v.leave_reason = LEAVE_BRANCH
        return 0
    v.tmp2 = <uint64_t>m + <uint64_t><int64_t>m.resume
    return 1


cdef void loop_init(Cache* c) noexcept nogil:
    make_thunks(c, _h_miss, <miss_fn>_h_masked, _h_slow, _h_commit, _h_micro)
    cache_reset(c)
    c.vcpu.n.cache_flushes = 0


cdef uint64_t loop_guest_rip(Cache* c, uint64_t rx, int* found) noexcept nogil:
    cdef Block* b = block_at_host(c, rx)
    cdef uint32_t k
    cdef uint64_t offset, guest
    found[0] = 0
    if b == NULL:
        return 0
    offset = rx - <uint64_t>b.entry_ind
    guest = 0
    for k in range(b.n_insns):
        if b.marks[2 * k] > offset:
            break
        guest = b.marks[2 * k + 1]
    found[0] = 1
    return b.rip + guest


# --- the loop --------------------------------------------------------------------------------------------------------

cdef int _block(Vcpu* v, Cache* c, uint64_t mode, Block** out) noexcept nogil:
    """The block at v.rip for `mode`, translated if need be. R_SLOW: try again."""
    cdef uint64_t lin = v.rip
    cdef uint64_t page, page2, info
    cdef Block* b
    cdef int r, straddle
    cdef int bank = v.bank
    cdef uint8_t snapshot[MAX_INSNS * 15 + 16]
    cdef uint32_t n, k
    cdef uint64_t dropped
    if not mode & (2 << MODE_SIZE_SHIFT):
        lin = (lin + (mode >> MODE_CSBASE_SHIFT)) & <uint64_t>0xFFFFFFFF
        if v.rip > v.seg[SEG_CS].limit:
            _fault(v, 13, 1)
            return R_FAULT
    r = mmu_fetch(v, lin, bank, &page, &info)
    if r != R_OK:
        return r
    page += lin & 0xFFF
    if not mode & MODE_SLOW:
        b = block_find(c, page, v.rip, mode)
        if b != NULL:
            if not b.straddle:
                out[0] = b
                return R_OK
            r = mmu_fetch(v, (lin & ~<uint64_t>0xFFF) + 0x1000, bank, &page2, &info)
            if r != R_OK:
                return r
            if page2 == b.hva2 or (b.hva2 == 0 and page2 == page & ~<uint64_t>0xFFF):
                out[0] = b
                return R_OK
            code_written(v, page, 1)
    b = translate(c, v.rip, <const uint8_t*>page, 0x1000 - <int>(lin & 0xFFF), 0, mode, &straddle)
    if b == NULL and straddle:
        r = mmu_fetch(v, (lin & ~<uint64_t>0xFFF) + 0x1000, bank, &page2, &info)
        if r != R_OK:
            return r
        b = translate(c, v.rip, <const uint8_t*>page, 0x1000 - <int>(lin & 0xFFF), page2, mode, &straddle)
        if b == NULL:
            cache_reset(c)
            b = translate(c, v.rip, <const uint8_t*>page, 0x1000 - <int>(lin & 0xFFF), page2, mode, &straddle)
    elif b == NULL:
        cache_reset(c)
        b = translate(c, v.rip, <const uint8_t*>page, 0x1000 - <int>(lin & 0xFFF), 0, mode, &straddle)
    if b == NULL:
        v.exit.reason = X_ENGINE_ERROR
        v.exit.qualification = 1
        return R_EXIT
    if not mode & MODE_SLOW:
        # a copy of the bytes that were translated tells whether another vCPU stored to them meanwhile
        n = b.guest_len if not straddle and not b.straddle else 0
        for k in range(n):
            snapshot[k] = (<uint8_t*>page)[k]
        dropped = v.drop_gen
        if not block_add(c, b):
            cache_reset(c)
            return R_SLOW
        if c.shared.n_vcpus > 1:
            if v.drop_gen != dropped:
                return R_SLOW
            for k in range(n):
                if snapshot[k] != (<uint8_t*>page)[k]:
                    code_written(v, page, n)
                    return R_SLOW
    out[0] = b
    return R_OK


cdef int _inject(Vcpu* v) noexcept nogil:
    cdef int r
    v.inject_valid = 0
    if v.inject_type == 3:
        v.fault_vector = v.inject_vector
        v.fault_has_error = v.inject_has_error
        v.fault_error = v.inject_error
        v.fault_addr = v.cr2 if v.inject_vector == 14 else 0
        r = deliver_exception(v)
    else:
        r = deliver_interrupt(v, v.inject_vector, v.inject_type == 4, v.inject_has_error, v.inject_error)
    if r == R_EXIT and v.exit.reason != X_TRIPLE_FAULT:
        v.inject_valid = 1
    elif v.inject_type != 3:
        v.n.interrupts += 1
    v.shadow = 0
    return r


cdef bint _behind_sti(Vcpu* v) noexcept nogil:
    """Whether the byte before RIP is that of STI, which sets no shadow where it is carried out in one with the next
    instruction. It may be the end of another instruction: then an interrupt comes one instruction later than it could."""
    cdef Exit kept
    cdef uint64_t page, info
    cdef uint64_t lin = v.rip - 1
    cdef bint found
    if not v.iflag:
        return False
    if not (v.efer & 0x400 and v.seg[SEG_CS].attr & 0x2000):
        lin = (lin + v.seg[SEG_CS].base) & <uint64_t>0xFFFFFFFF
    kept = v.exit
    found = mmu_fetch(v, lin, v.bank, &page, &info) == R_OK and (<uint8_t*>(page + (lin & 0xFFF)))[0] == 0xFB
    v.exit = kept
    return found


cdef int loop_run(Vcpu* v) noexcept nogil:
    cdef Cache* c = <Cache*>v.cache
    cdef int r
    set_in_guest(&c.inbox, 1)
    inbox_process(c)
    if c.apic.direct and not v.debug & WATCH_STEP:
        direct_enter(c)
        r = X_HLT
        if not c.apic.resting or direct_rest(v, c):
            while True:
                direct_deliver(v, c)
                r = _loop(v)
                if not direct_exit(v, c, &r):
                    break
        direct_leave(c)
    else:
        v.window = <uint8_t>c.apic.monitor_window
        r = _loop(v)
    set_in_guest(&c.inbox, 0)
    return r


cdef int _loop(Vcpu* v) noexcept nogil:
    cdef Cache* c = <Cache*>v.cache
    cdef enter_fn enter = <enter_fn>c.enter
    cdef uint8_t* poll = <uint8_t*>&v.poll
    cdef uint64_t mode, dropped, at, begun
    cdef Block* b = NULL
    cdef LinkMeta* link = NULL
    cdef MicroMeta* micro
    cdef int r
    cdef int slow = 0
    cdef uint8_t held
    cdef uint64_t single = 0
    cdef int step
    cdef uint8_t* site
    cdef Insn insn

    update_bank(v)
    v.bounce_len = 0
    while True:
        if v.db_pending:
            r = debug_boundary(v)
            if r == R_EXIT:
                return v.exit.reason
            if r == R_FAULT:
                slow = 0
                if deliver_exception(v) == R_EXIT:
                    return v.exit.reason
                v.db_pending = 0
                v.shadow = 0
                update_bank(v)
        if v.inject_valid:
            if _inject(v) == R_EXIT:
                return v.exit.reason
            update_bank(v)
            if v.db_pending:
                continue
        if v.poll:
            poll[6] = 0
            poll[5] = 0
            poll[7] = 0
            # who sets these bytes has stored before what they tell of: do not look at that before they are clear
            cpu_fence()
            inbox_process(c)
            if v.kick:
                v.kick = 0
                v.exit.reason = X_EXTERNAL_INTERRUPT
                return X_EXTERNAL_INTERRUPT
            if c.apic.asked:
                c.apic.asked = 0
                if c.apic.running:
                    v.exit.reason = X_INTERRUPT_WINDOW
                    return X_INTERRUPT_WINDOW
        if not v.shadow:
            if v.window and v.iflag:
                v.exit.reason = X_INTERRUPT_WINDOW
                return X_INTERRUPT_WINDOW
            if v.nmi_window and not v.nmi_blocked:
                v.exit.reason = X_NMI_WINDOW
                return X_NMI_WINDOW
        elif not slow:
            slow = 1
        step = v.sysflags & F_TF
        if step:
            slow = 1
        if v.sysflags & F_RF or v.debug & (WATCH_FETCH | WATCH_STEP):
            r = debug_fetch(v, &slow)
            if r == R_EXIT:
                return v.exit.reason
            if r == R_FAULT:
                link = NULL
                slow = 0
                single = 0
                if deliver_exception(v) == R_EXIT:
                    return v.exit.reason
                update_bank(v)
                continue
        v.n.dispatches += 1
        mode = compute_mode(v)
        if mode >> MODE_LIMIT_SHIFT & CS_LIMITS_FULL == CS_LIMITS_FULL:
            cache_reset(c)
            segments_forget(v)
            link = NULL
            mode = compute_mode(v)
        if (mode & ~<uint64_t>MODE_BANK_BITS) != v.ibt_mode:
            v.ibt_mode = mode & ~<uint64_t>MODE_BANK_BITS
            ibt_flush(v, 0)
            link = NULL
        v.mode_key = mode
        dropped = v.drop_gen
        r = R_OK
        b = NULL
        if not slow and not single and link == NULL:
            b = ibt_get(v, mode)
        if b == NULL:
            r = _block(v, c, mode | MODE_SLOW if slow else mode | single, &b)
        if r == R_SLOW:
            link = NULL
            continue
        if r != R_OK:
            link = NULL
            slow = 0
            single = 0
            if r == R_EXIT:
                return v.exit.reason
            v.db_pending = 0
            if deliver_exception(v) == R_EXIT:
                return v.exit.reason
            update_bank(v)
            v.shadow = 0
            continue
        held = 0
        if slow:
            held = v.shadow
            v.shadow = 0
            v.n.slow_insns += 1
        elif single:
            single = 0
            if link != NULL and dropped == v.drop_gen and not b.straddle:
                site = <uint8_t*>link - (c.rx - c.rw) + link.site
                (<int32_t*>site)[0] = <int32_t>(b.entry_direct - (<uint8_t*>link + link.site + 4))
        else:
            ibt_set(v, b)
            if link != NULL and dropped == v.drop_gen and b.straddle:
                # never linked directly: let the stub itself go through the table from now on
                site = <uint8_t*>link - (c.rx - c.rw) - 12
                (<uint32_t*>site)[0] = 0x2524FF65        # jmp gs:[slot], in place of the way to the thunk
                (<uint32_t*>(site + 4))[0] = <uint32_t><uint64_t>&(<Vcpu*>NULL).ibt[b.ibt_slot]
            elif link != NULL and dropped == v.drop_gen:
                site = <uint8_t*>link - (c.rx - c.rw) + link.site
                (<int32_t*>site)[0] = <int32_t>((b.entry_poll if link.poll else b.entry_direct)
                                                - (<uint8_t*>link + link.site + 4))
        link = NULL
        v.ret_sp = v.ret_base
        (<uint64_t*>v.ret_base)[0] = <uint64_t>c.ret_empty[v.bank]
        begun = v.rip
        enter(v, b.entry_direct)
        if slow:
            c.pool_used -= 1
            slow = 0
        r = R_OK
        at = v.rip
        c.leaves[v.leave_reason & 15] += 1
        if v.leave_reason == LEAVE_LINK:
            link = <LinkMeta*>v.leave_arg
        elif v.leave_reason == LEAVE_MICRO:
            micro = <MicroMeta*>v.leave_arg
            insn = micro.insn
            v.n.microcode += 1
            c.micro_ops[((insn.map & 3) << 8) | insn.opcode] += 1
            if insn.cls == C_INVALID:
                _fault(v, 6, 0)
                r = R_FAULT
            elif insn.cls == C_LIMIT:
                _fault(v, 13, 1)
                r = R_FAULT
            elif insn.cls == C_COPY:
                # an x87 or vector instruction under CR0.TS or CR0.EM
                _fault(v, 6 if v.cr0 & 4 and not (insn.map == 0) else 7, 0)
                r = R_FAULT
            else:
                r = microcode(v, &insn)
                if insn.opcode == 0xCF and insn.map == 0 and c.shared.n_vcpus > 1:
                    # IRET: what another vCPU spins for may just have been done
                    give_back(c.shared, &c.not_before)
                if insn.cls == C_BRANCH and (0xCC <= insn.opcode <= 0xCE or insn.opcode == 0xF1 or insn.map == 1):
                    # INT and its kin save TF; SYSCALL and SYSRET are stepped by the TF that they leave
                    if insn.opcode != 0x34 and insn.opcode != 0x35:
                        step = v.sysflags & F_TF
                elif r == R_EXIT and step and v.rip != at:
                    if v.exit.reason == X_HLT:
                        r = R_OK
                    elif v.exit.reason == X_IO:
                        v.db_pending |= DR6_BS
            update_bank(v)
        elif v.leave_reason == LEAVE_FAULT:
            r = R_FAULT
        elif v.leave_reason == LEAVE_EXIT:
            v.db_pending = 0
            # The instruction behind STI or MOV SS has not been carried out yet.
            if v.rip == begun and held:
                v.shadow = held
            elif _behind_sti(v):
                v.shadow = SHADOW_STI
            return v.exit.reason
        elif v.leave_reason == LEAVE_SLOW:
            v.shadow |= held
            slow = 1
            continue
        elif v.leave_reason == LEAVE_SINGLE:
            v.shadow |= held
            single = MODE_SINGLE
            link = <LinkMeta*>v.leave_arg
            continue
        else:
            update_bank(v)
        if r == R_OK and step and v.shadow != SHADOW_SS:
            v.db_pending |= DR6_BS
        if r == R_FAULT:
            v.db_pending = 0
            if deliver_exception(v) == R_EXIT:
                return v.exit.reason
            update_bank(v)
            v.shadow = 0
        elif r == R_EXIT:
            if v.rip == at and v.exit.reason != X_IO:
                v.db_pending = 0
            if v.rip == begun and held:
                v.shadow = held
            elif v.exit.reason == X_EPT_VIOLATION and _behind_sti(v):
                v.shadow = SHADOW_STI
            return v.exit.reason
        if v.debug & WATCH_STEP:
            v.db_pending |= PENDING_STEP
