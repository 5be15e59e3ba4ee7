# cython: language_level=3
"""Saving and loading x87 and vector state, and the masked byte stores."""

from libc.stdint cimport uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.state cimport Vcpu

# Put state components into their initial configuration.
cdef void init_components(Vcpu* v, uint64_t mask) noexcept nogil
cdef int group15(Vcpu* v, Insn* i) noexcept nogil
cdef int xsavec(Vcpu* v, Insn* i) noexcept nogil
cdef int fpu_environment(Vcpu* v, Insn* i) noexcept nogil
cdef int masked_store(Vcpu* v, Insn* i) noexcept nogil
