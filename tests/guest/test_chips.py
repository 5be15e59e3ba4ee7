"""Interrupts of the HPET by way of the I/O APIC, as guests of a few instructions meet them."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest
from asm import MISSING
from small import IDT, kernel, run

import pyhyve

pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

VECTOR: Final = 0x51
LEVEL: Final = 0xA000
"""Of a redirection entry: level-triggered, active low, as PCI's pins are."""
MASKED: Final = 0x1_0000

SETUP: Final = f"""
    lea rsi, handler[rip]
    mov edi, {IDT + 16 * VECTOR}
    mov [rdi], si
    shr rsi, 16
    mov [rdi + 6], si
    mov r8d, 0xfee00000             # local APIC
    mov r9d, 0xfed00000             # HPET
    mov r10d, 0xfec00000            # I/O APIC
    mov dword ptr [r8 + 0xf0], 0x1ff
    xor r15d, r15d                  # interrupts counted
    jmp go

# Writes eax to the indirect register ecx of the I/O APIC.
ioapic:
    mov [r10], ecx
    mov [r10 + 0x10], eax
    ret

# Waits for esi ticks of the HPET; what has fallen due by then has come, since reading its status looks.
wait:
    mov eax, [r9 + 0xf0]
    add esi, eax
1:  pause
    mov eax, [r9 + 0xf0]
    cmp eax, esi
    js 1b
    mov eax, [r9 + 0x20]
    ret
"""


def numbers(directory: Path, source: str, handler: str = "") -> list[int]:
    """Run a guest whose handler counts in r15d, does what it is given, and sends the EOI."""
    program = f"{SETUP}\nhandler:\ninc r15d\n{handler}\nmov dword ptr [r8 + 0xb0], 0\niretq\n\ngo:\n{source}"
    ran = run(kernel(program, directory))
    assert ran.fault is None
    return ran.numbers


def entry(pin: int, low: int) -> str:
    return f"mov ecx, {0x10 + 2 * pin}\nmov eax, {low}\ncall ioapic\n"


def timer(n: int, config: int, comparator: int, route: int = 20) -> str:
    at = 0x100 + 0x20 * n
    return f"mov dword ptr [r9 + {at}], {config | route << 9}\nmov qword ptr [r9 + {at + 8}], {comparator}\n"


START: Final = "mov dword ptr [r9 + 0x10], 1\n"


def wait(ticks: int) -> str:
    return f"mov esi, {ticks}\ncall wait\n"


def counted(interrupts: int) -> str:
    """Wait until the handler has been called that often."""
    return f"3: pause\ncmp r15d, {interrupts}\njb 3b\n"


def show(*registers: str) -> str:
    return "".join(f"mov eax, {register}\ncall print\n" for register in registers)


@pytest.mark.parametrize(("pins", "version"), [(24, 0x17_0011), (32, 0x1F_0020)])
def test_an_io_apic_has_as_many_pins_as_were_asked_for(tmp_path: Path, pins: int, version: int) -> None:
    source = "mov r10d, 0xfec00000\nmov dword ptr [r10], 1\nmov eax, [r10 + 0x10]\ncall print\n"
    with pyhyve.Machine(kernel(source, tmp_path), memory="32M", processor="bt", ioapic_pins=pins) as machine:
        machine.run(20)
        assert int(machine.console.output, 16) == version


@pytest.mark.parametrize(("rtc", "hours"), [("utc", 0), ("local", 5)])
def test_the_clock_shows_utc_or_local_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rtc: str, hours: int
) -> None:
    """Local time is five hours ahead. The guest sends the hour, in BCD, until its minutes did not change meanwhile."""
    monkeypatch.setenv("TZ", "XYZ-5")
    time.tzset()
    read = "".join(
        f"mov al, {register}\nout 0x70, al\nin al, 0x71\nmovzx eax, al\ncall print\n" for register in (2, 4, 2)
    )
    try:
        path = kernel(read, tmp_path)
        while True:
            before = datetime.now(UTC)
            with pyhyve.Machine(path, memory="32M", processor="bt", rtc=rtc) as machine:
                machine.run(20)
                minute, hour, again = (int(word) for word in machine.console.output.split())
            if minute == again and before.hour == datetime.now(UTC).hour:
                break
    finally:
        monkeypatch.undo()
        time.tzset()
    assert hour == (before.hour + hours) % 24


def test_a_clock_that_shows_something_else_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(pyhyve.UsageError, match="rtc mars: unknown; the real-time clock shows utc or local time"):
        pyhyve.Machine(tmp_path / "kernel", rtc="mars")


