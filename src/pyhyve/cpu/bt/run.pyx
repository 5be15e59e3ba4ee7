# cython: language_level=3
"""The software processor's vCPU as the monitor sees it: see pyhyve.cpu.processor.VcpuBackend.

Also here is what belongs to the host: the code cache's two mappings, the guest's vector state around each run, and the
signals that the host's processor raises in generated code.
"""

cimport cython
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from pyhyve.cpu.bt.apic cimport apic_wake
from pyhyve.cpu.bt.apicstate cimport BtApicState, alarm_delete, alarm_here, make_state
from pyhyve.cpu.bt.codecache cimport Block, Cache, CodePage, cold_start
from pyhyve.cpu.bt.debug cimport DR6_BS, debug_update
from pyhyve.cpu.bt.loop cimport loop_guest_rip, loop_init, loop_run
from pyhyve.cpu.bt.mmu cimport mmu_flush_all, mmu_flush_ept, mmu_init, mmu_translate
from pyhyve.cpu.bt.segments cimport segments_init
from pyhyve.cpu.bt.shared cimport SHARED_VCPUS, Inbox, Shared, SharedPage, inbox_put, shared_find
from pyhyve.cpu.bt.state cimport *
from pyhyve.cpu.bt.translate cimport LEAVE_EXIT, LEAVE_FAULT

