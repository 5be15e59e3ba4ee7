# cython: language_level=3
"""See direct.pxd. Runs while the guest's vector state is live: general registers only, no call into the C library."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyhyve.cpu.bt.apic cimport *
from pyhyve.cpu.bt.codecache cimport Cache, inbox_process
from pyhyve.cpu.bt.debug cimport DR6_BS
from pyhyve.cpu.bt.decode cimport ENC_LEGACY, Insn, decode
from pyhyve.cpu.bt.mmu cimport mmu_fetch
from pyhyve.cpu.bt.shared cimport Shared, set_in_guest
from pyhyve.cpu.bt.state cimport *

cdef extern from *:
    """
    #include <stdint.h>
    static inline uint32_t bt_word(uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline uint8_t bt_byte(uint8_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline void bt_put_word(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t bt_cycles(void) { return __builtin_ia32_rdtsc(); }
    /* futex(FUTEX_WAIT_PRIVATE), until it is woken, or a signal comes, or *word is not `value` */
    static inline void bt_futex_wait(uint32_t *word, uint32_t value) {
        long r = 202;
        register long r10 __asm__("r10") = 0;
        __asm__ __volatile__("syscall" : "+a"(r) : "D"(word), "S"(128L), "d"((long)value), "r"(r10)
                             : "rcx", "r11", "memory");
    }
    """
    uint32_t bt_word(uint32_t* p) noexcept nogil
    uint8_t bt_byte(uint8_t* p) noexcept nogil
    void bt_put_word(uint32_t* p, uint32_t v) noexcept nogil
    uint64_t bt_cycles() noexcept nogil
    void bt_futex_wait(uint32_t* word, uint32_t value) noexcept nogil

cdef enum:
    QUALIFICATION_FETCH = 1 << 2
    QUALIFICATION_FINAL = 1 << 8    # not of a walk through the guest's page tables
    MSR_X2APIC = 0x800
    MSR_TSC_DEADLINE = 0x6E0

    # registers, by offset >> 4 of the page
    REG_TPR = 0x08
    REG_EOI = 0x0B
    REG_ICR = 0x30
    REG_ICR_HIGH = 0x31
    REG_TIMER_INITIAL = 0x38
    REG_SELF_IPI = 0x3F

    TO_DEST = 0                 # destination shorthands
    TO_SELF = 1
    TO_ALL = 2

    ICR_LOGICAL = 1 << 11
    ICR_WRITABLE = 0xCCFFF      # of the low half, without the delivery status
    ICR_DELIVERY_STATUS = 1 << 12

    TO_MONITOR = 0              # nothing is done
    DONE = 1
    NOTIFY = 2                  # done, but for vCPUs that the monitor must wake


cdef void direct_enter(Cache* c) noexcept nogil:
    bt_put_word(&c.apic.running, 1)


cdef void direct_leave(Cache* c) noexcept nogil:
    bt_put_word(&c.apic.running, 0)


cdef inline void _load_priority(Vcpu* v, Apic* a) noexcept nogil:
    """CR8 is TPR bits 7:4, and the guest may have changed it."""
    if v.cr8 != a.tpr >> 4:
        a.tpr = <uint32_t>(v.cr8 << 4 & 0xF0)
        apic_update_ppr(a)


cdef void direct_deliver(Vcpu* v, Cache* c) noexcept nogil:
    cdef Apic* a = c.apic
    cdef int vector
    _load_priority(v, a)
    timer_look(a)
    vector = apic_pending(a)
    a.window = 0
    if vector >= 0:
        if v.iflag and not v.shadow and not v.inject_valid and not v.db_pending:
            apic_take(a, vector)
            a.delivered[vector] += 1
            a.taken += 1
            v.inject_vector = vector
            v.inject_type = 0
            v.inject_has_error = 0
            v.inject_error = 0
            v.inject_valid = 1
            a.window = apic_pending(a) >= 0
        else:
            a.window = 1
    v.window = <uint8_t>(a.window | a.monitor_window)


cdef bint direct_rest(Vcpu* v, Cache* c) noexcept nogil:
    c.apic.resting = 0
    return v.inject_valid != 0 or _halt(v, c)


cdef bint direct_exit(Vcpu* v, Cache* c, int* reason) noexcept nogil:
    cdef Apic* a = c.apic
    cdef int done = TO_MONITOR
    if reason[0] == X_INTERRUPT_WINDOW:
        # also where another thread asked to look
        return not (a.monitor_window and v.iflag and not v.shadow)
    if v.debug:
        return False
    if reason[0] == X_HLT:
        return not v.sysflags & F_TF and _halt(v, c)
    if reason[0] == X_WRMSR:
        if a.mode == APIC_X2APIC and v.exit.msr >> 8 == MSR_X2APIC >> 8:
            done = _write(v, c, v.exit.msr & 0xFF, v.exit.msr_value)
        elif v.exit.msr == MSR_TSC_DEADLINE and a.mode != APIC_NOT_HERE:
            if a.lvt >> 17 & 3 == TIMER_DEADLINE:
                timer_deadline(a, v.exit.msr_value)
                done = DONE
    elif reason[0] == X_EPT_VIOLATION:
        if a.mode == APIC_XAPIC and v.exit.gpa >> 12 == v.apic_page and not v.exit.gpa & 0xF \
                and v.exit.qualification & (QUALIFICATION_FINAL | QUALIFICATION_FETCH) == QUALIFICATION_FINAL \
                and not v.inject_valid:
            done = _page_access(v, c, <uint32_t>(v.exit.gpa >> 4 & 0xFF))
    elif reason[0] == X_CR_ACCESS:
        if v.exit.qualification & 0xFF == 8 and not v.gpr[v.exit.qualification >> 8 & 0xF] & ~<uint64_t>0xF:
            done = _write(v, c, REG_TPR, v.gpr[v.exit.qualification >> 8 & 0xF] << 4)
    if done == TO_MONITOR:
        return False
    # past the instruction
    v.rip += v.exit.length
    if not (v.efer & 0x400 and v.seg[SEG_CS].attr & 0x2000):
        v.rip &= <uint64_t>0xFFFFFFFF
    v.shadow = 0
    if v.sysflags & F_TF:
        v.db_pending |= DR6_BS
    if done == NOTIFY:
        reason[0] = v.exit.reason = X_APIC_WRITE
        return False
    return True


# --- registers -------------------------------------------------------------------------------------------------------

cdef int _write(Vcpu* v, Cache* c, uint32_t register, uint64_t value) noexcept nogil:
    cdef Apic* a = c.apic
    cdef bint x2apic = a.mode == APIC_X2APIC
    cdef int vector
    if register == REG_EOI:
        if x2apic and value:
            return TO_MONITOR
        vector = apic_in_service(a)
        if vector >= 0:
            if a.tmr[vector >> 6] >> (vector & 63) & 1:
                return TO_MONITOR               # the I/O APICs hear of it
            apic_complete(a, vector)
        a.eois += 1
        return DONE
    if register == REG_ICR:
        if x2apic:
            if <uint32_t>value & ~<uint32_t>(ICR_WRITABLE | ICR_DELIVERY_STATUS):
                return TO_MONITOR
            a.icr_high = <uint32_t>(value >> 32)
        a.icr_low = <uint32_t>value & ICR_WRITABLE
        return _send(v, c, <uint32_t>value, a.icr_high if x2apic else a.icr_high >> 24)
    if register == REG_ICR_HIGH and not x2apic:
        a.icr_high = <uint32_t>value & <uint32_t>0xFF000000U
        return DONE
    if register == REG_SELF_IPI and x2apic:
        if value > 0xFF:
            return TO_MONITOR
        return _send(v, c, TO_SELF << 18 | <uint32_t>value, 0)
    if register == REG_TIMER_INITIAL:
        if value >> 32 or a.lvt >> 17 & 3 == TIMER_RESERVED:
            return TO_MONITOR
        if a.lvt >> 17 & 3 != TIMER_DEADLINE:
            timer_count(a, <uint32_t>value)
        return DONE
    if register == REG_TPR:
        if value > 0xFF:
            return TO_MONITOR
        a.tpr = <uint32_t>value
        v.cr8 = value >> 4
        apic_update_ppr(a)
        return DONE
    return TO_MONITOR


cdef inline bint _names(Apic* target, uint32_t dest, bint logical, bint x2apic) noexcept nogil:
    """Whether `dest` names this local APIC: "Determining IPI Destination"."""
    cdef uint32_t ldr = target.ldr
    if dest == (0xFFFFFFFFU if x2apic else 0xFFU):
        return True
    if not logical:
        return target.id == dest
    if target.mode == APIC_X2APIC:
        return dest >> 16 == ldr >> 16 and dest & ldr & 0xFFFF != 0
    if dest > 0xFF:
        return False
    ldr >>= 24
    if target.flat:
        return dest & ldr != 0
    return dest >> 4 == ldr >> 4 and dest & ldr & 0xF != 0


cdef inline bint _takes(Apic* sender, Apic* target, uint32_t low, uint32_t dest) noexcept nogil:
    cdef uint32_t shorthand = low >> 18 & 3
    if not target.accepting:
        return False
    if shorthand == TO_DEST:
        return _names(target, dest, low & ICR_LOGICAL != 0, sender.mode == APIC_X2APIC)
    if shorthand == TO_SELF:
        return target == sender
    return target != sender or shorthand == TO_ALL


cdef int _send(Vcpu* v, Cache* c, uint32_t low, uint32_t dest) noexcept nogil:
    """A fixed interrupt. What nobody takes is for the monitor, which counts it."""
    cdef Shared* s = c.shared
    cdef Apic* a = c.apic
    cdef Apic* target
    cdef uint32_t vector = low & 0xFF
    cdef uint64_t sleepers = 0
    cdef uint32_t i, named = 0
    if low >> 8 & 7 or vector < 16:
        return TO_MONITOR
    for i in range(s.n_vcpus):
        target = &s.apics[i]
        if target.mode == APIC_NOT_HERE:
            return TO_MONITOR
        named += _takes(a, target, low, dest)
    if not named and low >> 18 & 3 == TO_DEST:
        return TO_MONITOR
    a.ipis += 1
    for i in range(s.n_vcpus):
        target = &s.apics[i]
        if not _takes(a, target, low, dest) or not apic_accept(target, vector, False) or target == a:
            continue
        if not apic_signal(target):
            sleepers |= <uint64_t>1 << i
    if not sleepers:
        return DONE
    v.exit.qualification = sleepers
    return NOTIFY


cdef int _page_access(Vcpu* v, Cache* c, uint32_t register) noexcept nogil:
    """A plain MOV of 32 bits to or from the xAPIC page; the processor has the instruction's address only."""
    cdef Apic* a = c.apic
    cdef Insn insn
    cdef uint64_t lin = v.rip
    cdef uint64_t page, value
    cdef uint64_t info = 0
    cdef Exit kept = v.exit
    cdef uint32_t attr = v.seg[SEG_CS].attr
    cdef int mode = 64 if v.efer & 0x400 and attr & 0x2000 else 32 if attr & 0x4000 else 16
    cdef int done
    if mode != 64:
        lin = (lin + v.seg[SEG_CS].base) & <uint64_t>0xFFFFFFFF
    if mmu_fetch(v, lin, v.bank, &page, &info) != R_OK:
        v.exit = kept
        return TO_MONITOR
    if decode(<const uint8_t*>(page + (lin & 0xFFF)), 0x1000 - <int>(lin & 0xFFF), mode, &insn) <= 0:
        return TO_MONITOR
    if insn.enc != ENC_LEGACY or insn.map or insn.opsize != 4:
        return TO_MONITOR
    if kept.qualification & 2:
        if insn.opcode == 0x89:
            value = <uint32_t>v.gpr[insn.reg]
        elif insn.opcode == 0xC7 and not insn.reg & 7:
            value = <uint32_t>insn.imm
        elif insn.opcode == 0xA3:
            value = <uint32_t>v.gpr[RAX]
        else:
            return TO_MONITOR
        done = _write(v, c, register, value & 0xFF if register == REG_TPR else value)
    else:
        if register == REG_ICR:
            value = a.icr_low
        elif register == REG_ICR_HIGH:
            value = a.icr_high
        else:
            return TO_MONITOR
        if insn.opcode == 0x8B:
            v.gpr[insn.reg] = value
        elif insn.opcode == 0xA1:
            v.gpr[RAX] = value
        else:
            return TO_MONITOR
        done = DONE
    v.exit.length = insn.length
    return done


# --- HLT -------------------------------------------------------------------------------------------------------------

cdef bint _halt(Vcpu* v, Cache* c) noexcept nogil:
    """Wait for an interrupt (true), or until the monitor wants something: it sees the HLT then, as if just executed."""
    cdef Apic* a = c.apic
    cdef uint32_t seen
    cdef uint64_t start
    if not v.iflag or v.inject_valid or v.db_pending or a.monitor_window or not a.accepting:
        v.exit.reason = X_HLT
        return False
    v.shadow = 0
    _load_priority(v, a)
    a.halts += 1
    start = bt_cycles()
    while True:
        bt_put_word(&a.halted, 1)
        seen = bt_word(&a.wake)
        timer_look(a)
        if apic_pending(a) >= 0:
            break
        if bt_byte(&v.kick):
            bt_put_word(&a.halted, 0)
            v.kick = 0
            v.exit.reason = X_HLT
            a.halted_cycles += bt_cycles() - start
            return False
        set_in_guest(&c.inbox, 0)
        bt_futex_wait(&a.wake, seen)
        set_in_guest(&c.inbox, 1)
        inbox_process(c)
    bt_put_word(&a.halted, 0)
    a.halted_cycles += bt_cycles() - start
    return True
