"""Task switches by hardware (Intel SDM vol 3, "Task Management"), on the software processor.

KVM leaves them to an emulator of its own, which is not what is to be tested here.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Final

import pytest
from asm import MISSING, assemble
from harness import (
    CODE,
    CODE16_SEL,
    DATA,
    DATA16_SEL,
    GDT,
    IDT,
    IF,
    KCODE32,
    KDATA,
    PML4,
    STACK,
    TF,
    TSS32,
    UCODE32,
    UDATA,
    Fault,
    Machine,
    Outcome,
    engine_called,
    run_asm,
)

from pyhyve.cpu.processor import INJECT_EXTERNAL, INJECT_NMI, Segment

pytestmark = [
    pytest.mark.skipif(isinstance(engine_called("bt"), str), reason="the bt engine is not built"),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]

NT: Final = 1 << 14
VM: Final = 1 << 17
RF: Final = 1 << 16
CR0_TS: Final = 8
NEW: Final = 0xA200
"""The other task's TSS; the first task's is the harness's."""
OLD: Final = 0xA000
TASK: Final = 0x20000
"""Where the other task's code is."""
SEL, GATE, LDT, UGATE, SEL16, EXTRA = 0x60, 0x68, 0x70, 0x78, 0x80, 0x88
LDT_AT: Final = 0xB000


def descriptor(base: int, limit: int, access: int, flags: int = 0) -> int:
    return (
        limit & 0xFFFF
        | (base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 15) << 48
        | flags << 52
        | base >> 24 << 56
    )


def tss32(**values: int) -> bytes:
    """A 32-bit TSS of a ring-0 task at TASK with its own stack."""
    fields = {
        "link": 0, "cr3": PML4, "eip": TASK, "eflags": 2, "eax": 0xA, "ecx": 0xC, "edx": 0xD, "ebx": 0xB,
        "esp": STACK - 0x1000, "ebp": 0x55, "esi": 0x51, "edi": 0xD1, "es": KDATA, "cs": KCODE32, "ss": KDATA,
        "ds": KDATA, "fs": 0, "gs": 0, "ldt": 0, "trap": 0,
    } | values  # fmt: skip
    order = ("cr3", "eip", "eflags", "eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi",
             "es", "cs", "ss", "ds", "fs", "gs", "ldt")  # fmt: skip
    stacks = struct.pack("<6I", STACK - 0x2000, KDATA, 0, 0, 0, 0)
    words = struct.pack("<18I", *(fields[name] for name in order))
    return struct.pack("<I", fields["link"]) + stacks + words + struct.pack("<HH", fields["trap"], 0x68)


def tss16(**values: int) -> bytes:
    fields = {
        "link": 0, "ip": 0x9000, "flags": 2, "ax": 0xA, "cx": 0xC, "dx": 0xD, "bx": 0xB, "sp": 0x9F00, "bp": 0x55,
        "si": 0x51, "di": 0xD1, "es": DATA16_SEL, "cs": CODE16_SEL, "ss": DATA16_SEL, "ds": DATA16_SEL, "ldt": 0,
    } | values  # fmt: skip
    order = ("ip", "flags", "ax", "cx", "dx", "bx", "sp", "bp", "si", "di", "es", "cs", "ss", "ds", "ldt")
    return struct.pack("<H3I", fields["link"], 0, 0, 0) + struct.pack("<15H", *(fields[name] for name in order))


def saved32(machine: Machine, at: int) -> dict[str, int]:
    words = struct.unpack("<18I", machine.read(at + 0x1C, 72))
    order = ("cr3", "eip", "eflags", "eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi",
             "es", "cs", "ss", "ds", "fs", "gs", "ldt")  # fmt: skip
    return dict(zip(order, words, strict=True))


def access(machine: Machine, selector: int) -> int:
    return machine.read(GDT + selector + 5, 1)[0]


