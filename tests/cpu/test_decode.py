"""The translator's decoder against iced-x86, on random instructions; and what iced-x86 does not say, by example.

PYHYVE_FUZZ_N sets the number of random instructions (200,000 unless told; 10 million take some minutes) and
PYHYVE_FUZZ_SEED the seed.

Deliberate differences from iced-x86, which `expected` therefore leaves out or corrects:

| what | here |
| --- | --- |
| what a guest is never offered (`NEVER_OFFERED`): AMX, shadow stacks, VMX, SVM, SGX, TSX, ... | undefined (#UD) |
| 0F 0D, 0F 18 - 0F 1F: hints and reserved NOPs, MPX, RDSSP | one NOP class, all forms valid |
| 66 before a near branch in 64-bit mode | 16-bit operand size, as AMD's processors do (an option of iced-x86) |
| F3 90 with REX.B | XCHG with R8, as processors do, not PAUSE |
| flags killed | none by shifts by CL or by a masked count of 0, nor by repeated comparisons; FCOMI: ZF PF CF |
| flags of microcode (class system, far branches, INS, OUTS) | all read, none killed |
| access | conditional ones count as certain; CLFLUSH, CLFLUSHOPT, CLWB read one byte |
| length of an undefined instruction | not compared: processors differ |
"""

from __future__ import annotations

import os
import random
from typing import Any, Final

import pytest
from iced_x86 import (
    CpuidFeature,
    Decoder,
    DecoderError,
    DecoderOptions,
    EncodingKind,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpCodeOperandKind,
    OpKind,
    Register,
    RegisterExt,
    RflagsBits,
)

from pyhyve.cpu.bt.decode import decode_bytes

C_INVALID, C_COPY, C_NOP, C_BRANCH, C_STACK, C_STRING, C_SYSTEM = range(7)
A_MODRM, A_MEM, A_REG_GPR, A_RM_GPR, A_VVVV_GPR, A_OPREG = 1, 2, 4, 8, 16, 32
A_REG_8, A_RM_8, A_MOFFS, A_NO_ACCESS, A_BITOFF, A_VSIB, A_RIP = 64, 128, 256, 512, 1024, 2048, 4096
REG_NONE, REG_RIP = 0xFF, 0xFE
P_66, P_67, P_F2, P_F3, P_LOCK, P_SEG = 1, 2, 4, 8, 16, 32
M_NONE, M_READ, M_WRITE, M_RW = range(4)
CF, PF, AF, ZF, SF, OF, ALL = 1, 2, 4, 8, 16, 32, 63
ES, CS, SS, DS, FS, GS = range(6)


def names(enum: object) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if name.isupper() and isinstance(value, int)}


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MNEMONICS: Final = names(Mnemonic)
FEATURES: Final = names(CpuidFeature)
OPERANDS: Final = names(OpCodeOperandKind)
FACTORY: Final = InstructionInfoFactory()
SEGMENTS: Final = {
    Register.ES: ES,
    Register.CS: CS,
    Register.SS: SS,
    Register.DS: DS,
    Register.FS: FS,
    Register.GS: GS,
}

