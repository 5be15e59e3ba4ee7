"""State components beyond AVX: AVX-512 in XCR0, XSAVES, and protection keys, as the guest's CPUID reports them."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest
from harness import CODE, DATA, Machine, Outcome, engine_called, host_flags, run_asm

from pyhyve.cpu.processor import CpuidEntry
from pyhyve.vmm.cpuid import CpuidPolicy
from pyhyve.vmm.hostcpu import cpuid as host_cpuid
from pyhyve.vmm.topology import Topology

PAGE = 4096
PKE = 1 << 22
AREA = DATA + 4 * PAGE
XSAVES_AREA = DATA + 8 * PAGE


def offered() -> list[CpuidEntry]:
    """What a guest of this engine sees on this host."""
    engine = engine_called("bt")
    assert not isinstance(engine, str)
    return CpuidPolicy(host_cpuid, engine.capabilities(), Topology(), 2_000_000, 1_000_000).entries(0)


def has(leaf: int, subleaf: int, register: str, bit: int) -> bool:
    words = {(entry.leaf, entry.subleaf or 0): entry for entry in offered()}
    return bool(getattr(words[leaf, subleaf], register) >> bit & 1)


def run(
    source: str,
    regs: Mapping[str, int] | None = None,
    memory: Mapping[int, bytes] | None = None,
    cpl: int = 0,
    cr4: int = 0,
    keys: Mapping[int, int] | None = None,
) -> Outcome:
    """Run on the software processor; `keys`: protection keys by page."""

    def setup(machine: Machine) -> None:
        machine.vcpu.set_cpuid(offered())
        machine.vcpu.set("cr4", machine.vcpu.get("cr4") | cr4)
        for page, key in (keys or {}).items():
            machine.protect(page, machine.leaf(page) | key << 59)

    return run_asm("bt", source, regs, memory, cpl=cpl, setup=setup)


@pytest.fixture
def avx512() -> None:
    if not {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= host_flags():
        pytest.skip("the host has no AVX-512")


def enable(xcr0: int) -> str:
    return f"xor ecx, ecx; xor edx, edx; mov eax, {xcr0:#x}; xsetbv;"


# --- AVX-512 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["vpaddd zmm0, zmm1, zmm2", "kxorw k1, k2, k3", "vpaddd xmm0, xmm1, xmm17"])
def test_avx512_needs_its_state_enabled(avx512: None, source: str) -> None:
    outcome = run(enable(7) + source)
    assert outcome.fault is not None
    assert outcome.fault.vector == 6
    assert run(enable(0xE7) + source).exit == "done"


@pytest.mark.parametrize("xcr0", [0x27, 0x67, 0xE3, 0xE1, 0xC7])
def test_avx512s_parts_are_enabled_together(avx512: None, xcr0: int) -> None:
    outcome = run(enable(xcr0))
    assert outcome.fault is not None
    assert (outcome.fault.vector, outcome.fault.error) == (13, 0)


def test_avx512_state_begins_empty(avx512: None) -> None:
    source = f"""vmovdqu64 [{AREA}], zmm31; kmovq rbx, k5; vextracti64x4 ymm1, zmm3, 1; vmovdqu [{AREA + 64}], ymm1"""
    outcome = run(enable(0xE7) + source, memory={AREA: b"\xff" * 96})
    assert outcome.exit == "done"
    assert outcome.regs["rbx"] == 0
    assert outcome.memory[AREA] == bytes(96)


@pytest.mark.parametrize(
    "code", ["0x62, 0xf1, 0x75, 0x48, 0xfe, 0xc2", "0xc5, 0xf5, 0xfe, 0xc2", "0xc4, 0xe2, 0x70, 0xf2, 0xc2"]
)
def test_vex_and_evex_are_not_valid_in_real_mode(avx512: None, code: str) -> None:
    enabling = "mov eax, cr4; or eax, 0x40000; mov cr4, eax; xor ecx, ecx; xor edx, edx; mov eax, 0xe7; xsetbv;"
    outcome = run_asm(
        "bt",
        f"{enabling} .byte {code}",
        mode="real16",
        setup=lambda machine: machine.vcpu.set_cpuid(offered()),
    )
    assert outcome.fault is not None
    assert outcome.fault.vector == 6


# --- XSAVES ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def xsaves() -> None:
    if not has(0xD, 1, "eax", 3):
        pytest.skip("the host has no XSAVES")


def test_xsaves_and_xrstors(xsaves: None) -> None:
    source = f"""mov eax, 7; xor edx, edx
        vpcmpeqd ymm3, ymm3, ymm3; vpcmpeqd xmm4, xmm4, xmm4
        xsaves64 [{XSAVES_AREA}]
        vpxor ymm3, ymm3, ymm3; vpxor ymm4, ymm4, ymm4
        xrstors64 [{XSAVES_AREA}]
        vmovdqu [{AREA}], ymm3; vmovdqu [{AREA + 32}], ymm4"""
    outcome = run(source, memory={AREA: bytes(64), XSAVES_AREA: bytes(832)})
    assert outcome.exit == "done"
    assert outcome.memory[AREA] == b"\xff" * 48 + bytes(16)
    state, form = struct.unpack_from("<2Q", outcome.memory[XSAVES_AREA], 512)
    assert (state & 6, form) == (6, 1 << 63 | 7)


@pytest.mark.parametrize("form", [0, 1 << 63 | 1 << 8, 1 << 63])
def test_xrstors_takes_its_own_format_only(xsaves: None, form: int) -> None:
    area = bytes(512) + struct.pack("<2Q", 1, form) + bytes(320)
    outcome = run(f"mov eax, 7; xor edx, edx; xrstors64 [{XSAVES_AREA}]", memory={XSAVES_AREA: area})
    assert outcome.fault is not None
    assert (outcome.fault.vector, outcome.fault.error) == (13, 0)


@pytest.mark.parametrize("source", [f"xsaves64 [{XSAVES_AREA}]", f"xrstors64 [{XSAVES_AREA}]"])
def test_xsaves_is_for_supervisors(xsaves: None, source: str) -> None:
    outcome = run(source, cpl=3)
    assert outcome.fault is not None
    assert (outcome.fault.vector, outcome.fault.rip) == (13, CODE)


def test_there_are_no_supervisor_components(xsaves: None) -> None:
    outcome = run(
        "mov ecx, 0xda0; xor edx, edx; xor eax, eax; wrmsr; dec eax; rdmsr; mov ebx, eax; mov eax, 256; wrmsr"
    )
    assert outcome.fault is not None
    assert (outcome.fault.vector, outcome.regs["rbx"]) == (13, 0)


def test_components_that_are_not_in_use_are_not_stored(avx512: None) -> None:
    source = f"""mov eax, 0xe7; xor edx, edx; vzeroall; vpcmpeqd ymm3, ymm3, ymm3
        xsavec64 [{XSAVES_AREA}]; vzeroall; xrstor64 [{XSAVES_AREA}]; vmovdqu [{AREA}], ymm3"""
    outcome = run(enable(0xE7) + source, memory={AREA: bytes(32), XSAVES_AREA: bytes(576) + b"\xaa" * 2112})
    assert outcome.exit == "done"
    assert outcome.memory[AREA] == b"\xff" * 32
    assert struct.unpack_from("<2Q", outcome.memory[XSAVES_AREA], 512) == (6, 1 << 63 | 0xE7)
    assert outcome.memory[XSAVES_AREA][832:] == b"\xaa" * (2688 - 832)


# --- protection keys -------------------------------------------------------------------------------------------------

NO_ACCESS, NO_WRITE = 1, 2


def pkru(key: int, rights: int) -> str:
    return f"xor ecx, ecx; xor edx, edx; mov eax, {rights << 2 * key:#x}; wrpkru;"


@pytest.mark.parametrize(
    ("rights", "access", "cpl", "error"),
    [
        (NO_ACCESS, "mov al, [rbx]", 3, 0x25),
        (NO_ACCESS, "mov [rbx], al", 3, 0x27),
        (NO_WRITE, "mov [rbx], al", 3, 0x27),
        (NO_WRITE, "mov al, [rbx]", 3, None),
        (NO_ACCESS, "mov al, [rbx]", 0, 0x21),
        (NO_WRITE, "mov [rbx], al", 0, 0x23),
        (NO_WRITE, "mov rsi, cr0; btr rsi, 16; mov cr0, rsi; mov [rbx], al", 0, None),
        (NO_ACCESS, "mov rsi, cr4; btr rsi, 22; mov cr4, rsi; mov [rbx], al", 0, None),
    ],
)
def test_a_key_takes_rights_away(rights: int, access: str, cpl: int, error: int | None) -> None:
    outcome = run(pkru(5, rights) + access, {"rbx": DATA}, cpl=cpl, cr4=PKE, keys={DATA: 5})
    if error is None:
        assert outcome.exit == "done"
        return
    assert outcome.fault is not None
    assert (outcome.fault.vector, outcome.fault.error, outcome.fault.cr2) == (14, error, DATA)


@pytest.mark.parametrize(("rights", "access"), [(NO_ACCESS, "mov al, [rbx]"), (NO_WRITE, "mov [rbx], al")])
def test_rights_that_change_hold_at_once(rights: int, access: str) -> None:
    """With the page in the TLB, and without INVLPG."""
    source = f"mov al, [rbx]; mov [rbx], al; {pkru(5, rights)} {pkru(5, 0)} {access}; {pkru(5, rights)} nop; {access}"
    outcome = run(source, {"rbx": DATA}, cpl=3, cr4=PKE, keys={DATA: 5})
    assert outcome.fault is not None
    assert outcome.fault.vector == 14
    assert outcome.fault.error & 0x20


def test_other_keys_and_supervisors_pages_keep_their_rights() -> None:
    def setup(machine: Machine) -> None:
        machine.vcpu.set_cpuid(offered())
        machine.vcpu.set("cr4", machine.vcpu.get("cr4") | PKE)
        machine.protect(DATA, machine.leaf(DATA) & ~4 | 5 << 59)
        machine.protect(DATA + PAGE, machine.leaf(DATA + PAGE) | 6 << 59)

    outcome = run_asm("bt", pkru(5, 3) + f"mov [{DATA}], al; mov [{DATA + PAGE}], al", setup=setup)
    assert outcome.exit == "done"


def test_code_is_fetched_whatever_its_key() -> None:
    outcome = run(pkru(7, 3) + "nop", cpl=3, cr4=PKE, keys={CODE: 7})
    assert outcome.exit == "done"


def test_rdpkru_and_wrpkru() -> None:
    outcome = run(pkru(15, 2) + "dec edx; mov rax, -1; rdpkru; mov ebx, edx", cpl=3, cr4=PKE)
    assert (outcome.exit, outcome.regs["rax"], outcome.regs["rbx"]) == ("done", 2 << 30, 0)
    for source, vector in (("mov ecx, 1; rdpkru", 13), ("mov ecx, 0; mov edx, 1; wrpkru", 13)):
        outcome = run(source, cr4=PKE)
        assert outcome.fault is not None
        assert outcome.fault.vector == vector
    for source in ("rdpkru", "xor ecx, ecx; xor edx, edx; wrpkru"):
        outcome = run(source)
        assert outcome.fault is not None
        assert outcome.fault.vector == 6


@pytest.mark.parametrize("save", ["xsave64", "xsavec64", "xsaveopt64", "xsaves64"])
def test_pkru_is_a_state_component(save: str) -> None:
    if save == "xsaves64" and not has(0xD, 1, "eax", 3):
        pytest.skip("the host has no XSAVES")
    restore = "xrstors64" if save == "xsaves64" else "xrstor64"
    source = f"""mov eax, 1; cpuid; bt ecx, 27; jnc no; {pkru(3, 1)} mov eax, 0x207; {save} [{XSAVES_AREA}]
        {pkru(4, 1)} mov eax, 0x207; {restore} [{XSAVES_AREA}]; rdpkru; mov ebx, eax
        mov eax, 0x200; {save} [{XSAVES_AREA}]; mov rax, [{XSAVES_AREA + 512}]; and rax, ~0x200
        mov [{XSAVES_AREA + 512}], rax; mov eax, 0x200; {restore} [{XSAVES_AREA}]; rdpkru; mov esi, eax; no:"""
    outcome = run(enable(0x207) + source, memory={XSAVES_AREA: bytes(PAGE)}, cr4=PKE)
    assert outcome.exit == "done", outcome
    assert (outcome.regs["rbx"], outcome.regs["rsi"]) == (1 << 6, 0)


def test_cpuid_tells_of_protection_keys() -> None:
    source = "xor ecx, ecx; mov eax, 7; cpuid; mov esi, ecx; mov ecx, 9; mov eax, 13; cpuid; mov edi, ebx"
    outcome = run(enable(0x207) + source + "; xor ecx, ecx; mov eax, 13; cpuid", cr4=PKE)
    assert outcome.regs["rsi"] & 0x18 == 0x18
    assert outcome.regs["rbx"] == outcome.regs["rdi"] + 8
    assert outcome.regs["rax"] & 0x200