def build(
    task: str | None = None,
    tss: bytes | None = None,
    gdt: Mapping[int, int] | None = None,
    more: Callable[[Machine], None] | None = None,
    bits: int = 32,
) -> Callable[[Machine], None]:
    """Descriptors for another task, its TSS and its code."""

    def setup(machine: Machine) -> None:
        machine.vcpu.set_table("gdtr", GDT, 0x9F)
        table = {
            SEL: descriptor(NEW, 0x67, 0x89),
            GATE: 0x85 << 40 | SEL << 16,
            UGATE: 0xE5 << 40 | SEL << 16,
            LDT: descriptor(LDT_AT, 0x1F, 0x82),
            SEL16: descriptor(NEW, 0x2B, 0x81),
        } | dict(gdt or {})
        for selector, value in table.items():
            machine.write(GDT + selector, struct.pack("<Q", value))
        machine.write(NEW, tss32() if tss is None else tss)
        if task is not None:
            place = TASK if bits == 32 else 0x9000
            machine.write(place, assemble(task, place, bits))
        if more is not None:
            more(machine)

    return setup


class Task:
    """What a run left: the outcome, and the machine's tables before it was closed."""

    def __init__(
        self,
        source: str,
        task: str | None = "out 0xf4, al",
        tss: bytes | None = None,
        gdt: Mapping[int, int] | None = None,
        more: Callable[[Machine], None] | None = None,
        cpl: int = 0,
        bits: int = 32,
        paging: bool = False,
        handlers: Mapping[int, str] | None = None,
        regs: Mapping[str, int] | None = None,
    ) -> None:
        self.access: dict[int, int] = {}

        def hook(machine: Machine, reason: int) -> bool:
            self.old = saved32(machine, OLD)
            self.new = machine.read(NEW, 0x68)
            self.access = {selector: access(machine, selector) for selector in (SEL, SEL16, TSS32)}
            self.tr = machine.vcpu.get_segment("tr")
            self.segments = {
                name: machine.vcpu.get_segment(name) for name in ("es", "cs", "ss", "ds", "fs", "gs", "ldtr")
            }
            self.cr0, self.cr3 = machine.vcpu.get("cr0"), machine.vcpu.get("cr3")
            self.dr6, self.dr7 = machine.vcpu.get("dr6"), machine.vcpu.get("dr7")
            return False

        self.out: Outcome = run_asm(
            "bt", source, regs, mode="prot32", cpl=cpl, setup=build(task, tss, gdt, more, bits), paging=paging,
            hook=hook, handlers=handlers,
        )  # fmt: skip

    def done(self) -> "Task":
        out = self.out
        assert out.exit == "done", f"{out.exit} {out.fault} {out.message} rip {out['rip']:#x}"
        return self

    def faulted(self, vector: int, error: int) -> Fault:
        fault = self.out.fault
        assert fault is not None, f"{self.out.exit} {self.out.message} rip {self.out['rip']:#x}"
        assert (fault.vector, fault.error) == (vector, error), fault
        return fault


def far(selector: int, call: bool = False) -> str:
    return f"{'call' if call else 'jmp'} {selector:#x}:0"


# -- far CALL and JMP, IRET -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", [SEL, GATE], ids=["tss", "gate"])
def test_jmp_saves_the_old_task_and_loads_the_new(selector: int) -> None:
    t = Task(f"mov ebp, 5; std; {far(selector)}; ud2").done()
    regs = {
        "rax": 0xA,
        "rcx": 0xC,
        "rdx": 0xD,
        "rbx": 0xB,
        "rbp": 0x55,
        "rsi": 0x51,
        "rdi": 0xD1,
        "rsp": STACK - 0x1000,
    }
    assert {name: t.out[name] for name in regs} == regs
    assert t.out.rflags == 2
    assert (t.old["eip"], t.old["ebp"], t.old["esp"]) == (CODE + 6 + 7, 5, STACK)
    assert t.old["eflags"] == 0x402
    assert (t.old["cs"], t.old["ss"], t.old["ds"], t.old["fs"]) == (KCODE32, KDATA, KDATA, KDATA)
    assert (t.access[SEL], t.access[TSS32]) == (0x8B, 0x89), "the new one is busy, the old one is not"
    assert t.cr0 & CR0_TS
    assert (t.tr.selector, t.tr.base, t.tr.limit, t.tr.attr) == (SEL, NEW, 0x67, 0x8B)
    assert t.new[:2] == b"\0\0", "no back link"
    assert t.segments["fs"].attr & 0x10000


