"""Processors that interrupt each other as fast as they can: kernels of a few instructions on 2 to 8 processors."""

import os
from pathlib import Path
from typing import Final

import pytest
from small import DATA, MEMORY, kernel

import pyhyve

TRAMPOLINE: Final = 0x3_0000
"""Below 1 MiB, where a start-up IPI sends a processor; the loader has nothing there."""
STACKS: Final = 0x60_0000
STACK_SHIFT: Final = 14
VECTOR: Final = 0x40
"""The first of the vectors: processor n sends VECTOR + n."""
MOST: Final = 8
DONE: Final = DATA + 0x1000

_SEND: Final = {
    # esi: the target's APIC id; eax: the command.
    False: """
    mov r8d, 0xfee00000
    shl esi, 24
    mov [r8 + 0x310], esi
    mov [r8 + 0x300], eax
""",
    True: """
    mov edx, esi
    mov ecx, 0x830
    wrmsr
""",
}
_END_OF_INTERRUPT: Final = {
    False: "mov r8d, 0xfee00000\n mov dword ptr [r8 + 0xb0], 0\n",
    True: "mov ecx, 0x80b\n xor eax, eax\n xor edx, edx\n wrmsr\n",
}
_ENABLE: Final = {
    False: "mov r8d, 0xfee00000\n mov dword ptr [r8 + 0xf0], 0x1ff\n",
    True: """
    mov ecx, 0x1b
    rdmsr
    or eax, 0xc00
    wrmsr
    mov ecx, 0x80f
    mov eax, 0x1ff
    xor edx, edx
    wrmsr
""",
}


def program(cpus: int, x2apic: bool, wait: str, rounds: int) -> str:
    """Every processor sends each other one `rounds` interrupts, each after the one before has been handled.

    counts[receiver * MOST + sender] is at DATA; the number of processors that are through at DONE.
    """
    return f"""
    lea rsi, tramp[rip]
    mov edi, {TRAMPOLINE:#x}
    mov ecx, offset tramp_end - tramp
    rep movsb
    mov rax, cr3
    mov [{TRAMPOLINE:#x} + tramp_cr3 - tramp], eax
    mov rax, cr4
    mov [{TRAMPOLINE:#x} + tramp_cr4 - tramp], eax
    sgdt [{TRAMPOLINE:#x} + tramp_gdt - tramp]

    lea rsi, handlers[rip]
    mov edi, 0x700000 + {VECTOR} * 16
    mov ecx, {MOST}
1:  mov [rdi], si
    mov rax, rsi
    shr rax, 16
    mov [rdi + 6], ax
    add rsi, 64
    add rdi, 16
    dec ecx
    jnz 1b

    # INIT and start-up IPI to all but this one, then its own part.
    mov r8d, 0xfee00000
    mov dword ptr [r8 + 0xf0], 0x1ff
    mov dword ptr [r8 + 0x300], 0xc4500
    mov dword ptr [r8 + 0x300], {0xC4600 | TRAMPOLINE >> 12:#x}
    mov rsp, {STACKS + (1 << STACK_SHIFT):#x}
    xor ebx, ebx
    call work
1:  pause
    cmp dword ptr [{DONE:#x}], {cpus}
    jne 1b
    mov ebx, {DATA:#x}
2:  mov rax, [rbx]
    call print
    add ebx, 8
    cmp ebx, {DATA + 8 * MOST * cpus:#x}
    jb 2b
    jmp end

# Interrupts every other processor; ebx: this one.
work:
    {_ENABLE[x2apic]}
    sti
    lock inc dword ptr [{DONE + 64:#x}]
1:  pause
    cmp dword ptr [{DONE + 64:#x}], {cpus}
    jne 1b
    mov r12d, {rounds}
2:  xor r13d, r13d
3:  cmp r13d, ebx
    je 5f
    mov r14d, r13d
    shl r14d, {(MOST - 1).bit_length()}
    add r14d, ebx
    shl r14d, 3
    add r14d, {DATA:#x}
    mov r15, [r14]
    mov esi, r13d
    lea eax, [rbx + {VECTOR}]
    {_SEND[x2apic]}
4:  {wait}
    cmp r15, [r14]
    je 4b
5:  inc r13d
    cmp r13d, {cpus}
    jb 3b
    dec r12d
    jnz 2b
    lock inc dword ptr [{DONE:#x}]
    ret

    .balign 64
handlers:
    .set sender, 0
    .rept {MOST}
    .balign 64
    push rax
    mov eax, sender
    jmp count
    .set sender, sender + 1
    .endr

# Counts an interrupt from processor eax; which one this is, its stack tells.
count:
    push rbx
    push rcx
    push rdx
    push r8
    mov rbx, rsp
    sub rbx, {STACKS:#x}
    shr rbx, {STACK_SHIFT}
    shl ebx, {(MOST - 1).bit_length()}
    add ebx, eax
    inc qword ptr [{DATA:#x} + rbx * 8]
    {_END_OF_INTERRUPT[x2apic]}
    pop r8
    pop rdx
    pop rcx
    pop rbx
    pop rax
    iretq

# A processor starts here: in real mode, to long mode in one step.
    .code16
tramp:
    cli
    mov ax, cs
    mov ds, ax
    lgdtd [tramp_gdt - tramp]
    mov eax, [tramp_cr4 - tramp]
    mov cr4, eax
    mov eax, [tramp_cr3 - tramp]
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0x9fffffff
    or eax, 0x80000001
    mov cr0, eax
    .byte 0x66, 0xea
    .long started
    .word 0x10
    .balign 8
tramp_cr3: .long 0
tramp_cr4: .long 0
tramp_gdt: .quad 0, 0
tramp_end:
    .code64
started:
    lidt idtr[rip]
    mov r8d, 0xfee00000
    mov ebx, [r8 + 0x20]
    shr ebx, 24
    lea eax, [rbx + 1]
    shl eax, {STACK_SHIFT}
    lea rsp, [rax + {STACKS:#x}]
    call work
1:  hlt
    jmp 1b
"""


@pytest.mark.parametrize("wait", ["pause", ""], ids=["pause", "spin"])
@pytest.mark.parametrize("x2apic", [False, True], ids=["xapic", "x2apic"])
@pytest.mark.parametrize("cpus", [2, 4, 8])
@pytest.mark.seed("S8")
def test_every_interrupt_between_processors_arrives_once(tmp_path: Path, cpus: int, x2apic: bool, wait: str) -> None:
    # Where there are fewer host processors, one that spins takes its whole time slice from the one it waits for.
    rounds = 150 if wait or cpus <= len(os.sched_getaffinity(0)) else 15
    path = kernel(program(cpus, x2apic, wait, rounds), tmp_path)
    with pyhyve.Machine(path, memory=MEMORY, processor="bt", cpus=cpus) as machine:
        outcome = machine.run(50)
        numbers = [int(word, 16) for word in machine.console.output.split()]
    assert outcome.kind is pyhyve.OutcomeKind.POWERED_OFF, (outcome, machine.console.output)
    counts = [numbers[receiver * MOST : receiver * MOST + cpus] for receiver in range(cpus)]
    assert counts == [[0 if sender == receiver else rounds for sender in range(cpus)] for receiver in range(cpus)]
