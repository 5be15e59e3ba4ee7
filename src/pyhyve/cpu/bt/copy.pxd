# cython: language_level=3
"""Copied instructions: as the guest has them, with their operands where registers and memory are now; and LEA."""

from pyhyve.cpu.bt.context cimport T

# Emit instruction n, of class C_COPY.
cdef void emit_copy(T* t, int n) noexcept nogil