def test_call_nests_and_iret_comes_back() -> None:
    t = Task(f"mov ecx, 7; {far(SEL, True)}; mov ebx, eax; str dx", "pushfd; pop eax; mov [0x40000], eax; iretd").done()
    assert (t.out["rcx"], t.out["rdx"] & 0xFFFF) == (7, TSS32)
    assert not t.out.rflags & NT
    assert (t.access[SEL], t.access[TSS32]) == (0x89, 0x8B)
    assert int.from_bytes(t.new[:2], "little") == TSS32
    assert int.from_bytes(t.new[0x24:0x28], "little") & NT == 0, "IRET clears NT in the image that it saves"
    assert int.from_bytes(t.new[0x20:0x24], "little") == TASK + 8, "the instruction behind the IRET"


def test_the_nested_task_runs_with_nt_and_both_are_busy() -> None:
    t = Task(far(SEL, True), "pushfd; pop eax; out 0xf4, al").done()
    assert t.out["rax"] & NT
    assert (t.access[SEL], t.access[TSS32]) == (0x8B, 0x8B)


def test_a_task_is_called_again_where_it_left_off() -> None:
    t = Task(f"{far(SEL, True)}; {far(SEL, True)}", "1: inc eax; iretd; jmp 1b").done()
    assert int.from_bytes(t.new[0x28:0x2C], "little") == 0xA + 2


def test_user_code_needs_a_gate() -> None:
    Task(far(SEL), cpl=3).faulted(13, SEL)
    Task(far(GATE), cpl=3).faulted(13, GATE)
    Task(far(UGATE, True), cpl=3).done()
    Task(far(UGATE | 3), cpl=3).done()
    Task(far(GATE | 3), cpl=0).faulted(13, GATE)


def test_16_bit_tasks() -> None:
    t = Task(far(SEL16), "mov bx, sp; out 0xf4, al", tss16(), bits=16).done()
    assert (t.out["rax"] & 0xFFFF, t.out["rbx"] & 0xFFFF, t.out["rsi"] & 0xFFFF) == (0xA, 0x9F00, 0x51)
    assert t.access[SEL16] == 0x83
    assert t.segments["fs"].attr & 0x10000
    assert t.segments["cs"].limit == 0xFFFF


def test_back_from_a_16_bit_task() -> None:
    source = f"mov ecx, 0x12345678; {far(SEL16, True)}; mov edx, ecx"
    t = Task(source, "mov cx, 9; iret", tss16(), bits=16).done()
    assert (t.out["rdx"], t.out["rsp"]) == (0x1234_5678, STACK)
    assert struct.unpack_from("<H", t.new, 20) == (9,)
    assert struct.unpack_from("<H", t.new, 0) == (TSS32,)


def test_the_tss_of_a_16_bit_task_gets_16_bits() -> None:
    """A 16-bit task jumps to a 32-bit one: its TSS has 44 bytes, and no more is written."""
    other = 0xA400
    marker = b"\xee" * 32

    def more(machine: Machine) -> None:
        machine.write(NEW + 44, marker)
        machine.write(GDT + EXTRA, struct.pack("<Q", descriptor(other, 0x67, 0x89)))
        machine.write(other, tss32())
        machine.write(TASK, assemble("out 0xf4, al", TASK, 32))

    t = Task(far(SEL16), f"mov ax, 0x1111; {far(EXTRA)}", tss16(), bits=16, more=more).done()
    assert t.new[44:76] == marker
    assert struct.unpack_from("<HHH", t.new, 14) == (0x9000 + 8, 2, 0x1111)


