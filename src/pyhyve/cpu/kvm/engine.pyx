# cython: language_level=3
"""The host's hardware through /dev/kvm, as a processor of the contract in pyhyve.cpu.processor.

Source: the kernel's Documentation/virt/kvm/api.rst.
"""

import os

from libc.errno cimport EACCES, ENOENT, EPERM, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.fcntl cimport O_CLOEXEC, O_RDWR, open as c_open
from posix.unistd cimport close as c_close

from pyhyve.cpu.kvm.registers cimport failed
from pyhyve.cpu.kvm.uapi cimport *

from pyhyve.base.errors import HostError
from pyhyve.cpu.kvm.vcpu import Vcpu, install_kick_signal
from pyhyve.cpu.processor import Capabilities, CpuidEntry

# MSRs that the guest reaches without the monitor: (first, number, guest may read, guest may write). All others exit.
OPEN_MSRS = (
    (0x10, 1, True, False),               # TSC: writing it changes the offset, which is the monitor's
    (0x48, 2, True, True),                # SPEC_CTRL, PRED_CMD: the host processor's own mitigations
    (0x10B, 1, True, True),               # FLUSH_CMD
    (0x174, 3, True, True),               # SYSENTER_CS, _ESP, _EIP
    (0x277, 1, True, True),               # PAT
    (0xC0000080, 5, True, True),          # EFER, STAR, LSTAR, CSTAR, SFMASK
    (0xC0000100, 4, True, True),          # FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX
)

