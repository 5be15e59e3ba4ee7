# cython: language_level=3
"""One instruction at a time, for what is never copied: the dispatch, the stack, near branches and decimal arithmetic.

The rest is beside: microcode_segments (descriptors), microcode_far (far transfers), microcode_tasks (task switches),
microcode_events (interrupts, IRET), microcode_calls (system calls), microcode_vme (virtual-8086 extensions),
microcode_strings, microcode_system (control registers, MSRs, ports), microcode_vector (state images). Each checks and
reads first and commits last. Source: Intel SDM vol 2.
"""

from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.microcode_calls cimport syscall, sysenter, sysexit, sysret
from pyhyve.cpu.bt.microcode_events cimport *
from pyhyve.cpu.bt.microcode_far cimport far_return, far_transfer
from pyhyve.cpu.bt.microcode_gather cimport gather, gather_evex, scatter
from pyhyve.cpu.bt.kinds cimport bt_amd
from pyhyve.cpu.bt.microcode_ops cimport *
from pyhyve.cpu.bt.microcode_segments cimport (
    arpl, group6, lar_lsl, load_far_pointer, load_segment, mov_sreg
)
from pyhyve.cpu.bt.microcode_strings cimport string_operation
from pyhyve.cpu.bt.microcode_system cimport *
from pyhyve.cpu.bt.microcode_vector cimport fpu_environment, group15, masked_store
from pyhyve.cpu.bt.microcode_vme cimport vm_restricted, vme_check, vme_flags, vme_load, vme_usable
from pyhyve.cpu.bt.microcode_xsave cimport group9
from pyhyve.cpu.bt.mmu cimport mmu_probe_write, mmu_read
from pyhyve.cpu.bt.state cimport *


cdef int deliver_exception(Vcpu* v) noexcept nogil:
    return event_exception(v)


cdef int deliver_interrupt(Vcpu* v, uint32_t vector, int software, int has_error, uint64_t error) noexcept nogil:
    return event_interrupt(v, vector, software != 0, has_error != 0, error)


# ---------------------------------------------------------------------------------------------------------------------
# Near branches

cdef bint condition(Vcpu* v, int cc) noexcept nogil:
    """The condition that the low four bits of Jcc's opcode name."""
    cdef int kind = cc >> 1
    cdef bint sf = (v.flags_lo & F_SF) != 0
    cdef bint of = v.flags_of != 0
    cdef bint met
    if kind == 0:
        met = of
    elif kind == 1:
        met = (v.flags_lo & F_CF) != 0
    elif kind == 2:
        met = (v.flags_lo & F_ZF) != 0
    elif kind == 3:
        met = (v.flags_lo & (F_CF | F_ZF)) != 0
    elif kind == 4:
        met = sf
    elif kind == 5:
        met = (v.flags_lo & F_PF) != 0
    elif kind == 6:
        met = sf != of
    else:
        met = sf != of or (v.flags_lo & F_ZF) != 0
    return met != (cc & 1)


cdef inline uint32_t branch_size(Vcpu* v, Insn* i) noexcept nogil:
    """Near branches are 64-bit in 64-bit mode, or 16-bit with 66 (as AMD has it, and the decoder)."""
    return stack_size(v, i)


cdef int near(Vcpu* v, Insn* i, uint64_t target) noexcept nogil:
    """Check a near target, cut to the operand size; *rip is set by the caller's commit."""
    if is64(v):
        return R_OK if canonical(v, target) else gp0(v)
    return gp0(v) if target > v.seg[SEG_CS].limit else R_OK


cdef int jump(Vcpu* v, Insn* i, uint64_t target) noexcept nogil:
    cdef int r
    target &= size_mask(branch_size(v, i))
    r = near(v, i, target)
    if r == R_OK:
        v.rip = target
    return r


cdef int call(Vcpu* v, Insn* i, uint64_t target) noexcept nogil:
    cdef uint32_t size = branch_size(v, i)
    cdef uint64_t sp = v.gpr[RSP]
    cdef uint64_t back = next_rip(v, i)
    cdef uint64_t lin = 0
    cdef int r
    target &= size_mask(size)
    # the stack's exceptions come before those of the target
    r = linear(v, SEG_SS, (sp - size) & sp_mask(v), size, ACCESS_WRITE, &lin)
    if r == R_OK:
        r = aligned(v, lin, size)
    if r == R_OK:
        r = mmu_probe_write(v, lin, size, v.bank)
    if r == R_OK:
        r = near(v, i, target)
    if r == R_OK:
        r = push_to(v, &sp, &back, size)
    if r == R_OK:
        set_sp(v, sp)
        v.rip = target
    return r


