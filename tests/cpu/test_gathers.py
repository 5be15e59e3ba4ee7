"""Gathers: faults between elements, registers that must differ, modes that have none."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from harness import CODE, DATA, Machine, Outcome, engine_called, host_flags, run_asm

PAGE = 4096
ONES = (1 << 64) - 1


@pytest.fixture
def avx2(engine: str) -> str:
    found = engine_called(engine)
    if isinstance(found, str) or not found.capabilities().xcr0 & 4 or "avx2" not in host_flags():
        pytest.skip("no AVX2 here")
    return engine


def dwords(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def gather(
    engine: str, source: str, index: bytes, mask: Sequence[int], absent: Sequence[int] = (), fixes: bool = False
) -> Outcome:
    """Run with ymm1 the index, ymm2 the mask (of 8 dwords) and ymm0 all ones, in user mode; rbx is DATA, where each
    dword holds its own number, and `absent` lists the pages behind it that are not there until a handler `fixes` it.
    Behind it ymm0 is at DATA + 0x4000, ymm2 at DATA + 0x4020; the handler stores both at DATA + 0x4040, once."""

    def setup(machine: Machine) -> None:
        for page in absent:
            machine.protect(DATA + page * PAGE, machine.leaf(DATA + page * PAGE) & ~1)

    results = DATA + 4 * PAGE
    handler = f"""
        vmovdqu [{results + 0x40}], ymm0; vmovdqu [{results + 0x60}], ymm2
        push rax; mov rax, cr2; shr rax, 12; or qword ptr [rax * 8 + 0x4000], 1; mov rax, cr2; invlpg [rax]
        inc qword ptr [{results + 0x80}]; pop rax; add rsp, 8; iretq"""
    return run_asm(
        engine,
        f"""vmovdqu ymm1, [{results}]; vmovdqu ymm2, [{results + 0x20}]; vpcmpeqd ymm0, ymm0, ymm0
            {source}
            vmovdqu [{results}], ymm0; vmovdqu [{results + 0x20}], ymm2""",
        {"rbx": DATA},
        {
            DATA: struct.pack("<4096I", *range(4096)),
            results: index.ljust(32, b"\0") + struct.pack("<8I", *mask) + bytes(0x68),
        },
        cpl=3,
        handlers={14: handler} if fixes else {},
        setup=setup,
    )


def at_fault(outcome: Outcome) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Destination and mask that the handler saw, and how often it ran."""
    values = struct.unpack_from("<17I", outcome.memory[DATA + 4 * PAGE], 0x40)
    return values[:8], values[8:16], values[16]


def results(outcome: Outcome) -> tuple[tuple[int, ...], tuple[int, ...]]:
    values = struct.unpack_from("<16I", outcome.memory[DATA + 4 * PAGE])
    return values[:8], values[8:]


SIGN = 1 << 31
REST = 0xFFFF_FFFF


def test_a_fault_leaves_the_elements_that_were_done(avx2: str) -> None:
    index = dwords(1, 2, 1024, 4, 5, 6, 2048, 8)
    mask = [SIGN | 1, 0x7FFF_FFFF, *(SIGN | n for n in range(2, 8))]
    outcome = gather(avx2, "vpgatherdd ymm0, [rbx + ymm1 * 4], ymm2", index, mask, (1, 2), fixes=True)
    assert outcome.exit == "done", outcome
    # the second fault's, the last that the handler stored
    dest, left, faults = at_fault(outcome)
    assert faults == 2
    assert dest == (1, REST, 1024, 4, 5, 6, REST, REST)
    assert left[:6] == (0,) * 6
    assert all(word & SIGN for word in left[6:])
    assert results(outcome) == ((1, REST, 1024, 4, 5, 6, 2048, 8), (0,) * 8)


def test_a_fault_tells_the_elements_address(avx2: str) -> None:
    outcome = gather(avx2, "vgatherdpd ymm0, [rbx + xmm1 * 8], ymm2", dwords(0, 1024, 512, 3), [SIGN] * 8, (2,))
    assert outcome.fault is not None
    assert (outcome.fault.vector, outcome.fault.error, outcome.fault.cr2) == (14, 4, DATA + 0x2000)


