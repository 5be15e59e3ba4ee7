# cython: language_level=3
"""The processor's part of a local APIC as the monitor sees it: see pyhyve.cpu.processor.ApicState."""

from pyhyve.cpu.bt.apic cimport Apic

cdef class BtApicState:
    cdef Apic* a
    cdef object owner       # of the memory

cdef BtApicState make_state(Apic* a, object owner)
# Let the alarm interrupt the calling thread, which is about to run the vCPU. 0, or an error's number.
cdef int alarm_here(Apic* a)
cdef void alarm_delete(Apic* a)