def test_the_new_task_has_its_own_page_tables() -> None:
    """CR3 comes from the TSS with paging on: the new task sees another page at DATA."""
    tables, leaf = 0x70000, 0x71000

    def more(machine: Machine) -> None:
        machine.write(tables, struct.pack("<II", leaf | 7, 0x400087))
        pages = [page << 12 | 7 for page in range(1024)]
        pages[DATA >> 12] = 0x72000 | 7
        machine.write(leaf, struct.pack("<1024I", *pages))
        machine.write(0x72000, b"\x22\0\0\0")
        machine.write(OLD + 0x1C, struct.pack("<I", PML4))
        machine.write(DATA, b"\x11\0\0\0")

    source = f"mov ebx, [{DATA}]; {far(SEL, True)}; mov edx, [{DATA}]"
    t = Task(source, f"mov eax, [{DATA}]; iretd", tss32(cr3=tables), more=more, paging=True).done()
    assert (t.out["rbx"], t.out["rdx"], t.cr3) == (0x11, 0x11, PML4)
    assert int.from_bytes(t.new[0x28:0x2C], "little") == 0x22


def test_cr3_is_not_loaded_without_paging() -> None:
    assert Task(far(SEL), tss=tss32(cr3=0x123000)).done().cr3 == PML4


def test_the_new_task_has_its_own_ldt() -> None:
    def more(machine: Machine) -> None:
        machine.write(LDT_AT + 8, struct.pack("<Q", descriptor(DATA, 0xFFF, 0x93, 4)))
        machine.write(DATA, b"\x77\0\0\0")

    t = Task(far(SEL), "mov eax, fs:[0]; out 0xf4, al", tss32(ldt=LDT, fs=0xC), more=more).done()
    assert t.out["rax"] == 0x77
    assert (t.segments["ldtr"].selector, t.segments["ldtr"].base, t.segments["ldtr"].limit) == (LDT, LDT_AT, 0x1F)


def test_a_task_in_user_mode() -> None:
    """Its first interrupt comes back to ring 0 on the stack that its own TSS names."""
    tss = tss32(cs=UCODE32, ss=UDATA, ds=UDATA, es=UDATA, eflags=0x3002)
    t = Task(far(SEL), "mov eax, cs; out 0xf4, al", tss).done()
    assert (t.out["rax"], t.segments["ss"].attr >> 5 & 3) == (UCODE32, 3)
    fault = Task(far(SEL), "ud2", tss).faulted(6, 0)
    assert (fault.cs, fault.rip, fault.rsp) == (UCODE32, TASK, STACK - 0x1000)


def test_a_task_in_virtual_8086_mode() -> None:
    tss = tss32(cs=0x1000, ss=0x2000, ds=0x4000, es=0, esp=0x100, eip=0x10, eflags=VM | 0x3002)

    def more(machine: Machine) -> None:
        machine.write(0x10010, assemble("mov ax, [0]; mov bx, cs; push bx; ud2", 0, 16))
        machine.write(0x40000, b"\x34\x12")

    t = Task(far(SEL), None, tss, more=more)
    fault = t.faulted(6, 0)
    assert (t.out["rax"] & 0xFFFF, t.out["rbx"] & 0xFFFF, fault.rip, fault.cs) == (0x1234, 0x1000, 0x16, 0x1000)
    assert fault.rflags & VM


def test_the_trap_flag_of_the_tss_stops_before_the_first_instruction() -> None:
    t = Task(far(SEL), "inc eax; out 0xf4, al", tss32(trap=1))
    assert t.faulted(1, 0).rip == TASK
    assert t.dr6 & 0x8000
    assert t.out["rax"] == 0xA


def test_local_breakpoints_are_turned_off() -> None:
    t = Task(f"mov eax, 0x555; mov dr7, eax; {far(SEL)}").done()
    assert t.dr7 == 0x400


# -- events -----------------------------------------------------------------------------------------------------------


def idt_gate(vector: int, selector: int = SEL, dpl: int = 0) -> Callable[[Machine], None]:
    def more(machine: Machine) -> None:
        machine.write(IDT + vector * 8, struct.pack("<Q", (0x85 | dpl << 5) << 40 | selector << 16))

    return more


def test_an_exception_through_a_task_gate_pushes_its_error_code() -> None:
    t = Task("mov ax, 0x1234; mov ds, ax; nop", "pop eax; out 0xf4, al", more=idt_gate(13)).done()
    assert t.out["rax"] == 0x1234 & ~3
    assert t.old["eip"] == CODE + 4
    assert t.old["eflags"] & RF
    assert t.out.rflags & NT


