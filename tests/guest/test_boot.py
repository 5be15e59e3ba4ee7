"""The stock kernel to its shell on the software processor, driven through the Python API."""

import hashlib
import math
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shell import APPEND, PROMPT, Shell, machine

import pyhyve
from pyhyve.bhyve.boot.guestimage import GuestImage
from pyhyve.vmm import hostcpu


@pytest.fixture(scope="module")
def shell(guest_image: GuestImage) -> Iterator[Shell]:
    """One guest for all the tests that leave it as it was."""
    with machine(guest_image, timing=True) as guest:
        yield Shell.boot(guest)


@pytest.fixture(scope="module")
def symbols(shell: Shell) -> dict[str, int]:
    """The kernel's addresses, by its own word (Debian's package has no System.map to speak of)."""
    wanted = "linux_banner|_text|_stext|_etext"
    listing = shell(f"grep -E ' ({wanted})$' /proc/kallsyms")
    return {name: int(address, 16) for address, name in re.findall(r"^(\w+) \w (\w+)$", listing, re.MULTILINE)}


# -- what runs in it ---------------------------------------------------------------------------------------------------


def test_kernel_is_the_one_that_was_asked_for(shell: Shell, guest_image: GuestImage) -> None:
    assert shell("uname -r") == guest_image.version.partition("_")[0]
    assert shell("uname -m") == "x86_64"
    assert shell("cat /proc/cmdline") == APPEND


def test_shell_computes_with_64_bits(shell: Shell) -> None:
    cases = {
        "6 * 7": 42,
        "0x7fffffffffffffff + 1": -(1 << 63),
        "-7 / 2": -3,
        "-7 % 3": -1,
        "1 << 62": 1 << 62,
        "-1 >> 63": -1,
        "123456789 * 987654321": 123456789 * 987654321,
        "(0x123456789abcdef ^ 0xfedcba987654321) & 0xffffffff": (0x123456789ABCDEF ^ 0xFEDCBA987654321) & 0xFFFFFFFF,
    }
    printed = shell(f"for x in {' '.join(f'$(({case}))' for case in cases)}; do echo $x; done")
    assert [int(line) for line in printed.split()] == list(cases.values())


def test_pipe_carries_data_between_processes(shell: Shell) -> None:
    assert shell("seq 1 2000 | sort -rn | head -n 3 | tr '\\n' ' '") == "2000 1999 1998 "
    assert int(shell("seq 1 5000 | awk '{ s += $1 } END { print s }'")) == 5000 * 5001 // 2


def test_hundreds_of_processes_come_and_go(shell: Shell) -> None:
    total = shell(
        "t=0; for i in $(seq 1 150); do t=$((t + $(echo $i | busybox awk '{ print $1 * $1 }'))); done; echo $t"
    )
    assert int(total) == sum(i * i for i in range(1, 151))


def test_failing_command_says_so_to_the_shell(shell: Shell) -> None:
    shell("false", status=1)
    shell("sh -c 'kill -SEGV $$'", status=128 + 11)


def test_awk_computes_floating_point_as_the_host_does(shell: Shell) -> None:
    # Only operations that IEEE 754 defines to the last bit.
    total, product = 0.0, 1.0
    for i in range(1, 20001):
        total += (-1.0 if i % 2 == 0 else 1.0) / (2 * i - 1)
        product = product * 1.0000123 + 1.0 / i
    printed = shell(
        "awk 'BEGIN { p = 1; for (i = 1; i <= 20000; i++) { t += (i % 2 == 0 ? -1 : 1) / (2 * i - 1); "
        'p = p * 1.0000123 + 1 / i } printf "%.17g %.17g", 4 * t, p }\''
    )
    assert [float(number) for number in printed.split()] == [4 * total, product]
    assert math.isclose(4 * total, math.pi, rel_tol=1e-4)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512", "sha1", "md5"])
def test_digests_are_those_of_hashlib(shell: Shell, algorithm: str) -> None:
    data = "".join(f"{i}\n" for i in range(1, 30001)).encode()
    assert shell(f"seq 1 30000 | {algorithm}sum").split()[0] == hashlib.new(algorithm, data).hexdigest()


def test_initramfs_arrives_unharmed(shell: Shell, guest_image: GuestImage) -> None:
    assert shell("sha256sum < /bin/busybox").split()[0] == hashlib.sha256(guest_image.busybox.read_bytes()).hexdigest()


def test_compression_gives_back_what_it_took(shell: Shell) -> None:
    assert shell("seq 1 20000 | gzip | gunzip | md5sum") == shell("seq 1 20000 | md5sum")
    assert shell("seq 1 9000 | bzip2 | bunzip2 | md5sum") == shell("seq 1 9000 | md5sum")


