# cython: language_level=3
"""The processor's part of a local APIC as the monitor sees it: see pyhyve.cpu.processor.ApicState."""

from pyhyve.cpu.bt.apic cimport Apic

cdef class BtApicState:
    cdef Apic* a
    cdef object owner       # of the memory

cdef BtApicState make_state(Apic* a, object owner)
