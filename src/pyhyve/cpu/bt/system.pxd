# cython: language_level=3
"""System instructions that are worth inline code."""

from pyhyve.cpu.bt.context cimport T

# Emit instruction n inline. False: microcode.
cdef bint emit_system(T* t, int n) noexcept nogil