def test_every_byte_crosses_the_console(shell: Shell) -> None:
    dump = shell(r"""awk 'BEGIN { for (i = 32; i < 127; i++) printf "%c", i; for (i = 0; i < 300; i++) printf "x" }'""")
    assert dump == "".join(map(chr, range(32, 127))) + "x" * 300


# -- the machine that it sees ------------------------------------------------------------------------------------------


def test_cpuinfo_describes_a_guest_of_this_processor(shell: Shell) -> None:
    text = shell("cat /proc/cpuinfo")
    fields = dict(re.findall(r"^([^\t:]+)\t*: (.*)$", text, re.MULTILINE))
    assert {"lm", "sse2", "nx", "apic", "syscall", "tsc_known_freq", "hypervisor"} <= set(fields["flags"].split())
    assert float(fields["cpu MHz"]) == pytest.approx(hostcpu.tsc_khz() / 1000, rel=0.01)
    assert text.count("processor\t:") == 1


def test_timer_and_serial_interrupts_go_on_coming(shell: Shell) -> None:
    def counts() -> dict[str, int]:
        return {
            name: int(n) for name, n in re.findall(r"^ *(\w+): +(\d+)", shell("cat /proc/interrupts"), re.MULTILINE)
        }

    before = counts()
    shell("sleep 0.2; seq 1 200")
    after = counts()
    assert after["LOC"] > before["LOC"]
    assert after["4"] > before["4"]
    assert after["ERR"] == after["MIS"] == after["NMI"] == 0
    assert after["SPU"] == before["SPU"]


def test_kernel_found_nothing_to_complain_about(shell: Shell) -> None:
    log = shell("dmesg")
    assert "Linux version" in log
    complaints = r"BUG|WARNING|Oops|unchecked MSR|Call Trace|[Ff]irmware [Bb]ug|lockup|stall|unstable|spurious"
    assert re.findall(rf"^.*(?:{complaints}).*$", log, re.MULTILINE) == []


def test_clock_goes_as_the_host_s(shell: Shell) -> None:
    started = time.monotonic()
    uptime = float(shell("cut -d ' ' -f 1 /proc/uptime"))
    shell("sleep 1")
    took = time.monotonic() - started
    assert took >= 1.0
    assert float(shell("cut -d ' ' -f 1 /proc/uptime")) - uptime == pytest.approx(took, abs=0.25)


def test_clock_knows_the_date(shell: Shell) -> None:
    assert int(shell("date +%s")) == pytest.approx(time.time(), abs=5)


# -- looking at it from outside ----------------------------------------------------------------------------------------


def test_memory_of_the_guest_is_there_to_read(shell: Shell, symbols: dict[str, int]) -> None:
    guest = shell.machine
    guest.pause()
    try:
        assert guest.vcpus[0].get("cr0") & 0x8000_0001 == 0x8000_0001
        gpa = guest.vcpus[0].translate(symbols["linux_banner"])
        assert gpa is not None
        assert guest.read_memory(gpa, 14) == b"Linux version "
        assert guest.vcpus[0].translate(0xFFFF_8000_0000_0000 - (1 << 46)) is None
    finally:
        guest.resume()


def test_register_shows_where_an_idle_guest_is(shell: Shell, symbols: dict[str, int]) -> None:
    time.sleep(0.2)
    assert symbols["_stext"] <= shell.machine.vcpus[0].get("rip") < symbols["_etext"]
    with pytest.raises(KeyError):
        shell.machine.vcpus[0].get("eip2")


def test_paused_guest_stands_still_and_so_does_its_clock(shell: Shell) -> None:
    before = float(shell("cut -d ' ' -f 1 /proc/uptime"))
    shell.machine.pause()
    printed = len(shell.machine.console.output)
    shell.type("echo pa''used\n")
    time.sleep(4)
    assert len(shell.machine.console.output) == printed
    shell.machine.resume()
    shell.machine.console.expect("paused\r\n")
    assert float(shell("cut -d ' ' -f 1 /proc/uptime")) - before < 3.5  # the guest's clock stood still for four seconds


def test_idle_guest_lets_its_host_thread_sleep(shell: Shell) -> None:
    """What it costs is measured by bench/devices.py; here: a halted vCPU's thread waits, it does not spin."""
    time.sleep(0.3)
    (thread,) = (task for task in Path("/proc/self/task").iterdir() if "vcpu" in (task / "comm").read_text())
    states = []
    for _ in range(50):
        time.sleep(0.02)
        states.append((thread / "stat").read_text().rpartition(")")[2].split()[0])
    assert states.count("S") > 40


