"""Microcode: string operations."""

from __future__ import annotations

import asm
import pytest
from bare import CF, CODE, DATA, DF, GP, KDATA, OF, PAGE, PF, SF, X_IO, ZF, Machine, linear, probe, shuffled

pytestmark = pytest.mark.skipif(bool(asm.MISSING), reason=str(asm.MISSING))


@pytest.fixture
def m() -> Machine:
    return Machine()


# --- strings ---------------------------------------------------------------------------------------------------------


def pattern(n: int, seed: int = 0) -> bytes:
    return bytes((k * 37 + (k >> 8) * 11 + seed) & 0xFF for k in range(n))


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("distance", [-4099, -9, -8, -3, -1, 0, 1, 2, 3, 7, 8, 4097])
def test_rep_movs_moves_element_by_element(m: Machine, down: bool, size: int, distance: int) -> None:
    """Whatever overlaps, and over page ends at any offset: as if each element were moved by itself."""
    shuffled(m)
    length, count = 0xA000, 1500
    image = bytearray(pattern(length))
    m.p.write(DATA, bytes(image))
    source = 0x1FFD if not down else 0x1FFD + (count - 1) * size
    for k in range(count):
        at = source + (-k if down else k) * size
        image[at + distance : at + distance + size] = image[at : at + size]
    m.p.set(rsi=DATA + source, rdi=DATA + source + distance, rcx=count, rflags=2 | (DF if down else 0))
    m.ok("rep movs" + "bwdq"[size.bit_length() - 1])
    assert linear(m, DATA, length) == bytes(image)
    step = -size if down else size
    assert m.get("rcx", "rsi", "rdi", "rip") == (
        0, DATA + source + count * step, DATA + source + distance + count * step,
        CODE + (3 if size in (2, 8) else 2),
    )  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_rep_stos(m: Machine, down: bool, size: int) -> None:
    shuffled(m)
    m.p.set(rax=0x1122334455667788, rdi=DATA + 0x4FFB, rcx=1000, rflags=2 | (DF if down else 0))
    m.ok("rep stos" + "bwdq"[size.bit_length() - 1])
    start = 0x4FFB - 999 * size if down else 0x4FFB
    value = (0x1122334455667788).to_bytes(8, "little")[:size]
    assert linear(m, DATA + start - 8, 1000 * size + 16) == bytes(8) + value * 1000 + bytes(8)


def test_string_fault_keeps_the_iterations_done(m: Machine) -> None:
    m.p.write(DATA, pattern(0x2000))
    m.page(DATA + 0x9000, 0)
    m.p.set(rsi=DATA, rdi=DATA + 0x8F00, rcx=0x800)
    assert m.run("rep movsb") == probe.FAULT
    assert m.p.fault() == (PAGE, 2)
    assert m.p.get("fault_addr") == DATA + 0x9000
    assert m.get("rcx", "rsi", "rdi", "rip") == (0x700, DATA + 0x100, DATA + 0x9000, CODE)
    assert linear(m, DATA + 0x8F00, 0x100) == pattern(0x100)


def test_string_element_over_a_page_end_faults_whole(m: Machine) -> None:
    m.page(DATA + 0x9000, 0)
    m.p.set(rax=(1 << 64) - 1, rdi=DATA + 0x8FFC, rcx=2)
    assert m.run("rep stosq") == probe.FAULT
    assert m.p.get("fault_addr") == DATA + 0x9000
    assert m.rcx == 2
    assert linear(m, DATA + 0x8FF8, 8) == bytes(8)


def test_rep_with_zero_count_touches_nothing(m: Machine) -> None:
    m.p.set(rcx=0, rdi=1 << 63, rsi=1 << 63, rflags=2 | ZF)
    for source in ("rep movsb", "rep stosb", "repne scasb", "repe cmpsb", "rep lodsb"):
        m.p.set(rip=CODE)
        m.ok(source)
        assert m.get("rip", "rflags") == (CODE + 2, 2 | ZF)


def test_poll_stops_a_rep_between_pages(m: Machine) -> None:
    m.p.set(rdi=DATA, rax=0x55, rcx=0x5000, poll=1)
    m.ok("rep stosb")
    assert m.get("rip", "rcx", "rdi") == (CODE, 0x4000, DATA + 0x1000)
    m.p.set(poll=0)
    m.ok("rep stosb")
    assert m.get("rip", "rcx") == (CODE + 2, 0)
    assert linear(m, DATA, 0x5001) == b"\x55" * 0x5000 + b"\0"


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("where", [0, 1, 3000, 4999])
def test_repne_scas_stops_at_the_match(m: Machine, size: int, down: bool, where: int) -> None:
    shuffled(m)
    start = 0xC003 if down else 0x1003
    step = -size if down else size
    m.p.set(rax=0xFFEEDDCCBBAA9988, rdi=DATA + start, rcx=5000, rflags=2 | (DF if down else 0))
    m.p.write(DATA + start + where * step, (0xFFEEDDCCBBAA9988).to_bytes(8, "little")[:size])
    m.ok("repne scas" + "bwdq"[size.bit_length() - 1])
    assert m.get("rcx", "rdi") == (4999 - where, DATA + start + (where + 1) * step)
    assert m.rflags & (ZF | CF | SF | OF | PF) == ZF | PF


