"""Guests that need the monitor for an instruction: the task priority and string I/O."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest
from asm import assemble
from harness import (
    CODE,
    CODE_SEGMENT,
    DATA,
    DATA_SEGMENT,
    GDT,
    HANDLERS,
    IDT,
    KCODE64,
    KDATA,
    PT,
    STACK,
    TSS,
    TSS64,
    engine_called,
    paravirtual,
)

from pyhyve.cpu.processor import Processor, Segment
from pyhyve.vmm.topology import Topology
from pyhyve.vmm.vm import Suspend, Vm

END = 0x80
PORT = 0x90
APIC = 0xFEE0_0000
UCODE64, UDATA = 0x2B, 0x23


class Ports:
    """Answers reads by counting up from 1, records writes; a write to END ends the VM."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.reads = 0
        self.written: list[tuple[int, int]] = []
        vm.ports.attach(PORT, 4, self)
        vm.ports.attach(END, 1, self, base=0)

    def read(self, offset: int, size: int) -> int:
        self.reads += 1
        return self.reads

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == END:
            self.vm.suspend(Suspend.POWEROFF)
        else:
            self.written.append((size, value))


class Guest:
    """64-bit code at CODE, in ring 0; 4 KiB pages below 2 MiB, one large page at the local APIC."""

    def __init__(self, processor: Processor) -> None:
        self.vm = vm = Vm("test", processor, Topology())
        vm.map_ram(0, 8 << 20)
        self.ports = Ports(vm)
        self.cpu = cpu = vm.vcpus[0].backend
        self.put(0x1000, 0x2007)
        self.put(0x2000, 0x3007, 0, 0, 0x5007)
        self.put(0x3000, PT | 7, 0x20_0087)
        self.put(PT, *(page << 12 | 7 for page in range(512)))
        self.put(0x5000 + (APIC >> 21 & 511) * 8, APIC & ~0x1F_FFFF | 0x93)
        self.put(
            GDT, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0, 0x00CF_F300_0000_FFFF, 0x00AF_FB00_0000_FFFF,
            0x0000_8B00_0000_2067 | TSS << 16, 0, 0x0000_8900_0000_0067 | TSS << 16, 0,
        )  # fmt: skip
        cpu.set_segment("cs", Segment(KCODE64, 0, 0xFFFF_FFFF, CODE_SEGMENT["long64"]))
        for name in ("ss", "ds", "es", "fs", "gs"):
            cpu.set_segment(name, Segment(KDATA, 0, 0xFFFF_FFFF, DATA_SEGMENT["long64"]))
        self.write(TSS + 4, struct.pack("<Q", STACK - 0x1000))
        self.write(TSS + 0x66, struct.pack("<H", 0x68))
        cpu.set_segment("tr", Segment(TSS64, TSS, 0x67, 0x8B))
        cpu.set_table("gdtr", GDT, 0x4F)
        cpu.set_table("idtr", IDT, 0xFFF)
        for name, value in (
            ("cr0", 0x8001_0033), ("cr3", 0x1000), ("cr4", 0x620), ("efer", 0xD00), ("rsp", STACK), ("rip", CODE),
            ("rflags", 2), ("rdx", PORT), ("rbx", 0),
        ):  # fmt: skip
            cpu.set(name, value)

    def put(self, address: int, *words: int) -> None:
        self.write(address, struct.pack(f"<{len(words)}Q", *words))

    def write(self, address: int, data: bytes) -> None:
        self.vm.memory.write(address, data)

    def read(self, address: int, length: int) -> bytes:
        return self.vm.memory.read(address, length)

    def handle(self, vector: int, source: str) -> None:
        at = HANDLERS + vector * 0x100
        self.write(at, assemble(source, at))
        self.put(IDT + vector * 16, at & 0xFFFF | KCODE64 << 16 | 0x8E << 40 | at >> 16 << 48, 0)

    def user(self) -> None:
        """Start in ring 3 with the right to use ports."""
        self.cpu.set_segment("cs", Segment(UCODE64, 0, 0xFFFF_FFFF, CODE_SEGMENT["long64"] | 0x60))
        for name in ("ss", "ds", "es", "fs", "gs"):
            self.cpu.set_segment(name, Segment(UDATA, 0, 0xFFFF_FFFF, DATA_SEGMENT["long64"] | 0x60))
        self.cpu.set("rflags", 0x3002)

    def protect(self, page: int, flags: int) -> None:
        self.put(PT + (page >> 12) * 8, page | flags)

    def run(self, source: str) -> tuple[Suspend, str]:
        self.write(CODE, assemble(f"{source}\nout {END}, al\n9: jmp 9b", CODE))
        self.vm.start()
        assert self.vm.wait(20), f"the guest goes on at {self.cpu.get('rip'):#x}"
        assert self.vm.join()
        assert self.vm.suspended is not None
        return self.vm.suspended.how, self.vm.suspended.detail

    def done(self, source: str) -> None:
        how, detail = self.run(source)
        assert how is Suspend.POWEROFF, detail


