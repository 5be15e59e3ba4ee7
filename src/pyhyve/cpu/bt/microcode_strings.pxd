# cython: language_level=3
"""MOVS STOS LODS SCAS CMPS INS OUTS, with and without REP."""

from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.state cimport Vcpu

cdef int string_operation(Vcpu* v, Insn* i) noexcept nogil