def test_an_error_code_on_a_16_bit_stack() -> None:
    t = Task("mov ax, 0x1234; mov ds, ax", "pop ax; out 0xf4, al", tss16(), more=idt_gate(13, SEL16), bits=16).done()
    assert t.out["rax"] & 0xFFFF == 0x1234
    assert t.out["rsp"] & 0xFFFF == 0x9F00


def test_int_through_a_task_gate_and_back() -> None:
    t = Task("int 0x40; mov ebx, 1", "inc eax; iretd", more=idt_gate(0x40)).done()
    assert t.out["rbx"] == 1
    assert int.from_bytes(t.new[0x38:0x3C], "little") == STACK - 0x1000, "no error code, and no frame"
    assert t.old["eip"] == CODE + 2


def test_int_obeys_the_gates_dpl() -> None:
    Task("int 0x40", cpl=3, more=idt_gate(0x40)).faulted(13, 0x40 * 8 + 2)
    Task("int 0x40", cpl=3, more=idt_gate(0x40, dpl=3)).done()


def test_an_interrupt_through_a_task_gate() -> None:
    def more(machine: Machine) -> None:
        idt_gate(0x41)(machine)
        machine.vcpu.inject(0x41, INJECT_EXTERNAL)

    t = Task("mov ebx, 1; ud2", "iretd", more=more)
    assert t.faulted(6, 0).rip == CODE + 5
    assert t.old["eip"] == CODE


def test_a_double_fault_has_a_task_of_its_own() -> None:
    """The stack is too small, so that no exception can be delivered on it."""

    def more(machine: Machine) -> None:
        idt_gate(8)(machine)
        machine.vcpu.set_segment("ss", Segment(EXTRA, 0, 0xFFF, 0x4093))

    t = Task("mov esp, 0x2000; ud2", "pop eax; out 0xf4, al", gdt={EXTRA: descriptor(0, 0xFFF, 0x93, 4)}, more=more)
    assert t.done().out["rax"] == 0
    assert (t.old["eip"], t.old["ss"]) == (CODE + 5, EXTRA)


def test_nmi_is_blocked_until_the_task_returns() -> None:
    seen = []

    def more(machine: Machine) -> None:
        idt_gate(2)(machine)
        machine.vcpu.inject(2, INJECT_NMI)

    def hook(machine: Machine, reason: int) -> bool:
        seen.append(machine.vcpu.nmi_allowed())
        return machine.io[-1:] == [(0x80, 1, 0xA)] and machine.vcpu.exit.io_port == 0x80

    out = run_asm("bt", "nop", mode="prot32", setup=build("out 0x80, al; iretd", more=more), hook=hook)
    assert out.exit == "done"
    assert seen == [False, True]


# -- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gdt", "fault"),
    [
        ({SEL: descriptor(NEW, 0x67, 0x09)}, (11, SEL)),  # not present
        ({SEL: descriptor(NEW, 0x67, 0x8B)}, (13, SEL)),  # busy
        ({SEL: descriptor(NEW, 0x66, 0x89)}, (10, SEL)),  # too short
        ({SEL: descriptor(NEW, 0x2A, 0x81)}, (10, SEL)),  # a 16-bit one too
        ({SEL: descriptor(NEW, 0x67, 0x82)}, (13, SEL)),  # an LDT
    ],
)
@pytest.mark.parametrize("way", [SEL, GATE, UGATE])
def test_the_new_tss_is_checked_in_the_old_task(way: int, gdt: dict[int, int], fault: tuple[int, int]) -> None:
    for call in (False, True):
        t = Task(far(way, call), gdt=gdt)
        assert t.faulted(*fault).rip == CODE
        assert (t.access[TSS32], t.cr0 & CR0_TS, t.tr.selector) == (0x8B, 0, TSS32)


@pytest.mark.parametrize(
    ("gate", "fault"),
    [
        (0x05 << 40 | SEL << 16, (11, GATE)),
        (0x85 << 40 | (SEL | 4) << 16, (13, SEL | 4)),  # in the LDT
        (0x85 << 40 | 0x1000 << 16, (13, 0x1000)),  # beyond the GDT
        (0x85 << 40, (13, 0)),
    ],
)
def test_task_gates_are_checked(gate: int, fault: tuple[int, int]) -> None:
    Task(far(GATE), gdt={GATE: gate}).faulted(*fault)