cdef int ret(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint64_t sp = v.gpr[RSP]
    cdef uint64_t target = 0
    cdef int r = pop_from(v, &sp, &target, branch_size(v, i))
    if r == R_OK:
        r = near(v, i, target)
    if r == R_OK:
        if i.opcode == 0xC2:
            sp += <uint64_t>i.imm & 0xFFFF
        set_sp(v, sp)
        v.rip = target
    return r


cdef int loop(Vcpu* v, Insn* i) noexcept nogil:
    """LOOPNE LOOPE LOOP JCXZ (E0-E3): RCX by the address size."""
    cdef uint64_t mask = size_mask(i.addrsize)
    cdef uint64_t count = v.gpr[RCX] & mask
    cdef bint taken
    cdef int op = i.opcode
    cdef int r = R_OK
    if op == 0xE3:
        return jump(v, i, next_rip(v, i) + <uint64_t>i.imm) if count == 0 else advance(v, i)
    count = (count - 1) & mask
    taken = count != 0
    if op != 0xE2 and i.prefixes & (P_F2 | P_F3) and bt_amd():
        op = 0xE0 if i.prefixes & P_F2 else 0xE1  # AMD's processors take the condition from these prefixes
    if op == 0xE0:
        taken = taken and not v.flags_lo & F_ZF
    elif op == 0xE1:
        taken = taken and v.flags_lo & F_ZF
    if taken:
        r = jump(v, i, next_rip(v, i) + <uint64_t>i.imm)
        if r != R_OK:
            return r
    else:
        advance(v, i)
    write_reg(v, RCX, count, i.addrsize)
    return R_OK


cdef int indirect(Vcpu* v, Insn* i) noexcept nogil:
    """FF /2 to /5: CALL, far CALL, JMP, far JMP."""
    cdef int op = i.reg & 7
    cdef uint32_t size
    cdef uint64_t words[2]
    cdef int r
    words[0] = words[1] = 0
    if op == 2 or op == 4:
        r = read_rm(v, i, branch_size(v, i), words)
        if r != R_OK:
            return r
        return call(v, i, words[0]) if op == 2 else jump(v, i, words[0])
    if i.mod == 3:
        return undefined(v)
    size = operand_size(v, i)
    if size == 8 and bt_amd() and v.cpl:
        size = 4                                  # no m16:64 there; in kernel mode as KVM and QEMU emulate it
    r = read_parts(v, i, size, 2, words)
    if r != R_OK:
        return r
    return far_transfer(v, i, (<uint16_t*>(<uint64_t>words + size))[0], words[0] & size_mask(size), size, op == 3)


cdef int branch(Vcpu* v, Insn* i) noexcept nogil:
    cdef int op = i.opcode
    cdef uint32_t size
    if i.map == 1:
        if 0x80 <= op <= 0x8F:
            return jump(v, i, next_rip(v, i) + <uint64_t>i.imm) if condition(v, op & 15) else advance(v, i)
        if op == 0x05:
            return syscall(v, i)
        if op == 0x07:
            return sysret(v, i)
        if op == 0x34:
            return sysenter(v, i)
        if op == 0x35:
            return sysexit(v, i)
        return engine_error(v, i)
    if 0x70 <= op <= 0x7F:
        return jump(v, i, next_rip(v, i) + <uint64_t>i.imm) if condition(v, op & 15) else advance(v, i)
    if op == 0xE8:
        return call(v, i, next_rip(v, i) + <uint64_t>i.imm)
    if op == 0xE9 or op == 0xEB:
        return jump(v, i, next_rip(v, i) + <uint64_t>i.imm)
    if op == 0xC2 or op == 0xC3:
        return ret(v, i)
    if 0xE0 <= op <= 0xE3:
        return loop(v, i)
    if op == 0xFF:
        return indirect(v, i)
    if op == 0xCF:
        return iret(v, i)
    if op == 0xCD:
        return software_interrupt(v, i, <uint32_t>i.imm & 0xFF)
    if op == 0xCC:
        return software_interrupt(v, i, BP)
    if op == 0xF1:
        return software_interrupt(v, i, DB)
    if op == 0xCE:
        if is64(v):
            return undefined(v)
        return software_interrupt(v, i, OF) if v.flags_of else advance(v, i)
    if op == 0xCA or op == 0xCB:
        return far_return(v, i)
    if op == 0xEA or op == 0x9A:
        size = operand_size(v, i)
        return far_transfer(v, i, <uint32_t>(<uint64_t>i.imm >> (size * 8)) & 0xFFFF,
                            <uint64_t>i.imm & size_mask(size), size, op == 0x9A)
    return engine_error(v, i)


# ---------------------------------------------------------------------------------------------------------------------
# The stack

cdef int push_value(Vcpu* v, Insn* i, uint64_t value) noexcept nogil:
    cdef uint64_t sp = v.gpr[RSP]
    cdef int r = push_to(v, &sp, &value, stack_size(v, i))
    if r != R_OK:
        return r
    set_sp(v, sp)
    return advance(v, i)


cdef int push_rm(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint64_t value = 0
    cdef int r = read_rm(v, i, stack_size(v, i), &value)
    return r if r != R_OK else push_value(v, i, value)


cdef int pop_reg(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint64_t sp = v.gpr[RSP]
    cdef uint64_t value = 0
    cdef uint32_t size = stack_size(v, i)
    cdef int r = pop_from(v, &sp, &value, size)
    if r != R_OK:
        return r
    set_sp(v, sp)
    write_reg(v, i.rm, value, size)
    return advance(v, i)


cdef int pop_rm(Vcpu* v, Insn* i) noexcept nogil:
    """8F /0: an operand address that uses RSP sees it already moved."""
    cdef uint64_t sp = v.gpr[RSP]
    cdef uint64_t before = sp
    cdef uint64_t value = 0
    cdef uint32_t size = stack_size(v, i)
    cdef int r = pop_from(v, &sp, &value, size)
    if r != R_OK:
        return r
    set_sp(v, sp)
    r = write_rm(v, i, size, value)
    if r != R_OK:
        v.gpr[RSP] = before
        return r
    return advance(v, i)


cdef int pop_sreg(Vcpu* v, Insn* i, int seg) noexcept nogil:
    cdef uint64_t sp = v.gpr[RSP]
    cdef uint64_t before, value = 0
    cdef int r = pop_from(v, &sp, &value, stack_size(v, i))
    if r != R_OK:
        return r
    # The stack pointer moves by the width of the stack segment that it was popped from.
    if seg == SEG_SS:
        before = v.gpr[RSP]
        set_sp(v, sp)
        r = load_segment(v, seg, <uint32_t>value & 0xFFFF)
        if r != R_OK:
            v.gpr[RSP] = before
            return r
        v.shadow = SHADOW_SS
        return advance(v, i)
    r = load_segment(v, seg, <uint32_t>value & 0xFFFF)
    if r != R_OK:
        return r
    set_sp(v, sp)
    return advance(v, i)


cdef int push_all(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint32_t size = operand_size(v, i)
    cdef uint64_t sp = v.gpr[RSP]
    cdef uint64_t value
    cdef int k, r
    if is64(v):
        return undefined(v)
    for k in range(8):
        value = v.gpr[k]
        r = push_to(v, &sp, &value, size)
        if r != R_OK:
            return r
    set_sp(v, sp)
    return advance(v, i)


cdef int pop_all(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint32_t size = operand_size(v, i)
    cdef uint64_t sp = v.gpr[RSP]
    cdef uint64_t word[8]
    cdef int k, r
    if is64(v):
        return undefined(v)
    for k in range(7, -1, -1):
        word[k] = 0
        r = pop_from(v, &sp, &word[k], size)
        if r != R_OK:
            return r
    for k in range(8):
        if k != RSP:
            write_reg(v, k, word[k], size)
    set_sp(v, sp)
    return advance(v, i)


cdef int push_flags(Vcpu* v, Insn* i) noexcept nogil:
    if vm_restricted(v):
        if vme_usable(v, operand_size(v, i)) != R_OK:
            return R_FAULT
        return push_value(v, i, vme_flags(v))
    return push_value(v, i, get_rflags(v) & ~<uint64_t>(F_VM | F_RF))


cdef int pop_flags(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint32_t size = stack_size(v, i)
    cdef uint64_t sp = v.gpr[RSP]
    cdef uint64_t before, value = 0
    cdef uint64_t mask = F_ARITH | F_TF | F_DF | F_NT
    cdef uint64_t keep
    cdef int r
    if vm_restricted(v) and vme_usable(v, size) != R_OK:
        return R_FAULT
    r = pop_from(v, &sp, &value, size)
    if r != R_OK:
        return r
    if vm_restricted(v):
        if vme_check(v, value) != R_OK:
            return R_FAULT
        set_sp(v, sp)
        vme_load(v, value)
        return advance(v, i)
    if size != 2:
        mask |= F_AC | F_ID
    if v.cpl == 0:
        mask |= F_IOPL
    if v.cpl <= iopl(v):
        mask |= F_IF
    keep = get_rflags(v) & ~mask & ~<uint64_t>F_RF
    if size != 2 and not v.sysflags & F_VM:
        keep &= ~<uint64_t>(F_VIF | F_VIP)
    set_sp(v, sp)
    set_rflags(v, keep | (value & mask))
    update_bank(v)
    return advance(v, i)


cdef int enter(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint32_t size = stack_size(v, i)
    cdef uint32_t bytes = <uint32_t>i.imm & 0xFFFF
    cdef uint32_t level = <uint32_t>(i.imm >> 16) & 31
    cdef uint64_t sp = v.gpr[RSP]
    cdef uint64_t value = v.gpr[RBP]
    cdef uint64_t frame, link, lin
    cdef uint32_t k
    cdef int r
    lin = 0
    r = push_to(v, &sp, &value, size)
    if r != R_OK:
        return r
    frame = v.gpr[RSP] & ~sp_mask(v) | sp
    link = v.gpr[RBP]
    for k in range(1, level):
        link = (link - size) & sp_mask(v)
        value = 0
        r = pop_from(v, &link, &value, size)
        if r != R_OK:
            return r
        link = (link - size) & sp_mask(v)
        r = push_to(v, &sp, &value, size)
        if r != R_OK:
            return r
    if level:
        r = push_to(v, &sp, &frame, size)
        if r != R_OK:
            return r
    sp = (sp - bytes) & sp_mask(v)
    # the last word of the new frame must be writable
    r = linear(v, SEG_SS, sp, size, ACCESS_WRITE, &lin)
    if r == R_OK:
        r = aligned(v, lin, size)
    if r == R_OK:
        r = mmu_probe_write(v, lin, size, v.bank)
    if r != R_OK:
        return r
    if is64(v) and size == 8:
        v.gpr[RBP] = frame
    else:
        write_reg(v, RBP, frame, size)
    set_sp(v, sp)
    return advance(v, i)


cdef int leave(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint32_t size = stack_size(v, i)
    cdef uint64_t sp = v.gpr[RBP]
    cdef uint64_t before, value = 0
    cdef int r = pop_from(v, &sp, &value, size)
    if r != R_OK:
        return r
    set_sp(v, sp)
    write_reg(v, RBP, value, size)
    return advance(v, i)


cdef int stack(Vcpu* v, Insn* i) noexcept nogil:
    cdef int op = i.opcode
    if i.map == 1:
        if op == 0xA0 or op == 0xA8:
            return push_value(v, i, v.seg[SEG_FS if op == 0xA0 else SEG_GS].selector)
        if op == 0xA1 or op == 0xA9:
            return pop_sreg(v, i, SEG_FS if op == 0xA1 else SEG_GS)
        return engine_error(v, i)
    if 0x50 <= op <= 0x57:
        return push_value(v, i, v.gpr[i.rm])
    if 0x58 <= op <= 0x5F:
        return pop_reg(v, i)
    if op == 0x68 or op == 0x6A:
        return push_value(v, i, <uint64_t>i.imm)
    if op == 0xFF:
        return push_rm(v, i)
    if op == 0x8F:
        return pop_rm(v, i)
    if op == 0x9C:
        return push_flags(v, i)
    if op == 0x9D:
        return pop_flags(v, i)
    if op == 0xC8:
        return enter(v, i)
    if op == 0xC9:
        return leave(v, i)
    if op == 0x60:
        return push_all(v, i)
    if op == 0x61:
        return pop_all(v, i)
    if op <= 0x1F:
        if is64(v):
            return undefined(v)
        if op & 1:
            return pop_sreg(v, i, op >> 3)
        return push_value(v, i, v.seg[op >> 3].selector)
    return engine_error(v, i)


# ---------------------------------------------------------------------------------------------------------------------
# Decimal arithmetic and other relics

cdef void set_szp(Vcpu* v, uint8_t value, uint32_t more) noexcept nogil:
    """SF, ZF and PF of a byte; CF, AF and OF as `more` says."""
    cdef uint32_t p = value
    p ^= p >> 4
    p ^= p >> 2
    p ^= p >> 1
    set_arith(v, more | (0 if p & 1 else F_PF) | (0 if value else F_ZF) | (value & F_SF))


cdef int decimal(Vcpu* v, Insn* i) noexcept nogil:
    """DAA DAS AAA AAS AAM AAD."""
    cdef int op = i.opcode
    cdef uint32_t al = <uint32_t>v.gpr[RAX] & 0xFF
    cdef uint32_t ah = <uint32_t>(v.gpr[RAX] >> 8) & 0xFF
    cdef uint32_t base = <uint32_t>i.imm & 0xFF
    cdef bint cf = v.flags_lo & F_CF
    cdef bint af = v.flags_lo & F_AF
    cdef uint32_t old = al
    cdef uint32_t flags = 0
    if is64(v):
        return undefined(v)
    if op == 0xD4:
        if base == 0:
            return fault(v, DE)
        ah = al / base
        al = al % base
    elif op == 0xD5:
        al = (al + ah * base) & 0xFF
        ah = 0
    elif op == 0x27 or op == 0x2F:
        if al & 15 > 9 or af:
            if op == 0x27:
                al += 6
                if al > 0xFF or cf:
                    flags |= F_CF
            else:
                if al < 6 or cf:
                    flags |= F_CF
                al -= 6
            al &= 0xFF
            flags |= F_AF
        if old > 0x99 or cf:
            al = (al + 0x60 if op == 0x27 else al - 0x60) & 0xFF
            flags |= F_CF
        elif op == 0x27:
            flags &= ~<uint32_t>F_CF
    else:
        if al & 15 > 9 or af:
            if op == 0x37:
                al += 0x106
            else:
                al -= 0x106
            # the carry out of AL goes into AH with the one that is added
            al = (al + (ah << 8)) & 0xFFFF
            ah = al >> 8
            flags = F_CF | F_AF
        al &= 15
    v.gpr[RAX] = (v.gpr[RAX] & ~<uint64_t>0xFFFF) | (ah << 8) | al
    set_szp(v, <uint8_t>al, flags)
    return advance(v, i)


cdef int bound(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint32_t size = operand_size(v, i)
    cdef int32_t wide[2]
    cdef int16_t narrow[2]
    cdef int64_t index, low, high
    cdef int r
    if size == 2:
        r = read_parts(v, i, 2, 2, narrow)
        low = narrow[0]
        high = narrow[1]
        index = <int16_t>v.gpr[i.reg]
    else:
        r = read_parts(v, i, 4, 4, wide)
        low = wide[0]
        high = wide[1]
        index = <int32_t>v.gpr[i.reg]
    if r != R_OK:
        return r
    if index < low or index > high:
        return fault(v, BR)
    return advance(v, i)


cdef int xlat(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint64_t offset = (v.gpr[RBX] + (v.gpr[RAX] & 0xFF)) & size_mask(i.addrsize)
    cdef uint64_t lin = 0
    cdef uint8_t value = 0
    cdef int r = linear(v, i.seg, offset, 1, ACCESS_READ, &lin)
    if r == R_OK:
        r = mmu_read(v, lin, &value, 1, v.bank)
    if r != R_OK:
        return r
    write_reg(v, RAX, value, 1)
    return advance(v, i)


# ---------------------------------------------------------------------------------------------------------------------
# System instructions

cdef int pause(Vcpu* v, Insn* i) noexcept nogil:
    """A spinning guest goes on spinning; a pause-loop exit would be counted here."""
    return advance(v, i)


cdef int system0(Vcpu* v, Insn* i) noexcept nogil:
    """One-byte opcodes."""
    cdef int op = i.opcode
    if 0xE4 <= op <= 0xE7 or 0xEC <= op <= 0xEF:
        return in_out(v, i)
    if op == 0xFA or op == 0xFB:
        return cli_sti(v, i)
    if op == 0xFC or op == 0xFD:
        v.dflag = op & 1
        return advance(v, i)
    if op == 0xF4:
        return hlt(v, i)
    if op == 0x8C or op == 0x8E:
        return mov_sreg(v, i)
    if op == 0x90:
        return pause(v, i)
    if op == 0xC4 or op == 0xC5:
        return load_far_pointer(v, i)
    if op == 0xD7:
        return xlat(v, i)
    if op == 0x27 or op == 0x2F or op == 0x37 or op == 0x3F or op == 0xD4 or op == 0xD5:
        return decimal(v, i)
    if op == 0xD6:
        write_reg(v, RAX, 0xFF if v.flags_lo & F_CF else 0, 1)
        return advance(v, i)
    if op == 0x62:
        return bound(v, i)
    if op == 0x63:
        return arpl(v, i)
    if op == 0xD9 or op == 0xDD:
        return fpu_environment(v, i)
    return engine_error(v, i)


cdef int system1(Vcpu* v, Insn* i) noexcept nogil:
    """0F xx."""
    cdef int op = i.opcode
    if op == 0x01:
        return group7(v, i)
    if op == 0x22 or op == 0x20:
        return mov_cr(v, i)
    if op == 0x30:
        return wrmsr(v, i)
    if op == 0x32:
        return rdmsr(v, i)
    if op == 0xA2:
        return cpuid(v, i)
    if op == 0x31:
        return rdtsc(v, i)
    if op == 0xAE:
        return group15(v, i) if i.mod != 3 else fsgsbase(v, i)
    if op == 0xC7:
        if i.mod != 3:
            return group9(v, i)
        if i.prefixes & P_F3 and i.reg & 7 == 7:  # RDPID
            write_reg(v, i.rm, v.tsc_aux & 0xFFFFFFFFULL, 8 if is64(v) else 4)
            return advance(v, i)
        return undefined(v)
    if op == 0x00:
        return group6(v, i)
    if op == 0x02 or op == 0x03:
        return lar_lsl(v, i)
    if op == 0x06:
        return clts(v, i)
    if op == 0x08 or op == 0x09:                  # INVD, WBINVD: guest memory is coherent
        return gp0(v) if v.cpl else advance(v, i)
    if op == 0x21 or op == 0x23:
        return mov_dr(v, i)
    if op == 0x33:                                # RDPMC: there are no counters
        return gp0(v)
    if op == 0xB2 or op == 0xB4 or op == 0xB5:
        return load_far_pointer(v, i)
    if op == 0xF7:
        return masked_store(v, i)
    return engine_error(v, i)


cdef int microcode(Vcpu* v, Insn* i) noexcept nogil:
    if i.cls == C_BRANCH:
        return branch(v, i)
    if i.cls == C_STACK:
        return stack(v, i)
    if i.cls == C_STRING:
        return string_operation(v, i)
    if i.cls == C_SYSTEM:
        if i.enc != ENC_LEGACY:
            if i.map == 1 and i.opcode == 0xF7:   # VMASKMOVDQU
                return masked_store(v, i)
            if i.enc == ENC_VEX and i.map == 2 and 0x90 <= i.opcode <= 0x93:
                return gather(v, i)
            if i.enc == ENC_EVEX and i.map == 2 and 0x90 <= i.opcode <= 0x93:
                return gather_evex(v, i)
            if i.enc == ENC_EVEX and i.map == 2 and 0xA0 <= i.opcode <= 0xA3:
                return scatter(v, i)
            return engine_error(v, i)
        if i.map == 0:
            return system0(v, i)
        if i.map == 1:
            return system1(v, i)
        if i.map == 2 and i.opcode == 0x82:
            return invpcid(v, i)
        return engine_error(v, i)
    if i.cls == C_NOP:
        return advance(v, i)
    if i.cls == C_INVALID:
        return undefined(v)
    return engine_error(v, i)
