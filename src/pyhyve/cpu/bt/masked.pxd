# cython: language_level=3
"""Memory operands under a mask: what the mask leaves out is not accessed, so it does not fault either.

Generated code checks the whole operand and runs the instruction as it is if all of it may be accessed. Otherwise it
comes here. Source: Intel SDM vol 2, "Memory Fault Suppression" of "Exception Classifications of EVEX-Encoded
Instructions"; "VMASKMOV".
"""

from libc.stdint cimport uint64_t

from pyhyve.cpu.bt.state cimport Vcpu
from pyhyve.cpu.bt.thunks cimport MaskMeta

cdef inline uint64_t bounce_of(Vcpu* v, uint64_t lin) noexcept nogil:
    """The bounce buffer for an access at `lin`, aligned as that is; up to 512 bytes."""
    return ((<uint64_t>v.bounce + 63) & ~<uint64_t>63) + (lin & 63)

# The host address with which the instruction accesses what the mask selects, and nothing else; 0 with *r set.
cdef uint64_t masked_address(Vcpu* v, uint64_t lin, MaskMeta* m, int* r) noexcept nogil
# Behind a store to the bounce buffer: carry out what the mask selects.
cdef void masked_commit(Vcpu* v) noexcept nogil
