# cython: language_level=3
"""Which of several exceptions of one instruction comes first."""

from libc.stdint cimport uint32_t, uint64_t

from pyhyve.cpu.bt.state cimport Vcpu

# A copied instruction's access of `width` bytes at `lin` has met the exception in fault_vector (#PF, #AC, one of
# segmentation, or #GP for an address that is not canonical): make it what the processor gives, which looks at other
# things before or says #SS.
cdef void access_fault(Vcpu* v, uint64_t lin, uint32_t width, int access) noexcept nogil