def test_repe_cmps_leaves_the_flags_of_the_difference(m: Machine) -> None:
    shuffled(m)
    m.p.write(DATA + 0x1FF0, pattern(0x3000))
    m.p.write(DATA + 0x8001, pattern(0x3000))
    m.p.write(DATA + 0x8001 + 0x2345, bytes([pattern(0x3000)[0x2345] + 1 & 0xFF]))
    m.p.set(rsi=DATA + 0x1FF0, rdi=DATA + 0x8001, rcx=0x3000)
    m.ok("repe cmpsb")
    assert m.get("rcx", "rsi") == (0x3000 - 0x2346, DATA + 0x1FF0 + 0x2346)
    assert m.rflags & (ZF | CF) == CF
    m.p.set(rsi=DATA + 0x1FF0, rdi=DATA + 0x1FF0, rcx=0x300)
    m.ok("repe cmpsq")
    assert m.rcx == 0
    assert m.rflags & ZF


def test_cmps_over_page_ends_compares_whole_elements(m: Machine) -> None:
    shuffled(m)
    for a, b in ((5, 7), (7, 5), (5, 5), (1 << 63, 1)):
        m.p.write(DATA + 0x1FFD, a.to_bytes(8, "little"))
        m.p.write(DATA + 0x3FFA, b.to_bytes(8, "little"))
        m.p.set(rsi=DATA + 0x1FFD, rdi=DATA + 0x3FFA)
        m.ok("cmpsq")
        difference = (a - b) & (1 << 64) - 1
        assert bool(m.rflags & CF) == (a < b)
        assert bool(m.rflags & ZF) == (a == b)
        assert bool(m.rflags & SF) == bool(difference >> 63)
        assert bool(m.rflags & OF) == (a == 1 << 63)


def test_lods_loads_the_last_element(m: Machine) -> None:
    m.p.write(DATA, pattern(0x3000))
    m.p.set(rsi=DATA + 1, rax=0)
    m.ok("lodsd")
    assert m.rax == int.from_bytes(pattern(5)[1:], "little")
    m.p.set(rsi=DATA, rcx=0x2001)
    m.ok("rep lodsb")
    assert m.rax & 0xFF == pattern(0x2001)[-1]
    assert m.rsi == DATA + 0x2001


def test_segment_override_applies_to_the_source_only(m: Machine) -> None:
    m.p.set(fs__base=DATA, rsi=0x10, rdi=DATA + 0x100, rcx=4)
    m.p.write(DATA + 0x10, b"abcd")
    m.ok("rep movsb byte ptr es:[rdi], byte ptr fs:[rsi]")
    assert linear(m, DATA + 0x100, 4) == b"abcd"


def test_address_size_cuts_index_registers(m: Machine) -> None:
    m.p.set(rdi=0xFFFFFFFF_00000000 | DATA, rcx=0xFFFFFFFF_00000003, rax=0x41)
    m.ok("addr32 rep stosb")
    assert m.get("rdi", "rcx") == (DATA + 3, 0)
    assert linear(m, DATA, 4) == b"AAA\0"


def test_string_wraps_at_64_kib_in_16_bit_addressing() -> None:
    m = Machine(16)
    m.segment("es", 0x4000, 0x40000, 0xFFFF, 0x93)
    m.p.set(rdi=0xAAAA_FFFE, rcx=0xBBBB_0004, rax=0x41)
    m.ok("rep stosb")
    assert m.get("rdi", "rcx") == (0xAAAA_0002, 0xBBBB_0000)
    assert m.p.peek(0x4FFFE, 2) == m.p.peek(0x40000, 2) == b"AA"
    m.p.set(rdi=0xFFFF, rcx=1)
    assert m.faults("rep stosw") == (GP, 0)


def test_string_stops_at_the_segment_limit() -> None:
    m = Machine(32)
    m.segment("es", KDATA, DATA, 0x1FFF, 0x93)
    m.p.set(rdi=0x1FF0, rcx=0x20, rax=0x41)
    assert m.run("rep stosb") == probe.FAULT
    assert m.p.fault() == (GP, 0)
    assert m.get("rdi", "rcx") == (0x2000, 0x10)
    assert m.p.peek(DATA + 0x1FF0, 17) == b"A" * 16 + b"\0"


def test_string_input_and_output_exit(m: Machine) -> None:
    m.p.set(rdx=0x3F8, rcx=5)
    x = m.exits("rep outsb")
    assert (x["reason"], x["io_port"], x["io_size"], x["io_in"], x["io_string"]) == (X_IO, 0x3F8, 1, 0, 1)
    assert m.rip == CODE
    assert m.exits("insd")["io_in"] == 1
    m.p.set(rcx=0)
    m.ok("rep insb")
