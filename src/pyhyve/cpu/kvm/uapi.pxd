# cython: language_level=3
"""What the engine uses of <linux/kvm.h>: names only, the compiler takes layouts and numbers from the header."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<linux/types.h>":
    ctypedef unsigned long long __u64

cdef extern from "<linux/kvm.h>" nogil:
    enum:
        KVM_API_VERSION
        KVM_GET_API_VERSION
        KVM_CREATE_VM
        KVM_CHECK_EXTENSION
        KVM_GET_VCPU_MMAP_SIZE
        KVM_GET_SUPPORTED_CPUID
        KVM_SET_TSS_ADDR
        KVM_SET_IDENTITY_MAP_ADDR
        KVM_SET_USER_MEMORY_REGION
        KVM_ENABLE_CAP
        KVM_X86_SET_MSR_FILTER
        KVM_CREATE_VCPU
        KVM_RUN
        KVM_GET_REGS
        KVM_SET_REGS
        KVM_GET_SREGS
        KVM_SET_SREGS
        KVM_GET_MSRS
        KVM_SET_MSRS
        KVM_GET_XSAVE2
        KVM_GET_XSAVE
        KVM_SET_XSAVE
        KVM_GET_XCRS
        KVM_SET_XCRS
        KVM_GET_DEBUGREGS
        KVM_SET_DEBUGREGS
        KVM_GET_VCPU_EVENTS
        KVM_SET_VCPU_EVENTS
        KVM_SET_CPUID2
        KVM_INTERRUPT
        KVM_NMI
        KVM_SET_DEVICE_ATTR
        KVM_HAS_DEVICE_ATTR

    enum:
        KVM_CAP_USER_MEMORY
        KVM_CAP_MAX_VCPUS
        KVM_CAP_NR_MEMSLOTS
        KVM_CAP_IMMEDIATE_EXIT
        KVM_CAP_READONLY_MEM
        KVM_CAP_USER_NMI
        KVM_CAP_VCPU_EVENTS
        KVM_CAP_DEBUGREGS
        KVM_CAP_XSAVE
        KVM_CAP_XSAVE2
        KVM_CAP_XCRS
        KVM_CAP_EXT_CPUID
        KVM_CAP_X86_USER_SPACE_MSR
        KVM_CAP_X86_MSR_FILTER
        KVM_CAP_SET_TSS_ADDR
        KVM_CAP_SET_IDENTITY_MAP_ADDR

    enum:
        KVM_EXIT_IO
        KVM_EXIT_IO_OUT
        KVM_EXIT_HLT
        KVM_EXIT_MMIO
        KVM_EXIT_IRQ_WINDOW_OPEN
        KVM_EXIT_SHUTDOWN
        KVM_EXIT_FAIL_ENTRY
        KVM_EXIT_INTR
        KVM_EXIT_SET_TPR
        KVM_EXIT_INTERNAL_ERROR
        KVM_EXIT_X86_RDMSR
        KVM_EXIT_X86_WRMSR
        KVM_INTERNAL_ERROR_EMULATION
        KVM_MEM_READONLY
        KVM_MSR_EXIT_REASON_INVAL
        KVM_MSR_EXIT_REASON_UNKNOWN
        KVM_MSR_EXIT_REASON_FILTER
        KVM_MSR_FILTER_READ
        KVM_MSR_FILTER_WRITE
        KVM_MSR_FILTER_DEFAULT_DENY
        KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        KVM_VCPU_TSC_CTRL
        KVM_VCPU_TSC_OFFSET

    struct kvm_segment:
        __u64 base
        uint32_t limit
        uint16_t selector
        uint8_t type
        uint8_t present
        uint8_t dpl
        uint8_t db
        uint8_t s
        uint8_t l
        uint8_t g
        uint8_t avl
        uint8_t unusable

    struct kvm_dtable:
        __u64 base
        uint16_t limit

    struct kvm_regs:
        __u64 rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp
        __u64 r8, r9, r10, r11, r12, r13, r14, r15
        __u64 rip, rflags

    struct kvm_sregs:
        kvm_segment cs, ds, es, fs, gs, ss, tr, ldt
        kvm_dtable gdt, idt
        __u64 cr0, cr2, cr3, cr4, cr8, efer, apic_base
        __u64 interrupt_bitmap[4]

    struct kvm_debugregs:
        __u64 db[4]
        __u64 dr6
        __u64 dr7

    struct kvm_xcr:
        uint32_t xcr
        __u64 value

    struct kvm_xcrs:
        uint32_t nr_xcrs
        kvm_xcr xcrs[1]

    struct kvm_xsave:
        uint32_t region[1024]

    struct kvm_msr_entry:
        uint32_t index
        __u64 data

    struct kvm_msrs:
        uint32_t nmsrs

    struct kvm_cpuid_entry2:
        uint32_t function
        uint32_t index
        uint32_t flags
        uint32_t eax
        uint32_t ebx
        uint32_t ecx
        uint32_t edx

    struct kvm_cpuid2:
        uint32_t nent

    struct kvm_interrupt:
        uint32_t irq

    struct kvm_userspace_memory_region:
        uint32_t slot
        uint32_t flags
        __u64 guest_phys_addr
        __u64 memory_size
        __u64 userspace_addr

    struct kvm_enable_cap:
        uint32_t cap
        __u64 args[4]

    struct kvm_device_attr:
        uint32_t flags
        uint32_t group
        __u64 attr
        __u64 addr

    struct kvm_msr_filter_range:
        uint32_t flags
        uint32_t nmsrs
        uint32_t base
        uint8_t* bitmap

    struct kvm_msr_filter:
        uint32_t flags
        kvm_msr_filter_range ranges[16]

    # Untagged members of kvm_vcpu_events and kvm_run: the tags here are never written to C.
    struct _exception:
        uint8_t injected, nr, has_error_code, pending
        uint32_t error_code

    struct _interrupt:
        uint8_t injected, nr, soft, shadow

    struct _nmi:
        uint8_t injected, pending, masked

    struct kvm_vcpu_events:
        _exception exception
        _interrupt interrupt
        _nmi nmi
        uint32_t flags

    struct _io:
        uint8_t direction, size
        uint16_t port
        uint32_t count
        __u64 data_offset

    struct _mmio:
        __u64 phys_addr
        uint8_t data[8]
        uint32_t len
        uint8_t is_write

    struct _msr:
        uint8_t error
        uint32_t reason, index
        __u64 data

    struct _hw:
        __u64 hardware_exit_reason

    struct _fail_entry:
        __u64 hardware_entry_failure_reason

    struct _emulation_failure:
        uint32_t suberror, ndata
        __u64 flags
        uint8_t insn_size
        uint8_t insn_bytes[15]

    struct kvm_run:
        uint8_t request_interrupt_window
        uint8_t immediate_exit
        uint32_t exit_reason
        uint8_t ready_for_interrupt_injection
        uint8_t if_flag
        __u64 cr8
        _hw hw
        _fail_entry fail_entry
        _io io
        _mmio mmio
        _emulation_failure emulation_failure
        _msr msr