NEVER_OFFERED: Final = words(
    """D3NOW D3NOWEXT CYRIX_D3NOW XOP TBM FMA4 LWP SVM SKINIT SKINIT_OR_SVM SEV_ES SEV_SNP TDX SGX1 VMX SMX SMM RTM
    HLE_OR_RTM TSXLDTRK AMX_BF16 AMX_COMPLEX AMX_FP16 AMX_INT8 AMX_TILE CET_SS PADLOCK_ACE PADLOCK_GMI PADLOCK_PHE
    PADLOCK_PMM PADLOCK_RNG PADLOCK_UNDOC CENTAUR_AIS CYRIX_FPU CYRIX_EMMI UINTR ENQCMD MOVDIR64B PTWRITE KL WIDE_KL
    AESKLE HRESET LKGS FRED MSRLIST WRMSRNS INVLPGB MCOMMIT RDPRU RMPQUERY CLZERO PCONFIG WAITPKG UDBG INVEPT INVVPID
    MONITORX TSE OSS PCOMMIT AVX512PF AVX512ER AVX512_4FMAPS AVX512_4VNNIW RAO_INT CMPCCXADD"""
)
UNDEFINED: Final = words("UD0 UD1 UD2 XABORT XBEGIN XEND XTEST RSM GETSEC")
OFFERED: Final = words("VMCALL VMMCALL")
JUMPS: Final = words("JO JNO JB JAE JE JNE JBE JA JS JNS JP JNP JL JGE JLE JG LOOP LOOPE LOOPNE JCXZ JECXZ JRCXZ")
FAR: Final = words("RETF INT INT1 INT3 INTO IRET IRETD IRETQ SYSCALL SYSRET SYSRETQ SYSENTER SYSEXIT SYSEXITQ")
STACK: Final = words("PUSH POP PUSHF PUSHFD PUSHFQ POPF POPFD POPFQ PUSHA PUSHAD POPA POPAD ENTER LEAVE")
SYSTEM: Final = words(
    """CPUID RDTSC RDTSCP RDPMC XGETBV XSETBV XSAVE XSAVE64 XSAVEC XSAVEC64 XSAVEOPT XSAVEOPT64 XSAVES XSAVES64
    XRSTOR XRSTOR64 XRSTORS XRSTORS64 FXSAVE FXSAVE64 FXRSTOR FXRSTOR64 FNSAVE FRSTOR FNSTENV FLDENV IN OUT CLI STI
    CLD STD LGDT LIDT LLDT LTR LMSW SGDT SIDT SLDT STR SMSW LAR LSL VERR VERW LDS LES LFS LGS LSS PAUSE MONITOR MWAIT
    RDPID RDFSBASE RDGSBASE WRFSBASE WRGSBASE WRMSR RDMSR SWAPGS CLAC STAC INVLPG INVPCID VMCALL VMMCALL HLT WBINVD
    WBNOINVD INVD XLATB MASKMOVQ MASKMOVDQU VMASKMOVDQU RDPKRU WRPKRU CLTS
    DAA DAS AAA AAS AAM AAD SALC BOUND ARPL"""
)
SHIFTS: Final = words("SHL SAL SHR SAR ROL ROR RCL RCR SHLD SHRD")
FLAGS: Final = {
    RflagsBits.CF: CF,
    RflagsBits.PF: PF,
    RflagsBits.AF: AF,
    RflagsBits.ZF: ZF,
    RflagsBits.SF: SF,
    RflagsBits.OF: OF,
}
ACCESSES: Final = {
    OpAccess.READ: M_READ,
    OpAccess.COND_READ: M_READ,
    OpAccess.WRITE: M_WRITE,
    OpAccess.COND_WRITE: M_WRITE,
    OpAccess.READ_WRITE: M_RW,
    OpAccess.READ_COND_WRITE: M_RW,
}


def arithmetic(bits: int) -> int:
    return sum(ours for theirs, ours in FLAGS.items() if bits & theirs)


def is_hint(insn: Instruction) -> bool:
    code = insn.op_code()
    opcode = code.op_code >> 8 * (code.op_code_len - 1)
    return code.encoding == EncodingKind.LEGACY and code.table == 1 and (opcode == 0x0D or 0x18 <= opcode <= 0x1F)


def class_of(insn: Instruction, mnemonic: str, kinds: list[str]) -> int:
    if mnemonic in UNDEFINED:
        return C_INVALID
    if mnemonic not in OFFERED and any(FEATURES[f] in NEVER_OFFERED for f in insn.cpuid_features()):
        return C_INVALID
    if mnemonic == "NOP":
        return C_NOP
    if mnemonic in JUMPS or mnemonic in FAR or mnemonic in ("JMP", "CALL", "RET"):
        return C_BRANCH
    if mnemonic in STACK:
        return C_STACK
    if insn.is_string_instruction:
        return C_STRING
    if mnemonic in SYSTEM or insn.vsib is not None:
        return C_SYSTEM
    if mnemonic == "MOV" and any(kind in ("CR_REG", "DR_REG", "SEG_REG") for kind in kinds):
        return C_SYSTEM
    return C_COPY


def flags_of(insn: Instruction, mnemonic: str, cls: int, kinds: list[str]) -> tuple[int, int]:
    """Return the arithmetic flags read and killed."""
    far = insn.is_jmp_far or insn.is_jmp_far_indirect or insn.is_call_far or insn.is_call_far_indirect
    if cls == C_SYSTEM or far or mnemonic in FAR or (mnemonic.startswith(("INS", "OUTS")) and cls == C_STRING):
        return ALL, 0
    read = arithmetic(insn.rflags_read)
    killed = arithmetic(insn.rflags_modified)
    if mnemonic in SHIFTS:
        killed = CF | OF if mnemonic.startswith(("RO", "RC")) else ALL
        if "CL" in kinds:
            killed = 0
        if "IMM8" in kinds:
            wide = RegisterExt.size(insn.op0_register) == 8 or MemorySizeExt.size(insn.memory_size) == 8
            if insn.immediate8 & (63 if wide else 31) == 0:
                read = killed = 0
            elif mnemonic in ("RCL", "RCR"):
                read = CF
    if mnemonic in ("FCOMI", "FCOMIP", "FUCOMI", "FUCOMIP"):
        killed = ZF | PF | CF
    if cls == C_STRING and (insn.has_rep_prefix or insn.has_repne_prefix):
        killed = 0
    if cls in (C_NOP, C_BRANCH):
        killed = 0
    return read, killed


