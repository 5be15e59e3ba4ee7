# cython: language_level=3
"""String operations: whole pages at the host's speed, on host addresses.

A chunk is what lies in one page on each side; the host's own string instruction runs it with the guest's element size
and direction, so that overlaps and compare flags come out as the architecture says. An element that crosses a page
goes by itself. Registers are written back after each chunk, so a fault or an interrupt in between restarts exactly
there. Source: Intel SDM vol 2, "REP/REPE/REPZ/REPNE/REPNZ—Repeat String Operation Prefix".
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.codecache cimport code_written
from pyhyve.cpu.bt.debug cimport note_data, note_port, page_watched
from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.microcode_ops cimport *
from pyhyve.cpu.bt.microcode_system cimport io_allowed
from pyhyve.cpu.bt.mmu cimport MMU_CODE, bt_copy, mmu_page, mmu_probe_read, mmu_probe_write, mmu_read, mmu_write
from pyhyve.cpu.bt.state cimport *

cdef extern from *:
    """
    #define BT_STRING(insn, suffix) \\
        if (down) __asm__ __volatile__("std\\n\\t" insn suffix "\\n\\tcld" \\
                                       : "+D"(to), "+S"(from), "+c"(n) : "a"(acc) : "memory", "cc"); \\
        else __asm__ __volatile__(insn suffix : "+D"(to), "+S"(from), "+c"(n) : "a"(acc) : "memory", "cc")
    #define BT_STRING_SIZES(insn) \\
        switch (size) { \\
        case 1: BT_STRING(insn, "b"); break; \\
        case 2: BT_STRING(insn, "w"); break; \\
        case 4: BT_STRING(insn, "l"); break; \\
        default: BT_STRING(insn, "q"); break; \\
        }
    static inline void bt_movs(uint64_t to, uint64_t from, uint64_t n, uint32_t size, int down) {
        uint64_t acc = 0;
        BT_STRING_SIZES("rep movs")
    }
    static inline void bt_stos(uint64_t to, uint64_t acc, uint64_t n, uint32_t size, int down) {
        uint64_t from = 0;
        BT_STRING_SIZES("rep stos")
    }
    /* Compare and scan: how many elements are left, and the flags in LAHF's form with OF in bit 0. */
    #define BT_COMPARE(insn, suffix) \\
        if (down) __asm__ __volatile__("std\\n\\t" insn suffix "\\n\\tcld\\n\\tlahf\\n\\tseto %%al" \\
                                       : "+D"(to), "+S"(from), "+c"(n), "+a"(acc) : : "memory", "cc"); \\
        else __asm__ __volatile__(insn suffix "\\n\\tlahf\\n\\tseto %%al" \\
                                  : "+D"(to), "+S"(from), "+c"(n), "+a"(acc) : : "memory", "cc")
    #define BT_COMPARE_SIZES(insn) \\
        switch (size) { \\
        case 1: BT_COMPARE(insn, "b"); break; \\
        case 2: BT_COMPARE(insn, "w"); break; \\
        case 4: BT_COMPARE(insn, "l"); break; \\
        default: BT_COMPARE(insn, "q"); break; \\
        } \\
        *flags = (uint32_t)acc & 0xFFFF; \\
        return n;
    static inline uint64_t bt_cmps(uint64_t to, uint64_t from, uint64_t n, uint32_t size, int down, int equal,
                                   uint32_t *flags) {
        uint64_t acc = 0;
        if (equal) { BT_COMPARE_SIZES("repe cmps") } else { BT_COMPARE_SIZES("repne cmps") }
    }
    static inline uint64_t bt_scas(uint64_t to, uint64_t acc, uint64_t n, uint32_t size, int down, int equal,
                                   uint32_t *flags) {
        uint64_t from = 0;
        if (equal) { BT_COMPARE_SIZES("repe scas") } else { BT_COMPARE_SIZES("repne scas") }
    }
    """
    void bt_movs(uint64_t to, uint64_t source, uint64_t n, uint32_t size, bint down) noexcept nogil
    void bt_stos(uint64_t to, uint64_t value, uint64_t n, uint32_t size, bint down) noexcept nogil
    uint64_t bt_cmps(uint64_t to, uint64_t source, uint64_t n, uint32_t size, bint down, bint equal,
                     uint32_t* flags) noexcept nogil
    uint64_t bt_scas(uint64_t to, uint64_t value, uint64_t n, uint32_t size, bint down, bint equal,
                     uint32_t* flags) noexcept nogil

cdef enum:
    S_MOVS = 0xA4
    S_CMPS = 0xA6
    S_STOS = 0xAA
    S_LODS = 0xAC
    S_SCAS = 0xAE


cdef inline uint64_t load(uint64_t at, uint32_t size) noexcept nogil:
    if size == 1:
        return (<uint8_t*>at)[0]
    if size == 2:
        return (<uint16_t*>at)[0]
    if size == 4:
        return (<uint32_t*>at)[0]
    return (<uint64_t*>at)[0]


cdef inline void store(uint64_t at, uint64_t value, uint32_t size) noexcept nogil:
    if size == 1:
        (<uint8_t*>at)[0] = <uint8_t>value
    elif size == 2:
        (<uint16_t*>at)[0] = <uint16_t>value
    elif size == 4:
        (<uint32_t*>at)[0] = <uint32_t>value
    else:
        (<uint64_t*>at)[0] = value


cdef inline uint64_t chunk(uint64_t lin, uint32_t size, bint down) noexcept nogil:
    """How many elements from `lin` on lie in its page; 0: the first one crosses the page's end."""
    cdef uint64_t at = lin & 0xFFF
    if not down:
        return (4096 - at) / size
    return 0 if at + size > 4096 else at / size + 1


