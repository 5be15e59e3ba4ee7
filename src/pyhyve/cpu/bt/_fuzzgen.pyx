# cython: language_level=3
"""Random sequences of instructions for the fuzzer.

Bytes are random; what they mean is asked of the decoder. Then operands are given a sense: a memory operand's base and
index get values with which it lies in the data pages (in the middle, over a page's end, in a page that is read-only or
absent), by the registers' initial values, by the displacement, or by a MOV in front of the instruction.
"""

from libc.string cimport memcpy

from pyhyve.cpu.bt.decode cimport *
from pyhyve.cpu.bt.kinds cimport is_opmask
from pyhyve.cpu.bt.state cimport (
    R10, R11, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP, SEG_CS, SEG_DS, SEG_ES, SEG_FS, SEG_GS, SEG_SS,
)

# Data pages: absent, writable (W), read-only (R). Those in 4-5 and 11-12 are neighbours in the guest's memory as well,
# all others are not.
#            0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15
cdef const char* _PAGES = "-WW-WWR-RW-WW---"

cdef enum:
    OUT_HOST = 1        # would leave the fuzzer's process: system calls, hypercalls
    OUT_VALUE = 2       # gives what is the machine's: time, random numbers, identity
    OUT_TABLES = 3      # shows or asks descriptor tables, which are the host kernel's
    OUT_STATE = 4       # an image of extended state, which has the host's components
    OUT_MEMORY = 5      # undefined for guests, defined on some hosts, and a store to where RAX points


cdef int page_kind(int page) noexcept nogil:
    if page < 0 or page >= FUZZ_DATA_PAGES:
        return PAGE_ABSENT
    return PAGE_WRITE if _PAGES[page] == c'W' else (PAGE_READ if _PAGES[page] == c'R' else PAGE_ABSENT)


cdef int left_out(Insn* i, int mode) noexcept nogil:
    cdef int op = i.opcode
    cdef int reg = i.reg & 7
    cdef int mem = i.mod != 3
    if i.enc != ENC_LEGACY:
        return 0
    if i.map == 0:
        if op == 0xCD and (i.imm & 0xFF) == 0x80:
            return OUT_HOST
        if op == 0x9A or op == 0xEA:
            return OUT_TABLES
        if op == 0xF1:
            return OUT_HOST                                            # INT1: where hypervisors intercept it, RIP stays
        return 0
    if i.map == 1:
        if op == 0x05 or op == 0x34 or op == 0x07 or op == 0x35:       # SYSCALL, SYSENTER, SYSRET, SYSEXIT
            return OUT_HOST
        if op == 0x31 or op == 0x33 or op == 0xA2:                     # RDTSC, RDPMC, CPUID
            return OUT_VALUE
        if op == 0x02 or op == 0x03:                                   # LAR, LSL
            return OUT_TABLES
        if op == 0x00 and (reg <= 1 or reg == 4 or reg == 5):          # SLDT, STR, VERR, VERW
            return OUT_TABLES
        if op == 0x01:
            if mem:
                return OUT_TABLES if reg <= 1 or reg == 4 else 0       # SGDT, SIDT, SMSW
            if reg == 4:
                return OUT_TABLES
            if i.modrm == 0xC1 or i.modrm == 0xD9:                     # VMCALL, VMMCALL
                return OUT_HOST
            if i.modrm == 0xD0 or i.modrm == 0xF9 or i.modrm == 0xEE or i.modrm == 0xEF:
                return OUT_VALUE                                       # XGETBV, RDTSCP, RDPKRU, WRPKRU
            return OUT_MEMORY if i.modrm >= 0xFA or 0xD8 <= i.modrm < 0xE0 else 0
        if op == 0xAE:
            if mem and (reg == 4 or reg == 5 or reg == 6 or reg == 1):  # XSAVE, XRSTOR, XSAVEOPT; FXRSTOR
                return OUT_STATE if reg != 1 and not i.prefixes & P_66 else 0
            return 0
        if op == 0xC7:
            if mem:
                return OUT_STATE if reg == 3 or reg == 4 or reg == 5 else (OUT_MEMORY if reg >= 6 else 0)
            return OUT_VALUE if reg >= 6 else 0                        # RDRAND, RDSEED, RDPID
        return 0
    if i.map == 2:
        # ENQCMD, MOVDIR64B, and their kin: stores of 64 bytes
        return OUT_MEMORY if op >= 0xF5 and op <= 0xFF and i.cls == C_INVALID else 0
    return 0


