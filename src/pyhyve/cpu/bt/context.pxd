# cython: language_level=3
"""What the parts of the translator share: the block that is being made, its accesses and exits, and where guest
registers are. How generated code finds the vCPU's fields is in emit.pxd."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from pyhyve.cpu.bt.codecache cimport Block, Cache
from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.emit cimport H_GSP, H_T0, Emit, e1, e2, e32
from pyhyve.cpu.bt.state cimport R10, R11, R15, RSP, Vcpu

cdef enum:
    K_MISS = 1              # TLB miss with dead flags
    K_MISS_LIVE = 2         # TLB miss, flags kept
    K_LINK = 3              # jump to a target in the page
    K_EXIT = 4              # jump to a target elsewhere
    K_POLL = 5
    K_MICRO_END = 6
    K_MICRO = 7             # an inline sequence that cannot: microcode, then behind the sequence

    MAX_INSNS = 48
    MAX_STUBS = 256

cdef struct Stub:
    int kind
    uint8_t* site           # rel32 that leads here
    uint8_t* resume
    uint64_t rip
    uint32_t width
    int access
    int32_t off             # of the tag compared
    int poll
    int index               # instruction
    int masked              # Insn.masked of the access, and the mask's register << 8

cdef struct Access:             # a memory access off an unscaled base register, found before code is made
    int valid
    int base                # guest register
    int version             # counts what may have changed the base
    int32_t off             # from the base's value (RSP: from its value at the start of this version)
    int32_t disp            # as the instruction has it
    uint32_t width
    int write

cdef struct Share:              # an access whose check later ones rely on
    int base
    int version
    int32_t lo
    int32_t hi
    int write

cdef struct T:
    Emit e
    Vcpu* v
    Cache* c
    Block* b
    uint64_t mode
    int size                # 16, 32, 64
    int bank
    int slow
    int single              # no groups of stack accesses
    int straddle
    int cpl
    uint64_t page           # linear page (RIP page) of the block
    uint64_t csbase
    uint64_t limit          # of CS
    int check               # bit SEG_*: accesses through ES, SS or DS are checked
    int sp16                # the stack pointer is SP
    int align               # alignment is checked
    int at_index            # a checked operand is at [r10 + at_index + at_disp]; -1: at [r10]
    int32_t at_disp
    int guard               # of the access that is being made: MissMeta.bank without the bank
    int n
    int n_stubs
    int next_poll           # the jump to the next instruction must poll
    int n_shares
    Share shares[16]
    Access acc[MAX_INSNS][2]
    int version[16]
    int32_t sp              # offset of RSP from its value when its version began
    Insn insns[MAX_INSNS]
    uint64_t rips[MAX_INSNS]
    uint8_t live[MAX_INSNS + 1]     # flags that may be read at or after instruction i, before being overwritten
    Stub stubs[MAX_STUBS]

cdef inline int32_t OFF(void* field) noexcept nogil:
    return <int32_t><int64_t>field

cdef inline int32_t o_gpr(int r) noexcept nogil:
    return r * 8

cdef inline int32_t o_rip() noexcept nogil:
    return OFF(&(<Vcpu*>NULL).rip)

cdef inline int32_t o_poll() noexcept nogil:
    return OFF(&(<Vcpu*>NULL).poll)

cdef inline int32_t o_tlb() noexcept nogil:
    return OFF(&(<Vcpu*>NULL).tlb[0])

cdef inline int32_t o_ibt() noexcept nogil:
    return OFF(&(<Vcpu*>NULL).ibt[0])

cdef inline int32_t o_segbase(int s) noexcept nogil:
    return OFF(&(<Vcpu*>NULL).seg[0].base) + s * (OFF(&(<Vcpu*>NULL).seg[1].base) - OFF(&(<Vcpu*>NULL).seg[0].base))

cdef inline bint special(int r) noexcept nogil:
    """Guest registers that live in memory."""
    return r == R10 or r == R11 or r == R15

cdef inline int host_of(int r) noexcept nogil:
    """The host register of a guest register that has one."""
    return H_GSP if r == RSP else r

cdef inline uint64_t near_target(T* t, Insn* i, uint64_t target) noexcept nogil:
    """The target of a direct branch, cut as its operand size says."""
    if i.opsize == 2:
        return target & 0xFFFF
    return target if t.size == 64 else target & <uint64_t>0xFFFFFFFF

cdef inline uint64_t branch_target(T* t, int n) noexcept nogil:
    """Where direct branch n of the block goes."""
    cdef Insn* i = &t.insns[n]
    return near_target(t, i, t.rips[n] + i.length + <uint64_t>i.imm)


cdef inline uint32_t at_rex(T* t) noexcept nogil:
    """The bits of REX that the checked operand needs."""
    return 0x41 | (0x42 if t.at_index >= 8 else 0)

cdef inline void at_modrm(T* t, int reg, int32_t off) noexcept nogil:
    """ModRM and what follows it, for `off` bytes behind the checked operand's first."""
    cdef int32_t disp = off + (t.at_disp if t.at_index >= 0 else 0)
    cdef uint32_t mod = 0 if disp == 0 else (0x40 if -128 <= disp <= 127 else 0x80)
    if t.at_index >= 0:
        e2(&t.e, mod | (reg & 7) << 3 | 4, (t.at_index & 7) << 3 | (H_T0 & 7))
    else:
        e1(&t.e, mod | (reg & 7) << 3 | (H_T0 & 7))
    if mod == 0x40:
        e1(&t.e, <uint32_t>disp & 0xFF)
    elif mod:
        e32(&t.e, <uint32_t>disp)

cdef inline void at_op(T* t, uint32_t op, int reg, int32_t off) noexcept nogil:
    """op reg, qword [the checked operand + off]"""
    e2(&t.e, 0x48 | (reg & 8) >> 1 | at_rex(t), op)
    at_modrm(t, reg, off)
