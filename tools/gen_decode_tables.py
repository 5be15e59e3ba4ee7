"""Write src/pyhyve/cpu/bt/decode_tables.h: the instruction decoder's tables.

Every encoding that the tables tell apart is built as a sample and decoded by iced-x86; what it says of the sample
becomes one *leaf* (class, operands, access, flags). Per opcode the samples are then folded into a decision tree over
the few things that select between them: mandatory prefix, operand size, 64-bit mode, ModRM fields, vector length.

    tools/gen_decode_tables.py [--list] [output]

`--list` prints the mnemonics of each class instead, for review.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from iced_x86 import (
    Code,
    CpuidFeature,
    Decoder,
    DecoderOptions,
    EncodingKind,
    Instruction,
    InstructionInfoFactory,
    MemorySize,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpCodeOperandKind,
    RflagsBits,
)

from pyhyve.cpu.bt.features import AVX512VL, NUMBERS

OUTPUT: Final = Path(__file__).resolve().parent.parent / "src/pyhyve/cpu/bt/decode_tables.h"


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _names(enum: object) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if name.isupper() and isinstance(value, int)}


MNEMONIC: Final = _names(Mnemonic)
KIND: Final = _names(OpCodeOperandKind)
FEATURE: Final = _names(CpuidFeature)
CODE: Final = _names(Code)

# The selectors of the decision tree: places in the decoder's array of selectors.
PP, OSZ, M64, MOD, REG, RM, W, L, BC = range(9)
SIZES: Final = {PP: 4, OSZ: 3, M64: 2, MOD: 2, REG: 8, RM: 8, W: 2, L: 4, BC: 2}

# As in decode.pxd.
C_INVALID, C_COPY, C_NOP, C_BRANCH, C_STACK, C_STRING, C_SYSTEM = range(7)
A_MODRM, A_REG_GPR, A_RM_GPR, A_VVVV_GPR, A_OPREG = 1, 4, 8, 16, 32
A_REG_8, A_RM_8, A_MOFFS, A_NO_ACCESS, A_BITOFF, A_VSIB = 64, 128, 256, 512, 1024, 2048
A_W0 = 8192
M_NONE, M_READ, M_WRITE, M_RW = range(4)
FL_CF, FL_PF, FL_AF, FL_ZF, FL_SF, FL_OF, FL_ALL = 1, 2, 4, 8, 16, 32, 63

# What the decoder checks or does beyond the leaf; as in decode.pyx.
K_LOCK = 0x0001  # LOCK is allowed
K_VVVV = 0x0002  # vvvv must be 1111
K_KREG = 0x0004  # ModRM.reg is a mask register: R, R' must be 0
K_VVVVK = 0x0008  # vvvv is a mask register
K_MASK = 0x0010  # EVEX.aaa may be non-zero
K_MASKREQ = 0x0020  # EVEX.aaa must be non-zero
K_ZERO = 0x0040  # EVEX.z is allowed
K_UNIQUE = 0x0080  # destination, index (and VEX mask) must differ
K_UNIQDEST = 0x0100  # destination must differ from both sources
K_NOMEM = 0x0200  # ModRM.mod is ignored: always registers
K_GPRREG = 0x0400  # EVEX: ModRM.reg is a general register: R' must be 0
K_SHIFT = 0x0800  # immediate shift count: no flag changes if the masked count is 0
K_REPCMP = 0x1000  # with REP, flags may remain
K_FARPTR = 0x2000  # immediate is a far pointer: zero-extended


@dataclass(frozen=True, slots=True, order=True)
class Leaf:
    cls: int = C_INVALID
    imm: int = 0  # bytes
    opsize: int = 0  # bytes
    access: int = M_NONE
    width: int = 0  # bytes
    attr: int = 0
    flags_read: int = 0
    flags_killed: int = 0
    check: int = 0
    disp8: int = 1  # EVEX: factor of disp8
    feature: int = 0  # FEATURES, and V_LENGTH
    masked: int = 0  # which bytes a mask leaves unaccessed: see masking()


Selectors = tuple[int, ...]  # values in the order of SIZES
Samples = dict[Selectors, Leaf]

BAD_FEATURES: Final = words(
    """
    D3NOW D3NOWEXT CYRIX_D3NOW XOP TBM FMA4 LWP SVM SKINIT SKINIT_OR_SVM SEV_ES SEV_SNP TDX SGX1 VMX SMX SMM RTM HLE
    HLE_OR_RTM TSXLDTRK AMX_BF16 AMX_COMPLEX AMX_FP16 AMX_INT8 AMX_TILE CET_SS PADLOCK_ACE PADLOCK_GMI PADLOCK_PHE
    PADLOCK_PMM PADLOCK_RNG PADLOCK_UNDOC CENTAUR_AIS CYRIX_DDI CYRIX_DMI CYRIX_EMMI CYRIX_FPU CYRIX_SHR CYRIX_SMINT
    CYRIX_SMINT_0F7E CYRIX_SMM KNC UINTR ENQCMD MOVDIR64B PTWRITE KL WIDE_KL AESKLE HRESET LKGS FRED MSRLIST WRMSRNS
    INVLPGB MCOMMIT RDPRU RMPQUERY CLZERO PCONFIG WAITPKG UDBG INVEPT INVVPID MONITORX TSE OSS IA64 PCOMMIT
    AVX512PF AVX512ER AVX512_4FMAPS AVX512_4VNNIW RAO_INT CMPCCXADD
    INTEL286_ONLY INTEL386_ONLY INTEL386_A0_ONLY INTEL486_A_ONLY INTEL8086_ONLY MOV_TR UMOV FPU287XL_ONLY
    """
)
# Features that CPUID may hide, each with its number in decode.pxd (FT_*): such an instruction is #UD then. What needs
# AVX or AVX512F alone needs no number: XCR0 has that state enabled, or VEX and EVEX are undefined anyway.
FEATURES: Final = {name.upper(): number for name, number in NUMBERS.items() if number != AVX512VL}
V_LENGTH: Final = 64  # Leaf.feature: AVX512VL as well

# Leaf.masked
MASKED: Final = 0x20  # bits 0-1: log2 of an element's bytes, bits 2-4: log2 of the number of mask bits
MASKED_PACKED: Final = 0x40  # as many elements as mask bits are set, one behind the other
MASKED_VECTOR: Final = 0x80  # the mask is the sign bits of vvvv
# Instructions whose memory operand is read or written whole, whatever the mask is: Intel SDM vol 2, "Exception
# Classifications of EVEX-Encoded Instructions", those whose name ends in NF.
MASK_SUPPRESSES_NO_FAULT: Final = words(
    """VALIGND VALIGNQ VCVTNE2PS2BF16 VDBPSADBW VEXTRACTF32X4 VEXTRACTF32X8 VEXTRACTF64X2 VEXTRACTF64X4 VEXTRACTI32X4
    VEXTRACTI32X8 VEXTRACTI64X2 VEXTRACTI64X4 VGF2P8AFFINEINVQB VGF2P8AFFINEQB VINSERTF32X4 VINSERTF32X8 VINSERTF64X2
    VINSERTF64X4 VINSERTI32X4 VINSERTI32X8 VINSERTI64X2 VINSERTI64X4 VMOVDDUP VMOVSHDUP VMOVSLDUP VPACKSSDW VPACKSSWB
    VPACKUSDW VPACKUSWB VPALIGNR VPCONFLICTD VPCONFLICTQ VPERMB VPERMD VPERMI2B VPERMI2D VPERMI2PD VPERMI2PS VPERMI2Q
    VPERMI2W VPERMILPD VPERMILPS VPERMPD VPERMPS VPERMQ VPERMT2B VPERMT2D VPERMT2PD VPERMT2PS VPERMT2Q VPERMT2W VPERMW
    VPMADDUBSW VPMADDWD VPMULTISHIFTQB VPSHUFB VPSHUFD VPSHUFHW VPSHUFLW VPSLLD VPSLLQ VPSLLW VPSRAD VPSRAQ VPSRAW
    VPSRLD VPSRLQ VPSRLW VPUNPCKHBW VPUNPCKHDQ VPUNPCKHQDQ VPUNPCKHWD VPUNPCKLBW VPUNPCKLDQ VPUNPCKLQDQ VPUNPCKLWD
    VSHUFF32X4 VSHUFF64X2 VSHUFI32X4 VSHUFI64X2 VSHUFPD VSHUFPS VUNPCKHPD VUNPCKHPS VUNPCKLPD VUNPCKLPS"""
)
SHIFTS_BY_IMMEDIATE: Final = (0x71, 0x72, 0x73)  # opcodes of shifts of which the mask does suppress faults
# Elements of the mask that are wider than those of the operand.
MASK_ELEMENTS: Final = {
    "VPMULDQ": 8, "VPMULUDQ": 8, "VPDPBUSD": 4, "VPDPBUSDS": 4, "VPDPWSSD": 4, "VPDPWSSDS": 4, "VDPBF16PS": 4,
}  # fmt: skip
BAD_MNEMONICS: Final = words("UD0 UD1 UD2 XABORT XBEGIN XEND XTEST RSM GETSEC")
KEEP_MNEMONICS: Final = words("VMCALL VMMCALL RDSSPD RDSSPQ")
BRANCHES: Final = words(
    """JMP JMPE CALL RET RETF LOOP LOOPE LOOPNE JCXZ JECXZ JRCXZ INT INT1 INT3 INTO IRET IRETD IRETQ SYSCALL SYSRET
    SYSRETQ SYSENTER SYSEXIT SYSEXITQ
    JO JNO JB JAE JE JNE JBE JA JS JNS JP JNP JL JGE JLE JG"""
)
MICROCODED_BRANCHES: Final = words(
    "RETF INT INT1 INT3 INTO IRET IRETD IRETQ SYSCALL SYSRET SYSRETQ SYSENTER SYSEXIT SYSEXITQ"
)
STACK: Final = words("""PUSH POP PUSHF PUSHFD PUSHFQ POPF POPFD POPFQ PUSHA PUSHAD POPA POPAD ENTER LEAVE""")
STRINGS: Final = words(
    """MOVSB MOVSW MOVSD MOVSQ STOSB STOSW STOSD STOSQ LODSB LODSW LODSD LODSQ SCASB SCASW SCASD SCASQ
    CMPSB CMPSW CMPSD CMPSQ INSB INSW INSD OUTSB OUTSW OUTSD"""
)
NOPS: Final = words(
    """NOP RESERVED_NOP RESERVEDNOP ENDBR32 ENDBR64 PREFETCH PREFETCHW PREFETCHWT1 PREFETCHNTA PREFETCHT0 PREFETCHT1
    PREFETCHT2 PREFETCHIT0 PREFETCHIT1 CLDEMOTE RDSSPD RDSSPQ"""
)
SYSTEM: Final = words(
    """CPUID RDTSC RDTSCP RDPMC XGETBV XSETBV XSAVE XSAVE64 XSAVEC XSAVEC64 XSAVEOPT XSAVEOPT64 XSAVES XSAVES64
    XRSTOR XRSTOR64 XRSTORS XRSTORS64 FXSAVE FXSAVE64 FXRSTOR FXRSTOR64 FNSAVE FRSTOR FNSTENV FLDENV IN OUT CLI STI
    CLD STD LGDT LIDT LLDT LTR LMSW SGDT SIDT SLDT STR SMSW LAR LSL VERR VERW LDS LES LFS LGS LSS PAUSE MONITOR MWAIT
    RDPID RDFSBASE RDGSBASE WRFSBASE WRGSBASE WRMSR RDMSR SWAPGS CLAC STAC INVLPG INVPCID VMCALL VMMCALL HLT WBINVD
    WBNOINVD INVD XLATB MASKMOVQ MASKMOVDQU VMASKMOVDQU RDPKRU WRPKRU CLTS
    DAA DAS AAA AAS AAM AAD SALC BOUND ARPL"""
)
ACCESS: Final = {
    OpAccess.NONE: M_NONE,
    OpAccess.NO_MEM_ACCESS: M_NONE,
    OpAccess.READ: M_READ,
    OpAccess.COND_READ: M_READ,
    OpAccess.WRITE: M_WRITE,
    OpAccess.COND_WRITE: M_WRITE,
    OpAccess.READ_WRITE: M_RW,
    OpAccess.READ_COND_WRITE: M_RW,
}
NO_MEMORY: Final = frozenset(("LEA", "NOP"))
BYTE_KINDS: Final = frozenset(("R8_REG", "R8_OR_MEM", "R8_OPCODE", "AL"))
NEAR_BRANCH_OPCODES: Final = frozenset(
    [(0, n) for n in [*range(0x70, 0x80), 0xC2, 0xC3, *range(0xE0, 0xE4), 0xE8, 0xE9, 0xEB]]
    + [(1, n) for n in range(0x80, 0x90)]
)
PREFIX_BYTES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x0F))
factory: Final = InstructionInfoFactory()


def arithmetic_flags(bits: int) -> int:
    """Translate iced's RflagsBits to FL_*."""
    return (
        (FL_CF if bits & RflagsBits.CF else 0)
        | (FL_PF if bits & RflagsBits.PF else 0)
        | (FL_AF if bits & RflagsBits.AF else 0)
        | (FL_ZF if bits & RflagsBits.ZF else 0)
        | (FL_SF if bits & RflagsBits.SF else 0)
        | (FL_OF if bits & RflagsBits.OF else 0)
    )


