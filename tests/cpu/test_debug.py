"""Debug registers, single steps and the shadows, and what the monitor watches, on the software processor.

Source: Intel SDM vol 3, "Debug, Branch Profile, TSC, and Intel RDT Features" (its chapters on debug registers and debug
exceptions) and "Masking Exceptions and Interrupts When Switching Stacks". KVM, where ring 0 is emulated, has no debug
registers to compare with.
"""

from collections.abc import Mapping
from typing import Final

import pytest
from asm import MISSING
from harness import CODE, DATA, PAGE_BYTES, RF, STACK, TF, Machine, Mode, Outcome, engine_called, host_flags, run_asm

from pyhyve.cpu import exits

pytestmark = [
    pytest.mark.skipif(isinstance(engine_called("bt"), str), reason="the bt engine is not built"),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]

EXEC, WRITE, PORT, ACCESS = 0, 1, 2, 3
LENGTH: Final = {1: 0, 2: 1, 4: 3, 8: 2}
LOG: Final = 0x48000
"""Where the handler of #DB leaves, for each one: RIP, RFLAGS, DR6."""
BS, BD = 1 << 14, 1 << 13


def dr7(*watches: tuple[int, int]) -> int:
    """The first registers enabled globally: (kind, length) of each."""
    value = 0x400
    for n, (kind, length) in enumerate(watches):
        value |= 2 << 2 * n | (kind | LENGTH[length] << 2) << 16 + 4 * n
    return value


LOGGER: Final = f"""
    push rax; push rbx; mov rbx, [{LOG}]
    mov rax, [rsp+16]; mov [rbx+{LOG + 8}], rax
    mov rax, [rsp+32]; mov [rbx+{LOG + 16}], rax
    mov rax, dr6; mov [rbx+{LOG + 24}], rax
    add rbx, 24; mov [{LOG}], rbx
    or dword ptr [rsp+32], {RF}
    pop rbx; pop rax; iretq
"""


