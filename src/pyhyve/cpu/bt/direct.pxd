# cython: language_level=3
"""What of the local APIC the processor does on its own thread: see apic.pxd."""

from pyhyve.cpu.bt.codecache cimport Cache
from pyhyve.cpu.bt.state cimport Vcpu

# loop_run() begins, ends.
cdef void direct_enter(Cache* c) noexcept nogil
cdef void direct_leave(Cache* c) noexcept nogil
# Let the next instruction boundary take the interrupt that is pending, if the guest can; else wait for a window.
cdef void direct_deliver(Vcpu* v, Cache* c) noexcept nogil
# Carry out what the exit `reason` is for. True: go on in the guest; else `reason` is for the monitor.
cdef bint direct_exit(Vcpu* v, Cache* c, int* reason) noexcept nogil
# Go on with a HLT that the monitor looked into. False: it is for the monitor again.
cdef bint direct_rest(Vcpu* v, Cache* c) noexcept nogil