@pytest.fixture
def make(engine: str) -> Iterator[Callable[[], Guest]]:
    reason = paravirtual(engine)
    if reason:
        pytest.skip(reason)
    found = engine_called(engine)
    assert not isinstance(found, str)
    made: list[Guest] = []

    def guest() -> Guest:
        made.append(Guest(found))
        return made[-1]

    yield guest
    for each in made:
        each.vm.close()


@pytest.fixture
def guest(make: Callable[[], Guest]) -> Guest:
    return make()


# --- the task priority -----------------------------------------------------------------------------------------------


def test_cr8_and_the_apics_tpr_are_one_register(guest: Guest) -> None:
    guest.done(f"""
        mov rbx, {APIC}
        mov eax, 9; mov cr8, rax; mov r8, cr8; mov r9d, [rbx + 0x80]
        mov dword ptr [rbx + 0x80], 0x57; mov r10, cr8
        mov eax, 3; mov cr8, rax; mov r11d, [rbx + 0x80]; mov r12, cr8""")
    assert [guest.cpu.get(f"r{n}") for n in range(8, 13)] == [9, 0x90, 5, 0x30, 3]


def test_an_interrupt_waits_for_cr8(guest: Guest) -> None:
    guest.handle(0x41, "mov r9, cr8; inc r8; mov dword ptr [rbx + 0xb0], 0; iretq")
    guest.done(f"""
        mov rbx, {APIC}
        mov dword ptr [rbx + 0xf0], 0x1ff
        mov eax, 5; mov cr8, rax; sti
        mov dword ptr [rbx + 0x300], 0x44041                    # to itself
        mov ecx, 10000
    1:  dec ecx; jnz 1b
        mov r10, r8
        mov eax, 4; mov cr8, rax; nop; mov r11, r8
        mov eax, 3; mov cr8, rax; nop; nop; mov r12, r8""")
    assert [guest.cpu.get(f"r{n}") for n in range(8, 13)] == [1, 3, 0, 0, 1]


# --- string I/O ------------------------------------------------------------------------------------------------------


def test_string_input_fills_memory_over_pages(guest: Guest) -> None:
    guest.done(f"cld; mov edi, {DATA + 0xFF9}; mov ecx, 5; rep insd; insb; insw")
    assert guest.read(DATA + 0xFF9, 20) == struct.pack("<5I", 1, 2, 3, 4, 5)
    assert guest.read(DATA + 0xFF9 + 20, 3) == b"\x06\x07\x00"
    assert guest.cpu.get("rdi") == DATA + 0xFF9 + 23
    assert guest.cpu.get("rcx") == 0


def test_string_output_reads_memory_over_pages(guest: Guest) -> None:
    guest.write(DATA + 0xFFA, struct.pack("<4H", 1, 2, 3, 4) + b"\xaa")
    guest.done(f"cld; mov esi, {DATA + 0xFFA}; mov ecx, 4; rep outsw; outsb; std; mov ecx, 2; rep outsb")
    tail = [(1, guest.read(DATA + 0x1000 + n, 1)[0]) for n in (3, 2)]
    assert guest.ports.written == [(2, 1), (2, 2), (2, 3), (2, 4), (1, 0xAA), *tail]
    assert guest.cpu.get("rsi") == DATA + 0x1001


def test_string_input_of_nothing_touches_nothing(guest: Guest) -> None:
    guest.done("xor ecx, ecx; xor edi, edi; dec rdi; shl rdi, 50; rep insb; mov r8d, 7")
    assert guest.ports.reads == 0
    assert guest.cpu.get("r8") == 7


@pytest.mark.parametrize("element", ["insb", "insd"])
def test_a_fault_in_string_input_goes_on_where_it_stopped(guest: Guest, element: str) -> None:
    """The page is made present by the handler; no byte of the port is lost."""
    size = 1 if element == "insb" else 4
    guest.protect(DATA + 0x1000, 0)
    guest.handle(
        14,
        f"mov r8, cr2; pop r9; mov r10, rcx; or qword ptr [{PT + (DATA + 0x1000 >> 12) * 8}], {DATA + 0x1003}; iretq",
    )
    guest.done(f"cld; mov edi, {DATA + 0xFFE}; mov ecx, 6; rep {element}")
    first = 2 if size == 1 else 0
    assert guest.cpu.get("r8") == DATA + 0x1000
    assert guest.cpu.get("r9") == 2, "a write to a page that is not there"
    assert guest.cpu.get("r10") == 6 - first
    expected = b"".join(n.to_bytes(size, "little") for n in range(1, 7))
    assert guest.read(DATA + 0xFFE, 6 * size) == expected
    assert guest.ports.reads == 6


