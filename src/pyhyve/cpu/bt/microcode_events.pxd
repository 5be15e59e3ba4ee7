# cython: language_level=3
"""Delivery of exceptions and interrupts, and what returns from them."""

from libc.stdint cimport uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.state cimport Vcpu

# Through the IDT, once: R_FAULT if the delivery itself faults. `rip` and `flags` are what is pushed.
cdef int deliver(Vcpu* v, uint32_t vector, bint software, bint has_error, uint32_t error, uint64_t rip,
                 uint64_t flags) noexcept nogil
cdef int event_exception(Vcpu* v) noexcept nogil
cdef int event_interrupt(Vcpu* v, uint32_t vector, bint software, bint has_error, uint64_t error) noexcept nogil

# Instructions
cdef int software_interrupt(Vcpu* v, Insn* i, uint32_t vector) noexcept nogil
cdef int iret(Vcpu* v, Insn* i) noexcept nogil
