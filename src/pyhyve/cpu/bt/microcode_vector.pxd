# cython: language_level=3
"""Saving and loading x87 and vector state but by XSAVE, and the masked byte stores."""

from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.state cimport Vcpu

cdef int group15(Vcpu* v, Insn* i) noexcept nogil
cdef int fpu_environment(Vcpu* v, Insn* i) noexcept nogil
cdef int masked_store(Vcpu* v, Insn* i) noexcept nogil