def class_of(insn: Instruction, kinds: list[str]) -> int:
    name = MNEMONIC[insn.mnemonic]
    features = {FEATURE[f] for f in insn.cpuid_features()}
    if name in BAD_MNEMONICS or (features & BAD_FEATURES and name not in KEEP_MNEMONICS):
        return C_INVALID
    if insn.is_string_instruction and name in STRINGS:
        return C_STRING
    if name in BRANCHES:
        return C_BRANCH
    if name in STACK:
        return C_STACK
    if name in NOPS:
        return C_NOP
    if name in SYSTEM:
        return C_SYSTEM
    if name == "MOV" and any(k in ("SEG_REG", "CR_REG", "DR_REG", "TR_REG") for k in kinds):
        return C_SYSTEM
    if any(k.startswith("MEM_VSIB") for k in kinds):
        return C_SYSTEM
    return C_COPY


def is_microcoded(insn: Instruction, name: str, cls: int) -> bool:
    if cls == C_SYSTEM or name in MICROCODED_BRANCHES:
        return True
    if cls == C_STRING and name.startswith(("INS", "OUTS")):
        return True
    return cls == C_BRANCH and (
        insn.is_jmp_far or insn.is_jmp_far_indirect or insn.is_call_far or insn.is_call_far_indirect
    )