def why_left_out(bytes code, int mode):
    """0 if the instruction is compared, else why not: see left_out."""
    cdef Insn i
    if decode(<const uint8_t*><const char*>code, <int>len(code), mode, &i) <= 0:
        return 0
    return left_out(&i, mode)


cdef inline uint32_t _bit(int reg) noexcept nogil:
    return <uint32_t>1 << (reg & 15) if reg < 16 else 0


cdef uint32_t _writes(const Insn* i) noexcept nogil:
    """General registers that may be another afterwards (too many rather than too few)."""
    cdef uint32_t m = 0
    if i.attr & A_REG_GPR:
        m |= _bit(i.reg & 3 if i.attr & A_REG_8 and not i.rex and 4 <= i.reg < 8 else i.reg)
    if i.attr & (A_RM_GPR | A_OPREG) and not i.attr & A_MEM or i.attr & A_OPREG:
        m |= _bit(i.rm & 3 if i.attr & A_RM_8 and not i.rex and 4 <= i.rm < 8 else i.rm)
    if i.attr & A_VVVV_GPR:
        m |= _bit(i.vvvv)
    if i.cls == C_COPY:
        m |= _bit(RAX) | _bit(RDX) | _bit(RCX)
    elif i.cls == C_SYSTEM:
        m |= _bit(RAX) | _bit(RDX) | _bit(RCX) | _bit(RBX)
        if i.map == 0 and (i.opcode & 0xF0) == 0xC0:
            m |= _bit(i.reg)
    elif i.cls == C_STRING:
        m |= _bit(RAX) | _bit(RCX) | _bit(RSI) | _bit(RDI)
    elif i.cls == C_STACK:
        if i.opcode == 0x61 and i.map == 0:
            m |= 0xEF
        elif i.opcode == 0xC8 or i.opcode == 0xC9:
            m |= _bit(RBP) | _bit(RSP)
        elif i.opcode == 0x8F or 0x58 <= i.opcode <= 0x5F:
            m |= _bit(i.rm) if i.mod == 3 or i.opcode != 0x8F else 0
    elif i.cls == C_BRANCH:
        if i.map == 0 and (i.opcode == 0xC2 or 0xC8 <= i.opcode <= 0xCF):
            m |= _bit(RSP)
        if i.map == 0 and 0xE0 <= i.opcode <= 0xE3:
            m |= _bit(RCX)
    return m


cdef void _note(Seq* s, const Insn* i, uint32_t writes) noexcept nogil:
    s.known &= ~writes
    s.dirty |= writes
    s.changed |= writes


cdef bint _room(Seq* s) noexcept nogil:
    return s.n + 6 < MAX_SEQ and s.length + 100 < MAX_SEQ_BYTES


cdef void _append(Seq* s, const uint8_t* code, const Insn* i) noexcept nogil:
    s.off[s.n] = <uint16_t>s.length
    memcpy(&s.code[s.length], code, i.length)
    s.insn[s.n] = i[0]
    s.insn[s.n].bytes = NULL
    s.length += i.length
    s.n += 1
    s.und[s.n] = s.und[s.n - 1]
    s.off[s.n] = <uint16_t>s.length


cdef uint64_t _mask(Seq* s) noexcept nogil:
    return ~<uint64_t>0 if s.mode == 64 else <uint64_t>0xFFFFFFFFULL


cdef void _mov(Seq* s, int reg, uint64_t value) noexcept nogil:
    """MOV reg, value in front of an instruction that needs it."""
    cdef uint8_t code[16]
    cdef Insn i
    cdef int n = 0
    value &= _mask(s)
    if s.mode == 64:
        code[0] = <uint8_t>(0x48 | reg >> 3)
        n = 1
    elif s.mode == 16:
        code[0] = 0x66
        n = 1
    code[n] = <uint8_t>(0xB8 | reg & 7)
    (<uint64_t*>&code[n + 1])[0] = value
    n += 9 if s.mode == 64 else 5
    decode(code, n, s.mode, &i)
    _append(s, code, &i)
    _note(s, &i, _bit(reg))
    s.known |= _bit(reg)
    s.value[reg] = value


