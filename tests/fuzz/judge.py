"""What a difference is: whether it can be had again, how little of it is needed, and how it is told and kept."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass, field
from typing import Any, Final

from iced_x86 import (
    Code,
    Decoder,
    DecoderOptions,
    EncodingKind,
    FlowControl,
    Instruction,
    MemorySize,
    Mnemonic,
    Register,
)

from guest import Machine, xsave_layout
from pyhyve.cpu.bt import _fuzz

State = dict[str, int]
NONE: Final = 255
REGISTERS: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
VECTORS: Final = {
    0: "#DE", 1: "#DB", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS", 11: "#NP", 12: "#SS",
    13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 19: "#XM", NONE: "none",
}  # fmt: skip


@dataclass
class Case:
    """Code, where it stands, and the state that it starts from: all that a run needs."""

    setup: str
    """How the machine is set up: a name of Machine.SETUPS."""
    fill: int
    """Seed of the memory's contents."""
    at: int
    code: bytes
    start: State
    xsave: bytes
    env: list[tuple[int, int]] = field(default_factory=list)
    """Stores of x87 environments: address, kind. Their pointers are not compared."""
    undefined: list[int] = field(default_factory=list)
    """Flags that may be undefined in front of each instruction."""
    note: str = ""

    def pack(self) -> dict[str, Any]:
        start = {name: value for name, value in self.start.items() if name in REGISTERS and value}
        start |= {name: self.start[name] for name in ("rflags", "rip", "fs_base", "gs_base", *SELECTORS)}
        return {
            "note": self.note, "setup": self.setup, "fill": self.fill, "at": self.at, "code": self.code.hex(),
            "start": start, "xsave": base64.b85encode(zlib.compress(self.xsave, 9)).decode(), "env": self.env,
            "undefined": self.undefined,
        }  # fmt: skip

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> Case:
        start = dict.fromkeys(REGISTERS, 0) | packed["start"]
        xsave = zlib.decompress(base64.b85decode(packed["xsave"]))
        env = [(at, kind) for at, kind in packed["env"]]
        return cls(packed["setup"], packed["fill"], packed["at"], bytes.fromhex(packed["code"]), start, xsave, env,
                   packed["undefined"], packed["note"])  # fmt: skip


_FROM_UNSIGNED: Final = (Mnemonic.VCVTUSI2SD, Mnemonic.VCVTUSI2SS)
_POP_ALL: Final = (Mnemonic.POPA, Mnemonic.POPAD)
_COMPARES: Final = (Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.CMPSQ)
_INDIRECT: Final = (FlowControl.INDIRECT_BRANCH, FlowControl.INDIRECT_CALL, FlowControl.RETURN)
_EXTENDED: Final = (MemorySize.FLOAT80, MemorySize.BCD)
SELECTORS: Final = ("es", "cs", "ss", "ds", "fs", "gs")


@dataclass
class Result:
    """What a case gives: differences by name, what each side left."""

    what: int
    native: State
    guest: State
    native_xsave: bytes
    guest_xsave: bytes
    memory: list[tuple[int, bytes, bytes]]


def run(machine: Machine, case: Case, times: int = 2) -> Result:
    """Run a case on both sides, `times` times from the same start; the results are those that differ, or the last."""
    machine.enter(case.setup)
    machine.fill(case.fill)
    return Result(*machine.fuzzer.run_one(case.at, case.code, case.start, case.xsave, case.env, case.undefined, times))


def decoder(case: Case, offset: int = 0) -> Decoder:
    bits = Machine.SETUPS[case.setup].bits
    return Decoder(bits, case.code[offset:], DecoderOptions.AMD, ip=case.at + offset)


def instructions(case: Case) -> list[Instruction]:
    return list(decoder(case))


def instruction_at(case: Case, rip: int) -> Instruction | None:
    """The instruction that begins at an address, if it is of the case."""
    offset = rip + Machine.SETUPS[case.setup].code_base - case.at
    return decoder(case, offset).decode() if 0 <= offset < len(case.code) else None


