# cython: language_level=3
from libc.stdint cimport int64_t, uint32_t, uint64_t
from pyhyve.cpu.kvm.uapi cimport *

# An error for a host's call that failed; errno is still that call's.
cdef object failed(str what)

cdef class Registers:
    """The part of a vCPU that is state: KVM's descriptor, its run page, and the caches of registers."""

    cdef int fd
    cdef kvm_run* page
    cdef size_t page_size
    cdef size_t xsave_size
    cdef readonly int vcpu_id
    cdef kvm_regs regs
    cdef kvm_sregs sregs
    cdef bint have_regs, have_sregs, dirty_regs, dirty_sregs
    cdef __u64* field[23]        # by the contract's names: GPR_NAMES, rip, rflags, cr0, cr2, cr3, cr4, efer
    cdef uint64_t apic_base      # KVM, which has no local APIC here, only shows bit 11 in CPUID
    cdef bint dirty_apic_base
    cdef kvm_segment* segment[8]
    cdef int64_t tsc_offset
    cdef int error               # errno of what KVM refused last
    cdef str text                # what message() says

    cpdef close(self)
    cdef int _alive(self) except -1
    cdef int _before_read(self) except -1
    cdef int _before_change(self) except -1
    cdef void _forget(self) noexcept
    cdef int _load_regs(self) except -1
    cdef int _load_sregs(self) except -1
    cdef bint _write_registers(self) except -1
    cdef bint _refused(self, str what) except -1
    cdef kvm_dtable* _table(self, str name) except NULL
    cdef uint64_t _get_msr(self, uint32_t index) except? 0
    cdef int _set_msr(self, uint32_t index, uint64_t value) except -1
    cdef int _set_tsc_offset(self, int64_t offset) except -1
