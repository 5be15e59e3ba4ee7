# cython: language_level=3
"""Copied instructions in EVEX encoding, and memory operands under a mask."""

from pyhyve.cpu.bt.context cimport T

# Emit instruction n, of class C_COPY in EVEX encoding.
cdef void emit_evex(T* t, int n) noexcept nogil
# r10 = the host address of instruction n's memory operand, which a mask guards (Insn.masked).
cdef void masked_operand(T* t, int n, int live) noexcept nogil
