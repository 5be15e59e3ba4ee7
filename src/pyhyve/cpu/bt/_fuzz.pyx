# cython: language_level=3
"""The fuzzer's engine: sequences of random instructions on the host's processor and on a software vCPU, in batches.

Both sides see the same linear addresses (see _fuzzgen.pxd), have the same state when a sequence starts, and what they
leave is compared whole: registers, flags, vector state, memory, and the exception with all that it says. tests/fuzz
builds the guest around it and judges what it finds.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from pyhyve.cpu.bt._fuzzgen cimport *
from pyhyve.cpu.bt.codecache cimport Cache, cache_reset
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.loop cimport loop_run
from pyhyve.cpu.bt.state cimport *

cdef extern from "_fuzz_native.h":
    ctypedef struct fz_context:
        uint64_t gpr[16]
        uint64_t flags
        uint32_t far_offset
        uint16_t far_selector
        uint64_t fs_base
        uint64_t gs_base
        uint16_t sel[6]
        uint32_t xcr0
        uint64_t vector
        uint64_t error
        uint64_t cr2
        uint64_t rip
        uint64_t fault_flags
        uint64_t fault_cs
        uint64_t fault_ss
        uint64_t end
        uint16_t out_sel[6]
        uint64_t stepped
    fz_context* FZ
    uint64_t FZ_XS_IN
    uint64_t FZ_XS_OUT
    uint64_t FZ_BACK
    uint64_t FZ_BACK_END
    int FZ_NONE
    const char* fz_init(uint64_t size)
    void fz_run() nogil
    void fz_cpuid(unsigned leaf, unsigned subleaf, unsigned* out)
    int fz_protect(uint64_t at, uint64_t size, int prot)
    long fz_ldt(unsigned entry, unsigned base, unsigned limit, unsigned flags)

ctypedef int (*guest_fn)(void*, void*, int (*)(void*) noexcept nogil, const uint64_t*) noexcept nogil

cdef enum:
    XS_MAX = 2816
    NONE = 255
    BATCH = 256
    KEPT = 48                       # differences that a batch remembers

    # what differs
    D_GPR = 1
    D_FLAGS = 2
    D_VECTOR = 4
    D_ERROR = 8
    D_CR2 = 16
    D_RIP = 32
    D_XSAVE = 64
    D_MEMORY = 128
    D_SELECTOR = 256
    D_BASE = 512

DIFFERENCES = {D_GPR: "registers", D_FLAGS: "flags", D_VECTOR: "exception", D_ERROR: "error code", D_CR2: "cr2",
               D_RIP: "rip", D_XSAVE: "vector state", D_MEMORY: "memory", D_SELECTOR: "selectors", D_BASE: "bases"}
BASE = FUZZ_BASE
CODE = FUZZ_CODE
CODE_SIZE = FUZZ_CODE_SIZE
DATA = FUZZ_DATA
DATA_PAGES = FUZZ_DATA_PAGES
END = FUZZ_END
END16 = FUZZ_END16
SIZE = FUZZ_SIZE
BACK = FZ_BACK
BACK_END = FZ_BACK_END

def cpuid(leaf, subleaf):
    """The host's answer: EAX, EBX, ECX, EDX."""
    cdef unsigned out[4]
    fz_cpuid(leaf, subleaf, out)
    return out[0], out[1], out[2], out[3]


cdef struct State:
    uint64_t gpr[16]
    uint64_t flags
    uint64_t rip
    uint64_t vector
    uint64_t error
    uint64_t cr2
    uint64_t fs_base
    uint64_t gs_base
    uint16_t sel[6]

cdef struct Found:
    uint32_t seq
    uint32_t state
    uint32_t what
    State start
    State native
    State guest


