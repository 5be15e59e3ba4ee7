"""Whole machines with guests of a few bytes, each to its typed outcome, on the software processor."""

import os
import struct
import threading
import time

import pytest

import pyhyve
from pyhyve.base.errors import HostError, UsageError
from pyhyve.bhyve.console import Quit
from pyhyve.bhyve.outcome import OutcomeKind
from pyhyve.cpu import select

ENTRY = 0x100_0000
COM1 = 0x3F8


def kernel_of(code: bytes) -> bytes:
    """An ELF kernel whose entry point is `code`; it is started in long mode with memory mapped to itself."""
    segment = struct.pack("<IIQQQQQQ", 1, 7, 64 + 56, ENTRY, ENTRY, len(code), 0x10000, 0x1000)
    ident = b"\x7fELF" + bytes((2, 1, 1, 0)) + bytes(8)
    return ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, 1, 0, 0, 0) + segment + code


def out(port: int, value: int, size: int = 1) -> bytes:
    """mov edx, port; mov eax, value; out dx, al/ax/eax"""
    opcode = {1: b"\xee", 2: b"\x66\xef", 4: b"\xef"}[size]
    return b"\xba" + struct.pack("<I", port) + b"\xb8" + struct.pack("<I", value) + opcode


def say(text: str) -> bytes:
    return b"".join(out(COM1, byte) for byte in text.encode())


CLI_HLT = bytes.fromhex("fa f4")
SPIN = bytes.fromhex("fa ebfe")
POWER_OFF = out(0x404, 5 << 10 | 1 << 13, 2)
HLT_FOREVER = bytes.fromhex("fb f4 ebfd")


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    try:
        select.processor("bt")
    except (HostError, ImportError) as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def boot(tmp_path):
    machines = []

    def make(code, **options):
        path = tmp_path / f"kernel{len(machines)}"
        path.write_bytes(kernel_of(code))
        machine = pyhyve.Machine(path, memory="32M", processor="bt", **options)
        machines.append(machine)
        return machine

    yield make
    for machine in machines:
        machine.close()


def test_power_off(boot):
    outcome = boot(say("bye\n") + POWER_OFF + SPIN).run(20)
    assert outcome.kind is OutcomeKind.POWERED_OFF
    assert outcome.ok
    assert outcome.exit_status == 0


@pytest.mark.parametrize("code", [out(0xCF9, 6), out(0x64, 0xFE), out(0x92, 1)], ids=["cf9", "keyboard", "port92"])
def test_reboot_by_every_wire(boot, code):
    assert boot(code + SPIN).run(20).kind is OutcomeKind.REBOOTED


def test_cli_hlt_is_hung_unless_the_guest_says_that_it_halts(boot):
    outcome = boot(CLI_HLT).run(20)
    assert outcome.kind is OutcomeKind.HUNG
    assert outcome.detail == f"halted with interrupts off at rip {ENTRY + 2:#x}"
    assert boot(say("reboot: System halted\n") + CLI_HLT).run(20).kind is OutcomeKind.HALTED


def test_spin_without_an_exit_is_hung(boot):
    outcome = boot(SPIN, hang_seconds=0.5).run(20)
    assert outcome.kind is OutcomeKind.HUNG
    assert outcome.detail == f"no exit in 0.5 s; rip {ENTRY + 1:#x}"
    assert 0.4 < outcome.seconds < 10


def test_busy_guest_is_timed_out_not_hung(boot):
    busy = bytes.fromhex("e480 ebfc")  # in al, 0x80; jmp
    outcome = boot(busy, hang_seconds=0.2).run(0.8)
    assert outcome.kind is OutcomeKind.TIMED_OUT
    assert outcome.exit_status == 124


def test_sleeping_guest_is_not_hung(boot):
    machine = boot(HLT_FOREVER, hang_seconds=0.2)
    machine.start()
    assert machine.wait(0.6) is None
    assert machine.stop().kind is OutcomeKind.STOPPED