@pytest.mark.seed("S10")
@pytest.mark.seed("S11")
def test_a_level_comes_again_after_each_eoi_until_the_guest_drops_it(tmp_path: Path) -> None:
    """The handler clears the HPET's status bit at its third call only."""
    source = entry(20, LEVEL | VECTOR) + timer(0, 6, 1000) + START + "sti\n" + counted(3) + wait(10_000)
    drop = "cmp r15d, 3\njne 1f\nmov dword ptr [r9 + 0x20], 1\n1:\n"
    assert numbers(tmp_path, source + show("r15d", "[r9 + 0x20]"), drop) == [3, 0]


@pytest.mark.seed("S9")
def test_a_pin_that_two_sources_hold_is_sent_until_both_have_let_go(tmp_path: Path) -> None:
    """Two timers on pin 20; each call of the handler drops one of them, the higher first."""
    source = entry(20, LEVEL | VECTOR) + timer(0, 6, 1000) + timer(3, 6, 1000) + START + wait(10_000)
    drop = "mov eax, [r9 + 0x20]\nbsr ecx, eax\nmov eax, 1\nshl eax, cl\nmov [r9 + 0x20], eax\n"
    shown = show("[r9 + 0x20]") + "sti\n" + wait(10_000) + show("r15d", "[r9 + 0x20]")
    assert numbers(tmp_path, source + shown, drop) == [0b1001, 2, 0]


@pytest.mark.seed("S9")
def test_a_level_is_sent_when_its_entry_is_unmasked_and_an_edge_is_lost(tmp_path: Path) -> None:
    source = (
        entry(20, MASKED | LEVEL | VECTOR)
        + entry(21, MASKED | VECTOR)
        + timer(0, 6, 1000)
        + timer(1, 4, 1000, route=21)
        + START
        + "sti\n"
        + wait(10_000)
        + show("r15d")
        + entry(21, VECTOR)
        + wait(1_000)
        + show("r15d")
        + entry(20, LEVEL | VECTOR)
        + wait(1_000)
        + show("r15d")
    )
    assert numbers(tmp_path, source, "mov dword ptr [r9 + 0x20], 1\n") == [0, 0, 1]


@pytest.mark.seed("S9")
def test_an_entry_of_the_wrong_polarity_interrupts_while_nobody_asserts(tmp_path: Path) -> None:
    """The handler masks it, as a system does with an interrupt that nobody takes."""
    mask = "push rcx\n" + entry(20, MASKED | VECTOR) + "pop rcx\n"
    assert numbers(tmp_path, START + "sti\n" + entry(20, 0x8000 | VECTOR) + wait(1_000) + show("r15d"), mask) == [1]


@pytest.mark.seed("S11")
@pytest.mark.parametrize("width", [0, 1 << 8], ids=["64 bits", "32 bits"])
def test_a_periodic_timer_counts_its_periods(tmp_path: Path, width: int) -> None:
    """From 1 ms on, each 10 ms; the accumulator says how many there were by the clock, the guest may miss some."""
    period = "mov qword ptr [r9 + 0x148], 100000\n"
    source = entry(23, VECTOR) + timer(2, width | 0x4C, 10_000, route=23) + period + START + "sti\n" + counted(5)
    before, accumulator, after = numbers(tmp_path, source + show("[r9 + 0xf0]", "[r9 + 0x148]", "[r9 + 0xf0]"))
    assert accumulator % 100_000 == 10_000
    assert accumulator >= 510_000
    assert before < accumulator <= after + 100_000


@pytest.mark.seed("S11")
def test_a_route_that_is_not_allowed_is_none(tmp_path: Path) -> None:
    source = entry(19, LEVEL | VECTOR) + timer(0, 6, 1000, route=19) + START + "sti\n" + wait(10_000)
    config, count, status = numbers(tmp_path, source + show("[r9 + 0x100]", "r15d", "[r9 + 0x20]"))
    assert (config >> 9 & 0x1F, count, status) == (0, 0, 1)


@pytest.mark.seed("S11")
def test_a_timers_message_reaches_the_processor_past_the_io_apic(tmp_path: Path) -> None:
    source = timer(0, 0x4004, 1000) + f"mov dword ptr [r9 + 0x110], {VECTOR}\nmov dword ptr [r9 + 0x114], 0xfee00000\n"
    assert numbers(tmp_path, source + START + "sti\n" + wait(10_000) + show("r15d")) == [1]


def test_legacy_replacement_takes_the_place_of_the_8254(tmp_path: Path) -> None:
    """The 8254 runs at 1 kHz, and is cut off while timer 0 stands in for it at pin 2."""
    pit = "mov al, 0x34\nout 0x43, al\nmov al, 0xa9\nout 0x40, al\nmov al, 4\nout 0x40, al\n"
    source = entry(2, VECTOR) + pit + timer(0, 4, 200_000) + "mov dword ptr [r9 + 0x10], 3\nsti\n"
    shown = wait(150_000) + show("r15d") + wait(100_000) + show("r15d")
    assert numbers(tmp_path, source + shown + START + counted(3)) == [0, 1]