@pytest.mark.parametrize("element", ["insb", "outsb"])
def test_user_code_does_string_io_on_its_own_pages_only(guest: Guest, element: str) -> None:
    guest.protect(DATA + 0x1000, 3)
    guest.handle(14, f"mov r8, cr2; pop r9; out {END}, al")
    guest.user()
    guest.done(f"cld; mov edi, {DATA + 0xFFC}; mov esi, edi; mov ecx, 8; rep {element}")
    assert guest.cpu.get("r8") == DATA + 0x1000
    assert guest.cpu.get("r9") == (7 if element == "insb" else 5)
    assert guest.cpu.get("rcx") == 4
    assert guest.read(DATA + 0x1000, 4) == bytes(4)
    assert len(guest.ports.written) + guest.ports.reads == 4


def test_a_huge_count_lets_interrupts_in(guest: Guest) -> None:
    """REP OUTSB with RCX of 2**64 - 1 must neither hang the monitor nor hold back an NMI."""
    guest.handle(2, f"mov r8, rcx; out {END}, al")
    guest.vm.hang_ns = 0
    vcpu = guest.vm.vcpus[0]
    write = guest.ports.write

    def counted(offset: int, size: int, value: int) -> None:
        write(offset, size, value)
        if len(guest.ports.written) == 5000:
            vcpu.post_nmi()

    guest.vm.ports.detach(PORT, 4)
    guest.ports.write = counted  # type: ignore[method-assign]
    guest.vm.ports.attach(PORT, 4, guest.ports)
    guest.done(f"cld; mov esi, {DATA}; mov rcx, -1; rep outsb")
    count = (1 << 64) - 1 - guest.cpu.get("r8")
    assert count == len(guest.ports.written)
    assert 5000 <= count <= 5000 + 1024


# --- the local APIC's page -------------------------------------------------------------------------------------------


def base(value: int) -> str:
    """Write IA32_APIC_BASE."""
    return f"mov ecx, 0x1b; mov eax, {value:#x}; xor edx, edx; wrmsr"


def test_the_local_apics_page_moves_with_its_base(guest: Guest) -> None:
    guest.done(f"""
        mov rbx, {APIC}
        mov r8d, [rbx + 0x30]
        {base(APIC + 0x1_0900)}
        mov r9d, [rbx + 0x30]; mov r10d, [rbx + 0x10030]
        {base(APIC + 0x100)}
        mov r11d, [rbx + 0x10030]
        {base(APIC + 0x900)}
        mov r12d, [rbx + 0x30]""")
    version = guest.cpu.get("r8")
    assert version & 0xFF == 0x14
    assert [guest.cpu.get(f"r{n}") for n in range(9, 13)] == [0xFFFF_FFFF, version, 0xFFFF_FFFF, version]


def test_the_local_apics_page_hides_the_memory_below_it(guest: Guest, engine: str) -> None:
    if engine == "kvm":
        pytest.skip("KVM's memory is the whole VM's: it shows there")
    guest.put(0x30_0030, 0x1234_5678)
    guest.done(f"""
        mov rbx, 0x300000
        mov r8d, [rbx + 0x30]
        {base(0x30_0900)}
        mov r9d, [rbx + 0x30]; mov dword ptr [rbx + 0x80], 0x50; mov r10, cr8
        {base(APIC + 0x900)}
        mov r11d, [rbx + 0x30]; mov r12d, [rbx + 0x80]""")
    assert [guest.cpu.get(f"r{n}") for n in (8, 10, 11, 12)] == [0x1234_5678, 5, 0x1234_5678, 0]
    assert guest.cpu.get("r9") & 0xFF == 0x14


def test_cpuid_reports_the_local_apic_while_it_is_on(guest: Guest) -> None:
    show = "mov eax, 1; cpuid; shr edx, 9; and edx, 1; mov"
    guest.done(f"""
        {show} r8d, edx
        {base(APIC + 0x100)}
        {show} r9d, edx
        {base(APIC + 0x900)}
        {show} r10d, edx""")
    assert [guest.cpu.get(f"r{n}") for n in range(8, 11)] == [1, 0, 1]


def test_the_instruction_behind_sti_comes_before_an_interrupt_wherever_it_has_to_go(guest: Guest) -> None:
    """To memory that nobody has touched yet, to a device; in a block of its own, and among others."""
    guest.handle(0x41, "cmp r10, [rsp]; jne 1f; inc r9; 1: inc r8; mov dword ptr [rbx + 0xb0], 0; iretq")
    guest.done(f"""
        mov rbx, {APIC}
        mov dword ptr [rbx + 0xf0], 0x1ff
        mov esi, 0x210000
        mov r12d, 3
    1:  mov dword ptr [rbx + 0x300], 0x44041                    # to itself
        lea r10, [rip + 2f]; add rsi, 0x1000
        sti
    2:  mov al, [rsi]
        nop; cli
        mov dword ptr [rbx + 0x300], 0x44041
        lea r10, [rip + 3f]
        sti
    3:  mov eax, [rbx + 0x30]
        nop; cli
        dec r12d; jnz 1b""")
    assert (guest.cpu.get("r8"), guest.cpu.get("r9")) == (6, 0)