def general_registers(insn: Instruction, kinds: list[str]) -> set[tuple[int, str]]:
    """Return the general registers that the encoding names: number, "8", "8h" (AH CH DH BH) or "w"."""
    found = set()
    for n, kind in enumerate(kinds):
        if kind[0] != "R" or not kind.endswith(("_REG", "_RM", "_OR_MEM", "_OPCODE", "_VVVV")):
            continue
        if insn.op_kind(n) != OpKind.REGISTER:
            continue
        register = insn.op_register(n)
        if Register.AH <= register <= Register.BH:
            found.add((register - Register.AH + 4, "8h"))
        else:
            found.add(
                (
                    RegisterExt.number(RegisterExt.full_register(register)),
                    "8" if RegisterExt.size(register) == 1 else "w",
                )
            )
    return found


def our_general_registers(ours: dict[str, Any]) -> set[tuple[int, str]]:
    found = set()

    def add(number: int, byte: bool) -> None:
        high = byte and not ours["rex"] and 4 <= number < 8
        found.add((number, "8h" if high else "8" if byte else "w"))

    attr = ours["attr"]
    if attr & A_REG_GPR:
        add(ours["reg"], bool(attr & A_REG_8))
    if attr & (A_RM_GPR | A_OPREG) and not attr & A_MEM:
        add(ours["rm"], bool(attr & A_RM_8))
    if attr & A_VVVV_GPR:
        add(ours["vvvv"], False)
    return found


def register_number(register: int) -> int:
    if register == Register.NONE:
        return REG_NONE
    if register in (Register.RIP, Register.EIP):
        return REG_RIP
    return RegisterExt.number(register)  # type: ignore[arg-type]  # a plain int, whatever the stubs say


def signed(value: int, size: int) -> int:
    value &= (1 << 8 * size) - 1
    return value - (1 << 8 * size) if value >> (8 * size - 1) else value


def memory_of(insn: Instruction, mode: int, mnemonic: str, cls: int, kinds: list[str]) -> dict[str, Any] | None:
    """Return the memory operand that ModRM or a memory offset names, in the decoder's words."""
    named = [
        k for k in kinds if k == "MEM" or k.endswith("_OR_MEM") or k.startswith(("MEM_OFFS", "MEM_VSIB", "MEM_MIB"))
    ]
    if not named or not any(insn.op_kind(n) == OpKind.MEMORY for n in range(insn.op_count)):
        return None
    base, index = register_number(insn.memory_base), register_number(insn.memory_index)
    disp = insn.memory_displacement
    if base == REG_RIP:
        disp -= insn.len
    widths = [RegisterExt.size(r) for r in (insn.memory_base, insn.memory_index) if r and RegisterExt.size(r) <= 8]
    offset = "MEM_OFFS" in kinds
    size = widths[0] if widths else insn.memory_displ_size
    if offset:
        disp = signed(disp, 8)
    else:
        disp = signed(disp, max(size, 2) if size else 8)
    memory = {
        "base": base,
        "index": index,
        "scale": insn.memory_index_scale if index != REG_NONE else 1,
        "disp": disp,
        "seg": SEGMENTS[insn.memory_segment],
    }
    if mode == 64 and memory["seg"] < FS:
        memory["seg"] = SS if insn.memory_base in (Register.RSP, Register.ESP, Register.RBP, Register.EBP) else DS
    if widths or offset:
        memory["addrsize"] = widths[0] if widths else insn.memory_displ_size
    bases = (Register.NONE,) if base == REG_RIP else (insn.memory_base,)
    used = [m for m in FACTORY.info(insn).used_memory() if m.base in bases and m.index == insn.memory_index]
    access = ACCESSES.get(used[0].access, M_NONE) if used else M_NONE
    if insn.vsib is not None:
        access = M_WRITE if "SCATTER" in mnemonic else M_READ
    width = MemorySizeExt.size(insn.memory_size)
    if insn.is_broadcast:
        width = MemorySizeExt.element_size(insn.memory_size)
    if mnemonic in ("CLFLUSH", "CLFLUSHOPT", "CLWB"):
        access, width = M_READ, 1
    if cls == C_NOP or mnemonic in ("LEA", "INVLPG"):
        access = M_NONE
    memory["mem_access"] = access
    memory["mem_width"] = width if access else 0
    return memory