@pytest.mark.parametrize(
    "code",
    [
        bytes.fromhex("0f0b"),  # ud2, with no interrupt table
        bytes.fromhex("48b8 00 00 00 00 f0 ff 00 00 ffe0"),  # jmp to a non-canonical place
        bytes.fromhex("48b8 00 00 00 00 40 00 00 00 ffe0"),  # jmp to where nothing is mapped
        bytes.fromhex("48bc 00 00 00 00 40 00 00 00 50"),  # push on a stack that is not there
        bytes.fromhex("31c0 0f22d8 ebfe"),  # no page tables any more
    ],
    ids=["ud2", "non-canonical", "unmapped", "stack", "cr3"],
)
def test_wild_guest_ends_in_a_triple_fault(boot, code):
    assert boot(code).run(20).kind is OutcomeKind.TRIPLE_FAULT


def test_jump_into_nowhere_within_the_map_ends_somehow(boot):
    """Code of all ones, or of a device: whatever happens, it is an outcome."""
    outcome = boot(bytes.fromhex("b8 00 00 00 d0 ffe0"), hang_seconds=1).run(20)
    assert outcome.kind in (OutcomeKind.TRIPLE_FAULT, OutcomeKind.HUNG)


def test_panic_is_the_guests_own_line(boot):
    text = (
        "[    0.1] Kernel panic - not syncing: no room\n[    0.2] ---[ end Kernel panic - not syncing: no room ]---\n"
    )
    outcome = boot(say(text) + SPIN).run(20)
    assert outcome.kind is OutcomeKind.PANICKED
    assert outcome.detail == "no room"
    assert outcome.seconds < 10, "a guest that spins after it is not waited for"


def test_console_is_read_and_typed_to(boot):
    echo = bytes.fromhex(
        "ba fd030000 ec a801 74f6"  # wait: mov edx, 0x3fd; in al, dx; test al, 1; jz
        "ba f8030000 ec ee"  # in al, dx; out dx, al
        "3c21 75eb"  # cmp al, '!'; jne wait
    )
    enable = out(0x3F9, 1) + out(0x3FC, 3)  # listening: receive interrupt, RTS
    machine = boot(enable + say("ready\n") + echo + POWER_OFF + SPIN)
    machine.start()
    machine.console.expect("ready", timeout=20)
    machine.console.send("hello!")
    machine.console.expect("hello!", timeout=20)
    assert machine.wait(20).kind is OutcomeKind.POWERED_OFF
    assert machine.console.output == "ready\nhello!"


def test_registers_and_memory_of_a_running_guest(boot):
    code = bytes.fromhex("48b8 8877665544332211 48a3 0000030000000000") + say("go\n") + bytes.fromhex("ebfe")
    machine = boot(code, hang_seconds=0)
    machine.start()
    machine.console.expect("go", timeout=20)
    cpu = machine.vcpus[0]
    assert cpu.get("rip") == ENTRY + len(code) - 2
    assert machine.read_memory(0x30000, 8) == bytes.fromhex("8877665544332211")
    assert cpu.translate(0x30000) == 0x30000
    assert cpu.get_segment("cs").attr >> 13 & 1, "64-bit code"
    cpu.set("rbx", 0x1234)
    assert cpu.get("rbx") == 0x1234
    with pytest.raises(KeyError):
        cpu.get("rzx")
    with pytest.raises(IndexError):
        machine.read_memory(1 << 40, 1)
    assert machine.outcome is None
    assert machine.stop().kind is OutcomeKind.STOPPED
    assert cpu.get("rbx") == 0x1234, "they can be read after the end too"


