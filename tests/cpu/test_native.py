"""The software processor against the host: the same bytes, the same state, the same result."""

import os
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import window
from harness import host_flags
from iced_x86 import Decoder, RflagsBits
from window import DATA, DATA_SIZE, REGS, SLOT, Case, State

from pyhyve.cpu import exits
from pyhyve.cpu.processor import Segment
from pyhyve.vmm.memory.vmspace import Vmspace

engine_module = pytest.importorskip("pyhyve.cpu.bt.engine")
decode_module = pytest.importorskip("pyhyve.cpu.bt.decode")

_FLAGS = {RflagsBits.CF: 1, RflagsBits.PF: 4, RflagsBits.AF: 0x10, RflagsBits.ZF: 0x40, RflagsBits.SF: 0x80,
          RflagsBits.OF: 0x800}  # fmt: skip


def undefined_of(code: bytes) -> tuple[int, int, int]:
    """RFLAGS bits that the instruction defines, those that it leaves undefined, those that it reads, by iced-x86."""
    insn = next(iter(Decoder(64, code)))
    defined = undefined = read = 0
    for bit, flag in _FLAGS.items():
        if insn.rflags_undefined & bit:
            undefined |= flag
        elif insn.rflags_modified & bit:
            defined |= flag
        if insn.rflags_read & bit:
            read |= flag
    return defined, undefined, read


class Guest:
    """A guest in 64-bit ring 0 whose window is mapped where the host's is."""

    def __init__(self) -> None:
        engine = engine_module.Engine()
        self.vm = engine.create_vm()
        self.space = Vmspace(engine.capabilities())
        self.space.map_ram(0, 0x4000_0000)
        tables = 0x10_0000
        entries = [tables + 0x1003, tables + 0x2003]
        for n, entry in enumerate(entries):
            self.space.write(tables + 0x1000 * n, struct.pack("<Q", entry) + bytes(4088))
        self.space.write(tables + 0x2000, struct.pack("<512Q", *((n << 21) | 0x83 for n in range(512))))
        # the large page about the data window, by small ones, less those that are not there
        region = DATA >> 21
        absent = (DATA - 0x1000, DATA + DATA_SIZE)
        pages = (region << 21 | n << 12 for n in range(512))
        self.space.write(tables + 0x3000, struct.pack("<512Q", *(0 if page in absent else page | 3 for page in pages)))
        self.space.write(tables + 0x2000 + 8 * region, struct.pack("<Q", tables + 0x3003))
        self.cpu = self.vm.create_vcpu(0)
        cpu = self.cpu
        cpu.set("cr0", 0x80050033)
        cpu.set("cr4", 0x40620)
        cpu.set("cr3", tables)
        cpu.set("efer", 0xD00)
        cpu.set("xcr0", window.STATE)
        cpu.set_segment("cs", Segment(8, 0, 0xFFFFFFFF, 0xA09B))
        for name in ("ss", "ds", "es"):
            cpu.set_segment(name, Segment(16, 0, 0xFFFFFFFF, 0xC093))

    def run(self, case: Case) -> State:
        at = case.address
        cpu = self.cpu
        self.space.write(at, case.code + b"\xf4")
        self.space.write(DATA, case.state.data)
        cpu.invalidate_code(self._hva(at), SLOT)
        for name, value in zip(REGS, case.state.regs, strict=True):
            cpu.set(name, value)
        cpu.set("rflags", case.state.flags & ~0x200)
        cpu.set("rip", at)
        cpu.set_xsave(case.state.xsave)
        while True:
            cpu.set_ept(self.space.pmap.eptp, self.space.pmap.eptgen)
            reason = cpu.run()
            if reason != exits.EPT_VIOLATION:
                break
            assert self.space.fault(cpu.exit.gpa, 1 if cpu.exit.qualification & 2 else 0)
        assert reason == exits.HLT, f"{exits.NAMES[reason]} {cpu.message()} rip={cpu.get('rip'):#x}"
        assert cpu.get("rip") == at + len(case.code) + 1
        return State([cpu.get(name) for name in REGS], cpu.get("rflags"), cpu.get_xsave(),
                     self.space.read(DATA, DATA_SIZE))  # fmt: skip

    def _hva(self, gpa: int) -> int:
        for start, hva, size, _ in self.space.ram_ranges():
            if start <= gpa < start + size:
                return hva + gpa - start
        raise AssertionError


