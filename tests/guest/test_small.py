"""Guests that do what no kernel should: the monitor neither crashes nor hangs, and every end has its type."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from asm import MISSING
from small import DATA, IDT, MEMORY, ORIGIN, PAGE_DIRECTORY, STACK, STEPS_S, Ran, binary_kernel, kernel, run

from pyhyve.bhyve import layout
from pyhyve.bhyve.outcome import OutcomeKind

pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

Run = Callable[..., Ran]

PF, GP, UD, DF = 14, 13, 6, 8
NOBODY = 0xD000_0000
"""Guest-physical addresses that no memory and no device has, in the loader's map."""
GUEST_ENDS = {OutcomeKind.POWERED_OFF, OutcomeKind.REBOOTED, OutcomeKind.TRIPLE_FAULT, OutcomeKind.HUNG}
"""What a guest may come to by its own doing; an error would be the monitor's."""


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Assemble and run a guest."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def assemble_and_run(
        source: str, *, bare: bool = False, seconds: float = STEPS_S, hang_seconds: float = 5.0
    ) -> Ran:
        return run(kernel(source, tmp_path, bare=bare), seconds=seconds, hang_seconds=hang_seconds)

    return assemble_and_run


def test_prelude_tells_of_exceptions(guest: Run) -> None:
    ran = guest("mov eax, 0x12345678\ncall print\nhere: ud2")
    assert ran.kind is OutcomeKind.POWERED_OFF
    assert ran.numbers == [0x12345678]
    assert ran.fault is not None
    assert (ran.fault.vector, ran.fault.error) == (UD, 0)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_guest_without_its_stack_takes_a_double_fault_on_another(guest: Run) -> None:
    """A page fault cannot be delivered: no stack. A double fault can, on a stack of its own (Intel SDM vol 3,
    "Interrupt Stack Table")."""
    ran = guest(
        f"""
        mov word ptr [{DATA + 102}], 104            # no I/O permission map
        mov qword ptr [{DATA + 36}], {STACK - 0x8_0000}     # IST1, in the 2 MiB below the stack's
        mov byte ptr [{IDT + DF * 16 + 4}], 1
        lea rax, gdt[rip]
        mov [rip + gdtr + 2], rax
        lgdt gdtr[rip]
        mov ax, 0x20
        ltr ax
        mov rsp, {STACK + 0x40_0000}
        mov qword ptr [{PAGE_DIRECTORY + 8 * (STACK + 0x40_0000 - 8 >> 21)}], 0
        invlpg [rsp - 8]
        push rax
        ud2
        .balign 16
        gdt: .quad 0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff
        .quad 0x0000890000000067 | {DATA & 0xFFFFFF} << 16, 0
        gdtr: .word 47
        .quad 0
        """
    )
    assert ran.fault is not None, ran
    assert (ran.fault.vector, ran.fault.error) == (DF, 0)
    assert 0 < STACK + 0x40_0000 - ran.fault.cr2 <= 48  # within the frame that could not be pushed


def test_guest_that_unmaps_its_only_stack_is_reset_by_a_triple_fault(guest: Run) -> None:
    ran = guest(f"mov qword ptr [{PAGE_DIRECTORY + 8 * (STACK - 8 >> 21)}], 0\ninvlpg [rsp - 8]\npush rax")
    assert ran.kind is OutcomeKind.TRIPLE_FAULT
    assert ran.output == ""


@pytest.mark.parametrize("fill", [0, 0xFF, 0x80, 0x67], ids=hex)
def test_guest_that_writes_over_its_page_tables_ends(guest: Run, fill: int) -> None:
    ran = guest(
        f"""
        mov edi, {layout.BOOT_PAGE_TABLES}
        mov ecx, 0x6000
        mov al, {fill}
        rep stosb
        mov rax, cr3
        mov cr3, rax
        mov eax, 1
        call print
        """
    )
    assert ran.kind in GUEST_ENDS, ran
    assert ran.numbers == []


@pytest.mark.parametrize("table", [layout.LAPIC_BASE, layout.HPET_BASE, NOBODY, MEMORY, (1 << 40) - 4096], ids=hex)
def test_page_tables_that_are_no_memory_end_the_guest(guest: Run, table: int) -> None:
    ran = guest(f"mov rax, {table}\nmov cr3, rax\nmov eax, 1\ncall print")
    assert ran.kind in GUEST_ENDS, ran


