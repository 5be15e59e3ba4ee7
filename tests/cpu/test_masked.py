"""Memory operands under a mask: what it leaves out is not accessed, and what it selects faults as ever."""

from __future__ import annotations

import struct

import pytest
from harness import DATA, Machine, Outcome, host_flags, run_asm
from test_state_components import PAGE, enable, offered

FAR = DATA + 16 * PAGE
"""A page of memory that is not adjacent to the one which DATA's is mapped before."""
RESULT = DATA + 8 * PAGE
WORDS = struct.pack("<16I", *range(1, 17))


@pytest.fixture(autouse=True)
def avx512() -> None:
    if not {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= host_flags():
        pytest.skip("the host has no AVX-512")


def run(source: str, at: int, mask: int, second: str = "absent", cpl: int = 3) -> Outcome:
    """Run with rbx = at, k1 = the mask, zmm1 = 1 to 16, zmm0 all ones. The page behind DATA's is `absent`, read-only
    (`fixed`) or a frame elsewhere (`far`). Behind it zmm0 is at RESULT."""

    def setup(machine: Machine) -> None:
        machine.vcpu.set_cpuid(offered())
        leaf = machine.leaf(DATA + PAGE)
        frame = {"absent": leaf & ~1, "fixed": leaf & ~2, "far": leaf & 0xFFF | FAR}[second]
        machine.protect(DATA + PAGE, frame)
        machine.vcpu.set("xcr0", 0xE7)

    memory = {
        DATA: bytes(PAGE - 64) + WORDS,
        DATA + PAGE: WORDS + bytes(64),
        FAR: WORDS + bytes(64),
        RESULT: bytes(64),
        RESULT + 64: WORDS,
    }
    code = f"""kmovq k1, rcx; vmovdqu64 zmm1, [{RESULT + 64}]; vpternlogd zmm0, zmm0, zmm0, 0xff
        {source}
        vmovdqu64 [{RESULT}], zmm0"""
    return run_asm("bt", code, {"rbx": at, "rcx": mask}, memory, cpl=cpl, setup=setup)


def words(outcome: Outcome, at: int = RESULT) -> tuple[int, ...]:
    return struct.unpack("<16I", outcome.memory[at][:64])


END = DATA + PAGE
ONES = 0xFFFF_FFFF


@pytest.mark.parametrize("cpl", [0, 3])
def test_elements_that_a_load_leaves_out_are_not_accessed(cpl: int) -> None:
    outcome = run("vmovdqu32 zmm0{k1}, [rbx]", END - 32, 0x00FF, cpl=cpl)
    assert outcome.exit == "done"
    assert words(outcome) == (*range(9, 17), *(ONES,) * 8)


@pytest.mark.parametrize(("mask", "faults_at"), [(0x0100, END), (0xFFFF, END), (0x8000, END + 28)])
def test_an_element_that_is_selected_faults(mask: int, faults_at: int) -> None:
    outcome = run("vmovdqu32 zmm0{k1}, [rbx]", END - 32, mask)
    assert outcome.fault is not None
    assert (outcome.fault.vector, outcome.fault.error, outcome.fault.cr2) == (14, 4, faults_at)


@pytest.mark.parametrize(
    ("source", "at", "mask", "done"),
    [
        ("vpaddd zmm0{k1}{z}, zmm1, [rbx]", END - 4, 0x0001, True),
        ("vpaddd zmm0{k1}{z}, zmm1, dword ptr [rbx]{1to16}", END, 0, True),
        ("vpaddd zmm0{k1}{z}, zmm1, dword ptr [rbx]{1to16}", END, 1 << 15, False),
        ("vpexpandd zmm0{k1}, [rbx]", END - 8, 0xC000, True),
        ("vpexpandd zmm0{k1}, [rbx]", END - 8, 0x8101, False),
        ("vpcompressd [rbx]{k1}, zmm1", END - 8, 0xC000, True),
        ("vpcompressd [rbx]{k1}, zmm1", END - 8, 0x8101, False),
        ("vpermd zmm0{k1}, zmm1, [rbx]", END - 4, 0, False),  # reads all of its operand, whatever the mask
        ("vbroadcastf32x4 zmm0{k1}, [rbx]", END - 8, 0x3333, True),
        ("vbroadcastf32x4 zmm0{k1}, [rbx]", END - 8, 0x4000, False),
        ("vpmovqb [rbx]{k1}, zmm1", END - 3, 0x07, True),
        ("vpmovqb [rbx]{k1}, zmm1", END - 3, 0x08, False),
        ("vmovss xmm0{k1}, dword ptr [rbx]", END, 0xFE, True),
        ("vcvtps2pd zmm0{k1}, [rbx]", END - 4, 1, True),
        ("vcvtps2pd zmm0{k1}, [rbx]", END - 4, 2, False),
        ("vpxor ymm2, ymm2, ymm2; vpmaskmovd ymm0, ymm2, [rbx]", END, 0, True),
        ("vpcmpeqd ymm2, ymm2, ymm2; vpmaskmovd ymm0, ymm2, [rbx]", END - 28, 0, False),
        ("vpcmpeqd xmm2, xmm2, xmm2; vmaskmovps [rbx], ymm2, ymm1", END - 16, 0, True),
    ],
)
def test_each_kind_of_access_has_its_own_elements(source: str, at: int, mask: int, done: bool) -> None:
    outcome = run(source, at, mask)
    if done:
        assert outcome.exit == "done", outcome.fault
    else:
        assert outcome.fault is not None
        assert (outcome.fault.vector, outcome.fault.error & 1) == (14, 0)


def test_a_misaligned_operand_faults_though_its_elements_are_left_out() -> None:
    outcome = run("vmovdqa32 zmm0{k1}, [rbx]", END - 32, 0x0001)
    assert outcome.fault is not None
    assert (outcome.fault.vector, outcome.fault.error) == (13, 0)


def test_loads_over_pages_that_are_not_adjacent() -> None:
    outcome = run("vmovdqu32 zmm0{k1}, [rbx]", END - 32, 0xFF0F, "far")
    assert words(outcome) == (9, 10, 11, 12, *(ONES,) * 4, *range(1, 9))


def test_stores_over_pages_that_are_not_adjacent() -> None:
    outcome = run("vmovdqu32 [rbx]{k1}, zmm1", END - 32, 0x8181, "far")
    assert outcome.exit == "done"
    assert struct.unpack("<8I", outcome.memory[DATA][-32:]) == (1, 10, 11, 12, 13, 14, 15, 8)
    assert words(outcome, FAR)[:8] == (9, 2, 3, 4, 5, 6, 7, 16)
    assert outcome.memory[DATA + PAGE] == WORDS + bytes(64)


@pytest.mark.parametrize(("mask", "done"), [(0x00FF, True), (0x01FF, False)])
def test_stores_need_rights_where_they_store(mask: int, done: bool) -> None:
    outcome = run("vmovdqu32 [rbx]{k1}, zmm1", END - 32, mask, "fixed")
    if done:
        assert struct.unpack("<8I", outcome.memory[DATA][-32:]) == tuple(range(1, 9))
    else:
        assert outcome.fault is not None
        assert (outcome.fault.error, outcome.fault.cr2) == (7, END)
        assert outcome.memory[DATA][-32:] == WORDS[32:]


def test_a_store_changes_code_that_it_reaches_and_no_other() -> None:
    """Two calls of one routine: the store between them replaces the value that it returns."""
    code = """lea rbx, [rip + value - 64]; mov eax, 1 << 16; kmovd k2, eax; call routine; mov r8d, eax
        mov eax, 1; kmovd k2, eax; lea rbx, [rip + value]; vmovdqu32 [rbx]{k2}, zmm1; call routine
        mov r9d, eax; jmp out
        routine: .byte 0xb8
        value: .long 7
        ret
        out:"""
    outcome = run_asm(
        "bt",
        enable(0xE7) + f"vmovdqu64 zmm1, [{RESULT + 64}];" + code,
        {},
        {RESULT + 64: WORDS},
        setup=lambda machine: machine.vcpu.set_cpuid(offered()),
    )
    assert outcome.exit == "done", outcome
    assert (outcome.regs["r8"], outcome.regs["r9"]) == (7, 1)