def excused(case: Case, result: Result) -> str | None:
    """Why a difference is none of the software processor's, or a known limit of it (docs/limits.md)."""
    bits = Machine.SETUPS[case.setup].bits
    base = Machine.SETUPS[case.setup].code_base
    native, guest = result.native["vector"], result.guest["vector"]
    rip = result.guest["rip"]
    first = instruction_at(case, result.native["rip"])
    leaves = first is not None and first.flow_control in _INDIRECT
    if leaves and native == guest == 13 and not canonical(rip):
        return "branches to addresses that are not canonical fault behind the branch"
    rips = {result.native["rip"], rip}
    at = [insn for insn in (instruction_at(case, rip) for rip in sorted(rips)) if insn is not None]
    if any(insn.mnemonic in _FROM_UNSIGNED and insn.op2_register == Register.RSP for insn in instructions(case)):
        return "VCVTUSI2SD of RSP behind a PUSH (AMD's Zen 4 takes RSP as it was before it)"
    if any(result.native[name] - _fuzz.END in range(4096) for name in REGISTERS):
        return "what stands at the common end is not the same on both sides"
    if result.guest["rip"] == 1 and guest == NONE and native == 14 and bits == 32:
        return "a branch to the common end of code of another size"
    boundary = {result.native["cr2"] >> 12, result.guest["cr2"] >> 12} & {0x7FFFFFFFF}
    for insn in at:
        parts = insn.has_op_mask or "MASKMOV" in str(insn).upper() or insn.memory_size in _EXTENDED
        if {native, guest} in ({13, 14}, {12, 14}) and boundary and parts:
            return "an operand of several parts over the end of the canonical addresses"
        if {native, guest} in ({13, 14}, {12, 14}) and bits != 64 and insn.memory_size in _EXTENDED:
            return "an operand of several parts over the end of a segment"
        if {native, guest} in ({13, 17}, {12, 17}) and insn.has_op_mask and bits == 64:
            return "elements under a mask, not aligned, over the end of the canonical addresses"
        runs = native != 6 or result.native["rip"] + base > insn.ip
        if insn.is_invalid and guest == 6 and insn.ip == rip + base and runs:
            return "encodings that no manual has: some processors run them"
        near_end = insn.ip & 0xFFF > 0xFF0
        if near_end and {native, guest} == {6, 14}:
            return "length of an undefined encoding at the end of a page"
        if native == 6 and guest in (12, 13, 14, 16) and insn.is_invalid is False and insn.cpuid_features():
            return "instructions that the host lacks: the operand's fault comes first"
        if insn.mnemonic == Mnemonic.MOVSXD and insn.code == Code.MOVSXD_R16_RM16 and native in (14, 17):
            return "MOVSXD to 16 bits (AMD's processors load 32)"
        if guest == 6 and insn.mnemonic == Mnemonic.MOV and {insn.op0_register, insn.op1_register} & {Register.CR8}:
            return "LOCK MOV CR0, which is CR8 on AMD's processors"
        if insn.mnemonic in (Mnemonic.VPINSRD, Mnemonic.VPEXTRD) and native == 6 and bits != 64:
            return "VPINSRD and VPEXTRD with W in 16- and 32-bit code (AMD's processors have none)"
        if insn.mnemonic in _POP_ALL and native == guest and native != NONE:
            return "what POPA has loaded when it faults"
        if insn.mnemonic in _COMPARES and {native, guest} <= {12, 13, 14, 17}:
            return "which operand of a repeated comparison faults first"
        if insn.vsib and insn.encoding == EncodingKind.EVEX and native == guest and result.what == 64:
            return "what is above the elements of a gather that faults"
        if insn.segment_prefix in (Register.FS, Register.GS) and native == 13 and guest == 14:
            return "an offset that is not canonical where the linear address is"
    return None


def canonical(address: int) -> bool:
    return address >> 47 in (0, (1 << 17) - 1)


def confirm(machine: Machine, case: Case) -> Result | None:
    """Run a case a few times: None if it does not differ, or not in the same way each time."""
    results = [run(machine, case) for _ in range(3)]
    first = results[0]
    if all(r.what and r.native == first.native for r in results):
        return first
    return None


def shrink(machine: Machine, case: Case) -> Case:
    """The same difference with less: instructions, registers, extended state."""

    def differs(other: Case) -> bool:
        result = confirm(machine, other)
        return result is not None and excused(other, result) is None

    def without(n: int) -> Case:
        listing = instructions(case)
        start = listing[n].ip - case.at
        code = case.code[:start] + case.code[start + listing[n].len :]
        before = case.undefined[n] if n < len(case.undefined) else 0
        undefined = case.undefined[: n + 1] + [flags | before for flags in case.undefined[n + 2 :]]
        return Case(case.setup, case.fill, case.at, code, case.start, case.xsave, case.env, undefined, case.note)

    listing = instructions(case)
    straight = all(insn.flow_control == FlowControl.NEXT for insn in listing[:-1])
    n = len(listing) - 1 if straight else -1
    while n >= 0 and len(instructions(case)) > 1:
        if n < len(instructions(case)):
            other = without(n)
            if differs(other):
                case = other
        n -= 1
    for name in REGISTERS:
        if case.start[name] and not case.env:
            start = case.start | {name: 0}
            other = Case(case.setup, case.fill, case.at, case.code, start, case.xsave, case.env, case.undefined)
            if differs(other):
                case = other
    plain = bytearray(len(case.xsave))
    plain[0:2] = b"\x7f\x03"
    plain[24:28] = b"\x80\x1f\0\0"
    plain[512] = case.xsave[512] | 7
    other = Case(case.setup, case.fill, case.at, case.code, case.start, bytes(plain), case.env, case.undefined)
    return other if differs(other) else case


