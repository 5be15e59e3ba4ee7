# cython: language_level=3
"""Control, debug and model-specific registers, CPUID, time, ports, and the other instructions that only a system uses.

Sources: Intel SDM vol 3, "Control Registers", "Debug Registers", "Extended Feature Enable Register", "I/O Permission
Bit Map" (vol 1); vol 2 for the instructions; vol 4 for the MSRs.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.debug cimport DR6_BD, DR7_GD, debug_update, note_port
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.microcode_ops cimport *
from pyhyve.cpu.bt.microcode_vme cimport vme_cli_sti
from pyhyve.cpu.bt.microcode_xsave cimport HOST_STATE, PKRU_STATE, init_components, pkru
from pyhyve.cpu.bt.mmu cimport (mmu_flush_all, mmu_flush_nonglobal, mmu_flush_page, mmu_load_cr3, mmu_read, read_u16)
from pyhyve.cpu.bt.state cimport *

cdef extern from *:
    """
    static inline uint64_t bt_rdtsc(void) {
        uint32_t lo, hi;
        __asm__ __volatile__("rdtsc" : "=a"(lo), "=d"(hi));
        return (uint64_t)hi << 32 | lo;
    }
    static inline uint64_t bt_xgetbv(uint32_t index) {
        uint32_t lo, hi;
        __asm__ __volatile__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(index));
        return (uint64_t)hi << 32 | lo;
    }
    """
    uint64_t bt_rdtsc() noexcept nogil
    uint64_t bt_xgetbv(uint32_t index) noexcept nogil

cdef enum:
    MSR_TSC = 0x10
    MSR_SYSENTER_CS = 0x174
    MSR_SYSENTER_ESP = 0x175
    MSR_SYSENTER_EIP = 0x176
    MSR_PAT = 0x277

    CPUID_SLOTS = 32         # a cache of table indices behind the MMU's housekeeping, in ept_cache_val
    CPUID_CACHE = 224

    MSR_XSS = 0xDA0


cdef inline int need_cpl0(Vcpu* v) noexcept nogil:
    return gp0(v) if v.cpl else R_OK


# ---------------------------------------------------------------------------------------------------------------------
# Control registers

cdef bint cpuid_has(Vcpu* v, uint32_t leaf, int reg, int bit) noexcept nogil:
    """A feature that the guest's CPUID reports; without a table, everything is there."""
    cdef CpuidEntry* e
    if v.n_cpuid == 0:
        return True
    e = cpuid_find(v, leaf, 0)
    if e == NULL:
        return False
    return ((e.ecx if reg == RCX else (e.ebx if reg == RBX else (e.edx if reg == RDX else e.eax))) >> bit) & 1


cdef int write_cr0(Vcpu* v, uint64_t value) noexcept nogil:
    cdef uint64_t old = v.cr0
    cdef uint64_t changed
    cdef bint paging = (value >> 31) & 1
    if value >> 32 or (paging and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD):
        return gp0(v)
    value = (value & 0xE005003FULL) | CR0_ET
    changed = value ^ old
    if changed >> 31:
        if paging:
            if v.efer & EFER_LME:
                if not v.cr4 & CR4_PAE or v.seg[SEG_CS].attr & ATTR_L:
                    return gp0(v)
                v.efer |= EFER_LMA
        else:
            if is64(v) or v.cr4 & CR4_PCIDE:
                return gp0(v)
            v.efer &= ~<uint64_t>EFER_LMA
    v.cr0 = value
    if changed & CR0_PE:
        v.cpl = 0
        update_bank(v)
    if changed & (0x80000000ULL | CR0_WP | CR0_PE):
        mmu_flush_all(v)
    return R_OK