def test_statistics_tell_what_the_run_cost(shell: Shell) -> None:
    figures = shell.machine.statistics()
    assert figures["processor"] == "bt"
    exits = figures["exits"]
    assert isinstance(exits, dict)
    assert exits["hlt"] > 0
    assert exits["io"] > 1000
    guest_seconds, resident = figures["guest_seconds"], figures["resident_bytes"]
    assert isinstance(guest_seconds, float)
    assert isinstance(resident, int)
    assert 0.1 < guest_seconds < 120
    assert 16 << 20 < resident <= 256 << 20


# -- how it ends -------------------------------------------------------------------------------------------------------


def ended(guest: pyhyve.Machine, timeout: float = 20) -> pyhyve.Outcome:
    outcome = guest.wait(timeout)
    assert outcome is not None, f"it did not end; its output does:\n{guest.console.output[-2000:]}"
    assert guest.outcome is outcome
    return outcome


@pytest.mark.parametrize(
    ("typed", "kind", "status"),
    [
        ("exit", pyhyve.OutcomeKind.POWERED_OFF, 0),
        ("poweroff -f", pyhyve.OutcomeKind.POWERED_OFF, 0),
        ("reboot -f", pyhyve.OutcomeKind.REBOOTED, 3),
        ("halt -f", pyhyve.OutcomeKind.HALTED, 4),
    ],
)
def test_guest_that_ends_itself_has_that_outcome(
    guest_image: GuestImage, typed: str, kind: pyhyve.OutcomeKind, status: int
) -> None:
    with machine(guest_image) as guest:
        Shell.boot(guest).type(f"{typed}\n")
        outcome = ended(guest)
    assert (outcome.kind, outcome.exit_status, outcome.ok) == (kind, status, True)
    assert 0 < outcome.seconds < 60


@pytest.mark.parametrize("after", ["panic=-1", "panic=0"], ids=["restarts", "stays"])
def test_panic_carries_the_guest_s_own_line(guest_image: GuestImage, after: str) -> None:
    with machine(guest_image, f"console=ttyS0 {after}") as guest:
        Shell.boot(guest).type("echo c > /proc/sysrq-trigger\n")
        outcome = ended(guest)
        output = guest.console.output
    assert (outcome.kind, outcome.detail) == (pyhyve.OutcomeKind.PANICKED, "sysrq triggered crash")
    assert (outcome.exit_status, outcome.ok) == (6, False)
    assert "Call Trace:" in output


@pytest.mark.parametrize(
    ("append", "initrd", "line"),
    [
        ("rdinit=/bin/sh -- -c false", True, "Attempted to kill init! exitcode=0x00000100"),
        ("", False, "VFS: Unable to mount root fs on unknown-block(0,0)"),
    ],
    ids=["init ends", "no root"],
)
def test_kernel_that_finds_no_system_panics(guest_image: GuestImage, append: str, initrd: bool, line: str) -> None:
    with pyhyve.Machine(
        guest_image.kernel,
        initrd=guest_image.initramfs if initrd else None,
        append=f"console=ttyS0 panic=-1 {append}",
        processor="bt",
        console="none",
    ) as guest:
        outcome = guest.run(60)
    assert (outcome.kind, outcome.detail) == (pyhyve.OutcomeKind.PANICKED, line)


def test_stopped_guest_has_that_outcome_and_its_console_ends(guest_image: GuestImage) -> None:
    with machine(guest_image) as guest:
        guest.start()
        guest.console.expect("Linux version", timeout=30)
        assert guest.stop().kind is pyhyve.OutcomeKind.STOPPED
        with pytest.raises(pyhyve.ExpectClosed):
            guest.console.expect("never printed")
        guest.console.send("nobody listens any more\n")


def test_run_out_of_time_is_an_outcome_with_the_place(guest_image: GuestImage) -> None:
    with machine(guest_image) as guest:
        outcome = guest.run(timeout=0.4)
    assert outcome.kind is pyhyve.OutcomeKind.TIMED_OUT
    assert re.fullmatch(r"stopped after 0\.4 s; rip 0x[0-9a-f]+", outcome.detail)
    assert 0.4 <= outcome.seconds < 5


def test_closed_machine_leaves_no_thread_and_no_descriptor(guest_image: GuestImage) -> None:
    def held() -> tuple[set[str], int]:
        return {thread.name for thread in threading.enumerate()}, len(list(Path("/proc/self/fd").iterdir()))

    with machine(guest_image):
        pass  # what is loaded once for all is loaded now
    threads, descriptors = held()
    with machine(guest_image) as guest:
        guest.start()
        guest.console.expect("Linux version", timeout=30)
    assert held()[0] <= threads
    assert held()[1] <= descriptors


