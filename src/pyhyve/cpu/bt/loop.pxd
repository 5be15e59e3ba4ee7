# cython: language_level=3
"""The inner loop: find a block, run it, see why it was left."""

from libc.stdint cimport uint64_t

from pyhyve.cpu.bt.codecache cimport Cache
from pyhyve.cpu.bt.state cimport Vcpu

# Run until there is something for the monitor; returns exit.reason. GS must point at `v`, the guest's vector state be
# in the registers.
cdef int loop_run(Vcpu* v) noexcept nogil
cdef void loop_init(Cache* c) noexcept nogil
# For signal handlers: guest RIP of the instruction whose host code holds `rx`; 0 and found = 0 if there is none.
cdef uint64_t loop_guest_rip(Cache* c, uint64_t rx, int* found) noexcept nogil
