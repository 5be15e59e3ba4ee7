# cython: language_level=3
"""Random sequences of instructions, with operands that point where something is; see _fuzzgen.pyx."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.decode cimport Insn

cdef enum:
    # Linear addresses, the same on the host and in the guest. The first pages are the harness's.
    FUZZ_BASE = 0x30000000
    FUZZ_END = 0x30080000           # the common end of a sequence: for 64-bit code, at +0x40 for 32-bit
    FUZZ_CODE = 0x30100000
    FUZZ_CODE_SIZE = 0x100000
    FUZZ_DATA = 0x30800000
    FUZZ_DATA_PAGES = 16
    FUZZ_SIZE = 0x1000000
    FUZZ_END16 = 0xF0F0             # the common end in each 64 KiB of 16-bit code: two equal bytes, for odd stacks

    # What a page of data is.
    PAGE_ABSENT = 0
    PAGE_READ = 1
    PAGE_WRITE = 2

    MAX_SEQ = 16                    # instructions
    MAX_SEQ_BYTES = 320

cdef struct Rng:
    uint64_t s

cdef inline uint64_t rng_next(Rng* r) noexcept nogil:
    """splitmix64."""
    cdef uint64_t z
    r.s += <uint64_t>0x9E3779B97F4A7C15
    z = r.s
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return z ^ (z >> 31)

cdef inline uint32_t rng_below(Rng* r, uint32_t n) noexcept nogil:
    return <uint32_t>(((rng_next(r) >> 32) * n) >> 32)

cdef inline bint chance(Rng* r, uint32_t percent) noexcept nogil:
    return rng_below(r, 100) < percent

cdef struct EnvStore:
    uint64_t at
    uint32_t kind                   # 1: FXSAVE; 2: FNSTENV and FNSAVE, 32-bit; 3: 16-bit

cdef struct Seq:
    uint64_t at                     # linear address of the first byte
    uint32_t length
    uint32_t n                      # instructions
    uint32_t straight               # those in front of the first branch
    uint16_t off[MAX_SEQ + 1]
    Insn insn[MAX_SEQ]
    uint8_t code[MAX_SEQ_BYTES]
    uint32_t pinned                 # registers whose initial value is init[]
    uint64_t init[16]
    uint32_t n_env
    EnvStore env[4]
    uint8_t und[MAX_SEQ + 1]        # flags (FL_*) that may be undefined in front of each instruction
    uint32_t vsib                   # bit n: vector register n is an index
    # while it is made
    int mode                        # 16, 32, 64
    uint32_t known                  # registers whose value is value[]
    uint32_t dirty                  # registers that hold something else than at the start
    uint64_t value[16]
    int skip                        # instructions that the open branch still skips; -1: none is open
    uint32_t fix_at                 # where its displacement is
    uint32_t fix_size
    int fix_insn                    # its number
    uint64_t fix_from               # what the displacement counts from
    uint32_t changed                # registers changed since the open branch
    uint32_t fix_und                # flags undefined at the open branch

cdef struct Settings:
    int mode
    int evex                        # the processor has AVX-512
    int max_insns
    int faults                      # percent of operands in places that may fault
    int invalid                     # percent of undefined encodings that are kept
    int align                       # percent of runs that ask for #AC
    int branches                    # 1: branches too
    const uint8_t* undefined        # undefined.table() of tests/fuzz
    uint64_t fs_base
    uint64_t gs_base
    uint64_t seg_base[6]            # but in 64-bit code: bases of ES CS SS DS FS GS

cdef int page_kind(int page) noexcept nogil
# Why an instruction is not compared: 0, or one of the reasons in _fuzzgen.pyx.
cdef int left_out(Insn* i, int mode) noexcept nogil
cdef void make_seq(Seq* s, Settings* f, Rng* r, uint64_t at) noexcept nogil
