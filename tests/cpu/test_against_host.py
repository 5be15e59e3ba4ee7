"""Random user-mode programs on each processor, compared with the host's own running the same bytes.

PYHYVE_PROGRAMS=n runs n programs of each kind instead of the usual few.
"""

import os
from dataclasses import dataclass

import pytest
from asm import assemble
from harness import ALIAS, CODE, DATA, DF, STATUS, USER_END, engine_called, run_code
from native import missing, run_native
from programs import DATA_SIZE, Generator

PROGRAMS = int(os.environ.get("PYHYVE_PROGRAMS", "12"))
LENGTH = 24

PROLOGUE = "fninit; cld"
STORE_VECTORS = "; ".join(f"movups [{ALIAS + DATA + DATA_SIZE - 0x100 + 16 * n:#x}], xmm{n}" for n in range(16))

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@dataclass
class Difference:
    """The shortest beginning of a program that ends differently, and how."""

    groups: list[str]
    what: list[str]

    def __str__(self) -> str:
        lines = "\n  ".join(self.groups[-3:])
        return f"after {len(self.groups)} groups, the last being\n  {lines}\n" + "\n".join(self.what)


def differences(engine: str, cpl: int, groups: list[str], seed: int) -> list[str]:
    """Run on the engine and on the host; say what differs."""
    generator = Generator(seed)
    regs, memory = generator.registers(), generator.memory_image()
    vectors = STORE_VECTORS if any("mm" in group for group in groups) else ""
    code = assemble("\n".join((PROLOGUE, *groups, vectors)), ALIAS + CODE)
    native = run_native(code, regs, 0, memory)
    end = USER_END if cpl == 3 else b"\xe6\xf4"
    got = run_code(engine, code + end, regs | {"rip": ALIAS + CODE, "rflags": 0x202}, memory, cpl=cpl)
    if got.exit != "done":
        return [f"the guest ended with {got.exit} {got.fault or got.message}"]
    found = [
        f"{name}: {got[name]:#x}, the host has {value:#x}" for name, value in native.regs.items() if got[name] != value
    ]
    if (got.rflags ^ native.rflags) & (STATUS | DF):
        found.append(f"flags: {got.rflags & (STATUS | DF):#x}, the host has {native.rflags:#x}")
    for at, expected in native.memory.items():
        wrong = [n for n, (a, b) in enumerate(zip(got.memory[at], expected, strict=True)) if a != b]
        if wrong:
            part = slice(wrong[0], wrong[0] + 16)
            found.append(
                f"{len(wrong)} bytes of memory from {at + wrong[0]:#x}: {got.memory[at][part].hex(' ')}, the host has "
                f"{expected[part].hex(' ')}"
            )
    return found


def narrow(engine: str, cpl: int, groups: list[str], seed: int) -> Difference | None:
    """None if the program ends as on the host."""
    if not differences(engine, cpl, groups, seed):
        return None
    good, bad = 0, len(groups)
    while bad - good > 1:
        middle = (good + bad) // 2
        if differences(engine, cpl, groups[:middle], seed):
            bad = middle
        else:
            good = middle
    return Difference(groups[:bad], differences(engine, cpl, groups[:bad], seed))


def check(engine: str, cpl: int, seed: int, kinds: tuple[str, ...]) -> None:
    difference = narrow(engine, cpl, Generator(seed).groups(LENGTH, kinds), seed)
    if difference is not None:
        pytest.fail(f"program {seed}: {difference}", pytrace=False)


@pytest.mark.parametrize("seed", range(PROGRAMS))
@pytest.mark.parametrize("cpl", [3, 0])
def test_integer_programs_end_as_on_the_host(engine: str, cpl: int, seed: int) -> None:
    check(engine, cpl, seed, Generator.INTEGER)


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_vector_programs_end_as_on_the_host(engine: str, seed: int) -> None:
    check(engine, 3, 1000 + seed, Generator.VECTOR)


@pytest.mark.parametrize("seed", range(max(2, PROGRAMS // 4)))
@pytest.mark.parametrize("kind", sorted({*Generator.INTEGER, "bmi", "crc"}))
def test_each_kind_of_instruction_alone_ends_as_on_the_host(engine: str, kind: str, seed: int) -> None:
    check(engine, 3, 2000 + seed, (kind,))


@pytest.mark.parametrize("seed", range(max(2, PROGRAMS // 4)))
def test_avx_programs_end_as_on_the_host(engine: str, seed: int) -> None:
    found = engine_called(engine)
    if isinstance(found, str) or not found.capabilities().xcr0 & 4:
        pytest.skip(f"{engine} offers no AVX here")
    check(engine, 3, 3000 + seed, ("avx", "sse", "alu", "stack"))
