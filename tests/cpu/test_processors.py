"""Unprivileged instructions of 64-bit mode, on every processor, with the results that the manuals give.

test_against_host.py compares many more with the host; here each behaviour has a name. Source: Intel SDM vol 2.
"""

import struct
from collections.abc import Callable

import pytest
from harness import AF, CF, DATA, DF, OF, PF, SF, STACK, ZF, Outcome, Runner

M = (1 << 64) - 1


def ended(outcome: Outcome) -> Outcome:
    assert outcome.exit == "done", f"{outcome.exit} {outcome.fault} {outcome.message}"
    return outcome


# -- arithmetic and flags ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "a", "b", "carry", "result", "flags"),
    [
        ("add", 1, 2, 0, 3, PF),
        ("add", M, 1, 0, 0, CF | ZF | AF | PF),
        ("add", (1 << 63) - 1, 1, 0, 1 << 63, OF | SF | AF | PF),
        ("adc", M, 0, 1, 0, CF | ZF | AF | PF),
        ("adc", 5, 6, 1, 12, PF),
        ("sub", 0, 1, 0, M, CF | SF | AF | PF),
        ("sub", 1 << 63, 1, 0, (1 << 63) - 1, OF | AF | PF),
        ("sbb", 0, 0, 1, M, CF | SF | AF | PF),
        ("sbb", 7, 7, 0, 0, ZF | PF),
        ("cmp", 3, 3, 0, 3, ZF | PF),
        ("cmp", 3, 4, 0, 3, CF | SF | AF | PF),
        ("and", 0xF0F0, 0x0FF0, 1, 0x00F0, PF),
        ("or", 1 << 63, 1, 1, 1 << 63 | 1, SF),
        ("xor", 0xFF, 0xFF, 1, 0, ZF | PF),
        ("test", 1 << 63, M, 1, 1 << 63, SF | PF),
    ],
)
@pytest.mark.parametrize(("x", "y"), [("rax", "rbx"), ("r10", "r11"), ("r15", "rcx"), ("rdx", "r15")])
def test_alu_results_and_flags(
    run: Runner, x: str, y: str, op: str, a: int, b: int, carry: int, result: int, flags: int
) -> None:
    out = ended(run(f"{'stc' if carry else 'clc'}; {op} {x}, {y}", {x: a, y: b}))
    assert out[x] == result
    assert out.flags & ~AF == flags & ~AF
    if op not in ("and", "or", "xor", "test"):
        assert out.flags & AF == flags & AF


@pytest.mark.parametrize(
    ("instruction", "result"),
    [
        ("add eax, 1", 0x0000_0000_DDDD_DDDE),
        ("add ax, 0x3333", 0xAAAA_BBBB_DDDD_1110),
        ("add al, 0x33", 0xAAAA_BBBB_DDDD_DD10),
        ("add ah, 0x33", 0xAAAA_BBBB_DDDD_10DD),
        ("mov eax, eax", 0x0000_0000_DDDD_DDDD),
        ("mov ah, al", 0xAAAA_BBBB_DDDD_DDDD),
        ("mov al, ch", 0xAAAA_BBBB_DDDD_DD77),
        ("xchg ah, cl", 0xAAAA_BBBB_DDDD_88DD),
        ("cwde", 0x0000_0000_FFFF_DDDD),
        ("cdqe", 0xFFFF_FFFF_DDDD_DDDD),
        ("cbw", 0xAAAA_BBBB_DDDD_FFDD),
        ("movzx eax, ch", 0x77),
        ("movsx rax, cx", 0x7788),
        ("movsxd rax, ebx", 0xFFFF_FFFF_8000_0000),
        ("bswap eax", 0x0000_0000_DDDD_DDDD),
        ("not eax", 0x0000_0000_2222_2222),
        ("neg al", 0xAAAA_BBBB_DDDD_DD23),
    ],
)
def test_width_decides_what_of_the_register_changes(run: Runner, instruction: str, result: int) -> None:
    out = ended(run(instruction, {"rax": 0xAAAA_BBBB_DDDD_DDDD, "rcx": 0x7788, "rbx": 0x8000_0000}))
    assert out["rax"] == result


@pytest.mark.parametrize("name", ["r10", "r11", "r15", "r8"])
def test_32_bit_results_zero_extend_the_special_registers(run: Runner, name: str) -> None:
    out = ended(run(f"mov {name}d, {name}d; mov rax, {name}; inc {name}w; inc {name}b", {name: M}))
    assert out["rax"] == 0xFFFF_FFFF
    assert out[name] == 0xFFFF_0001


def test_inc_and_dec_keep_carry(run: Runner) -> None:
    out = ended(run("stc; inc rax; setc bl; dec rcx; setc dl", {"rax": M, "rcx": 0}))
    assert (out["rax"], out["rcx"], out["rbx"], out["rdx"]) == (0, M, 1, 1)


