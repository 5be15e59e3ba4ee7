"""Random straight-line programs of user-mode instructions, for comparison between processors.

A program is a list of groups; a group is a few lines of assembly that sets up its own operands. Each group may be left
out without harm to the others, so that a difference can be narrowed down.
"""

import random
from collections.abc import Callable
from typing import Final

from harness import AF, ALIAS, CF, DATA, OF, PF, SF, STACK, STATUS, ZF, host_flags

WIDE: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
NAMES: Final = {
    8: WIDE,
    4: ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", *(f"r{n}d" for n in range(8, 16))),
    2: ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di", *(f"r{n}w" for n in range(8, 16))),
    1: ("al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil", *(f"r{n}b" for n in range(8, 16))),
}
HIGH: Final = ("ah", "ch", "dh", "bh")
PTR: Final = {1: "byte ptr ", 2: "word ptr ", 4: "dword ptr ", 8: "qword ptr ", 16: "xmmword ptr "}
CONDITIONS: Final = ("o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g")

DATA_SIZE: Final = 0x2000
"""Two pages, so that operands can lie over the boundary between them."""
STACK_SIZE: Final = 0x800
MIDDLE: Final = ALIAS + DATA + 0x1000

INTERESTING: Final = (
    0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 0x1_0000_0000,
    0x7FFF_FFFF_FFFF_FFFF, 0x8000_0000_0000_0000, 0xFFFF_FFFF_FFFF_FFFF, 0x0123_4567_89AB_CDEF, 0xF0F0_F0F0_0F0F_0F0F,
)  # fmt: skip

# Status flags that an instruction leaves undefined: groups clear them before anyone looks.
UNDEFINED: Final = {
    "multiply": SF | ZF | AF | PF,
    "divide": STATUS,
    "shift": AF | OF,
    "double_shift": AF | OF,
    "bits": OF | SF | AF | PF,
    "scan": CF | OF | SF | AF | PF,
    "bmi": AF | PF | SF,
}

# The translator keeps these elsewhere than in the host's registers of the same name.
SPECIAL: Final = ("r10", "r11", "r15")


