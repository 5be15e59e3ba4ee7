# cython: language_level=3
"""The registers of a KVM vCPU: read on first use after an exit, written back, if changed, before the next entry."""

import os

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close as c_close

from pyhyve.cpu.kvm.uapi cimport *

from pyhyve.base.errors import HostError
from pyhyve.cpu.processor import GPR_NAMES, SEGMENT_NAMES, Segment

cdef extern from *:
    """
    #include <x86intrin.h>
    """
    uint64_t rdtsc "__rdtsc"() nogil

cdef enum:
    X2APIC_MODE = 1 << 10
    F_SREGS = 18                 # Registers.field: from here on it is what KVM_GET_SREGS brings

cdef dict FIELD = {name: index for index, name in enumerate(
    (*GPR_NAMES, "rip", "rflags", "cr0", "cr2", "cr3", "cr4", "efer"))}
cdef dict DEBUG = {"dr0": 0, "dr1": 1, "dr2": 2, "dr3": 3, "dr6": 6, "dr7": 7}
cdef dict MSR = {
    "star": 0xC0000081, "lstar": 0xC0000082, "cstar": 0xC0000083, "sfmask": 0xC0000084, "kernel_gs_base": 0xC0000102,
    "sysenter_cs": 0x174, "sysenter_esp": 0x175, "sysenter_eip": 0x176, "tsc_aux": 0xC0000103, "pat": 0x277,
}
cdef dict SEGMENT = {name: index for index, name in enumerate(SEGMENT_NAMES)}


cdef object failed(str what):
    return HostError(f"KVM: {what}: {os.strerror(errno)}")