cdef void _give(Seq* s, int reg, uint64_t value) noexcept nogil:
    """Have `value` in a register: from the start if it is still as at the start, else by MOV."""
    if s.dirty & _bit(reg) or s.pinned & _bit(reg):
        _mov(s, reg, value)
        return
    value &= _mask(s)
    s.pinned |= _bit(reg)
    s.init[reg] = value
    s.known |= _bit(reg)
    s.value[reg] = value


cdef bint _near_data(uint64_t lin) noexcept nogil:
    return lin - FUZZ_DATA + 0x2000 < FUZZ_DATA_PAGES * 4096 + 0x4000


cdef uint64_t _target(Settings* f, Rng* r, uint32_t width) noexcept nogil:
    """A place in the data pages for an operand of some bytes."""
    cdef uint32_t kind = rng_below(r, 100)
    cdef uint64_t page
    cdef uint64_t align = 63
    if width == 0:
        width = 1
    if kind >= <uint32_t>f.faults + 12:
        # inside a writable page, mostly aligned
        page = (<uint8_t*>b"\x01\x02\x04\x05\x09\x01\x02\x04")[rng_below(r, 8)]
        kind = rng_below(r, 8)
        if kind == 0:
            align = 0
        elif kind < 3:
            align = 7
        return FUZZ_DATA + page * 4096 + (64 + rng_below(r, 4096 - 64 - (width if width < 3500 else 3500)) & ~align)
    if kind >= <uint32_t>f.faults:
        # over the end of a page, or just not, both pages writable
        page = 2 if rng_below(r, 2) else 5
        return FUZZ_DATA + page * 4096 - rng_below(r, width + 1)
    kind = rng_below(r, 8)
    if kind == 0:
        return FUZZ_DATA + 0x3000 - rng_below(r, width + 2)             # writable, then absent
    if kind == 1:
        return FUZZ_DATA + 0x6000 - rng_below(r, width + 2)             # writable, then read-only
    if kind == 2:
        return FUZZ_DATA + 0x9000 - rng_below(r, width + 2)             # read-only, then writable
    if kind == 3:
        return FUZZ_DATA + 0x4000 - rng_below(r, width + 2)             # absent, then writable
    if kind == 4:
        return FUZZ_DATA + 0x6000 + rng_below(r, 4096)                  # read-only
    if kind == 5:
        return FUZZ_DATA + 0x3000 + rng_below(r, 4096)                  # absent
    if f.mode == 16:
        return FUZZ_DATA + (rng_next(r) & 0xFFFF)
    if f.mode != 64:
        return rng_next(r) & 0xFFFFFFFFULL if rng_below(r, 4) == 0 else FUZZ_DATA + 0x7000
    if kind == 6:
        return (rng_next(r) >> 8 | <uint64_t>0x40 << 56) + rng_below(r, 64)  # not canonical
    return <uint64_t>0x00007FFFFFFFF000ULL + 0x1000 - rng_below(r, width + 2) if rng_below(r, 2) else \
        (<uint64_t>0xFFFF << 48 | <uint64_t>8 << 44) - rng_below(r, width + 2)  # where canonical ends and begins


cdef uint64_t _seg_base(Settings* f, int seg) noexcept nogil:
    if f.mode == 64:
        return f.fs_base if seg == SEG_FS else (f.gs_base if seg == SEG_GS else 0)
    return f.seg_base[seg]


cdef void _poke(uint8_t* at, uint64_t value, int size) noexcept nogil:
    cdef int k
    for k in range(size):
        at[k] = <uint8_t>(value >> (8 * k))