def test_page_table_that_is_no_memory_reads_as_ones(guest: Run) -> None:
    """All ones set reserved bits, and that is a page fault that the guest can handle."""
    ran = guest(
        f"""
        mov eax, {NOBODY | 7}
        mov [{PAGE_DIRECTORY + 8 * (DATA >> 21)}], rax
        invlpg [{DATA}]
        mov eax, [{DATA + 0x123}]
        """
    )
    assert ran.fault is not None, ran
    assert (ran.fault.vector, ran.fault.error, ran.fault.cr2) == (PF, 0b1001, DATA + 0x123)


def test_reserved_bit_in_a_page_table_is_a_page_fault_that_says_so(guest: Run) -> None:
    ran = guest(
        f"""
        mov rax, 1 << 51
        or [{PAGE_DIRECTORY + 8 * (DATA >> 21)}], rax
        invlpg [{DATA}]
        mov eax, [{DATA}]
        """
    )
    assert ran.fault is not None, ran
    assert (ran.fault.vector, ran.fault.error, ran.fault.cr2) == (PF, 0b1001, DATA)


def test_read_only_page_keeps_what_is_in_it(guest: Run) -> None:
    ran = guest(
        f"""
        mov dword ptr [{DATA}], 0x1234
        and byte ptr [{PAGE_DIRECTORY + 8 * (DATA >> 21)}], 0xfd
        mov rax, cr0
        or eax, 0x10000
        mov cr0, rax
        invlpg [{DATA}]
        mov eax, [{DATA}]
        call print
        mov dword ptr [{DATA}], 0x5678
        """
    )
    assert ran.numbers == [0x1234]
    assert ran.fault is not None
    assert (ran.fault.vector, ran.fault.error, ran.fault.cr2) == (PF, 0b0011, DATA)


@pytest.mark.parametrize("where", [layout.LAPIC_BASE + 0x800, layout.HPET_BASE + 0x800, NOBODY + 0x800], ids=hex)
def test_stack_that_is_no_memory_ends_the_guest(guest: Run, where: int) -> None:
    assert guest(f"mov rsp, {where}\npush rax\ncall print\nint3").kind in GUEST_ENDS


@pytest.mark.parametrize("register", ["lidt", "lgdt"])
@pytest.mark.parametrize("where", [layout.LAPIC_BASE, NOBODY, 0x8000_0000_0000, 0x1_0000_0000], ids=hex)
def test_descriptor_table_that_is_no_memory_ends_the_guest(guest: Run, register: str, where: int) -> None:
    ran = guest(
        f"""
        mov rax, {where}
        mov [rip + table + 2], rax
        {register} table[rip]
        mov ax, 0x18
        mov ds, ax
        int3
        ud2
        table: .word 0xfff
        .quad 0
        """
    )
    assert ran.kind in GUEST_ENDS, ran


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [NOBODY, NOBODY + 0xFFF, MEMORY, layout.LAPIC_BASE, layout.HPET_BASE, layout.IOAPIC_BASE, layout.PCI_ECAM_BASE],
    ids=hex,
)
def test_jump_to_what_is_no_memory_ends_the_guest(guest: Run, where: int) -> None:
    ran = guest(f"mov rax, {where}\njmp rax", hang_seconds=1)
    assert ran.kind in GUEST_ENDS, ran
    ran = guest(f"mov rax, {where}\njmp rax", bare=True, hang_seconds=1)
    assert ran.kind in GUEST_ENDS, ran


def test_jump_to_what_is_not_mapped_faults_there(guest: Run) -> None:
    ran = guest("mov rax, 0x4000001230\njmp rax")
    assert ran.fault is not None, ran
    assert (ran.fault.vector, ran.fault.error & ~0x10) == (PF, 0)
    assert ran.fault.cr2 == ran.fault.rip == 0x4000001230