# -- shifts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "value", "result", "carry"),
    [
        ("shl rax, 1", 1 << 63, 0, 1),
        ("shl eax, 4", 0xFFFF_FFFF_1234_5678, 0x2345_6780, 1),
        ("shr rax, 63", M, 1, 1),
        ("sar rax, 63", 1 << 63, M, 0),
        ("sar al, 7", 0x80, 0xFF, 0),
        ("rol ax, 4", 0x1234, 0x2341, 1),
        ("ror rax, 8", 0xFF, 0xFF << 56, 1),
        ("stc; rcl al, 1", 0x80, 0x01, 1),
        ("stc; rcr rax, 1", 0, 1 << 63, 0),
        ("stc; rcl ax, 17", 0xABCD, 0xABCD, 1),
        ("mov cl, 65; shl rax, cl", 1, 2, 0),
        ("mov cl, 33; shl eax, cl", 1, 2, 0),
        ("mov cl, 9; rol al, cl", 0x81, 0x03, 1),
        ("mov ebx, 0xF0000000; shld eax, ebx, 4", 0x1234_5678, 0x2345_678F, 1),
        ("mov rbx, 0xF; shrd rax, rbx, 4", 0x10, 0xF << 60 | 1, 0),
    ],
)
def test_shift_and_rotate(run: Runner, source: str, value: int, result: int, carry: int) -> None:
    out = ended(run(source, {"rax": value}))
    assert (out["rax"], out.flags & CF) == (result, carry)


@pytest.mark.parametrize("op", ["shl", "shr", "sar", "rol", "ror", "rcl", "rcr"])
@pytest.mark.parametrize("name", ["rax", "r10", "r15"])
def test_a_count_of_zero_changes_no_flags(run: Runner, op: str, name: str) -> None:
    for count, width in ((0, name), (64, name), (32, {"rax": "eax"}.get(name, f"{name}d"))):
        out = ended(run(f"push 0x8d7; popfq; {op} {width}, cl", {name: 0x1234, "rcx": count}))
        assert out[name] == 0x1234
        assert out.flags == OF | SF | ZF | AF | PF | CF


# -- multiplication and division ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "regs", "results"),
    [
        ("mul rcx", {"rax": M, "rcx": M}, {"rax": 1, "rdx": M - 1}),
        ("imul rcx", {"rax": M, "rcx": 5}, {"rax": M - 4, "rdx": M}),
        ("mul cl", {"rax": 0x10, "rcx": 0x20}, {"rax": 0x200}),
        ("mul r15d", {"rax": 0xFFFF_FFFF, "r15": 2}, {"rax": 0xFFFF_FFFE, "rdx": 1}),
        ("imul rax, r10, -3", {"r10": 7}, {"rax": M - 20}),
        ("imul r11, r10", {"r10": 1 << 32, "r11": 1 << 31}, {"r11": 1 << 63}),
        ("div rcx", {"rdx": 1, "rax": 0, "rcx": 1 << 32}, {"rax": 1 << 32, "rdx": 0}),
        ("div ch", {"rax": 0x0107, "rcx": 0x1000}, {"rax": 0x0710}),
        ("idiv r10", {"rdx": M, "rax": M - 6, "r10": 2}, {"rax": M - 2, "rdx": M}),
        ("idiv r11d", {"rdx": 0xFFFF_FFFF, "rax": 0xFFFF_FFF9, "r11": 2}, {"rax": 0xFFFF_FFFD, "rdx": 0xFFFF_FFFF}),
        ("cqo; idiv rcx", {"rax": M - 99, "rcx": 7}, {"rax": M - 13, "rdx": M - 1}),
    ],
)
def test_multiply_and_divide(run: Runner, source: str, regs: dict[str, int], results: dict[str, int]) -> None:
    out = ended(run(source, regs))
    assert {name: out[name] for name in results} == results


def test_multiplication_tells_overflow_in_cf_and_of(run: Runner) -> None:
    assert ended(run("mul rcx", {"rax": 1 << 32, "rcx": 1 << 32})).flags & (CF | OF) == CF | OF
    assert ended(run("mul rcx", {"rax": 3, "rcx": 4})).flags & (CF | OF) == 0
    assert ended(run("imul eax, ecx", {"rax": M, "rcx": 4})).flags & (CF | OF) == 0
    assert ended(run("imul ax, cx, 2", {"rcx": 0x7FFF})).flags & (CF | OF) == CF | OF


# -- addressing --------------------------------------------------------------------------------------------------------

WIDE = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))


@pytest.mark.parametrize("base", WIDE)
def test_every_register_as_base(run: Runner, base: str) -> None:
    target = "r12" if base != "r12" else "r13"
    keep, back = (f"mov {target}, rsp;", f"mov rsp, {target};") if base == "rsp" else ("", "")
    data = struct.pack("<4Q", 0x11, 0x22, 0x33, 0x44)
    store = f"mov qword ptr [{base}+0x18], 0x55"
    out = ended(
        run(
            f"{keep} mov {base}, {DATA}; push qword ptr ds:[{DATA}]; pop qword ptr ds:[{DATA + 0x100}];"
            f"{store}; mov {'rbx' if base != 'rbx' else 'rdx'}, [{base}+8]; {back}"
            if base != "rsp"
            else f"{keep} mov rsp, {DATA}; {store}; mov rbx, [rsp+8]; {back}",
            memory={DATA: data, DATA + 0x100: bytes(8)},
        )
    )
    assert out["rbx" if base != "rbx" else "rdx"] == 0x22
    assert out.memory[DATA] == data[:24] + struct.pack("<Q", 0x55)


