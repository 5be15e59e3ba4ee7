# cython: language_level=3
"""A bare Vcpu for tests: guest memory, an EPT over it, and the MMU and microcode one call at a time.

No translator and no run loop: what tests/cpu/test_mmu.py and test_microcode.py find is in mmu and microcode.
"""

import time

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from pyhyve.cpu.bt.decode cimport Insn, decode
from pyhyve.cpu.bt.microcode cimport deliver_exception, deliver_interrupt, microcode
from pyhyve.cpu.bt.mmu cimport *
from pyhyve.cpu.bt.state cimport *

cdef extern from "stdlib.h":
    int posix_memalign(void** out, size_t align, size_t size)

cdef extern from *:
    """
    /* Around a run: the guest's vector state lives in the host's registers, Python wants its own back. */
    static inline void probe_save(void *at) { __asm__ __volatile__("fxsave64 (%0)" : : "r"(at) : "memory"); }
    static inline void probe_restore(void *at) { __asm__ __volatile__("fxrstor64 (%0)" : : "r"(at) : "memory"); }
    """
    void probe_save(void* at) noexcept nogil
    void probe_restore(void* at) noexcept nogil

OK = R_OK
FAULT = R_FAULT
EXIT = R_EXIT
SLOW = R_SLOW
READ = ACCESS_READ
WRITE = ACCESS_WRITE
FETCH = ACCESS_FETCH
KERNEL = BANK_KERNEL
USER = BANK_USER
KERNEL_AC = BANK_KERNEL_AC
GLOBAL = MMU_GLOBAL
WRITABLE = MMU_WRITABLE

GPRS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")


