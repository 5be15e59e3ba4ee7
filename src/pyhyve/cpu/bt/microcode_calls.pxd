# cython: language_level=3
"""The fast system calls."""

from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.state cimport Vcpu

cdef int syscall(Vcpu* v, Insn* i) noexcept nogil
cdef int sysret(Vcpu* v, Insn* i) noexcept nogil
cdef int sysenter(Vcpu* v, Insn* i) noexcept nogil
cdef int sysexit(Vcpu* v, Insn* i) noexcept nogil