cdef int locate(Vcpu* v, int seg, uint64_t offset, uint64_t mask, uint32_t size, bint down, int access, uint64_t* n,
                uint64_t* lin) noexcept nogil:
    """Linear address of the element at seg:offset, and *n cut to what one page, the address size and the segment's
    limit let run in one go (0: not even one in a page)."""
    cdef uint64_t most, last
    cdef int r = linear(v, seg, offset, size, access, lin)
    if r == R_OK:
        r = aligned(v, lin[0], size)
    if r != R_OK:
        return r
    most = chunk(lin[0], size, down)
    if most < n[0]:
        n[0] = most
    if v.sysflags & F_TF or v.debug:
        if v.sysflags & F_TF or v.debug & WATCH_STEP or page_watched(v, lin[0]):
            n[0] = 1 if n[0] else 0
            note_data(v, lin[0], size, access)
    if mask != ~<uint64_t>0 and n[0] > 1:
        # up to the wrap of SI and DI, and of the segment
        most = (offset / size if down else (mask - offset) / size) + 1
        if most < n[0]:
            n[0] = most
        last = offset - (n[0] - 1) * size if down else offset + (n[0] - 1) * size
        if not is64(v) and linear(v, seg, last & mask, size, access, &last) != R_OK:
            n[0] = 1
    return R_OK


cdef inline void step(Vcpu* v, int reg, uint64_t by, uint64_t mask) noexcept nogil:
    if mask == 0xFFFF:
        v.gpr[reg] = (v.gpr[reg] & ~<uint64_t>0xFFFF) | ((v.gpr[reg] + by) & 0xFFFF)
    else:
        v.gpr[reg] = (v.gpr[reg] + by) & mask


cdef int in_out_string(Vcpu* v, Insn* i, uint32_t size, uint64_t count) noexcept nogil:
    """INS, OUTS: the monitor emulates them, up to the end of the page. The permissions, that of the ports (which is
    asked for before the count) and that of the page, are ours."""
    cdef uint64_t mask = size_mask(i.addrsize)
    cdef uint64_t lin = 0
    cdef int r = io_allowed(v, <uint32_t>v.gpr[RDX] & 0xFFFF, size)
    if r == R_OK and count == 0:
        return advance(v, i)
    if r == R_OK:
        if i.opcode < 0x6E:
            r = linear(v, SEG_ES, v.gpr[RDI] & mask, size, ACCESS_WRITE, &lin)
            if r == R_OK:
                r = aligned(v, lin, size)
            if r == R_OK:
                r = mmu_probe_write(v, lin, size, v.bank)
        else:
            r = linear(v, i.seg, v.gpr[RSI] & mask, size, ACCESS_READ, &lin)
            if r == R_OK:
                r = aligned(v, lin, size)
            if r == R_OK:
                r = mmu_probe_read(v, lin, size, v.bank)
    if r != R_OK:
        return r
    note_port(v, v.gpr[RDX] & 0xFFFF, size)
    v.exit.reason = X_IO
    v.exit.length = i.length
    v.exit.qualification = 0
    v.exit.io_port = <uint32_t>v.gpr[RDX] & 0xFFFF
    v.exit.io_size = size
    v.exit.io_in = 1 if i.opcode < 0x6E else 0
    v.exit.io_string = 1
    v.exit.io_value = 0
    return R_EXIT


