# cython: language_level=3
"""Which of the guest's flags are needed at each instruction: where none is, a shorter access check will do."""

from libc.stdint cimport uint64_t

from pyhyve.cpu.bt.context cimport T

# Flags that may be read from `rip` on before they are overwritten (FL_ALL where that cannot be seen).
cdef int live_at(T* t, uint64_t rip) noexcept nogil
# Fill t.live, for the instructions decoded.
cdef void find_liveness(T* t) noexcept nogil