@pytest.mark.parametrize("index", [name for name in WIDE if name != "rsp"])
@pytest.mark.parametrize("scale", [1, 8])
def test_every_register_as_index(run: Runner, index: str, scale: int) -> None:
    base = "rsi" if index != "rsi" else "rdi"
    target = "r14" if index != "r14" else "r13"
    regs = {index: 2, base: DATA}
    out = ended(run(f"mov {target}, [{base}+{index}*{scale}+8]; inc byte ptr [{base}+{index}*{scale}]", regs,
                    {DATA: bytes(range(64))}))  # fmt: skip
    at = 2 * scale
    assert out[target] == int.from_bytes(bytes(range(at + 8, at + 16)), "little")
    assert out.memory[DATA][at] == at + 1


@pytest.mark.parametrize("name", WIDE)
def test_every_register_as_operand(run: Runner, name: str) -> None:
    """As the reg and as the rm of ADD and MOV, loaded from and stored to memory."""
    keep = "r9" if name != "r9" else "r8"
    out = ended(
        run(
            f"mov {keep}, rsp; mov {name}, [{DATA}]; add {name}, [{DATA + 8}]; mov [{DATA + 16}], {name};"
            f"add [{DATA + 8}], {name}; add {name}, {name}; mov [{DATA + 24}], {name}; mov rsp, {keep}",
            memory={DATA: struct.pack("<4Q", 100, 11, 0, 0)},
        )
    )
    assert struct.unpack("<4Q", out.memory[DATA]) == (100, 122, 111, 222)


@pytest.mark.parametrize("name", ["r10", "r11", "r15", "rax"])
@pytest.mark.parametrize("other", ["r10", "r11", "r15", "rsp", "rcx"])
def test_special_registers_as_base_and_index_and_value_at_once(run: Runner, name: str, other: str) -> None:
    if name == other:
        out = ended(run(f"lea {name}, [{name}+{name}*4+5]", {name: 10}))
        assert out[name] == 55
        return
    if other == "rsp":
        place = f"[rsp+{name}*8-0x40]"
        out = ended(run(f"mov {place}, {name}; mov {name}, {place}; add {name}, rsp; sub {name}, rsp", {name: 3}))
        assert out[name] == 3
        return
    memory = {DATA: struct.pack("<8Q", *range(8))}
    out = ended(run(f"mov {name}, [{name}+{other}*8]; xchg {name}, {other}; add [{DATA}+{other}*8], {name}",
                    {name: DATA, other: 5}, memory))  # fmt: skip
    assert (out[name], out[other]) == (5, 5)
    assert struct.unpack("<8Q", out.memory[DATA])[5] == 10


def test_rip_relative_operands(run: Runner) -> None:
    out = ended(
        run(
            f"lea rax, [rip+1f]; mov ebx, [rip+1f]; mov dword ptr [rip+1f], 0x11223344; mov ecx, [rip+1f];"
            f"cmp byte ptr [rip+at_{DATA:x}], 7; sete dl; add r15, [rip+at_{DATA:x}]; jmp 2f; 1: .long 5; 2:",
            memory={DATA: b"\7"},
        )
    )
    assert (out["rbx"], out["rcx"], out["rdx"] & 0xFF, out["r15"]) == (5, 0x1122_3344, 1, 7)


def test_32_bit_addresses_wrap_and_ignore_the_upper_half(run: Runner) -> None:
    out = ended(run("mov rax, [ebx+ecx*2+8]; lea rdx, [ebx+ecx]; lea edi, [rbx+rcx]",
                    {"rbx": 0xFFFF_FFFF_0000_0000 + DATA, "rcx": 0xFFFF_FFFF_FFFF_FFFC},
                    {DATA: struct.pack("<2Q", 0xABCD, 0)}))  # fmt: skip
    assert (out["rax"], out["rdx"], out["rdi"]) == (0xABCD, DATA - 4, DATA - 4)


def test_accesses_over_a_page_end(run: Runner) -> None:
    at = DATA + 0x1000 - 3
    out = ended(
        run(
            f"mov rax, [{at}]; mov [{at}], rbx; add dword ptr [{at + 1}], 1; push qword ptr [{at}]; pop rcx;"
            f"lock inc word ptr [{at + 2}]; movups xmm0, [{at - 4}]; movups [{at + 0x1000 - 5}], xmm0",
            {"rbx": 0x8877_6655_4433_2211},
            {at: bytes(range(1, 9)), at + 0x1000 - 5: bytes(16)},
        )
    )
    assert (out["rax"], out["rcx"]) == (0x0807_0605_0403_0201, 0x8877_6655_4433_2311)
    assert out.memory[at] == bytes.fromhex("1123344455667788")
    assert out.memory[at + 0x1000 - 5][4:12] == out.memory[at]


# -- the stack ---------------------------------------------------------------------------------------------------------


