# cython: language_level=3
"""What all microcode needs: modes, faults, operands, linear addresses and the stack."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.mmu cimport mmu_read, mmu_write
from pyhyve.cpu.bt.state cimport *

cdef enum:
    # Exception vectors
    DE = 0
    DB = 1
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17

    CR0_PE = 1
    CR0_MP = 2
    CR0_EM = 4
    CR0_TS = 8
    CR0_ET = 16
    CR0_NE = 32
    CR0_WP = 1 << 16
    CR0_AM = 1 << 18
    CR0_NW = 1 << 29
    CR0_CD = 1 << 30

    CR4_VME = 1 << 0
    CR4_PVI = 1 << 1
    CR4_TSD = 1 << 2
    CR4_DE = 1 << 3
    CR4_PSE = 1 << 4
    CR4_PAE = 1 << 5
    CR4_PGE = 1 << 7
    CR4_OSFXSR = 1 << 9
    CR4_UMIP = 1 << 11
    CR4_LA57 = 1 << 12
    CR4_FSGSBASE = 1 << 16
    CR4_PCIDE = 1 << 17
    CR4_OSXSAVE = 1 << 18
    CR4_SMEP = 1 << 20
    CR4_SMAP = 1 << 21
    CR4_PKE = 1 << 22

    EFER_SCE = 1 << 0
    EFER_LME = 1 << 8
    EFER_LMA = 1 << 10
    EFER_NXE = 1 << 11

    # Segment.attr
    ATTR_ACCESSED = 1
    ATTR_S = 0x10
    ATTR_P = 0x80
    ATTR_L = 0x2000
    ATTR_DB = 0x4000
    ATTR_UNUSABLE = 0x10000

    F_ARITH = F_CF | F_PF | F_AF | F_ZF | F_SF | F_OF

# --- faults ----------------------------------------------------------------------------------------------------------

cdef inline int fault(Vcpu* v, uint32_t vector) noexcept nogil:
    """An exception without an error code."""
    v.fault_vector = vector
    v.fault_has_error = 0
    v.fault_error = 0
    return R_FAULT

cdef inline int fault_code(Vcpu* v, uint32_t vector, uint32_t code) noexcept nogil:
    v.fault_vector = vector
    v.fault_has_error = 1
    v.fault_error = code
    return R_FAULT

cdef inline int gp0(Vcpu* v) noexcept nogil:
    return fault_code(v, GP, 0)

cdef inline int undefined(Vcpu* v) noexcept nogil:
    return fault(v, UD)

cdef inline int engine_error(Vcpu* v, Insn* i) noexcept nogil:
    """The engine cannot run this instruction: qualification has 1 in bit 32, then enc, map, opcode and ModRM bytes."""
    v.exit.reason = X_ENGINE_ERROR
    v.exit.length = i.length
    v.exit.qualification = ((<uint64_t>1 << 32) | (<uint64_t>i.enc << 24) | (<uint64_t>i.map << 16)
                            | (<uint64_t>i.opcode << 8) | i.modrm)
    return R_EXIT

# --- modes -----------------------------------------------------------------------------------------------------------

cdef inline bint is64(Vcpu* v) noexcept nogil:
    return v.efer & EFER_LMA and v.seg[SEG_CS].attr & ATTR_L

cdef inline bint protected(Vcpu* v) noexcept nogil:
    """Protected mode (with or without long mode), but not virtual-8086 mode."""
    return v.cr0 & CR0_PE and not v.sysflags & F_VM

cdef inline uint32_t iopl(Vcpu* v) noexcept nogil:
    return (v.sysflags >> 12) & 3

cdef inline bint canonical(Vcpu* v, uint64_t lin) noexcept nogil:
    cdef int64_t high = (<int64_t>lin) >> (56 if v.cr4 & CR4_LA57 else 47)
    return high == 0 or high == -1

cdef inline bint canonical_base(Vcpu* v, uint64_t lin) noexcept nogil:
    """For what keeps an address (MSRs, bases of segments and tables, INVPCID): as wide as the processor has them,
    whatever CR4.LA57 says."""
    cdef int64_t high = (<int64_t>lin) >> (56 if v.la57 else 47)
    return high == 0 or high == -1

cdef inline uint32_t operand_size(Vcpu* v, Insn* i) noexcept nogil:
    """2, 4 or 8 by CS, 66 and REX.W, for instructions whose size is not 64 bits by default."""
    if is64(v):
        if i.rex & 8:
            return 8
        return 2 if i.prefixes & P_66 else 4
    if v.seg[SEG_CS].attr & ATTR_DB:
        return 2 if i.prefixes & P_66 else 4
    return 4 if i.prefixes & P_66 else 2

cdef inline uint32_t stack_size(Vcpu* v, Insn* i) noexcept nogil:
    """As operand_size, for stack operations: 8 or 2 in 64-bit mode."""
    if is64(v):
        return 2 if i.prefixes & P_66 and not i.rex & 8 else 8
    return operand_size(v, i)

cdef inline uint64_t size_mask(uint32_t size) noexcept nogil:
    return ~<uint64_t>0 if size == 8 else (<uint64_t>1 << (size * 8)) - 1

cdef inline int advance(Vcpu* v, Insn* i) noexcept nogil:
    """The instruction is done. IP does not wrap: behind offset FFFFH follows a fetch over the limit."""
    v.rip += i.length
    if not is64(v):
        v.rip &= 0xFFFFFFFFULL
    return R_OK

cdef inline uint64_t next_rip(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint64_t rip = v.rip + i.length
    if not is64(v):
        rip &= 0xFFFFFFFFULL
    return rip

# --- registers -------------------------------------------------------------------------------------------------------

cdef inline void write_reg(Vcpu* v, int reg, uint64_t value, uint32_t size) noexcept nogil:
    if size == 8:
        v.gpr[reg] = value
    elif size == 4:
        v.gpr[reg] = value & 0xFFFFFFFFULL
    elif size == 2:
        v.gpr[reg] = (v.gpr[reg] & ~<uint64_t>0xFFFF) | (value & 0xFFFF)
    else:
        v.gpr[reg] = (v.gpr[reg] & ~<uint64_t>0xFF) | (value & 0xFF)

cdef inline void set_arith(Vcpu* v, uint64_t flags) noexcept nogil:
    v.flags_lo = <uint8_t>(flags & 0xD5)
    v.flags_of = <uint8_t>((flags >> 11) & 1)

# --- memory operands -------------------------------------------------------------------------------------------------

cdef inline uint64_t effective(Vcpu* v, Insn* i) noexcept nogil:
    """The memory operand's offset within its segment."""
    cdef uint64_t a = <uint64_t>i.disp
    if i.base == REG_RIP:
        a += v.rip + i.length
    elif i.base != REG_NONE:
        a += v.gpr[i.base]
    if i.index != REG_NONE:
        a += v.gpr[i.index] * i.scale
    if i.addrsize == 4:
        a &= 0xFFFFFFFFULL
    elif i.addrsize == 2:
        a &= 0xFFFF
    return a