def flags_of(insn: Instruction, name: str, cls: int, kinds: list[str]) -> tuple[int, int, int]:
    """Return flags read, flags killed, and the checks that qualify them."""
    if is_microcoded(insn, name, cls):
        return FL_ALL, 0, 0
    if cls in (C_NOP, C_INVALID):
        return 0, 0, 0
    read = arithmetic_flags(insn.rflags_read)
    killed = arithmetic_flags(insn.rflags_modified | insn.rflags_undefined)
    if cls == C_BRANCH:
        return read, 0, 0
    if name in ("FCOMI", "FCOMIP", "FUCOMI", "FUCOMIP"):
        return read, FL_CF | FL_PF | FL_ZF, 0
    if name in ("SHL", "SAL", "SHR", "SAR", "ROL", "ROR", "RCL", "RCR", "SHLD", "SHRD"):
        killed = FL_CF | FL_OF if name in ("ROL", "ROR", "RCL", "RCR") else FL_ALL
        if "CL" in kinds:
            return read, 0, 0
        return read, killed, 0 if "IMM8_CONST_1" in kinds else K_SHIFT
    if cls == C_STRING and name.startswith(("CMPS", "SCAS")):
        return read, killed, K_REPCMP
    return read, killed, 0


def size_of(insn: Instruction) -> int:
    size = insn.memory_size
    if MemorySizeExt.is_broadcast(size):
        return int(MemorySizeExt.element_size(size))
    return int(MemorySizeExt.size(size))