def test_elements_that_are_masked_are_not_accessed(avx2: str) -> None:
    outcome = gather(
        avx2,
        "vgatherdps xmm0, [rbx + xmm1 * 4], xmm2",
        dwords(1024, 7, -(1 << 28), 1),
        [1, SIGN, 0, 5, 0, 0, 0, 0],
        (1,),
    )
    assert outcome.exit == "done"
    assert results(outcome) == ((REST, 7, REST, REST, 0, 0, 0, 0), (0,) * 8)


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("vpgatherqd xmm0, [rbx + xmm1 * 4], xmm2", (3, 9)),
        ("vgatherqps xmm0, [rbx + ymm1 * 4], xmm2", (3, 9, 27, 81)),
        ("vpgatherqq xmm0, [rbx + xmm1 * 4], xmm2", (3, 4, 9, 10)),
        ("vgatherqpd ymm0, [rbx + ymm1 * 4], ymm2", (3, 4, 9, 10, 27, 28, 81, 82)),
        ("vpgatherdq xmm0, [rbx + xmm1 * 4], xmm2", (3, 4, 0, 1)),
    ],
)
def test_what_is_above_the_elements_is_cleared(avx2: str, source: str, want: tuple[int, ...]) -> None:
    outcome = gather(avx2, source, struct.pack("<4q", 3, 9, 27, 81), [REST] * 8)
    assert outcome.exit == "done"
    assert results(outcome) == (want + (0,) * (8 - len(want)), (0,) * 8)


@pytest.mark.parametrize("registers", [(0, 0, 2), (0, 1, 0), (0, 1, 1), (3, 3, 3)])
def test_registers_that_are_the_same_are_invalid(avx2: str, registers: tuple[int, int, int]) -> None:
    dest, index, mask = registers
    code = bytes([0xC4, 0xE2, 0x01 | (~mask & 15) << 3 | 4, 0x90, 0x04 | dest << 3, 0x83 | index << 3])
    outcome = run_asm(avx2, f".byte {', '.join(map(str, code))}", {"rbx": DATA}, cpl=3)
    assert outcome.fault is not None
    assert (outcome.fault.vector, outcome.fault.rip) == (6, CODE)


def test_an_address_that_is_not_canonical_faults(avx2: str) -> None:
    source = "mov rbx, 0x7ffffffff000; vpgatherqq xmm0, [rbx + xmm1 * 8], xmm2"
    outcome = gather(avx2, source, struct.pack("<2q", 1 << 30, 0), [REST] * 8)
    assert outcome.fault is not None
    assert (outcome.fault.vector, outcome.fault.error) == (13, 0)


def test_a_task_switch_flag_makes_gathers_fault(whole: str, avx2: str) -> None:
    code = "mov rax, cr0; or al, 8; mov cr0, rax; vpgatherdd ymm0, [rbx + ymm1 * 4], ymm2"
    outcome = run_asm(whole, code, {"rbx": DATA})
    assert outcome.fault is not None
    assert outcome.fault.vector == 7


def test_gathers_need_avx_enabled(whole: str, avx2: str) -> None:
    code = "xor ecx, ecx; xor edx, edx; mov eax, 3; xsetbv; vpgatherdd ymm0, [rbx + ymm1 * 4], ymm2"
    outcome = run_asm(whole, code, {"rbx": DATA})
    assert outcome.fault is not None
    assert outcome.fault.vector == 6


def test_gathers_in_32_bit_code(avx2: str, whole: str) -> None:
    outcome = run_asm(
        whole,
        f"""vpcmpeqd ymm2, ymm2, ymm2; vmovdqu ymm1, [{DATA + 0x1000}]; mov ebx, {DATA + 4 - 0x1000}
            vpgatherdd ymm0, [ebx + ymm1 * 4 + 0x1000], ymm2; vmovdqu [{DATA + 0x1000}], ymm0""",
        {},
        {DATA: struct.pack("<64I", *range(64)), DATA + 0x1000: dwords(5, -1, 7, 8, 9, 10, 11, 12)},
        mode="prot32",
    )
    assert outcome.exit == "done", outcome
    assert outcome.memory[DATA + 0x1000] == struct.pack("<8I", 6, 0, 8, 9, 10, 11, 12, 13)
