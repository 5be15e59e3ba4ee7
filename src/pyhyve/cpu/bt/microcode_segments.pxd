# cython: language_level=3
"""Descriptors and segment registers."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.state cimport SEG_LDTR, Segment, Vcpu

cdef enum:
    R_BAD = 8                # read_descriptor: the selector names nothing; the caller knows which exception that is

    DESC_ACCESSED = 1        # of desc_type: the type's bits
    DESC_WRITABLE = 2        # data; of code: readable
    DESC_CONFORMING = 4      # code; of data: expands down
    DESC_CODE = 8

cdef inline uint32_t desc_type(uint64_t d) noexcept nogil:
    return <uint32_t>(d >> 40) & 15

cdef inline bint desc_segment(uint64_t d) noexcept nogil:
    """Code or data, not a system descriptor."""
    return (d >> 44) & 1

cdef inline bint desc_is_code(uint64_t d) noexcept nogil:
    return (d >> 43) & 3 == 3

cdef inline bint desc_writable_data(uint64_t d) noexcept nogil:
    return (d >> 41) & 13 == 9

cdef inline uint32_t desc_dpl(uint64_t d) noexcept nogil:
    return <uint32_t>(d >> 45) & 3

cdef inline bint desc_present(uint64_t d) noexcept nogil:
    return (d >> 47) & 1

cdef inline bint desc_long(uint64_t d) noexcept nogil:
    return (d >> 53) & 1

cdef inline bint desc_db(uint64_t d) noexcept nogil:
    return (d >> 54) & 1

cdef inline uint32_t desc_base(uint64_t d) noexcept nogil:
    return <uint32_t>((d >> 16) & 0xFFFFFF) | (<uint32_t>(d >> 56) << 24)

cdef inline uint32_t desc_limit(uint64_t d) noexcept nogil:
    cdef uint32_t limit = <uint32_t>(d & 0xFFFF) | (<uint32_t>(d >> 32) & 0xF0000)
    return limit << 12 | 0xFFF if (d >> 55) & 1 else limit

cdef inline uint32_t desc_attr(uint64_t d) noexcept nogil:
    return <uint32_t>(d >> 40) & 0xF0FF

cdef inline uint64_t descriptor_at(Vcpu* v, uint32_t selector) noexcept nogil:
    """Linear address of the descriptor that a selector names."""
    return (v.seg[SEG_LDTR].base if selector & 4 else v.gdtr.base) + (selector & 0xFFF8)

# R_OK, R_BAD, or what reading the table gave.
cdef int read_descriptor(Vcpu* v, uint32_t selector, uint64_t* d) noexcept nogil
# Fill the hidden part from a checked descriptor and set its accessed bit in memory.
cdef void set_segment(Vcpu* v, int seg, uint32_t selector, uint64_t d) noexcept nogil
cdef void set_null(Vcpu* v, int seg, uint32_t selector) noexcept nogil
cdef void set_real(Vcpu* v, int seg, uint32_t selector) noexcept nogil
# Load ES, SS, DS, FS or GS with all checks of the present mode.
cdef int load_segment(Vcpu* v, int seg, uint32_t selector) noexcept nogil
# The target of a return to an outer or the same ring: R_OK, or the fault.
cdef int check_return_cs(Vcpu* v, uint32_t selector, uint64_t* d) noexcept nogil
cdef int check_return_ss(Vcpu* v, uint32_t selector, uint32_t cpl, bint null_ok, uint64_t* d) noexcept nogil
cdef int check_target(Vcpu* v, uint64_t d, uint64_t offset) noexcept nogil
# After a return to an outer ring: data segments of an inner ring become null.
cdef void drop_inner_segments(Vcpu* v) noexcept nogil
# The inner ring's stack from the TSS, legacy mode: the segment's hidden part and the stack pointer.
cdef int inner_stack(Vcpu* v, uint32_t cpl, uint32_t ext, Segment* ss, uint64_t* sp) noexcept nogil
# An 8-byte slot of the 64-bit TSS: RSPn or ISTn.
cdef int tss_pointer(Vcpu* v, uint32_t offset, uint32_t ext, uint64_t* sp) noexcept nogil

# Instructions
cdef int mov_sreg(Vcpu* v, Insn* i) noexcept nogil
cdef int load_far_pointer(Vcpu* v, Insn* i) noexcept nogil
cdef int group6(Vcpu* v, Insn* i) noexcept nogil
cdef int lar_lsl(Vcpu* v, Insn* i) noexcept nogil
cdef int arpl(Vcpu* v, Insn* i) noexcept nogil
