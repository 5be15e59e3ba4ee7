# cython: language_level=3
"""Stack instructions and branches that are run natively: in 64-bit mode, and jumps in all modes."""

from pyhyve.cpu.bt.context cimport T

# Emit instruction n, and `took` - 1 behind it. False: microcode.
cdef bint emit_stack(T* t, int n, int* took) noexcept nogil
# Emit instruction n, with which the block ends unless it is a conditional branch. False: microcode.
cdef bint emit_branch(T* t, int n) noexcept nogil
