# cython: language_level=3
"""Guest code to host code: see translate.pyx."""

from libc.stdint cimport uint8_t, uint64_t

from pyhyve.cpu.bt.codecache cimport Block, Cache
from pyhyve.cpu.bt.context cimport MAX_INSNS
from pyhyve.cpu.bt.thunks cimport *     # who calls the translator handles what its code asks for, too

cdef enum:
    MAX_BLOCK_BYTES = 32768  # upper bound of host code that one block takes

# Translate the block at v.rip. `code` is the host address of its first byte; `avail` how many bytes the page still has;
# `hva2`, where not 0, is the host page that follows (fetched only because the first instruction needs it).
# NULL: no room (reset the cache and try again), or v.fault_vector says why (avail too short: straddle_needed is set).
cdef Block* translate(Cache* c, uint64_t rip, const uint8_t* code, int avail, uint64_t hva2, uint64_t mode,
                      int* straddle_needed) noexcept nogil