@pytest.mark.parametrize(
    ("link", "gdt", "fault"),
    [
        (SEL, {}, (10, SEL)),  # not busy
        (SEL | 4, {}, (10, SEL | 4)),
        (0x1000, {}, (10, 0x1000)),
        (0, {}, (10, 0)),
        (SEL, {SEL: descriptor(NEW, 0x67, 0x0B)}, (11, SEL)),
        (SEL, {SEL: descriptor(NEW, 0x40, 0x8B)}, (10, SEL)),
        (KDATA, {}, (10, KDATA)),
    ],
)
def test_the_back_link_is_checked(link: int, gdt: dict[int, int], fault: tuple[int, int]) -> None:
    def more(machine: Machine) -> None:
        machine.write(OLD, struct.pack("<H", link))
        machine.vcpu.set("rflags", NT | 2)

    t = Task("iretd", gdt=gdt, more=more)
    assert t.faulted(*fault).rip == CODE
    assert t.tr.selector == TSS32


def test_iret_with_nt_goes_to_the_task_that_is_linked() -> None:
    def more(machine: Machine) -> None:
        machine.write(OLD, struct.pack("<H", SEL))
        machine.vcpu.set("rflags", NT | 2)

    t = Task("iretd", gdt={SEL: descriptor(NEW, 0x67, 0x8B)}, more=more).done()
    assert (t.tr.selector, t.access[SEL], t.access[TSS32]) == (SEL, 0x8B, 0x89)
    assert not t.old["eflags"] & NT
    assert t.old["eip"] == CODE + 1


NP_CODE = descriptor(0, 0xFFFFF, 0x1B, 0xC)
NP_DATA = descriptor(0, 0xFFFFF, 0x13, 0xC)
USER_CONFORMING = descriptor(0, 0xFFFFF, 0xFF, 0xC)


@pytest.mark.parametrize(
    ("fields", "extra", "fault"),
    [
        ({"ldt": KDATA}, 0, (10, KDATA)),
        ({"ldt": LDT | 4}, 0, (10, LDT | 4)),
        ({"ldt": EXTRA}, descriptor(LDT_AT, 0xFF, 0x02), (10, EXTRA)),  # not present
        ({"cs": UCODE32 & ~3}, 0, (10, UCODE32 & ~3)),  # DPL 3 with RPL 0
        ({"cs": EXTRA}, USER_CONFORMING, (10, EXTRA)),  # conforming, DPL above RPL
        ({"cs": KDATA}, 0, (10, KDATA)),
        ({"cs": 0}, 0, (10, 0)),
        ({"cs": EXTRA}, NP_CODE, (11, EXTRA)),
        ({"ss": 0}, 0, (10, 0)),
        ({"ss": KCODE32}, 0, (10, KCODE32)),
        ({"ss": EXTRA}, descriptor(0, 0xFFFFF, 0x91, 0xC), (10, EXTRA)),  # read-only
        ({"ss": EXTRA}, NP_DATA, (12, EXTRA)),
        ({"ss": UDATA}, 0, (10, UDATA & ~3)),
        ({"ss": KDATA | 3}, 0, (10, KDATA)),
        ({"ds": 0x1000}, 0, (10, 0x1000)),
        ({"es": EXTRA}, NP_DATA, (11, EXTRA)),
        ({"gs": EXTRA}, descriptor(0, 0xFFFFF, 0x99, 0xC), (10, EXTRA)),  # code that cannot be read
        ({"fs": LDT}, 0, (10, LDT)),
        ({"ds": KDATA | 3}, 0, (10, KDATA)),
        ({"eip": 0x1000, "cs": EXTRA}, descriptor(0, 0xFFF, 0x9B, 4), (13, 0)),
    ],
)
def test_segments_are_checked_in_the_new_task(fields: dict[str, int], extra: int, fault: tuple[int, int]) -> None:
    """The handler runs as a third task: the second one may have no stack."""
    third = 0xA400
    vector, error = fault

    def more(machine: Machine) -> None:
        machine.write(GDT + 0x90, struct.pack("<Q", descriptor(third, 0x67, 0x89)))
        machine.write(third, tss32(eip=TASK + 0x100))
        machine.write(TASK + 0x100, assemble("pop eax; out 0xf4, al", TASK + 0x100, 32))
        idt_gate(vector, 0x90)(machine)

    t = Task(far(SEL), tss=tss32(**fields), gdt={EXTRA: extra}, more=more).done()
    assert t.out["rax"] == error
    assert int.from_bytes(t.new[0x20:0x24], "little") == fields.get("eip", TASK), "the fault is the new task's"
    assert t.access[SEL] == 0x8B
    assert t.access[TSS32] == 0x89


