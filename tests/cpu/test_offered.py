"""Every instruction that iced-x86 knows: valid if the guest's CPUID reports what it needs, else #UD."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Final

import pytest
from harness import CODE, DATA, DONE_PORT, Machine, engine_called
from iced_x86 import Code, CpuidFeature, Decoder, EncodingKind, Mnemonic

from pyhyve.cpu.bt.decode import decode_bytes
from pyhyve.cpu.bt.features import NUMBERS, feature_mask
from pyhyve.cpu.processor import GPR_NAMES
from pyhyve.vmm.cpufeatures import parse_cpu_features, without
from pyhyve.vmm.cpuid import CpuidPolicy
from pyhyve.vmm.hostcpu import cpuid as host_cpuid
from pyhyve.vmm.topology import Topology

C_INVALID, C_BRANCH, C_STACK, C_SYSTEM = 0, 3, 4, 6
END: Final = bytes((0xE6, DONE_PORT, 0xF4))


def names(enum: object) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if name.isupper() and isinstance(value, int)}


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FEATURES: Final = names(CpuidFeature)
MNEMONICS: Final = names(Mnemonic)
CODES: Final = names(Code)

ALWAYS: Final = words(
    """INTEL8086 INTEL186 INTEL286 INTEL386 INTEL486 INTEL8086_ONLY X64 FPU FPU287 FPU387 CMOV CX8 FXSR MMX SSE SSE2
    CPUID MSR TSC PAUSE CLFSH SYSCALL SEP MULTIBYTENOP RDPMC WBNOINVD"""
)
"""What every 64-bit processor has, and WBNOINVD, which is WBINVD where it is not."""
UNDEFINED: Final = words("UD0 UD1 UD2 RSM GETSEC MONITOR MWAIT")


def candidates() -> Iterator[bytes]:
    """Encodings that tell all instructions of 64-bit mode apart, with a memory operand at [rbx] and with registers."""
    modrm = [reg << 3 | 3 for reg in range(8)] + [0xC0 | reg << 3 | rm for reg in range(8) for rm in range(8)]
    for escape in (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a"):
        for opcode in range(256):
            for prefix in (b"", b"\x66", b"\xf3", b"\xf2", b"\x67"):
                for rex in (b"", b"\x48"):
                    for form in modrm if len(escape) < 2 else (3, 0xC1):
                        yield prefix + rex + escape + bytes([opcode, form])
    vector_forms = [reg << 3 | 3 for reg in range(8)] + [0xC1 | reg << 3 for reg in range(8)]
    for opcode in range(256):
        for pp in range(4):
            for w in (0, 0x80):
                for vvvv in (0x78, 0x58):
                    for length in range(3):
                        for map_ in (1, 2, 3, 5, 6):
                            for form in vector_forms[:16:7] + vector_forms[1:9:2] if map_ < 3 else (0x0B, 0xC1):
                                tail = bytes([form])
                                if length < 2 and map_ < 4:
                                    yield bytes([0xC4, 0xE0 | map_, w | vvvv | length << 2 | pp, opcode]) + tail
                                for mask in (0, 1):
                                    p2 = length << 5 | 8 | mask
                                    yield bytes([0x62, 0xF0 | map_, w | vvvv | 4 | pp, p2, opcode]) + tail
                            for mask in (0, 1):  # gathers and scatters
                                if map_ == 2 and 0x90 <= opcode <= 0xC7:
                                    p2 = length << 5 | 8 | mask
                                    head = bytes([0xC4, 0xE2, w | 0x58 | (length & 1) << 2 | pp, opcode])
                                    yield head + b"\x0c\x13"
                                    yield bytes([0x62, 0xF2, w | 0x7C | pp, p2, opcode]) + b"\x0c\x13"


@cache
def samples() -> tuple[tuple[bytes, int, int], ...]:
    """(bytes, iced-x86's code, our class) of one encoding of each instruction that can be run by itself."""
    found: dict[int, tuple[bytes, int, int]] = {}
    for head in candidates():
        insn = Decoder(64, head + bytes(8)).decode()
        if insn.is_invalid or insn.code in found:
            continue
        code = (head + bytes(8))[: insn.len]
        cls = decode_bytes(code + bytes(15), 64)["cls"]
        if cls in (C_BRANCH, C_STACK) or insn.is_string_instruction:
            continue
        found[insn.code] = (code, insn.code, cls)
    return tuple(found.values())


def is_hint(code: bytes) -> bool:
    at = code.find(b"\x0f")
    return 0 <= at < 3 and (code[at + 1] == 0x0D or 0x18 <= code[at + 1] <= 0x1F)


class Runner:
    """One machine that runs instruction after instruction, in ring 0 with everything enabled that is offered."""

    def __init__(self, switches: list[str]) -> None:
        engine = engine_called("bt")
        assert not isinstance(engine, str)
        host, capabilities = without(host_cpuid, engine.capabilities(), parse_cpu_features(switches))
        self.policy = CpuidPolicy(host, capabilities, Topology(), 2_000_000, 1_000_000)
        self.features = feature_mask(self.policy.entries(0))
        self.machine = Machine("bt")
        self.machine.vcpu.set_cpuid(self.policy.entries(0))
        self.prepare(C_SYSTEM)

    def prepare(self, cls: int) -> None:
        vcpu = self.machine.vcpu
        if cls == C_SYSTEM:
            self.machine._enter_protected()
            vcpu.set("xcr0", self.policy.xcr0 or 1)
            wanted = 0x6A0 | bool(self.policy.xcr0) << 18
            for feature, bit in {"fsgsbase": 16, "pku": 22}.items():
                wanted |= (self.features >> NUMBERS[feature] & 1) << bit
            vcpu.set("cr4", wanted)
        for name in GPR_NAMES:
            vcpu.set(name, DATA)
        vcpu.set("rsp", 0x60000)
        vcpu.set("rflags", 2)
        vcpu.set("rip", CODE)

    def is_undefined(self, code: bytes, cls: int) -> bool:
        machine = self.machine
        self.prepare(cls)
        machine.write(CODE, code + END)
        machine.vcpu.invalidate_code(machine.hva + CODE, 32)
        ended = machine.run()
        if ended == "fault":
            fault = machine.fault()
            return fault.vector == 6 and fault.rip == CODE
        assert ended != "engine-error", machine.vcpu.message()
        return False

    def expected_undefined(self, code: bytes, number: int) -> bool:
        insn = Decoder(64, code).decode()
        mnemonic = MNEMONICS[insn.mnemonic]
        if is_hint(code) and insn.encoding == EncodingKind.LEGACY:
            # PREFETCHW of a register is undefined on AMD's processors, and nothing on Intel's
            at = code.index(b"\x0f")
            return not self.policy.intel and code[at + 1] == 0x0D and code[at + 2] >= 0xC0
        if mnemonic in ("VMCALL", "VMMCALL"):
            return mnemonic != ("VMCALL" if self.policy.intel else "VMMCALL")
        if mnemonic in UNDEFINED:
            return True
        xcr0 = self.policy.xcr0
        for feature in insn.cpuid_features():
            name = FEATURES[feature]
            if name in ALWAYS:
                continue
            if name == "LZCNT" or (name == "BMI1" and mnemonic == "TZCNT"):
                continue  # BSR and BSF elsewhere
            if name == "XSAVE":
                missing = not xcr0
            elif name in ("AVX", "AVX512F"):
                missing = not xcr0 & (4 if name == "AVX" else 0x20)
            else:
                missing = name.lower() not in NUMBERS or not self.features >> NUMBERS[name.lower()] & 1
            if missing:
                return True
        state = {EncodingKind.VEX: 4, EncodingKind.EVEX: 0x20}.get(insn.encoding, 0)
        general = insn.encoding == EncodingKind.VEX and {FEATURES[f] for f in insn.cpuid_features()} <= {"BMI1", "BMI2"}
        return bool(state and not xcr0 & state and not general)


@pytest.mark.parametrize(
    "switches",
    [
        [],
        ["avx512f=off"],
        ["avx512vl=off,avx512bw=off,avx512dq=off,gfni=off"],
        ["avx=off,pku=off"],
        ["xsave=off"],
        ["ssse3=off,aes=off,sha_ni=off,adx=off,movbe=off,cx16=off,pcid=off"],
        ["bmi1=off,bmi2=off,abm=off,popcnt=off,rdrand=off,rdseed=off,fsgsbase=off,smap=off,xsavec=off"],
        ["sse3=off,rdtscp=off,rdpid=off,clflushopt=off,clwb=off,avx2=off,fma=off,xsaveopt=off"],
    ],
    ids=lambda switches: ",".join(switches) or "all",
)
def test_instructions_are_valid_as_cpuid_says(switches: list[str]) -> None:
    runner = Runner(switches)
    wrong = []
    undefined = 0
    for code, number, cls in samples():
        expected = runner.expected_undefined(code, number)
        undefined += expected
        if runner.is_undefined(code, cls) != expected:
            wrong.append(f"{CODES[number]} {code.hex()}: {'not ' if expected else ''}undefined")
    assert not wrong, f"{len(wrong)}: " + "\n".join(wrong[:60])
    assert len(samples()) > 3000
    assert undefined > 200