cdef inline int linear(Vcpu* v, int seg, uint64_t offset, uint32_t size, int access, uint64_t* lin) noexcept nogil:
    """Segmentation: `size` bytes at seg:offset; #GP(0) or #SS(0) if the segment does not allow the access."""
    if is64(v):
        lin[0] = offset + (v.seg[seg].base if seg >= SEG_FS else 0)
        if seg == SEG_SS and not (canonical(v, offset) and canonical(v, offset + size - 1)):
            return fault_code(v, SS, 0)
        if not (canonical(v, lin[0]) and canonical(v, lin[0] + size - 1)):
            return gp0(v)
        return R_OK
    return linear_checked(v, &v.seg[seg], offset, size, access, lin, SS if seg == SEG_SS else GP)

cdef inline int linear_checked(Vcpu* v, Segment* s, uint64_t offset, uint32_t size, int access, uint64_t* lin,
                               uint32_t vector) noexcept nogil:
    """Intel SDM vol 3, "Limit Checking" and "Type Checking"."""
    cdef uint64_t last = offset + size - 1
    cdef uint32_t kind = s.attr & 15
    if s.attr & ATTR_UNUSABLE:
        return fault_code(v, vector, 0)
    if protected(v) and (kind & 2 == 0 or kind & 8):
        # read-only data, or code: never written, and read only if readable
        if access == ACCESS_WRITE or (kind & 8 and not kind & 2):
            return fault_code(v, vector, 0)
    if kind & 12 == 4:
        if offset <= s.limit or last > (0xFFFFFFFFULL if s.attr & ATTR_DB else 0xFFFFULL):
            return fault_code(v, vector, 0)
    elif last > s.limit:
        return fault_code(v, vector, 0)
    lin[0] = (s.base + offset) & 0xFFFFFFFFULL
    return R_OK

cdef inline int aligned(Vcpu* v, uint64_t lin, uint32_t to) noexcept nogil:
    """#AC where the program has asked for it: behind the checks of segmentation, before those of pages."""
    if v.acflag and lin & (to - 1) and v.cpl == 3 and v.cr0 & CR0_AM and canonical(v, lin):
        return fault_code(v, AC, 0)
    return R_OK

