"""32-bit user code with segments of every kind in its LDT, compared with the host's own running the same bytes.

PYHYVE_PROGRAMS=n runs n batches of programs instead of the usual few.
"""

import ctypes
import gc
import os
import random
import struct
from typing import Final

import native32
import pytest
from asm import assemble
from harness import AC, ALIAS, CODE, DATA, PML4, PT, STATUS, USER_END, Machine, run_code
from native32 import Descriptor, run_native32, selector

from pyhyve.cpu.processor import Segment

pytestmark = pytest.mark.skipif(native32.missing() is not None, reason=str(native32.missing()))

BATCHES: Final = int(os.environ.get("PYHYVE_PROGRAMS", "2"))
PROGRAMS: Final = 48
SLOT: Final = 640
HERE: Final = ALIAS + DATA
AREA: Final = 0x5000
"""Bytes of memory at DATA that programs use, and that are compared."""

LDT_AT: Final = 0x2_0000
SEGMENTS: Final = (
    Descriptor(HERE + 0x1000, 0xFFF),
    Descriptor(HERE + 0x1000, 0x7FF, plain=True),
    Descriptor(HERE, 0xFFF, kind=1),
    Descriptor(HERE, 0xFFF, kind=1, big=False),
    Descriptor(HERE + 0x1000, 0xFFF, kind=2),
    Descriptor(HERE + 0x1000, 0xFFF, kind=2, plain=True),
    Descriptor(HERE, 0xFFFFF, pages=True),
    Descriptor(HERE, 0xFFFF, big=False),
    Descriptor(HERE + 0x1000, 1, pages=True),
    Descriptor(0, 0xFFFFF, pages=True),
    Descriptor(HERE, 0, kind=1, pages=True),
    Descriptor(HERE + 0x1FFD, 0x1003),
)
FLAT: Final = 9
STACKS: Final = (0, 2, 6, 7, 8, FLAT, FLAT, FLAT, 11)
EDGES: Final = (0, 0x7FF, 0xFFF, 0x1003, 0x1FFF, 0xFFFF)

READS: Final = (
    "mov eax, {m}", "mov ax, {m}", "mov al, {m}", "add eax, {m}", "cmp {m}, al", "movzx edx, word ptr {m}",
    "imul edx, {m}; test edx, edx", "fild qword ptr {m}; fistp dword ptr {m}", "movd mm0, {m}", "movups xmm0, {m}",
    "fldcw {m}; fninit", "bt dword ptr {m}, ecx", "push dword ptr {m}", "adc ebp, {m}", "fld tbyte ptr {m}; fstp st(0)",
    "test {m}, edx",
)  # fmt: skip
WRITES: Final = (
    "mov {m}, eax", "mov {m}, dx", "mov {m}, cl", "add {m}, eax", "xchg {m}, edx", "inc word ptr {m}", "setc {m}",
    "movq {m}, mm0", "movups {m}, xmm0", "fnstcw {m}", "bts dword ptr {m}, ecx", "pop dword ptr {m}",
    "lock dec byte ptr {m}", "cmpxchg8b {m}", "shl dword ptr {m}, 3", "sbb {m}, ax", "mov dword ptr {m}, 0x12345",
    "and word ptr {m}, 0x7f",
)  # fmt: skip
STACK: Final = (
    "push eax", "push edx; push ebp", "pop edx", "pop eax; pop ecx; pop ebp", "push 5", "push 0x12345", "push ax",
    "pop dx", "pushad", "popad", "pushaw", "popaw", "push esp", "pop esp", "push sp", "mov eax, [esp+4]",
    "mov [esp-4], edx", "mov eax, [ebp]", "add [esp], ecx", "leave", "enter 8, 0", "enter 4, 2", "call 7f; 7: pop eax",
    "call 7f; jmp 8f; 7: ret; 8:", "call 7f; jmp 8f; 7: ret 4; 8:", "mov eax, offset 7f; push eax; ret; 7:", "pushfd",
    "mov edx, offset 7f; call edx; 7: pop edx", "sub esp, 12", "add esp, 8", "push dword ptr [esp]",
    "pop dword ptr [esp]", "pushf", "push ds; pop eax", "lea esp, [esp+4]",
)  # fmt: skip
STRINGS: Final = (
    "lodsd", "lodsb", "stosd", "stosw", "movsb", "movsd", "cmpsd", "scasb", "rep movsd", "rep stosb", "repe cmpsb",
    "repne scasb", "std; rep movsw; cld", "std; lodsd; cld", "rep lodsw", "xlat",
)  # fmt: skip