def describe(case: Case, result: Result) -> str:
    """The difference for a person: disassembly, state before, what both sides left."""
    names = [name for bit, name in _fuzz.DIFFERENCES.items() if result.what & bit]
    lines = [f"{case.setup}, {case.code.hex()} at {case.at:#x}: {', '.join(names)}"]
    lines += [f"    {insn}" for insn in instructions(case)]
    changed = {r for r in REGISTERS if case.start[r]}
    lines.append("  before: " + ", ".join(f"{r} {case.start[r]:#x}" for r in REGISTERS if r in changed)
                 + f", flags {case.start['rflags']:#x}")  # fmt: skip
    for name in result.native:
        a, b = result.native[name], result.guest[name]
        if a != b:
            if name == "vector":
                lines.append(f"  exception: native {VECTORS.get(a, a)}, ours {VECTORS.get(b, hex(b))}")
            else:
                lines.append(f"  {name}: native {a:#x}, ours {b:#x}")
    for at, mine, yours in result.memory[:4]:
        lines.append(f"  memory {at:#x}: native {mine.hex()}, ours {yours.hex()}")
    x, y = result.native_xsave, result.guest_xsave
    for name, start, end in _areas(len(x)):
        if x[start:end] != y[start:end]:
            lines.append(f"  {name}: native {x[start:end].hex()}, ours {y[start:end].hex()}")
    return "\n".join(lines)


def _areas(size: int) -> list[tuple[str, int, int]]:
    areas = [("fcw", 0, 2), ("fsw", 2, 4), ("ftw", 4, 5), ("mxcsr", 24, 28)]
    areas += [(f"st{n}", 32 + 16 * n, 42 + 16 * n) for n in range(8)]
    areas += [(f"xmm{n}", 160 + 16 * n, 176 + 16 * n) for n in range(16)]
    areas += [(f"ymm{n} high", 576 + 16 * n, 592 + 16 * n) for n in range(16)]
    if size > 832:
        first = xsave_layout(0xE7)[1]
        areas += [(f"k{n}", first + 8 * n, first + 8 * n + 8) for n in range(8)]
        areas += [(f"zmm{n} high", first + 64 + 32 * n, first + 96 + 32 * n) for n in range(16)]
        areas += [(f"zmm{n + 16}", size - 1024 + 64 * n, size - 960 + 64 * n) for n in range(16)]
    return areas


def judge(machine: Machine, setup: str, fill: int, seed: int) -> list[tuple[str, str, dict[str, Any]]]:
    """What the last batch (of `seed`) found: (kind, text, packed case). The kind is "difference", "excused: why" or
    "unsteady" (it does not come again when run alone)."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    seen = set()
    differences = machine.fuzzer.differences()
    for sequence, state, what, start, native, guest in differences:
        if sequence in seen:
            continue
        seen.add(sequence)
        at, code, _, _ = machine.fuzzer.sequence(sequence)
        reason = excused(Case(setup, fill, at, code, start, b""), Result(what, native, guest, b"", b"", []))
        if reason is not None:
            found.append((f"excused: {reason}", "", {}))
            continue
        xsave = machine.fuzzer.replay(seed, sequence, state)
        env, undefined = machine.fuzzer.env_of(sequence), machine.fuzzer.undefined_of(sequence)
        case = Case(setup, fill, at, code, start, xsave, env, undefined)
        result = confirm(machine, case)
        if result is None:
            text = describe(case, Result(0, native, guest, b"", b"", []))
            found.append(("unsteady", f"batch {seed}, sequence {sequence}, state {state}\n{text}", case.pack()))
            continue
        reason = excused(case, result)
        if reason is not None:
            found.append((f"excused: {reason}", "", {}))
            continue
        case = shrink(machine, case)
        result = run(machine, case)
        case.note = "; ".join(str(insn) for insn in instructions(case))
        found.append(("difference", f"batch {seed}: {describe(case, result)}", case.pack()))
    machine.enter(setup)
    machine.fill(fill)
    return found
