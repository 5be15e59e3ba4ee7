# cython: language_level=3
"""Stack instructions and near branches of 16- and 32-bit code, inline. What is not here is left to microcode."""

from pyhyve.cpu.bt.context cimport T

# As emit_stack of flow.pxd.
cdef bint emit_stack32(T* t, int n, int* took) noexcept nogil
# CALL, RET and indirect JMP. The block ends here.
cdef bint emit_branch32(T* t, int n) noexcept nogil