cdef inline uint32_t natural(uint32_t size) noexcept nogil:
    """The alignment of an operand; pointers of 6 and images of 10 bytes count by doublewords."""
    return 4 if size == 6 or size == 10 else size

cdef inline int read_at(Vcpu* v, Insn* i, uint64_t offset, uint32_t size, uint32_t to, void* out) noexcept nogil:
    cdef uint64_t lin = 0
    cdef int r = linear(v, i.seg, offset, size, ACCESS_READ, &lin)
    if r == R_OK:
        r = aligned(v, lin, to)
    if r != R_OK:
        return r
    return mmu_read(v, lin, out, size, v.bank)

cdef inline int read_parts(Vcpu* v, Insn* i, uint32_t first, uint32_t second, void* out) noexcept nogil:
    """A memory operand of two parts. As AMD's processors have it, each is checked by itself, one behind the other, and
    the second's offset goes on at 0 where the address size ends."""
    cdef uint64_t offset = effective(v, i)
    cdef int r = read_at(v, i, offset, first, first, out)
    if r != R_OK:
        return r
    return read_at(v, i, (offset + first) & size_mask(i.addrsize), second, second, <void*>(<uint64_t>out + first))

cdef inline int read_mem(Vcpu* v, Insn* i, uint32_t size, void* out) noexcept nogil:
    return read_at(v, i, effective(v, i), size, natural(size), out)

cdef inline int write_mem(Vcpu* v, Insn* i, uint32_t size, const void* source) noexcept nogil:
    cdef uint64_t lin = 0
    cdef int r = linear(v, i.seg, effective(v, i), size, ACCESS_WRITE, &lin)
    if r == R_OK:
        r = aligned(v, lin, natural(size))
    if r != R_OK:
        return r
    return mmu_write(v, lin, source, size, v.bank)

cdef inline int read_rm(Vcpu* v, Insn* i, uint32_t size, uint64_t* value) noexcept nogil:
    """The r/m operand, zero-extended; size 2, 4 or 8."""
    if i.mod == 3:
        value[0] = v.gpr[i.rm] & size_mask(size)
        return R_OK
    value[0] = 0
    return read_mem(v, i, size, value)

cdef inline int write_rm(Vcpu* v, Insn* i, uint32_t size, uint64_t value) noexcept nogil:
    if i.mod == 3:
        write_reg(v, i.rm, value, size)
        return R_OK
    return write_mem(v, i, size, &value)

# --- the stack -------------------------------------------------------------------------------------------------------

cdef inline uint64_t sp_mask(Vcpu* v) noexcept nogil:
    if is64(v):
        return ~<uint64_t>0
    return 0xFFFFFFFFULL if v.seg[SEG_SS].attr & ATTR_DB else 0xFFFFULL

cdef inline void set_sp(Vcpu* v, uint64_t sp) noexcept nogil:
    """Put a stack pointer back into RSP: as much of it as the stack's width says."""
    cdef uint64_t mask = sp_mask(v)
    if mask == 0xFFFF:
        v.gpr[RSP] = (v.gpr[RSP] & ~<uint64_t>0xFFFF) | (sp & 0xFFFF)
    else:
        v.gpr[RSP] = sp & mask

cdef inline int push_to(Vcpu* v, uint64_t* sp, const void* source, uint32_t size) noexcept nogil:
    """Push `size` bytes; *sp moves, RSP does not."""
    cdef uint64_t at = (sp[0] - size) & sp_mask(v)
    cdef uint64_t lin = 0
    cdef int r = linear(v, SEG_SS, at, size, ACCESS_WRITE, &lin)
    if r == R_OK:
        r = aligned(v, lin, size)
    if r == R_OK:
        r = mmu_write(v, lin, source, size, v.bank)
        if r == R_OK:
            sp[0] = at
    return r

cdef inline int pop_from(Vcpu* v, uint64_t* sp, void* out, uint32_t size) noexcept nogil:
    """Pop `size` bytes; *sp moves, RSP does not."""
    cdef uint64_t lin = 0
    cdef int r = linear(v, SEG_SS, sp[0] & sp_mask(v), size, ACCESS_READ, &lin)
    if r == R_OK:
        r = aligned(v, lin, size)
    if r == R_OK:
        r = mmu_read(v, lin, out, size, v.bank)
        if r == R_OK:
            sp[0] = (sp[0] + size) & sp_mask(v)
    return r

cdef inline int pop_slot(Vcpu* v, uint64_t sp, uint32_t slot, uint64_t* out, uint32_t size) noexcept nogil:
    """Read the word `slot` words above the top of the stack."""
    cdef uint64_t at = sp + slot * size
    out[0] = 0
    return pop_from(v, &at, out, size)
