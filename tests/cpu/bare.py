"""A bare vCPU of the software processor with descriptor tables and page tables, for the tests of its microcode."""

from __future__ import annotations

import struct
from typing import Any, Final

import asm
import pytest

probe = pytest.importorskip("pyhyve.cpu.bt._probe", reason="the bt engine is not built")

CF, PF, AF, ZF, SF, TF, IF, DF, OF = (1 << n for n in (0, 2, 4, 6, 7, 8, 9, 10, 11))
NT, RF, VM, AC = 1 << 14, 1 << 16, 1 << 17, 1 << 18
DE, DB, NMI, BP, UD, NM, DFLT, TS, NP, SS, GP, PAGE = 0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14
X_TRIPLE, X_HLT, X_VMCALL, X_CR, X_IO, X_RDMSR, X_WRMSR, X_EPT = 2, 12, 18, 28, 30, 31, 32, 48

GDT, IDT, TSS, LDT = 0x1000, 0x2000, 0x3000, 0x4000
PAGES: Final = 0x10000
CODE, DATA, STACK, RING0_STACK, IST1_STACK = 0x400000, 0x500000, 0x600000, 0x640000, 0x680000
HANDLER: Final = 0x700000
# selectors of the GDT below
KCODE, KDATA, UCODE32, UDATA, UCODE, TASK = 0x08, 0x10, 0x18, 0x20, 0x28, 0x30
KCODE32, ABSENT, EXECONLY, GATE, CONFORMING, LDTSEL, RODATA, KCODE16, KDATA16 = (
    0x40, 0x48, 0x50, 0x58, 0x68, 0x70, 0x80, 0x88, 0x90,
)  # fmt: skip


def descriptor(base: int, limit: int, access: int, flags: int) -> int:
    return (
        limit & 0xFFFF
        | (base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 15) << 48
        | flags << 52
        | base >> 24 << 56
    )


