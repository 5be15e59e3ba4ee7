# cython: language_level=3
"""Far transfers of control."""

from libc.stdint cimport uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.state cimport Vcpu

cdef int far_transfer(Vcpu* v, Insn* i, uint32_t selector, uint64_t offset, uint32_t size, bint call) noexcept nogil
cdef int far_return(Vcpu* v, Insn* i) noexcept nogil