class Programs:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def offset(self) -> int:
        r = self.random
        if r.random() < 0.5:
            return r.choice(EDGES) + r.randrange(-17, 5) & 0xFFFF_FFFF
        return r.randrange(0x1000, 0x1F00)

    def load(self, name: str) -> str:
        r = self.random
        index = r.choice(STACKS) if name == "ss" else r.choice((FLAT, r.randrange(len(SEGMENTS))))
        text = f"mov ax, {selector(index)}; mov {name}, ax"
        if name != "ss":
            return text
        at = r.choice((0x1000, 0x1800, 0x1F00, r.choice(EDGES) + r.randrange(-40, 41))) + (
            HERE + 0x100 if index == FLAT else 0
        )
        return f"{text}; mov esp, {at & 0xFFFF_FFFF:#x}; mov ebp, {(at + r.choice((0, 8, 16))) & 0xFFFF_FFFF:#x}"

    def operand(self) -> str:
        r = self.random
        segment = r.choice(("ds", "es", "fs", "gs", "ss", "cs", "fs", "gs"))
        kind = r.randrange(4)
        if kind == 0:
            return f"{segment}:[{self.offset():#x}]"
        if kind == 1:
            return f"{segment}:[bx+{r.randrange(-16, 16)}]"
        return f"{segment}:[{r.choice(('ebx', 'esi', 'edi', 'ebx+esi*2', 'ebp'))}+{r.randrange(-16, 16)}]"

    def frame(self) -> str:
        """Accesses off one register, which may share a check."""
        r = self.random
        base = r.choice(("ebx", "ebp", "esp", "esi"))
        texts = (
            [f"mov {base}, {HERE + r.choice((0x1000, 0x1800, 0x2000, 0x1FFC)):#x}"] if base in ("ebx", "esi") else []
        )
        for _ in range(r.randrange(3, 8)):
            if r.random() < 0.3:
                texts.append(r.choice(STACK))
            else:
                texts.append(r.choice(READS + WRITES).replace("{m}", f"[{base}+{r.randrange(-24, 24)}]"))
        return "; ".join(texts)

    def step(self) -> str:
        r = self.random
        kind = r.random()
        if kind < 0.25:
            return self.load(r.choice(("ds", "es", "fs", "gs", "ss")))
        if kind < 0.4:
            return f"mov {r.choice(('ebx', 'esi', 'edi'))}, {r.choice((0, HERE)) + self.offset() & 0xFFFF_FFFF:#x}"
        if kind < 0.55:
            return self.frame()
        if kind < 0.75:
            return r.choice(READS + WRITES).replace("{m}", self.operand())
        if kind < 0.9:
            return r.choice(STACK)
        return f"mov ecx, {r.randrange(1, 20)}; {r.choice(STRINGS)}"

    def program(self) -> str:
        start = [self.load("ss"), self.load("ds"), self.load(self.random.choice(("es", "fs", "gs")))]
        return "; ".join(start + [self.step() for _ in range(self.random.randrange(3, 9))])


def prepare(machine: Machine) -> None:
    """The window at ALIAS and nothing else for the user, the LDT, FS and GS null, alignment checks as on the host."""
    machine.write(PML4, struct.pack("<2I", PT | 3, 4 << 20 | 0x83))
    for name in ("fs", "gs"):
        machine.vcpu.set_segment(name, Segment(0, 0, 0, 0x10000))
    machine.write(PML4 + 4 * (ALIAS >> 22), struct.pack("<2I", 0x87, 4 << 20 | 0x87))
    machine.write(LDT_AT, b"".join(segment.descriptor() for segment in SEGMENTS))
    machine.vcpu.set_segment("ldtr", Segment(0x60, LDT_AT, 8 * len(SEGMENTS) - 1, 0x82))
    machine.vcpu.set("cr0", machine.vcpu.get("cr0") | 1 << 18)


def compare(engine: str, code: bytes, offset: int, regs: dict[str, int], memory: bytes, eflags: int) -> list[str]:
    start = ALIAS + CODE + offset
    ctypes.memmove(HERE, memory, AREA)
    native = run_native32(start, code[offset : offset + SLOT], regs, eflags, SEGMENTS)
    expected = ctypes.string_at(HERE, AREA)
    wide = {f"r{name[1:]}": value for name, value in regs.items()}
    got = run_code(
        engine, code, wide | {"rip": start, "rflags": eflags | 0x202}, {DATA: memory}, mode="prot32", cpl=3,
        paging=True, setup=prepare,
    )  # fmt: skip
    vector = 6 if got.exit == "done" else got.fault.vector if got.fault else -1
    found = []
    if vector != native.vector:
        found.append(
            f"ended with {vector} {got.fault or got.message}, the host with {native.vector} {native.regs['eip']:#x}"
        )
    found += [
        f"{name}: {got['r' + name[1:]]:#x}, the host has {value:#x}"
        for name, value in native.regs.items()
        if got["r" + name[1:]] & 0xFFFF_FFFF != value
    ]
    if vector == 6 and (got.rflags ^ native.flags) & STATUS:
        found.append(f"flags: {got.rflags & STATUS:#x}, the host has {native.flags:#x}")
    wrong = [n for n in range(AREA) if got.memory[DATA][n] != expected[n]]
    if wrong:
        found.append(f"{len(wrong)} bytes of memory from {wrong[0]:#x} on differ")
    return found


@pytest.mark.parametrize("seed", range(BATCHES))
@pytest.mark.parametrize("eflags", [0, AC], ids=["", "aligned"])
def test_segments_behave_as_on_the_host(whole: str, seed: int, eflags: int) -> None:
    programs = Programs(seed * 2 + (eflags != 0))
    texts = [programs.program() for _ in range(PROGRAMS)]
    end = f".byte {', '.join(map(str, USER_END))}"
    source = "\n".join(
        f".org {n * SLOT}\n pxor xmm0, xmm0; pxor mm0, mm0; fninit; {text}\n{end}" for n, text in enumerate(texts)
    )
    code = assemble(source, ALIAS + CODE, 32)
    memory = programs.random.randbytes(AREA)
    problems = []
    for n, text in enumerate(texts):
        regs = {name: programs.random.randrange(1 << 32) for name in native32.REGS}
        found = compare(whole, code, n * SLOT, regs, memory, eflags)
        if found:
            problems.append("\n".join((f"program {n}: {text}", *found)))
    gc.collect()  # a process has room for 256 vCPUs
    assert not problems, "\n\n".join(problems)
