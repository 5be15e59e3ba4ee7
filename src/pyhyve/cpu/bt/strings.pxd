# cython: language_level=3
"""String instructions that are run natively (64-bit mode, forward, within a page)."""

from pyhyve.cpu.bt.context cimport T

# Emit instruction n inline. False: microcode always.
cdef bint emit_string(T* t, int n) noexcept nogil
