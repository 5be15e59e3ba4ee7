"""The guest beside the host's processor: user mode at the host's addresses, over a small kernel that only ends runs.

The kernel's memory (page tables, descriptor tables, exception stubs, a stack) is in the upper half of the address
space. Each exception goes to a stub of its own that is a HLT: the exit tells which it was, the stack the rest.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import undefined

from pyhyve.cpu.bt import _fuzz
from pyhyve.cpu.bt.engine import Engine
from pyhyve.cpu.processor import CpuidEntry, Segment

PAGE: Final = 4096
RAM: Final = 8 << 20
KERNEL: Final = 0xFFFF_8000_0000_0000
PML4, PDPT, PD, PT, KPDPT, KPD = 0x1000, 0x2000, 0x3000, 0x4000, 0xE000, 0xF000
GDT, IDT, TSS, LDT, STUBS, STACK_TOP = 0x10000, 0x11000, 0x12000, 0x13000, 0x14000, 0x1A000
CODE_FRAMES, DATA_FRAMES, END_FRAME = 0x20_0000, 0x40_0000, 0x60_0000

# As Linux has them, so that the selectors are the host's.
KCODE, KDATA, UCODE32, UDATA, UCODE64 = 0x10, 0x18, 0x23, 0x2B, 0x33
GDT_ENTRIES: Final = (
    0, 0x00CF_9B00_0000_FFFF, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_FB00_0000_FFFF,
    0x00CF_F300_0000_FFFF, 0x00AF_FB00_0000_FFFF, 0,
)  # fmt: skip
NX: Final = 1 << 63

# Segments of the local descriptor table, on both sides: base, limit, attributes.
LDT_SEGMENTS: Final = (
    (_fuzz.CODE, 0xFFFF, 0x00FB),                    # 16-bit code
    (_fuzz.DATA, 0xFFFF, 0x00F3),                    # data, a 16-bit stack
    (_fuzz.DATA + 0x1000, 0x6FFF, 0x00F3),           # data, a part of the pages
    (_fuzz.DATA, 0x0FFF, 0x00F7),                    # data that expands down: from 1000H on
    (_fuzz.DATA, 0xFFFF, 0x00F1),                    # data that is read-only
    (_fuzz.DATA, 0xFFFF, 0x40F3),                    # a 32-bit stack
    (_fuzz.DATA - 0x8000, 0xFFFE, 0x40F7),           # data that expands down, to 4 GiB
)  # fmt: skip
CODE16, DATA16, PART16, DOWN16, READ16, STACK32, DOWN32 = (n << 3 | 7 for n in range(len(LDT_SEGMENTS)))
SEGMENTS: Final = {
    0: Segment(0, 0, 0, 0x10000), UCODE32: Segment(UCODE32, 0, 0xFFFFFFFF, 0xC0FB),
    UCODE64: Segment(UCODE64, 0, 0xFFFFFFFF, 0xA0FB), UDATA: Segment(UDATA, 0, 0xFFFFFFFF, 0xC0F3),
} | {n << 3 | 7: Segment(n << 3 | 7, *segment) for n, segment in enumerate(LDT_SEGMENTS)}  # fmt: skip

FLAT64: Final = (UDATA, UCODE64, UDATA, UDATA, 0, 0)
FLAT32: Final = (UDATA, UCODE32, UDATA, UDATA, UDATA, UDATA)


def descriptor(base: int, limit: int, attributes: int) -> int:
    """As the descriptor table has it; the limit counts bytes."""
    low = limit & 0xFFFF | (base & 0xFFFFFF) << 16 | (attributes & 0xFF) << 40
    return low | (limit >> 16) << 48 | (attributes >> 12) << 52 | (base >> 24 & 0xFF) << 56


def code_present(page: int) -> bool:
    """Of the pages of code, every fourth is absent, but for the last of each 64 KiB (which ends 16-bit code)."""
    return page % 4 != 3 or page % 16 == 15


@dataclass(frozen=True)
class Setup:
    """A kind of code, and how often (in percent) operands lie where they fault and encodings are undefined."""

    bits: int
    faults: int
    invalid: int
    segments: tuple[int, ...]
    """Selectors of ES CS SS DS FS GS."""
    align: int = 0
    """Percent of runs that ask for #AC."""

    @property
    def code_base(self) -> int:
        return SEGMENTS[self.segments[1]].base