cdef class Fuzzer:
    """One guest beside the host's processor. There is one in a process: the window is at fixed addresses."""

    cdef object vcpu
    cdef Vcpu* v
    cdef uint8_t* area
    cdef guest_fn enter
    cdef uint8_t* ram
    cdef uint64_t ram_size
    cdef uint64_t kernel            # linear address of the guest's memory for its kernel
    cdef uint64_t stubs             # where exceptions go: 16 bytes for each vector
    cdef uint64_t stack_top         # where their frames are pushed
    cdef uint8_t* code_page[256]    # the guest's memory by page
    cdef uint8_t* data_page[16]
    cdef uint8_t* end_page
    cdef uint8_t* initial           # what the data pages hold before each run
    cdef uint32_t xs_size
    cdef uint32_t xs_512            # where AVX-512's components begin, xs_size without
    cdef uint32_t xcr0
    cdef Segment seg[8]
    cdef Settings settings
    cdef uint16_t sel[6]            # selectors at the start, native and guest
    cdef uint16_t cs
    cdef uint64_t cs_base
    cdef int bits
    cdef Seq seqs[BATCH]
    cdef Found found[KEPT]
    cdef uint32_t n_found
    cdef uint64_t ran
    cdef uint64_t runs
    cdef uint64_t faults
    cdef uint64_t vectors[33]
    cdef uint32_t cover[3 * 8 * 256 * 8]
    cdef uint8_t* initial_owner
    cdef object keep
    cdef uint64_t* progress         # in shared memory: what runs now

    def __init__(self, vcpu, addresses, uint64_t ram, uint64_t ram_size, code_pages, data_pages, uint64_t end_page,
                 uint64_t kernel, uint64_t stubs, uint64_t stack_top, uint32_t xcr0, uint32_t xs_size,
                 uint32_t xs_512, uint64_t initial, uint64_t progress):
        cdef uint64_t v, area, enter
        cdef int n
        if xs_size > XS_MAX:
            raise ValueError("the host's extended state is too large")
        v, area, enter = addresses
        self.vcpu = vcpu
        self.v = <Vcpu*>v
        self.area = <uint8_t*>area
        self.enter = <guest_fn>enter
        self.ram = <uint8_t*>ram
        self.ram_size = ram_size
        for n in range(256):
            self.code_page[n] = self.ram + <uint64_t>code_pages[n] if code_pages[n] else NULL
        for n in range(16):
            self.data_page[n] = self.ram + <uint64_t>data_pages[n] if data_pages[n] else NULL
        self.end_page = self.ram + end_page
        self.kernel = kernel
        self.stubs = stubs
        self.stack_top = stack_top
        self.xcr0 = xcr0
        self.xs_size = xs_size
        self.xs_512 = xs_512
        self.initial = <uint8_t*>initial
        self.progress = <uint64_t*>progress
        error = fz_init(FUZZ_SIZE)
        if error != NULL:
            raise OSError((<bytes>error).decode())
        for n in range(256):
            if self.code_page[n] != NULL:
                fz_protect(FUZZ_CODE + n * 4096, 4096, 7)
        for n in range(16):
            if page_kind(n):
                fz_protect(FUZZ_DATA + n * 4096, 4096, 3)
        fz_protect(FUZZ_END, 4096, 7)
        FZ.xcr0 = xcr0

    def seal(self):
        """Make read-only what is to be so."""
        cdef int n
        for n in range(16):
            if page_kind(n) == PAGE_READ:
                fz_protect(FUZZ_DATA + n * 4096, 4096, 1)

    def unseal(self):
        cdef int n
        for n in range(16):
            if page_kind(n) == PAGE_READ:
                fz_protect(FUZZ_DATA + n * 4096, 4096, 3)

    @staticmethod
    def page_kind(int page):
        return page_kind(page)

    def ldt(self, unsigned entry, unsigned base, unsigned limit, unsigned flags):
        """Set an entry of the host's local descriptor table, as modify_ldt(2) has it."""
        if fz_ldt(entry, base, limit, flags):
            raise OSError("modify_ldt fails")

    def poke_native(self, uint64_t at, bytes data):
        memcpy(<void*>at, <const char*>data, len(data))

    def poke_guest(self, uint64_t at, bytes data):
        """By linear address, byte by byte."""
        cdef uint64_t k
        cdef uint8_t* p
        for k in range(len(data)):
            p = self._guest_at(at + k)
            if p != NULL:
                p[0] = <uint8_t>data[k]

    cdef uint8_t* _guest_at(self, uint64_t lin) noexcept nogil:
        if lin - FUZZ_CODE < FUZZ_CODE_SIZE:
            return self.code_page[(lin - FUZZ_CODE) >> 12] + (lin & 0xFFF) if self.code_page[(lin - FUZZ_CODE) >> 12] != NULL else NULL
        if lin - FUZZ_DATA < FUZZ_DATA_PAGES * 4096:
            return self.data_page[(lin - FUZZ_DATA) >> 12] + (lin & 0xFFF) if self.data_page[(lin - FUZZ_DATA) >> 12] != NULL else NULL
        if lin - FUZZ_END < 4096:
            return self.end_page + (lin & 0xFFF)
        return NULL

    def configure(self, int bits, selectors, int cs, uint64_t cs_base, seg_base, uint64_t fs_base, uint64_t gs_base, *,
                  undefined, evex=False, max_insns=6, faults=6, invalid=10,
                  align=0, branches=True):
        """How the following batches are made and run. The vCPU's segments are taken as they are now."""
        cdef int n
        self.keep = <bytes>undefined
        self.settings.undefined = <const uint8_t*><const char*><bytes>undefined
        self.bits = bits
        self.cs = cs
        self.cs_base = cs_base
        memcpy(self.seg, self.v.seg, sizeof(self.seg))
        for n in range(6):
            self.sel[n] = selectors[n]
            self.settings.seg_base[n] = seg_base[n]
        self.settings.mode = bits
        self.settings.evex = evex
        self.settings.max_insns = max_insns
        self.settings.faults = faults
        self.settings.invalid = invalid
        self.settings.align = align
        self.settings.branches = branches
        self.settings.fs_base = fs_base
        self.settings.gs_base = gs_base

    # -- one run ------------------------------------------------------------------------------------------------------

    cdef void _native(self, State* s, State* out) noexcept nogil:
        memcpy(<void*>FZ.gpr, s.gpr, 128)
        FZ.flags = s.flags
        FZ.far_offset = <uint32_t>(s.rip - self.cs_base)
        FZ.far_selector = self.cs
        FZ.fs_base = s.fs_base
        FZ.gs_base = s.gs_base
        memcpy(<void*>FZ.sel, s.sel, 12)
        fz_run()
        memcpy(out.gpr, <void*>FZ.gpr, 128)
        out.fs_base = FZ.fs_base
        out.gs_base = FZ.gs_base
        memcpy(out.sel, <void*>FZ.out_sel, 12)
        out.vector = FZ.vector
        out.error = out.cr2 = 0
        if FZ.vector == NONE:
            out.flags = FZ.stepped & ~<uint64_t>F_RF if FZ.stepped else FZ.flags
            out.rip = FZ.end
            out.sel[SEG_CS] = self.cs
        else:
            out.flags = FZ.fault_flags
            out.rip = FZ.rip
            out.error = FZ.error
            if FZ.vector == 14:
                out.cr2 = FZ.cr2
            out.sel[SEG_CS] = <uint16_t>FZ.fault_cs
            out.sel[SEG_SS] = <uint16_t>FZ.fault_ss

    cdef void _guest(self, State* s, State* out, uint64_t end) noexcept nogil:
        cdef Vcpu* v = self.v
        cdef uint64_t* frame
        cdef int reason, n, k
        memcpy(v.gpr, s.gpr, 128)
        set_rflags(v, s.flags)
        memcpy(v.seg, self.seg, sizeof(self.seg))
        for n in range(6):
            v.seg[n].selector = s.sel[n]
        v.seg[SEG_CS].selector = self.cs
        v.seg[SEG_FS].base = s.fs_base
        v.seg[SEG_GS].base = s.gs_base
        v.cpl = 3
        update_bank(v)
        v.rip = s.rip - self.cs_base
        v.cr2 = 0
        v.shadow = v.nmi_blocked = 0
        v.inject_valid = 0
        memcpy(self.area, <void*>FZ_XS_IN, self.xs_size)
        reason = self.enter(v, self.area, <int (*)(void*) noexcept nogil>loop_run, &v.vector_state)
        memcpy(out.gpr, v.gpr, 128)
        out.fs_base = v.seg[SEG_FS].base
        out.gs_base = v.seg[SEG_GS].base
        for n in range(6):
            out.sel[n] = <uint16_t>v.seg[n].selector
        out.error = out.cr2 = 0
        out.flags = get_rflags(v)
        if reason == X_VMCALL:
            out.vector = NONE
            out.rip = v.rip + self.cs_base
            if out.rip == end:
                out.rip = 0
            elif out.rip - FUZZ_END < 4096 or (self.bits == 16 and v.rip == FUZZ_END16):
                out.rip = 1
            return
        if reason != X_HLT or v.rip - self.stubs >= 4096:
            out.vector = 0x100 | reason
            out.rip = v.rip
            return
        out.vector = (v.rip - self.stubs) >> 4
        frame = <uint64_t*>(self.ram + (v.gpr[RSP] - self.kernel))
        if v.gpr[RSP] == self.stack_top - 48:
            out.error = frame[0]
            frame += 1
        elif v.gpr[RSP] != self.stack_top - 40:
            out.vector |= 0x400
            return
        k = <int>out.vector
        if (v.gpr[RSP] == self.stack_top - 48) != (k == 8 or 10 <= k <= 14 or k == 17 or k == 21):
            out.vector |= 0x800
        out.rip = frame[0]
        out.sel[SEG_CS] = <uint16_t>frame[1]
        out.flags = frame[2]
        out.gpr[RSP] = frame[3]
        out.sel[SEG_SS] = <uint16_t>frame[4]
        if out.vector == 14:
            out.cr2 = v.cr2

    cdef uint32_t _live(self, Seq* s, uint64_t rip) noexcept nogil:
        """Arithmetic flags that an exception at `rip` must show: the translator keeps what may still be read. Those
        that the instruction, or one behind it, overwrites before that, it need not have kept."""
        cdef uint32_t live[MAX_SEQ + 1]
        cdef uint64_t target
        cdef Insn* i
        cdef int m
        cdef int n = <int>s.n - 1
        if rip - s.at > s.length:
            m = 0                                 # behind a branch out of the sequence
            for n in range(<int>s.n + 1):
                m |= s.und[n]
            return self._rflags(FL_ALL & ~<uint32_t>m)
        live[s.n] = FL_ALL
        while n >= 0 and s.at + s.off[n] >= rip:
            i = &s.insn[n]
            live[n] = (live[n + 1] & ~<uint32_t>i.flags_killed) | i.flags_read
            if i.cls == C_BRANCH:
                live[n] = FL_ALL
                if i.map == 0 and (i.opcode == 0xE8 or i.opcode == 0xE9 or i.opcode == 0xEB):
                    # what is live where it goes, which may be less than behind it
                    target = s.at + s.off[n] + i.length + <uint64_t>i.imm
                    for m in range(n + 1, <int>s.n):
                        if s.at + s.off[m] == target:
                            live[n] = live[m]
                elif i.flags_read != FL_ALL:
                    live[n] = live[n + 1] | i.flags_read
            n -= 1
        return self._rflags(live[n + 1] & ~<uint32_t>s.und[n + 1])

    cdef uint32_t _rflags(self, uint32_t live) noexcept nogil:
        return ((live & FL_CF) | (live & FL_PF) << 1 | (live & FL_AF) << 2 | (live & FL_ZF) << 3 | (live & FL_SF) << 3
                | (live & FL_OF) << 6)

    cdef void _hide(self, Seq* s) noexcept nogil:
        """x87 instruction and data pointers in stored images: host addresses on one side, zeros on the other."""
        cdef uint32_t n, k, first, last
        cdef uint8_t* p
        cdef uint64_t at
        for n in range(s.n_env):
            first = 6 if s.env[n].kind != 2 else 12
            last = 24 if s.env[n].kind == 1 else (28 if s.env[n].kind == 2 else 14)
            for k in range(first, last):
                at = s.env[n].at + k
                if at - FUZZ_DATA < FUZZ_DATA_PAGES * 4096 and page_kind(<int>((at - FUZZ_DATA) >> 12)) == PAGE_WRITE:
                    p = self._guest_at(at)
                    p[0] = (<uint8_t*>at)[0] = 0

    cdef bint _strays(self, Seq* s, State* native, State* guest) noexcept nogil:
        """A random word may lead 16-bit code to any other sequence, whose end is not the same on both sides."""
        cdef bint any_target = False
        cdef int n
        for n in range(<int>s.n):
            any_target = any_target or s.insn[n].cls == C_BRANCH and s.insn[n].map == 0 and (
                s.insn[n].opcode == 0xFF or s.insn[n].opcode == 0xC2 or s.insn[n].opcode == 0xC3)
        if not any_target:
            return False
        return (guest.rip > 1 if guest.vector == NONE else guest.rip + self.cs_base - s.at > s.length) or (
            native.vector != NONE and native.rip + self.cs_base - s.at > s.length)

    cdef uint32_t _compare(self, Seq* s, State* a, State* b) noexcept nogil:
        cdef uint32_t what = 0
        cdef uint32_t undefined
        cdef uint64_t mask = ~<uint64_t>0 if self.bits == 64 else <uint64_t>0xFFFFFFFFULL
        cdef uint64_t flags = 0xFFFFFFFFULL
        cdef int n
        cdef uint64_t different = 0
        cdef uint8_t* x = <uint8_t*>FZ_XS_OUT
        cdef uint64_t end = FUZZ_END if self.bits != 16 else FUZZ_END16
        if a.vector != NONE and a.rip - end < 4096 or b.vector != NONE and b.rip - end < 4096:
            return 0                              # amid the common end, which is not the same on both sides
        if self.bits == 16:
            if self._strays(s, a, b):
                return 0
            for n in range(6):
                if n != SEG_CS and (a.sel[n] ^ self.cs) & ~3 == 0:
                    return 0                      # it may have read code
        for n in range(16 if self.bits == 64 else 8):
            different |= (a.gpr[n] ^ b.gpr[n]) & mask
        if different:
            what |= D_GPR
        if a.vector != b.vector:
            what |= D_VECTOR
        else:
            if a.vector == NONE:
                undefined = s.und[s.n]
                if a.rip:
                    for n in range(<int>s.n):     # the common end, by any branch
                        undefined |= s.und[n]
                flags = ~<uint64_t>self._rflags(undefined)
            else:
                flags = self._live(s, a.rip + self.cs_base) | ~<uint64_t>0x8D5 & 0xFFFFFFFFULL
            if (a.flags ^ b.flags) & flags:
                what |= D_FLAGS
            if a.error != b.error and not (a.vector == 14 and a.cr2 >= <uint64_t>0x7FFFFFFFF000ULL and (a.error ^ b.error) == 1):
                what |= D_ERROR                   # (Linux says "present" of every address of the kernel's half)
            if a.cr2 != b.cr2:
                what |= D_CR2
            if a.rip != b.rip:
                what |= D_RIP
            for n in range(6):
                # (a return from the host's kernel makes null selectors 0)
                if a.sel[n] != b.sel[n] and (a.sel[n] | b.sel[n]) > 3:
                    what |= D_SELECTOR
            if a.fs_base != b.fs_base or a.gs_base != b.gs_base:
                what |= D_BASE
        if memcmp(x, self.area, 6) or (<uint32_t*>x)[6] != (<uint32_t*>self.area)[6] or memcmp(x + 32, self.area + 32, 384) \
                or memcmp(x + 576, self.area + 576, 256) \
                or memcmp(x + self.xs_512, self.area + self.xs_512, self.xs_size - self.xs_512):
            what |= D_XSAVE
        for n in range(16):
            if self.data_page[n] != NULL and memcmp(<void*>(FUZZ_DATA + n * 4096), self.data_page[n], 4096):
                what |= D_MEMORY
        return what

    cdef void _restore(self) noexcept nogil:
        cdef int n
        cdef uint8_t* p
        for n in range(16):
            if page_kind(n) == PAGE_WRITE:
                p = <uint8_t*>(FUZZ_DATA + n * 4096)
                if memcmp(p, self.initial + n * 4096, 4096):
                    memcpy(p, self.initial + n * 4096, 4096)
                if memcmp(self.data_page[n], self.initial + n * 4096, 4096):
                    memcpy(self.data_page[n], self.initial + n * 4096, 4096)

    cdef uint32_t _both(self, Seq* s, State* start, State* native, State* guest) noexcept nogil:
        self._native(start, native)
        self._guest(start, guest, s.at + s.length)
        if s.n_env:
            self._hide(s)
        return self._compare(s, native, guest)

    # -- making -------------------------------------------------------------------------------------------------------

    cdef void _place(self, Seq* s) noexcept nogil:
        """Write a sequence and its end, on both sides."""
        cdef uint8_t tail[16]
        cdef uint32_t n, k
        cdef uint64_t at
        cdef uint8_t* p
        for n in range(s.length):
            p = self._guest_at(s.at + n)
            if p != NULL:
                p[0] = (<uint8_t*>(s.at + n))[0] = s.code[n]
        n = 0
        if self.bits == 64:
            tail[0] = 0xFF
            tail[1] = 0x24
            tail[2] = 0x25
            (<uint32_t*>&tail[3])[0] = FUZZ_BASE + 0x100
            n = 7
        else:
            if self.bits == 16:
                tail[0] = 0x66
                n = 1
            tail[n] = 0xEA
            (<uint32_t*>&tail[n + 1])[0] = <uint32_t>FZ_BACK
            (<uint16_t*>&tail[n + 5])[0] = 0x33
            n += 7
        if self._guest_at(s.at + s.length + n - 1) == NULL:
            # no room: HLT, which both sides refuse (or an absent page)
            p = self._guest_at(s.at + s.length)
            if p != NULL:
                p[0] = (<uint8_t*>(s.at + s.length))[0] = 0xF4
            return
        for k in range(n):
            at = s.at + s.length + k
            p = self._guest_at(at)
            if p != NULL:
                (<uint8_t*>at)[0] = tail[k]
                p[0] = self.v.amd * 0x18 + 0xC1 if k == 2 else (<uint8_t*>b"\x0f\x01\xc1\xf4\xf4\xf4\xf4\xf4\xf4\xf4")[k]

    cdef uint64_t _value(self, Rng* r) noexcept nogil:
        cdef uint64_t x = rng_next(r)
        cdef uint64_t y = x >> 8
        x &= 15
        if x < 5:
            return rng_next(r)
        if x < 7:
            return y & 0xFF
        if x == 7:
            return 0 - (y & 15)
        if x == 8:
            return y & 0xFFFF
        if x == 9:
            return y & 0xFFFFFFFFULL
        if x == 10:
            return <uint64_t>1 << (y & 63)
        if x == 11:
            return (<uint64_t>1 << (y & 63)) - 1
        if x == 12:
            return <uint64_t>0x8000000000000000ULL ^ (y & 3)
        if x == 13:
            return <uint64_t>0x80000000ULL ^ (y & 3)
        return 0 if x == 14 else rng_next(r) & 0x0101010101010101ULL

    cdef uint64_t _float(self, Rng* r) noexcept nogil:
        """Eight bytes of a vector register: two singles, a double, or integers."""
        cdef uint64_t x = rng_next(r)
        cdef uint64_t y = rng_next(r)
        cdef uint32_t kind = x & 15
        cdef uint32_t* special = [0, 0x80000000ULL, 0x3F800000, 0xBF800000ULL, 0x7F800000, 0xFF800000ULL, 0x7FC00000, 0x7FA00000,
                                  1, 0x807FFFFFULL, 0x00800000, 0x7F7FFFFF, 0x4F000000, 0x5F000000, 0x3F000000, 0x33800000]
        cdef uint64_t* wide = [0, 0x8000000000000000ULL, 0x3FF0000000000000ULL, 0xBFF0000000000000ULL, 0x7FF0000000000000ULL,
                               0xFFF0000000000000ULL, 0x7FF8000000000000ULL, 0x7FF4000000000001ULL, 1,
                               0x800FFFFFFFFFFFFFULL, 0x0010000000000000ULL, 0x7FEFFFFFFFFFFFFFULL, 0x41E0000000000000ULL,
                               0x43E0000000000000ULL, 0x3FE0000000000000ULL, 0x3CA0000000000000ULL]
        if kind < 5:
            return y
        if kind < 8:
            return special[x >> 8 & 15] | <uint64_t>special[x >> 16 & 15] << 32
        if kind < 11:
            return wide[x >> 8 & 15]
        if kind == 11:
            # near 1
            return y & 0x807FFFFF807FFFFFULL | 0x3F0000003F000000ULL | x & 0x0380000003800000ULL
        if kind == 12:
            return y & 0x800FFFFFFFFFFFFFULL | 0x3FE0000000000000ULL
        if kind == 13:
            return y & 0x807FFFFF807FFFFFULL         # denormals
        return y & 0x0F0F0F0F0F0F0F0FULL if kind == 14 else 0

    cdef void _start(self, Seq* s, Rng* r, State* t) noexcept nogil:
        cdef int n, k
        cdef uint8_t* x = <uint8_t*>FZ_XS_IN
        cdef uint64_t bits, e
        cdef uint64_t mask = ~<uint64_t>0 if self.bits == 64 else <uint64_t>0xFFFFFFFFULL
        for n in range(16):
            if s.pinned >> n & 1:
                t.gpr[n] = s.init[n]
            elif n < 8 or self.bits == 64:
                t.gpr[n] = self._value(r) & mask
            else:
                t.gpr[n] = 0
        t.flags = 0x202 | rng_next(r) & 0x8D5
        if rng_below(r, 6) == 0:
            t.flags |= 0x400
        if rng_below(r, 8) == 0:
            t.flags |= 0x200000
        if chance(r, self.settings.align):
            t.flags |= 0x40000
        t.rip = s.at
        t.fs_base = self.settings.fs_base if self.bits == 64 else self.settings.seg_base[SEG_FS]
        t.gs_base = self.settings.gs_base if self.bits == 64 else self.settings.seg_base[SEG_GS]
        memcpy(t.sel, self.sel, 12)
        # x87
        bits = rng_next(r)
        (<uint16_t*>x)[0] = 0x37F
        if bits % 10 >= 6:
            (<uint16_t*>x)[0] = <uint16_t>(0x40 | (bits >> 8 & 0xF00) | (0x3F if bits % 10 < 8 else bits >> 20 & 0x3F))
        bits >>= 32
        (<uint16_t*>x)[1] = <uint16_t>((bits >> 8 & 0x7F7F) if bits % 10 > 7 else (bits >> 8 & 0x7F00 if bits % 10 > 4 else 0))
        bits = rng_next(r)
        (<uint16_t*>x)[2] = <uint16_t>(0 if bits % 3 == 0 else (0xFF if bits % 3 == 1 else bits >> 8 & 0xFF))
        memset(x + 6, 0, 18)
        (<uint32_t*>x)[6] = 0x1F80
        bits >>= 24
        if bits % 10 >= 6:
            (<uint32_t*>x)[6] = <uint32_t>((bits >> 8 & 0xE07F) | (0x1F80 if bits % 10 < 9 else bits >> 4 & 0x1F80))
        for n in range(8):
            bits = rng_next(r)
            (<uint64_t*>(x + 32 + 16 * n))[0] = rng_next(r) if bits & 3 == 0 else (
                self._float(r) if bits & 3 == 1 else (<uint64_t>1 << 63 | rng_next(r) << 44 if bits & 7 == 2 else
                                                      <uint64_t>1 << 63))
            e = bits >> 8 & 0x8000
            k = bits >> 32 & 15
            if k < 8:
                e |= 0x3FF0 + (bits >> 40 & 0x3F) - 8
            elif k < 10:
                e |= bits >> 40 & 0x7FFF
            elif k < 12:
                e |= 0x7FFF
            elif k == 12:
                e |= 0
            else:
                e |= 0x3FFF + 63 - (bits >> 40 & 3)
            (<uint64_t*>(x + 40 + 16 * n))[0] = e & 0xFFFF
        for n in range(32):
            (<uint64_t*>(x + 160 + 8 * n))[0] = self._float(r)
        if self.xs_size >= 832:
            for n in range(32):
                (<uint64_t*>(x + 576 + 8 * n))[0] = self._float(r)
        n = <int>self.xs_512
        while n + 8 <= <int>self.xs_size:
            (<uint64_t*>(x + n))[0] = self._float(r) if n >= <int>self.xs_512 + 64 else (
                rng_next(r) if n & 8 else ~<uint64_t>0 >> (rng_next(r) & 63))
            n += 8
        if s.vsib:
            self._indices(s, r, x)
        memset(x + 512, 0, 64)
        (<uint64_t*>(x + 512))[0] = self.xcr0 if rng_below(r, 10) else rng_next(r) & self.xcr0

    cdef void _indices(self, Seq* s, Rng* r, uint8_t* x) noexcept nogil:
        cdef int n, k
        cdef uint64_t kind = rng_below(r, 8)
        cdef int64_t a
        for n in range(16):
            if not s.vsib >> n & 1:
                continue
            for k in range(4):
                a = <int64_t>rng_below(r, 512) - 256
                if kind == 0:
                    a = <int64_t>rng_next(r) >> 50
                if kind & 1:
                    a = (a & <int64_t>0xFFFFFFFFULL) | (<int64_t>rng_below(r, 512) - 256) * <int64_t>0x100000000ULL
                (<int64_t*>(x + (160 if k < 2 else 576) + 16 * n + 8 * (k & 1)))[0] = a

    # -- batches ------------------------------------------------------------------------------------------------------

    def batch(self, uint64_t seed, int sequences=BATCH, int states=4):
        """Make sequences from the seed, run each with some states; return the indices of what differs.

        What a seed gives depends on the configuration alone.
        """
        if sequences > BATCH:
            raise ValueError(f"at most {BATCH} sequences")
        cdef Rng r
        r.s = seed * <uint64_t>0xD1342543DE82EF95ULL + 1
        self.n_found = 0
        with nogil:
            self._batch(&r, sequences, states)
        return self.n_found

    cdef void _clear(self) noexcept nogil:
        """HLT wherever a random word may lead 16-bit code, but for its common end."""
        cdef uint64_t at, n
        cdef uint8_t* p
        for n in range(FUZZ_END16):
            at = self.cs_base + n
            p = self._guest_at(at)
            if p != NULL:
                p[0] = (<uint8_t*>at)[0] = 0xF4

    cdef int _layout(self, Rng* r, int sequences) noexcept nogil:
        """Make sequences; return how many there was room for."""
        cdef uint64_t at, end
        cdef uint32_t page_ends = 12 if self.bits != 16 else 48
        cdef int n
        if self.bits == 16:
            self._clear()
            at = self.cs_base + rng_below(r, 2) * 4096
        else:
            at = FUZZ_CODE + rng_below(r, 128) * 4096
        for n in range(sequences):
            at += rng_below(r, 24)
            if rng_below(r, page_ends) == 0:
                # at the end of a page; every fourth is followed by one that is absent
                end = at
                at = (at | 0xFFF) - rng_below(r, 20)
                if at < end:
                    at = end
            while self._guest_at(at) == NULL:
                at = (at | 0xFFF) + 1
            if self.bits == 16 and at - self.cs_base > FUZZ_END16 - MAX_SEQ_BYTES - 16:
                return n
            make_seq(&self.seqs[n], &self.settings, r, at)
            self._place(&self.seqs[n])
            at += self.seqs[n].length + 10
        return sequences

    cdef void _batch(self, Rng* r, int sequences, int states) noexcept nogil:
        cdef int n, k
        cdef uint32_t what, ran, j
        cdef Seq* s
        cdef State start, native, guest
        cdef uint32_t* c
        cache_reset(<Cache*>self.v.cache)
        for n in range(self._layout(r, sequences)):
            s = &self.seqs[n]
            for k in range(states):
                self.progress[0] = n * 256 + k
                self._start(s, r, &start)
                what = self._both(s, &start, &native, &guest)
                self._restore()
                self.runs += 1
                ran = s.straight
                if native.vector != NONE:
                    self.faults += 1
                    self.vectors[native.vector & 31] += 1
                    ran = 0
                    while ran < s.n and s.at + s.off[ran] - self.cs_base < native.rip:
                        ran += 1
                    ran += 1
                    if ran > s.straight:
                        ran = s.straight
                self.ran += ran
                for j in range(ran):
                    c = &self.cover[((s.insn[j].enc * 8 + (s.insn[j].map & 7)) * 256 + s.insn[j].opcode) * 8
                                    + (s.insn[j].reg & 7)]
                    c[0] += 1
                if what and self.n_found < KEPT:
                    self.found[self.n_found].seq = n
                    self.found[self.n_found].state = k
                    self.found[self.n_found].what = what
                    self.found[self.n_found].start = start
                    self.found[self.n_found].native = native
                    self.found[self.n_found].guest = guest
                    self.n_found += 1

    def forget(self):
        """Begin to count anew."""
        self.ran = self.runs = self.faults = 0
        memset(self.vectors, 0, sizeof(self.vectors))
        memset(self.cover, 0, sizeof(self.cover))

    def counts(self):
        """(instructions, runs, exceptions) so far."""
        return self.ran, self.runs, self.faults

    def vector_counts(self):
        return {n: self.vectors[n] for n in range(33) if self.vectors[n]}

    def coverage(self):
        """Times that each encoding ran: (encoding, map, opcode, ModRM.reg) to count."""
        found = {}
        cdef uint32_t n
        for n in range(3 * 8 * 256 * 8):
            if self.cover[n]:
                found[(n >> 14, n >> 11 & 7, n >> 3 & 255, n & 7)] = self.cover[n]
        return found

    # -- what was found -----------------------------------------------------------------------------------------------

    def sequence(self, int n):
        """(address, code, offsets of its instructions, pinned registers) of a batch's sequence."""
        cdef Seq* s = &self.seqs[n]
        return s.at, s.code[:s.length], [s.off[k] for k in range(s.n)], s.pinned

    def differences(self):
        """What the last batch found: (sequence, state, what differs, start, native, guest)."""
        return [(self.found[k].seq, self.found[k].state, self.found[k].what, _state(&self.found[k].start),
                 _state(&self.found[k].native), _state(&self.found[k].guest)) for k in range(self.n_found)]

    def replay(self, uint64_t seed, int sequence, int state, int sequences=BATCH, int states=4):
        """Make a batch's state again; return the start's extended state. The sequence stands where it stood."""
        cdef Rng r
        cdef State start
        cdef int n, k
        r.s = seed * <uint64_t>0xD1342543DE82EF95ULL + 1
        cache_reset(<Cache*>self.v.cache)
        self._layout(&r, sequences)
        for n in range(sequence + 1):
            for k in range(states if n < sequence else state + 1):
                self._start(&self.seqs[n], &r, &start)
        return PyBytes_FromStringAndSize(<char*>FZ_XS_IN, self.xs_size)

    def run_one(self, uint64_t at, bytes code, start, bytes xsave, env=(), und=(), int times=1):
        """Run code on both sides from a start (as `differences` gives it) and return what differs, both results, both
        extended states, and the memory of both where it differs: (address, native, guest)."""
        cdef Seq* s = &self.seqs[0]
        cdef State a, b, first
        cdef uint32_t what = 0
        cdef int n, length, k
        cdef uint64_t p
        if len(code) > MAX_SEQ_BYTES or len(xsave) > XS_MAX:
            raise ValueError("too long")
        s.at = at
        s.length = len(code)
        memcpy(s.code, <const char*>code, s.length)
        s.n = 0
        s.n_env = 0
        for where, kind in env:
            s.env[s.n_env].at = where
            s.env[s.n_env].kind = kind
            s.n_env += 1
        k = 0
        while k < <int>s.length and s.n < MAX_SEQ:
            length = decode(&s.code[k], <int>s.length - k, self.bits, &s.insn[s.n])
            if length <= 0:
                break
            s.off[s.n] = k
            s.und[s.n] = 0
            s.n += 1
            k += length
        s.und[s.n] = 0
        s.straight = s.n
        for n, flags in enumerate(und):
            if n <= <int>s.n:
                s.und[n] = flags
        _unpack(start, &first)
        cache_reset(<Cache*>self.v.cache)
        self._place(s)
        memset(<void*>FZ_XS_IN, 0, XS_MAX)
        memcpy(<void*>FZ_XS_IN, <const char*>xsave, len(xsave))
        self._restore()
        memory = []
        for n in range(times):
            what = self._both(s, &first, &a, &b)
            if n == times - 1 or what:
                break
            self._restore()
        native_xs = PyBytes_FromStringAndSize(<char*>FZ_XS_OUT, self.xs_size)
        guest_xs = PyBytes_FromStringAndSize(<char*>self.area, self.xs_size)
        if what & D_MEMORY:
            for n in range(16):
                if self.data_page[n] == NULL or not memcmp(<void*>(FUZZ_DATA + n * 4096), self.data_page[n], 4096):
                    continue
                for k in range(0, 4096, 8):
                    p = FUZZ_DATA + n * 4096 + k
                    if memcmp(<void*>p, self.data_page[n] + k, 8):
                        memory.append((p, PyBytes_FromStringAndSize(<char*>p, 8),
                                       PyBytes_FromStringAndSize(<char*>self.data_page[n] + k, 8)))
        self._restore()
        return what, _state(&a), _state(&b), native_xs, guest_xs, memory

    def undefined_of(self, int n):
        cdef Seq* s = &self.seqs[n]
        return [s.und[k] for k in range(s.n + 1)]

    def env_of(self, int n):
        cdef Seq* s = &self.seqs[n]
        return [(s.env[k].at, s.env[k].kind) for k in range(s.n_env)]


_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")


cdef object _state(State* s):
    found = {name: s.gpr[n] for n, name in enumerate(_NAMES)}
    found.update(rflags=s.flags, rip=s.rip, vector=s.vector, error=s.error, cr2=s.cr2, fs_base=s.fs_base,
                 gs_base=s.gs_base)
    for n, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs")):
        found[name] = s.sel[n]
    return found


cdef void _unpack(object given, State* s):
    for n, name in enumerate(_NAMES):
        s.gpr[n] = given[name]
    s.flags = given["rflags"]
    s.rip = given["rip"]
    s.fs_base = given["fs_base"]
    s.gs_base = given["gs_base"]
    for n, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs")):
        s.sel[n] = given[name]