cdef bint _operand(Seq* s, Settings* f, Rng* r, uint8_t* code, Insn* i, uint64_t* where) noexcept nogil:
    """Make the memory operand of the instruction in `code` point somewhere. False: take another instruction."""
    cdef uint32_t width = i.mem_width
    cdef uint64_t base, want, ea, idx = 0
    cdef uint64_t amask = ~<uint64_t>0 if i.addrsize == 8 else (0xFFFFFFFFULL if i.addrsize == 4 else 0xFFFF)
    cdef uint64_t high = 0
    cdef int dsize = 0
    cdef int b = i.base
    cdef int x = i.index
    base = _seg_base(f, i.seg)
    if i.cls == C_SYSTEM:
        if i.map == 1 and i.opcode == 0xAE and i.mod != 3 and (i.reg & 7) < 2:
            width = 512
        elif i.map == 0 and 0xD8 <= i.opcode <= 0xDF:
            width = 108
        elif width == 0:
            width = 10
    if i.attr & A_VSIB:
        # indices are small, see make_state
        want = FUZZ_DATA + (0x2000 if rng_below(r, 2) else 0x5000) + rng_below(r, 0x200)
        if b > 15 or i.addrsize == 2:
            return False
        s.vsib |= <uint32_t>1 << (x & 31)
        x = REG_NONE
    else:
        want = _target(f, r, width)
    where[0] = want
    want -= base
    if i.attr & A_MOFFS:
        _poke(code + i.modrm_off, want, i.addrsize)
        return True
    if b > 15 and x > 15:
        # a displacement alone, from 0 or from RIP
        dsize = 2 if i.addrsize == 2 else 4
        if b == REG_RIP:
            want -= s.at + s.length + i.length
        if s.mode == 64 and i.addrsize == 8 and <int64_t>want != <int64_t><int><uint32_t>want:
            return True
        _poke(code + i.imm_off - dsize, want, dsize)
        return True
    if b == x and b <= 15:
        # one register, scaled and not: as near as division comes
        if s.dirty & _bit(b) or s.pinned & _bit(b) or i.addrsize == 2:
            return False
        _give(s, b, (want - <uint64_t>i.disp) / (i.scale + 1))
        return True
    if i.addrsize == 2:
        dsize = 2 if (i.mod == 2 or (i.mod == 0 and i.rm == 6)) else (1 if i.mod == 1 else 0)
    elif i.mod == 2 or b == REG_NONE:
        dsize = 4
    elif i.mod == 1:
        dsize = 1
    if x <= 15:
        if not s.known & _bit(x):
            high = rng_below(r, 4)
            idx = rng_below(r, 256)
            if high == 1:
                idx = 0 - idx
            elif high == 2:
                idx = rng_next(r)
            _give(s, x, idx)
        idx = s.value[x] * i.scale
        if b > 15:
            # an index alone: the displacement does the rest
            want -= idx
            if i.addrsize == 8 and <int64_t>want != <int64_t><int><uint32_t>want:
                _mov(s, x, rng_below(r, 256))
                want = where[0] - base - s.value[x] * i.scale
            _poke(code + i.imm_off - dsize, want, dsize)
            return True
    if s.known & _bit(b):
        ea = (s.value[b] + idx + <uint64_t>i.disp) & amask
        if _near_data(ea + base):
            where[0] = ea + base if f.mode == 64 else (ea + base) & <uint64_t>0xFFFFFFFFULL
            return True
        if dsize >= 2:
            ea = want - s.value[b] - idx
            if dsize == 2 or i.addrsize == 4 or <int64_t>ea == <int64_t><int><uint32_t>ea:
                _poke(code + i.imm_off - dsize, ea, dsize)
                return True
    want = (want - idx - <uint64_t>i.disp) & amask
    if i.addrsize != 8 and s.mode == 64 and rng_below(r, 2):
        want |= rng_next(r) & ~amask
    _give(s, b, want)
    if b == x:
        return False
    return True


cdef bint _stack_ready(Seq* s, Settings* f, Rng* r) noexcept nogil:
    cdef uint64_t at
    if s.known & _bit(RSP):
        return True
    at = FUZZ_DATA + 0xC000 + 8 * rng_below(r, 128) - 512 - f.seg_base[SEG_SS]
    _mov(s, RSP, at)
    return True