def test_push_and_pop_of_rsp_itself(run: Runner) -> None:
    out = ended(run("push rsp; pop rax; push 0x77; mov rbx, rsp; push rbx; pop rsp; pop rcx"))
    assert (out["rax"], out["rbx"], out["rcx"], out["rsp"]) == (STACK, STACK - 8, 0x77, STACK)


def test_pop_to_memory_counts_rsp_after_the_pop(run: Runner) -> None:
    out = ended(run("push 1; push 2; pop qword ptr [rsp+8]; mov rax, [rsp+8]; mov rbx, [rsp]"))
    assert (out["rax"], out["rbx"]) == (2, 1)


def test_push_of_immediates_and_16_bit(run: Runner) -> None:
    out = ended(run("push -2; pop rax; push 0x7fffffff; pop rbx; push -1; pushw 0x1234; mov rcx, [rsp]; mov rdx, rsp"))
    assert (out["rax"], out["rbx"]) == (M - 1, 0x7FFF_FFFF)
    assert (out["rcx"], out["rdx"]) == (0xFFFF_FFFF_FFFF_1234, STACK - 10)


def test_enter_and_leave(run: Runner) -> None:
    out = ended(run("mov rbp, 0x1234; enter 32, 0; mov rax, rsp; mov rbx, rbp; mov rcx, [rbp]; leave"))
    assert (out["rax"], out["rbx"], out["rcx"]) == (STACK - 40, STACK - 8, 0x1234)
    assert (out["rsp"], out["rbp"]) == (STACK, 0x1234)


def test_nested_enter_copies_frame_pointers(run: Runner) -> None:
    out = ended(run("enter 0, 1; mov rdx, rbp; enter 16, 2; mov rax, rbp; mov rbx, [rbp-8]; mov rcx, [rbp-16]"))
    assert out["rbx"] == out["rdx"] == STACK - 8
    assert out["rcx"] == out["rax"]


def test_call_ret_and_ret_with_a_count(run: Runner) -> None:
    out = ended(run("push 7; push 8; call 1f; jmp 2f; 1: mov rax, [rsp+8]; mov rbx, [rsp]; ret 16; ud2; 2:"))
    assert (out["rax"], out["rsp"]) == (8, STACK)


def test_indirect_calls_and_jumps_through_every_kind_of_operand(run: Runner) -> None:
    out = ended(
        run(
            f"""
            lea rbx, [rip+f]; call rbx
            mov [{DATA}], rbx; call [{DATA}]
            lea r10, [rip+f]; call r10
            lea r15, [rip+f]; push r15; call [rsp]; add rsp, 8
            mov r11, {DATA}; call [r11]
            mov r11d, 1; call [{DATA - 8}+r11*8]
            lea rcx, [rip+1f]; jmp rcx; ud2
            1: lea r11, [rip+2f]; jmp r11; ud2
            2: lea rcx, [rip+3f]; push rcx; jmp [rsp]; ud2
            3: pop rdx; jmp 4f
            f: inc rax; ret
            4:
            """
        )
    )
    assert out["rax"] == 6
    assert out["rsp"] == STACK


def test_a_return_address_may_be_changed(run: Runner) -> None:
    out = ended(run("call 1f; mov rax, 1; jmp 3f; 1: lea rbx, [rip+2f]; mov [rsp], rbx; ret; 2: mov rax, 2; 3:"))
    assert out["rax"] == 2


def test_a_return_to_another_place_keeps_flags(run: Runner) -> None:
    """The code behind the CALL would overwrite them."""
    outcome = ended(
        run("""
            mov ebx, 3
            1: call 2f
            cmp eax, eax
            jmp 4f
            2: lea rax, [rip + 3f]
            mov [rsp], rax
            xor ecx, ecx
            cmp ecx, 1
            ret
            3: setc dl
            sete dh
            4: dec ebx
            jnz 1b
        """)
    )
    assert outcome.regs["rdx"] & 0xFFFF == 1


@pytest.mark.parametrize("depth", [100, 20_000])
def test_more_calls_than_returns(run: Runner, depth: int) -> None:
    """20,000 are more than the software processor's stack of returns holds."""
    outcome = ended(
        run(f"mov ecx, {depth}; 1: call 2f; 2: pop rax; dec ecx; jnz 1b; call 3f; jmp 4f; 3: mov eax, 7; ret; 4:")
    )
    assert outcome.regs["rax"] == 7


def test_deep_recursion_returns(run: Runner) -> None:
    out = ended(run("mov ecx, 200; call 1f; jmp 2f; 1: dec ecx; jz 3f; call 1b; inc rax; 3: ret; 2:"))
    assert (out["rax"], out["rsp"]) == (199, STACK)


def test_pushf_and_popf(run: Runner) -> None:
    out = ended(run("push 0x8d5; popfq; pushfq; pop rax; pushf; pop bx; push 0; popfq; pushfq; pop rcx"))
    assert out["rax"] & 0xCD5 == 0x8D5
    assert out["rbx"] & 0xCD5 == 0x8D5
    assert out["rcx"] & 0xCD7 == 2
    assert ended(run("push 0x402; popfq")).rflags & DF