class Machine:
    """A vCPU with descriptor tables; `run` takes assembler. 64-bit unless told, at ring 0, identity-mapped with 2 MiB
    pages that users may touch, but for [DATA, DATA + 2 MiB), which is in 4 KiB pages."""

    def __init__(self, bits: int = 64, cpl: int = 0) -> None:
        self.bits = bits
        self.p = p = probe.Probe(ept_page=2 << 20)
        self.rights = 7
        self._descriptors()
        p.set(rflags=2, rip=CODE, rsp=STACK, xcr0=7)
        if bits == 64:
            p.set(cr0=0x80010011, cr3=PAGES, cr4=0x6A0, efer=0xD01)
            self._pages()
        elif bits == 32:
            p.set(cr0=0x11)
        else:
            p.set(cr0=0x10, rip=0x100, rsp=0x8000, gdtr__limit=0xFFFF, idtr__limit=0x3FF)
            for name in ("es", "cs", "ss", "ds", "fs", "gs"):
                self.segment(name, 0, 0, 0xFFFF, 0x9B if name == "cs" else 0x93)
            return
        p.set(gdtr__base=GDT, gdtr__limit=0x9F, idtr__base=IDT, idtr__limit=256 * (16 if bits == 64 else 8) - 1)
        self.ring(cpl)
        p.set(tr=TASK, tr__base=TSS, tr__limit=0x2067, tr__attr=0x8B, ldtr__attr=0x10000)

    def segment(self, name: str, selector: int, base: int, limit: int, attr: int) -> None:
        self.p.set(**{name: selector, f"{name}__base": base, f"{name}__limit": limit, f"{name}__attr": attr})

    def ring(self, cpl: int) -> None:
        dpl = cpl << 5
        code = {(64, 0): KCODE, (64, 3): UCODE, (32, 0): KCODE32, (32, 3): UCODE32}[self.bits, cpl]
        self.segment("cs", code | cpl, 0, 0xFFFFFFFF, (0xA09B if self.bits == 64 else 0xC09B) | dpl)
        for name in ("es", "ss", "ds", "fs", "gs"):
            self.segment(name, (UDATA if cpl else KDATA) | cpl, 0, 0xFFFFFFFF, 0xC093 | dpl)
        self.p.set(cpl=cpl)

    def _descriptors(self) -> None:
        flat = 0xFFFFF
        table = {
            KCODE: descriptor(0, flat, 0x9B, 0xA),
            KDATA: descriptor(0, flat, 0x93, 0xC),
            UCODE32: descriptor(0, flat, 0xFB, 0xC),
            UDATA: descriptor(0, flat, 0xF3, 0xC),
            UCODE: descriptor(0, flat, 0xFB, 0xA),
            TASK: descriptor(TSS, 0x2067, 0x89, 0),
            KCODE32: descriptor(0, flat, 0x9A, 0xC),
            ABSENT: descriptor(0, flat, 0x12, 0xC),
            EXECONLY: descriptor(0, flat, 0x99, 0xC),
            GATE: HANDLER & 0xFFFF | (KCODE if self.bits == 64 else KCODE32) << 16 | 0xEC << 40 | HANDLER >> 16 << 48,
            CONFORMING: descriptor(0, flat, 0x9F, 0xA if self.bits == 64 else 0xC),
            LDTSEL: descriptor(LDT, 0xFF, 0x82, 0),
            RODATA: descriptor(0x12345678, 0xFFF, 0xF0, 0x4),
            KCODE16: descriptor(0, 0xFFFF, 0x9B, 0),
            KDATA16: descriptor(0, 0xFFFF, 0x93, 0),
        }
        for at, value in table.items():
            self.p.poke(GDT + at, struct.pack("<Q", value))
        if self.bits == 64:
            self.p.poke(TSS + 4, struct.pack("<Q", RING0_STACK))
            self.p.poke(TSS + 0x24, struct.pack("<Q", IST1_STACK))
        else:
            self.p.poke(TSS + 4, struct.pack("<II", RING0_STACK, KDATA))
        self.p.poke(TSS + 0x66, struct.pack("<H", 0x68))

    def _pages(self) -> None:
        q = struct.Struct("<Q")
        self.p.poke(PAGES, q.pack(PAGES + 0x1000 | 7))
        self.p.poke(PAGES + 0x1000, q.pack(PAGES + 0x2000 | 7))
        for n in range(8):
            self.p.poke(PAGES + 0x2000 + n * 8, q.pack(n << 21 | 0xE7))
        self.p.poke(PAGES + 0x2000 + 16, q.pack(PAGES + 0x3000 | 7))
        for n in range(512):
            self.p.poke(PAGES + 0x3000 + n * 8, q.pack(2 << 21 | n << 12 | 0x67))

    def page(self, lin: int, entry: int) -> None:
        """Set the 4 KiB mapping of an address in [CODE, CODE + 2 MiB), which DATA is in."""
        self.p.poke(PAGES + 0x3000 + (lin >> 12 & 511) * 8, struct.pack("<Q", entry))
        self.p.flush_page(lin)

    def gate(self, vector: int, kind: int = 0x8E, selector: int | None = None, ist: int = 0, to: int = HANDLER) -> None:
        if self.bits == 64:
            selector = KCODE if selector is None else selector
            image = struct.pack("<HHBBHII", to & 0xFFFF, selector, ist, kind, to >> 16 & 0xFFFF, to >> 32, 0)
            self.p.poke(IDT + vector * 16, image)
        else:
            selector = KCODE32 if selector is None else selector
            self.p.poke(IDT + vector * 8, struct.pack("<HHBBH", to & 0xFFFF, selector, 0, kind, to >> 16))

    def run(self, *sources: str) -> int:
        result: int = self.p.run(*(asm.assemble(s, 0, self.bits) for s in sources))
        return result

    def ok(self, *sources: str) -> None:
        assert self.run(*sources) == probe.OK, self.p.fault()

    def faults(self, source: str) -> tuple[int, int | None]:
        """The fault, after a check that nothing has changed."""
        before = self.p.state()
        assert self.run(source) == probe.FAULT
        assert self.p.state() == before
        fault: tuple[int, int | None] = self.p.fault()
        return fault

    def exits(self, source: str) -> dict[str, Any]:
        assert self.run(source) == probe.EXIT
        x: dict[str, Any] = self.p.exit()
        return x

    def words(self, at: int, n: int, size: int = 8) -> tuple[int, ...]:
        return struct.unpack(f"<{n}{ {2: 'H', 4: 'I', 8: 'Q'}[size] }", self.p.peek(at, n * size))

    def get(self, *names: str) -> tuple[int, ...]:
        return tuple(self.p.get(name) for name in names)

    def __getattr__(self, name: str) -> int:
        value: int = self.p.get(name)
        return value


def shuffled(m: Machine) -> None:
    """Map the pages of DATA in reverse, so that neighbours in linear space are none in memory."""
    for n in range(16):
        m.page(DATA + n * 4096, DATA + (15 - n) * 4096 | 0x67)


def linear(m: Machine, at: int, n: int) -> bytes:
    result, data = m.p.read(at, n)
    assert result == probe.OK
    return bytes(data)
