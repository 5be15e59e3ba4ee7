# cython: language_level=3
"""The state of one virtual processor, as generated code, microcode and MMU see it.

Generated code addresses the fields of `Vcpu` (emit.pxd); the structure is allocated once, zeroed, page-aligned,
and never moves. Names are the architecture's.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    # The software TLB: one direct-mapped table per bank.
    TLB_BITS = 10
    TLB_ENTRIES = 1024
    BANK_KERNEL = 0         # supervisor accesses, RFLAGS.AC = 0 (SMAP applies where CR4.SMAP is set)
    BANK_USER = 1           # user-mode accesses (CPL 3)
    BANK_KERNEL_AC = 2      # supervisor accesses with RFLAGS.AC = 1 (STAC)
    BANKS = 3
    WAY_ENTRIES = 3072      # of all banks
    SECOND_HITS = 16
    IBT_BITS = 13
    IBT_ENTRIES = 8192
    IBT_SECOND = 1024       # entries of a bank's second way
    IBT_NOTED = 1024        # slots written since the last flush that are noted one by one
    FETCH_ENTRIES = 512

    # Access kinds, as the MMU takes them.
    ACCESS_READ = 0
    ACCESS_WRITE = 1
    ACCESS_FETCH = 2

    # Results of MMU and microcode operations.
    R_OK = 0                # done; go on
    R_FAULT = 1             # a guest exception is pending in fault_vector/fault_error/fault_addr: deliver it
    R_EXIT = 2              # Vcpu.exit is filled: return to the monitor
    R_SLOW = 3              # (MMU fill) the access must be run by a one-instruction slow block

    # What an address range is watched for (Watch.kinds), and whether anything is (Vcpu.debug)
    WATCH_WRITE = 1
    WATCH_READ = 2
    WATCH_FETCH = 4
    WATCH_PORT = 8
    WATCH_STEP = 16         # Vcpu.debug only: the monitor wants every instruction
    WATCHES = 20            # DR0 to DR3, then the monitor's

    # Vcpu.shadow
    SHADOW_STI = 1
    SHADOW_SS = 2           # MOV SS, POP SS: debug exceptions wait as well

    SEG_ES = 0
    SEG_CS = 1
    SEG_SS = 2
    SEG_DS = 3
    SEG_FS = 4
    SEG_GS = 5
    SEG_LDTR = 6
    SEG_TR = 7

    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RSP = 4
    RBP = 5
    RSI = 6
    RDI = 7
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    R12 = 12
    R13 = 13
    R14 = 14
    R15 = 15

    # RFLAGS bits
    F_CF = 0x1
    F_PF = 0x4
    F_AF = 0x10
    F_ZF = 0x40
    F_SF = 0x80
    F_TF = 0x100
    F_IF = 0x200
    F_DF = 0x400
    F_OF = 0x800
    F_IOPL = 0x3000
    F_NT = 0x4000
    F_RF = 0x10000
    F_VM = 0x20000
    F_AC = 0x40000
    F_VIF = 0x80000
    F_VIP = 0x100000
    F_ID = 0x200000

    # Exit reasons: the same numbers as pyhyve.cpu.exits (VT-x's basic exit reasons where VT-x has one).
    X_EXCEPTION = 0
    X_EXTERNAL_INTERRUPT = 1     # kicked by another thread
    X_TRIPLE_FAULT = 2
    X_INTERRUPT_WINDOW = 7
    X_NMI_WINDOW = 8
    X_TASK_SWITCH = 9
    X_CPUID = 10
    X_HLT = 12
    X_VMCALL = 18
    X_CR_ACCESS = 28
    X_IO = 30
    X_RDMSR = 31
    X_WRMSR = 32
    X_MWAIT = 36
    X_MONITOR_TRAP = 37
    X_PAUSE = 40
    X_TPR_BELOW_THRESHOLD = 43
    X_EPT_VIOLATION = 48
    X_EPT_MISCONFIG = 49
    X_WBINVD = 54
    X_APIC_WRITE = 56            # an IPI was sent: bit n of qualification: vCPU n is not in run(), the monitor wakes it
    X_ENGINE_ERROR = 255         # a bug or a limit of the engine: exit.qualification says which

cdef struct TlbEntry:            # 32 bytes; generated code knows the layout
    uint64_t tag_r               # linear page address, or TLB_INVALID for this index
    uint64_t tag_w
    uint64_t hva                 # host address of the page
    uint64_t addend              # hva less the linear page address

cdef struct FetchEntry:
    uint64_t lin                 # linear page | 1 when valid
    uint64_t hva                 # host address of the page that holds the code
    uint64_t info                # bit 0: global; bits 8+: the mode key's bank for which permission was checked

cdef struct Segment:
    uint64_t base
    uint32_t limit               # in bytes, expanded by granularity
    uint32_t attr                # VT-x access rights: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16
    uint32_t selector
    uint32_t pad

cdef struct TableReg:
    uint64_t base
    uint32_t limit
    uint32_t pad

cdef struct Exit:
    uint32_t reason
    uint32_t length              # of the instruction, bytes; RIP still points at it unless said otherwise
    uint64_t qualification       # EPT violation: bit 0 read, 1 write, 2 fetch (VT-x layout); CR access: VT-x layout
    uint64_t gpa                 # EPT violation: guest-physical address
    uint64_t gla                 # EPT violation: linear address
    # I/O: RIP already points behind the instruction (but for REP/INS/OUTS, see io_*); the monitor stores an IN's
    # result by complete_io()
    uint32_t io_port
    uint32_t io_size             # 1, 2, 4
    uint32_t io_in               # 1: IN
    uint32_t io_string           # 1: INS/OUTS: RIP points at the instruction, the monitor emulates it
    uint64_t io_value            # OUT: the value; IN: filled by the monitor
    uint32_t msr                 # RDMSR/WRMSR: index; RIP points at the instruction
    uint32_t pad
    uint64_t msr_value

cdef struct CpuidEntry:
    uint32_t leaf
    uint32_t subleaf             # 0xffffffff: any
    uint32_t eax
    uint32_t ebx
    uint32_t ecx
    uint32_t edx

cdef struct Watch:
    uint64_t first               # linear address, or port
    uint64_t last
    uint32_t kinds               # WATCH_*
    uint32_t enabled

cdef struct Counters:
    uint64_t blocks_translated
    uint64_t insns_translated
    uint64_t blocks_dropped
    uint64_t cache_flushes
    uint64_t ibt_misses
    uint64_t dispatches
    uint64_t tlb_misses_r
    uint64_t tlb_misses_w
    uint64_t tlb_misses_x
    uint64_t tlb_flushes
    uint64_t page_walks
    uint64_t guest_faults        # exceptions raised by the processor
    uint64_t guest_page_faults
    uint64_t interrupts
    uint64_t microcode
    uint64_t slow_insns
    uint64_t smc_writes
    uint64_t signals
    uint64_t cr3_writes
    uint64_t syscalls
    uint64_t rep_ops

cdef struct Vcpu:
    uint64_t gpr[16]             # offset 0. In generated code only RSP(=host r15), R10, R11, R15 differ from the host's
    uint64_t rip
    # arithmetic flags as LAHF and SETO give them, while out of generated code
    uint8_t flags_lo             # SF ZF AF PF CF in their RFLAGS places (other bits: don't care)
    uint8_t flags_of             # 0 or 1
    uint8_t iflag                # RFLAGS.IF: 0 or 1
    uint8_t dflag                # RFLAGS.DF
    uint8_t acflag               # RFLAGS.AC
    uint8_t cpl
    uint8_t shadow               # SHADOW_*: STI or MOV SS just done, no interrupt before the next instruction
    uint8_t nmi_blocked
    uint32_t sysflags            # TF, IOPL, NT, RF, VM, VIF, VIP, ID in their RFLAGS places, all else 0
    uint8_t kick                 # set by other threads: leave guest mode soon
    uint8_t window               # the monitor waits for an interrupt window (IF=1, no shadow)
    uint8_t nmi_window
    uint8_t bank                 # BANK_* now in force, from CPL and AC
    uint64_t poll                # nonzero: polls leave generated code. Byte 7 = 0x40: kicked; byte 6: window at STI
    uint64_t tsc_offset
    # scratch of generated code
    uint64_t save_rcx
    uint64_t save_rax
    uint64_t tmp0
    uint64_t tmp1
    uint64_t tmp2
    uint64_t host_rsp
    uint64_t ret_sp              # generated code's RSP while out of it: the return stack (thunks.pyx)
    uint64_t ret_base            # its end: there stands where a RET goes that has no CALL
    uint64_t ibt_mask            # PEXT masks
    uint64_t second_mask
    uint64_t tlb_mask
    uint64_t page_mask           # ~0xfff
    uint64_t bit_mask[3]         # 63, 31, 15: PEXT masks of bit offsets
    uint64_t guard_read[6]       # what segments.pxd explains: offset + base + guard tells an access that may be wrong
    uint64_t guard_write[6]
    uint64_t guard_open[6]       # GUARD where the segment needs a check, else 0
    uint64_t guard_bit           # GUARD: a PDEP mask
    uint64_t miss_info           # set by thunks: address behind the call in the stub
    uint64_t miss_lin
    uint64_t leave_reason        # why generated code was left
    uint64_t leave_arg
    Segment seg[8]
    TableReg gdtr
    TableReg idtr
    uint64_t cr0
    uint64_t cr2
    uint64_t cr3
    uint64_t cr4
    uint64_t cr8
    uint64_t efer
    uint64_t xcr0
    uint64_t dr[8]
    uint64_t star
    uint64_t lstar
    uint64_t cstar
    uint64_t sfmask
    uint64_t kernel_gs_base
    uint64_t sysenter_cs
    uint64_t sysenter_esp
    uint64_t sysenter_eip
    uint64_t tsc_aux
    uint64_t pat
    uint64_t features            # FT_* of decode.pxd that CPUID reports
    uint64_t pkru
    uint64_t tlb_keys            # bit n: the TLB may have pages of protection key n
    uint64_t vector_state        # XSAVE components that are loaded for the guest and saved behind it
    # pending exception of the instruction being executed (R_FAULT)
    uint32_t fault_vector
    uint32_t fault_has_error
    uint64_t fault_error
    uint64_t fault_addr          # becomes CR2 for vector 14; for #DB, F_RF if RF is set in the flags that are pushed
    # event that the monitor injects at the next entry
    uint32_t inject_valid
    uint32_t inject_vector
    uint32_t inject_type         # 0 external interrupt, 2 NMI, 3 exception, 4 software interrupt
    uint32_t inject_has_error
    uint64_t inject_error
    # debugging: see debug.pxd
    uint32_t debug               # WATCH_* of what is enabled
    uint32_t n_watches
    uint64_t db_pending          # for the next instruction boundary: bits of DR6; from bit 32 on, the monitor's
    uint64_t amd                 # CPUID reports an AMD (or Hygon) processor: SYSCALL and its kin differ
    uint64_t la57                # CPUID reports 57-bit linear addresses
    uint64_t watch_key           # part of the mode while instructions are watched
    uint64_t watch_generation
    uint64_t watch_skip          # linear address + 1 whose watch by the monitor has been reported
    Watch watch[WATCHES]
    # nested paging
    uint64_t eptp                # host address of the EPT root table | low bits as VT-x's EPTP
    uint64_t eptgen
    uint64_t apic_page           # gpa >> 12 of the local APIC's page: never memory, whatever the EPT has there
    uint32_t maxphyaddr
    uint32_t in_microcode
    CpuidEntry* cpuid
    uint32_t n_cpuid
    uint32_t vcpu_id
    Exit exit
    Counters n
    uint32_t cs_limits[64]       # limits of code segments seen: the mode key has an index
    uint32_t n_cs_limits
    uint32_t cs_limit            # index of the last one
    void* cache                  # the code cache (codecache.pyx)
    uint64_t mode_key            # of the blocks that may run now
    uint64_t ibt_mode            # the mode (without the bits that choose a bank) for which ibt[] is filled
    uint64_t n_ibt_used[BANKS]   # slots written since the last flush
    uint64_t n_ibt_second[BANKS]
    uint16_t ibt_used[BANKS * IBT_NOTED]
    uint64_t ibt_low             # the supervisor's table has a target in the lower half
    uint64_t ibt_pages[1024]     # bit (lin >> 12) & 0xffff: the table may have targets in such a page
    uint64_t drop_gen            # counts dropped blocks' pages: a helper sees whether the running block may be gone
    uint64_t share[16]           # addends that a block's later accesses off the same base reuse
    uint64_t bounce_lin          # pending bounced store of a slow instruction
    uint64_t bounce_len
    uint64_t bounce_bank
    uint64_t bounce_mask         # bytes of it that are stored; 0: all
    uint64_t ept_cache_tag[256]  # gpa >> 12 | 1 of recent EPT walks
    uint64_t ept_cache_val[256]  # host address of the page | permission bits 0-2
    FetchEntry fetch[FETCH_ENTRIES]
    uint64_t ibt[BANKS * IBT_ENTRIES]     # host code addresses by linear target
    void* ibt_block[BANKS * IBT_ENTRIES]  # whose they are
    uint64_t second_rip[BANKS * IBT_SECOND]      # what other targets of the same slot pushed out: its RIP
    uint64_t second_entry[BANKS * IBT_SECOND]    # and its host code
    uint64_t second_left         # hits in the second way until one is promoted
    uint64_t second_noted[96]    # mmu.pyx: which entries of the second way were filled
    TlbEntry tlb[2 * WAY_ENTRIES]         # second half: the second way, for what the first one's entries push out
    uint8_t bounce[704]
    uint8_t xsave_area[4096 + 64]         # guest vector state while out of generated code (aligned by user)
    uint8_t xsave_bounce[4096 + 64]

cdef inline uint64_t get_rflags(Vcpu* v) noexcept nogil:
    """The guest's RFLAGS; valid out of generated code."""
    return (v.sysflags | 2 | (v.flags_lo & 0xD5) | (<uint64_t>v.flags_of << 11) | (<uint64_t>v.iflag << 9)
            | (<uint64_t>v.dflag << 10) | (<uint64_t>v.acflag << 18))

cdef inline void set_rflags(Vcpu* v, uint64_t value) noexcept nogil:
    v.flags_lo = <uint8_t>(value & 0xD5)
    v.flags_of = <uint8_t>((value >> 11) & 1)
    v.iflag = <uint8_t>((value >> 9) & 1)
    v.dflag = <uint8_t>((value >> 10) & 1)
    v.acflag = <uint8_t>((value >> 18) & 1)
    v.sysflags = <uint32_t>(value & (F_TF | F_IOPL | F_NT | F_RF | F_VM | F_VIF | F_VIP | F_ID))

cdef inline uint64_t tlb_invalid(uint32_t index) noexcept nogil:
    """A tag that no linear address with this TLB index can match."""
    return <uint64_t>(index ^ (TLB_ENTRIES >> 1)) << 12

cdef inline void update_bank(Vcpu* v) noexcept nogil:
    """Recompute the bank from CPL and AC; call after either changed."""
    if v.cpl == 3:
        v.bank = BANK_USER
    elif v.acflag:
        v.bank = BANK_KERNEL_AC
    else:
        v.bank = BANK_KERNEL
