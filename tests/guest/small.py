"""Kernels of a few instructions: assembled, wrapped as static ELF, loaded by the product's own loader.

They start as the loader leaves a 64-bit kernel: long mode, the first 4 GiB mapped onto themselves, interrupts off and
no IDT. `PRELUDE` gives them a stack, an IDT whose handlers tell on the console what happened, and a way to end.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from asm import assemble
from boot_images import make_elf

import pyhyve

ORIGIN: Final = 0x40_0000
"""Not in the first 2 MiB, where the loader's page tables are."""
STACK: Final = 0x68_0000
IDT: Final = 0x70_0000
DATA: Final = 0x80_0000
PAGE_DIRECTORY: Final = 0xA000
"""The loader's first: entry n maps 2 MiB from 2n MiB."""
MEMORY: Final = 32 << 20
STEPS_S: Final = 10.0

_WITH_ERROR: Final = "vector==8 || (vector>=10 && vector<=14) || vector==17 || vector==21"

POWER_OFF: Final = "mov dx, 0x404\nmov ax, 0x3400\nout dx, ax\n9: jmp 9b\n"

PRELUDE: Final = f"""
    mov rsp, {STACK:#x}
    lea rsi, stubs[rip]
    mov edi, {IDT:#x}
    mov ecx, 256
1:  mov rax, rsi
    and eax, 0xffff
    or eax, 0x100000
    mov [rdi], eax
    mov eax, esi
    and eax, 0xffff0000
    or eax, 0x8e00
    mov [rdi+4], eax
    mov qword ptr [rdi+8], 0
    add rsi, 16
    add rdi, 16
    dec ecx
    jnz 1b
    lidt idtr[rip]
    jmp main

idtr: .word 0xfff
    .quad {IDT:#x}

# Prints rax in hexadecimal, and a space.
print:
    push rcx
    push rdx
    push rax
    mov ecx, 16
1:  rol rax, 4
    push rax
    and al, 15
    cmp al, 10
    jb 2f
    add al, 39
2:  add al, 48
    mov dx, 0x3f8
    out dx, al
    pop rax
    dec ecx
    jnz 1b
    mov al, 32
    out dx, al
    pop rax
    pop rdx
    pop rcx
    ret

fault:
    mov dx, 0x3f8
    mov al, '!'
    out dx, al
    pop rax
    call print
    pop rax
    call print
    mov rax, cr2
    call print
    pop rax
    call print
end:
    {POWER_OFF}

    .balign 16
stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .ifeq {_WITH_ERROR}
    push 0
    .endif
    .byte 0x68
    .long vector
    jmp fault
    .set vector, vector+1
    .endr
"""


@dataclass(frozen=True)
class Fault:
    """What the prelude's handlers tell of an exception."""

    vector: int
    error: int
    cr2: int
    rip: int


@dataclass(frozen=True)
class Ran:
    """How a small guest ended, and what it printed."""

    outcome: pyhyve.Outcome
    output: str
    statistics: dict[str, object]

    @property
    def kind(self) -> pyhyve.OutcomeKind:
        return self.outcome.kind

    @property
    def numbers(self) -> list[int]:
        """What it printed before any fault."""
        return [int(word, 16) for word in self.output.partition("!")[0].split()]

    @property
    def fault(self) -> Fault | None:
        found = re.search(r"!(\w+) (\w+) (\w+) (\w+) ", self.output)
        return None if found is None else Fault(*(int(number, 16) for number in found.groups()))


def kernel(source: str, directory: Path, *, bare: bool = False) -> Path:
    """Write the kernel whose code is `source`; unless `bare`, after the prelude, and powered off at its end."""
    text = source if bare else f"{PRELUDE}\nmain:\n{source}\n    jmp end\n"
    return binary_kernel(assemble(text, ORIGIN), directory)


def binary_kernel(code: bytes, directory: Path) -> Path:
    path = directory / "kernel"
    path.write_bytes(make_elf(((ORIGIN, code, len(code) + 0x1000),), entry=ORIGIN))
    return path


def run(path: Path, *, processor: str = "bt", seconds: float = STEPS_S, hang_seconds: float = 5.0) -> Ran:
    """Run a small kernel to its end, or for `seconds`."""
    with pyhyve.Machine(path, memory=MEMORY, processor=processor, hang_seconds=hang_seconds) as machine:
        outcome = machine.run(seconds)
        return Ran(outcome, machine.console.output, machine.statistics())
