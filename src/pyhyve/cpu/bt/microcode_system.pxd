# cython: language_level=3
"""Control, debug and model-specific registers, CPUID, time, ports, and the other instructions that only a system uses."""

from libc.stdint cimport uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.state cimport CpuidEntry, Vcpu

# R_OK if IOPL or the TSS bitmap lets the ports be used, else #GP(0) (or what reading the bitmap gave).
cdef int io_allowed(Vcpu* v, uint32_t port, uint32_t size) noexcept nogil
cdef CpuidEntry* cpuid_find(Vcpu* v, uint32_t leaf, uint32_t subleaf) noexcept nogil

cdef int in_out(Vcpu* v, Insn* i) noexcept nogil
cdef int cpuid(Vcpu* v, Insn* i) noexcept nogil
cdef int mov_cr(Vcpu* v, Insn* i) noexcept nogil
cdef int mov_dr(Vcpu* v, Insn* i) noexcept nogil
cdef int group7(Vcpu* v, Insn* i) noexcept nogil
cdef int clts(Vcpu* v, Insn* i) noexcept nogil
cdef int rdmsr(Vcpu* v, Insn* i) noexcept nogil
cdef int wrmsr(Vcpu* v, Insn* i) noexcept nogil
cdef int rdtsc(Vcpu* v, Insn* i) noexcept nogil
cdef int invpcid(Vcpu* v, Insn* i) noexcept nogil
cdef int fsgsbase(Vcpu* v, Insn* i) noexcept nogil
cdef int hlt(Vcpu* v, Insn* i) noexcept nogil
cdef int cli_sti(Vcpu* v, Insn* i) noexcept nogil