def feature_of(insn: Instruction, name: str, cls: int) -> int:
    """Return Leaf.feature. Of AVX512VL and another feature, both are needed."""
    if cls in (C_INVALID, C_NOP) or name in KEEP_MNEMONICS:
        return 0
    found = {FEATURE[f] for f in insn.cpuid_features()}
    needed = sorted(FEATURES[f] for f in found if f in FEATURES)
    if len(needed) > 1:
        raise ValueError(f"{insn}: needs {found}")
    return (needed[0] if needed else 0) | (V_LENGTH if "AVX512VL" in found else 0)


def masking(insn: Instruction, name: str, bits: int) -> int:
    """Return Leaf.masked of a form with a memory operand, by the vector's length in bits.

    Mask bit i guards the bytes from i * element on, modulo the operand's width: so it is for whole vectors, scalars and
    broadcasts alike.
    """
    if name.startswith(("VMASKMOV", "VPMASKMOV")):
        element = 8 if name.endswith(("PD", "Q")) else 4
        return MASKED | MASKED_VECTOR | (bits // 8 // element).bit_length() - 1 << 2 | element.bit_length() - 1
    shifts = insn.op_code().op_code in SHIFTS_BY_IMMEDIATE and name.startswith("VPS")
    if (name in MASK_SUPPRESSES_NO_FAULT and not shifts) or not insn.op_code().can_use_op_mask_register:
        return 0
    width = size_of(insn)
    element = MASK_ELEMENTS.get(name, int(MemorySizeExt.element_size(insn.memory_size)))
    if insn.is_broadcast:
        element = width
        count = int(_names(MemorySize)[insn.memory_size].split("_")[0].removeprefix("BROADCAST")) // 8 // element
    elif "BROADCAST" in name:
        kind = name.split("BROADCAST")[1]
        if kind[1:].startswith(("32", "64")):
            element = int(kind[1:3]) // 8
        count = bits // 8 // element
    else:
        count = width // element
    packed = MASKED_PACKED if "COMPRESS" in name or "EXPAND" in name else 0
    return MASKED | packed | count.bit_length() - 1 << 2 | element.bit_length() - 1


def operand_size(insn: Instruction, name: str, cls: int, kinds: list[str], effective: int, mode: int) -> int:
    if cls == C_STRING:
        return size_of(insn)
    op = insn.op_code()
    if cls in (C_BRANCH, C_STACK):
        if mode == 64 and effective == 4 and (op.default_op_size64 or op.force_op_size64 or op.intel_force_op_size64):
            return 8
        if mode == 64 and name in ("LOOP", "LOOPE", "LOOPNE", "JCXZ", "JECXZ", "JRCXZ") and effective == 4:
            return 8
        return effective
    if op.force_op_size64 and mode == 64:
        return 8
    if kinds and kinds[0] in BYTE_KINDS:
        return 1
    if name in ("IN", "OUT"):
        return 1 if "AL" in kinds else min(effective, 4)
    if kinds and kinds[0] == "MEM_OFFS" and "AL" in kinds:
        return 1
    # where the encoding names a general register, its size: 66 may be no operand size at all (MOVD, PEXTRW, CRC32)
    for kind in kinds:
        if kind.startswith(("R16_", "R32_", "R64_")):
            return int(kind[1:3]) // 8
    return effective


def leaf_of(insn: Instruction, *, effective: int, mode: int, memory: bool, imm: int, modrm: bool) -> Leaf:
    """Describe a valid sample. `effective` is the operand size by prefixes, `imm` the bytes behind ModRM and disp."""
    op = insn.op_code()
    kinds = [KIND[k] for k in op.op_kinds()]
    name = MNEMONIC[insn.mnemonic]
    cls = class_of(insn, kinds)
    if cls == C_INVALID:
        return Leaf(attr=A_MODRM if modrm else 0)
    attr = A_MODRM if modrm else 0
    check = 0
    access, width = M_NONE, 0
    for kind in kinds:
        if kind in ("R8_REG", "R16_REG", "R32_REG", "R64_REG"):
            attr |= A_REG_GPR | (A_REG_8 if kind == "R8_REG" else 0)
            check |= K_GPRREG
        elif kind in ("R16_RM", "R32_RM", "R64_RM"):
            attr |= A_RM_GPR
        elif kind.endswith("_OR_MEM") and kind[0] == "R":
            if not memory:
                attr |= A_RM_GPR | (A_RM_8 if kind == "R8_OR_MEM" else 0)
        elif kind in ("R8_OPCODE", "R16_OPCODE", "R32_OPCODE", "R64_OPCODE"):
            attr |= A_OPREG | (A_RM_8 if kind == "R8_OPCODE" else 0)
        elif kind in ("R32_VVVV", "R64_VVVV"):
            attr |= A_VVVV_GPR
        elif kind in ("K_REG", "KP1_REG"):
            check |= K_KREG
        elif kind == "K_VVVV":
            check |= K_VVVVK
        elif kind == "MEM_OFFS":
            attr |= A_MOFFS
            imm = 0
        elif kind.startswith("MEM_VSIB"):
            attr |= A_VSIB
        elif kind in ("FARBR2_2", "FARBR4_2"):
            check |= K_FARPTR
    if op.ignores_mod_bits:
        check |= K_NOMEM
        attr |= A_RM_GPR
    if (memory and not check & K_NOMEM) or attr & A_MOFFS:
        for used in factory.info(insn).used_memory():
            if attr & A_MOFFS or used.base == insn.memory_base:
                access = ACCESS[used.access]
                break
        else:
            if name not in NO_MEMORY and cls != C_SYSTEM:
                raise ValueError(f"{insn}: no memory operand")
        if access == M_NONE or cls == C_NOP or name in ("LEA", "INVLPG"):
            access = M_NONE
            attr |= A_NO_ACCESS
        else:
            width = size_of(insn)
            if not width and cls != C_SYSTEM:
                raise ValueError(f"{insn}: accesses memory of unknown size")
        if name in ("CLFLUSH", "CLFLUSHOPT", "CLWB"):
            access, width, attr = M_READ, 1, attr & ~A_NO_ACCESS
        if name in ("BT", "BTS", "BTR", "BTC") and attr & A_REG_GPR:
            attr |= A_BITOFF
    if op.can_use_lock_prefix and memory:
        check |= K_LOCK
    if op.requires_unique_reg_nums:
        check |= K_UNIQUE
    if op.requires_unique_dest_reg_num:
        check |= K_UNIQDEST
    if op.can_use_op_mask_register:
        check |= K_MASK
    if op.require_op_mask_register:
        check |= K_MASKREQ
    if op.can_use_zeroing_masking and not (memory and access == M_WRITE):
        check |= K_ZERO
    read, killed, qualified = flags_of(insn, name, cls, kinds)
    size = operand_size(insn, name, cls, kinds, effective, mode)
    feature = feature_of(insn, name, cls)
    return Leaf(cls, imm, size, access, width, attr, read, killed, check | qualified, feature=feature)


def decode_sample(mode: int, code: bytes, options: int = DecoderOptions.NONE) -> Instruction | None:
    insn = Decoder(mode, code, options).decode()  # type: ignore[arg-type]  # as for Code, below
    return None if insn.is_invalid else insn


FILLER: Final = bytes([1] * 10)


def legacy_modrm(map_: int, opcode: int) -> bool:
    """Whether an opcode of the one-byte map, 0F, 0F 38 or 0F 3A has a ModRM byte."""
    if map_ >= 2:
        return True
    if map_ == 1:
        return not (
            opcode in (0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0A, 0x0B, 0x0C, 0x0E, 0x77, 0xA0, 0xA1, 0xA2, 0xA8, 0xA9)
            or opcode in (0xAA,)
            or 0x24 <= opcode <= 0x27
            or 0x30 <= opcode <= 0x3F
            or 0x80 <= opcode <= 0x8F
            or 0xC8 <= opcode <= 0xCF
        )
    if opcode < 0x40:
        return opcode & 7 < 4
    return (
        opcode in (0x62, 0x63, 0x69, 0x6B, 0xC0, 0xC1, 0xC4, 0xC5, 0xC6, 0xC7, 0xF6, 0xF7, 0xFE, 0xFF)
        or 0x80 <= opcode <= 0x8F
        or 0xD0 <= opcode <= 0xD3
        or 0xD8 <= opcode <= 0xDF
    )


def legacy_samples(map_: int, opcode: int) -> Samples:
    escape = {0: b"", 1: b"\x0f", 2: b"\x0f\x38", 3: b"\x0f\x3a"}[map_]
    modrm = legacy_modrm(map_, opcode)
    invalid = Leaf(attr=A_MODRM if modrm else 0)
    nop_space = map_ == 1 and (opcode == 0x0D or 0x18 <= opcode <= 0x1F)
    forms: list[tuple[int, int, int]] = [(0, 0, 0)]
    if modrm:
        forms = [(0, reg, 0) for reg in range(8)] + [(1, reg, rm) for reg in range(8) for rm in range(8)]
    found: Samples = {}
    for mode, w in ((16, 0), (32, 0), (64, 0), (64, 1)):
        for data16 in (0, 1):
            effective = 8 if w else (2 if (mode == 16) != bool(data16) else 4)
            for rep in (b"", b"\xf3", b"\xf2"):
                pp = {b"": data16, b"\xf3": 2, b"\xf2": 3}[rep]
                lead = (b"\x66" if data16 else b"") + rep + (b"\x48" if w else b"") + escape + bytes([opcode])
                for mod, reg, rm in forms:
                    selectors = (pp, {2: 0, 4: 1, 8: 2}[effective], int(mode == 64), mod, reg, rm, w, 0, 0)
                    head = lead
                    if modrm:
                        head += bytes([0xC0 | reg << 3 | rm]) if mod else bytes([0x43 | reg << 3, 1])
                    options = DecoderOptions.NONE
                    if (map_, opcode) in NEAR_BRANCH_OPCODES or (map_ == 0 and opcode == 0xFF and reg in (2, 4)):
                        options = DecoderOptions.AMD
                    insn = None
                    if not (map_ == 0 and mode == 64 and 0x40 <= opcode <= 0x4F):
                        insn = decode_sample(mode, head + FILLER, options)
                    if insn is not None and insn.op_code().ignores_mod_bits and not mod:
                        insn = decode_sample(mode, lead + bytes([0xC3 | reg << 3]) + FILLER, options)
                        head = head[:-1]
                    if nop_space:
                        attr = A_MODRM | (0 if mod else A_NO_ACCESS)
                        leaf = Leaf(C_NOP, 0, effective, attr=attr)
                    elif insn is None or insn.encoding != EncodingKind.LEGACY:
                        leaf = invalid
                    else:
                        leaf = leaf_of(
                            insn,
                            effective=effective,
                            mode=mode,
                            memory=modrm and not mod,
                            imm=insn.len - len(head),
                            modrm=modrm,
                        )
                    if found.setdefault(selectors, leaf) != leaf:
                        raise ValueError(f"{map_} {opcode:02x}: {leaf} != {found[selectors]}")
    return found


def ignores_w(mode: int, head: bytes, p1: int) -> bool:
    """Whether W selects between two instructions in 64-bit mode, but not in `mode`. `p1` is where W's byte stands."""

    def codes(bits: int) -> tuple[int | None, ...]:
        flipped = head[:p1] + bytes([head[p1] ^ 0x80]) + head[p1 + 1 :]
        found = (decode_sample(bits, sample + FILLER) for sample in (head, flipped))
        return tuple(insn.code if insn is not None else None for insn in found)

    return mode != 64 and len(set(codes(mode))) == 1 and len(set(codes(64))) == 2


def vector_forms(group: bool) -> Iterator[tuple[int, int]]:
    for mod in (0, 1):
        for reg in range(8) if group else (1,):
            yield mod, reg


def vex_samples(map_: int, opcode: int) -> Samples:
    group = (map_, opcode) in ((1, 0x71), (1, 0x72), (1, 0x73), (1, 0xAE), (2, 0xF3))
    modrm = (map_, opcode) != (1, 0x77)
    found: Samples = {}
    for mode in (32, 64):
        for pp in range(4):
            for w in (0, 1):
                for length in (0, 1):
                    for mod, reg in vector_forms(group):
                        leaf = vex_leaf(mode, map_, opcode, pp, w, length, mod, reg, modrm)
                        found[(pp, 0, int(mode == 64), mod, reg, 0, w, length, 0)] = leaf
    return found


def vex_leaf(mode: int, map_: int, opcode: int, pp: int, w: int, length: int, mod: int, reg: int, modrm: bool) -> Leaf:
    tails = [bytes([0xC3 | reg << 3])] if mod else [bytes([0x43 | reg << 3, 1]), bytes([0x44 | reg << 3, 0x13, 1])]
    if not modrm:
        tails = [b""]
    for vvvv in (15, 14, 11):
        for tail in tails:
            head = bytes([0xC4, 0xE0 | map_, w << 7 | vvvv << 3 | length << 2 | pp, opcode]) + tail
            insn = decode_sample(mode, head + FILLER)
            if insn is None or insn.encoding != EncodingKind.VEX:
                continue
            effective = 8 if w and mode == 64 else 4
            leaf = leaf_of(
                insn, effective=effective, mode=mode, memory=modrm and not mod, imm=insn.len - len(head), modrm=modrm
            )
            check = leaf.check
            masked = masking(insn, MNEMONIC[insn.mnemonic], 128 << length) if leaf.cls == C_COPY and not mod else 0
            if leaf.cls != C_INVALID:
                other = bytes([0xC4, 0xE0 | map_, w << 7 | 12 << 3 | length << 2 | pp, opcode])
                if decode_sample(mode, other + tail + FILLER) is None:
                    check |= K_VVVV
            attr = leaf.attr | (A_W0 if ignores_w(mode, head, 2) else 0)
            return replace(leaf, check=check, masked=masked, attr=attr)
    return Leaf(attr=A_MODRM if modrm else 0)


def evex_samples(map_: int, opcode: int) -> Samples:
    group = (map_, opcode) in ((1, 0x71), (1, 0x72), (1, 0x73), (2, 0xC6), (2, 0xC7))
    found: Samples = {}
    for mode in (32, 64):
        for pp in range(4):
            for w in (0, 1):
                for length in range(4):
                    for broadcast in (0, 1):
                        for mod, reg in vector_forms(group):
                            leaf = evex_leaf(mode, map_, opcode, pp, w, length, broadcast, mod, reg)
                            for each in range(8) if not group else (reg,):
                                for rm in range(8):
                                    key = (pp, 0, int(mode == 64), mod, each, rm, w, length, broadcast)
                                    found[key] = leaf
    return found


def evex_leaf(
    mode: int, map_: int, opcode: int, pp: int, w: int, length: int, broadcast: int, mod: int, reg: int
) -> Leaf:
    tails = [bytes([0xC3 | reg << 3])] if mod else [bytes([0x43 | reg << 3, 1]), bytes([0x44 | reg << 3, 0x13, 1])]

    def head(vvvv: int, mask: int, zero: int = 0) -> bytes:
        p2 = zero << 7 | length << 5 | broadcast << 4 | 8 | mask
        return bytes([0x62, 0xF0 | map_, w << 7 | vvvv << 3 | 4 | pp, p2, opcode])

    def attempt(tail: bytes, vvvv: int, mask: int, zero: int = 0) -> Instruction | None:
        return decode_sample(mode, head(vvvv, mask, zero) + tail + FILLER)

    for mask in (0, 1):
        for tail in tails:
            insn = attempt(tail, 15, mask)
            if insn is None or insn.encoding != EncodingKind.EVEX:
                continue
            effective = 8 if w and mode == 64 else 4
            memory = not mod
            leaf = leaf_of(
                insn, effective=effective, mode=mode, memory=memory, imm=insn.len - 5 - len(tail), modrm=True
            )
            if leaf.cls == C_INVALID:
                return leaf
            check = leaf.check & ~(K_MASK | K_MASKREQ | K_ZERO)
            if attempt(tail, 12, mask) is None:
                check |= K_VVVV
            if attempt(tail, 15, 1) is not None:
                check |= K_MASK
            if attempt(tail, 15, 0) is None:
                check |= K_MASKREQ
            if attempt(tail, 15, 1, 1) is not None:
                check |= K_ZERO
            disp8 = insn.memory_displacement if memory else 1
            masked = masking(insn, MNEMONIC[insn.mnemonic], 128 << length) if memory and leaf.cls == C_COPY else 0
            attr = leaf.attr | (A_W0 if ignores_w(mode, head(15, mask) + tail, 2) else 0)
            return replace(leaf, check=check, disp8=disp8, masked=masked, attr=attr)
    return Leaf(attr=A_MODRM)


class Tables:
    """Leaves and nodes, each kept once."""

    def __init__(self) -> None:
        self.leaves: dict[Leaf, int] = {}
        self.nodes: list[int] = []
        self.known: dict[tuple[int, ...], int] = {}

    def leaf(self, leaf: Leaf) -> int:
        return 0x8000 | self.leaves.setdefault(leaf, len(self.leaves))

    def tree(self, samples: Samples) -> int:
        """Return the reference of a small tree that tells the samples apart."""
        return self.split({key: self.leaf(leaf) for key, leaf in samples.items()})

    def split(self, samples: dict[Selectors, int]) -> int:
        """Branch on the selector that leaves the fewest different leaves in its branches, then go on in each."""
        different = set(samples.values())
        if len(different) == 1:
            return different.pop()
        best: tuple[int, int, dict[int, dict[Selectors, int]]] | None = None
        for selector in SIZES:
            parts: dict[int, dict[Selectors, int]] = {}
            for key, leaf in samples.items():
                parts.setdefault(key[selector], {})[key] = leaf
            if len(parts) == 1:
                continue
            cost = sum(len(set(part.values())) for part in parts.values()) - len(parts)
            cost = cost * 16 + SIZES[selector]
            if best is None or cost < best[0]:
                best = (cost, selector, parts)
        if best is None:
            raise ValueError(f"cannot tell apart {[list(self.leaves)[n & 0x7FFF] for n in different]}")
        _, selector, parts = best
        filler = self.leaf(Leaf(attr=A_MODRM))
        children = [self.split(parts[value]) if value in parts else filler for value in range(SIZES[selector])]
        if len(set(children)) == 1:
            return children[0]
        node = (selector, *children)
        if node not in self.known:
            self.known[node] = len(self.nodes)
            self.nodes.extend(node)
        return self.known[node]


ROWS: Final = [
    *(("legacy", map_) for map_ in range(4)),
    *(("vex", map_) for map_ in range(1, 4)),
    *(("evex", map_) for map_ in (1, 2, 3, 5, 6)),
]
SAMPLERS: Final = {"legacy": legacy_samples, "vex": vex_samples, "evex": evex_samples}


def build() -> tuple[Tables, list[list[int]]]:
    tables = Tables()
    tables.leaf(Leaf())
    tables.leaf(Leaf(attr=A_MODRM))
    roots = []
    for kind, map_ in ROWS:
        row = []
        for opcode in range(256):
            if kind == "legacy" and (
                (map_ == 0 and opcode in PREFIX_BYTES) or (map_ == 1 and opcode in (0x0F, 0x38, 0x3A))
            ):
                row.append(tables.leaf(Leaf(attr=A_MODRM if opcode == 0x0F else 0)))
                continue
            row.append(tables.tree(SAMPLERS[kind](map_, opcode)))
        roots.append(row)
    if len(tables.nodes) >= 0x8000 or len(tables.leaves) >= 0x8000:
        raise ValueError("tables too large for 15-bit references")
    return tables, roots


def rows_of(values: list[int], form: str = "0x{:04x}") -> str:
    lines = []
    for start in range(0, len(values), 16):
        lines.append("  " + ", ".join(form.format(v) for v in values[start : start + 16]) + ",")
    return "\n".join(lines)


def write(path: Path) -> None:
    tables, roots = build()
    text = [
        "/* Generated by tools/gen_decode_tables.py; do not edit. */",
        "#ifndef PYHYVE_DECODE_TABLES_H",
        "#define PYHYVE_DECODE_TABLES_H",
        "#include <stdint.h>",
        "",
        "/* One kind of instruction; see Leaf in the generator. */",
        "typedef struct {",
        "  uint16_t attr, check, width;",
        "  uint8_t cls, imm, opsize, access, flags_read, flags_killed, disp8, feature, masked, pad;",
        "} decode_leaf_t;",
        "",
        "/* References: 0x8000 | leaf, or the index of a node: selector, then one reference a value. */",
        f"static const uint16_t decode_root[{len(roots)}][256] = {{",
    ]
    for (kind, map_), row in zip(ROWS, roots, strict=True):
        text.append(f" {{ /* {kind} map {map_} */\n{rows_of(row)}\n }},")
    text.append("};\n")
    text.append(f"static const uint16_t decode_nodes[{len(tables.nodes)}] = {{\n{rows_of(tables.nodes)}\n}};\n")
    text.append(f"static const decode_leaf_t decode_leaves[{len(tables.leaves)}] = {{")
    for leaf in tables.leaves:
        fields = (leaf.attr, leaf.check, leaf.width, leaf.cls, leaf.imm, leaf.opsize, leaf.access)
        more = (leaf.flags_read, leaf.flags_killed, leaf.disp8, leaf.feature, leaf.masked)
        text.append("  {" + ", ".join(str(v) for v in fields + more) + ", 0},")
    text.append("};\n")
    text.append("/* 1: the opcode has a ModRM byte (one-byte map, 0F, 0F 38, 0F 3A). */")
    text.append("static const uint8_t decode_modrm[4][256] = {")
    for map_ in range(4):
        text.append(" {\n" + rows_of([int(legacy_modrm(map_, n)) for n in range(256)], "{}") + "\n },")
    text.append("};\n\n#endif")
    path.write_text("\n".join(text) + "\n")
    print(f"{len(tables.leaves)} leaves, {len(tables.nodes)} node words")


def print_classes() -> None:
    names: dict[int, set[str]] = {}
    for value, name in CODE.items():
        if name in ("INVALID",) or name.startswith(("DECLARE", "MVEX", "ZERO_BYTES")):
            continue
        insn = Instruction()
        insn.code = value  # type: ignore[assignment]  # the stubs take the enum's module for its type
        kinds = [KIND[k] for k in insn.op_code().op_kinds()]
        names.setdefault(class_of(insn, kinds), set()).add(MNEMONIC[insn.mnemonic])
    titles = ("invalid", "copy", "nop", "branch", "stack", "string", "system")
    for cls, title in enumerate(titles):
        print(f"{title}: {' '.join(sorted(names.get(cls, ())))}\n")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--list" in arguments:
        print_classes()
    else:
        write(Path(arguments[0]) if arguments else OUTPUT)