cdef bint _prepare(Seq* s, Settings* f, Rng* r, uint8_t* code, Insn* i, int* branch) noexcept nogil:
    """Give an instruction's operands a sense. False: take another one."""
    cdef uint64_t where = 0
    cdef int op = i.opcode
    cdef int rep = i.prefixes & (P_F2 | P_F3)
    cdef uint64_t count
    branch[0] = 0
    if i.cls == C_INVALID:
        return True
    if f.mode == 16 and (i.seg == SEG_CS or i.map == 0 and op == 0x0E):
        return False                             # reads of code, which is not the same on both sides; PUSH CS
    if i.cls == C_SYSTEM and (i.base == RSP or i.base == i.index) and (i.map == 1 and op == 0xAE or i.map == 0 and 0xD8 <= op <= 0xDF):
        return False                             # where it stores must be known
    if i.attr & A_MEM and not (i.attr & A_NO_ACCESS):
        if i.cls == C_BRANCH:
            # JMP and CALL through memory: to a place that holds the address of the common end
            if i.mem_width and (i.reg & 7) != 3 and (i.reg & 7) != 5:
                if not _operand(s, f, r, code, i, &where):
                    return False
        elif not _operand(s, f, r, code, i, &where):
            return False
        if i.cls == C_SYSTEM and s.n_env < 4:
            if i.map == 1 and op == 0xAE and (i.reg & 7) == 0:
                s.env[s.n_env].at = where
                s.env[s.n_env].kind = 1
                s.n_env += 1
            elif i.map == 0 and (op == 0xD9 or op == 0xDD) and (i.reg & 7) == 6:
                s.env[s.n_env].at = where
                s.env[s.n_env].kind = 3 if i.opsize == 2 else 2
                s.n_env += 1
    if i.attr & A_BITOFF and i.attr & A_MEM:
        if i.reg == i.base or i.reg == i.index or i.reg == RSP:
            return False
        if not s.known & _bit(i.reg):
            count = rng_below(r, 8192)
            _give(s, i.reg, count - 4096)
    if i.cls == C_STRING:
        if op == 0xA4 or op == 0xA5 or op == 0xA6 or op == 0xA7 or op == 0xAC or op == 0xAD:
            if not s.known & _bit(RSI) or not _near_data(s.value[RSI] + f.seg_base[SEG_DS]):
                _give(s, RSI, _target(f, r, i.opsize) - _seg_base(f, i.seg))
        if op == 0xA4 or op == 0xA5 or op == 0xA6 or op == 0xA7 or op == 0xAA or op == 0xAB or op == 0xAE or op == 0xAF:
            if not s.known & _bit(RDI) or not _near_data(s.value[RDI] + f.seg_base[SEG_ES]):
                _give(s, RDI, _target(f, r, i.opsize) - (f.seg_base[SEG_ES] if f.mode != 64 else 0))
        if rep and (not s.known & _bit(RCX) or s.value[RCX] > 5000):
            count = rng_below(r, 12)
            _give(s, RCX, 0 if count == 0 else (rng_below(r, 5000) if count == 1 else rng_below(r, 80)))
    elif i.cls == C_STACK:
        _stack_ready(s, f, r)
        if op == 0xC9 or op == 0xC8:
            if not s.known & _bit(RBP):
                _give(s, RBP, FUZZ_DATA + 0xC000 + 8 * rng_below(r, 64) - 256 - f.seg_base[SEG_SS])
        if op == 0xC8 and rng_below(r, 2):
            _poke(code + i.imm_off, rng_below(r, 256) | rng_below(r, 8) << 16, 3)
    elif i.cls == C_SYSTEM:
        if i.map == 0 and op == 0xD7:
            if not s.known & _bit(RBX):
                _give(s, RBX, _target(f, r, 1) - _seg_base(f, i.seg))
        elif i.map == 1 and op == 0xF7 and i.mod == 3:
            if not s.known & _bit(RDI):
                _give(s, RDI, _target(f, r, 16) - _seg_base(f, i.seg))
    elif i.cls == C_BRANCH:
        if not f.branches or s.skip >= 0:
            return False
        if i.map == 1 and 0x80 <= op <= 0x8F or i.map == 0 and (0x70 <= op <= 0x7F or 0xE0 <= op <= 0xE3 or op == 0xE8
                                                                or op == 0xE9 or op == 0xEB):
            if op == 0xE8:
                _stack_ready(s, f, r)
            branch[0] = 1
        elif i.map == 0 and op == 0xFF and i.mod == 3 and ((i.reg & 7) == 2 or (i.reg & 7) == 4):
            if (i.rm & 15) == RSP:
                return False
            if (i.reg & 7) == 2:
                _stack_ready(s, f, r)
            _mov(s, i.rm & 15, 0)
            branch[0] = 2
        elif i.map == 0 and op == 0xFF and i.mod != 3:
            if i.mem_width == 0:
                return False
            _stack_ready(s, f, r)
        elif i.map == 0 and (op == 0xC2 or op == 0xC3):
            _stack_ready(s, f, r)
            if op == 0xC2 and rng_below(r, 4):
                _poke(code + i.imm_off, rng_below(r, 64), 2)
        elif i.map == 0 and (op == 0xCA or op == 0xCB or op == 0xCF):
            _stack_ready(s, f, r)
    return True


