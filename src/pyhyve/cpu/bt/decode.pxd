# cython: language_level=3
"""Instruction decoding for the translator: lengths, operands, memory accesses and flags, by tables."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    ENC_LEGACY = 0
    ENC_VEX = 1
    ENC_EVEX = 2

    P_66 = 1
    P_67 = 2
    P_F2 = 4
    P_F3 = 8
    P_LOCK = 16
    P_SEG = 32               # a segment override prefix that has an effect is present

    # classes
    C_INVALID = 0            # #UD
    C_COPY = 1               # the host can run it as it is, once registers and memory operand are substituted
    C_NOP = 2                # multi-byte NOP, ENDBR, PREFETCH*, CLDEMOTE: no access, no effect (PAUSE is C_SYSTEM)
    C_BRANCH = 3             # any control transfer: Jcc JMP CALL RET LOOP JCXZ, far ones, INT*, IRET, SYSCALL, ...
    C_STACK = 4              # PUSH POP PUSHF POPF PUSHA POPA ENTER LEAVE
    C_STRING = 5             # MOVS STOS LODS SCAS CMPS INS OUTS, with or without REP
    C_LIMIT = 7              # (the translator's) cannot be fetched: over the code segment's limit, or over 15 bytes
    C_SYSTEM = 6             # privileged, or not to be run natively (CPUID, RDTSC, XSAVE*, IN/OUT, MOV CR, LEA is COPY)

    # attributes
    A_MODRM = 1              # has a ModRM byte
    A_MEM = 2                # the ModRM byte names memory (mod != 3) or there is a moffs (A_MOFFS)
    A_REG_GPR = 4            # ModRM.reg names a general register that is an operand
    A_RM_GPR = 8             # ModRM.rm (mod == 3) names a general register operand
    A_VVVV_GPR = 16          # VEX.vvvv names a general register operand
    A_OPREG = 32             # opcode bits 0-2 (and REX.B) name a general register operand, in `rm`
    A_REG_8 = 64             # the reg operand is an 8-bit general register (without REX, 4-7 are AH CH DH BH)
    A_RM_8 = 128             # the rm operand (mod == 3), or A_OPREG's, is an 8-bit general register
    A_MOFFS = 256            # MOV with a memory offset (A0-A3): disp is the offset; no ModRM byte
    A_NO_ACCESS = 512        # memory operand is not accessed: LEA, INVLPG, NOP, prefetch
    A_BITOFF = 1024          # BT/BTS/BTR/BTC with a register bit offset on memory
    A_VSIB = 2048            # gather/scatter: vector index
    A_RIP = 4096             # RIP-relative memory operand (base == REG_RIP)
    A_W0 = 8192              # VEX, EVEX outside of 64-bit mode: W is ignored, though not in 64-bit mode

    REG_NONE = 0xFF
    REG_RIP = 0xFE

    M_NONE = 0
    M_READ = 1
    M_WRITE = 2
    M_RW = 3

    # flags, in flags_read and flags_killed
    FL_CF = 1
    FL_PF = 2
    FL_AF = 4
    FL_ZF = 8
    FL_SF = 16
    FL_OF = 32
    FL_ALL = 63

    # Features that CPUID may hide: `feature`, and bits of Vcpu.features. Bit 0 is always set.
    FT_SSE3 = 1
    FT_SSSE3 = 2
    FT_SSE4_1 = 3
    FT_SSE4_2 = 4
    FT_SSE4A = 5
    FT_POPCNT = 6
    FT_LZCNT = 7
    FT_BMI1 = 8
    FT_BMI2 = 9
    FT_MOVBE = 10
    FT_AES = 11
    FT_PCLMULQDQ = 12
    FT_SHA = 13
    FT_ADX = 14
    FT_RDRAND = 15
    FT_RDSEED = 16
    FT_GFNI = 17
    FT_F16C = 18
    FT_FMA = 19
    FT_AVX2 = 20
    FT_VAES = 21
    FT_VPCLMULQDQ = 22
    FT_AVX_VNNI = 23
    FT_AVX_IFMA = 24
    FT_AVX_VNNI_INT8 = 25
    FT_AVX_NE_CONVERT = 26
    FT_AVX_VNNI_INT16 = 27
    FT_SHA512 = 28
    FT_SM3 = 29
    FT_SM4 = 30
    FT_AVX512DQ = 31
    FT_AVX512_IFMA = 32
    FT_AVX512CD = 33
    FT_AVX512BW = 34
    FT_AVX512_VBMI = 35
    FT_AVX512_VBMI2 = 36
    FT_AVX512_VNNI = 37
    FT_AVX512_BITALG = 38
    FT_AVX512_VPOPCNTDQ = 39
    FT_AVX512_BF16 = 40
    FT_AVX512_FP16 = 41
    FT_AVX512_VP2INTERSECT = 42
    FT_CLFLUSHOPT = 43
    FT_CLWB = 44
    FT_CMPXCHG16B = 45
    FT_RDTSCP = 46
    FT_RDPID = 47
    FT_INVPCID = 48
    FT_SMAP = 49
    FT_XSAVEOPT = 50
    FT_XSAVEC = 51
    FT_XSAVES = 52
    FT_SERIALIZE = 53
    FT_MOVDIRI = 54
    FT_PKU = 55
    FT_FSGSBASE = 56
    FT_AVX512VL = 63
    V_LENGTH = 64            # in `feature`: AVX512VL is needed as well

    # Insn.masked: what a mask leaves unaccessed of the memory operand. Mask bit i guards the bytes from i * element on,
    # modulo the operand's width.
    MASKED = 0x20            # bits 0-1: log2 of an element's bytes, bits 2-4: log2 of the number of mask bits
    MASKED_PACKED = 0x40     # as many elements as mask bits are set, one behind the other
    MASKED_VECTOR = 0x80     # the mask is the sign bits of vvvv, not an opmask register

cdef struct Insn:
    const uint8_t* bytes     # the instruction's first byte, as handed in
    uint8_t length           # 1-15
    uint8_t enc              # ENC_*
    uint8_t map              # 0 one-byte, 1 = 0F, 2 = 0F 38, 3 = 0F 3A (VEX/EVEX: their map field)
    uint8_t opcode
    uint8_t cls              # C_*
    uint8_t prefixes         # P_*: legacy prefixes seen (for VEX/EVEX: P_66/P_F2/P_F3 from pp)
    uint8_t seg              # effective segment of the memory operand, SEG_* of state.pxd
    uint8_t rex              # REX byte, 0 if none; for VEX/EVEX: 0x40 | W<<3 | R<<2 | X<<1 | B (as plain REX would say)
    uint8_t modrm            # raw
    uint8_t mod
    uint8_t reg              # 0-15 (31 for EVEX)
    uint8_t rm               # 0-15 (31 for EVEX); for A_OPREG the opcode's register
    uint8_t base             # of the memory operand: 0-15, REG_NONE, REG_RIP
    uint8_t index            # 0-15 (31 with A_VSIB), REG_NONE
    uint8_t scale            # 1 2 4 8
    uint8_t vvvv             # 0-15 (31)
    uint8_t opsize           # effective operand size in bytes: 1, 2, 4, 8 (for near branches and PUSH/POP in 64-bit mode: 8, or 2)
    uint8_t addrsize         # effective address size in bytes: 2, 4, 8
    uint8_t mem_access       # M_*
    uint8_t flags_read       # may read
    uint8_t flags_killed     # certainly overwritten (or left undefined) whatever the operands are
    uint8_t imm_size         # bytes of immediate (also branch displacement; far pointer: 4 or 6; ENTER: 3), 0 if none
    uint8_t modrm_off        # offset of the ModRM byte within the instruction
    uint8_t opcode_off       # offset of the opcode byte (of the last one, behind 0F, 0F 38...; for VEX/EVEX behind the prefix)
    uint8_t imm_off          # offset of the immediate
    uint8_t evex_p[3]        # the three EVEX payload bytes; for VEX: the bytes behind C4/C5 (C5: one, [0]; C4: two)
    uint8_t feature          # FT_* that it needs, and V_LENGTH; 0: none
    uint8_t masked           # MASKED_*; 0: the memory operand is accessed whole
    uint16_t mem_width       # bytes that the memory operand's access touches; 0 if not accessed or of another kind
    uint16_t attr            # A_*
    int64_t disp             # sign-extended displacement, or moffs (zero-extended)
    int64_t imm              # immediate, sign-extended from imm_size (the raw bits for imm_size 8); branch displacement too

# Decode the instruction at `code`, of which at most `avail` bytes may be read. `mode` is 16, 32 or 64.
# Returns the length (1-15); 0 if the instruction needs more than `avail` bytes (avail < 15); -1 if it is over 15 bytes
# (#GP). An undefined encoding returns its length with cls = C_INVALID.
cdef int decode(const uint8_t* code, int avail, int mode, Insn* out) noexcept nogil
