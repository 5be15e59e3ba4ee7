# cython: language_level=3
"""What generated code and the helpers of loop.pyx agree on, and the fixed code at the start of the cache through which
one reaches the other."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.codecache cimport Cache
from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.emit cimport Emit
from pyhyve.cpu.bt.emit cimport Emit, e2
from pyhyve.cpu.bt.state cimport Vcpu

cdef enum:
    # Vcpu.leave_reason
    LEAVE_BRANCH = 1        # go on at v.rip
    LEAVE_LINK = 2          # go on at v.rip; leave_arg: LinkMeta of the jump that may be patched
    LEAVE_POLL = 3          # v.poll was set
    LEAVE_MICRO = 4         # leave_arg: MicroMeta of an instruction to run in microcode
    LEAVE_FAULT = 5         # v.fault_* at v.rip
    LEAVE_EXIT = 6          # v.exit is filled
    LEAVE_SLOW = 7          # run the instruction at v.rip as a slow block
    LEAVE_SINGLE = 8        # go on at v.rip with stack accesses checked one by one

    GROUP = 0x80            # in MissMeta.access: several stack accesses checked at once
    SHARED = 0x40           # the check serves later accesses too
    ADDEND = 0x20           # the helper returns what is to be added to the linear address, not the host address

ctypedef packed struct LinkMeta:    # at r11 in the link thunk
    int32_t site            # the rel32 to patch: its address less this structure's
    uint8_t poll            # the link closes a loop: go to entry_poll

ctypedef packed struct MissMeta:    # at r11 in the miss, slow or commit thunk
    uint64_t rip
    int32_t resume          # where to go on: its address less this structure's
    uint16_t width
    uint8_t access
    uint8_t bank            # bits 0-1; bits 2-4: 1 + the segment to check, bits 5-7: logarithm of the alignment to check

ctypedef packed struct MaskMeta:    # behind a call of the masked thunk
    MissMeta miss
    uint8_t masked          # Insn.masked
    uint8_t register        # the opmask register, or the vector of the mask
    uint8_t slow            # in a slow block
    uint8_t pad

ctypedef packed struct MicroMeta:   # at r11 in the micro thunk
    uint64_t rip
    int32_t resume
    uint32_t pad
    Insn insn

# The helpers that thunks call; set by loop.pyx before thunks are made.
ctypedef uint64_t (*miss_fn)(Vcpu*, uint64_t, MissMeta*) noexcept nogil
ctypedef uint64_t (*micro_fn)(Vcpu*, MicroMeta*) noexcept nogil

# Jump to the guest address in r10 through the indirect-branch table of `bank`. Destroys r11.
cdef void ibt_r10(Emit* e, int bank) noexcept nogil
# Generate the fixed entry and exit code at the start of the cache.
cdef void make_thunks(Cache* c, miss_fn miss, miss_fn masked, miss_fn slow, miss_fn commit,
                      micro_fn micro) noexcept nogil

cdef inline void put_mask(Emit* e, uint32_t masked, uint32_t slow) noexcept nogil:
    """The part of MaskMeta behind MissMeta."""
    e2(e, masked & 0xFF, masked >> 8)
    e2(e, slow, 0)