NEEDED = (
    (KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"), (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"),
    (KVM_CAP_READONLY_MEM, "KVM_CAP_READONLY_MEM"), (KVM_CAP_USER_NMI, "KVM_CAP_USER_NMI"),
    (KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS"), (KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS"),
    (KVM_CAP_XSAVE, "KVM_CAP_XSAVE"), (KVM_CAP_XCRS, "KVM_CAP_XCRS"), (KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID"),
    (KVM_CAP_X86_USER_SPACE_MSR, "KVM_CAP_X86_USER_SPACE_MSR"), (KVM_CAP_X86_MSR_FILTER, "KVM_CAP_X86_MSR_FILTER"),
)


cdef class Vm:
    """One VM: its descriptor and its memory slots."""

    cdef int fd
    cdef size_t run_size
    cdef size_t xsave_size
    cdef list vcpus
    cdef dict slots                       # number -> (gpa, length, hva, writable)
    cdef list free_slots
    cdef uint32_t max_slots

    def __cinit__(self, Engine engine):
        cdef kvm_enable_cap cap
        cdef uint64_t identity = 0xFEFFC000
        cdef int kvm = engine._open()
        self.fd = -1
        self.vcpus = []
        self.slots = {}
        self.free_slots = []
        try:
            self.fd = ioctl(kvm, KVM_CREATE_VM, <unsigned long>0)
            if self.fd < 0:
                raise failed("cannot create a VM (does another hypervisor hold the hardware?)")
            self.run_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, <unsigned long>0)
            self.xsave_size = max(
                <int>sizeof(kvm_xsave), ioctl(self.fd, KVM_CHECK_EXTENSION, <unsigned long>KVM_CAP_XSAVE2)
            )
            self.max_slots = ioctl(kvm, KVM_CHECK_EXTENSION, <unsigned long>KVM_CAP_NR_MEMSLOTS) or 32
            # Intel processors that cannot run real mode unaided need four pages of guest-physical space; others ignore
            # the addresses.
            if ioctl(kvm, KVM_CHECK_EXTENSION, <unsigned long>KVM_CAP_SET_IDENTITY_MAP_ADDR):
                ioctl(self.fd, KVM_SET_IDENTITY_MAP_ADDR, &identity)
            if ioctl(kvm, KVM_CHECK_EXTENSION, <unsigned long>KVM_CAP_SET_TSS_ADDR):
                ioctl(self.fd, KVM_SET_TSS_ADDR, <unsigned long>(identity + 0x1000))
            memset(&cap, 0, sizeof(cap))
            cap.cap = KVM_CAP_X86_USER_SPACE_MSR
            cap.args[0] = KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER
            if ioctl(self.fd, KVM_ENABLE_CAP, &cap):
                raise failed("cannot have MSR accesses reported")
            self._filter_msrs()
        finally:
            c_close(kvm)

    def __dealloc__(self):
        if self.fd >= 0:
            c_close(self.fd)

    cdef int _filter_msrs(self) except -1:
        """Deny the guest all MSRs but OPEN_MSRS: a denied one exits."""
        cdef kvm_msr_filter rules
        cdef uint64_t all_ones = 0xFFFFFFFFFFFFFFFF     # KVM reads bitmaps by the word
        cdef int index = 0
        memset(&rules, 0, sizeof(rules))
        rules.flags = KVM_MSR_FILTER_DEFAULT_DENY
        for first, number, may_read, may_write in OPEN_MSRS:
            rules.ranges[index].base = first
            rules.ranges[index].nmsrs = number
            rules.ranges[index].flags = ((KVM_MSR_FILTER_READ if may_read else 0)
                                         | (KVM_MSR_FILTER_WRITE if may_write else 0))
            rules.ranges[index].bitmap = <uint8_t*>&all_ones
            index += 1
        if ioctl(self.fd, KVM_X86_SET_MSR_FILTER, &rules):
            raise failed("cannot set the MSR filter")
        return 0

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        if self.fd < 0:
            raise RuntimeError("the VM is closed")
        vcpu = Vcpu(self.fd, self.run_size, self.xsave_size, vcpu_id, self._peek)
        self.vcpus.append(vcpu)
        return vcpu

    cdef int _slot(self, uint32_t number, uint64_t gpa, uint64_t length, uint64_t hva, bint writable) except -1:
        cdef kvm_userspace_memory_region region
        region.slot = number
        region.flags = 0 if writable else KVM_MEM_READONLY
        region.guest_phys_addr = gpa
        region.memory_size = length
        region.userspace_addr = hva
        if ioctl(self.fd, KVM_SET_USER_MEMORY_REGION, &region):
            raise failed(f"cannot map {length:#x} bytes of memory at guest-physical {gpa:#x}")
        return 0

    def map_memory(self, gpa: int, hva: int, length: int, writable: bool) -> None:
        """Make a slot; what was mapped there before goes away."""
        if self.fd < 0:
            raise RuntimeError("the VM is closed")
        if (gpa | hva | length) & 0xFFF or length <= 0 or gpa < 0 or gpa + length > 1 << 52:
            raise ValueError(f"map_memory: {gpa:#x} + {length:#x} at {hva:#x} is no range of whole pages")
        self.unmap_memory(gpa, length)
        if not self.free_slots and len(self.slots) >= self.max_slots:
            raise HostError(f"KVM: no more than {self.max_slots} memory slots")
        number = self.free_slots.pop() if self.free_slots else len(self.slots)
        try:
            self._slot(number, gpa, length, hva, writable)
        except HostError:
            self.free_slots.append(number)
            raise
        self.slots[number] = (gpa, length, hva, bool(writable))

    def unmap_memory(self, gpa: int, length: int) -> None:
        """Unmap a range. A slot that it cuts is taken away and its rest mapped again: a vCPU that runs meanwhile may
        see an MMIO exit on the rest."""
        if self.fd < 0:
            return
        end = gpa + length
        for number, (start, size, hva, writable) in list(self.slots.items()):
            if start >= end or start + size <= gpa:
                continue
            self._slot(number, start, 0, hva, writable)
            del self.slots[number]
            self.free_slots.append(number)
            if start < gpa:
                self.map_memory(start, hva, gpa - start, writable)
            if start + size > end:
                self.map_memory(end, hva + (end - start), start + size - end, writable)

    def _peek(self, gpa: int, size: int) -> int | None:
        """Read up to 8 bytes of guest memory, not over a page's end. None where there is no memory."""
        cdef uint64_t value = 0
        cdef uint64_t hva
        for start, length, base, _ in self.slots.values():
            if start <= gpa < start + length:
                hva = base + (gpa - start)
                memcpy(&value, <void*>hva, min(<int>size, 8))
                return value
        return None

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        self.slots.clear()
        if self.fd >= 0:
            c_close(self.fd)
            self.fd = -1


