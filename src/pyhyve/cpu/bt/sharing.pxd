# cython: language_level=3
"""Accesses that share a check: those off the same value of a base register, where one check of all the bytes serves the
later ones too."""

from libc.stdint cimport int32_t, uint32_t

from pyhyve.cpu.bt.context cimport T

# Before code is made: find which accesses of the block go off which value of which register.
cdef void find_accesses(T* t) noexcept nogil
# The host address of instruction n's memory operand; of [base + disp], `width` bytes of stack: [r10 + T.at_index +
# T.at_disp], or with T.at_index = -1 [r10].
cdef void operand_at(T* t, int n, int access, uint32_t width, int live) noexcept nogil
cdef void stack_operand(T* t, int n, int base, int32_t disp, int access, uint32_t width, int live) noexcept nogil
# The operand's at [r10] always.
cdef void operand(T* t, int n, int access, uint32_t width, int live) noexcept nogil