def immediate_of(insn: Instruction, mode: int, kinds: list[str]) -> int | None:
    """Return the immediate (a branch's displacement) as the decoder gives it; None where there is none."""
    for n, kind in enumerate(kinds):
        if kind.startswith("BR"):
            size = {OpKind.NEAR_BRANCH16: 2, OpKind.NEAR_BRANCH32: 4, OpKind.NEAR_BRANCH64: 8}[insn.op_kind(n)]
            return signed(insn.near_branch_target - insn.len, size)
        if kind == "FARBR2_2":
            return insn.far_branch16 | insn.far_branch_selector << 16
        if kind == "FARBR4_2":
            return insn.far_branch32 | insn.far_branch_selector << 32
    if insn.mnemonic == Mnemonic.ENTER:
        return insn.immediate16 | insn.immediate8_2nd << 16
    sizes = {
        "IMM8": 1,
        "IMM16": 2,
        "IMM32": 4,
        "IMM64": 8,
        "IMM8SEX16": 1,
        "IMM8SEX32": 1,
        "IMM8SEX64": 1,
        "IMM32SEX64": 4,
    }
    found = [(n, sizes[kind]) for n, kind in enumerate(kinds) if kind in sizes]
    if len(found) == 1:
        return signed(insn.immediate(found[0][0]), found[0][1])
    return None


def operand_size(insn: Instruction, cls: int, kinds: list[str]) -> int | None:
    """Return the operand size where iced-x86 says it: by its name for the opcode, or by the first operand's size."""
    code = insn.op_code()
    if cls == C_STRING:
        return MemorySizeExt.size(insn.memory_size)
    if cls in (C_STACK, C_BRANCH):
        return code.operand_size // 8 or None
    if cls == C_NOP or not kinds or insn.op0_kind != OpKind.REGISTER:
        return None
    if kinds[0] in ("DX", "AX") or not RegisterExt.is_gpr(insn.op0_register):
        return None
    return RegisterExt.size(insn.op0_register)


def differences(code: bytes, mode: int) -> list[str]:
    """Decode `code` by both; return what differs."""
    ours = decode_bytes(code, mode)
    decoder = Decoder(mode, code, DecoderOptions.AMD)
    insn = decoder.decode()
    if insn.op_code().encoding == EncodingKind.LEGACY and not is_near_branch(insn):
        decoder = Decoder(mode, code)
        insn = decoder.decode()
    if ours is None:
        return [] if decoder.last_error == DecoderError.NO_MORE_BYTES else ["length: 0"]
    if insn.is_invalid:
        return [] if ours["cls"] == C_INVALID else [f"class: {ours['cls']} of an undefined instruction"]
    mnemonic = MNEMONICS[insn.mnemonic]
    kinds = [OPERANDS[k] for k in insn.op_code().op_kinds()]
    cls = C_NOP if is_hint(insn) else class_of(insn, mnemonic, kinds)
    if cls == C_INVALID:
        return [] if ours["cls"] == C_INVALID else [f"class: {ours['cls']} of {mnemonic}"]
    if insn.mnemonic == Mnemonic.PAUSE and ours["rex"] & 1:
        return []
    expected: dict[str, Any] = {"length": insn.len, "cls": cls}
    memory = memory_of(insn, mode, mnemonic, cls, kinds)
    if memory is not None:
        expected |= memory
    immediate = immediate_of(insn, mode, kinds)
    if immediate is not None:
        expected["imm"] = immediate
    if cls != C_NOP:
        expected["flags_read"], expected["flags_killed"] = flags_of(insn, mnemonic, cls, kinds)
    size = operand_size(insn, cls, kinds)
    if size is not None:
        expected["opsize"] = size
    constants = decoder.get_constant_offsets(insn)
    if constants.has_immediate and cls != C_NOP:
        expected["imm_off"] = constants.immediate_offset
        expected["imm_size"] = constants.immediate_size + constants.immediate_size2
    wrong = [f"{k}: {ours[k]}, not {v}" for k, v in expected.items() if ours[k] != v]
    attributes = {
        A_MEM: memory is not None,
        A_NO_ACCESS: memory is not None and not memory["mem_access"],
        A_MOFFS: "MEM_OFFS" in kinds,
        A_RIP: memory is not None and memory["base"] == REG_RIP,
        A_VSIB: any(kind.startswith("MEM_VSIB") for kind in kinds),
        A_BITOFF: memory is not None and mnemonic in ("BT", "BTS", "BTR", "BTC") and "IMM8" not in kinds,
    }
    wrong += [f"attribute {bit}: not {there}" for bit, there in attributes.items() if bool(ours["attr"] & bit) != there]
    if cls != C_NOP and our_general_registers(ours) != general_registers(insn, kinds):
        wrong.append(f"registers: {our_general_registers(ours)}, not {general_registers(insn, kinds)}")
    return wrong


def is_near_branch(insn: Instruction) -> bool:
    return (
        insn.is_jcc_short_or_near
        or insn.is_jmp_near
        or insn.is_jmp_short
        or insn.is_call_near
        or (
            insn.is_call_near_indirect
            or insn.is_jmp_near_indirect
            or insn.is_loop
            or insn.is_loopcc
            or insn.is_jcx_short
            or insn.mnemonic == Mnemonic.RET
        )
    )


