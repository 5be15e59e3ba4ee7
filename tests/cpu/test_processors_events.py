"""Self-modifying code, interrupts, HLT, the interrupt shadows and kicks, on every processor."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from asm import assemble
from harness import CODE, DATA, HANDLERS, IF, PAGE_BYTES, PT, STACK, Machine, Outcome, paravirtual, run_asm

from pyhyve.cpu import exits
from pyhyve.cpu.processor import INJECT_EXCEPTION, INJECT_EXTERNAL, INJECT_NMI, INJECT_SOFTWARE

PAGE = 0x50000
OTHER = 0x58000


def done(outcome: Outcome) -> Outcome:
    assert outcome.exit == "done", f"{outcome.exit} {outcome.fault} {outcome.message} rip {outcome['rip']:#x}"
    return outcome


def place(at: int, source: str) -> Callable[[Machine], None]:
    """Put code at a guest-physical address."""

    def setup(machine: Machine) -> None:
        machine.write(at, assemble(source, at, 64))

    return setup


# -- self-modifying code ----------------------------------------------------------------------------------------------

MODES = pytest.mark.parametrize("cpl", [0, 3], ids=["kernel", "user"])


@MODES
def test_a_store_ahead_in_the_same_block_is_executed(engine: str, cpl: int) -> None:
    out = done(run_asm(engine, "mov byte ptr [rip+1f+1], 9; nop; nop; 1: mov eax, 5", cpl=cpl))
    assert out["rax"] == 9


@MODES
def test_a_store_to_the_very_next_instruction(engine: str, cpl: int) -> None:
    out = done(run_asm(engine, "mov word ptr [rip+1f], 0xc3ff; 1: inc eax; inc ecx", {"rbx": 4}, cpl=cpl))
    assert (out["rbx"], out["rax"], out["rcx"]) == (5, 0, 1), "FF C3 is INC EBX"


@MODES
def test_code_that_has_run_is_changed_and_run_again(engine: str, cpl: int) -> None:
    out = done(
        run_asm(
            engine,
            "mov r15d, 10; 1: add rbx, [rip+zero]; 2: add rax, 1; inc byte ptr [rip+2b+3]; dec r15d; jnz 1b;"
            "jmp 3f; zero: .quad 0; 3:",
            cpl=cpl,
        )
    )
    assert out["rax"] == sum(range(1, 11))


@MODES
def test_code_in_another_page_is_changed_by_a_loop(engine: str, cpl: int) -> None:
    source = f"mov r15d, 20; 1: call rbx; inc byte ptr [{PAGE + 1}]; dec r15d; jnz 1b"
    out = done(run_asm(engine, source, {"rbx": PAGE}, cpl=cpl, setup=place(PAGE, "mov ecx, 0; add rax, rcx; ret")))
    assert out["rax"] == sum(range(20))


@MODES
@pytest.mark.parametrize(
    "store",
    [
        "mov byte ptr [rdi], 7", "mov dword ptr [rdi-1], 0x07b9", "mov r10, 7; mov [rdi], r10b",
        "or byte ptr [rdi], 7", "lock add byte ptr [rdi], 7", "push rdi; mov al, 7; stosb; pop rdi; mov eax, 0",
        "bts dword ptr [rdi], 0; bts dword ptr [rdi], 1; bts dword ptr [rdi], 2",
        "mov r11, rsp; lea rsp, [rdi+8]; push 7; mov rsp, r11; mov dword ptr [rdi+4], 0xc3c80148",
        "mov esi, 7; movd xmm0, esi; pextrb [rdi], xmm0, 0",
        "push 7; mov rsi, rsp; mov rdx, rdi; movsb; mov rdi, rdx; pop rsi",
        "mov esi, 7; xchg [rdi], sil", "mov esi, 7; xadd [rdi], sil", "push 7; pop rsi; cmpxchg [rdi], sil",
    ],
)  # fmt: skip
def test_every_kind_of_store_invalidates_code(engine: str, cpl: int, store: str) -> None:
    code = "mov ecx, 0; add rax, rcx; ret; .fill 16, 1, 0x90"
    source = f"call rbx; call rbx; mov eax, 0; {store}; mov eax, 0; call rbx"
    out = done(run_asm(engine, source, {"rbx": PAGE, "rdi": PAGE + 1}, cpl=cpl, setup=place(PAGE, code)))
    assert out["rax"] == 7


@MODES
def test_code_is_changed_through_another_mapping_of_its_page(engine: str, cpl: int) -> None:
    def setup(machine: Machine) -> None:
        place(PAGE, "mov eax, 1; ret")(machine)
        machine.protect(OTHER, PAGE | 7)

    out = done(
        run_asm(
            engine,
            f"call rbx; mov ecx, eax; mov byte ptr [{OTHER + 1}], 2; call rbx",
            {"rbx": PAGE},
            cpl=cpl,
            setup=setup,
        )
    )
    assert (out["rcx"], out["rax"]) == (1, 2)


@MODES
def test_an_instruction_over_a_page_end_is_changed_in_its_second_page(engine: str, cpl: int) -> None:
    at = PAGE + PAGE_BYTES - 3
    source = f"call rbx; mov ecx, eax; mov byte ptr [{PAGE + PAGE_BYTES}], 0x11; call rbx"
    out = done(run_asm(engine, source, {"rbx": at}, cpl=cpl, setup=place(at, "mov eax, 0x1234567; ret")))
    assert (out["rcx"], out["rax"]) == (0x1234567, 0x1114567)


@MODES
def test_data_beside_code_stays_cheap_and_right(engine: str, cpl: int) -> None:
    source = f"mov r15d, 300; 1: inc dword ptr [{PAGE + 0x800}]; call rbx; dec r15d; jnz 1b"
    out = done(
        run_asm(engine, source, {"rbx": PAGE}, {PAGE + 0x800: bytes(4)}, cpl=cpl, setup=place(PAGE, "inc rax; ret"))
    )
    assert out["rax"] == 300
    assert int.from_bytes(out.memory[PAGE + 0x800], "little") == 300


@MODES
def test_code_written_and_run_at_many_places(engine: str, cpl: int) -> None:
    """A small just-in-time compiler: MOV EAX, n; RET at 100 places, each run twice."""
    source = f"""
        mov rdi, {PAGE}; mov r15d, 1
        1: mov byte ptr [rdi], 0xb8; mov [rdi+1], r15d; mov byte ptr [rdi+5], 0xc3
        call rdi; add r10, rax; call rdi; add r10, rax
        add rdi, 40; inc r15d; cmp r15d, 101; jne 1b
    """
    assert done(run_asm(engine, source, cpl=cpl))["r10"] == 2 * 5050


def test_remapping_a_page_changes_the_code_at_its_address(engine: str) -> None:
    def setup(machine: Machine) -> None:
        place(PAGE, "mov eax, 1; ret")(machine)
        place(OTHER, "mov eax, 2; ret")(machine)

    leaf = PT + (PAGE >> 12) * 8
    source = f"""
        call rbx; mov ecx, eax
        mov qword ptr [{leaf}], {OTHER | 7}; invlpg [rbx]; call rbx; mov edx, eax
        mov qword ptr [{leaf}], {PAGE | 7}; mov rsi, cr3; mov cr3, rsi; call rbx
    """
    out = done(run_asm(engine, source, {"rbx": PAGE}, setup=setup))
    assert (out["rcx"], out["rdx"], out["rax"]) == (1, 2, 1)


def test_code_becomes_not_executable(engine: str) -> None:
    leaf = PT + (PAGE >> 12) * 8
    source = f"call rbx; mov rcx, {PAGE | 7 | 1 << 63}; mov [{leaf}], rcx; invlpg [rbx]; call rbx"
    out = run_asm(engine, source, {"rbx": PAGE}, setup=place(PAGE, "mov eax, 1; ret"))
    assert out.fault is not None
    assert (out.fault.vector, out.fault.error, out.fault.rip) == (14, 0x11, PAGE)


def test_the_monitor_changes_code_between_runs(engine: str) -> None:
    with Machine(engine) as m:
        m.load("1: mov eax, 1; out 0x80, al; jmp 1b")
        for value in (1, 2, 3, 4):
            m.write(CODE + 1, bytes([value]))
            m.vcpu.invalidate_code(m.hva + CODE + 1, 1)
            assert m.step() == exits.IO
            assert m.step() == exits.IO
            assert m.io[-1] == (0x80, 1, value)


# -- interrupts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def spinner(engine: str) -> Iterator[Machine]:
    """Interruptible code that counts in R15, with a handler for vector 40H that counts in RAX and at DATA."""
    with Machine(engine) as m:
        m.load("sti; 1: inc r15; mov r10, [0x41000]; cmp r10, 0; jmp 1b")
        m.write(HANDLERS, assemble(f"inc rax; inc dword ptr [{DATA}]; iretq", HANDLERS, 64))
        m.gate(0x40, HANDLERS)
        yield m


def kick_soon(machine: Machine, seconds: float = 0.003) -> None:
    threading.Timer(seconds, machine.vcpu.kick).start()


def test_a_spinning_guest_takes_every_interrupt(spinner: Machine) -> None:
    m = spinner
    kick_soon(m)
    assert m.vcpu.run() == exits.EXTERNAL_INTERRUPT
    for _ in range(50):
        assert m.vcpu.interruptible()
        m.vcpu.inject(0x40, INJECT_EXTERNAL)
        kick_soon(m, 0.001)
        assert m.vcpu.run() == exits.EXTERNAL_INTERRUPT
        while m.vcpu.injection_pending() or not m.vcpu.interruptible():
            kick_soon(m, 0.001)
            m.vcpu.run()
    assert m.vcpu.get("rax") == 50
    assert m.read_int(DATA, 4) == 50
    assert m.vcpu.get("rsp") == STACK
    assert m.vcpu.get("r15") > 50


def test_registers_and_flags_survive_interrupts_anywhere(engine: str) -> None:
    """A checksum over many rounds, interrupted at points that nobody chose."""
    loop = f"""
        mov ecx, {20_000 if paravirtual(engine) else 3_000_000}; sti
        1: add rax, rcx; rol rax, 7; adc r10, rax; xor r11, r10; imul r15, r11, 3; sbb rbx, r15; dec ecx; jnz 1b
        cli
    """
    expected = done(run_asm(engine, loop))
    with Machine(engine) as m:
        m.load(loop + "; out 0xf4, al")
        m.write(HANDLERS, assemble("push rax; xor eax, eax; cmp eax, 1; pop rax; iretq", HANDLERS, 64))
        m.gate(0x40, HANDLERS)
        delivered = 0
        stop = threading.Event()

        def pester() -> None:
            while not stop.wait(0.0003):
                m.vcpu.kick()

        thread = threading.Thread(target=pester)
        thread.start()
        try:
            while (reason := m.vcpu.run()) == exits.EXTERNAL_INTERRUPT:
                if m.vcpu.interruptible():
                    m.vcpu.inject(0x40, INJECT_EXTERNAL)
                    delivered += 1
        finally:
            stop.set()
            thread.join()
        assert reason == exits.IO
        assert delivered > 0
        assert {name: m.vcpu.get(name) for name in ("rax", "rbx", "r10", "r11", "r15")} == {
            name: expected[name] for name in ("rax", "rbx", "r10", "r11", "r15")
        }


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize(
    ("kind", "vector", "error"),
    [
        (INJECT_EXTERNAL, 0x40, None),
        (INJECT_NMI, 2, None),
        (INJECT_EXCEPTION, 13, 0x18),
        (INJECT_EXCEPTION, 6, None),
        (INJECT_SOFTWARE, 0x80, None),
    ],
)
def test_every_kind_of_event_is_injected_before_the_first_instruction(
    engine: str, cpl: int, kind: int, vector: int, error: int | None
) -> None:
    with Machine(engine, cpl=cpl) as m:
        m.load("inc rax; 1: jmp 1b")
        m.vcpu.set("rflags", m.vcpu.get("rflags") | IF)
        m.vcpu.inject(vector, kind, error)
        assert m.vcpu.injection_pending()
        assert m.run() == "fault"
        assert not m.vcpu.injection_pending()
        fault = m.fault()
        assert (fault.vector, fault.rip, m.vcpu.get("rax")) == (vector, CODE, 0)
        if error is not None:
            assert fault.error == error
        assert fault.rflags & IF
        assert not m.vcpu.get("rflags") & IF


def test_sti_holds_interrupts_off_for_one_instruction(whole: str) -> None:
    with Machine(whole) as m:
        m.load("nop; sti; inc rax; inc rax; 1: jmp 1b")
        m.vcpu.request_interrupt_window(True)
        assert m.vcpu.run() == exits.INTERRUPT_WINDOW
        assert (m.vcpu.get("rip"), m.vcpu.get("rax")) == (CODE + 5, 1)
        m.vcpu.request_interrupt_window(False)
        m.vcpu.inject(0x40, INJECT_EXTERNAL)
        assert m.run() == "fault"
        assert m.fault().rip == CODE + 5


def test_sti_does_not_shadow_when_interrupts_were_on(whole: str) -> None:
    with Machine(whole) as m:
        m.load("sti; sti; inc rax; 1: jmp 1b")
        m.vcpu.request_interrupt_window(True)
        assert m.vcpu.run() == exits.INTERRUPT_WINDOW
        assert m.vcpu.get("rip") == CODE + 2


def test_mov_ss_shadows_one_instruction(whole: str) -> None:
    with Machine(whole) as m:
        m.load("mov eax, ss; sti; nop; out 0x80, al; mov ss, ax; out 0x81, al; nop; 1: jmp 1b")
        assert m.step() == exits.IO
        assert m.vcpu.interruptible()
        m.vcpu.request_interrupt_window(True)
        assert m.vcpu.run() == exits.INTERRUPT_WINDOW
        m.vcpu.request_interrupt_window(False)
        assert m.step() == exits.IO
        assert m.io[-1][0] == 0x81


def test_cli_closes_and_popf_opens_the_window(whole: str) -> None:
    with Machine(whole) as m:
        m.load("sti; nop; cli; out 0x80, al; push 0x202; popfq; inc rax; 1: jmp 1b")
        assert m.step() == exits.IO
        assert not m.vcpu.interruptible()
        m.vcpu.request_interrupt_window(True)
        assert m.vcpu.run() == exits.INTERRUPT_WINDOW
        assert (m.vcpu.get("rip"), m.vcpu.get("rax")) == (CODE + 11, 0)


def test_iret_opens_the_window(engine: str) -> None:
    with Machine(engine) as m:
        m.load(
            "mov eax, ss; push rax; push rsp; pushfq; or qword ptr [rsp], 0x200; push 8; lea rbx, [rip+1f];"
            "push rbx; iretq; 1: jmp 1b"
        )
        m.vcpu.request_interrupt_window(True)
        assert m.vcpu.run() == exits.INTERRUPT_WINDOW
        assert m.read(m.vcpu.get("rip"), 2) == b"\xeb\xfe"


def test_hlt_exits_behind_itself_and_an_interrupt_goes_on(engine: str) -> None:
    with Machine(engine) as m:
        m.load("sti; hlt; inc r15; hlt")
        m.write(HANDLERS, assemble("inc rax; iretq", HANDLERS, 64))
        m.gate(0x40, HANDLERS)
        assert m.vcpu.run() == exits.HLT
        assert m.vcpu.get("rip") == CODE + 2
        assert m.vcpu.interruptible(), "HLT ends the shadow of STI"
        m.vcpu.inject(0x40, INJECT_EXTERNAL)
        assert m.vcpu.run() == exits.HLT
        assert (m.vcpu.get("rax"), m.vcpu.get("r15"), m.vcpu.get("rip")) == (1, 1, CODE + 6)


def test_hlt_with_interrupts_off_exits_too(engine: str) -> None:
    with Machine(engine) as m:
        m.load("cli; hlt")
        assert m.vcpu.run() == exits.HLT
        assert not m.vcpu.interruptible()


def test_a_handler_may_be_interrupted_by_another(engine: str) -> None:
    with Machine(engine) as m:
        m.load("sti; nop; out 0x80, al; 1: jmp 1b")
        m.write(HANDLERS, assemble(f"sti; nop; out 0x81, al; mov rax, [{DATA}]; iretq", HANDLERS, 64))
        m.write(HANDLERS + 0x100, assemble(f"mov qword ptr [{DATA}], 5; out 0x82, al; iretq", HANDLERS + 0x100, 64))
        m.gate(0x40, HANDLERS)
        m.gate(0x41, HANDLERS + 0x100)
        order = []
        for vector in (0x40, 0x41, None):
            assert m.step() == exits.IO
            order.append(m.io[-1][0])
            if vector is not None:
                m.vcpu.inject(vector, INJECT_EXTERNAL)
        kick_soon(m)
        assert m.vcpu.run() == exits.EXTERNAL_INTERRUPT
        assert order == [0x80, 0x81, 0x82]
        assert m.vcpu.get("rax") == 5
        assert m.vcpu.get("rsp") == STACK


def test_an_interrupted_string_operation_goes_on(engine: str) -> None:
    with Machine(engine) as m:
        rounds = 1 if paravirtual(engine) else 300
        m.load(f"mov r8, rsi; mov r9, rdi; mov r10, rcx; mov r15d, {rounds}; sti;"
               "1: mov rsi, r8; mov rdi, r9; mov rcx, r10; rep movsb; dec r15d; jnz 1b; cli; out 0xf4, al")  # fmt: skip
        m.write(HANDLERS, assemble("inc rax; iretq", HANDLERS, 64))
        m.gate(0x40, HANDLERS)
        size = 0x10_0000
        m.write(0x20_0000, bytes(range(256)) * (size // 256))
        for name, value in (("rsi", 0x20_0000), ("rdi", 0x40_0000), ("rcx", size)):
            m.vcpu.set(name, value)
        m.vcpu.set("rflags", 2 | IF)
        injected = 0
        timer: threading.Timer | None = None
        while True:
            timer = threading.Timer(0.0005, m.vcpu.kick)
            timer.start()
            reason = m.vcpu.run()
            timer.cancel()
            timer.join()
            if reason != exits.EXTERNAL_INTERRUPT:
                break
            if m.vcpu.interruptible() and injected < 20:
                m.vcpu.inject(0x40, INJECT_EXTERNAL)
                injected += 1
        assert reason == exits.IO
        assert m.read(0x40_0000, size) == m.read(0x20_0000, size)
        assert m.vcpu.get("rax") == injected > 0
        assert m.vcpu.get("rcx") == 0


# -- kicks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "1: jmp 1b",
        "1: inc rax; jmp 1b",
        "1: call 2f; jmp 1b; 2: ret",
        "1: mov ecx, 100; 2: loop 2b; jmp 1b",
        "1: lea rbx, [rip+1b]; jmp rbx",
        "1: stc; adc rax, [0x40000]; jmp 1b",
        "1: mov ecx, 0x10000; mov rdi, 0x200000; rep stosb; jmp 1b",
    ],
)
@MODES
def test_a_kick_stops_any_loop_soon(engine: str, cpl: int, source: str) -> None:
    with Machine(engine, cpl=cpl) as m:
        m.load(source)
        for _ in range(3):
            kicked: list[float] = []

            def kick(to: list[float] = kicked) -> None:
                time.sleep(0.005)
                to.append(time.monotonic())
                m.vcpu.kick()

            thread = threading.Thread(target=kick)
            thread.start()
            assert m.vcpu.run() == exits.EXTERNAL_INTERRUPT
            late = time.monotonic() - kicked[0]
            thread.join()
            assert late < 0.1


def test_a_kick_before_run_is_kept_and_counts_once(engine: str) -> None:
    with Machine(engine) as m:
        m.load("inc rax; hlt")
        m.vcpu.kick()
        m.vcpu.kick()
        assert m.vcpu.run() == exits.EXTERNAL_INTERRUPT
        assert m.vcpu.run() == exits.HLT
        assert m.vcpu.get("rax") == 1


def test_a_kick_does_not_disturb_a_pending_event(engine: str) -> None:
    with Machine(engine) as m:
        m.load("1: jmp 1b")
        m.vcpu.set("rflags", 2 | IF)
        m.vcpu.inject(0x40, INJECT_EXTERNAL)
        m.vcpu.kick()
        assert m.vcpu.run() == exits.EXTERNAL_INTERRUPT
        assert m.run() == "fault"
        assert m.fault().vector == 0x40