from pyhyve.base.errors import HostError
from pyhyve.cpu.bt.features import feature_mask
from pyhyve.cpu.processor import Segment as SegmentValue

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <signal.h>
    #include <string.h>
    #include <sys/auxv.h>
    #include <sys/mman.h>
    #include <ucontext.h>
    #include <unistd.h>

    /* Run `fn(v)` with GS at v and the guest's x87 and vector state (the components of *state) in the registers. */
    __attribute__((target("general-regs-only"), noinline))
    static int bt_guest(void *v, void *area, int (*fn)(void *), const unsigned long *state) {
        unsigned mxcsr;
        unsigned short fcw;
        int r;
        __asm__ __volatile__("stmxcsr %0" : "=m"(mxcsr));
        __asm__ __volatile__("fnstcw %0" : "=m"(fcw));
        __asm__ __volatile__("wrgsbase %0" : : "r"(v));
        __asm__ __volatile__("xrstor64 (%0)" : : "r"(area), "a"((unsigned)*state), "d"(0) : "memory");
        r = fn(v);
        __asm__ __volatile__("xsave64 (%0)" : : "r"(area), "a"((unsigned)*state), "d"(0) : "memory");
        __asm__ __volatile__("vzeroupper; fninit; fldcw %0" : : "m"(fcw));
        __asm__ __volatile__("ldmxcsr %0" : : "m"(mxcsr));
        __asm__ __volatile__("cld");
        return r;
    }

    /* Code that belongs to `cache`; its return stack: the lowest address, below it a guard; where it begins. */
    struct bt_range { unsigned long long lo, hi, stack, stack_base; void *cache; };
    #define BT_GUARD 4096
    #define BT_STACK 65536
    #define BT_RANGES 256
    static volatile struct bt_range bt_ranges[BT_RANGES];
    static struct sigaction bt_old[65];
    #include <stdint.h>
    static void (*bt_fixup)(void *cache, int trap, uint64_t *rip, uint64_t *r10, uint64_t *r11);

    static void bt_signal(int sig, siginfo_t *info, void *context) {
        ucontext_t *uc = (ucontext_t *)context;
        unsigned long long rip = (unsigned long long)uc->uc_mcontext.gregs[REG_RIP];
        int i, trap = (int)uc->uc_mcontext.gregs[REG_TRAPNO];
        if (info->si_code > 0) {
            for (i = 0; i < BT_RANGES; i++) {
                if (bt_ranges[i].cache && rip >= bt_ranges[i].lo && rip < bt_ranges[i].hi) {
                    unsigned long long at = (unsigned long long)info->si_addr;
                    if (trap == 14 && at < bt_ranges[i].stack && at >= bt_ranges[i].stack - BT_GUARD) {
                        /* a CALL has filled the return stack: forget the returns, do it again */
                        uc->uc_mcontext.gregs[REG_RSP] = (greg_t)bt_ranges[i].stack_base;
                        return;
                    }
                    bt_fixup(bt_ranges[i].cache, trap,
                             (uint64_t *)&uc->uc_mcontext.gregs[REG_RIP],
                             (uint64_t *)&uc->uc_mcontext.gregs[REG_R10],
                             (uint64_t *)&uc->uc_mcontext.gregs[REG_R11]);
                    return;
                }
            }
        }
        /* not ours: what was there before, or the default action by returning to the instruction */
        if (bt_old[sig].sa_flags & SA_SIGINFO) {
            bt_old[sig].sa_sigaction(sig, info, context);
        } else if (bt_old[sig].sa_handler == SIG_DFL || bt_old[sig].sa_handler == SIG_IGN) {
            signal(sig, SIG_DFL);
            if (info->si_code <= 0)
                raise(sig);
        } else {
            bt_old[sig].sa_handler(sig);
        }
    }

    static int bt_signals(void) {
        static const int sigs[] = {SIGFPE, SIGILL, SIGSEGV, SIGBUS, SIGTRAP};
        struct sigaction sa, now;
        unsigned i;
        for (i = 0; i < sizeof sigs / sizeof *sigs; i++) {
            if (sigaction(sigs[i], NULL, &now))
                return -1;
            if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == bt_signal)
                continue;
            memset(&sa, 0, sizeof sa);
            sa.sa_sigaction = bt_signal;
            sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
            sigemptyset(&sa.sa_mask);
            bt_old[sigs[i]] = now;
            if (sigaction(sigs[i], &sa, NULL))
                return -1;
        }
        return 0;
    }

    /* Signals that arrive in generated code must not go onto the return stack. */
    static void bt_signal_stack(void) {
        static __thread int known;
        static __thread char stack[65536];
        stack_t now;
        if (known)
            return;
        known = 1;
        if (sigaltstack(NULL, &now) == 0 && now.ss_flags & SS_DISABLE) {
            memset(&now, 0, sizeof now);
            now.ss_sp = stack;
            now.ss_size = sizeof stack;
            sigaltstack(&now, NULL);
        }
    }

    static unsigned long long bt_return_stack(void) {
        char *p = mmap(NULL, BT_GUARD + BT_STACK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED || mprotect(p + BT_GUARD, BT_STACK, PROT_READ | PROT_WRITE))
            return 0;
        return (unsigned long long)(p + BT_GUARD + BT_STACK - 64);
    }

    static void bt_free_return_stack(unsigned long long base) {
        munmap((char *)base + 64 - BT_STACK - BT_GUARD, BT_GUARD + BT_STACK);
    }

    static int bt_register(void *cache, unsigned long long lo, unsigned long long hi, unsigned long long base) {
        int i;
        for (i = 0; i < BT_RANGES; i++) {
            if (!bt_ranges[i].cache) {
                bt_ranges[i].lo = lo;
                bt_ranges[i].hi = hi;
                bt_ranges[i].stack_base = base;
                bt_ranges[i].stack = base + 64 - BT_STACK;
                bt_ranges[i].cache = cache;
                return 0;
            }
        }
        return -1;
    }

    static void bt_unregister(void *cache) {
        int i;
        for (i = 0; i < BT_RANGES; i++)
            if (bt_ranges[i].cache == cache)
                bt_ranges[i].cache = 0;
    }

    /* Code, writable and executable; behind the executable view `more` bytes of ordinary memory, within its reach. */
    static int bt_map(unsigned long long size, unsigned long long more, void **rw, void **rx) {
        int fd = memfd_create("pyhyve-code", MFD_CLOEXEC);
        if (fd < 0)
            return errno;
        if (ftruncate(fd, (off_t)size)) {
            int e = errno;
            close(fd);
            return e;
        }
        *rw = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        *rx = mmap(NULL, size + more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (*rx != MAP_FAILED)
            *rx = mmap(*rx, size, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED, fd, 0);
        close(fd);
        if (*rw == MAP_FAILED || *rx == MAP_FAILED)
            return errno;
        return 0;
    }

    static void bt_unmap(void *rw, void *rx, unsigned long long size, unsigned long long more) {
        munmap(rw, size);
        munmap(rx, size + more);
    }

    static void *bt_pages(unsigned long long size) {
        void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return p == MAP_FAILED ? 0 : p;
    }

    static void bt_free_pages(void *p, unsigned long long size) { munmap(p, size); }

    static int bt_host_ok(void) {
        /* bit 0: FSGSBASE in user mode; bit 1: BMI1 and BMI2; bit 2: AVX and XSAVE; bit 3: AVX-512 */
        int ok = 0;
        if (getauxval(AT_HWCAP2) & 2)
            ok |= 1;
        if (__builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
            ok |= 2;
        if (__builtin_cpu_supports("avx"))
            ok |= 4;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl"))
            ok |= 8;
        return ok;
    }
    static unsigned long long bt_host_state(void) {
        unsigned lo, hi;
        __asm__ __volatile__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
        return (unsigned long long)hi << 32 | lo;
    }
    static void bt_kick(unsigned char *kick, unsigned char *poll) {
        __atomic_store_n(kick, 1, __ATOMIC_SEQ_CST);
        __atomic_store_n(poll + 7, 0x40, __ATOMIC_SEQ_CST);
    }
    """
    int bt_guest(void* v, void* area, int (*fn)(void*) noexcept nogil, const uint64_t* state) noexcept nogil
    void (*bt_fixup)(void*, int, uint64_t*, uint64_t*, uint64_t*) noexcept nogil
    int bt_signals() noexcept nogil
    void bt_signal_stack() noexcept nogil
    uint64_t bt_return_stack() noexcept nogil
    void bt_free_return_stack(uint64_t base) noexcept nogil
    int bt_register(void* cache, uint64_t lo, uint64_t hi, uint64_t base) noexcept nogil
    void bt_unregister(void* cache) noexcept nogil
    int bt_map(uint64_t size, uint64_t more, void** rw, void** rx) noexcept nogil
    void bt_unmap(void* rw, void* rx, uint64_t size, uint64_t more) noexcept nogil
    void* bt_pages(uint64_t size) noexcept nogil
    void bt_free_pages(void* p, uint64_t size) noexcept nogil
    int bt_host_ok() noexcept nogil
    uint64_t bt_host_state() noexcept nogil
    void bt_kick(uint8_t* kick, uint8_t* poll) noexcept nogil


cdef void _fixup(void* cache, int trap, uint64_t* rip, uint64_t* r10, uint64_t* r11) noexcept nogil:
    """In a signal handler: turn the host's exception in generated code into the guest's."""
    cdef Cache* c = <Cache*>cache
    cdef Vcpu* v = c.vcpu
    cdef int found
    cdef uint64_t guest = loop_guest_rip(c, rip[0], &found)
    v.n.signals += 1
    if not found:
        guest = v.rip
    r10[0] = guest
    rip[0] = <uint64_t>c.leave
    if found and (trap == 0 or trap == 6 or trap == 13 or trap == 16 or trap == 17 or trap == 19):
        v.fault_vector = trap
        v.fault_has_error = 1 if trap == 13 or trap == 17 else 0
        v.fault_error = 0
        v.fault_addr = 0
        r11[0] = LEAVE_FAULT
        return
    v.exit.reason = X_ENGINE_ERROR
    v.exit.qualification = 0x100 + trap
    r11[0] = LEAVE_EXIT


bt_fixup = _fixup

_GPR = {name: index for index, name in enumerate((
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"))}
_SEG = {name: index for index, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"))}

cdef enum:
    BASE_STATE = 7          # x87, SSE, AVX
    AVX512_STATE = 0xE0

    POOL = 262144           # blocks
    PAGES = 65536           # guest pages that hold code
    HASH = 65536
    PAGE_HASH = 8192


def host_lacks():
    """One line that says what this host lacks for the software processor, or None."""
    cdef int ok = bt_host_ok()
    if not ok & 1:
        return "the host kernel does not let user space write the GS base (FSGSBASE): Linux 5.9 or newer is needed"
    if not ok & 2:
        return "the host's processor lacks BMI1 or BMI2 (Intel Haswell, AMD Excavator or newer is needed)"
    if not ok & 4:
        return "the host's processor lacks AVX, or its kernel does not enable it"
    return None


def host_has_avx512():
    """The host has AVX-512 as processors of servers have it (F, BW, CD, DQ and VL), and its kernel enables it."""
    return bt_host_ok() & 8 != 0 and bt_host_state() & AVX512_STATE == AVX512_STATE


cdef class BtShared:
    """What the vCPUs of one VM share."""
    cdef Shared* s

    def __cinit__(self):
        self.s = <Shared*>bt_pages(sizeof(Shared))
        if self.s == NULL:
            raise HostError("out of memory for a VM's tables")

    def __dealloc__(self):
        if self.s != NULL:
            bt_free_pages(self.s, sizeof(Shared))


cdef class ExitView:
    """The last exit; see pyhyve.cpu.processor.Exit."""
    cdef Exit* x
    cdef object owner

    @property
    def reason(self):
        return self.x.reason

    @property
    def length(self):
        return self.x.length

    @property
    def qualification(self):
        return self.x.qualification

    @property
    def gpa(self):
        return self.x.gpa

    @property
    def gla(self):
        return self.x.gla

    @property
    def io_port(self):
        return self.x.io_port

    @property
    def io_size(self):
        return self.x.io_size

    @property
    def io_in(self):
        return self.x.io_in != 0

    @property
    def io_string(self):
        return self.x.io_string != 0

    @property
    def io_value(self):
        return self.x.io_value

    @property
    def msr(self):
        return self.x.msr

    @property
    def msr_value(self):
        return self.x.msr_value

    # MMIO exits are for engines whose hardware has decoded the access: this one never makes them
    @property
    def mmio_gpa(self):
        return 0

    @property
    def mmio_size(self):
        return 0

    @property
    def mmio_write(self):
        return False

    @property
    def mmio_value(self):
        return 0


@cython.no_gc_clear
cdef class BtVcpu:
    """One software vCPU. It must be closed, by its VM, when nothing runs it any more."""
    cdef Vcpu* v
    cdef Cache* c
    cdef void* area
    cdef uint64_t code_size
    cdef bint running
    cdef BtShared shared
    cdef readonly ExitView exit
    cdef readonly BtApicState apic
    cdef readonly int vcpu_id
    cdef uint64_t apic_base

    def __cinit__(self, int vcpu_id, BtShared shared, uint64_t code_size=64 << 20):
        cdef void* rw = NULL
        cdef void* rx = NULL
        cdef int err
        if host_lacks() is not None:
            raise HostError(host_lacks())
        if shared.s.n_vcpus >= SHARED_VCPUS:
            raise HostError(f"a VM has at most {SHARED_VCPUS} vCPUs on this processor")
        self.shared = shared
        self.vcpu_id = vcpu_id
        self.code_size = code_size
        self.c = <Cache*>calloc(1, sizeof(Cache))
        if self.c == NULL:
            raise HostError("out of memory for a vCPU")
        err = bt_map(code_size, sizeof(Vcpu), &rw, &rx)
        if err:
            raise HostError(f"cannot map {code_size >> 20} MiB of code cache: error {err} "
                            "(is memfd_create or executable memory forbidden here?)")
        self.v = <Vcpu*>(<uint8_t*>rx + code_size)
        self.c.vcpu = self.v
        self.c.rw = <uint8_t*>rw
        self.c.rx = <uint8_t*>rx
        self.c.size = code_size
        self.c.pool_size = POOL
        self.c.pool = <Block*>bt_pages(POOL * sizeof(Block))
        self.c.pages_size = PAGES
        self.c.pages = <CodePage*>bt_pages(PAGES * sizeof(CodePage))
        self.c.hash_mask = HASH - 1
        self.c.hash = <Block**>bt_pages(HASH * sizeof(void*))
        self.c.page_hash_mask = PAGE_HASH - 1
        self.c.page_hash = <CodePage**>bt_pages(PAGE_HASH * sizeof(void*))
        if self.c.pool == NULL or self.c.pages == NULL or self.c.hash == NULL or self.c.page_hash == NULL:
            raise HostError("out of memory for a code cache")
        self.v.ret_base = bt_return_stack()
        if self.v.ret_base == 0:
            raise HostError("out of memory for a return stack")
        self.v.cache = self.c
        self.v.vcpu_id = vcpu_id
        self.v.maxphyaddr = 46
        self.v.features = feature_mask(())
        self.v.tlb_mask = (TLB_ENTRIES - 1) << 12
        self.v.ibt_mask = IBT_ENTRIES - 1
        self.v.second_mask = IBT_SECOND - 1
        self.v.page_mask = ~<uint64_t>0xFFF
        self.v.bit_mask[0] = 63
        self.v.bit_mask[1] = 31
        self.v.bit_mask[2] = 15
        segments_init(self.v)
        self.area = <void*>((<uintptr_t>&self.v.xsave_area[0] + 63) & ~<uintptr_t>63)
        self.c.shared = shared.s
        self.c.me = shared.s.n_vcpus
        self.c.inbox.poll = <uint8_t*>&self.v.poll
        shared.s.inboxes[self.c.me] = &self.c.inbox
        self.c.apic = &shared.s.apics[self.c.me]
        self.c.apic.poll = self.c.inbox.poll
        self.c.apic.tsc_offset = &self.v.tsc_offset
        self.apic = make_state(self.c.apic, shared)
        shared.s.n_vcpus += 1
        mmu_init(self.v)
        loop_init(self.c)
        if bt_signals() or bt_register(self.c, <uint64_t>rx, <uint64_t>rx + code_size, self.v.ret_base):
            raise HostError("cannot catch the processor's exceptions (more than 256 vCPUs in one process?)")
        self.exit = ExitView.__new__(ExitView)
        self.exit.x = &self.v.exit
        self.exit.owner = self
        self.reset()

    def __dealloc__(self):
        if self.c != NULL:
            bt_unregister(self.c)
            if self.c.apic != NULL:
                alarm_delete(self.c.apic)
            if self.c.shared != NULL:
                self.c.shared.inboxes[self.c.me] = NULL
            if self.v != NULL:
                if self.v.cpuid != NULL:
                    free(self.v.cpuid)
                if self.v.ret_base:
                    bt_free_return_stack(self.v.ret_base)
                bt_unmap(self.c.rw, self.c.rx, self.code_size, sizeof(Vcpu))
            if self.c.pool != NULL:
                bt_free_pages(self.c.pool, POOL * sizeof(Block))
            if self.c.pages != NULL:
                bt_free_pages(self.c.pages, PAGES * sizeof(CodePage))
            if self.c.hash != NULL:
                bt_free_pages(self.c.hash, HASH * sizeof(void*))
            if self.c.page_hash != NULL:
                bt_free_pages(self.c.page_hash, PAGE_HASH * sizeof(void*))
            free(self.c)

    def reset(self):
        """The architecture's state after RESET (Intel SDM vol 3, "Processor State After Reset")."""
        cdef Vcpu* v = self.v
        cdef int i
        for i in range(16):
            v.gpr[i] = 0
        v.gpr[RDX] = 0x000A20F1
        v.rip = 0xFFF0
        set_rflags(v, 2)
        v.cpl = 0
        for i in range(8):
            v.seg[i].base = 0
            v.seg[i].limit = 0xFFFF
            v.seg[i].attr = 0x93
            v.seg[i].selector = 0
        v.seg[SEG_CS].selector = 0xF000
        v.seg[SEG_CS].base = 0xFFFF0000
        v.seg[SEG_CS].attr = 0x9B
        v.seg[SEG_LDTR].attr = 0x82
        v.seg[SEG_TR].attr = 0x8B
        v.gdtr.base = v.idtr.base = 0
        v.gdtr.limit = v.idtr.limit = 0xFFFF
        v.cr0 = 0x60000010
        v.cr2 = v.cr3 = v.cr4 = v.cr8 = v.efer = 0
        v.xcr0 = 1
        v.vector_state = BASE_STATE
        v.pkru = 0
        for i in range(8):
            v.dr[i] = 0
        v.dr[6] = 0xFFFF0FF0
        v.dr[7] = 0x400
        v.db_pending = 0
        debug_update(v)
        v.star = v.lstar = v.cstar = v.sfmask = v.kernel_gs_base = 0
        v.sysenter_cs = v.sysenter_esp = v.sysenter_eip = v.tsc_aux = 0
        v.pat = 0x0007040600070406
        v.shadow = v.nmi_blocked = 0
        v.inject_valid = 0
        v.window = v.nmi_window = 0
        self.c.apic.window = self.c.apic.monitor_window = 0
        memset(self.area, 0, 4096)
        (<uint16_t*>self.area)[0] = 0x37F
        (<uint32_t*>self.area)[6] = 0x1F80
        update_bank(v)
        mmu_flush_all(v)

    def run(self):
        cdef int r
        cdef Vcpu* v = self.v
        if alarm_here(self.c.apic):
            raise HostError("cannot make a timer for a vCPU (ulimit -i: too many pending signals?)")
        self.running = True
        bt_signal_stack()
        with nogil:
            r = bt_guest(v, self.area, <int (*)(void*) noexcept nogil>loop_run, &v.vector_state)
        self.running = False
        return r

    def kick(self):
        bt_kick(&self.v.kick, <uint8_t*>&self.v.poll)
        apic_wake(self.c.apic)

    def inject(self, uint32_t vector, uint32_t kind, error=None):
        self.v.inject_vector = vector
        self.v.inject_type = kind
        self.v.inject_has_error = 0 if error is None else 1
        self.v.inject_error = 0 if error is None else error
        self.v.inject_valid = 1

    def injection_pending(self):
        return self.v.inject_valid != 0

    def interruptible(self):
        return self.v.iflag != 0 and self.v.shadow == 0 and self.v.inject_valid == 0 and self.v.db_pending == 0

    def nmi_allowed(self):
        return self.v.nmi_blocked == 0 and self.v.shadow == 0 and self.v.inject_valid == 0 and self.v.db_pending == 0

    def request_interrupt_window(self, bint wanted):
        self.c.apic.monitor_window = wanted
        self.v.window = wanted or self.c.apic.window

    def request_nmi_window(self, bint wanted):
        self.v.nmi_window = wanted

    def get(self, str name):
        cdef Vcpu* v = self.v
        index = _GPR.get(name)
        if index is not None:
            return v.gpr[<int>index]
        if name == "rip": return v.rip
        if name == "rflags": return get_rflags(v)
        if name == "cr0": return v.cr0
        if name == "cr2": return v.cr2
        if name == "cr3": return v.cr3
        if name == "cr4": return v.cr4
        if name == "cr8": return v.cr8
        if name == "apic_base": return self.apic_base
        if name == "efer": return v.efer
        if name == "xcr0": return v.xcr0
        if name in ("dr0", "dr1", "dr2", "dr3", "dr6", "dr7"): return v.dr[int(name[2])]
        if name == "star": return v.star
        if name == "lstar": return v.lstar
        if name == "cstar": return v.cstar
        if name == "sfmask": return v.sfmask
        if name == "kernel_gs_base": return v.kernel_gs_base
        if name == "sysenter_cs": return v.sysenter_cs
        if name == "sysenter_esp": return v.sysenter_esp
        if name == "sysenter_eip": return v.sysenter_eip
        if name == "tsc_aux": return v.tsc_aux
        if name == "pat": return v.pat
        if name == "tsc_offset": return v.tsc_offset
        raise KeyError(name)

    def set(self, str name, uint64_t value):
        cdef Vcpu* v = self.v
        index = _GPR.get(name)
        if index is not None:
            v.gpr[<int>index] = value
        elif name == "rip": v.rip = value
        elif name == "rflags":
            set_rflags(v, value)
            update_bank(v)
        elif name == "cr0":
            v.cr0 = value
            mmu_flush_all(v)
        elif name == "cr2": v.cr2 = value
        elif name == "cr3":
            v.cr3 = value
            mmu_flush_all(v)
        elif name == "cr4":
            v.cr4 = value
            mmu_flush_all(v)
            debug_update(v)
        elif name == "cr8": v.cr8 = value
        elif name == "apic_base": self._set_apic_base(value)
        elif name == "efer":
            v.efer = value
            mmu_flush_all(v)
        elif name == "xcr0":
            v.xcr0 = value
            v.vector_state |= value & AVX512_STATE & bt_host_state()
        elif name in ("dr0", "dr1", "dr2", "dr3", "dr6", "dr7"):
            v.dr[int(name[2])] = value
            debug_update(v)
        elif name == "star": v.star = value
        elif name == "lstar": v.lstar = value
        elif name == "cstar": v.cstar = value
        elif name == "sfmask": v.sfmask = value
        elif name == "kernel_gs_base": v.kernel_gs_base = value
        elif name == "sysenter_cs": v.sysenter_cs = value
        elif name == "sysenter_esp": v.sysenter_esp = value
        elif name == "sysenter_eip": v.sysenter_eip = value
        elif name == "tsc_aux": v.tsc_aux = value
        elif name == "pat": v.pat = value
        elif name == "tsc_offset":
            v.tsc_offset = value
            self.c.apic.rang = 1
        else:
            raise KeyError(name)

    def get_gpr(self, int index):
        return self.v.gpr[index & 15]

    def set_gpr(self, int index, uint64_t value):
        self.v.gpr[index & 15] = value

    def get_segment(self, str name):
        cdef Segment* s = &self.v.seg[<int>_SEG[name]]
        return SegmentValue(s.selector, s.base, s.limit, s.attr)

    def set_segment(self, str name, segment):
        cdef int index = _SEG[name]
        cdef Segment* s = &self.v.seg[index]
        s.selector = segment.selector
        s.base = segment.base
        s.limit = segment.limit
        s.attr = segment.attr
        if index == SEG_SS:
            self.v.cpl = (s.attr >> 5) & 3
            update_bank(self.v)

    def get_table(self, str name):
        cdef TableReg* t = &self.v.gdtr if name == "gdtr" else &self.v.idtr
        return (t.base, t.limit)

    def set_table(self, str name, uint64_t base, uint32_t limit):
        cdef TableReg* t = &self.v.gdtr if name == "gdtr" else &self.v.idtr
        t.base = base
        t.limit = limit

    def get_xsave(self):
        return (<char*>self.area)[: 2696 if self.v.vector_state & AVX512_STATE else 832]

    def set_xsave(self, bytes area):
        cdef uint64_t* header
        if len(area) < 832:
            raise ValueError("the XSAVE area must have at least 832 bytes")
        memset(self.area, 0, 4096)
        memcpy(self.area, <char*>area, min(len(area), 4096))
        header = <uint64_t*>(<char*>self.area + 512)
        if header[0] & AVX512_STATE and bt_host_state() & AVX512_STATE == AVX512_STATE:
            self.v.vector_state |= AVX512_STATE
        header[0] &= self.v.vector_state
        header[1] = 0
        memset(<char*>self.area + 528, 0, 48)
        (<uint32_t*>self.area)[6] &= 0xFFFF

    def complete_io(self, uint64_t value):
        cdef Vcpu* v = self.v
        if v.exit.io_size == 1:
            v.gpr[RAX] = (v.gpr[RAX] & ~<uint64_t>0xFF) | (value & 0xFF)
        elif v.exit.io_size == 2:
            v.gpr[RAX] = (v.gpr[RAX] & ~<uint64_t>0xFFFF) | (value & 0xFFFF)
        else:
            v.gpr[RAX] = value & <uint64_t>0xFFFFFFFF

    def complete_mmio(self, uint64_t value):
        raise NotImplementedError("this engine makes no MMIO exits")

    def complete_rdmsr(self, uint64_t value):
        self.v.gpr[RAX] = value & <uint64_t>0xFFFFFFFF
        self.v.gpr[RDX] = value >> 32
        self.skip(self.v.exit.length)

    def complete_wrmsr(self):
        self.skip(self.v.exit.length)

    def skip(self, uint32_t length):
        self.v.rip += length
        if not (self.v.efer & 0x400 and self.v.seg[SEG_CS].attr & 0x2000):
            self.v.rip &= <uint64_t>0xFFFFFFFF
        self.v.shadow = 0
        if self.v.sysflags & F_TF:
            self.v.db_pending |= DR6_BS

    def set_cpuid(self, entries):
        cdef CpuidEntry* table = <CpuidEntry*>calloc(len(entries) + 1, sizeof(CpuidEntry))
        cdef int n = 0
        if table == NULL:
            raise MemoryError
        for entry in entries:
            table[n].leaf = entry.leaf
            table[n].subleaf = 0xFFFFFFFF if entry.subleaf is None else entry.subleaf
            table[n].eax = entry.eax
            table[n].ebx = entry.ebx
            table[n].ecx = entry.ecx
            table[n].edx = entry.edx
            if table[n].leaf == 7 and table[n].subleaf == 0:
                self.v.la57 = table[n].ecx >> 16 & 1
            if table[n].leaf == 0:
                self.v.amd = table[n].ebx == 0x68747541U or table[n].ebx == 0x6F677948U      # Auth, Hygo
            n += 1
        if self.v.cpuid != NULL:
            free(self.v.cpuid)
        self.v.cpuid = table
        self.v.n_cpuid = n
        self.v.features = feature_mask(entries)

    cdef _set_apic_base(self, uint64_t value):
        cdef CpuidEntry* e
        cdef uint64_t page = value >> 12 if value & 0xC00 == 0x800 else ~<uint64_t>0
        self.apic_base = value
        for n in range(self.v.n_cpuid):
            e = &self.v.cpuid[n]
            if e.leaf == 1 or (e.leaf == 0x80000001U and self.v.amd):
                e.edx = e.edx | 0x200 if value & 0x800 else e.edx & ~<uint32_t>0x200
        if page != self.v.apic_page:
            self.v.apic_page = page
            mmu_flush_ept(self.v)

    def set_ept(self, uint64_t eptp, uint64_t generation):
        if eptp != self.v.eptp or generation != self.v.eptgen:
            self.v.eptp = eptp
            self.v.eptgen = generation
            mmu_flush_ept(self.v)

    def invalidate_code(self, uint64_t hva, uint64_t length):
        cdef SharedPage* p
        cdef uint64_t end = hva + length
        cdef uint64_t stop
        while hva < end:
            stop = (hva | 0xFFF) + 1
            if stop > end:
                stop = end
            p = shared_find(self.c.shared, hva & ~<uint64_t>0xFFF)
            if p != NULL and p.mask >> self.c.me & 1:
                inbox_put(&self.c.inbox, hva, stop - hva)
            hva = stop

    def set_watches(self, ranges):
        """Make run() end with MONITOR_TRAP where the guest touches what is watched: (first, last, kinds) each, linear
        addresses, kinds of 1 (write), 3 (read or write) and 4 (execution). At most 16; they replace
        those that were there. The exit's `qualification` has bit n for range n, and comes before an instruction that
        is watched and behind one that touches data. A watched instruction runs when run() is called again."""
        cdef Watch* w
        if len(ranges) > WATCHES - 4:
            raise ValueError(f"at most {WATCHES - 4} ranges can be watched")
        for n in range(4, WATCHES):
            w = &self.v.watch[n]
            first, last, kinds = ranges[n - 4] if n - 4 < len(ranges) else (0, 0, 0)
            if kinds & ~7 or not 0 <= first <= last <= 0xFFFFFFFFFFFFFFFF:
                raise ValueError("a range that cannot be watched")
            w.first = first
            w.last = last
            w.kinds = kinds
            w.enabled = 3 if kinds else 0
        debug_update(self.v)

    def single_step(self, bint wanted):
        """Make run() end with MONITOR_TRAP, `qualification` 1 << 31, behind each instruction."""
        self.v.debug = (self.v.debug & ~<uint32_t>WATCH_STEP) | (WATCH_STEP if wanted else 0)

    def translate(self, uint64_t gla, int access=0):
        cdef uint64_t gpa = 0
        cdef Vcpu* v = self.v
        cdef Exit kept = v.exit
        cdef uint32_t vector = v.fault_vector
        cdef uint64_t pkru = v.pkru
        cdef int r
        v.pkru = 0                               # protection keys are for the guest's own accesses
        r = mmu_translate(v, gla, access, BANK_KERNEL_AC, NULL, NULL, &gpa)
        v.pkru = pkru
        v.fault_vector = vector
        if r == R_EXIT and v.exit.reason == X_EPT_VIOLATION and v.exit.qualification & 0x100:
            # mapped by the guest, but not memory
            gpa = v.exit.gpa
            r = R_OK
        v.exit = kept
        return gpa if r == R_OK else None

    def counters(self):
        cdef Counters* n = &self.v.n
        return {
            "blocks_translated": n.blocks_translated,
            "insns_translated": n.insns_translated,
            "blocks_dropped": n.blocks_dropped,
            "cache_flushes": n.cache_flushes,
            "dispatches": n.dispatches,
            "tlb_misses_read": n.tlb_misses_r,
            "tlb_misses_write": n.tlb_misses_w,
            "tlb_misses_fetch": n.tlb_misses_x,
            "tlb_flushes": n.tlb_flushes,
            "page_walks": n.page_walks,
            "guest_faults": n.guest_faults,
            "guest_page_faults": n.guest_page_faults,
            "interrupts": n.interrupts,
            "microcode": n.microcode,
            "slow_insns": n.slow_insns,
            "smc_writes": n.smc_writes,
            "signals": n.signals,
            "cr3_writes": n.cr3_writes,
            "syscalls": n.syscalls,
            "rep_ops": n.rep_ops,
            "halts": self.c.apic.halts,
            "eois": self.c.apic.eois,
            "ipis": self.c.apic.ipis,
            "left_for_branch": self.c.leaves[1],
            "left_for_link": self.c.leaves[2],
            "left_for_poll": self.c.leaves[3],
            "left_for_microcode": self.c.leaves[4],
            "left_for_fault": self.c.leaves[5],
            "left_for_exit": self.c.leaves[6],
            "left_for_slow": self.c.leaves[7],
            "left_for_single": self.c.leaves[8],
            "code_bytes": <uint64_t>(self.c.at - self.c.start) + <uint64_t>(self.c.cold - cold_start(self.c)),
        }

    def blocks(self):
        """Every block in the cache: (host address, bytes of hot code, guest RIP, guest bytes, mode), for profiling."""
        cdef uint64_t i
        cdef Block* b
        found = []
        for i in range(self.c.pool_used):
            b = &self.c.pool[i]
            if b.mode != ~<uint64_t>0:
                found.append((<uint64_t>b.entry_ind, b.end - b.entry_ind, b.rip, b.guest_len, b.mode))
        return found

    def host_code(self, uint64_t address, uint64_t length):
        """`length` bytes of the code cache at a host address that `blocks` gave."""
        if address < <uint64_t>self.c.rx or address + length > <uint64_t>self.c.rx + self.c.size:
            raise ValueError("not in the code cache")
        return (<char*>address)[:length]

    def microcode_by_opcode(self):
        """Instructions run in microcode, by map << 8 | opcode (map 1: 0F, 2: 0F 38, 3: 0F 3A)."""
        return {n: self.c.micro_ops[n] for n in range(1024) if self.c.micro_ops[n]}

    def internals(self):
        """Addresses of the vCPU's state, of its XSAVE area, and of the function that runs it: for the fuzzer."""
        return <uint64_t>self.v, <uint64_t>self.area, <uint64_t>&bt_guest

    def message(self):
        cdef uint64_t q = self.v.exit.qualification
        if 0x100 <= q < 0x200:
            return f"the host raised exception {q - 0x100} in generated code near guest RIP {self.v.rip:#x}"
        if q == 1:
            return f"cannot translate the code at guest RIP {self.v.rip:#x}"
        return f"an instruction that this processor does not run yet, at guest RIP {self.v.rip:#x} (code {q:#x})"