def differences(case: Case, got: State, want: State) -> list[str]:
    found = [f"{name}: {a:#x}, native {b:#x}" for name, a, b in zip(REGS, got.regs, want.regs, strict=True) if a != b]
    mask = window.FLAGS & ~case.undefined
    if (got.flags ^ want.flags) & mask:
        found.append(f"flags: {got.flags & mask:#x}, native {want.flags & mask:#x}")

    def vector(area: bytes) -> bytes:
        # FOP, FIP and FDP name host addresses; an area in its initial state may be stored as such
        area = bytes(area)
        bits = area[512]
        ymm = area[576:832] if bits & 4 else bytes(256)
        xmm = area[160:416] if bits & 2 else bytes(256)
        x87 = area[0:6] + area[32:160] if bits & 1 else b"\x7f\x03" + bytes(4 + 128)
        more = [
            area[at : at + size] if bits >> n & 1 else bytes(size) for n, (size, at) in window.AVX512_PLACES.items()
        ]
        return x87 + area[24:28] + xmm + ymm + b"".join(more)

    if vector(got.xsave) != vector(want.xsave):
        found.append("x87 or vector state")
    if got.data != want.data:
        at = next(n for n in range(DATA_SIZE) if got.data[n] != want.data[n])
        found.append(f"memory at data+{at:#x}: {got.data[at : at + 8].hex()}, native {want.data[at : at + 8].hex()}")
    return found


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    machine = Guest()
    yield machine
    machine.vm.close()
    machine.space.close()


def check(guest: Guest, cases: list[Case]) -> tuple[int, list[str]]:
    ran = 0
    failures = []
    for case, want in zip(cases, window.run_native(cases), strict=True):
        if want is None:
            continue
        ran += 1
        try:
            found = differences(case, guest.run(case), want)
        except AssertionError as error:
            found = [str(error)]
        if found:
            listing = "; ".join(str(insn) for insn in Decoder(64, case.code))
            failures.append(f"{case.code.hex()} {listing}: " + ", ".join(found))
    return ran, failures


@pytest.mark.parametrize("make", [window.make_case, window.make_frame_case], ids=["apart", "off shared pointers"])
def test_random_instructions_do_as_on_the_host(guest: Guest, make: Any) -> None:
    decode: Any = decode_module.decode_bytes
    rng = random.Random(int(os.environ.get("PYHYVE_FUZZ_SEED", "1")))
    total = int(os.environ.get("PYHYVE_FUZZ_N", "3000"))
    ran = 0
    while ran < total:
        some, failures = check(guest, [make(rng, decode, undefined_of) for _ in range(250)])
        assert not failures, "\n".join(failures[:10])
        assert some > 25, "nearly every native run faulted"
        ran += some


@pytest.mark.parametrize("make", [window.make_evex_gather_case, window.make_masked_case], ids=["gathers", "masks"])
def test_masked_accesses_do_as_on_the_host(guest: Guest, make: Any) -> None:
    if not window.AVX512:
        pytest.skip("the host has no AVX-512")
    decode: Any = decode_module.decode_bytes
    rng = random.Random(int(os.environ.get("PYHYVE_FUZZ_SEED", "1")))
    ran = 0
    for _ in range(8):
        some, failures = check(guest, [make(rng, decode) for _ in range(250)])
        assert not failures, "\n".join(failures[:10])
        ran += some
    assert ran > 1000, "nearly every native run faulted"


def test_gathers_do_as_on_the_host(guest: Guest) -> None:
    if "avx2" not in host_flags():
        pytest.skip("the host has no AVX2")
    rng = random.Random(int(os.environ.get("PYHYVE_FUZZ_SEED", "1")))
    ran = 0
    for _ in range(4):
        some, failures = check(guest, [window.make_gather_case(rng) for _ in range(250)])
        assert not failures, "\n".join(failures[:10])
        ran += some
    assert ran == 1000, "a native gather faulted"