def test_lahf_and_sahf(run: Runner) -> None:
    out = ended(run("stc; lahf; mov rbx, rax; mov ah, 0xd7; sahf; lahf; mov rcx, rax", {"rax": 0}))
    assert out["rbx"] >> 8 & CF
    assert out["rbx"] >> 8 & 2
    assert out["rcx"] >> 8 == 0xD7
    assert out.flags & 0xD5 == 0xD5


def test_sahf_leaves_overflow_alone(run: Runner) -> None:
    out = ended(run("mov eax, 0x7fffffff; inc eax; mov ah, 0; sahf"))
    assert out.flags == OF


# -- conditions --------------------------------------------------------------------------------------------------------

CONDITIONS: dict[str, Callable[[int], int]] = {
    "o": lambda f: f & OF, "b": lambda f: f & CF, "e": lambda f: f & ZF, "be": lambda f: f & (CF | ZF),
    "s": lambda f: f & SF, "p": lambda f: f & PF, "l": lambda f: bool(f & SF) != bool(f & OF),
    "le": lambda f: f & ZF or bool(f & SF) != bool(f & OF),
}  # fmt: skip
OPPOSITE = {"o": "no", "b": "ae", "e": "ne", "be": "a", "s": "ns", "p": "np", "l": "ge", "le": "g"}


@pytest.mark.parametrize("flags", [0, CF, ZF, SF, OF, PF, SF | OF, CF | ZF, ZF | OF, SF | ZF | PF])
def test_all_conditions_of_jcc_setcc_and_cmovcc(run: Runner, flags: int) -> None:
    lines, expected = [], []
    for cc, holds in CONDITIONS.items():
        for name, value in ((cc, bool(holds(flags))), (OPPOSITE[cc], not holds(flags))):
            lines.append(
                f"push {flags | 2}; popfq; set{name} r10b; mov r11d, 0; cmov{name} r11d, esi;"
                f"j{name} 1f; mov r15d, 0; jmp 2f; 1: mov r15d, 1; 2:"
                "mov [rdi], r10b; mov [rdi+1], r11b; mov [rdi+2], r15b; add rdi, 3"
            )
            expected += [value] * 3
    out = ended(run("\n".join(lines), {"rsi": 1, "rdi": DATA}, {DATA: bytes(48)}))
    assert list(out.memory[DATA]) == [int(value) for value in expected]


def test_cmov_reads_memory_and_zero_extends_even_if_false(run: Runner) -> None:
    out = ended(run(f"cmp eax, eax; cmovne ebx, [{DATA}]; cmove r15, [{DATA}]; cmovne r10d, r10d", {"rbx": M, "r10": M},
                    {DATA: struct.pack("<Q", 77)}))  # fmt: skip
    assert (out["rbx"], out["r15"], out["r10"]) == (0xFFFF_FFFF, 77, 0xFFFF_FFFF)


def test_loop_instructions(run: Runner) -> None:
    out = ended(run("mov rcx, 5; 1: inc rax; loop 1b; mov rcx, 5; 2: inc rbx; cmp rbx, 3; loopne 2b; mov rsi, rcx;"
                    "mov rcx, 4; 3: inc rdx; cmp rdx, 1; loope 3b; mov rdi, rcx"))  # fmt: skip
    assert [out[name] for name in ("rax", "rbx", "rsi", "rdx", "rdi")] == [5, 3, 2, 2, 2]


def test_jrcxz_and_jecxz(run: Runner) -> None:
    out = ended(
        run("mov rcx, 0x100000000; jrcxz 1f; inc rax; 1: jecxz 2f; mov rbx, 9; 2: xor ecx, ecx; jrcxz 3f; ud2; 3:")
    )
    assert (out["rax"], out["rbx"]) == (1, 0)


def test_flags_live_over_memory_accesses_branches_and_calls(run: Runner) -> None:
    out = ended(
        run(
            f"""
            mov rdi, {DATA}; stc
            mov [rdi], rax; mov rbx, [rdi+0x1000]; push rbx; pop rbx; lea rdx, [rdi+8]; mov [rdx], r10
            jmp 1f; 1: call 2f; jmp 3f; 2: mov r15, [rsp]; ret; 3:
            mov rcx, 3; 4: mov [rdi+rcx*8], r11; loop 4b
            adc rax, 0
            """
        )
    )
    assert out["rax"] == 1


# -- strings -----------------------------------------------------------------------------------------------------------


def test_rep_movs_forward_backward_and_overlapping(run: Runner) -> None:
    data = bytes(range(64))
    regs = {"rsi": DATA, "rdi": DATA + 1, "rcx": 16}
    out = ended(run("rep movsb", regs, {DATA: data}))
    assert out.memory[DATA] == bytes(17) + data[17:]
    assert (out["rsi"], out["rdi"], out["rcx"]) == (DATA + 16, DATA + 17, 0)
    out = ended(run("std; rep movsb; cld", {"rsi": DATA + 15, "rdi": DATA + 16, "rcx": 16}, {DATA: data}))
    assert out.memory[DATA] == data[:1] + data[:16] + data[17:]
    assert (out["rsi"], out["rdi"]) == (DATA - 1, DATA)