cdef int _bytes(Settings* f, Rng* r, uint8_t* code) noexcept nogil:
    """Sixteen bytes that begin like an instruction."""
    cdef uint32_t shape = rng_below(r, 100)
    cdef int n = 0
    cdef int k
    cdef uint32_t b
    cdef uint32_t prefixes = rng_below(r, 100)
    for k in range(2):
        (<uint64_t*>code)[k] = rng_next(r)
    if shape >= 60 and rng_below(r, 20):
        prefixes = 0                             # VEX and EVEX bear few others
    if prefixes > 65:
        b = rng_below(r, 100)
        for k in range(1 + (b > 80) + (b > 95)):
            b = rng_below(r, 100)
            code[n] = <uint8_t>(0x66 if b < 40 else (0x67 if b < 50 else (0xF3 if b < 63 else (0xF2 if b < 76 else (
                0xF0 if b < 84 else (0x64 if b < 88 else (0x65 if b < 92 else (0x2E if b < 94 else (
                    0x36 if b < 96 else (0x3E if b < 98 else 0x26))))))))))
            n += 1
    if f.mode == 64 and (shape < 60 and rng_below(r, 10) < 6):
        code[n] = <uint8_t>(0x40 | rng_below(r, 16))
        n += 1
    if shape < 24:
        pass
    elif shape < 29:
        code[n] = <uint8_t>(0xD8 | rng_below(r, 8))
        n += 1
    elif shape < 48:
        code[n] = 0x0F
        n += 1
    elif shape < 60:
        code[n] = 0x0F
        code[n + 1] = 0x38 if rng_below(r, 3) else 0x3A
        n += 2
    elif shape < 70 or (shape >= 85 and not f.evex and rng_below(r, 2)):
        code[n] = 0xC5
        if rng_below(r, 2):
            code[n + 1] |= 0x78
        if f.mode != 64:
            code[n + 1] |= 0xC0
        n += 2
    elif shape < 85 or not f.evex:
        code[n] = 0xC4
        b = rng_below(r, 20)
        code[n + 1] = <uint8_t>(code[n + 1] & 0xE0 | (1 if b < 4 else (2 if b < 14 else (3 if b < 19 else rng_below(r, 32)))))
        if f.mode != 64:
            code[n + 1] |= 0xC0
        if rng_below(r, 3) == 0:
            code[n + 2] |= 0x78
        n += 3
    else:
        code[n] = 0x62
        b = rng_below(r, 20)
        code[n + 1] = <uint8_t>(code[n + 1] & 0xF0 | (1 if b < 7 else (2 if b < 15 else (3 if b < 18 else (5 if b < 19 else 6)))))
        if f.mode != 64:
            code[n + 1] |= 0xC0
        code[n + 2] |= 4
        if rng_below(r, 3) == 0:
            code[n + 2] |= 0x78
            code[n + 3] |= 8
        if rng_below(r, 2):
            code[n + 3] &= 0x7F                  # no zeroing
        if rng_below(r, 3) == 0:
            code[n + 3] &= 0xF8                  # no mask
        n += 4
    return n


cdef uint32_t _undefined(Insn* i, Settings* f) noexcept nogil:
    cdef uint32_t pp = 3 if i.prefixes & P_F2 else (2 if i.prefixes & P_F3 else i.prefixes & P_66)
    if i.enc == ENC_EVEX or i.map > 3 or i.cls == C_INVALID:
        return 0
    return f.undefined[(((i.enc * 4 + i.map) * 4 + pp) * 256 + i.opcode) * 8 + (i.reg & 7)]


cdef void _close(Seq* s) noexcept nogil:
    """The open branch goes here."""
    s.und[s.n] |= s.fix_und
    _poke(&s.code[s.fix_at], s.at + s.length - s.fix_from, <int>s.fix_size)
    s.insn[s.fix_insn].imm = <int64_t>(s.at + s.length - s.fix_from)
    s.known &= ~s.changed
    s.dirty |= s.changed
    s.skip = -1