cdef class Probe:
    """One vCPU in a zeroed state with `size` bytes of RAM at guest-physical 0, mapped in the EPT by pages of
    `ept_page` bytes (4096, 2 MiB or 1 GiB), or not at all with 0."""

    cdef Vcpu* v
    cdef uint8_t* ram
    cdef uint64_t size
    cdef uint64_t tables                # EPT pages are taken from here
    cdef uint64_t tables_end
    cdef void* area
    cdef uint64_t area_size
    cdef dict fields
    cdef CpuidEntry cpuid_table[64]

    def __cinit__(self, size=16 << 20, ept_page=4096, ept_ad=True):
        cdef void* at = NULL
        cdef uint64_t gpa
        if posix_memalign(&at, 4096, (sizeof(Vcpu) + 4095) & ~4095):
            raise MemoryError
        memset(at, 0, sizeof(Vcpu))
        self.v = <Vcpu*>at
        mmu_init(self.v)
        self.area_size = <uint64_t>size + (4 << 20)
        self.area = mmap(NULL, self.area_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if self.area == MAP_FAILED:
            self.area = NULL
            raise MemoryError
        self.tables = (<uint64_t>self.area + (2 << 20) - 1) & ~<uint64_t>((2 << 20) - 1)
        self.ram = <uint8_t*>(self.tables + (2 << 20))
        self.tables_end = <uint64_t>self.ram
        self.size = size
        self.v.eptp = self._table() | 0x1E | (0x40 if ept_ad else 0)
        self.v.maxphyaddr = 46
        self.fields = {}
        self._name_fields()
        if ept_page:
            for gpa in range(0, size, ept_page):
                self.ept_map(gpa, gpa, 7, ept_page)

    def __dealloc__(self):
        if self.v != NULL:
            free(self.v)
        if self.area != NULL:
            munmap(self.area, self.area_size)

    cdef uint64_t _table(self) except 0:
        cdef uint64_t t = self.tables
        if t + 4096 > self.tables_end:
            raise MemoryError("EPT pages")
        self.tables = t + 4096
        return t

    def _field(self, name, uint64_t at, size):
        self.fields[name] = (at - <uint64_t>self.v, size)

    def _name_fields(self):
        cdef Vcpu* v = self.v
        cdef int k
        for k, name in enumerate(GPRS):
            self._field(name, <uint64_t>&v.gpr[k], 8)
        for k, name in enumerate(SEGMENTS):
            self._field(name, <uint64_t>&v.seg[k].selector, 4)
            self._field(name + ".base", <uint64_t>&v.seg[k].base, 8)
            self._field(name + ".limit", <uint64_t>&v.seg[k].limit, 4)
            self._field(name + ".attr", <uint64_t>&v.seg[k].attr, 4)
        for k in range(8):
            self._field(f"dr{k}", <uint64_t>&v.dr[k], 8)
        for name, place in (
            ("rip", <uint64_t>&v.rip), ("cr0", <uint64_t>&v.cr0), ("cr2", <uint64_t>&v.cr2),
            ("cr3", <uint64_t>&v.cr3), ("cr4", <uint64_t>&v.cr4), ("cr8", <uint64_t>&v.cr8),
            ("efer", <uint64_t>&v.efer), ("xcr0", <uint64_t>&v.xcr0), ("star", <uint64_t>&v.star),
            ("lstar", <uint64_t>&v.lstar), ("cstar", <uint64_t>&v.cstar), ("sfmask", <uint64_t>&v.sfmask),
            ("kernel_gs_base", <uint64_t>&v.kernel_gs_base), ("sysenter_cs", <uint64_t>&v.sysenter_cs),
            ("sysenter_esp", <uint64_t>&v.sysenter_esp), ("sysenter_eip", <uint64_t>&v.sysenter_eip),
            ("tsc_aux", <uint64_t>&v.tsc_aux), ("pat", <uint64_t>&v.pat), ("tsc_offset", <uint64_t>&v.tsc_offset),
            ("gdtr.base", <uint64_t>&v.gdtr.base), ("idtr.base", <uint64_t>&v.idtr.base), ("poll", <uint64_t>&v.poll),
            ("fault_error", <uint64_t>&v.fault_error), ("fault_addr", <uint64_t>&v.fault_addr),
            ("eptp", <uint64_t>&v.eptp), ("page_walks", <uint64_t>&v.n.page_walks),
        ):
            self._field(name, place, 8)
        for name, place in (
            ("gdtr.limit", <uint64_t>&v.gdtr.limit), ("idtr.limit", <uint64_t>&v.idtr.limit),
            ("maxphyaddr", <uint64_t>&v.maxphyaddr), ("fault_vector", <uint64_t>&v.fault_vector),
            ("fault_has_error", <uint64_t>&v.fault_has_error),
        ):
            self._field(name, place, 4)
        for name, place in (
            ("cpl", <uint64_t>&v.cpl), ("shadow", <uint64_t>&v.shadow), ("nmi_blocked", <uint64_t>&v.nmi_blocked),
            ("bank", <uint64_t>&v.bank),
        ):
            self._field(name, place, 1)

    def get(self, name):
        cdef uint64_t value = 0
        if name == "rflags":
            return get_rflags(self.v)
        at, size = self.fields[name]
        memcpy(&value, <uint8_t*>self.v + <uint64_t>at, <uint64_t>size)
        return value

    def set(self, **values):
        """Registers by name, a segment's parts with a double underscore: cs__base=0."""
        cdef uint64_t value
        for name, given in values.items():
            value = given & 0xFFFFFFFFFFFFFFFF
            if name == "rflags":
                set_rflags(self.v, value)
                update_bank(self.v)
                continue
            at, size = self.fields[name.replace("__", ".")]
            memcpy(<uint8_t*>self.v + <uint64_t>at, &value, <uint64_t>size)
            if name == "cpl":
                update_bank(self.v)

    def state(self):
        """Every register and segment, for comparing before and after."""
        return {name: self.get(name) for name in (*self.fields, "rflags") if not name.startswith(("fault", "page_"))}

    def set_cpuid(self, entries):
        cdef uint32_t k
        for k, entry in enumerate(entries):
            leaf, sub, a, b, c, d = entry
            self.cpuid_table[k] = CpuidEntry(leaf, 0xFFFFFFFF if sub is None else sub, a, b, c, d)
            if self.cpuid_table[k].leaf == 7:
                self.v.la57 = self.cpuid_table[k].ecx >> 16 & 1
            if self.cpuid_table[k].leaf == 0:
                self.v.amd = self.cpuid_table[k].ebx == 0x68747541U      # Auth
        self.v.cpuid = self.cpuid_table
        self.v.n_cpuid = len(entries)

    # guest memory, by guest-physical address (RAM only)

    def poke(self, uint64_t gpa, bytes data):
        if gpa + len(data) > self.size:
            raise ValueError(hex(gpa))
        memcpy(self.ram + gpa, <const uint8_t*>data, len(data))

    def peek(self, uint64_t gpa, uint64_t size):
        if gpa + size > self.size:
            raise ValueError(hex(gpa))
        return PyBytes_FromStringAndSize(<char*>(self.ram + gpa), size)

    # the EPT

    def ept_map(self, uint64_t gpa, uint64_t offset, uint64_t bits, page=4096):
        """Map the page at `gpa` to RAM's `offset` (a frame number is a host address) with permission bits 0-2."""
        cdef uint64_t* t = <uint64_t*>(self.v.eptp & 0xFFFFFFFFF000ULL)
        cdef uint64_t* e
        cdef int level = 3
        cdef int last = {4096: 0, 2 << 20: 1, 1 << 30: 2}[page]
        while True:
            e = &t[(gpa >> (12 + 9 * level)) & 511]
            if level == last:
                e[0] = ((<uint64_t>self.ram + offset) | bits | (0x80 if last else 0)) if bits else 0
                return
            if not e[0] & 7 or e[0] & 0x80:
                e[0] = self._table() | 7
            t = <uint64_t*>(e[0] & 0xFFFFFFFFF000ULL)
            level -= 1

    def ept_raw(self, uint64_t gpa, value=None):
        """The leaf entry of `gpa`, less the frame number; with a value, replace its low 12 bits."""
        cdef uint64_t* t = <uint64_t*>(self.v.eptp & 0xFFFFFFFFF000ULL)
        cdef uint64_t* e
        cdef int level = 3
        while True:
            e = &t[(gpa >> (12 + 9 * level)) & 511]
            if level == 0 or e[0] & 0x80 or not e[0] & 7:
                if value is not None:
                    e[0] = (e[0] & ~<uint64_t>0xFFF) | <uint64_t>value
                return e[0] & 0xFFF
            t = <uint64_t*>(e[0] & 0xFFFFFFFFF000ULL)
            level -= 1

    # the MMU

    def translate(self, uint64_t lin, int access=0, int bank=0):
        """(result, offset in RAM, info, gpa)"""
        cdef uint64_t hva, info, gpa
        r = mmu_translate(self.v, lin, access, bank, &hva, &info, &gpa)
        return r, hva - <uint64_t>self.ram if r == R_OK else None, info, gpa

    def fill(self, uint64_t lin, int access=0, int bank=0):
        return mmu_fill(self.v, lin, access, bank)

    def tlb(self, uint64_t lin, int bank=0):
        """(read hits, write hits) of the bank's TLB for the page."""
        return (mmu_hit(self.v, lin, 1, bank, ACCESS_READ) != NULL, mmu_hit(self.v, lin, 1, bank, ACCESS_WRITE) != NULL)

    def fetch(self, uint64_t lin, int bank=0):
        cdef uint64_t page, info
        r = mmu_fetch(self.v, lin, bank, &page, &info)
        return r, page - <uint64_t>self.ram if r == R_OK else None

    def fetch_cached(self, uint64_t lin):
        return self.v.fetch[(lin >> 12) & (FETCH_ENTRIES - 1)].lin == (lin & ~<uint64_t>0xFFF) | 1

    def read(self, uint64_t lin, uint64_t size, int bank=0):
        buffer = PyBytes_FromStringAndSize(NULL, size)
        r = mmu_read(self.v, lin, PyBytes_AS_STRING(buffer), size, bank)
        return r, buffer if r == R_OK else None

    def write(self, uint64_t lin, bytes data, int bank=0):
        return mmu_write(self.v, lin, <const uint8_t*>data, len(data), bank)

    def flush_all(self):
        mmu_flush_all(self.v)

    def flush_nonglobal(self):
        mmu_flush_nonglobal(self.v)

    def flush_page(self, uint64_t lin):
        mmu_flush_page(self.v, lin)

    def flush_ept(self):
        mmu_flush_ept(self.v)

    # microcode

    def run(self, *codes):
        """Run instructions (bytes each) one after another with the vector state live; the last result."""
        cdef Insn insn[16]
        cdef uint8_t keep[512 + 64]
        cdef void* saved = <void*>((<uint64_t>keep + 63) & ~<uint64_t>63)
        cdef int mode = 16
        cdef int n = len(codes)
        cdef int k
        cdef int r = R_OK
        if self.v.efer & 0x400 and self.v.seg[SEG_CS].attr & 0x2000:
            mode = 64
        elif self.v.seg[SEG_CS].attr & 0x4000:
            mode = 32
        for k in range(n):
            code = codes[k]
            if decode(<const uint8_t*>code, len(code), mode, &insn[k]) != len(code):
                raise ValueError(f"{code.hex()} is not one instruction")
        with nogil:
            probe_save(saved)
            for k in range(n):
                r = microcode(self.v, &insn[k])
                if r != R_OK:
                    break
            probe_restore(saved)
        return r

    def deliver_exception(self, vector=None, error=None, addr=0):
        if vector is not None:
            self.v.fault_vector = vector
            self.v.fault_has_error = error is not None
            self.v.fault_error = error or 0
            self.v.fault_addr = addr
        return deliver_exception(self.v)

    def deliver_interrupt(self, vector, software=False, error=None):
        return deliver_interrupt(self.v, vector, software, error is not None, error or 0)

    def fault(self):
        """(vector, error code or None)"""
        return self.v.fault_vector, self.v.fault_error if self.v.fault_has_error else None

    def exit(self):
        return self.v.exit

    def counters(self):
        return self.v.n

    # timing (bench/, and by hand)

    def time_flush(self, uint64_t lin, int pages, int rounds):
        """Whole nanoseconds for one flush of `pages` local entries (filling is not counted)."""
        cdef int k, n
        cdef uint64_t start, end, total = 0
        for k in range(rounds):
            for n in range(pages):
                mmu_fill(self.v, lin + n * 4096, ACCESS_READ, BANK_USER)
            start = time.perf_counter_ns()
            mmu_flush_nonglobal(self.v)
            end = time.perf_counter_ns()
            total += end - start
        return total // <uint64_t>rounds

    def time_fill(self, uint64_t lin, int rounds):
        cdef int k
        cdef uint64_t end, start = time.perf_counter_ns()
        for k in range(rounds):
            mmu_fill(self.v, lin, ACCESS_READ, BANK_USER)
        end = time.perf_counter_ns()
        return (end - start) // <uint64_t>rounds

    def time_run(self, *codes, int rounds=100000, exception=None):
        """Whole nanoseconds for the sequence, registers put back after each; with `exception`, a #PF comes first."""
        cdef Insn insn[8]
        cdef uint64_t gpr[16]
        cdef uint64_t rip = self.v.rip
        cdef uint64_t flags = get_rflags(self.v)
        cdef int n = len(codes)
        cdef int k, j, r
        cdef bint fault = exception is not None
        cdef uint64_t start, end
        memcpy(gpr, self.v.gpr, sizeof(gpr))
        for j in range(n):
            code = codes[j]
            decode(<const uint8_t*>code, len(code), 64, &insn[j])
        start = time.perf_counter_ns()
        for k in range(rounds):
            if fault:
                self.v.fault_vector = 14
                self.v.fault_has_error = 1
                self.v.fault_error = 0
                if deliver_exception(self.v) != R_OK:
                    raise RuntimeError(self.fault())
                self.v.gpr[RSP] += 8
            for j in range(n):
                r = microcode(self.v, &insn[j])
                if r != R_OK:
                    raise RuntimeError((j, r, self.fault()))
            memcpy(self.v.gpr, gpr, sizeof(gpr))
            self.v.rip = rip
            set_rflags(self.v, flags)
        end = time.perf_counter_ns()
        return (end - start) // <uint64_t>rounds