cdef int string_operation(Vcpu* v, Insn* i) noexcept nogil:
    cdef int op = i.opcode & 0xFE
    cdef uint32_t size = i.opsize if i.opcode & 1 else 1
    cdef bint rep = i.prefixes & (P_F2 | P_F3) != 0
    cdef bint equal = i.prefixes & P_F2 == 0
    cdef bint down = v.dflag != 0
    cdef uint64_t mask = size_mask(i.addrsize)
    cdef uint64_t count = v.gpr[RCX] & mask if rep else 1
    cdef uint64_t n, left, src, dst, from_, to, info, moved, value, other
    cdef uint32_t flags = 0
    cdef bint stop = False
    cdef int r
    src = dst = from_ = to = info = 0
    if op == 0x6C or op == 0x6E:
        return in_out_string(v, i, size if size < 8 else 4, count)
    if count == 0:
        return advance(v, i)
    v.n.rep_ops += rep
    while True:
        n = count
        # what is looked at first is looked at to its page, before the other one's segment; as AMD's do
        if op == S_CMPS and not rep:
            r = locate(v, SEG_ES, v.gpr[RDI] & mask, mask, size, down, ACCESS_READ, &n, &dst)
            if r == R_OK:
                r = mmu_probe_read(v, dst, size, v.bank)
            if r != R_OK:
                return r
        if op != S_STOS and op != S_SCAS:
            r = locate(v, i.seg, v.gpr[RSI] & mask, mask, size, down, ACCESS_READ, &n, &src)
            if r == R_OK and (op == S_MOVS or (op == S_CMPS and rep)):
                r = mmu_probe_read(v, src, size, v.bank)
            if r != R_OK:
                return r
        if op != S_LODS and (op != S_CMPS or rep):
            r = locate(v, SEG_ES, v.gpr[RDI] & mask, mask, size, down,
                       ACCESS_WRITE if op == S_MOVS or op == S_STOS else ACCESS_READ, &n, &dst)
            if r != R_OK:
                return r
        left = 0
        if n == 0:
            # one element over a page's end, by value
            n = 1
            value = v.gpr[RAX]
            other = 0
            if op == S_MOVS or op == S_LODS or op == S_CMPS:
                value = 0
                r = mmu_read(v, src, &value, size, v.bank)
                if r != R_OK:
                    return r
            if op == S_MOVS or op == S_STOS:
                r = mmu_write(v, dst, &value, size, v.bank)
            elif op == S_CMPS or op == S_SCAS:
                r = mmu_read(v, dst, &other, size, v.bank)
                if r == R_OK:
                    left = bt_scas(<uint64_t>&other, value, 1, size, False, equal, &flags)
            if r != R_OK:
                return r
            if op == S_LODS:
                write_reg(v, RAX, value, size)
        else:
            if op != S_STOS and op != S_SCAS:
                r = mmu_page(v, src, ACCESS_READ, v.bank, &from_, &info)
                if r != R_OK:
                    return r
            if op == S_MOVS or op == S_STOS:
                r = mmu_page(v, dst, ACCESS_WRITE, v.bank, &to, &info)
            elif op != S_LODS:
                r = mmu_page(v, dst, ACCESS_READ, v.bank, &to, &info)
            if r != R_OK:
                return r
            if op == S_MOVS:
                if n == 1:
                    store(to, load(from_, size), size)
                elif not down and to - from_ >= size:
                    bt_copy(<void*>to, <void*>from_, n * size)
                else:
                    bt_movs(to, from_, n, size, down)
            elif op == S_STOS:
                if n == 1:
                    store(to, v.gpr[RAX], size)
                else:
                    bt_stos(to, v.gpr[RAX], n, size, down)
            elif op == S_LODS:
                # only the last one stays
                from_ += (0 - (n - 1) if down else n - 1) * size
                write_reg(v, RAX, load(from_, size), size)
            elif op == S_CMPS:
                left = bt_cmps(to, from_, n, size, down, equal, &flags)
            else:
                left = bt_scas(to, v.gpr[RAX], n, size, down, equal, &flags)
            if info & MMU_CODE:
                code_written(v, to - (n - 1) * size if down else to, <uint32_t>(n * size))
        n -= left
        if op == S_CMPS or op == S_SCAS:
            v.flags_lo = <uint8_t>(flags >> 8) & 0xD5
            v.flags_of = <uint8_t>(flags & 1)
            stop = (flags & 0x4000 != 0) != equal
        moved = n * size
        if down:
            moved = 0 - moved
        if op != S_STOS and op != S_SCAS:
            step(v, RSI, moved, mask)
        if op != S_LODS:
            step(v, RDI, moved, mask)
        if not rep:
            break
        count -= n
        if mask == 0xFFFF:
            v.gpr[RCX] = (v.gpr[RCX] & ~<uint64_t>0xFFFF) | count
        else:
            v.gpr[RCX] = count
        if count == 0 or stop:
            break
        if v.poll or v.db_pending or v.sysflags & F_TF or v.debug & WATCH_STEP:
            v.sysflags |= F_RF                   # RIP stays: the rest runs after the interrupt
            return R_OK
    return advance(v, i)