cdef class Registers:
    def __cinit__(self, int vm_fd, size_t page_size, size_t xsave_size, int vcpu_id, *rest):
        self.fd = -1
        self.vcpu_id = vcpu_id
        self.xsave_size = xsave_size
        self.text = ""
        cdef kvm_regs* r = &self.regs
        cdef kvm_sregs* s = &self.sregs
        # By the contract's order of names.
        self.field[0] = &r.rax
        self.field[1] = &r.rcx
        self.field[2] = &r.rdx
        self.field[3] = &r.rbx
        self.field[4] = &r.rsp
        self.field[5] = &r.rbp
        self.field[6] = &r.rsi
        self.field[7] = &r.rdi
        self.field[8] = &r.r8
        self.field[9] = &r.r9
        self.field[10] = &r.r10
        self.field[11] = &r.r11
        self.field[12] = &r.r12
        self.field[13] = &r.r13
        self.field[14] = &r.r14
        self.field[15] = &r.r15
        self.field[16] = &r.rip
        self.field[17] = &r.rflags
        self.field[18] = &s.cr0
        self.field[19] = &s.cr2
        self.field[20] = &s.cr3
        self.field[21] = &s.cr4
        self.field[22] = &s.efer
        self.segment[0] = &s.es
        self.segment[1] = &s.cs
        self.segment[2] = &s.ss
        self.segment[3] = &s.ds
        self.segment[4] = &s.fs
        self.segment[5] = &s.gs
        self.segment[6] = &s.ldt
        self.segment[7] = &s.tr
        self.fd = ioctl(vm_fd, KVM_CREATE_VCPU, <unsigned long>vcpu_id)
        if self.fd < 0:
            raise failed(f"cannot create vCPU {vcpu_id}")
        cdef void* page = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, 0)
        if page == MAP_FAILED:
            raise failed(f"cannot map the state of vCPU {vcpu_id}")
        self.page = <kvm_run*>page
        self.page_size = page_size
        self._set_tsc_offset(0)

    def __dealloc__(self):
        self.close()

    cpdef close(self):
        """Release the vCPU; it must not run. Idempotent."""
        if self.page != NULL:
            munmap(self.page, self.page_size)
            self.page = NULL
        if self.fd >= 0:
            c_close(self.fd)
            self.fd = -1

    cdef int _alive(self) except -1:
        if self.page == NULL:
            raise RuntimeError("the VM is closed")
        return 0

    cdef int _before_read(self) except -1:
        """State is about to be read: finish an instruction that has been answered."""
        return self._alive()

    cdef int _before_change(self) except -1:
        """State is about to change: no instruction may be half done."""
        return self._alive()

    cdef void _forget(self) noexcept:
        """KVM ran: what is cached is old."""
        self.have_regs = False
        self.have_sregs = False

    cdef int _load_regs(self) except -1:
        self._before_read()
        if not self.have_regs:
            if ioctl(self.fd, KVM_GET_REGS, &self.regs):
                raise failed("cannot read registers")
            self.have_regs = True
            self.dirty_regs = False
        return 0

    cdef int _load_sregs(self) except -1:
        self._before_read()
        if not self.have_sregs:
            if ioctl(self.fd, KVM_GET_SREGS, &self.sregs):
                raise failed("cannot read segment and control registers")
            self.have_sregs = True
            self.dirty_sregs = False
        return 0

    cdef bint _write_registers(self) except -1:
        """Bring changed registers into KVM. False, with `text`, if it refuses them."""
        if self.dirty_apic_base:
            self._load_sregs()
            self.sregs.apic_base = self.apic_base & ~<uint64_t>X2APIC_MODE
            self.dirty_sregs = True
            self.dirty_apic_base = False
        if self.dirty_sregs:
            # What KVM has pending it keeps; a bit here would make it pending again.
            memset(self.sregs.interrupt_bitmap, 0, sizeof(self.sregs.interrupt_bitmap))
            self.sregs.cr8 = self.page.cr8
            if ioctl(self.fd, KVM_SET_SREGS, &self.sregs):
                return self._refused("segment and control registers")
            self.dirty_sregs = False
        if self.dirty_regs:
            if ioctl(self.fd, KVM_SET_REGS, &self.regs):
                return self._refused("registers")
            self.dirty_regs = False
        return True

    cdef bint _refused(self, str what) except -1:
        self.error = errno
        self.text = f"KVM refuses the {what}: {os.strerror(self.error)}"
        return False

    def get(self, name: str) -> int:
        cdef kvm_debugregs debug
        cdef kvm_xcrs xcrs
        cdef int index
        number = FIELD.get(name)
        if number is not None:
            index = number
            if index < F_SREGS:
                self._load_regs()
            else:
                self._load_sregs()
            return self.field[index][0]
        self._alive()
        if name == "cr8":
            return self.page.cr8 & 0xF
        if name == "apic_base":
            return self.apic_base
        number = MSR.get(name)
        if number is not None:
            return self._get_msr(number)
        if name == "tsc_offset":
            return <uint64_t>self.tsc_offset
        if name == "xcr0":
            if ioctl(self.fd, KVM_GET_XCRS, &xcrs):
                raise failed("cannot read XCR0")
            return xcrs.xcrs[0].value
        index = DEBUG[name]
        if ioctl(self.fd, KVM_GET_DEBUGREGS, &debug):
            raise failed("cannot read debug registers")
        if index < 4:
            return debug.db[index]
        return debug.dr6 if index == 6 else debug.dr7

    def set(self, name: str, value: int) -> None:
        cdef kvm_debugregs debug
        cdef kvm_xcrs xcrs
        cdef int index
        cdef uint64_t word = value & 0xFFFFFFFFFFFFFFFF
        if name == "cr8" or name == "apic_base":
            # A WRMSR that is not completed yet may change these two: they are for the next entry.
            self._alive()
            if name == "cr8":
                self.page.cr8 = word & 0xF
            else:
                self.apic_base = word
                self.dirty_apic_base = True
            return
        self._before_change()
        number = FIELD.get(name)
        if number is not None:
            index = number
            if index < F_SREGS:
                self._load_regs()
                self.dirty_regs = True
            else:
                self._load_sregs()
                self.dirty_sregs = True
            self.field[index][0] = word
            return
        number = MSR.get(name)
        if number is not None:
            self._set_msr(number, word)
        elif name == "tsc_offset":
            self._set_tsc_offset(<int64_t>word)
        elif name == "xcr0":
            memset(&xcrs, 0, sizeof(xcrs))
            xcrs.nr_xcrs = 1
            xcrs.xcrs[0].value = word
            if ioctl(self.fd, KVM_SET_XCRS, &xcrs):
                raise ValueError(f"KVM refuses xcr0 = {word:#x}")
        else:
            index = DEBUG[name]
            if ioctl(self.fd, KVM_GET_DEBUGREGS, &debug):
                raise failed("cannot read debug registers")
            if index < 4:
                debug.db[index] = word
            elif index == 6:
                debug.dr6 = word
            else:
                debug.dr7 = word
            if ioctl(self.fd, KVM_SET_DEBUGREGS, &debug):
                raise ValueError(f"KVM refuses {name} = {word:#x}")

    def get_gpr(self, index: int) -> int:
        if not 0 <= index < 16:
            raise IndexError(index)
        self._load_regs()
        return self.field[<int>index][0]

    def set_gpr(self, index: int, value: int) -> None:
        if not 0 <= index < 16:
            raise IndexError(index)
        self._before_change()
        self._load_regs()
        self.field[<int>index][0] = value & 0xFFFFFFFFFFFFFFFF
        self.dirty_regs = True

    def get_segment(self, name: str) -> Segment:
        self._load_sregs()
        cdef kvm_segment* s = self.segment[<int>SEGMENT[name]]
        return Segment(
            s.selector, s.base, s.limit,
            s.type | s.s << 4 | s.dpl << 5 | s.present << 7 | s.avl << 12 | s.l << 13 | s.db << 14 | s.g << 15
            | s.unusable << 16,
        )

    def set_segment(self, name: str, segment: Segment) -> None:
        cdef kvm_segment* s = self.segment[<int>SEGMENT[name]]
        cdef uint32_t attr = segment.attr
        self._before_change()
        self._load_sregs()
        s.selector = segment.selector
        s.base = segment.base
        s.limit = segment.limit
        s.type = attr & 0xF
        s.s = attr >> 4 & 1
        s.dpl = attr >> 5 & 3
        s.present = attr >> 7 & 1
        s.avl = attr >> 12 & 1
        s.l = attr >> 13 & 1
        s.db = attr >> 14 & 1
        s.g = attr >> 15 & 1
        s.unusable = attr >> 16 & 1
        self.dirty_sregs = True

    cdef kvm_dtable* _table(self, str name) except NULL:
        if name == "gdtr":
            return &self.sregs.gdt
        if name == "idtr":
            return &self.sregs.idt
        raise KeyError(name)

    def get_table(self, name: str) -> tuple[int, int]:
        self._load_sregs()
        cdef kvm_dtable* table = self._table(name)
        return table.base, table.limit

    def set_table(self, name: str, base: int, limit: int) -> None:
        cdef kvm_dtable* table = self._table(name)
        self._before_change()
        self._load_sregs()
        table.base = base
        table.limit = limit
        self.dirty_sregs = True

    cdef uint64_t _get_msr(self, uint32_t index) except? 0:
        cdef uint64_t buffer[8]
        cdef kvm_msrs* header = <kvm_msrs*>buffer
        cdef kvm_msr_entry* entry = <kvm_msr_entry*>(<uint8_t*>buffer + sizeof(kvm_msrs))
        memset(buffer, 0, sizeof(buffer))
        header.nmsrs = 1
        entry.index = index
        if ioctl(self.fd, KVM_GET_MSRS, header) != 1:
            raise failed(f"cannot read MSR {index:#x}")
        return entry.data

    cdef int _set_msr(self, uint32_t index, uint64_t value) except -1:
        cdef uint64_t buffer[8]
        cdef kvm_msrs* header = <kvm_msrs*>buffer
        cdef kvm_msr_entry* entry = <kvm_msr_entry*>(<uint8_t*>buffer + sizeof(kvm_msrs))
        memset(buffer, 0, sizeof(buffer))
        header.nmsrs = 1
        entry.index = index
        entry.data = value
        if ioctl(self.fd, KVM_SET_MSRS, header) != 1:
            raise ValueError(f"KVM refuses MSR {index:#x} = {value:#x}")
        return 0

    cdef int _set_tsc_offset(self, int64_t offset) except -1:
        """Guest TSC = host TSC + offset."""
        cdef kvm_device_attr attr
        cdef int64_t value = offset
        memset(&attr, 0, sizeof(attr))
        attr.group = KVM_VCPU_TSC_CTRL
        attr.attr = KVM_VCPU_TSC_OFFSET
        attr.addr = <uint64_t>&value
        if ioctl(self.fd, KVM_HAS_DEVICE_ATTR, &attr) == 0:
            if ioctl(self.fd, KVM_SET_DEVICE_ATTR, &attr):
                raise failed("cannot set the TSC offset")
        else:
            # Before Linux 5.16: as near as writing the counter comes.
            self._set_msr(0x10, rdtsc() + <uint64_t>offset)
        self.tsc_offset = offset
        return 0

    def get_xsave(self) -> bytes:
        self._before_read()
        area = bytearray(self.xsave_size)
        cdef uint8_t[::1] view = area
        cdef int result
        if self.xsave_size > sizeof(kvm_xsave):
            result = ioctl(self.fd, KVM_GET_XSAVE2, &view[0])
        else:
            result = ioctl(self.fd, KVM_GET_XSAVE, &view[0])
        if result:
            raise failed("cannot read the XSAVE area")
        return bytes(area)

    def set_xsave(self, area: bytes) -> None:
        if not 576 <= <size_t>len(area) <= self.xsave_size:
            raise ValueError(f"an XSAVE area has 576 to {self.xsave_size} bytes, not {len(area)}")
        self._before_change()
        whole = bytearray(area) + bytes(self.xsave_size - len(area))
        cdef uint8_t[::1] view = whole
        if ioctl(self.fd, KVM_SET_XSAVE, &view[0]):
            raise ValueError("KVM refuses the XSAVE area: reserved bits of its header or of MXCSR are set")