cdef uint64_t cr4_allowed(Vcpu* v) noexcept nogil:
    cdef uint64_t mask = 0x7FF                    # VME to OSXMMEXCPT
    if cpuid_has(v, 7, RCX, 2):
        mask |= CR4_UMIP
    if cpuid_has(v, 7, RCX, 16):
        mask |= CR4_LA57
    if cpuid_has(v, 7, RBX, 0):
        mask |= CR4_FSGSBASE
    if cpuid_has(v, 1, RCX, 17):
        mask |= CR4_PCIDE
    if cpuid_has(v, 1, RCX, 26):
        mask |= CR4_OSXSAVE
    if cpuid_has(v, 7, RBX, 7):
        mask |= CR4_SMEP
    if cpuid_has(v, 7, RBX, 20):
        mask |= CR4_SMAP
    if cpuid_has(v, 7, RCX, 3):
        mask |= CR4_PKE
    return mask


cdef int write_cr4(Vcpu* v, uint64_t value) noexcept nogil:
    cdef uint64_t changed = value ^ v.cr4
    if value & ~cr4_allowed(v):
        return gp0(v)
    if v.efer & EFER_LMA and (not value & CR4_PAE or changed & CR4_LA57):
        return gp0(v)
    if changed & value & CR4_PCIDE and (not v.efer & EFER_LMA or v.cr3 & 0xFFF):
        return gp0(v)
    v.cr4 = value
    if changed & CR4_DE:
        debug_update(v)
    if changed & (CR4_PSE | CR4_PAE | CR4_PGE | CR4_LA57 | CR4_PCIDE | CR4_SMEP | CR4_SMAP | CR4_PKE):
        mmu_flush_all(v)
    return R_OK


cdef int write_cr3(Vcpu* v, uint64_t value) noexcept nogil:
    cdef uint64_t width = v.maxphyaddr if v.maxphyaddr else 52
    cdef uint64_t check = value
    if v.cr4 & CR4_PCIDE:
        check &= ~(<uint64_t>1 << 63)
    if v.efer & EFER_LMA and check >> width:
        return gp0(v)
    mmu_load_cr3(v, value)
    return R_OK


cdef int write_cr8(Vcpu* v, Insn* i, uint64_t value) noexcept nogil:
    """The task priority is the local APIC's: the monitor carries a change out."""
    if value >> 4:
        return gp0(v)
    if v.cr8 == value:
        return advance(v, i)
    v.exit.reason = X_CR_ACCESS
    v.exit.length = i.length
    v.exit.qualification = 8 | (<uint64_t>i.rm << 8)
    return R_EXIT


cdef int mov_cr(Vcpu* v, Insn* i) noexcept nogil:
    """0F 20, 0F 22."""
    cdef uint32_t size = 8 if is64(v) else 4
    cdef int cr = i.reg
    cdef uint64_t value
    cdef int r
    # LOCK before MOV CR0 names CR8 on other vendors' processors only; CR1, CR5-7 and CR9-15 do not exist.
    if cr != 0 and cr != 2 and cr != 3 and cr != 4 and cr != 8:
        return undefined(v)
    if v.cpl:
        return gp0(v)
    if i.opcode == 0x20:
        value = v.cr0 if cr == 0 else (v.cr2 if cr == 2 else (v.cr3 if cr == 3 else (v.cr4 if cr == 4 else v.cr8)))
        write_reg(v, i.rm, value, size)
        return advance(v, i)
    value = v.gpr[i.rm] & size_mask(size)
    if cr == 8:
        return write_cr8(v, i, value)
    if cr == 0:
        r = write_cr0(v, value)
    elif cr == 3:
        r = write_cr3(v, value)
    elif cr == 4:
        r = write_cr4(v, value)
    else:
        v.cr2 = value
        r = R_OK
    return r if r != R_OK else advance(v, i)


cdef int clts(Vcpu* v, Insn* i) noexcept nogil:
    if v.cpl:
        return gp0(v)
    v.cr0 &= ~<uint64_t>CR0_TS
    return advance(v, i)


