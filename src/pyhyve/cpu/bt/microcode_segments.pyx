# cython: language_level=3
"""Descriptors and segment registers, in every mode.

Sources: Intel SDM vol 3, "Segment Descriptors" and "Privilege Levels"; vol 2 for the instructions.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.kinds cimport bt_amd
from pyhyve.cpu.bt.microcode_ops cimport *
from pyhyve.cpu.bt.mmu cimport mmu_probe_write, mmu_read, mmu_write, read_u64
from pyhyve.cpu.bt.state cimport *


# ---------------------------------------------------------------------------------------------------------------------
# Descriptors and hidden parts

cdef int read_descriptor(Vcpu* v, uint32_t selector, uint64_t* d) noexcept nogil:
    if selector & 4:
        if v.seg[SEG_LDTR].attr & ATTR_UNUSABLE or selector | 7 > v.seg[SEG_LDTR].limit:
            return R_BAD
        return read_u64(v, v.seg[SEG_LDTR].base + (selector & 0xFFF8), BANK_KERNEL, d)
    if selector | 7 > v.gdtr.limit:
        return R_BAD
    return read_u64(v, v.gdtr.base + (selector & 0xFFF8), BANK_KERNEL, d)


cdef void set_segment(Vcpu* v, int seg, uint32_t selector, uint64_t d) noexcept nogil:
    cdef Segment* s = &v.seg[seg]
    cdef uint8_t byte
    if not (d >> 40) & DESC_ACCESSED:
        d |= <uint64_t>1 << 40
        byte = <uint8_t>(d >> 40)
        mmu_write(v, descriptor_at(v, selector) + 5, &byte, 1, BANK_KERNEL)
    s.selector = selector
    s.base = desc_base(d)
    s.limit = desc_limit(d)
    s.attr = desc_attr(d)


cdef void set_null(Vcpu* v, int seg, uint32_t selector) noexcept nogil:
    cdef Segment* s = &v.seg[seg]
    s.selector = selector
    s.base = 0
    s.limit = 0
    s.attr = ATTR_UNUSABLE | ((selector & 3) << 5 if seg == SEG_SS else 0)


cdef void set_real(Vcpu* v, int seg, uint32_t selector) noexcept nogil:
    """Real mode keeps limits ("unreal mode"); virtual-8086 mode sets them."""
    cdef Segment* s = &v.seg[seg]
    s.selector = selector & 0xFFFF
    s.base = <uint64_t>(selector & 0xFFFF) << 4
    if v.sysflags & F_VM:
        s.limit = 0xFFFF
        s.attr = 0xF3
    elif seg == SEG_CS:
        s.attr = 0x9B
    elif s.attr & ATTR_UNUSABLE:
        s.limit = 0xFFFF
        s.attr = 0x93


cdef int load_segment(Vcpu* v, int seg, uint32_t selector) noexcept nogil:
    cdef uint64_t d = 0
    cdef uint32_t code = selector & 0xFFFC
    cdef uint32_t rpl = selector & 3
    cdef int r
    if not protected(v):
        set_real(v, seg, selector)
        return R_OK
    if code == 0:
        if seg == SEG_SS and (not is64(v) or v.cpl == 3 or rpl != v.cpl):
            return gp0(v)
        set_null(v, seg, selector)
        return R_OK
    r = read_descriptor(v, selector, &d)
    if r == R_BAD:
        return fault_code(v, GP, code)
    if r != R_OK:
        return r
    if seg == SEG_SS:
        if rpl != v.cpl or not desc_writable_data(d) or desc_dpl(d) != v.cpl:
            return fault_code(v, GP, code)
        if not desc_present(d):
            return fault_code(v, SS, code)
    else:
        if not desc_segment(d) or (desc_is_code(d) and not desc_type(d) & DESC_WRITABLE):
            return fault_code(v, GP, code)
        if not (desc_is_code(d) and desc_type(d) & DESC_CONFORMING):
            if rpl > desc_dpl(d) or v.cpl > desc_dpl(d):
                return fault_code(v, GP, code)
        if not desc_present(d):
            return fault_code(v, NP, code)
    if not (d >> 40) & DESC_ACCESSED:
        r = mmu_probe_write(v, descriptor_at(v, selector) + 5, 1, BANK_KERNEL)
        if r != R_OK:
            return r
    set_segment(v, seg, selector, d)
    return R_OK


cdef int check_return_cs(Vcpu* v, uint32_t selector, uint64_t* d) noexcept nogil:
    cdef uint32_t code = selector & 0xFFFC
    cdef uint32_t rpl = selector & 3
    cdef int r
    if code == 0:
        return gp0(v)
    r = read_descriptor(v, selector, d)
    if r == R_BAD:
        return fault_code(v, GP, code)
    if r != R_OK:
        return r
    if rpl < v.cpl or not desc_is_code(d[0]):
        return fault_code(v, GP, code)
    if desc_type(d[0]) & DESC_CONFORMING:
        if desc_dpl(d[0]) > rpl:
            return fault_code(v, GP, code)
    elif desc_dpl(d[0]) != rpl:
        return fault_code(v, GP, code)
    if v.efer & EFER_LMA and desc_long(d[0]) and desc_db(d[0]):
        return fault_code(v, GP, code)
    if not desc_present(d[0]):
        return fault_code(v, NP, code)
    return R_OK


cdef int check_return_ss(Vcpu* v, uint32_t selector, uint32_t cpl, bint null_ok, uint64_t* d) noexcept nogil:
    """With a null selector that is allowed, *d is 0."""
    cdef uint32_t code = selector & 0xFFFC
    cdef int r
    d[0] = 0
    if code == 0:
        if null_ok and selector & 3 == cpl:
            return R_OK
        return gp0(v)
    r = read_descriptor(v, selector, d)
    if r == R_BAD:
        return fault_code(v, GP, code)
    if r != R_OK:
        return r
    if selector & 3 != cpl or not desc_writable_data(d[0]) or desc_dpl(d[0]) != cpl:
        return fault_code(v, GP, code)
    if not desc_present(d[0]):
        return fault_code(v, SS, code)
    return R_OK


cdef int check_target(Vcpu* v, uint64_t d, uint64_t offset) noexcept nogil:
    """The offset against the code segment that is about to be loaded."""
    if v.efer & EFER_LMA and desc_long(d):
        return R_OK if canonical(v, offset) else gp0(v)
    return gp0(v) if offset > desc_limit(d) else R_OK


cdef void drop_inner_segments(Vcpu* v) noexcept nogil:
    cdef int seg
    cdef uint32_t attr
    for seg in range(SEG_ES, SEG_GS + 1):
        if seg == SEG_CS or seg == SEG_SS:
            continue
        attr = v.seg[seg].attr
        if attr & ATTR_UNUSABLE or attr & 0x1C == 0x1C:      # conforming code stays
            continue
        if (attr >> 5) & 3 < v.cpl:
            v.seg[seg].selector = 0
            v.seg[seg].attr = ATTR_UNUSABLE


cdef int tss_pointer(Vcpu* v, uint32_t offset, uint32_t ext, uint64_t* sp) noexcept nogil:
    """Intel SDM vol 3, "Task Management in 64-bit Mode"."""
    if offset + 7 > v.seg[SEG_TR].limit:
        return fault_code(v, TS, (v.seg[SEG_TR].selector & 0xFFFC) | ext)
    return read_u64(v, v.seg[SEG_TR].base + offset, BANK_KERNEL, sp)


cdef int inner_stack(Vcpu* v, uint32_t cpl, uint32_t ext, Segment* ss, uint64_t* sp) noexcept nogil:
    """Intel SDM vol 3, "Stack Switching"."""
    cdef uint32_t offset, selector, code
    cdef uint32_t words[2]
    cdef uint16_t halves[2]
    cdef uint64_t d = 0
    cdef int r
    if v.seg[SEG_TR].attr & 8:
        offset = cpl * 8 + 4
        if offset + 5 > v.seg[SEG_TR].limit:
            return fault_code(v, TS, (v.seg[SEG_TR].selector & 0xFFFC) | ext)
        r = mmu_read(v, v.seg[SEG_TR].base + offset, words, 8, BANK_KERNEL)
        sp[0] = words[0]
        selector = words[1] & 0xFFFF
    else:
        offset = cpl * 4 + 2
        if offset + 3 > v.seg[SEG_TR].limit:
            return fault_code(v, TS, (v.seg[SEG_TR].selector & 0xFFFC) | ext)
        r = mmu_read(v, v.seg[SEG_TR].base + offset, halves, 4, BANK_KERNEL)
        sp[0] = halves[0]
        selector = halves[1]
    if r != R_OK:
        return r
    code = selector & 0xFFFC
    if code == 0:
        return fault_code(v, TS, ext)
    r = read_descriptor(v, selector, &d)
    if r == R_BAD:
        return fault_code(v, TS, code | ext)
    if r != R_OK:
        return r
    if selector & 3 != cpl or desc_dpl(d) != cpl or not desc_writable_data(d):
        return fault_code(v, TS, code | ext)
    if not desc_present(d):
        return fault_code(v, SS, code | ext)
    ss.selector = selector
    ss.base = desc_base(d)
    ss.limit = desc_limit(d)
    ss.attr = desc_attr(d) | ATTR_ACCESSED
    return R_OK


# ---------------------------------------------------------------------------------------------------------------------
# Instructions on segment registers and descriptors

cdef int mov_sreg(Vcpu* v, Insn* i) noexcept nogil:
    """8C, 8E."""
    cdef int seg = i.reg & 7
    cdef uint64_t value = 0
    cdef int r
    if seg > SEG_GS:
        return undefined(v)
    if i.opcode == 0x8C:
        r = write_rm(v, i, operand_size(v, i) if i.mod == 3 else 2, v.seg[seg].selector)
        return r if r != R_OK else advance(v, i)
    if seg == SEG_CS:
        return undefined(v)
    r = read_rm(v, i, 2, &value)
    if r == R_OK:
        r = load_segment(v, seg, <uint32_t>value)
    if r != R_OK:
        return r
    if seg == SEG_SS:
        v.shadow = SHADOW_SS
    return advance(v, i)


cdef int load_far_pointer(Vcpu* v, Insn* i) noexcept nogil:
    """LES, LDS (C4, C5), LSS, LFS, LGS (0F B2, B4, B5)."""
    cdef uint32_t size = operand_size(v, i)
    cdef uint64_t words[2]
    cdef uint64_t offset
    cdef uint32_t selector
    cdef int seg, r
    words[0] = words[1] = 0
    if i.mod == 3:
        return undefined(v)
    if size == 8 and bt_amd():
        size = 4                                  # no m16:64 there
    if i.map == 0:
        seg = SEG_ES if i.opcode == 0xC4 else SEG_DS
    else:
        seg = SEG_SS if i.opcode == 0xB2 else (SEG_FS if i.opcode == 0xB4 else SEG_GS)
    r = read_parts(v, i, size, 2, words)
    if r != R_OK:
        return r
    offset = words[0] & size_mask(size)
    selector = (<uint16_t*>(<uint64_t>words + size))[0]
    r = load_segment(v, seg, selector)
    if r != R_OK:
        return r
    write_reg(v, i.reg, offset, size)
    return advance(v, i)


cdef inline void set_zf(Vcpu* v, bint on) noexcept nogil:
    v.flags_lo = <uint8_t>((v.flags_lo & ~F_ZF) | (F_ZF if on else 0))


cdef int group6(Vcpu* v, Insn* i) noexcept nogil:
    """0F 00: SLDT STR LLDT LTR VERR VERW."""
    cdef int op = i.reg & 7
    cdef uint64_t value = 0
    cdef uint64_t d = 0
    cdef uint64_t high = 0
    cdef uint32_t selector, code, kind
    cdef uint8_t byte
    cdef bint ok
    cdef Segment* s
    cdef int r
    if not protected(v) or op > 5:
        return undefined(v)
    if op < 2:
        if v.cr4 & CR4_UMIP and v.cpl:
            return gp0(v)
        r = write_rm(v, i, operand_size(v, i) if i.mod == 3 else 2, v.seg[SEG_LDTR + op].selector)
        return r if r != R_OK else advance(v, i)
    if op < 4 and v.cpl:
        return gp0(v)
    r = read_rm(v, i, 2, &value)
    if r != R_OK:
        return r
    selector = <uint32_t>value
    code = selector & 0xFFFC
    if op >= 4:
        r = read_descriptor(v, selector, &d) if code else R_BAD
        if r == R_FAULT or r == R_EXIT:
            return r
        set_zf(v, r == R_OK and desc_segment(d)
               and (desc_type(d) & 12 == 12 or (desc_dpl(d) >= v.cpl and desc_dpl(d) >= selector & 3))
               and ((not desc_is_code(d) or desc_type(d) & DESC_WRITABLE != 0) if op == 4 else desc_writable_data(d)))
        return advance(v, i)
    s = &v.seg[SEG_LDTR + op - 2]
    if code == 0:
        if op == 3:
            return gp0(v)
        s.selector = selector
        s.base = 0
        s.limit = 0
        s.attr = ATTR_UNUSABLE
        return advance(v, i)
    r = R_BAD if selector & 4 else read_descriptor(v, selector, &d)
    if r == R_BAD:
        return fault_code(v, GP, code)
    if r != R_OK:
        return r
    kind = desc_type(d)
    if op == 2:
        ok = kind == 2
    else:
        ok = kind == 9 or (kind == 1 and not v.efer & EFER_LMA)
    if desc_segment(d) or not ok:
        return fault_code(v, GP, code)
    if not desc_present(d):
        return fault_code(v, NP, code)
    if v.efer & EFER_LMA:
        if (selector | 7) + 8 > v.gdtr.limit:
            return fault_code(v, GP, code)
        r = read_u64(v, descriptor_at(v, selector) + 8, BANK_KERNEL, &high)
        if r != R_OK:
            return r
        if (high >> 40) & 0x1F or not canonical_base(v, (high << 32) | desc_base(d)):
            return fault_code(v, GP, code)
    if op == 3:
        d |= <uint64_t>2 << 40                   # busy
        byte = <uint8_t>(d >> 40)
        r = mmu_write(v, descriptor_at(v, selector) + 5, &byte, 1, BANK_KERNEL)
        if r != R_OK:
            return r
    s.selector = selector
    s.base = (high << 32) | desc_base(d)
    s.limit = desc_limit(d)
    s.attr = desc_attr(d)
    return advance(v, i)


cdef int lar_lsl(Vcpu* v, Insn* i) noexcept nogil:
    """0F 02, 0F 03."""
    cdef uint32_t size = operand_size(v, i)
    cdef uint64_t value = 0
    cdef uint64_t d = 0
    cdef uint32_t selector, valid
    cdef bint ok = False
    cdef int r
    if not protected(v):
        return undefined(v)
    r = read_rm(v, i, 2, &value)
    if r != R_OK:
        return r
    selector = <uint32_t>value
    r = read_descriptor(v, selector, &d) if selector & 0xFFFC else R_BAD
    if r == R_FAULT or r == R_EXIT:
        return r
    if r == R_OK:
        # system descriptor types that the instruction knows, as a bit set
        if v.efer & EFER_LMA:
            valid = 0x1A04 if i.opcode == 2 else 0x0A04
        else:
            valid = 0x1A3E if i.opcode == 2 else 0x0A0E
        ok = desc_segment(d) or valid >> desc_type(d) & 1
        if ok and not (desc_segment(d) and desc_type(d) & 12 == 12):
            ok = desc_dpl(d) >= v.cpl and desc_dpl(d) >= selector & 3
    set_zf(v, ok)
    if ok:
        write_reg(v, i.reg, (d >> 32) & 0xF0FF00 if i.opcode == 2 else desc_limit(d), size)
    return advance(v, i)


cdef int arpl(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint64_t value = 0
    cdef bint lower
    cdef int r
    if not protected(v):
        return undefined(v)
    r = read_rm(v, i, 2, &value)
    if r != R_OK:
        return r
    lower = value & 3 < v.gpr[i.reg] & 3
    if lower:
        r = write_rm(v, i, 2, (value & 0xFFFC) | (v.gpr[i.reg] & 3))
        if r != R_OK:
            return r
    set_zf(v, lower)
    return advance(v, i)