@pytest.mark.parametrize(("suffix", "size"), [("b", 1), ("w", 2), ("d", 4), ("q", 8)])
def test_rep_stos_over_pages(run: Runner, suffix: str, size: int) -> None:
    count = 0x2100 // size
    out = ended(run(f"rep stos{suffix}", {"rax": 0x8877_6655_4433_2211, "rdi": DATA + 0x20, "rcx": count},
                    {DATA: bytes(0x2200)}))  # fmt: skip
    unit = (0x8877_6655_4433_2211).to_bytes(8, "little")[:size]
    assert out.memory[DATA] == bytes(0x20) + unit * count + bytes(0x2200 - 0x20 - size * count)
    assert (out["rdi"], out["rcx"]) == (DATA + 0x2120, 0)


def test_scas_and_cmps_stop_where_they_should(run: Runner) -> None:
    out = ended(run("repne scasb; mov rbx, rcx; sete dl", {"rax": 0x63, "rdi": DATA, "rcx": 10}, {DATA: b"abcdefghij"}))
    assert (out["rbx"], out["rdi"], out["rdx"]) == (7, DATA + 3, 1)
    out = ended(run("repe cmpsb", {"rsi": DATA, "rdi": DATA + 8, "rcx": 8}, {DATA: b"abcdXfghabcdefgh"}))
    assert (out["rcx"], out["rsi"], out.flags & CF) == (3, DATA + 5, CF)
    out = ended(run("stc; repe cmpsd", {"rsi": DATA, "rdi": DATA, "rcx": 0}, {DATA: b"a"}))
    assert out.flags & CF, "a count of zero compares nothing"


def test_lods_and_movs_without_rep(run: Runner) -> None:
    out = ended(run("lodsq; mov rbx, rax; lodsb; movsw", {"rsi": DATA, "rdi": DATA + 0x20}, {DATA: bytes(range(40))}))
    assert out["rbx"] == 0x0706_0504_0302_0100
    assert out["rax"] & 0xFF == 8
    assert out.memory[DATA][0x20:0x22] == b"\x09\x0a"
    assert (out["rsi"], out["rdi"]) == (DATA + 11, DATA + 0x22)


def test_string_operations_with_32_bit_addresses(run: Runner) -> None:
    out = ended(run("addr32 rep stosb", {"rax": 7, "rdi": 0xFFFF_FFFF_0000_0000 | DATA, "rcx": 0xF_0000_0003},
                    {DATA: bytes(8)}))  # fmt: skip
    assert out.memory[DATA] == b"\7\7\7\0\0\0\0\0"
    assert (out["rdi"], out["rcx"]) == (DATA + 3, 0)


def test_xlat(run: Runner) -> None:
    assert ended(run("xlat", {"rbx": DATA, "rax": 0x105}, {DATA: bytes(range(100, 116))}))["rax"] == 0x169


# -- exchanges, bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", ["", "lock"])
@pytest.mark.parametrize("name", ["rbx", "r10", "r11", "r15"])
def test_cmpxchg_and_xadd(run: Runner, lock: str, name: str) -> None:
    memory = {DATA: struct.pack("<Q", 100)}
    out = ended(run(f"{lock} cmpxchg [{DATA}], {name}", {"rax": 100, name: 5}, memory))
    assert (out.memory[DATA][0], out["rax"], out.flags & ZF) == (5, 100, ZF)
    out = ended(run(f"{lock} cmpxchg [{DATA}], {name}", {"rax": 99, name: 5}, memory))
    assert (out.memory[DATA][0], out["rax"], out.flags & ZF) == (100, 100, 0)
    out = ended(run(f"{lock} xadd [{DATA}], {name}; xchg [{DATA}], rax", {"rax": 1, name: 11}, memory))
    assert (out[name], out["rax"], out.memory[DATA][0]) == (100, 111, 1)


def test_cmpxchg_of_registers_and_32_bit_failure(run: Runner) -> None:
    out = ended(run("cmpxchg r10, r11; cmpxchg ecx, edx", {"rax": M, "r10": 7, "r11": 8, "rcx": M, "rdx": 1}))
    assert (out["r10"], out["rax"], out["rcx"]) == (7, 0xFFFF_FFFF, M)


def test_cmpxchg8b_and_16b(run: Runner) -> None:
    memory = {DATA: struct.pack("<2Q", 0x1111_1111_2222_2222, 0x3333)}
    out = ended(run(f"lock cmpxchg8b [{DATA}]", {"rax": 0x2222_2222, "rdx": 0x1111_1111, "rbx": 1, "rcx": 2}, memory))
    assert struct.unpack("<2Q", out.memory[DATA]) == (0x2_0000_0001, 0x3333)
    assert out.flags & ZF
    out = ended(run(f"lock cmpxchg16b [{DATA}]", {"rax": 1, "rdx": 2, "rbx": 3, "rcx": 4}, memory))
    assert (out["rax"], out["rdx"], out.flags & ZF) == (0x1111_1111_2222_2222, 0x3333, 0)
    out = ended(
        run(f"lock cmpxchg16b [{DATA}]", {"rax": 0x1111_1111_2222_2222, "rdx": 0x3333, "rbx": 3, "rcx": 4}, memory)
    )
    assert struct.unpack("<2Q", out.memory[DATA]) == (3, 4)