def test_ext_is_in_the_error_codes_of_interrupts() -> None:
    def more(machine: Machine) -> None:
        idt_gate(0x41)(machine)
        machine.vcpu.inject(0x41, INJECT_EXTERNAL)

    Task("nop", gdt={SEL: descriptor(NEW, 0x67, 0x8B)}, more=more).faulted(13, SEL | 1)
    Task("int 0x41", gdt={SEL: descriptor(NEW, 0x67, 0x8B)}, more=idt_gate(0x41)).faulted(13, SEL)


def test_a_page_fault_before_the_switch_leaves_the_old_task() -> None:
    def more(machine: Machine) -> None:
        machine.write(GDT + SEL, struct.pack("<Q", descriptor(0x80000 - 0x30, 0x67, 0x89)))
        machine.write(0x80000 - 0x30, tss32())
        machine.protect(0x80000, 0)

    t = Task(far(SEL, True), more=more, paging=True)
    fault = t.faulted(14, 0)
    assert (fault.rip, fault.cr2) == (CODE, 0x80000)
    assert (t.tr.selector, t.access[TSS32], t.cr0 & CR0_TS) == (TSS32, 0x8B, 0)
    assert t.access[SEL] == 0x89


def test_the_old_tss_must_be_writable() -> None:
    """Its page is read-only, and CR0.WP set."""
    t = Task(far(SEL), paging=True, more=lambda m: m.protect(OLD, OLD | 5))
    fault = t.faulted(14, 3)
    assert (fault.rip, fault.cr2) == (CODE, OLD + 0x20)


def test_a_page_that_the_monitor_has_not_mapped_yet_lets_the_switch_run_again() -> None:
    """The new task's tables are behind an exit: all that was done so far is undone, and the jump runs once more."""
    exits = []

    def more(machine: Machine) -> None:
        machine.write(0xB008, struct.pack("<Q", descriptor(0, 0xFFFFF, 0x93, 0xC)))
        at = machine.ept_leaves + 0xB * 8
        kept = bytes(machine.ept[at : at + 8])
        machine.ept[at : at + 8] = bytes(8)
        exits.append((at, kept))

    def hook(machine: Machine, reason: int) -> bool:
        if len(exits) == 1:
            at, kept = exits[0]
            exits.append((machine.vcpu.get("rip"), machine.vcpu.get("cr3")))
            assert (access(machine, SEL), access(machine, TSS32)) == (0x89, 0x8B)
            machine.ept[at : at + 8] = kept
            machine.vcpu.set_ept(machine.eptp, 2)
            return True
        return False

    out = run_asm(
        "bt", far(SEL), mode="prot32", setup=build("out 0xf4, al", tss32(ldt=LDT, fs=0xC), more=more), hook=hook
    )
    assert out.exit == "done", out
    assert exits[1] == (CODE, PML4)


def test_real_and_virtual_8086_code_does_not_switch_tasks() -> None:
    out = run_asm("bt", "jmp 0x0:0x7c10; .fill 11, 1, 0x90; mov ax, 7", mode="real16")
    assert (out.exit, out["rax"]) == ("done", 7)


def test_an_interrupt_flag_and_single_step_come_with_the_task() -> None:
    t = Task(far(SEL), "nop; nop; out 0xf4, al", tss32(eflags=IF | TF | 2))
    assert t.faulted(1, 0).rip == TASK + 1
    assert t.dr6 & 0x4000
