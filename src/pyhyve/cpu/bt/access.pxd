# cython: language_level=3
"""One memory access: the effective address of an operand, and the host address that the software TLB gives for a linear
address. What stands between them is in segments.pyx."""

from libc.stdint cimport uint32_t, uint64_t

from pyhyve.cpu.bt.context cimport T
from pyhyve.cpu.bt.decode cimport Insn

# r10 = the offset of the memory operand of `i` in its segment.
cdef void effective_address(T* t, Insn* i, uint64_t next_rip) noexcept nogil
# r10: linear address to host address, checked for instruction i. Keeps flags where `live`.
cdef void host_address(T* t, int i, int access, uint32_t width, int live) noexcept nogil
# Behind a store, in a slow block: carry it out.
cdef void commit_store(T* t, int i) noexcept nogil
