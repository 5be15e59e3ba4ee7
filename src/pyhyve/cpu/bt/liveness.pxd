# cython: language_level=3
"""Which of the guest's flags are needed at each instruction: where none is, a shorter access check will do."""

from pyhyve.cpu.bt.context cimport T

# Fill t.live, for the instructions decoded.
cdef void find_liveness(T* t) noexcept nogil