def random_instruction(rng: random.Random, mode: int) -> bytes:
    """Return 15 bytes that begin like an instruction more often than random ones would."""
    code = bytearray()
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 3))):
        code.append(rng.choice((0x66, 0x66, 0x67, 0xF2, 0xF3, 0xF0, 0x64, 0x65, 0x2E, 0x36, 0x3E, 0x26)))
    if mode == 64 and rng.random() < 0.5:
        code.append(rng.randrange(0x40, 0x50))
    form = rng.random()
    if form < 0.2:
        code.append(0x0F)
    elif form < 0.3:
        code += bytes((0x0F, rng.choice((0x38, 0x3A))))
    elif form < 0.7:
        if rng.random() < 0.9:  # a vector prefix allows few others
            code.clear()
        code += vex(rng) if form < 0.45 else evex(rng)
    code += rng.randbytes(15)
    return bytes(code[:15])


def vex(rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return bytes((0xC5, rng.choice((0xF8, 0x80, 0)) | rng.randrange(128)))
    registers = rng.choice((0xE0, 0, rng.randrange(8) << 5))
    vvvv = rng.choice((0x78, 0))
    return bytes((0xC4, registers | rng.choice((1, 2, 3, 3, rng.randrange(32))), vvvv | rng.randrange(256)))


def evex(rng: random.Random) -> bytes:
    registers = rng.choice((0xF0, 0xC0 | rng.randrange(16) << 4, rng.randrange(16) << 4))
    p0 = registers | rng.choice((1, 2, 3, 5, 6, rng.randrange(16)))
    p1 = rng.choice((0x7C, rng.randrange(256), 4 | rng.randrange(256))) & 0x7C
    p1 |= rng.randrange(4) | rng.randrange(2) << 7
    p2 = rng.choice((8, 0)) | rng.choice((rng.randrange(256), rng.randrange(8) << 4))
    return bytes((0x62, p0, p1, p2))


def test_a_random_instruction_is_decoded_as_iced_x86_decodes_it() -> None:
    count = int(os.environ.get("PYHYVE_FUZZ_N", "200000"))
    rng = random.Random(int(os.environ.get("PYHYVE_FUZZ_SEED", "1")))
    wrong: dict[str, str] = {}
    for n in range(count):
        mode = (64, 64, 32, 16)[n & 3]
        code = random_instruction(rng, mode)
        found = differences(code, mode)
        if found:
            insn = Decoder(mode, code).decode()
            wrong.setdefault(MNEMONICS[insn.mnemonic] + found[0].split(":")[0], f"{mode} {code.hex()} {insn}: {found}")
    assert not wrong, f"{len(wrong)} kinds of difference, such as\n" + "\n".join(list(wrong.values())[:40])


def decoded(code: str, mode: int = 64) -> dict[str, Any]:
    """Decode hexadecimal `code`, which must be one whole instruction."""
    found = decode_bytes(bytes.fromhex(code), mode)
    assert found is not None
    assert found["length"] == len(bytes.fromhex(code))
    return found


def fields(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in expected}


def test_bytes_behind_the_instruction_change_nothing() -> None:
    rng = random.Random(2)
    seen = 0
    for n in range(20_000):
        mode = (64, 32, 16)[n % 3]
        code = random_instruction(rng, mode)
        found = decode_bytes(code, mode)
        if found is None or found["length"] < 0:
            continue
        seen += 1
        whole = code[: found["length"]]
        assert decode_bytes(whole, mode) == found, code.hex()
        assert decode_bytes(whole + rng.randbytes(60), mode) == found, code.hex()
    assert seen > 15_000


def test_an_instruction_cut_short_is_asked_for_again_with_more_bytes() -> None:
    rng = random.Random(3)
    for n in range(5_000):
        mode = (64, 32, 16)[n % 3]
        code = random_instruction(rng, mode)
        found = decode_bytes(code, mode)
        if found is None or found["length"] < 0:
            continue
        for length in range(found["length"]):
            assert decode_bytes(code[:length], mode) is None, code[:length].hex()


@pytest.mark.parametrize("padding", [0, 40])
def test_more_than_15_bytes_are_no_instruction(padding: int) -> None:
    nops = bytes([0x90] * padding)
    longest = bytes([0x66] * 12) + bytes.fromhex("b83412")
    found = decode_bytes(longest + nops, 64)
    assert found is not None
    assert (found["length"], found["cls"]) == (15, C_COPY)
    for code in (bytes([0x66]) + longest, bytes([0x66] * 15), bytes([0x2E] * 14) + b"\x0f\x0b"):
        found = decode_bytes(code + nops, 64)
        assert found is not None
        assert (found["length"], found["cls"]) == (-1, C_INVALID)


@pytest.mark.parametrize(
    ("code", "mode", "opsize", "length"),
    [
        ("e911223344", 64, 8, 5),
        ("66e91122", 64, 2, 4),
        ("6648e911223344", 64, 8, 7),
        ("660f841122", 64, 2, 5),
        ("e91122", 16, 2, 3),
        ("66e911223344", 16, 4, 6),
        ("c3", 64, 8, 1),
        ("66c3", 64, 2, 2),
        ("ffd0", 64, 8, 2),
        ("cb", 64, 4, 1),
        ("48cf", 64, 8, 2),
        ("50", 64, 8, 1),
        ("6650", 64, 2, 2),
        ("50", 32, 4, 1),
        ("6a01", 64, 8, 2),
        ("c9", 64, 8, 1),
        ("9c", 64, 8, 1),
        ("0fa0", 64, 8, 2),
        ("0f22d8", 64, 8, 3),
        ("0f22d8", 16, 4, 3),
        ("88c8", 64, 1, 2),
        ("0fb6c8", 64, 4, 3),
        ("0f94c0", 64, 1, 3),
        ("f20f38f1c1", 64, 4, 5),
        ("660f7ec8", 16, 4, 4),
        ("e410", 64, 1, 2),
        ("48ed", 64, 4, 2),
        ("f3a4", 64, 1, 2),
        ("f348a5", 64, 8, 3),
        ("66a5", 16, 4, 2),
    ],
)
def test_operand_size_follows_prefixes_mode_and_opcode(code: str, mode: int, opsize: int, length: int) -> None:
    expected = {"opsize": opsize, "length": length}
    assert fields(decoded(code, mode), expected) == expected


@pytest.mark.parametrize(
    ("code", "mode", "expected"),
    [
        ("8b07", 16, {"base": 3, "index": REG_NONE, "addrsize": 2, "seg": DS}),
        ("8b4203", 16, {"base": 5, "index": 6, "disp": 3, "seg": SS}),
        ("8b1680ff", 16, {"base": REG_NONE, "index": REG_NONE, "disp": -128, "seg": DS}),
        ("3e8b4600", 16, {"base": 5, "seg": DS, "prefixes": P_SEG}),
        ("678b4424fc", 16, {"base": 4, "index": REG_NONE, "disp": -4, "addrsize": 4, "seg": SS}),
        ("3e8b45f8", 64, {"base": 5, "seg": SS, "prefixes": 0}),
        ("658b04c500000080", 64, {"base": REG_NONE, "index": 0, "scale": 8, "disp": -(1 << 31), "seg": GS}),
        ("418b4500", 64, {"base": 13, "seg": DS}),
        ("42840420", 64, {"base": 0, "index": 12}),
        ("8b05fcffffff", 64, {"base": REG_RIP, "disp": -4, "addrsize": 8}),
        ("678b05fcffffff", 64, {"base": REG_RIP, "disp": -4, "addrsize": 4}),
        ("8b05fcffffff", 32, {"base": REG_NONE, "disp": -4, "addrsize": 4}),
        ("a1ffffff7f", 32, {"disp": 0x7FFFFFFF, "mem_access": M_READ, "mem_width": 4, "imm_size": 0}),
        ("67a3ffffffff", 64, {"disp": 0xFFFFFFFF, "mem_access": M_WRITE, "mem_width": 4, "addrsize": 4}),
        ("62f17c48584380", 64, {"disp": -128 * 64, "mem_width": 64}),
        ("62f17c58584304", 64, {"disp": 16, "mem_width": 4}),
        ("62f27d49900c13", 64, {"base": 3, "index": 2, "reg": 1, "cls": C_SYSTEM}),
        ("62f27d41900c0b", 64, {"base": 3, "index": 17, "reg": 1}),
        ("db28", 64, {"mem_access": M_READ, "mem_width": 10}),
        ("df20", 64, {"mem_access": M_READ, "mem_width": 10}),
        ("d938", 64, {"mem_access": M_WRITE, "mem_width": 2}),
        ("480fc70f", 64, {"mem_access": M_RW, "mem_width": 16}),
        ("0fae38", 64, {"mem_access": M_READ, "mem_width": 1, "cls": C_COPY}),
        ("8d4708", 64, {"mem_access": M_NONE, "mem_width": 0, "base": 7, "disp": 8}),
        ("ff28", 64, {"mem_access": M_READ, "mem_width": 6, "cls": C_BRANCH}),
    ],
)
def test_memory_operand(code: str, mode: int, expected: dict[str, Any]) -> None:
    assert fields(decoded(code, mode), expected) == expected


@pytest.mark.parametrize(
    ("code", "mode", "expected"),
    [
        ("c8341202", 64, {"imm": 0x021234, "imm_size": 3, "imm_off": 1}),
        ("ea78563412cdab", 32, {"imm": 0xABCD12345678, "imm_size": 6, "cls": C_BRANCH}),
        ("9a3412cdab", 16, {"imm": 0xABCD1234, "imm_size": 4, "cls": C_BRANCH}),
        ("48b8f0debc9a78563492", 64, {"imm": 0x923456789ABCDEF0 - (1 << 64), "imm_size": 8, "imm_off": 2}),
        ("48c7c0ffffffff", 64, {"imm": -1, "imm_size": 4}),
        ("6a80", 64, {"imm": -128, "imm_size": 1}),
        ("eb80", 64, {"imm": -128, "imm_size": 1, "imm_off": 1}),
    ],
)
def test_immediate(code: str, mode: int, expected: dict[str, Any]) -> None:
    assert fields(decoded(code, mode), expected) == expected


@pytest.mark.parametrize(
    "code", ["660f38f1c8", "dd28", "0f0b", "0fff00", "c7f800000000", "0f01d5", "c4e2699004c3", "0f20c8"]
)
def test_undefined_instructions(code: str) -> None:
    found = decode_bytes(bytes.fromhex(code), 64)
    assert found is not None
    assert found["cls"] == C_INVALID


def test_a_rex_that_is_not_last_is_ignored() -> None:
    found = decoded("48668bc1")
    assert (found["rex"], found["opsize"]) == (0, 2)
    assert decoded("664889c1")["opsize"] == 8


def test_82_is_decoded_as_80_where_it_exists() -> None:
    assert fields(decoded("82c005", 32), {"opcode": 0, "cls": 0}) == {"opcode": 0x80, "cls": C_COPY}
    assert decoded("82c0")["cls"] == C_INVALID


def test_90_exchanges_with_r8_under_rex_b() -> None:
    for code in ("4190", "f34190"):
        found = decoded(code)
        assert fields(found, {"cls": 0, "rm": 0, "attr": 0}) == {"cls": C_COPY, "rm": 8, "attr": A_OPREG}
    assert decoded("4890")["cls"] == C_NOP
    assert decoded("f390")["cls"] == C_SYSTEM


@pytest.mark.parametrize("code", ["f08b07", "f001c0", "f08907", "f090", "f0660fefc1", "f00fb60f", "f0390f", "f0c3"])
def test_lock_is_undefined_where_it_is_not_allowed(code: str) -> None:
    assert decoded(code)["cls"] == C_INVALID


def test_lock_is_reported_where_it_is_allowed() -> None:
    assert fields(decoded("f00107"), {"cls": 0, "prefixes": 0}) == {"cls": C_COPY, "prefixes": P_LOCK}
    assert decoded("f00fb10f")["cls"] == C_COPY


def test_the_last_of_two_repeat_prefixes_counts() -> None:
    assert decoded("f2f3a6")["prefixes"] == P_F3
    assert decoded("f3f2a6")["prefixes"] == P_F2
    assert decoded("f2f30fb8c1")["cls"] == C_COPY


@pytest.mark.parametrize(
    ("code", "read", "killed"),
    [
        ("01c8", 0, ALL),
        ("11c8", CF, ALL),
        ("ffc0", 0, ALL & ~CF),
        ("d3e0", 0, 0),
        ("c1e020", 0, 0),
        ("c1e021", 0, ALL),
        ("48c1e020", 0, ALL),
        ("48c1e040", 0, 0),
        ("d1c0", 0, CF | OF),
        ("c1d001", CF, CF | OF),
        ("c1d020", 0, 0),
        ("0fa4c800", 0, 0),
        ("0fa4c801", 0, ALL),
        ("a6", 0, ALL),
        ("f3a6", 0, 0),
        ("0fa3c8", 0, ALL & ~ZF),
        ("0fbcc1", 0, ALL),
        ("0f44c1", ZF, 0),
        ("7e00", ZF | SF | OF, 0),
        ("e300", 0, 0),
        ("e100", ZF, 0),
        ("c3", 0, 0),
        ("0f05", ALL, 0),
        ("0fa2", ALL, 0),
        ("9c", ALL, 0),
        ("9f", ALL & ~OF, 0),
        ("f7d0", 0, 0),
        ("8d00", 0, 0),
    ],
)
def test_flags_read_and_killed(code: str, read: int, killed: int) -> None:
    expected = {"flags_read": read, "flags_killed": killed}
    assert fields(decoded(code), expected) == expected


@pytest.mark.parametrize(
    "code",
    [
        *("0fa2", "0f31", "0f01f9", "0f33", "0f01d0", "0fae20", "0fae00", "0fae08", "d930", "d920", "dd30", "dd20"),
        *("f4", "fa", "fb", "fc", "fd", "0f20c0", "0f23c0", "8ed8", "8cd8", "0f0100", "0f01e0", "0f00c0", "0f02c1"),
        *("0fb200", "f390", "0f01c8", "f30fc7f8", "f30faec0", "0f30", "0f01f8", "0f01ca", "0f01c1", "0f09", "d7"),
        *("660ff7c1", "0ff7c1", "e410", "ef", "c4e2699004db", "0f06", "0f01ee"),
    ],
)
def test_what_would_show_or_change_the_host_s_state_is_never_copied(code: str) -> None:
    assert decoded(code)["cls"] == C_SYSTEM


@pytest.mark.parametrize("code", ["27", "37", "d40a", "d50a", "6200", "63c8", "c400", "c500"])
def test_what_64_bit_mode_lacks_is_for_the_microcode_in_the_others(code: str) -> None:
    assert decoded(code, 32)["cls"] == C_SYSTEM
    assert decoded(code, 16)["cls"] == C_SYSTEM


@pytest.mark.parametrize("code", ["06", "27", "37", "60", "61", "ce", "d40a", "d6", "9a", "ea"])
def test_what_64_bit_mode_lacks_is_undefined_there(code: str) -> None:
    found = decode_bytes(bytes.fromhex(code), 64)
    assert found is not None
    assert found["cls"] == C_INVALID


@pytest.mark.parametrize(
    "code", ["f30f1efa", "f30f1fc0", "f3480f1ec8", "0f1f440000", "0f18d8", "0f0d08", "0f1c00", "6690"]
)
def test_hints_are_no_operation(code: str) -> None:
    found = decoded(code)
    assert (found["cls"], found["mem_access"]) == (C_NOP, M_NONE)


def test_general_registers_are_named_by_field() -> None:
    gpr = A_REG_GPR | A_RM_GPR | A_VVVV_GPR | A_OPREG | A_REG_8 | A_RM_8
    for code, attr, numbers in (
        ("4d01c8", A_REG_GPR | A_RM_GPR, {"reg": 9, "rm": 8}),
        ("88e0", A_REG_GPR | A_RM_GPR | A_REG_8 | A_RM_8, {"reg": 4, "rm": 0}),
        ("440fb6c4", A_REG_GPR | A_RM_GPR | A_RM_8, {"reg": 8, "rm": 4}),
        ("49bf0000000000000000", A_OPREG, {"rm": 15}),
        ("b401", A_OPREG | A_RM_8, {"rm": 4}),
        ("410fcf", A_OPREG, {"rm": 15}),
        ("c44238f2d1", A_REG_GPR | A_RM_GPR | A_VVVV_GPR, {"reg": 10, "rm": 9, "vvvv": 8}),
        ("66450f7ec8", A_RM_GPR, {"rm": 8}),
        ("660fc5c803", A_REG_GPR, {"reg": 1}),
        ("6251fd486fc8", 0, {"reg": 9, "rm": 8}),
        ("62a1fd486fc8", 0, {"reg": 17, "rm": 16}),
        ("c5f877", 0, {}),
    ):
        found = decoded(code)
        assert found["attr"] & gpr == attr, code
        assert fields(found, numbers) == numbers, code


def test_40_to_4f_are_inc_and_dec_outside_64_bit_mode() -> None:
    expected = {"cls": C_COPY, "attr": A_OPREG, "rm": 5, "opsize": 4, "flags_killed": ALL & ~CF, "rex": 0}
    assert fields(decoded("45", 32), expected) == expected
    assert fields(decoded("4d", 32), expected) == expected


def test_offsets_point_at_the_parts() -> None:
    expected: dict[str, Any] = {"opcode_off": 3, "modrm_off": 4, "imm_off": 9, "length": 10, "map": 1, "opcode": 0xBA}
    assert fields(decoded("66480fbaa52233445507"), expected) == expected
    expected = {"opcode_off": 4, "modrm_off": 5, "map": 1, "enc": 2, "evex_p": (0xF1, 0x7C, 0x48)}
    assert fields(decoded("62f17c4858c1"), expected) == expected
    expected = {"opcode_off": 2, "modrm_off": 3, "map": 1, "enc": 1, "evex_p": (0xF8, 0, 0), "rex": 0x40}
    assert fields(decoded("c5f858c1"), expected) == expected
    expected = {"opcode_off": 3, "modrm_off": 4, "map": 2, "enc": 1, "evex_p": (0x42, 0x38, 0), "rex": 0x45}
    assert fields(decoded("c44238f2d1"), expected) == expected


def test_mode_is_checked() -> None:
    with pytest.raises(ValueError, match="mode 8"):
        decode_bytes(b"\x90", 8)