@pytest.mark.parametrize(
    "op", ["add", "sub", "and", "or", "xor", "adc", "sbb", "inc", "dec", "neg", "not", "bts", "btr", "btc"]
)
def test_locked_read_modify_write(run: Runner, op: str) -> None:
    operand = "" if op in ("inc", "dec", "neg", "not") else ", r15d"
    old, by = 0x8000_00F0, 3
    expected = {
        "add": old + by, "sub": old - by, "and": old & by, "or": old | by, "xor": old ^ by, "adc": old + by + 1,
        "sbb": old - by - 1, "inc": old + 1, "dec": old - 1, "neg": -old, "not": ~old, "bts": old | 8, "btr": old & ~8,
        "btc": old ^ 8,
    }[op] & 0xFFFF_FFFF  # fmt: skip
    out = ended(run(f"stc; lock {op} dword ptr [{DATA}]{operand}", {"r15": by}, {DATA: struct.pack("<I", old)}))
    assert struct.unpack("<I", out.memory[DATA])[0] == expected


@pytest.mark.parametrize("name", ["rcx", "r10", "r11", "r15"])
def test_bt_with_a_register_offset_reaches_outside_the_operand(run: Runner, name: str) -> None:
    image = bytearray(64)
    image[0] = 1
    regs = {"rbx": DATA + 32, name: (-256) & M}
    out = ended(
        run(f"bt [rbx], {name}; setc al; bts qword ptr [rbx], {name}; btc [rbx+8], {name}", regs, {DATA: bytes(image)})
    )
    assert (out["rax"], out.memory[DATA][0], out.memory[DATA][8]) == (1, 1, 1)
    out = ended(
        run(
            f"bts [rbx], {name}; mov {name}, 7; bts [rbx], {name}; bts ebx, 0",
            {"rbx": DATA, name: 200},
            {DATA: bytes(64)},
        )
    )
    assert (out.memory[DATA][25], out.memory[DATA][0]) == (1, 0x80)


def test_bt_of_a_register_takes_the_offset_modulo_its_width(run: Runner) -> None:
    out = ended(run("bt rax, rcx; setc bl; bts r10, rcx; btr r11d, ecx; btc r15w, cx",
                    {"rax": 1 << 5, "rcx": 64 + 5, "r11": M, "r15": 0}))  # fmt: skip
    assert (out["rbx"], out["r10"], out["r11"], out["r15"]) == (1, 32, 0xFFFF_FFDF, 32)


def test_bsf_bsr_popcnt_bswap_movbe(run: Runner) -> None:
    out = ended(run(f"bsf rax, rsi; bsr rbx, rsi; popcnt rcx, rsi; bswap rsi;"
                    f"movbe r10, [{DATA}]; movbe [{DATA}], r15d",
                    {"rsi": 0x0F00, "r15": 0x1122_3344}, {DATA: bytes(range(8))}))  # fmt: skip
    assert (out["rax"], out["rbx"], out["rcx"]) == (8, 11, 4)
    assert (out["rsi"], out["r10"]) == (0x000F << 48, 0x0001_0203_0405_0607)
    assert out.memory[DATA][:4] == bytes.fromhex("11223344")


def test_bsf_of_zero_sets_zf(run: Runner) -> None:
    assert ended(run("bsf rax, rbx")).flags & ZF


def test_xchg_of_special_registers(run: Runner) -> None:
    out = ended(run("xchg r10, r11; xchg rax, r15; xchg r10d, eax; mov rbx, rsp; xchg rbx, rsp; xchg al, ah",
                    {"r10": 1, "r11": 2, "rax": 3, "r15": 0x405}))  # fmt: skip
    assert [out[name] for name in ("r10", "r11", "rax", "r15", "rsp")] == [0x405, 1, 0x200, 3, STACK]


# -- x87, SSE, AVX -----------------------------------------------------------------------------------------------------


def test_x87_arithmetic(run: Runner) -> None:
    out = ended(run(f"fninit; fild dword ptr [{DATA}]; fld qword ptr [{DATA + 8}]; fmulp; fst qword ptr [{DATA + 16}];"
                    f"fsqrt; fistp dword ptr [{DATA + 24}]; fnstsw ax",
                    memory={DATA: struct.pack("<IId8xII", 9, 0, 4.0, 0, 0)}))  # fmt: skip
    assert struct.unpack_from("<d", out.memory[DATA], 16)[0] == 36.0
    assert struct.unpack_from("<I", out.memory[DATA], 24)[0] == 6
    assert out["rax"] & 0x3800 == 0


def test_x87_environment_and_80_bit_values(run: Runner) -> None:
    out = ended(run(f"fninit; fldpi; fstp tbyte ptr [{DATA}]; fld tbyte ptr [{DATA}];"
                    f"fldcw [{DATA + 32}]; fnstcw [{DATA + 34}]; frndint; fistp qword ptr [{DATA + 16}]",
                    memory={DATA: bytes(32) + struct.pack("<HH", 0xB7F, 0)}))  # fmt: skip
    assert out.memory[DATA][:10] == bytes.fromhex("35c26821a2da0fc90040")
    assert struct.unpack_from("<Q", out.memory[DATA], 16)[0] == 4, "rounding up was asked for"
    assert out.memory[DATA][34:36] == struct.pack("<H", 0xB7F)