class Machine:
    """A vCPU of the software processor and the host's processor, ready to run the same code."""

    def __init__(self) -> None:
        self.entered = ""
        self.bits = 64
        self.filled = (0, 0)
        engine = Engine()
        capabilities = engine.capabilities()
        self.xcr0 = capabilities.xcr0 & host_xcr0()
        self.ram = mmap.mmap(-1, RAM + PAGE)
        self._pin = ctypes.c_char.from_buffer(self.ram)
        self.hva = ctypes.addressof(self._pin)
        self._ept()
        self.vm = engine.create_vm()
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_ept(self.eptp, 1)
        leaves = [(0, 0), (1, 0), (7, 0), (7, 1), (0xD, 0), (0xD, 1), (0x8000_0000, 0), (0x8000_0001, 0)]
        self.vcpu.set_cpuid([CpuidEntry(leaf, sub, *_fuzz.cpuid(leaf, sub)) for leaf, sub in leaves])
        self.initial = mmap.mmap(-1, _fuzz.DATA_PAGES * PAGE)
        self._initial_pin = ctypes.c_char.from_buffer(self.initial)
        self.progress = mmap.mmap(-1, PAGE)
        self._progress_pin = ctypes.c_char.from_buffer(self.progress)
        code = [CODE_FRAMES + (n ^ 1) * PAGE if code_present(n) else 0 for n in range(_fuzz.CODE_SIZE // PAGE)]
        data = [0] * _fuzz.DATA_PAGES
        for n in range(_fuzz.DATA_PAGES):
            if _fuzz.Fuzzer.page_kind(n):
                # pairs of neighbours at 4 and 11, all others apart
                data[n] = DATA_FRAMES + PAGE * ({4: 32, 5: 33, 11: 34, 12: 35}.get(n, 30 - 2 * n))
        self._tables(code, data)
        self.fuzzer = _fuzz.Fuzzer(
            self.vcpu, self.vcpu.internals(), self.hva, RAM, code, data, END_FRAME, KERNEL, KERNEL + STUBS,
            KERNEL + STACK_TOP, self.xcr0, *xsave_layout(self.xcr0), ctypes.addressof(self._initial_pin),
            ctypes.addressof(self._progress_pin),
        )  # fmt: skip
        self._ends()
        self.vcpu.set_table("gdtr", KERNEL + GDT, 127)
        self.vcpu.set_table("idtr", KERNEL + IDT, 4095)
        self.vcpu.set_segment("ldtr", Segment(0x50, KERNEL + LDT, 8 * len(LDT_SEGMENTS) - 1, 0x82))
        self.vcpu.set_segment("tr", Segment(0x40, KERNEL + TSS, 0x67, 0x8B))
        self.vcpu.set("cr0", 0x8005_0033)
        self.vcpu.set("cr3", PML4)
        self.vcpu.set("cr4", 0x10E20 | 0x40000 | (1 << 11))  # PAE ... OSFXSR OSXMMEXCPT UMIP FSGSBASE OSXSAVE
        self.vcpu.set("efer", 0xD01)
        self.vcpu.set("xcr0", self.xcr0)

    def close(self) -> None:
        self.vm.close()

    def _put(self, at: int, *words: int) -> None:
        self.ram[at : at + 8 * len(words)] = struct.pack(f"<{len(words)}Q", *words)

    def _ept(self) -> None:
        pages = RAM // PAGE
        self._ept_memory = mmap.mmap(-1, (3 + pages // 512) * PAGE)
        self._ept_pin = ctypes.c_char.from_buffer(self._ept_memory)
        base = ctypes.addressof(self._ept_pin)

        def put(at: int, *words: int) -> None:
            self._ept_memory[at : at + 8 * len(words)] = struct.pack(f"<{len(words)}Q", *words)

        put(0, base + PAGE | 7)
        put(PAGE, base + 2 * PAGE | 7)
        put(2 * PAGE, *(base + (3 + n) * PAGE | 7 for n in range(pages // 512)))
        put(3 * PAGE, *(self.hva + n * PAGE | 0x37 for n in range(pages)))
        self.eptp = base | 0x5E

    def _tables(self, code: list[int], data: list[int]) -> None:
        window = _fuzz.BASE >> 21 & 511
        self._put(PML4, PDPT | 7)
        self._put(PML4 + 256 * 8, KPDPT | 3)
        self._put(KPDPT, KPD | 3)
        self._put(KPD, 0x83)
        self._put(PDPT + (_fuzz.BASE >> 30) * 8, PD | 7)
        self._put(PD + window * 8, *(PT + n * PAGE | 7 for n in range(8)))

        def leaf(address: int, entry: int) -> None:
            self._put(PT + (address - _fuzz.BASE >> 12) * 8, entry)

        for n, frame in enumerate(code):
            if frame:
                leaf(_fuzz.CODE + n * PAGE, frame | 7)
        for n, frame in enumerate(data):
            if frame:
                leaf(_fuzz.DATA + n * PAGE, frame | NX | (7 if _fuzz.Fuzzer.page_kind(n) == 2 else 5))
        leaf(_fuzz.END, END_FRAME | 7)
        tss = KERNEL + TSS
        low = 0x67 | (tss & 0xFFFFFF) << 16 | 0x8B << 40 | (tss >> 24 & 0xFF) << 56
        self._put(GDT, *GDT_ENTRIES, low, tss >> 32)
        # 78: the number of the CPU, for LSL; it is a data segment
        self._put(GDT + 0x78, 0x0040_F500_0000_0000 | min(os.sched_getaffinity(0)))
        self._put(LDT, *(descriptor(*segment) for segment in LDT_SEGMENTS))
        self._put(TSS + 4, KERNEL + STACK_TOP)
        self._put(TSS + 0x60, 0x68 << 48)
        for vector in range(256):
            self.ram[STUBS + vector * 16] = 0xF4
            to = KERNEL + STUBS + vector * 16
            kind = 0xEE if vector in (3, 4) else 0x8E
            self._put(IDT + vector * 16, to & 0xFFFF | KCODE << 16 | kind << 40 | (to >> 16 & 0xFFFF) << 48, to >> 32)

    def _ends(self) -> None:
        """Where a sequence may end early: a RET, or a jump through memory."""
        fuzzer = self.fuzzer
        for n, (base, limit, attributes) in enumerate(LDT_SEGMENTS):
            kind = attributes >> 2 & 3
            writable = attributes >> 1 & 1
            fuzzer.ldt(n, base, limit, attributes >> 14 & 1 | kind << 1 | (writable ^ 1) << 3)
        amd = _fuzz.cpuid(0, 0)[1] == 0x6874_7541
        vmcall = b"\x0f\x01" + (b"\xd9" if amd else b"\xc1")
        far = b"\xea" + struct.pack("<IH", _fuzz.BACK_END, UCODE64)
        fuzzer.poke_native(_fuzz.END, b"\xff\x24\x25" + struct.pack("<I", _fuzz.BASE + 0x120))
        fuzzer.poke_native(_fuzz.END + 0x40, far)
        fuzzer.poke_guest(_fuzz.END, vmcall)
        fuzzer.poke_guest(_fuzz.END + 0x40, vmcall)
        for base in range(_fuzz.CODE, _fuzz.CODE + _fuzz.CODE_SIZE, 0x10000):
            fuzzer.poke_native(base + _fuzz.END16, b"\x66" + far)
            fuzzer.poke_guest(base + _fuzz.END16, vmcall)

    def fill(self, seed: int) -> None:
        """Give the data pages their contents; the stack's pages hold addresses of the common end."""
        if self.filled == (self.bits, seed):
            return
        self.filled = (self.bits, seed)
        rng = random.Random(seed)
        end = {64: struct.pack("<Q", _fuzz.END), 32: struct.pack("<I", _fuzz.END + 0x40),
               16: struct.pack("<H", _fuzz.END16)}[self.bits]  # fmt: skip
        specials = struct.pack(
            "<8Q", 0, 1, 0x3FF0_0000_0000_0000, 0x7FF0_0000_0000_0000, 0x7F80_0000_FFC0_0000, 0x8000_0000_0000_0000,
            0x0000_0001_807F_FFFF, 0xFFFF_FFFF_FFFF_FFFF,
        )  # fmt: skip
        for n in range(_fuzz.DATA_PAGES):
            if n in (11, 12):
                page = end * (PAGE // len(end))
            else:
                page = b"".join(specials if rng.random() < 0.2 else rng.randbytes(64) for _ in range(64))
            self.initial[n * PAGE : (n + 1) * PAGE] = page
        self.fuzzer.unseal()
        for n in range(_fuzz.DATA_PAGES):
            if _fuzz.Fuzzer.page_kind(n):
                page = self.initial[n * PAGE : (n + 1) * PAGE]
                self.fuzzer.poke_native(_fuzz.DATA + n * PAGE, page)
                self.fuzzer.poke_guest(_fuzz.DATA + n * PAGE, page)
        self.fuzzer.seal()

    def enter(self, setup: str) -> None:
        """Set the vCPU and the fuzzer up for code of a kind: a name of SETUPS."""
        chosen = self.SETUPS[setup]
        if self.entered == setup:
            return
        self.entered = setup
        self.bits = chosen.bits
        names = ("es", "cs", "ss", "ds", "fs", "gs")
        for name, selector in zip(names, chosen.segments, strict=True):
            self.vcpu.set_segment(name, SEGMENTS[selector])
        bases = [SEGMENTS[selector].base for selector in chosen.segments]
        if chosen.bits == 64 or chosen.segments[4] == UDATA:
            # FS and GS flat or null: bases of their own
            bases[4:] = _fuzz.DATA + 0x1230, (_fuzz.DATA - 0x7FFF_F000) % (1 << (64 if chosen.bits == 64 else 32))
        fs, gs = bases[4:]
        if chosen.bits == 64:
            bases[4:] = 0, 0
        self.fuzzer.configure(
            chosen.bits, chosen.segments, chosen.segments[1], chosen.code_base, bases, fs, gs,
            undefined=undefined.table(chosen.bits), faults=chosen.faults, invalid=chosen.invalid,
            align=chosen.align, evex=bool(self.xcr0 & 0xE0),
        )  # fmt: skip

    SETUPS: ClassVar[Mapping[str, Setup]] = {
        "64": Setup(64, 0, 0, FLAT64),
        "64-faults": Setup(64, 8, 20, FLAT64, 10),
        "32": Setup(32, 0, 0, FLAT32),
        "32-faults": Setup(32, 8, 20, FLAT32, 10),
        "32-segments": Setup(32, 8, 20, (PART16, UCODE32, STACK32, DATA16, DOWN32, READ16), 10),
        "16": Setup(16, 0, 0, (DATA16, CODE16, DATA16, DATA16, DATA16, DATA16)),
        "16-faults": Setup(16, 8, 20, (PART16, CODE16, DATA16, DATA16, DOWN16, READ16), 10),
    }


def host_xcr0() -> int:
    found = 3
    with open("/proc/cpuinfo") as source:
        words = set(next(line for line in source if line.startswith("flags")).split())
    if "avx" in words:
        found |= 4
    if "avx512f" in words:
        found |= 0xE0
    return found


def xsave_layout(xcr0: int) -> tuple[int, int]:
    """Bytes of the host's XSAVE area for these components, and where those of AVX-512 begin."""
    if not xcr0 & 0xE0:
        return 832, 832
    places = [_fuzz.cpuid(0xD, component) for component in (5, 6, 7)]
    return max(offset + size for size, offset, *_ in places), min(offset for _, offset, *_ in places)