def why_not(number: int) -> str:
    """What to tell a user for whom opening /dev/kvm failed with this errno."""
    if number == ENOENT:
        return ("there is no /dev/kvm: turn on virtualization in the host's firmware (or nested virtualization in the "
                "hypervisor around it) and load kvm_intel or kvm_amd, or use --processor bt")
    if number == EACCES or number == EPERM:
        return ("no permission to open /dev/kvm: join the group that owns it (usermod -aG kvm USER, then log in again), "
                "or use --processor bt")
    return (f"/dev/kvm does not open ({os.strerror(number)}): turn on virtualization in the host's firmware and load "
            "kvm_intel or kvm_amd, or use --processor bt")


cdef class Engine:
    """The processor called "kvm"."""

    cdef readonly str name

    def __cinit__(self):
        self.name = "kvm"

    cdef int _open(self) except -1:
        cdef int fd = c_open(b"/dev/kvm", O_RDWR | O_CLOEXEC)
        if fd < 0:
            raise failed("cannot open /dev/kvm")
        return fd

    def unavailable(self) -> str | None:
        cdef int version
        cdef int fd = c_open(b"/dev/kvm", O_RDWR | O_CLOEXEC)
        if fd < 0:
            return why_not(errno)
        try:
            version = ioctl(fd, KVM_GET_API_VERSION, <unsigned long>0)
            if version != KVM_API_VERSION:
                return f"/dev/kvm speaks version {version}, not {KVM_API_VERSION}: use --processor bt"
            missing = [name for cap, name in NEEDED if ioctl(fd, KVM_CHECK_EXTENSION, <unsigned long>cap) <= 0]
            if missing:
                return f"the kernel lacks {', '.join(missing)}: use Linux 5.11 or later, or --processor bt"
        finally:
            c_close(fd)
        return None

    def capabilities(self) -> Capabilities:
        cdef int fd = self._open()
        cdef int vcpus
        try:
            vcpus = ioctl(fd, KVM_CHECK_EXTENSION, <unsigned long>KVM_CAP_MAX_VCPUS)
        finally:
            c_close(fd)
        answers = {(entry.leaf, entry.subleaf or 0): entry for entry in self.supported_cpuid()}
        nothing = CpuidEntry(0, 0, 0, 0, 0, 0)
        basic, extended, states = (answers.get(key, nothing) for key in ((1, 0), (7, 0), (0xD, 0)))
        notes = ["hardware", "decodes MMIO itself", "holds an NMI back itself"]
        if basic.ecx >> 17 & 1:
            notes.append("pcid")
        xcr0 = 0
        if basic.ecx >> 26 & 1:                       # XSAVE; some hosts describe states that they do not offer
            xcr0 = states.eax | states.edx << 32
            if extended.ebx >> 16 & 1:
                notes.append("avx512")
            else:
                xcr0 &= ~0xE0
            if not basic.ecx >> 28 & 1:
                xcr0 &= ~0xE4
        return Capabilities(name="kvm", max_vcpus=max(vcpus, 4), xcr0=xcr0, notes=tuple(notes))

    def supported_cpuid(self) -> list[CpuidEntry]:
        """What CPUID may say to a guest on this host, as KVM puts it."""
        cdef int fd = self._open()
        cdef int count = 256
        data = bytearray(sizeof(kvm_cpuid2) + count * sizeof(kvm_cpuid_entry2))
        cdef uint8_t[::1] view = data
        cdef kvm_cpuid2* header = <kvm_cpuid2*>&view[0]
        cdef kvm_cpuid_entry2* slot = <kvm_cpuid_entry2*>(&view[0] + sizeof(kvm_cpuid2))
        header.nent = count
        try:
            if ioctl(fd, KVM_GET_SUPPORTED_CPUID, header):
                raise failed("cannot ask for the supported CPUID")
        finally:
            c_close(fd)
        found = []
        for index in range(<int>header.nent):
            found.append(CpuidEntry(
                slot.function, slot.index if slot.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX else None,
                slot.eax, slot.ebx, slot.ecx, slot.edx,
            ))
            slot += 1
        return found

    def create_vm(self) -> Vm:
        install_kick_signal()
        return Vm(self)