def test_fcomi_feeds_conditions(run: Runner) -> None:
    out = ended(run("fninit; fldz; fld1; fcomip st, st(1); seta al; fstp st(0)"))
    assert out["rax"] == 1


def test_sse_arithmetic_and_memory_operands(run: Runner) -> None:
    out = ended(
        run(
            f"movups xmm1, [{DATA}]; addps xmm1, [{DATA}]; movaps [{DATA + 16}], xmm1; cvttss2si eax, xmm1;"
            f"movaps xmm15, xmm1; mulss xmm15, xmm15; cvttss2si r10, xmm15;"
            f"movd r11d, xmm1; movq xmm2, r11; movq r15, xmm2;"
            f"mov r10d, r10d; movups xmm3, [r10+{DATA - 4 + 3}]",
            memory={DATA: struct.pack("<4f", 1.0, 2.0, 3.0, 4.0) + bytes(32)},
        )
    )
    assert struct.unpack_from("<4f", out.memory[DATA], 16) == (2.0, 4.0, 6.0, 8.0)
    assert (out["rax"], out["r10"]) == (2, 4)
    assert out["r11"] == out["r15"] == 0x4000_0000


def test_comparisons_of_floats_set_flags(run: Runner) -> None:
    out = ended(run("mov eax, 3; cvtsi2sd xmm0, eax; mov eax, 4; cvtsi2sd xmm1, eax; ucomisd xmm0, xmm1"))
    assert out.flags == CF
    out = ended(run("pcmpeqd xmm0, xmm0; ucomisd xmm0, xmm0"))
    assert out.flags == CF | PF | ZF, "not a number"


def test_mxcsr_is_the_guests_own(run: Runner) -> None:
    out = ended(run(f"ldmxcsr [{DATA}]; mov eax, 1; cvtsi2sd xmm0, eax; mov eax, 3; cvtsi2sd xmm1, eax;"
                    f"divsd xmm0, xmm1; movq rax, xmm0; stmxcsr [{DATA}]",
                    memory={DATA: struct.pack("<I", 0x5F80)}))  # fmt: skip
    assert out["rax"] == 0x3FD5_5555_5555_5556, "rounding up was asked for"
    assert struct.unpack("<I", out.memory[DATA])[0] == 0x5FA0, "inexact is recorded"


def test_fxsave_and_fxrstor(run: Runner) -> None:
    out = ended(run(f"mov eax, 77; movd xmm7, eax; fxsave [{DATA}]; pxor xmm7, xmm7; fxrstor [{DATA}]; movd ebx, xmm7",
                    memory={DATA: bytes(512)}))  # fmt: skip
    assert out["rbx"] == 77
    assert struct.unpack_from("<I", out.memory[DATA], 160 + 7 * 16)[0] == 77


def test_avx_upper_halves(run: Runner, engine: str) -> None:
    from harness import engine_called

    found = engine_called(engine)
    if isinstance(found, str) or not found.capabilities().xcr0 & 4:
        pytest.skip(f"{engine} offers no AVX here")
    out = ended(
        run(
            f"vmovdqu ymm1, [{DATA}]; vpaddd ymm2, ymm1, [{DATA}]; vmovdqu [{DATA + 32}], ymm2;"
            "vextracti128 xmm3, ymm2, 1; vmovd eax, xmm3; vzeroupper; xor ecx, ecx; xgetbv",
            memory={DATA: struct.pack("<8I", *range(8)) + bytes(32)},
        )
    )
    assert struct.unpack_from("<8I", out.memory[DATA], 32) == tuple(2 * n for n in range(8))
    assert out["rax"] & 7 == 7


def test_vector_state_survives_an_exit(engine: str) -> None:
    from harness import Machine, paravirtual

    cpl = 3 if paravirtual(engine) else 0
    with Machine(engine, cpl=cpl) as m:
        m.load("movd xmm5, eax; fninit; fld1; ud2; movd ebx, xmm5; fistp dword ptr [0x40000]; ud2")
        m.vcpu.set("rax", 0x1234)
        assert m.run() == "fault"
        area = bytearray(m.vcpu.get_xsave())
        assert struct.unpack_from("<I", area, 160 + 5 * 16)[0] == 0x1234
        struct.pack_into("<I", area, 160 + 5 * 16, 0x4321)
        m.vcpu.set_xsave(bytes(area))
        frame = m.fault()
        if cpl:
            m.vcpu.set_segment("cs", Machine(engine, cpl=3).vcpu.get_segment("cs"))
            m.vcpu.set_segment("ss", Machine(engine, cpl=3).vcpu.get_segment("ss"))
        m.vcpu.set("rip", frame.rip + 2)
        m.vcpu.set("rsp", frame.rsp)
        assert m.run() == "fault"
        assert m.vcpu.get("rbx") == 0x4321
        assert m.read_int(DATA, 4) == 1