def test_pause_stops_the_guest_and_its_time(boot):
    count = bytes.fromhex("48ff0425 00000300 ebf6")  # inc qword [0x30000]; jmp
    machine = boot(say("go\n") + count, hang_seconds=0)
    machine.start()
    machine.console.expect("go", timeout=20)
    machine.pause()
    first = machine.read_memory(0x30000, 8)
    time.sleep(0.05)
    assert machine.read_memory(0x30000, 8) == first
    machine.resume()
    deadline = time.monotonic() + 10
    while machine.read_memory(0x30000, 8) == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert machine.read_memory(0x30000, 8) != first


def test_two_machines_run_side_by_side(boot):
    machines = [boot(say(f"I am {n}\n") + POWER_OFF + SPIN) for n in range(2)]
    for machine in machines:
        machine.start()
    assert [machine.wait(20).kind for machine in machines] == [OutcomeKind.POWERED_OFF] * 2
    assert [machine.console.output for machine in machines] == ["I am 0\n", "I am 1\n"]


def test_second_machine_of_a_name_is_refused(boot):
    first = boot(HLT_FOREVER, name="web")
    with pytest.raises(UsageError, match="--name web: a VM of this name is running"):
        boot(HLT_FOREVER, name="web")
    first.close()
    boot(HLT_FOREVER, name="web").close()


def test_refused_machine_leaves_nothing_behind(tmp_path, boot):
    def state():
        return (len(os.listdir("/proc/self/fd")), threading.active_count(), sorted(tmp_path.rglob("lock/*")))

    boot(POWER_OFF).close()
    before = state()
    bad = tmp_path / "bad"
    bad.write_bytes(b"no kernel at all")
    for options in ({"memory": "32M"}, {"memory": "8000G"}, {"processor": "none"}, {"memory": "1M"}):
        with pytest.raises(UsageError):
            pyhyve.Machine(bad, **options)
    assert state() == before


def test_run_leaves_nothing_behind(tmp_path, boot):
    boot(POWER_OFF).close()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        machine = boot(POWER_OFF + SPIN)
        machine.run(20)
        machine.close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert sorted(tmp_path.rglob("lock/*")) == []


def test_machine_starts_once_and_a_closed_one_stays_closed(boot):
    machine = boot(POWER_OFF + SPIN)
    first = machine.run(20)
    assert machine.outcome is first
    assert machine.stop() is first
    with pytest.raises(RuntimeError, match="starts once"):
        machine.start()
    machine.close()
    machine.close()


def test_end_in_the_with_block_stops_the_guest(boot):
    with boot(HLT_FOREVER) as machine:
        machine.start()
    assert machine.outcome.kind is OutcomeKind.STOPPED


def test_quit_asked_for_by_the_console(boot):
    class Console:
        def write(self, data):
            pass

        def start(self, on_input, on_quit):
            self.on_quit = on_quit

        def stop(self):
            pass

    console = Console()
    machine = boot(HLT_FOREVER, console=console)
    machine.start()
    console.on_quit(Quit.KEY)
    outcome = machine.wait(20)
    assert (outcome.kind, outcome.detail) == (OutcomeKind.STOPPED, Quit.KEY.value)
    with pytest.raises(TypeError, match="capture"):
        _ = machine.console


def test_statistics_tell_what_the_run_cost(boot):
    machine = boot(bytes.fromhex("e4ed") + out(0x20, 0x11) + POWER_OFF + SPIN, timing=True)
    machine.run(20)
    figures = machine.statistics()
    assert figures["processor"] == "bt"
    assert figures["exits"]["io"] == 3
    assert figures["unclaimed_ports"] == {"0xed": 1}
    assert figures["guest_seconds"] > 0
    assert figures["resident_bytes"] > 0


def test_mmio_reaches_the_local_apic(boot):
    code = bytes.fromhex("b8 3000e0fe 8b00 890425 00000300") + POWER_OFF + SPIN  # the version register, at fee00030
    machine = boot(code)
    assert machine.run(20).kind is OutcomeKind.POWERED_OFF
    assert int.from_bytes(machine.read_memory(0x30000, 4), "little") & 0xFF == 0x14