cdef void make_seq(Seq* s, Settings* f, Rng* r, uint64_t at) noexcept nogil:
    """A sequence of 1 to max_insns random instructions (and the MOVs that they need), to stand at `at`."""
    cdef uint8_t code[32]
    cdef Insn i
    cdef uint32_t want = 1 + rng_below(r, f.max_insns)
    cdef uint32_t made = 0
    cdef uint32_t tries = 0
    cdef uint32_t kept_n, kept_length, kept_known, kept_dirty, kept_pinned, kept_env, kept_vsib, kept_changed
    cdef int length, branch
    if rng_below(r, 3) == 0:
        want = 1
    s.at = at
    s.length = s.n = s.pinned = s.known = s.dirty = s.n_env = s.vsib = s.changed = 0
    s.skip = -1
    s.und[0] = 0
    s.mode = f.mode
    s.straight = MAX_SEQ
    s.off[0] = 0
    # the stack: in the middle of its two pages mostly
    s.pinned = s.known = _bit(RSP)
    s.init[RSP] = FUZZ_DATA + 0xC000 - f.seg_base[SEG_SS] if f.mode != 64 else FUZZ_DATA + 0xC000
    length = <int>rng_below(r, 10)
    if length < 6:
        s.init[RSP] += 8 * <uint64_t>rng_below(r, 256) - 1024
    elif length < 8:
        s.init[RSP] += <uint64_t>rng_below(r, 256) - 128
    elif length == 8:
        s.init[RSP] += 0x1000 - <uint64_t>rng_below(r, 32) if f.faults else 0
    else:
        s.init[RSP] += <uint64_t>rng_below(r, 32) - 0x1000 if f.faults else 0
    if f.mode == 16 and chance(r, 30):
        s.init[RSP] |= rng_next(r) & 0xFFFF0000ULL
    s.value[RSP] = s.init[RSP]
    while made < want and _room(s) and tries < 400:
        tries += 1
        _bytes(f, r, code)
        length = decode(code, 16, f.mode, &i)
        if length <= 0 or length > 15:
            continue
        if i.cls == C_INVALID:
            if not chance(r, f.invalid):
                continue
        elif i.enc == ENC_EVEX and not f.evex:
            continue
        if left_out(&i, f.mode):
            continue
        if not f.evex and is_opmask(&i):
            continue
        if i.flags_read & s.und[s.n]:
            continue
        kept_n = s.n
        kept_length = s.length
        kept_known = s.known
        kept_dirty = s.dirty
        kept_pinned = s.pinned
        kept_env = s.n_env
        kept_vsib = s.vsib
        kept_changed = s.changed
        if not _prepare(s, f, r, code, &i, &branch):
            s.n = kept_n
            s.length = kept_length
            s.known = kept_known
            s.dirty = kept_dirty
            s.pinned = kept_pinned
            s.n_env = kept_env
            s.vsib = kept_vsib
            s.changed = kept_changed
            continue
        if decode(code, 16, f.mode, &i) != length:
            continue
        if i.attr & A_RIP and s.length != kept_length:
            # MOVs came in front: the displacement counts from elsewhere now
            i.disp -= s.length - kept_length
            _poke(code + i.imm_off - 4, <uint64_t>i.disp, 4)
        _append(s, code, &i)
        s.und[s.n] = s.und[s.n - 1] & ~i.flags_killed | _undefined(&i, f)
        made += 1
        if s.n_env:
            want = made                          # what it stored differs: nothing may load it
        if i.cls == C_BRANCH and s.straight == MAX_SEQ:
            s.straight = s.n
        if branch == 1:
            s.skip = <int>rng_below(r, 4)
            s.fix_size = i.imm_size
            s.fix_insn = <int>s.n - 1
            s.fix_at = s.off[s.n - 1] + i.imm_off
            s.fix_from = s.at + s.length
            s.changed = 0
            s.fix_und = s.und[s.n]
        elif branch == 2:
            s.skip = <int>rng_below(r, 4)
            s.fix_size = 8 if f.mode == 64 else 4
            s.fix_insn = <int>s.n - 2
            s.fix_at = s.off[s.n - 1] - s.fix_size
            s.fix_from = f.seg_base[SEG_CS] if f.mode != 64 else 0
            s.changed = 0
            s.fix_und = s.und[s.n]
        _note(s, &i, _writes(&i))
        if s.skip > 0 and not branch:
            s.skip -= 1
        if s.skip == 0:
            _close(s)
    if s.skip >= 0:
        _close(s)
    if s.straight == MAX_SEQ:
        s.straight = s.n
