# cython: language_level=3
"""XSAVE and its kin, and the protection-key register, which is one of the state components."""

from libc.stdint cimport uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.state cimport Vcpu

cdef enum:
    MXCSR = 24               # in the legacy area

    HOST_STATE = 0xE7        # components that are in the host's registers: x87, SSE, AVX, AVX-512
    PKRU_STATE = 0x200       # and the one that is not

    # kinds of xsave()
    SAVE_STANDARD = 0        # XSAVE
    SAVE_IN_USE = 1          # XSAVEOPT
    SAVE_COMPACT = 2         # XSAVEC, XSAVES

# Put state components of HOST_STATE into their initial configuration.
cdef void init_components(Vcpu* v, uint64_t mask) noexcept nogil
# MXCSR's bits that must be 0.
cdef uint32_t mxcsr_reserved() noexcept nogil
cdef int xsave(Vcpu* v, Insn* i, int kind) noexcept nogil
cdef int xrstor(Vcpu* v, Insn* i, bint supervisor) noexcept nogil
# 0F C7 with a memory operand: XRSTORS, XSAVEC, XSAVES.
cdef int group9(Vcpu* v, Insn* i) noexcept nogil
# RDPKRU, WRPKRU
cdef int pkru(Vcpu* v, Insn* i) noexcept nogil

cdef inline uint64_t bounce(Vcpu* v) noexcept nogil:
    return (<uint64_t>v.xsave_bounce + 63) & ~<uint64_t>63

cdef inline void hide_pointers(uint64_t at) noexcept nogil:
    """FIP and FDP of the legacy area would be host addresses."""
    (<uint64_t*>(at + 8))[0] = 0
    (<uint64_t*>(at + 16))[0] = 0
