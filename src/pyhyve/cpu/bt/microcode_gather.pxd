# cython: language_level=3
"""Gathers and scatters: one memory access for each element that the mask selects."""

from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.state cimport Vcpu

cdef int gather(Vcpu* v, Insn* i) noexcept nogil
cdef int gather_evex(Vcpu* v, Insn* i) noexcept nogil
cdef int scatter(Vcpu* v, Insn* i) noexcept nogil
