# cython: language_level=3
"""Segmentation and alignment in translated code: what blocks are made for, the checks that they make, and what the
helpers do when one of these fails.

Outside of 64-bit mode, ES, SS and DS are mostly *flat* (base 0, limit 4 GiB, readable and writable). Whether they are
is part of a block's mode, so accesses through a flat segment are neither checked nor moved. All others are checked by
poison: bits that no linear address has are added to one that may be wrong. Then the TLB does not match, and the helper
does exactly what the instruction should. So a check is no branch, leaves flags alone, and need not be exact: it may find
too much.

    with g = GUARD - (limit + 1) - base, or GUARD - base where nothing may be accessed (or a segment expands down):
    base + offset + g + width - 1 has the bit GUARD if the last byte is over the limit

Where RFLAGS.AC and CR0.AM demand alignment, the address's low bits become its highest ones.
"""

from libc.stdint cimport uint32_t, uint64_t

from pyhyve.cpu.bt.context cimport T
from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.state cimport Vcpu

cdef enum:
    GUARD_LOG = 58
    CS_LIMITS_FULL = 63    # no index is left: drop all blocks, then segments_forget

cdef void segments_init(Vcpu* v) noexcept nogil
# The mode key's part for 16- and 32-bit code. Brings the guards up to date.
cdef uint64_t segments_mode(Vcpu* v) noexcept nogil
# Forget the limits of code segments. No block may be left.
cdef void segments_forget(Vcpu* v) noexcept nogil
# What the mode key says, for the translator.
cdef void segments_begin(T* t) noexcept nogil

# r10 = offset in the segment: make it a linear address, poisoned if `width` bytes may not be accessed. Keeps flags,
# destroys r11. In 64-bit mode: add the base of FS or GS.
cdef void add_segment(T* t, int seg, int access, uint32_t width) noexcept nogil
# r10 = linear address: poison it if it is not aligned as instruction i (NULL: a stack access) needs.
cdef void add_alignment(T* t, Insn* i, uint32_t width) noexcept nogil
# In a helper: *lin without poison, after all checks that the instruction makes before it looks at a page. Of the operand
# that starts at *lin, `width` bytes from `first` on are accessed. `bank`: MissMeta's.
cdef int segment_check(Vcpu* v, uint64_t* lin, int bank, uint32_t first, uint32_t width, int access) noexcept nogil