# -- other machines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "mib"), [("128M", 128), ("1G", 1024), ("3584M", 3584)])
def test_guest_has_the_memory_that_was_given(guest_image: GuestImage, memory: str, mib: int) -> None:
    with machine(guest_image, memory=memory) as guest:
        shell = Shell.boot(guest)
        kib = int(shell("awk '/^MemTotal/ { print $2 }' /proc/meminfo"))
        # The kernel's own code and its page structures are not in the total.
        assert (mib - 64) * 1024 * 0.95 <= kib <= mib * 1024
        # What is written far beyond the kernel's own is kept.
        size = 32
        zeros = hashlib.sha256(bytes(size << 20)).hexdigest()
        assert shell(f"dd if=/dev/zero bs=1M count={size} of=/run/f && sha256sum < /run/f").split()[-2] == zeros


def test_kaslr_puts_the_kernel_elsewhere(guest_image: GuestImage, symbols: dict[str, int]) -> None:
    offsets = []
    for _ in range(2):  # one of 500 places is the usual one
        with machine(guest_image, kaslr=True) as guest:
            text = int(Shell.boot(guest)("grep ' _text$' /proc/kallsyms").split()[0], 16)
        offsets.append(text - symbols["_text"])
        if offsets[-1]:
            break
    assert any(offsets)
    assert all(offset % (2 << 20) == 0 and 0 <= offset < 1 << 30 for offset in offsets)


@pytest.mark.seed("S12")
def test_two_machines_run_side_by_side(guest_image: GuestImage) -> None:
    with machine(guest_image) as one, machine(guest_image) as other:
        assert one.name != other.name
        one.start()
        other.start()
        shells = []
        for guest in (one, other):
            guest.console.expect(PROMPT, timeout=60)
            shells.append(Shell(guest))
        for number, shell in enumerate(shells):
            shell(f"echo {number} > /tmp/mine")
        assert [shell("cat /tmp/mine") for shell in shells] == ["0", "1"]
        shells[0].type("poweroff -f\n")
        assert ended(one).kind is pyhyve.OutcomeKind.POWERED_OFF
        assert shells[1]("echo still here") == "still here"


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_code_cache_that_is_full_again_and_again_changes_nothing(guest_image: GuestImage, cpus: int) -> None:
    with machine(guest_image, code_cache="1M", cpus=cpus) as guest:
        run = Shell.boot(guest)
        assert (
            run("seq 1 5000 | sha256sum").split()[0]
            == hashlib.sha256("".join(f"{n}\n" for n in range(1, 5001)).encode()).hexdigest()
        )
        counters = guest.statistics()["engine"]
        assert counters["cache_flushes"] > 10  # type: ignore[index]
        assert counters["code_bytes"] <= cpus << 20  # type: ignore[index]


def test_a_pause_stops_every_processor_wherever_it_is(guest_image: GuestImage) -> None:
    """A rendezvous: no processor goes on behind pause(), however many of them compute."""
    with machine(guest_image, cpus=4) as guest:
        run = Shell.boot(guest)
        run("for n in 1 2 3 4 5 6; do (while :; do :; done) & done")
        for _ in range(20):
            guest.pause()
            stopped = [(vcpu.get("rip"), vcpu.get("rsp"), vcpu.get("rax")) for vcpu in guest.vcpus]
            time.sleep(0.01)
            assert [(vcpu.get("rip"), vcpu.get("rsp"), vcpu.get("rax")) for vcpu in guest.vcpus] == stopped
            guest.resume()
            time.sleep(0.01)
        assert run("kill %1 %2 %3 %4 %5 %6; echo still here") == "still here"


def test_two_processors_share_the_work(guest_image: GuestImage) -> None:
    with machine(guest_image, cpus=2) as guest:
        shell = Shell.boot(guest)
        assert shell("grep -c ^processor /proc/cpuinfo") == "2"
        work = "seq 1 20000 | sha256sum > /tmp/"
        shell(f"taskset 1 sh -c '{work}a' & taskset 2 sh -c '{work}b' & wait")
        assert shell("cat /tmp/a") == shell("cat /tmp/b") != ""


@pytest.mark.parametrize(("append", "kaslr", "levels"), [("", False, 5), (" no5lvl", False, 4), ("", True, 5)])
def test_page_tables_of_five_levels(guest_image: GuestImage, append: str, kaslr: bool, levels: int) -> None:
    with machine(guest_image, APPEND + append, cpu_features={"la57": True}, kaslr=kaslr) as guest:
        shell = Shell.boot(guest)
        assert guest.vcpus[0].get("cr4") >> 12 & 1 == (levels == 5)
        assert shell("grep -c la57 /proc/cpuinfo", status=0 if levels == 5 else 1) == str(int(levels == 5))