def test_instruction_is_what_was_written_last(guest: Run) -> None:
    """A loop that writes the immediate of an instruction a few bytes ahead, a thousand times."""
    ran = guest(
        """
        xor ebx, ebx
        mov ecx, 1000
    1:  mov [rip + patched + 1], ecx
    patched:
        mov eax, 0
        add rbx, rax
        dec ecx
        jnz 1b
        mov rax, rbx
        call print
        """
    )
    assert ran.numbers == [1000 * 1001 // 2]


def test_code_copied_over_code_that_ran_replaces_it(guest: Run) -> None:
    """Every way to write: a string instruction, a vector store, through another mapping of the page."""
    ran = guest(
        f"""
        mov rax, [{PAGE_DIRECTORY + 8 * (ORIGIN >> 21)}]
        mov [{PAGE_DIRECTORY + 8 * (0x100_0000 >> 21)}], rax    # seen once more at 16 MiB
        invlpg [0x1000000]
        mov rax, cr4
        or eax, 0x600
        mov cr4, rax
        call target
        call print
        lea rsi, second[rip]
        lea rdi, target[rip]
        mov ecx, 16
        rep movsb
        call target
        call print
        movdqu xmm0, third[rip]
        movdqu target[rip], xmm0
        call target
        call print
        lea rsi, fourth[rip]
        lea rdi, target[rip]
        add rdi, {0x100_0000 - ORIGIN}
        mov rax, [rsi]
        mov [rdi], rax
        call target
        call print
        lock xor byte ptr target[rip + 1], 0x70
        call target
        call print
        jmp end
        .balign 64
    target:
        mov eax, 0x11
        ret
        .balign 16
    second:
        mov eax, 0x22
        ret
        .balign 16
    third:
        mov eax, 0x33
        ret
        .balign 16
    fourth:
        mov eax, 0x44
        ret
        .balign 16
        """
    )
    assert ran.numbers == [0x11, 0x22, 0x33, 0x44, 0x34], ran


def test_instruction_across_two_pages_follows_both(guest: Run) -> None:
    """Its second page is written, and then mapped elsewhere."""
    ran = guest(
        """
        lea rdi, across[rip]
        mov ecx, 100
    1:  mov [rdi + 4], cl           # the immediate's last byte, on the second page
        call rdi
        call print
        sub ecx, 33
        jns 1b
        jmp end
        .balign 4096
        .skip 4092
    across:
        mov eax, 0x01020304
        ret
        """
    )
    assert ran.numbers == [number << 24 | 0x020304 for number in (100, 67, 34, 1)]


# -- what is not there -------------------------------------------------------------------------------------------------


def test_unknown_ports_read_as_ones_and_are_counted(guest: Run) -> None:
    ran = guest(
        f"""
        mov dx, 0x1234
        xor eax, eax
        in al, dx
        call print
        xor eax, eax
        in ax, dx
        call print
        xor eax, eax
        in eax, dx
        call print
        mov edi, {DATA}
        mov ecx, 4
        rep insw
        mov rax, [{DATA}]
        call print
        out dx, eax
        mov rsi, rdi
        mov ecx, 3
        rep outsb
        """
    )
    assert ran.numbers == [0xFF, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF]
    assert ran.statistics["unclaimed_ports"] == {"0x1234": 3 + 4 + 1 + 3}


@pytest.mark.seed("S25")
@pytest.mark.parametrize("where", [NOBODY, MEMORY, layout.IOAPIC_BASE - 0x1000, 0xFFFF_FFF0], ids=hex)
def test_memory_that_is_not_there_reads_as_ones(guest: Run, where: int) -> None:
    ran = guest(
        f"""
        mov rsi, {where}
        mov dword ptr [rsi], 0x1234567
        movzx eax, byte ptr [rsi]
        call print
        movzx eax, word ptr [rsi]
        call print
        mov eax, [rsi]
        call print
        mov rax, [rsi]
        call print
        movsx rax, byte ptr [rsi + 1]
        call print
        lock xadd [rsi], ebx
        mov eax, ebx
        call print
        """
    )
    assert ran.numbers == [0xFF, 0xFFFF, 0xFFFF_FFFF, (1 << 64) - 1, (1 << 64) - 1, 0xFFFF_FFFF], ran
    assert ran.fault is None


def test_unknown_msr_is_a_general_protection_fault(guest: Run) -> None:
    ran = guest("mov ecx, 0x12345\nrdmsr")
    assert ran.fault is not None, ran
    assert (ran.fault.vector, ran.fault.error) == (GP, 0)


UNUSUAL = """
lock xadd [rsi], rax
xchg [rsi], bl
lock cmpxchg [rsi], ebx
lock cmpxchg8b [rsi]
lock cmpxchg16b [rsi]
lock bts qword ptr [rsi], 5
bts dword ptr [rsi], eax
lock inc byte ptr [rsi]
lock neg dword ptr [rsi]
not word ptr [rsi]
adc [rsi], eax
sbb rax, [rsi]
shl dword ptr [rsi], 3
rcr byte ptr [rsi], 1
shld [rsi], eax, 5
imul eax, [rsi], 77
mul dword ptr [rsi]
div dword ptr [rsi]
idiv byte ptr [rsi]
cmovz eax, [rsi]
setc byte ptr [rsi]
bsf eax, [rsi]
popcnt eax, [rsi]
crc32 eax, dword ptr [rsi]
movbe eax, [rsi]
movnti [rsi], eax
push qword ptr [rsi]
pop qword ptr [rsi]
call [rsi]
jmp [rsi]
call fword ptr [rsi]
jmp fword ptr [rsi]
ret 8
xlatb
cmpsb
scasb
lodsq
rep stosq
rep movsb
repne scasd
rep insb
rep outsd
movups xmm0, [rsi]
movaps [rsi], xmm0
movntdq [rsi], xmm0
movd xmm0, [rsi]
movhps [rsi], xmm0
pshufb xmm0, [rsi]
maskmovdqu xmm0, xmm1
cvtsi2sd xmm0, qword ptr [rsi]
addpd xmm0, [rsi]
vmovdqu ymm0, [rsi]
vmovdqu [rsi], ymm0
vpmaskmovd [rsi], ymm1, ymm0
vbroadcastss ymm0, [rsi]
pxor mm0, [rsi]
fld tbyte ptr [rsi]
fstp qword ptr [rsi]
fild word ptr [rsi]
fbstp [rsi]
fnstenv [rsi]
fnsave [rsi]
frstor [rsi]
fxsave [rsi]
fxrstor [rsi]
xsave [rsi]
xrstor [rsi]
ldmxcsr [rsi]
stmxcsr [rsi]
fnstcw [rsi]
sgdt [rsi]
sidt [rsi]
lgdt [rsi]
lidt [rsi]
sldt word ptr [rsi]
ltr word ptr [rsi]
lldt word ptr [rsi]
lmsw word ptr [rsi]
smsw word ptr [rsi]
verr word ptr [rsi]
lar eax, word ptr [rsi]
mov ss, word ptr [rsi]
mov word ptr [rsi], fs
lss eax, [rsi]
clflush [rsi]
invlpg [rsi]
prefetchw [rsi]
enter 16, 3
leave
iretq
pause
mwait
""".strip().splitlines()
"""With rsi, rdi, rbx and rsp pointing to where the test says; rcx is 3."""


@pytest.mark.parametrize("where", [layout.LAPIC_BASE + 0x2F8, layout.HPET_BASE + 0x100, NOBODY + 0xFF8], ids=hex)
def test_unusual_instructions_on_what_is_no_memory(guest: Run, where: int) -> None:
    """Each runs in its own try: what faults is told, and the next one goes on. Nothing may end in an error."""
    failures = []
    for instruction in UNUSUAL:
        stacked = instruction.split()[0] in ("ret", "enter", "leave", "iretq")
        ran = guest(
            f"""
            mov rax, cr4
            or eax, 0x40600
            mov cr4, rax
            xor ecx, ecx
            xgetbv
            or eax, 7
            xsetbv
            fninit
            mov rsi, {where}
            mov rdi, {where if "mov" not in instruction else DATA}
            mov rbx, {where}
            xor eax, eax
            xor edx, edx
            mov ecx, 3
            {"mov rsp, rsi" if stacked else ""}
            {"mov rbp, rsi" if stacked else ""}
            {instruction}
            """,
            hang_seconds=1,
            seconds=5,
        )
        if ran.kind not in GUEST_ENDS:
            failures.append(f"{instruction}: {ran.outcome}")
    assert failures == []


def test_spin_on_pause_is_a_hang_too(guest: Run) -> None:
    assert guest("1: pause\njmp 1b", hang_seconds=0.5, seconds=5).kind is OutcomeKind.HUNG


# -- at random ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_random_bytes_as_code_end_somehow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    code = random.Random(seed).randbytes(0x4000)
    ran = run(binary_kernel(code, tmp_path), seconds=1, hang_seconds=0.3)
    assert ran.kind in GUEST_ENDS | {OutcomeKind.TIMED_OUT}, ran


@pytest.mark.parametrize("seed", range(40, 60))
def test_random_bytes_as_code_with_handlers_end_somehow(guest: Run, seed: int) -> None:
    """The handlers go on with the next piece of code, so that one guest runs many."""
    generator = random.Random(seed)
    pieces = [f".balign 64\n.byte {', '.join(map(str, generator.randbytes(48)))}\nud2" for _ in range(200)]
    ran = guest(
        f"""
        mov qword ptr [{DATA}], 0
        lea rax, again[rip]
        mov edi, {IDT}
        mov ecx, 32
    1:  mov [rdi], ax                   # exceptions go on at `again`
        mov edx, eax
        shr edx, 16
        mov [rdi + 6], dx
        add edi, 16
        dec ecx
        jnz 1b
    again:
        lea rsp, [{STACK}]
        mov rax, [{DATA}]
        inc qword ptr [{DATA}]
        cmp rax, {len(pieces)}
        jae end
        shl eax, 6
        lea rcx, pieces[rip]
        add rax, rcx
        mov ebx, {DATA}
        mov esi, {DATA + 0x1000}
        mov edi, {NOBODY}
        jmp rax
        .balign 64
    pieces:
        {chr(10).join(pieces)}
        """,
        seconds=2,
        hang_seconds=0.3,
    )
    assert ran.kind in GUEST_ENDS | {OutcomeKind.TIMED_OUT}, ran


RANDOM_NUMBERS = """
    # The next random number in rax (Knuth's MMIX generator); r8 is its state.
next:
    mov rax, 6364136223846793005
    imul r8, rax
    mov rax, 1442695040888963407
    add r8, rax
    mov rax, r8
    shr rax, 24
    ret
"""

SKIP_FAULTS = """
    # Exceptions of two-byte instructions skip them.
    lea rax, skip[rip]
    mov edi, {idt}
    mov ecx, 32
1:  mov [rdi], ax
    mov edx, eax
    shr edx, 16
    mov [rdi + 6], dx
    add edi, 16
    dec ecx
    jnz 1b
    jmp start
skip:
    add rsp, 8
    add qword ptr [rsp], 2
    iretq
"""


@pytest.mark.parametrize("seed", range(4))
def test_random_port_accesses_end_in_a_typed_outcome(guest: Run, seed: int) -> None:
    """All chips at their ports, but for those that end the guest on purpose."""
    ran = guest(
        f"""
        mov r8, {seed * 7919 + 1}
        mov ebx, 30000
    1:  call next
        mov ecx, eax
        shr rax, 8
        mov edx, eax
        and edx, 0xfff
        test ecx, 0x10000
        jz 2f
        and edx, 0x7f                   # the oldest chips are at the lowest ports
    2:  cmp edx, 0x404                  # power, reset
        je 1b
        cmp edx, 0x405
        je 1b
        cmp edx, 0x403
        je 1b
        cmp edx, 0x92
        je 1b
        cmp edx, 0x64
        je 1b
        and edx, ~4 & 0xffff | 4
        cmp edx, 0xcf6
        jae 1b
        shr rax, 12
        and ecx, 7
        jz 10f
        dec ecx
        jz 11f
        dec ecx
        jz 12f
        dec ecx
        jz 13f
        dec ecx
        jz 14f
        out dx, al
        jmp 15f
    10: in al, dx
        jmp 15f
    11: in ax, dx
        jmp 15f
    12: in eax, dx
        jmp 15f
    13: out dx, ax
        jmp 15f
    14: out dx, eax
    15: dec ebx
        jnz 1b
        mov eax, 0xcafe
        mov dx, 0x404
        mov ax, 0x3400
        out dx, ax
        jmp end
        {RANDOM_NUMBERS}
        """,
        seconds=20,
    )
    assert ran.kind is OutcomeKind.POWERED_OFF, ran.outcome


@pytest.mark.parametrize("chip", ["LAPIC", "IOAPIC", "HPET", "PCI_ECAM"])
def test_random_register_accesses_end_in_a_typed_outcome(guest: Run, chip: str) -> None:
    """Of every size, at every alignment, also across the end of the page."""
    base = {
        "LAPIC": layout.LAPIC_BASE,
        "IOAPIC": layout.IOAPIC_BASE,
        "HPET": layout.HPET_BASE,
        "PCI_ECAM": layout.PCI_ECAM_BASE,
    }[chip]
    ran = guest(
        f"""
        mov r8, {base}
        mov r9, r8
        mov ebx, 20000
    1:  call next
        mov ecx, eax
        shr rax, 8
        mov esi, eax
        and esi, 0xfff
        test ecx, 0x300
        jz 2f
        and esi, 0xff0
    2:  add rsi, r9
        shr rax, 12
        and ecx, 7
        jz 10f
        dec ecx
        jz 11f
        dec ecx
        jz 12f
        dec ecx
        jz 13f
        dec ecx
        jz 14f
        mov [rsi], eax
        jmp 15f
    10: mov eax, [rsi]
        jmp 15f
    11: mov ax, [rsi]
        jmp 15f
    12: mov rax, [rsi]
        jmp 15f
    13: mov [rsi], rax
        jmp 15f
    14: mov [rsi], al
    15: dec ebx
        jnz 1b
        jmp end
        {RANDOM_NUMBERS}
        """,
        seconds=20,
    )
    # A local APIC may send its processor an INIT, and that goes on at the reset vector, where there is nothing.
    assert ran.kind in (GUEST_ENDS if chip == "LAPIC" else {OutcomeKind.POWERED_OFF}), ran.outcome


def test_random_msr_accesses_end_in_a_typed_outcome(guest: Run) -> None:
    ran = guest(
        f"""
        {SKIP_FAULTS.format(idt=IDT)}
    start:
        mov r8, 99
        mov ebx, 20000
    1:  call next
        mov ecx, eax
        mov rdx, rax
        shr rdx, 32
        and ecx, 0x1fff
        test eax, 0x10000
        jz 2f
        and ecx, 0x83f                  # x2APIC and the low ones
    2:  test eax, 0x20000
        jz 3f
        or ecx, 0xc0000000
        and ecx, 0xc0000fff
    3:  cmp ecx, 0xc0000080             # long mode stays
        je 1b
        test eax, 0x40000
        jz 4f
        rdmsr
        jmp 5f
    4:  wrmsr
    5:  dec ebx
        jnz 1b
        jmp end
        {RANDOM_NUMBERS}
        """,
        seconds=20,
    )
    assert ran.kind in GUEST_ENDS, ran.outcome


def test_without_a20_the_second_megabyte_is_the_first(guest: Run) -> None:
    """The loader's tables map linear addresses onto themselves."""
    ran = guest("""
        mov ebx, 0x50000
        mov ecx, 0x150000
        mov dword ptr [rbx], 0x111
        mov dword ptr [rcx], 0x222
        mov al, 0
        out 0x92, al
        mov eax, [rcx]
        call print
        mov dword ptr [rcx], 0x333
        mov eax, [rbx]
        call print
        in al, 0x92
        movzx eax, al
        call print
        mov al, 2
        out 0x92, al
        mov eax, [rcx]
        call print
        mov eax, [rbx]
        call print
        jmp end
    """)
    assert ran.kind is OutcomeKind.POWERED_OFF
    assert ran.numbers == [0x111, 0x333, 0, 0x222, 0x333]


# -- the local APIC ----------------------------------------------------------------------------------------------------

LOCAL_APIC = f"""
    mov ebx, {layout.LAPIC_BASE:#x}
    mov dword ptr [rbx + 0xf0], 0x1ff
    lea rax, handler[rip]
    mov word ptr [{IDT} + 16 * 0x51], ax
    mov word ptr [{IDT} + 16 * 0x61], ax
    shr eax, 16
    mov word ptr [{IDT} + 16 * 0x51 + 6], ax
    mov word ptr [{IDT} + 16 * 0x61 + 6], ax
    xor r12d, r12d
"""
"""Enabled; vectors 51H and 61H count in R12 and are completed. RBX: its page."""
_LOCAL_APIC_HANDLER = "jmp end\nhandler: inc r12\nmov dword ptr [rbx + 0xb0], 0\niretq"


def test_interrupts_to_oneself_wait_for_the_task_priority_and_the_one_in_service(guest: Run) -> None:
    ran = guest(
        LOCAL_APIC
        + f"""
        mov rax, 6
        mov cr8, rax
        sti
        mov dword ptr [rbx + 0x300], 0x40051        # both held by the task priority
        mov dword ptr [rbx + 0x300], 0x40061
        nop
        mov rax, r12
        call print
        mov eax, [rbx + 0x220]                      # IRR, vectors 40H to 5FH
        call print
        mov rax, 5
        mov cr8, rax
        nop
        mov rax, r12                                # 61H came, 51H is of the priority's own class
        call print
        mov dword ptr [rbx + 0x80], 0
        nop
        mov rax, r12
        call print
        mov eax, [rbx + 0x300]                      # the ICR, as written
        call print
        {_LOCAL_APIC_HANDLER}
        """
    )
    assert ran.numbers == [0, 1 << 0x11, 1, 2, 0x40061]


def test_a_halt_ends_by_what_came_before_it_and_by_a_timer(guest: Run) -> None:
    ran = guest(
        LOCAL_APIC
        + f"""
        mov dword ptr [rbx + 0x300], 0x40051        # pending when it halts
        sti
        hlt
        cli
        mov rax, r12
        call print
        mov dword ptr [rbx + 0x3e0], 0xb
        mov dword ptr [rbx + 0x320], 0x20061        # periodic, 100 us
        mov dword ptr [rbx + 0x380], 100000
        mov ebp, 1000
1:      sti
        hlt
        cli
        dec ebp
        jnz 1b
        cmp r12, 1001                               # a late one may come in the loop, with the next
        setae al
        movzx eax, al
        call print
        {_LOCAL_APIC_HANDLER}
        """
    )
    assert ran.numbers == [1, 1]


def test_x2apic_registers_fault_on_reserved_bits_whoever_carries_them_out(guest: Run) -> None:
    ran = guest(
        LOCAL_APIC
        + """
        mov ecx, 0x1b
        rdmsr
        or eax, 0x400
        wrmsr
        mov ecx, 0x83f                              # SELF IPI, then EOI in the handler: not by the page any more
        mov eax, 0x51
        xor edx, edx
        wrmsr
        mov ecx, 0x822
        rdmsr
        call print
        mov ecx, 0x80b
        mov eax, 1
        wrmsr
        jmp end
        handler: iretq
        """
    )
    assert ran.numbers == [1 << 0x11]
    assert ran.fault is not None
    assert (ran.fault.vector, ran.fault.error) == (GP, 0)


def test_interrupts_come_between_instructions_that_the_processor_carries_out_for_the_monitor(guest: Run) -> None:
    ran = guest(
        LOCAL_APIC
        + f"""
        mov dword ptr [rbx + 0x3e0], 0xb
        mov dword ptr [rbx + 0x320], 0x20061        # periodic, 50 us
        mov dword ptr [rbx + 0x380], 50000
        mov esi, {layout.HPET_BASE:#x}
        mov ebp, 2000
        xor r13d, r13d
        sti
1:      movups xmm0, [rsi]
        movq rax, xmm0
        cmp eax, [rsi]
        jne 2f
        inc r13d
2:      dec ebp
        jnz 1b
        cli
        mov rax, r13
        call print
        cmp r12, 10
        setae al
        movzx eax, al
        call print
        {_LOCAL_APIC_HANDLER}
        """
    )
    assert ran.numbers == [2000, 1]


def test_a_page_table_in_the_local_apic_is_no_access_of_the_instruction(guest: Run) -> None:
    """Its entry at offset B0H reads all ones, whatever a store through it would be as a store to the page."""
    ran = guest(
        LOCAL_APIC
        + f"""
        mov dword ptr [rbx + 0x300], 0x40051        # in service, not completed
        lea rax, handler[rip]
        sti
        nop
        nop
        jmp end
        handler: mov rax, {layout.LAPIC_BASE | 7:#x}
        mov [{PAGE_DIRECTORY + 8 * 5}], rax
        mov rax, cr3
        mov cr3, rax
        mov eax, [rbx + 0x120]                      # ISR, vectors 40H to 5FH
        call print
        mov edi, {10 << 20 | 0xB0 // 8 << 12:#x}
        xor eax, eax
        mov [rdi], eax
        """
    )
    assert ran.numbers == [1 << 0x11]
    assert ran.fault is not None
    assert (ran.fault.vector, ran.fault.cr2) == (PF, 10 << 20 | 0xB0 // 8 << 12)