class Generator:
    """Makes groups from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.labels = 0

    def value(self) -> int:
        return self.random.choice(INTERESTING) if self.random.random() < 0.6 else self.random.getrandbits(64)

    def immediate(self, size: int) -> int:
        """A signed immediate that an instruction of this operand size can have."""
        bits = min(size, 4) * 8
        if self.random.random() < 0.4:
            bits = 8
        value = self.value() & (1 << bits) - 1
        return value - (1 << bits) if value >> (bits - 1) else value

    def reg(self, size: int = 8, *, avoid: tuple[str, ...] = ()) -> str:
        """A general register but RSP, those that are special to the translator more often."""
        while True:
            name = self.random.choice(SPECIAL) if self.random.random() < 0.35 else self.random.choice(WIDE)
            if name != "rsp" and name not in avoid:
                return NAMES[size][WIDE.index(name)]

    def wide(self, name: str) -> str:
        """The 64-bit register that a register is part of."""
        for names in NAMES.values():
            if name in names:
                return WIDE[names.index(name)]
        return {"ah": "rax", "ch": "rcx", "dh": "rdx", "bh": "rbx"}[name]

    def size(self) -> int:
        return self.random.choice((1, 2, 4, 4, 8, 8))

    def label(self) -> str:
        self.labels += 1
        return f"l{self.labels}"

    def address(self) -> int:
        """A place for up to 64 bytes: often over the page boundary or unaligned."""
        return MIDDLE + self.random.choice((0x100, 0x40, -0x40, -1, -2, -3, -4, -7, -8, -15, 0, 3, 0x201))

    def memory(self, size: int, *, avoid: tuple[str, ...] = (), at: int | None = None) -> tuple[str, str]:
        """(set-up, operand): any addressing mode, pointing at a place in DATA or, off RSP, in the stack."""
        target = self.address() if at is None else at
        pick = self.random.random()
        width = PTR[size]
        if pick < 0.12 and at is None:
            depth = self.random.choice((0, 8, 16, 64, 0x90))
            if self.random.random() < 0.5:
                return "", f"{width}[rsp+{depth}]"
            index = self.reg(avoid=avoid)
            return f"mov {index}, {self.random.choice((0, 1, 3))}", f"{width}[rsp+{index}*8+{depth}]"
        if pick < 0.22:
            return "", f"{width}[rip + at_{target:x}]"
        if pick < 0.27:
            return "", f"{width}ds:[{target:#x}]"
        base = self.reg(avoid=avoid)
        displacement = self.random.choice((0, 1, -1, 8, 0x7F, -0x80, 0x80, 0x1000, -0x12345))
        if pick < 0.55:
            return f"mov {base}, {target - displacement:#x}", f"{width}[{base}+{displacement}]"
        index = self.reg(avoid=(*avoid, base))
        scale = self.random.choice((1, 2, 4, 8))
        count = self.random.choice((0, 1, 5, -3, 0x100))
        where = target - displacement - count * scale
        if pick < 0.63:
            return f"mov {index}, {count}", f"{width}[{index}*{scale}+{target - count * scale:#x}]"
        if pick < 0.70:  # 32-bit addresses wrap
            short = (NAMES[4][WIDE.index(name)] for name in (base, index))
            high = self.value() & 0xFFFF_FFFF_0000_0000
            setup = f"mov {base}, {high | where & 0xFFFF_FFFF:#x}; mov {index}, {count}"
            return setup, "{}[{}+{}*{}+{}]".format(width, *short, scale, displacement)
        return f"mov {base}, {where:#x}; mov {index}, {count}", f"{width}[{base}+{index}*{scale}+{displacement}]"

    def operand(self, size: int, *, avoid: tuple[str, ...] = (), high: bool = True) -> tuple[str, str]:
        """(set-up, operand): a register or memory."""
        if self.random.random() < 0.5:
            return self.memory(size, avoid=avoid)
        if size == 1 and high and self.random.random() < 0.3:
            return "", self.random.choice(HIGH)
        name = self.reg(size)
        return f"mov {self.wide(name)}, {self.value():#x}", name

    def source_for(self, operand: str, size: int) -> str:
        """A register to go with an operand; AH..BH do not go with REX."""
        if size == 1 and (operand in HIGH or self.random.random() < 0.1):
            low = ("al", "cl", "dl", "bl", *HIGH)
            if operand in low:
                return self.random.choice(low)
        return self.reg(size) if operand not in HIGH else "bl"

    # -- groups -------------------------------------------------------------------------------------------------------

    def alu(self) -> str:
        op = self.random.choice(("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp", "test", "mov"))
        size = self.size()
        setup, operand = self.operand(size)
        if self.random.random() < 0.35:
            return f"{setup}; {op} {operand}, {self.immediate(size)}"
        other = self.source_for(operand, size)
        if self.random.random() < 0.5 and op != "test":
            return f"{setup}; {op} {other}, {operand}"
        return f"{setup}; {op} {operand}, {other}"

    def unary(self) -> str:
        setup, operand = self.operand(self.size())
        return f"{setup}; {self.random.choice(('inc', 'dec', 'neg', 'not'))} {operand}"

    def locked(self) -> str:
        size = self.size()
        setup, operand = self.memory(size)
        if self.random.random() < 0.3:
            return f"{setup}; lock {self.random.choice(('inc', 'dec', 'neg', 'not'))} {operand}"
        op = self.random.choice(("add", "or", "adc", "sbb", "and", "sub", "xor", "xadd", "cmpxchg"))
        return f"{setup}; lock {op} {operand}, {self.reg(size)}"

    def shift(self) -> str:
        op = self.random.choice(("shl", "shr", "sar", "rol", "ror", "rcl", "rcr"))
        size = self.size()
        setup, operand = self.operand(size, avoid=("rcx",))
        if self.random.random() < 0.5:
            count = self.random.choice((0, 1, 2, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 255))
            return f"{setup}; mov cl, {count}; {op} {operand}, cl"
        return f"{setup}; {op} {operand}, {self.random.choice((1, 1, 3, 7, 17, 31, 63))}"

    def double_shift(self) -> str:
        size = self.random.choice((4, 8))
        setup, operand = self.operand(size, avoid=("rcx",))
        op = self.random.choice(("shld", "shrd"))
        if self.random.random() < 0.5:
            count = self.random.choice((0, 1, 15, 31, 32, 40, 63))
            return f"{setup}; mov cl, {count}; {op} {operand}, {self.reg(size)}, cl"
        return f"{setup}; {op} {operand}, {self.reg(size)}, {self.random.choice((1, 5, 31))}"

    def multiply(self) -> str:
        size = self.random.choice((2, 4, 8))
        kind = self.random.randrange(3)
        if kind == 0:
            size = self.size()
            setup, operand = self.operand(size, avoid=("rax", "rdx"))
            return f"{setup}; {self.random.choice(('mul', 'imul'))} {operand}"
        setup, operand = self.operand(size)
        if kind == 1:
            return f"{setup}; imul {self.reg(size)}, {operand}"
        return f"{setup}; imul {self.reg(size)}, {operand}, {self.immediate(size)}"

    def divide(self) -> str:
        size = self.size()
        divisor = self.reg(size, avoid=("rax", "rdx"))
        bits = size * 8
        signed = self.random.random() < 0.5
        low = self.value() & (1 << bits) - 1
        value = max(1, self.value() & (1 << (bits - 1)) - 1)
        high = self.random.randrange(value) >> 1 if self.random.random() < 0.5 and not signed else 0
        if signed:
            low >>= 1
        load = f"mov {self.wide(divisor)}, {value:#x}; mov rax, {low:#x}; mov rdx, {high:#x}"
        if size == 1:
            load = f"mov {self.wide(divisor)}, {value:#x}; mov rax, {high << 8 | low:#x}"
        if self.random.random() < 0.5:
            return f"{load}; {'idiv' if signed else 'div'} {divisor}"
        place = self.address()
        wide = self.wide(divisor)
        return (
            f"{load}; mov qword ptr ds:[{place:#x}], {wide}; {'idiv' if signed else 'div'} {PTR[size]}ds:[{place:#x}]"
        )

    def extend(self) -> str:
        kind = self.random.randrange(4)
        if kind == 0:
            return self.random.choice(("cbw", "cwde", "cdqe", "cwd", "cdq", "cqo"))
        small = self.random.choice((1, 2))
        setup, operand = self.operand(small, high=False)
        if kind == 1:
            setup, operand = self.operand(4)
            return f"{setup}; movsxd {self.reg(8)}, {operand}"
        big = self.random.choice([size for size in (2, 4, 8) if size > small])
        return f"{setup}; {self.random.choice(('movzx', 'movsx'))} {self.reg(big)}, {operand}"

    def high_byte_extend(self) -> str:
        return (
            f"{self.random.choice(('movzx', 'movsx'))} {self.random.choice(NAMES[4][:4])}, {self.random.choice(HIGH)}"
        )

    def lea(self) -> str:
        size = self.random.choice((2, 4, 8))
        setup, operand = self.memory(8)
        return f"{setup}; lea {self.reg(size)}, {operand.split('ptr ')[1]}"

    def exchange(self) -> str:
        size = self.size()
        setup, operand = self.operand(size, avoid=("rax",))
        other = self.source_for(operand, size)
        kind = self.random.choice(("xchg", "xadd", "cmpxchg"))
        if kind == "cmpxchg" and self.random.random() < 0.5:
            accumulator = NAMES[size][0]
            return f"{setup}; mov {accumulator}, {operand}; cmpxchg {operand}, {other}"
        return f"{setup}; {kind} {operand}, {other}"

    def exchange_wide(self) -> str:
        place = MIDDLE + self.random.choice((0x100, -0x40, 0x10))
        size, name = self.random.choice(((8, "cmpxchg8b"), (16, "cmpxchg16b")))
        same = (
            f"mov rax, [{place:#x}]; mov rdx, [{place + size // 2:#x}]" if self.random.random() < 0.5 else "mov eax, 5"
        )
        return f"{same}; mov rbx, {self.value():#x}; mov rcx, {self.value():#x}; {name} {PTR[size]}[{place:#x}]"

    def bits(self) -> str:
        op = self.random.choice(("bt", "bts", "btr", "btc"))
        size = self.random.choice((2, 4, 8))
        if self.random.random() < 0.3:
            setup, operand = self.operand(size)
            return f"{setup}; {op} {operand}, {self.random.randrange(256)}"
        offset = self.random.choice((0, 1, 7, 31, 63, 64, 100, -1, -65, 1000, -1000))
        lock = "lock " if op != "bt" and self.random.random() < 0.2 else ""
        if self.random.random() < 0.6:
            index = self.reg(size)
            setup, operand = self.memory(
                size, avoid=(self.wide(index),), at=MIDDLE + self.random.choice((0, 0x200, -4))
            )
            return f"{setup}; mov {index}, {offset}; {lock}{op} {operand}, {index}"
        return f"{op} {self.reg(size)}, {self.reg(size)}"

    def scan(self) -> str:
        op = self.random.choice(("bsf", "bsr", "popcnt", "tzcnt", "lzcnt"))
        size = self.random.choice((2, 4, 8))
        setup, operand = self.operand(size)
        return f"{setup}; {op} {self.reg(size)}, {operand}"

    def swap(self) -> str:
        if self.random.random() < 0.5:
            return f"bswap {self.reg(self.random.choice((4, 8)))}"
        size = self.random.choice((2, 4, 8))
        setup, operand = self.memory(size)
        if self.random.random() < 0.5:
            return f"{setup}; movbe {operand}, {self.reg(size)}"
        return f"{setup}; movbe {self.reg(size)}, {operand}"

    def condition(self) -> str:
        cc = self.random.choice(CONDITIONS)
        compare = f"cmp {self.reg(4)}, {self.immediate(4)}"
        kind = self.random.randrange(3)
        if kind == 0:
            setup, operand = self.operand(1)
            return f"{setup}; {compare}; set{cc} {operand}"
        if kind == 1:
            size = self.random.choice((2, 4, 8))
            setup, operand = self.operand(size)
            return f"{setup}; {compare}; cmov{cc} {self.reg(size)}, {operand}"
        target = self.label()
        return f"{compare}; j{cc} {target}; inc {self.reg()}; {target}: xor {self.reg(4)}, 0x55"

    def flags(self) -> str:
        return self.random.choice(
            ("lahf", "sahf", "cmc", "stc", "clc", "pushfq", "pushfq; pop rax", "push 0xad7; popfq", "push 0x202; popfq",
             "mov ah, 0xd5; sahf", "pushf", "sahf; lahf", "nop"),
        )  # fmt: skip

    def stack(self) -> str:
        reg = self.reg()
        setup, operand = self.memory(8, avoid=(reg,))
        choices = [
            f"push {reg}; pop {self.reg()}",
            f"push {self.immediate(4)}",
            f"{setup}; push {operand}",
            f"push {self.value() & 0x7FFF}; {setup}; pop {operand}",
            f"push {NAMES[2][WIDE.index(reg)]}; pop {self.reg(2)}",
            f"{self.setup16()}; push word ptr [rbx]; pop word ptr [rbx+2]",
            "push rsp; pop rax",
            "push rsp; pop rsp",
            "push qword ptr [rsp]",
            "push 5; pop qword ptr [rsp+8]",
            "push 6; push 7; pop qword ptr [rsp]",
            f"enter {self.random.choice((0, 8, 32))}, 0; mov [rbp-8], rax; leave",
            "mov rbp, rsp; enter 16, 1; leave",
            "mov rbp, rsp; push 1; push 2; enter 16, 3; leave; add rsp, 16",
            f"mov {reg}, rsp; sub rsp, 40; mov [rsp+8], {reg}; lea rsp, [{reg}-8]; add rsp, 8",
            f"xchg rsp, {reg}; xchg {reg}, rsp",
            f"mov {reg}, rsp; add rsp, 8; adc rsp, 16; mov rsp, {reg}",
            f"mov {reg}, 24; sub rsp, {reg}; add {reg}, rsp; mov rsp, {reg}",
            f"cmp rsp, {reg}",
            f"lea {reg}, [rsp+{self.random.choice((0, 8, -8, 0x1234))}]",
            f"mov {reg}, 3; lea {reg}, [rsp+{reg}*4+1]",
            "and rsp, -16",
            f"mov {self.reg()}, [rsp]; mov [rsp+8], {self.reg()}",
            f"movzx {self.reg(4)}, spl; mov {self.reg(2)}, sp; mov {self.reg(4)}, esp",
            f"mov {reg}, rsp; inc rsp; dec rsp; not rsp; neg rsp; mov rsp, {reg}",
            f"mov {reg}, rsp; imul rsp, {reg}, 3; shl rsp, 2; mov rsp, {reg}",
            f"push {reg}; xor {reg}, {reg}; xadd [rsp], {reg}; pop {self.reg()}",
        ]
        return self.random.choice(choices)

    def setup16(self) -> str:
        return f"mov rbx, {MIDDLE + self.random.choice((0x80, -1, -2)):#x}"

    def call(self) -> str:
        back, over = self.label(), self.label()
        reg = self.reg()
        choices = [
            f"call {back}; jmp {over}; {back}: inc {self.reg()}; ret; {over}:",
            f"lea {reg}, [rip+{back}]; call {reg}; jmp {over}; {back}: ret; {over}:",
            f"lea {reg}, [rip+{over}]; jmp {reg}; ud2; {over}:",
            f"lea {reg}, [rip+{over}]; push {reg}; ret; ud2; {over}:",
            f"push 1; push 2; call {back}; jmp {over}; {back}: ret 16; ud2; {over}:",
            f"lea {reg}, [rip+{back}]; push {reg}; call [rsp]; jmp {over}; {back}: ret; {over}: pop {self.reg()}",
            f"lea {reg}, [rip+{over}]; push {reg}; jmp [rsp]; ud2; {over}: pop {self.reg()}",
            f"lea {reg}, [rip+{over}]; mov ds:[{MIDDLE:#x}], {reg}; jmp qword ptr ds:[{MIDDLE:#x}]; ud2; {over}:",
            f"mov ecx, {self.random.choice((1, 2, 5))}; {back}: add {self.reg(avoid=('rcx',))}, rcx; loop {back}",
            f"mov ecx, 5; {back}: cmp ecx, 3; loopne {back}",
            f"mov ecx, 5; {back}: test ecx, 4; loope {back}",
            f"mov rcx, {self.random.choice((0, 1))}; jrcxz {over}; inc {self.reg()}; {over}:",
            f"mov rcx, {self.random.choice((0, 1 << 32))}; jecxz {over}; inc {self.reg()}; {over}:",
        ]
        return self.random.choice(choices)

    def string(self) -> str:
        size = self.random.choice("bwdq")
        count = self.random.choice((0, 1, 2, 7, 40))
        down = self.random.random() < 0.3
        places = [MIDDLE + self.random.choice((-0x300, -0x203, 0x300, -9, -0x20)) for _ in range(2)]
        load = f"mov rsi, {places[0]:#x}; mov rdi, {places[1]:#x}; mov rcx, {count}; {'std' if down else 'cld'}"
        op = self.random.choice(("movs", "stos", "lods", "scas", "cmps"))
        prefix = {"scas": ("repe ", "repne ", ""), "cmps": ("repe ", "repne ", "")}.get(op, ("rep ", "rep ", ""))
        return f"{load}; {self.random.choice(prefix)}{op}{size}; cld"

    def table(self) -> str:
        return f"mov rbx, {MIDDLE - 128:#x}; xlat"

    def bmi(self) -> str:
        size = self.random.choice((4, 8))
        setup, operand = self.operand(size)
        a, b = self.reg(size), self.reg(size)
        wide = self.reg(size, avoid=(self.wide(a),))
        choices = [
            f"andn {a}, {b}, {operand}", f"blsi {a}, {operand}", f"blsr {a}, {operand}", f"blsmsk {a}, {operand}",
            f"bextr {a}, {operand}, {b}", f"bzhi {a}, {operand}, {b}", f"pdep {a}, {b}, {operand}",
            f"pext {a}, {b}, {operand}", f"rorx {a}, {operand}, 13", f"shlx {a}, {operand}, {b}",
            f"shrx {a}, {operand}, {b}", f"sarx {a}, {operand}, {b}", f"mulx {a}, {wide}, {operand}",
        ]  # fmt: skip
        if "adx" in host_flags():
            choices += [f"adcx {a}, {operand}", f"adox {a}, {operand}"]
        return f"{setup}; {self.random.choice(choices)}"

    def crc(self) -> str:
        size = self.size()
        setup, operand = self.operand(size, high=False)
        return f"{setup}; crc32 {self.reg(8 if size == 8 else 4)}, {operand}"

    def sse(self) -> str:
        x, y = self.random.randrange(16), self.random.randrange(16)
        setup, operand = self.memory(16)
        bits = operand.replace("xmmword ptr ", "")
        choices = [
            f"{setup}; movups xmm{x}, {operand}", f"{setup}; movups {operand}, xmm{x}",
            f"paddd xmm{x}, xmm{y}", f"pxor xmm{x}, xmm{y}", f"pshufd xmm{x}, xmm{y}, 0x1b", f"psubb xmm{x}, xmm{y}",
            f"pmuludq xmm{x}, xmm{y}", f"pcmpeqb xmm{x}, xmm{y}", f"pmovmskb {self.reg(4)}, xmm{y}",
            f"movq xmm{x}, {self.reg(8)}", f"movd {self.reg(4)}, xmm{x}", f"movq {self.reg(8)}, xmm{x}",
            f"{setup}; movsd xmm{x}, qword ptr {bits}", f"{setup}; movss dword ptr {bits}, xmm{x}",
            f"{setup}; movhps xmm{x}, qword ptr {bits}", f"{setup}; movq qword ptr {bits}, xmm{x}",
            f"cvtsi2sd xmm{x}, {self.reg(8)}", f"cvttsd2si {self.reg(8)}, xmm{x}", f"pextrw {self.reg(4)}, xmm{x}, 3",
            f"pinsrw xmm{x}, {self.reg(4)}, 5", f"{setup}; pinsrb xmm{x}, byte ptr {bits}, 3",
            f"{setup}; pextrd dword ptr {bits}, xmm{x}, 2", f"pshufb xmm{x}, xmm{y}", f"ptest xmm{x}, xmm{y}",
            f"{setup}; movd xmm{x}, dword ptr {bits}", f"comisd xmm{x}, xmm{y}", f"movmskpd {self.reg(4)}, xmm{x}",
            f"movaps xmm{x}, [{MIDDLE + 0x80:#x}]; paddq xmm{x}, [{MIDDLE - 0x80:#x}]",
            f"mov rdi, {MIDDLE:#x}; maskmovdqu xmm{x}, xmm{y}",
        ]  # fmt: skip
        return self.random.choice(choices)

    def x87(self) -> str:
        a, b = (MIDDLE + self.random.choice((0x100, -4, 0x40)) for _ in range(2))
        return self.random.choice(
            (
                f"fild dword ptr [{a:#x}]; fild word ptr [{b:#x}]; faddp; fistp qword ptr [{b:#x}]",
                f"fld1; fldpi; fmul st, st(1); fstp qword ptr [{a:#x}]; fstp dword ptr [{b:#x}]",
                f"fldl2e; fstp tbyte ptr [{a:#x}]; fld tbyte ptr [{a:#x}]; fbstp [{b:#x}]",
                "fldz; fld1; fcomip st, st(1); fstp st(0)",
                f"fnstcw [{a:#x}]; fldcw [{a:#x}]; fnstsw ax",
                f"fild qword ptr [{a:#x}]; fabs; fsqrt; frndint; fistp dword ptr [{b:#x}]; fnclex",
            )
        )

    def avx(self) -> str:
        x, y, z = (self.random.randrange(16) for _ in range(3))
        setup, operand = self.memory(16)
        bits = operand.replace("xmmword ptr ", "")
        return self.random.choice(
            (
                f"{setup}; vmovdqu ymm{x}, ymmword ptr {bits}; vpaddd ymm{y}, ymm{x}, ymm{z}",
                f"{setup}; vmovdqu ymmword ptr {bits}, ymm{x}", f"vpxor xmm{x}, xmm{y}, xmm{z}",
                f"vextracti128 xmm{x}, ymm{y}, 1", f"{setup}; vbroadcastss ymm{x}, dword ptr {bits}",
                f"vpermq ymm{x}, ymm{y}, 0x1b", f"vptest ymm{x}, ymm{y}", f"vpmovmskb {self.reg(4)}, ymm{x}",
                f"{setup}; vinserti128 ymm{x}, ymm{y}, xmmword ptr {bits}, 1", "vzeroupper",
                f"{setup}; vpaddb xmm{x}, xmm{y}, {operand}", f"vmovq {self.reg(8)}, xmm{x}",
            )
        )  # fmt: skip

    INTEGER: Final = (
        "alu", "alu", "alu", "unary", "locked", "shift", "shift", "double_shift", "multiply", "divide", "extend",
        "high_byte_extend", "lea", "exchange", "exchange_wide", "bits", "scan", "swap", "condition", "condition",
        "flags", "stack", "stack", "call", "string", "table",
    )  # fmt: skip
    VECTOR: Final = ("sse", "sse", "sse", "sse", "x87", "alu", "stack", "call", "condition")

    def groups(self, count: int, kinds: tuple[str, ...]) -> list[str]:
        made = []
        for _ in range(count):
            kind = self.random.choice(kinds)
            maker: Callable[[], str] = getattr(self, kind)
            text = maker()
            if kind in UNDEFINED:
                text += f"; pushfq; and qword ptr [rsp], {~UNDEFINED[kind]}; popfq"
            if self.random.random() < 0.25:
                text += "; pushfq"
            made.append(text)
        return made

    def registers(self) -> dict[str, int]:
        return {name: self.value() for name in WIDE if name != "rsp"} | {"rsp": ALIAS + STACK - 0x200}

    def memory_image(self) -> dict[int, bytes]:
        """DATA and the stack, by guest-physical address."""
        return {DATA: self.random.randbytes(DATA_SIZE), STACK - STACK_SIZE: bytes(STACK_SIZE)}