cdef int mov_dr(Vcpu* v, Insn* i) noexcept nogil:
    """0F 21, 0F 23."""
    cdef uint32_t size = 8 if is64(v) else 4
    cdef int dr = i.reg
    cdef uint64_t value
    if dr > 7 or (v.cr4 & CR4_DE and (dr == 4 or dr == 5)):
        return undefined(v)
    if v.cpl:
        return gp0(v)
    if v.dr[7] & DR7_GD:                          # a fault, before the access
        v.dr[6] = (v.dr[6] & ~<uint64_t>15) | DR6_BD
        v.fault_addr = F_RF
        return fault(v, DB)
    if dr == 4 or dr == 5:
        dr += 2
    if i.opcode == 0x21:
        write_reg(v, i.rm, v.dr[dr], size)
        return advance(v, i)
    value = v.gpr[i.rm] & size_mask(size)
    if dr >= 6 and value >> 32:
        return gp0(v)
    if dr == 6:
        value = (value & 0xE00F) | 0xFFFF0FF0ULL
    elif dr == 7:
        value = (value & 0xFFFF23FFULL) | 0x400
    v.dr[dr] = value
    if dr != 6:
        debug_update(v)
    return advance(v, i)


# ---------------------------------------------------------------------------------------------------------------------
# 0F 01

cdef int store_table(Vcpu* v, Insn* i, TableReg* t) noexcept nogil:
    cdef uint8_t image[10]
    cdef int r
    if v.cr4 & CR4_UMIP and v.cpl:
        return gp0(v)
    (<uint16_t*>image)[0] = <uint16_t>t.limit
    (<uint64_t*>(image + 2))[0] = t.base
    r = write_mem(v, i, 10 if is64(v) else 6, image)
    return r if r != R_OK else advance(v, i)


cdef int load_table(Vcpu* v, Insn* i, TableReg* t) noexcept nogil:
    cdef uint8_t image[10]
    cdef uint64_t base
    cdef int r
    if v.cpl:
        return gp0(v)
    (<uint64_t*>(image + 2))[0] = 0
    r = read_mem(v, i, 10 if is64(v) else 6, image)
    if r != R_OK:
        return r
    base = (<uint64_t*>(image + 2))[0]
    if is64(v):
        if not canonical_base(v, base):
            return gp0(v)
    else:
        base &= 0xFFFFFFFFULL if operand_size(v, i) == 4 else 0xFFFFFFULL
    t.base = base
    t.limit = (<uint16_t*>image)[0]
    return advance(v, i)