class Log:
    def __init__(self, out: Outcome) -> None:
        self.out = out
        assert out.exit == "done", f"{out.exit} {out.fault} {out.message} rip {out['rip']:#x}"
        image = out.memory[LOG]
        words = [int.from_bytes(image[n : n + 8], "little") for n in range(0, len(image), 8)]
        self.rips = [words[1 + 3 * n] - CODE for n in range(words[0] // 24)]
        self.flags = [words[2 + 3 * n] for n in range(words[0] // 24)]
        self.dr6 = [words[3 + 3 * n] for n in range(words[0] // 24)]

    @property
    def hits(self) -> list[tuple[int, int]]:
        """(offset of RIP, bits of DR6 that are not always one)"""
        return [(rip, dr6 & 0xE00F) for rip, dr6 in zip(self.rips, self.dr6, strict=True)]


def log(
    source: str,
    regs: Mapping[str, int] | None = None,
    cpl: int = 0,
    handler: str = LOGGER,
    mode: Mode = "long64",
    handlers: Mapping[int, str] | None = None,
    cr4: int = 0,
    paging: bool | None = None,
) -> Log:
    def setup(machine: Machine) -> None:
        machine.vcpu.set("cr4", machine.vcpu.get("cr4") | cr4)

    return Log(
        run_asm("bt", source, regs, {LOG: bytes(24 * 40)}, mode, cpl, handlers={1: handler, **(handlers or {})},
                setup=setup, paging=paging)
    )  # fmt: skip


def watch(address: int, kind: int, length: int = 1) -> dict[str, int]:
    return {"dr0": address, "dr7": dr7((kind, length))}


# -- data breakpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize(
    ("access", "kind", "hit"),
    [
        ("mov [rdi], al", WRITE, True), ("mov [rdi+3], al", WRITE, True), ("mov [rdi+4], al", WRITE, False),
        ("mov [rdi-1], al", WRITE, False), ("mov [rdi-1], ax", WRITE, True), ("mov [rdi-4], rax", WRITE, True),
        ("mov al, [rdi]", WRITE, False), ("mov al, [rdi]", ACCESS, True), ("mov [rdi], al", ACCESS, True),
        ("add [rdi], al", WRITE, True), ("cmp [rdi], al", WRITE, False), ("cmp [rdi], al", ACCESS, True),
        ("lock xadd [rdi], eax", WRITE, True), ("movups [rdi-8], xmm0", WRITE, True),
        ("movups xmm0, [rdi-8]", ACCESS, True),
        ("push [rdi]", ACCESS, True), ("pop [rdi]", WRITE, True), ("movsb", WRITE, True), ("lodsb", ACCESS, False),
        ("stosb", WRITE, True), ("bts dword ptr [rdi], 3", WRITE, True), ("movsx eax, word ptr [rdi+2]", ACCESS, True),
        ("xchg rsp, rdi; push rax; xchg rsp, rdi", WRITE, False), ("fild dword ptr [rdi]", ACCESS, True),
        ("mov rbx, rdi; xlatb", ACCESS, True),
    ],
)  # fmt: skip
def test_data_breakpoints(access: str, kind: int, hit: bool, cpl: int) -> None:
    """Four bytes are watched; the trap comes behind the instruction."""
    source = (
        f"mov edi, {DATA + 0x104}; mov esi, {DATA + 0x200}; push rax; xor eax, eax; xor ecx, ecx; 1: {access}; 2: nop"
    )
    got = log(source, watch(DATA + 0x104, kind, 4), cpl)
    assert [dr6 for _, dr6 in got.hits] == ([1] if hit else [])
    if hit:
        again = log(source + "; lea r15, [rip + 2b]", watch(DATA + 0x104, kind, 4), cpl)
        assert again.rips == [again.out["r15"] - CODE]
        assert not again.flags[0] & RF, "a trap"


@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_lengths_and_alignment(length: int) -> None:
    """The low bits of the address do not count."""
    at = DATA + 0x100
    source = "; ".join(f"mov byte ptr [{at - 1 + n}], 0" for n in range(12))
    got = log(source, watch(at + length - 1, WRITE, length))
    assert got.rips == [8 * (n + 1) for n in range(1, 1 + length)]


def test_several_registers_hit_at_once() -> None:
    regs = {"dr0": DATA, "dr1": DATA + 4, "dr2": DATA + 8, "dr3": DATA + 4}
    got = log(f"mov qword ptr [{DATA}], 0", regs | {"dr7": dr7((WRITE, 4), (WRITE, 4), (WRITE, 4), (ACCESS, 1))})
    assert [dr6 for _, dr6 in got.hits] == [0b1011]


def test_a_condition_that_is_met_is_reported_though_not_enabled() -> None:
    regs = {"dr0": DATA, "dr1": DATA, "dr7": dr7((WRITE, 4), (WRITE, 4)) & ~8}
    assert [dr6 for _, dr6 in log(f"mov qword ptr [{DATA}], 0", regs).hits] == [0b11]
    regs["dr7"] = 0x400 | regs["dr7"] & ~0xFF
    assert log(f"mov qword ptr [{DATA}], 0", regs).hits == []


def test_an_access_over_a_page_end() -> None:
    at = DATA + PAGE_BYTES
    for watched, kind in ((at - 1, WRITE), (at, WRITE), (at + 2, ACCESS)):
        assert len(log(f"mov dword ptr [{at - 1}], 0", watch(watched, kind)).hits) == 1
        assert len(log(f"mov eax, [{at - 1}]", watch(watched, ACCESS)).hits) == 1


def test_loops_beside_a_watched_byte_run_and_only_it_hits() -> None:
    source = f"""
        mov ecx, 200; mov edi, {DATA}
        1: inc dword ptr [rdi+8]; add [rdi+16], rcx; push rcx; pop rax; dec ecx; jnz 1b
        mov byte ptr [rdi], 1
    """
    got = log(source, watch(DATA, WRITE))
    assert [dr6 for _, dr6 in got.hits] == [1]


def test_groups_of_accesses_stop_at_the_right_one() -> None:
    """Pushes, and accesses off one register, share a check: the trap is behind the one that hit."""
    source = "push rax; push rbx; push rcx; push rdx"
    assert log(source, watch(STACK - 24, WRITE, 8)).rips == [3]
    source = f"mov edi, {DATA}; mov [rdi], rax; mov [rdi+8], rax; mov [rdi+16], rax; mov [rdi+24], rax; nop"
    assert log(source, watch(DATA + 16, WRITE, 8)).rips == [5 + 3 + 4 + 4]


def test_a_watched_page_that_was_used_before() -> None:
    source = f"""
        mov byte ptr [{DATA}], 1; mov eax, {DATA}; mov dr0, rax; mov eax, {dr7((WRITE, 1))}; mov dr7, rax
        mov byte ptr [{DATA}], 2; xor eax, eax; mov dr7, rax; mov byte ptr [{DATA}], 3
    """
    assert len(log(source).hits) == 1


def test_rep_stops_behind_the_iteration_that_hits() -> None:
    source = f"mov edi, {DATA}; mov ecx, 64; rep stosb; mov eax, 7"
    got = log(source, watch(DATA + 5, WRITE), handler=f"mov [{LOG + 0x200}], rcx; {LOGGER}")
    assert got.rips == [10], "RIP is still at the string instruction"
    assert got.flags[0] & RF
    assert int.from_bytes(got.out.memory[LOG][0x200:0x208], "little") == 58
    got = log(source, watch(DATA + 63, WRITE))
    assert got.rips == [12]
    got = log(f"mov esi, {DATA}; mov edi, {DATA + 0x100}; mov ecx, 8; rep movsq; nop", watch(DATA + 0x118, WRITE, 8))
    assert got.rips == [15]


def test_a_faulting_instruction_does_not_hit() -> None:
    """POP to a bad address has read the watched stack."""
    got = log("push 1; xor eax, eax; mov ebx, eax; bts rbx, 50; 1: pop qword ptr [rbx+0x1000000]; nop",
              watch(STACK - 8, ACCESS, 8), handlers={13: "add qword ptr [rsp+8], 6; add rsp, 8; iretq"})  # fmt: skip
    assert [rip for rip, _ in got.hits] == [2], "only the PUSH"


def test_data_breakpoints_in_real_and_32_bit_mode() -> None:
    for mode in ("real16", "prot32"):
        out = run_asm("bt", "mov ax, 1; mov ds:[0x5000], ax; mov bx, 2", watch(0x5000, WRITE, 2), mode=mode)
        assert out.fault is not None
        assert out.fault.vector == 1
        assert out["rbx"] == 0


def test_descriptor_tables_are_data_too() -> None:
    got = log("mov ax, 0x23; mov ds, ax; nop", watch(0x6020, ACCESS, 8))
    assert got.rips == [6]


# -- instruction breakpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpl", [0, 3])
def test_instruction_breakpoints_come_before_the_instruction(cpl: int) -> None:
    got = log("nop; nop; inc r15; nop", watch(CODE + 2, EXEC), cpl, "nop; " + LOGGER)
    assert got.hits == [(2, 1)]
    assert got.out["r15"] == 1, "RF lets it run"
    assert not got.flags[0] & RF


def test_without_rf_the_breakpoint_hits_again() -> None:
    handler = LOGGER.replace(f"or dword ptr [rsp+32], {RF}", f"cmp qword ptr [{LOG}], 72; jb 1f; mov dr7, rsi; 1:")
    got = log("nop; inc r15", {"rsi": 0x400, **watch(CODE + 1, EXEC)}, handler=handler)
    assert got.hits == [(1, 1)] * 3


def test_a_breakpoint_in_a_loop_hits_every_time() -> None:
    got = log("mov ecx, 5; 1: add eax, 2; add ebx, 3; loop 1b", watch(CODE + 8, EXEC))
    assert got.hits == [(8, 1)] * 5
    assert got.out["rbx"] == 15
    got = log("mov ecx, 5; 1: add eax, 2; add ebx, 3; loop 1b", watch(CODE + 5, EXEC))
    assert got.hits == [(5, 1)] * 5, "where the loop begins"
    got = log("mov ecx, 5; 1: add eax, 2; add ebx, 3; loop 1b", watch(CODE + 6, EXEC))
    assert got.hits == [], "not at an instruction's first byte"


def test_a_breakpoint_where_a_call_goes() -> None:
    got = log("call 1f; call 1f; lea rax, [rip+1f]; call rax; jmp 2f; 1: inc rbx; ret; 2:", watch(CODE + 21, EXEC))
    assert got.hits == [(21, 1)] * 3
    assert got.out["rbx"] == 3


def test_a_breakpoint_set_and_cleared_while_the_code_is_translated() -> None:
    source = f"""
        mov r12d, {dr7((EXEC, 1))}; mov r13d, 0x400
        lea rax, [rip+5f]; mov dr0, rax
        call 4f; mov dr7, r12; call 4f; mov dr7, r13; call 4f; mov dr7, r12; call 4f
        lea rax, [rip+6f]; mov dr0, rax; call 4f; jmp 7f
        4: nop; 5: inc rbx; 6: inc rcx; ret; 7: lea r14, [rip+5b]; lea r15, [rip+6b]
    """
    got = log(source)
    assert (got.out["rbx"], got.out["rcx"]) == (5, 5)
    assert [rip + CODE for rip in got.rips] == [got.out["r14"]] * 2 + [got.out["r15"]]


def test_faults_set_rf_in_their_image_so_that_no_breakpoint_hits_again() -> None:
    """#UD at a breakpoint, whose handler returns to it after the cure."""
    got = log("nop; 1: ud2; nop", watch(CODE + 1, EXEC),
              handlers={6: f"mov rax, [rsp+16]; mov word ptr [{CODE + 1}], 0x9090; iretq"})  # fmt: skip
    assert got.hits == [(1, 1)]
    assert got.out["rax"] & RF


def test_instruction_breakpoints_in_other_modes_are_linear() -> None:
    out = run_asm("bt", "mov ax, 0x700; mov bx, 0xc09; push ax; push bx; retf; inc cx; inc cx", watch(0x7C0A, EXEC),
                  mode="real16")  # fmt: skip
    assert out.fault is not None
    assert (out.fault.vector, out.fault.cs, out.fault.rip, out["rcx"]) == (1, 0x700, 0xC0A, 1)
    out = run_asm("bt", "nop; inc ecx; nop", watch(CODE + 1, EXEC), mode="prot32", cpl=3)
    assert out.fault is not None
    assert (out.fault.vector, out.fault.rip, out["rcx"]) == (1, CODE + 1, 0)


# -- ports ------------------------------------------------------------------------------------------------------------


def test_io_breakpoints_need_cr4_de() -> None:
    source = "out 0x80, al; in al, 0x82; out 0x83, eax; mov dx, 0x81; out dx, al; nop"
    regs = watch(0x82, PORT, 2)
    assert log(source, regs).hits == []
    assert log(source, regs, cr4=8).hits == [(4, 1), (6, 1)]
    assert log("out 0x7f, eax; nop", regs, cr4=8).hits == [(2, 1)]


# -- DR7.GD, INT1 -----------------------------------------------------------------------------------------------------


def test_general_detect_is_a_fault_and_clears_itself() -> None:
    got = log("xor eax, eax; mov dr0, rax; mov rbx, dr7", {"dr7": 0x2400})
    assert got.hits == [(2, BD)]
    assert got.flags[0] & RF
    assert got.out["rbx"] == 0x400


def test_int1_is_a_trap_and_leaves_dr6() -> None:
    got = log(".byte 0xf1; nop", {"dr6": 0xFFFF_0FF0 | 2})
    assert got.hits == [(1, 2)]
    assert not got.flags[0] & RF


def test_dr4_and_dr5_are_aliases_without_de() -> None:
    source = ".byte 0x0f, 0x21, 0xe0; mov rbx, rax; .byte 0x0f, 0x21, 0xe8"
    out = run_asm("bt", source, {"dr7": 0x400})
    assert (out["rbx"], out["rax"]) == (0xFFFF_0FF0, 0x400)
    out = run_asm("bt", source, setup=lambda m: m.vcpu.set("cr4", m.vcpu.get("cr4") | 8))
    assert out.fault is not None
    assert out.fault.vector == 6


# -- single steps -----------------------------------------------------------------------------------------------------

STEP: Final = f"pushfq; or qword ptr [rsp], {TF}; popfq; "
STEP_BYTES: Final = 10


def steps(source: str, regs: Mapping[str, int] | None = None, handlers: Mapping[int, str] | None = None) -> list[int]:
    """Where the steps stop, from the code's start; the last is behind what clears TF."""
    off = f"; pushfq; and qword ptr [rsp], {~TF}; popfq"
    got = log(STEP + source + off, regs, handlers=handlers)
    assert all(dr6 & ~BS == 0 for _, dr6 in got.hits)
    return [rip - STEP_BYTES for rip in got.rips][:-3]


def test_each_instruction_is_a_step() -> None:
    assert steps("nop; inc rax; mov [rsp-8], rax") == [1, 4, 9]


def test_each_iteration_of_a_string_instruction_is_a_step() -> None:
    assert steps(f"mov edi, {DATA}; mov ecx, 3; rep stosb; nop") == [5, 10, 10, 10, 12, 13]
    assert steps(f"mov esi, {DATA}; mov ecx, 2; rep lodsb") == [5, 10, 10, 12]
    assert steps("xor ecx, ecx; rep movsb; nop") == [2, 4, 5]


def test_mov_ss_and_pop_ss_hold_a_step_back() -> None:
    assert steps("mov eax, ss; mov ss, eax; nop; nop") == [2, 5, 6]
    assert steps("mov eax, ds; mov ds, eax; nop; nop") == [2, 4, 5, 6]


def test_sti_does_not_hold_a_step_back() -> None:
    assert steps("sti; nop; nop") == [1, 2, 3]


def test_int_is_not_stepped_into() -> None:
    """TF is saved, and the step comes behind the IRET that restores it and one more instruction."""
    assert steps("int 0x40; nop; nop", handlers={0x40: "nop; nop; iretq"}) == [3, 4]
    assert steps("int3; nop; nop", handlers={3: "nop; iretq"}) == [2, 3]


def test_a_fault_is_not_stepped_into() -> None:
    assert steps("ud2; nop", handlers={6: "add qword ptr [rsp], 2; iretq"}) == [3]


def test_ports_and_hlt_are_steps() -> None:
    assert steps("out 0x80, al; in al, 0x81; nop") == [2, 4, 5]
    assert steps("hlt; nop") == [1, 2]


def test_instructions_that_the_monitor_finishes_are_steps() -> None:
    assert steps("mov rax, cr8; mov cr8, rax; cpuid; nop") == [4, 8, 10, 11]


@pytest.mark.parametrize(("mask", "stepped"), [(TF, False), (0, True)])
def test_syscall_is_stepped_into_unless_it_clears_tf(mask: int, stepped: bool) -> None:
    entry = 0x38000
    with Machine("bt", cpl=3) as m:
        m.load(STEP + "syscall; nop; mov rbx, cr2")
        m.vcpu.set("star", 0x08 << 32 | 0x1B << 48)
        m.vcpu.set("lstar", entry)
        m.vcpu.set("sfmask", mask)
        m.write(entry, b"\x48\x0f\x07")  # SYSRETQ
        assert m.run() == "fault"
        fault = m.fault()
        assert fault.vector == 1
        # with the mask, R11 gives TF back and the step is behind SYSRET
        assert fault.rip == (entry if stepped else CODE + STEP_BYTES + 2)


def test_a_breakpoint_and_a_step_are_one_exception() -> None:
    off = f"; pushfq; and qword ptr [rsp], {~TF}; popfq"
    got = log(STEP + f"mov byte ptr [{DATA}], 1; nop" + off, watch(DATA, WRITE))
    assert (STEP_BYTES + 8, BS | 1) in got.hits


def test_a_breakpoint_on_mov_ss_waits_for_the_next_instruction() -> None:
    source = f"mov word ptr [{DATA}], ss; mov ss, word ptr [{DATA}]; inc ebx; nop"
    got = log(source, watch(DATA, ACCESS, 2))
    assert got.rips == [7, 7 + 7 + 2]


def test_a_breakpoint_on_mov_ss_before_int_hits_in_the_handler() -> None:
    source = f"mov word ptr [{DATA}], ss; mov ss, word ptr [{DATA}]; int 0x40; nop"
    got = log(source, watch(DATA, ACCESS, 2), handlers={0x40: "nop; iretq"})
    assert len(got.hits) == 2
    assert got.rips[1] + CODE == 0x30000 + 0x40 * 0x100


def test_a_breakpoint_on_mov_ss_before_int1_comes_with_it() -> None:
    source = f"mov word ptr [{DATA}], ss; mov ss, word ptr [{DATA}]; .byte 0xf1; nop"
    assert log(source, watch(DATA, ACCESS, 2)).hits == [(7, 1), (15, 1)]


def test_a_step_that_mov_ss_suppressed_does_not_come_later() -> None:
    assert steps("mov eax, ss; mov ss, eax; .byte 0xf1; nop") == [2, 5, 6]


def test_an_instruction_breakpoint_behind_mov_ss_is_lost_on_intel() -> None:
    kept = [(4, 1)] if "AuthenticAMD" in host_flags() else []
    assert log("mov eax, ss; mov ss, eax; inc ebx; nop", watch(CODE + 4, EXEC)).hits == kept
    assert log("mov eax, ss; mov ss, eax; inc ebx; nop", watch(CODE + 6, EXEC)).hits == [(6, 1)]


# -- the monitor's ----------------------------------------------------------------------------------------------------


def test_the_monitor_watches_data() -> None:
    with Machine("bt") as m:
        m.load(f"mov byte ptr [{DATA}], 1; mov eax, [{DATA + 0x1010}]; mov [{DATA + 0x1010}], eax; hlt")
        m.vcpu.set_watches([(DATA + 0x1000, DATA + 0x1FFF, 1), (DATA, DATA, 3)])  # type: ignore[attr-defined]
        assert m.step() == exits.MONITOR_TRAP
        assert (m.vcpu.exit.qualification, m.vcpu.get("rip")) == (2, CODE + 8)
        assert m.step() == exits.MONITOR_TRAP
        assert (m.vcpu.exit.qualification, m.vcpu.get("rip")) == (1, CODE + 8 + 7 + 7)
        m.vcpu.set_watches([])  # type: ignore[attr-defined]
        assert m.step() == exits.HLT


def test_the_monitor_watches_instructions() -> None:
    with Machine("bt") as m:
        m.load("1: inc rax; inc rbx; jmp 1b")
        m.vcpu.set_watches([(CODE + 3, CODE + 3, 4)])  # type: ignore[attr-defined]
        for count in range(1, 5):
            assert m.step() == exits.MONITOR_TRAP
            assert (m.vcpu.get("rip"), m.vcpu.get("rax"), m.vcpu.get("rbx")) == (CODE + 3, count, count - 1)
            assert (m.vcpu.exit.qualification, m.vcpu.exit.gla) == (1, CODE + 3)


def test_the_monitor_and_the_guest_watch_the_same() -> None:
    seen = []

    def hook(machine: Machine, reason: int) -> bool:
        if reason == exits.MONITOR_TRAP:
            seen.append(machine.vcpu.get("rip") - CODE)
            return True
        return False

    def setup(machine: Machine) -> None:
        machine.vcpu.set_watches([(DATA, DATA, 1), (CODE + 9, CODE + 9, 4)])  # type: ignore[attr-defined]

    regs = {"dr0": DATA, "dr1": CODE + 9, "dr7": dr7((WRITE, 1), (EXEC, 1))}
    source = f"mov byte ptr [{DATA}], 1; nop; inc ebx; nop"
    out = run_asm("bt", source, regs, {LOG: bytes(960)}, handlers={1: LOGGER}, hook=hook, setup=setup)
    assert seen == [8, 9, 9], "once more when the guest's handler goes back to it"
    assert Log(out).hits == [(8, 1), (9, 2)]


def test_the_monitor_steps() -> None:
    with Machine("bt") as m:
        m.load("nop; inc rax; push rax; 1: jmp 1b")
        m.vcpu.single_step(True)  # type: ignore[attr-defined]
        stops = []
        for _ in range(5):
            assert m.step() == exits.MONITOR_TRAP
            stops.append(m.vcpu.get("rip") - CODE)
        assert stops == [1, 4, 5, 5, 5]
        m.vcpu.single_step(False)  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="cannot be watched"):
            m.vcpu.set_watches([(5, 4, 1)])  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="at most 16"):
            m.vcpu.set_watches([(0, 0, 1)] * 17)  # type: ignore[attr-defined]