cdef int xgetbv(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint32_t index = <uint32_t>v.gpr[RCX]
    cdef uint64_t value
    cdef CpuidEntry* e
    if not v.cr4 & CR4_OSXSAVE:
        return undefined(v)
    if index == 0:
        value = v.xcr0
    else:
        e = cpuid_find(v, 0xD, 1)
        if index != 1 or e == NULL or not e.eax & 4:
            return gp0(v)
        # XINUSE: the guest's state is in the registers
        value = ((bt_xgetbv(1) & HOST_STATE) | (PKRU_STATE if v.pkru else 0)) & v.xcr0
    v.gpr[RAX] = value & 0xFFFFFFFFULL
    v.gpr[RDX] = value >> 32
    return advance(v, i)


cdef int xsetbv(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint64_t value = (v.gpr[RDX] << 32) | (v.gpr[RAX] & 0xFFFFFFFFULL)
    cdef uint64_t allowed = bt_xgetbv(0) & HOST_STATE
    cdef CpuidEntry* e = cpuid_find(v, 0xD, 0)
    if not v.cr4 & CR4_OSXSAVE:
        return undefined(v)
    if e != NULL:
        allowed = (allowed | PKRU_STATE) & e.eax
    if v.cpl or <uint32_t>v.gpr[RCX] or not value & 1 or value & ~allowed:
        return gp0(v)
    if value & 6 == 4 or (value & 0xE0 and value & 0xE6 != 0xE6):
        return gp0(v)                             # AVX needs SSE; AVX-512's three parts go together, and need AVX
    v.xcr0 = value
    if value & HOST_STATE & ~v.vector_state:
        # from now on this state is the guest's: it begins in its initial configuration
        init_components(v, value & HOST_STATE & ~v.vector_state)
        v.vector_state |= value & HOST_STATE
    return advance(v, i)


cdef int group7(Vcpu* v, Insn* i) noexcept nogil:
    """0F 01: descriptor tables, machine status word, INVLPG, and by register form a few more."""
    cdef int op = i.reg & 7
    cdef uint64_t value, lin
    cdef int r
    if i.mod == 3:
        if i.modrm == (0xD9 if v.amd else 0xC1):  # VMMCALL, VMCALL: each vendor has its own
            v.exit.reason = X_VMCALL
            v.exit.length = i.length
            v.exit.qualification = 0
            return R_EXIT
        if i.modrm == 0xCA or i.modrm == 0xCB:    # CLAC, STAC
            if v.cpl:
                return undefined(v)
            v.acflag = i.modrm & 1
            update_bank(v)
            return advance(v, i)
        if i.modrm == 0xD0:
            return xgetbv(v, i)
        if i.modrm == 0xD1:
            return xsetbv(v, i)
        if i.modrm == 0xF8:                       # SWAPGS
            if not is64(v):
                return undefined(v)
            if v.cpl:
                return gp0(v)
            value = v.seg[SEG_GS].base
            v.seg[SEG_GS].base = v.kernel_gs_base
            v.kernel_gs_base = value
            return advance(v, i)
        if i.modrm == 0xF9:                       # RDTSCP
            r = rdtsc(v, i)
            if r == R_OK:
                v.gpr[RCX] = v.tsc_aux & 0xFFFFFFFFULL
            return r
        if i.modrm == 0xEE or i.modrm == 0xEF:
            return pkru(v, i)
        if op != 4 and op != 6:
            return undefined(v)                   # MONITOR, MWAIT and others that are not offered
    if op == 0 or op == 1:
        return store_table(v, i, &v.gdtr if op == 0 else &v.idtr)
    if op == 2 or op == 3:
        return load_table(v, i, &v.gdtr if op == 2 else &v.idtr)
    if op == 4:                                   # SMSW
        if v.cr4 & CR4_UMIP and v.cpl:
            return gp0(v)
        r = write_rm(v, i, operand_size(v, i) if i.mod == 3 else 2, v.cr0)
        return r if r != R_OK else advance(v, i)
    if op == 6:                                   # LMSW: sets PE, never clears it
        if v.cpl:
            return gp0(v)
        value = 0
        r = read_rm(v, i, 2, &value)
        if r == R_OK:
            r = write_cr0(v, (v.cr0 & ~<uint64_t>14) | (value & 15))
        return r if r != R_OK else advance(v, i)
    if op == 7:                                   # INVLPG
        if v.cpl:
            return gp0(v)
        lin = effective(v, i)
        if is64(v):
            if i.seg >= SEG_FS:
                lin += v.seg[i.seg].base
        else:
            lin = (lin + v.seg[i.seg].base) & 0xFFFFFFFFULL
        mmu_flush_page(v, lin)
        return advance(v, i)
    return undefined(v)


cdef int invpcid(Vcpu* v, Insn* i) noexcept nogil:
    """66 0F 38 82. There is one address space at a time in the TLB, so all but one page's type drop what is local."""
    cdef uint64_t kind = v.gpr[i.reg] & size_mask(8 if is64(v) else 4)
    cdef uint64_t d[2]
    cdef int r
    if v.cpl:
        return gp0(v)
    d[0] = d[1] = 0
    r = read_mem(v, i, 16, d)
    if r != R_OK:
        return r
    if kind > 3 or d[0] >> 12:
        return gp0(v)
    if kind < 2 and d[0] and not v.cr4 & CR4_PCIDE:
        return gp0(v)
    if kind == 0:
        if v.efer & EFER_LMA and not canonical_base(v, d[1]):
            return gp0(v)
        mmu_flush_page(v, d[1])
    elif kind == 2:
        mmu_flush_all(v)
    else:
        mmu_flush_nonglobal(v)
    return advance(v, i)


# ---------------------------------------------------------------------------------------------------------------------
# Model-specific registers

cdef int write_efer(Vcpu* v, uint64_t value) noexcept nogil:
    cdef uint64_t old = v.efer
    if value & ~<uint64_t>(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE):
        return gp0(v)
    if (value ^ old) & EFER_LME and (v.cr0 >> 31) & 1:
        return gp0(v)
    v.efer = (value & ~<uint64_t>EFER_LMA) | (old & EFER_LMA)
    if (value ^ old) & EFER_NXE:
        mmu_flush_all(v)
    return R_OK


cdef bint pat_valid(uint64_t value) noexcept nogil:
    """Each byte is a memory type: UC WC WT WP WB UC-."""
    cdef int k
    cdef uint32_t t
    for k in range(8):
        t = <uint32_t>(value >> (k * 8)) & 0xFF
        if t > 7 or t == 2 or t == 3:
            return False
    return True


cdef inline uint64_t* msr_place(Vcpu* v, uint32_t msr) noexcept nogil:
    """Those that are plain registers of the Vcpu; NULL: not ours."""
    if msr >> 4 == 0xC000008:
        if msr == 0xC0000080U:
            return &v.efer
        if msr == 0xC0000081U:
            return &v.star
        if msr == 0xC0000082U:
            return &v.lstar
        if msr == 0xC0000083U:
            return &v.cstar
        if msr == 0xC0000084U:
            return &v.sfmask
    elif msr >> 4 == 0xC000010:
        if msr == 0xC0000100U:
            return &v.seg[SEG_FS].base
        if msr == 0xC0000101U:
            return &v.seg[SEG_GS].base
        if msr == 0xC0000102U:
            return &v.kernel_gs_base
        if msr == 0xC0000103U:
            return &v.tsc_aux
    elif msr == MSR_SYSENTER_CS:
        return &v.sysenter_cs
    elif msr == MSR_SYSENTER_ESP:
        return &v.sysenter_esp
    elif msr == MSR_SYSENTER_EIP:
        return &v.sysenter_eip
    elif msr == MSR_PAT:
        return &v.pat
    return NULL


cdef int msr_exit(Vcpu* v, Insn* i, uint32_t reason, uint32_t msr, uint64_t value) noexcept nogil:
    v.exit.reason = reason
    v.exit.length = i.length
    v.exit.qualification = 0
    v.exit.msr = msr
    v.exit.msr_value = value
    return R_EXIT


cdef int rdmsr(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint32_t msr = <uint32_t>v.gpr[RCX]
    cdef uint64_t* place
    cdef uint64_t value
    if v.cpl:
        return gp0(v)
    place = msr_place(v, msr)
    if place != NULL:
        value = place[0]
    elif msr == MSR_TSC:
        value = bt_rdtsc() + v.tsc_offset
    elif msr == MSR_XSS and v.features >> FT_XSAVES & 1:
        value = 0
    else:
        return msr_exit(v, i, X_RDMSR, msr, 0)
    v.gpr[RAX] = value & 0xFFFFFFFFULL
    v.gpr[RDX] = value >> 32
    return advance(v, i)


cdef int wrmsr(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint32_t msr = <uint32_t>v.gpr[RCX]
    cdef uint64_t value = (v.gpr[RDX] << 32) | (v.gpr[RAX] & 0xFFFFFFFFULL)
    cdef uint64_t* place
    if v.cpl:
        return gp0(v)
    place = msr_place(v, msr)
    if place == NULL:
        if msr == MSR_XSS and v.features >> FT_XSAVES & 1:
            return gp0(v) if value else advance(v, i)     # there are no supervisor components
        return msr_exit(v, i, X_WRMSR, msr, value)
    if place == &v.efer:
        if write_efer(v, value) != R_OK:
            return R_FAULT
        return advance(v, i)
    if (place == &v.lstar or place == &v.cstar or place == &v.seg[SEG_FS].base or place == &v.seg[SEG_GS].base
            or place == &v.kernel_gs_base or place == &v.sysenter_esp or place == &v.sysenter_eip):
        if not canonical_base(v, value):
            return gp0(v)
    elif place == &v.tsc_aux:
        if value >> 32:
            return gp0(v)
    elif place == &v.pat:
        if not pat_valid(value):
            return gp0(v)
    place[0] = value
    return advance(v, i)


cdef int fsgsbase(Vcpu* v, Insn* i) noexcept nogil:
    """F3 0F AE /0-3: RDFSBASE RDGSBASE WRFSBASE WRGSBASE."""
    cdef int op = i.reg & 7
    cdef int seg = SEG_GS if op & 1 else SEG_FS
    cdef uint32_t size = 8 if i.rex & 8 else 4
    cdef uint64_t value
    if not is64(v) or not v.cr4 & CR4_FSGSBASE or op > 3:
        return undefined(v)
    if op < 2:
        write_reg(v, i.rm, v.seg[seg].base, size)
        return advance(v, i)
    value = v.gpr[i.rm] & size_mask(size)
    if not canonical_base(v, value):
        return gp0(v)
    v.seg[seg].base = value
    return advance(v, i)


# ---------------------------------------------------------------------------------------------------------------------
# CPUID and time

cdef CpuidEntry* cpuid_find(Vcpu* v, uint32_t leaf, uint32_t subleaf) noexcept nogil:
    cdef uint64_t* slot = &v.ept_cache_val[CPUID_CACHE + ((leaf ^ (leaf >> 27) ^ (subleaf << 2)) & (CPUID_SLOTS - 1))]
    cdef CpuidEntry* e
    cdef uint32_t k
    if slot[0] and slot[0] <= v.n_cpuid:
        e = &v.cpuid[slot[0] - 1]
        if e.leaf == leaf and (e.subleaf == subleaf or e.subleaf == 0xFFFFFFFFU):
            return e
    for k in range(v.n_cpuid):
        e = &v.cpuid[k]
        if e.leaf == leaf and (e.subleaf == subleaf or e.subleaf == 0xFFFFFFFFU):
            slot[0] = k + 1
            return e
    return NULL


cdef uint32_t xsave_size(Vcpu* v, bint compact) noexcept nogil:
    """Bytes that the features enabled in XCR0 take, by the table's own subleaves of leaf 0DH."""
    cdef uint32_t size = 576
    cdef uint32_t k
    cdef CpuidEntry* e
    for k in range(2, 32):
        if not (v.xcr0 >> k) & 1:
            continue
        e = cpuid_find(v, 0xD, k)
        if e == NULL or e.subleaf != k:
            continue
        if compact:
            if e.ecx & 2:
                size = (size + 63) & ~<uint32_t>63
            size += e.eax
        elif e.ebx + e.eax > size:
            size = e.ebx + e.eax
    return size


cdef int cpuid(Vcpu* v, Insn* i) noexcept nogil:
    """What CR4 and XCR0 say is put in here; the rest is the monitor's table. Unknown leaves are zeros."""
    cdef uint32_t leaf = <uint32_t>v.gpr[RAX]
    cdef uint32_t subleaf = <uint32_t>v.gpr[RCX]
    cdef CpuidEntry* e = cpuid_find(v, leaf, subleaf)
    cdef uint32_t ebx, ecx
    if e == NULL:
        v.gpr[RAX] = 0
        v.gpr[RBX] = 0
        v.gpr[RCX] = 0
        v.gpr[RDX] = 0
        return advance(v, i)
    ebx = e.ebx
    ecx = e.ecx
    if leaf == 1:
        ecx &= ~<uint32_t>(1 << 27)
        if v.cr4 & CR4_OSXSAVE:
            ecx |= 1 << 27
    elif leaf == 7 and subleaf == 0:
        ecx &= ~<uint32_t>(1 << 4)
        if v.cr4 & CR4_PKE:
            ecx |= 1 << 4
    elif leaf == 0xD and subleaf <= 1 and ebx:
        ebx = xsave_size(v, subleaf == 1)
    v.gpr[RAX] = e.eax
    v.gpr[RBX] = ebx
    v.gpr[RCX] = ecx
    v.gpr[RDX] = e.edx
    return advance(v, i)


cdef int rdtsc(Vcpu* v, Insn* i) noexcept nogil:
    cdef uint64_t now
    if v.cr4 & CR4_TSD and v.cpl:
        return gp0(v)
    now = bt_rdtsc() + v.tsc_offset
    v.gpr[RAX] = now & 0xFFFFFFFFULL
    v.gpr[RDX] = now >> 32
    return advance(v, i)


# ---------------------------------------------------------------------------------------------------------------------
# Ports, HLT, CLI and STI

cdef int io_allowed(Vcpu* v, uint32_t port, uint32_t size) noexcept nogil:
    """Intel SDM vol 1, "I/O Permission Bit Map"."""
    cdef uint16_t word = 0
    cdef uint32_t at
    cdef int r
    if not v.cr0 & CR0_PE or (v.cpl <= iopl(v) and not v.sysflags & F_VM):
        return R_OK
    if v.seg[SEG_TR].attr & 8 == 0 or v.seg[SEG_TR].limit < 103:
        return gp0(v)
    r = read_u16(v, v.seg[SEG_TR].base + 102, BANK_KERNEL, &word)
    if r != R_OK:
        return r
    at = word + (port >> 3)
    if at + 1 > v.seg[SEG_TR].limit:
        return gp0(v)
    r = read_u16(v, v.seg[SEG_TR].base + at, BANK_KERNEL, &word)
    if r != R_OK:
        return r
    if (word >> (port & 7)) & ((1 << size) - 1):
        return gp0(v)
    return R_OK


cdef int in_out(Vcpu* v, Insn* i) noexcept nogil:
    """E4-E7, EC-EF."""
    cdef uint32_t port = <uint32_t>v.gpr[RDX] & 0xFFFF if i.opcode & 8 else <uint32_t>i.imm & 0xFF
    cdef uint32_t size = 1
    cdef int r
    if i.opcode & 1:
        size = operand_size(v, i)
        if size == 8:
            size = 4
    r = io_allowed(v, port, size)
    if r != R_OK:
        return r
    note_port(v, port, size)
    advance(v, i)
    v.exit.reason = X_IO
    v.exit.length = i.length
    v.exit.qualification = 0
    v.exit.io_port = port
    v.exit.io_size = size
    v.exit.io_in = 0 if i.opcode & 2 else 1
    v.exit.io_string = 0
    v.exit.io_value = v.gpr[RAX] & size_mask(size) if i.opcode & 2 else 0
    return R_EXIT


cdef int hlt(Vcpu* v, Insn* i) noexcept nogil:
    if v.cpl:
        return gp0(v)
    advance(v, i)
    v.exit.reason = X_HLT
    v.exit.length = i.length
    v.exit.qualification = 0
    return R_EXIT


cdef int cli_sti(Vcpu* v, Insn* i) noexcept nogil:
    if v.cr0 & CR0_PE and v.cpl > iopl(v):
        return vme_cli_sti(v, i)
    if i.opcode == 0xFB:
        if not v.iflag:
            v.shadow = SHADOW_STI
        v.iflag = 1
    else:
        v.iflag = 0
    return advance(v, i)
