"""The stock kernel with its options for interrupts and time: what it then uses, and that it works."""

import re
import time
from pathlib import Path

import pytest
from shell import APPEND, BOOT_S, PROMPT, Shell, machine

import pyhyve
from pyhyve.bhyve.boot.guestimage import GuestImage

SOURCE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
EVENT = "/sys/devices/system/clockevents/clockevent0/current_device"
BROADCAST = "/sys/devices/system/clockevents/broadcast/current_device"
COMPLAINTS = r"BUG|WARNING|Oops|Call Trace|[Ff]irmware [Bb]ug|lockup|stall|spurious|nobody cared|MP-BIOS|doesn't work"


def boot(image: GuestImage, options: str, **more: object) -> pyhyve.Machine:
    return machine(image, f"{APPEND} quiet {options}", **more)


def interrupts(shell: Shell) -> dict[str, tuple[int, str]]:
    """Interrupt → how often on all processors, and by which controller, for those of /proc/interrupts."""
    found = {}
    for name, counts, rest in re.findall(r"^ *(\w+):((?: +\d+)+) *(.*)$", shell("cat /proc/interrupts"), re.MULTILINE):
        found[name] = (sum(map(int, counts.split())), rest)
    return found


def check_time_passes(shell: Shell, loses_ticks: bool = False) -> None:
    """The guest's clock goes as the host's, and processes share the processor.

    A clock that counts ticks goes slower where the host has not run the guest for longer than one."""

    def uptime() -> tuple[float, float, float]:
        earliest = time.monotonic()
        value = float(shell("cut -d ' ' -f 1 /proc/uptime"))
        return earliest, value, time.monotonic()

    earliest, before, latest = uptime()
    shell("sleep 1; (while :; do :; done) & seq 1 3000 | sort -n | tail -n 1 > /tmp/last; kill $!")
    assert shell("cat /tmp/last") == "3000"
    earliest_end, after, latest_end = uptime()
    assert after - before >= 1
    assert after - before <= latest_end - earliest + 0.02
    assert loses_ticks or after - before >= earliest_end - latest - 0.02


def check_log(shell: Shell) -> None:
    assert re.findall(rf"^.*(?:{COMPLAINTS}).*$", shell("dmesg"), re.MULTILINE) == []


@pytest.mark.parametrize(
    ("options", "source"),
    [
        ("", "tsc"),
        ("clocksource=tsc", "tsc"),
        ("clocksource=hpet", "hpet"),
        ("clocksource=acpi_pm", "acpi_pm"),
        ("clocksource=kvm-clock", "kvm-clock"),
        ("notsc", "kvm-clock"),
        ("notsc no-kvmclock", "hpet"),
        ("notsc no-kvmclock hpet=disable", "acpi_pm"),
        ("notsc no-kvmclock hpet=disable acpi=off", "refined-jiffies"),
        ("no-kvmclock tsc=reliable", "tsc"),
    ],
)
def test_clock_is_the_one_that_was_asked_for(guest_image: GuestImage, options: str, source: str) -> None:
    with boot(guest_image, options) as guest:
        shell = Shell.boot(guest)
        # The last clock to register is the TSC, some time after the first process has started.
        shell(f"for i in $(seq 50); do grep -qx {source} {SOURCE} && break; sleep 0.1; done")
        assert shell(f"cat {SOURCE}") == source
        check_time_passes(shell, loses_ticks="jiffies" in source)
        check_log(shell)


@pytest.mark.parametrize(
    ("options", "device", "ticks"),
    [
        ("", "lapic-deadline", "LOC"),
        ("lapic=notscdeadline", "lapic", "LOC"),
        ("nolapic_timer", "hpet", "0"),
        ("nolapic", "hpet", "0"),
        ("nolapic hpet=disable", "pit", "0"),
        ("nolapic_timer lapic=notscdeadline hpet=disable", "pit", "0"),
        ("acpi=off nolapic", "pit", "0"),
    ],
)
def test_ticks_come_from_the_timer_that_was_left(
    guest_image: GuestImage, options: str, device: str, ticks: str
) -> None:
    with boot(guest_image, options) as guest:
        shell = Shell.boot(guest)
        assert shell(f"cat {EVENT}") == device
        before = interrupts(shell)[ticks][0]
        check_time_passes(shell)
        assert interrupts(shell)[ticks][0] > before
        check_log(shell)


@pytest.mark.parametrize(
    ("options", "cpus", "online", "controller"),
    [
        ("", 1, 1, "IO-APIC"),
        ("", 4, 4, "IO-APIC"),
        ("noapic", 1, 1, "XT-PIC"),
        ("noapic", 4, 4, "XT-PIC"),
        ("nolapic", 4, 1, "XT-PIC"),
        ("acpi=off", 4, 1, "XT-PIC"),
        ("acpi=noirq", 1, 1, "XT-PIC"),
        ("nox2apic", 4, 4, "IO-APIC"),
        ("x2apic_phys", 4, 4, "IO-APIC"),
    ],
)
def test_lines_go_through_the_controller_that_was_left(
    guest_image: GuestImage, options: str, cpus: int, online: int, controller: str
) -> None:
    """The console's interrupt, which every line of this test's own makes come."""
    with boot(guest_image, options, cpus=cpus) as guest:
        shell = Shell.boot(guest)
        count, by = interrupts(shell)["4"]
        assert controller in by
        shell("seq 1 200")
        after = interrupts(shell)
        assert after["4"][0] > count + 5
        assert after["ERR"][0] == after["MIS"][0] == 0
        check_time_passes(shell)
        check_log(shell)
        assert shell("grep -c ^processor /proc/cpuinfo") == str(online)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "x2apic enabled"),
        ("x2apic_phys", "Switched APIC routing to physical x2apic"),
        ("nox2apic", "APIC routing to physical flat"),
    ],
)
def test_local_apics_run_in_the_mode_that_was_asked_for(guest_image: GuestImage, options: str, said: str) -> None:
    with boot(guest_image, options, cpus=2) as guest:
        shell = Shell.boot(guest)
        log = shell("dmesg")
        assert said in log
        assert ("x2apic enabled" in log) == (options != "nox2apic")
        # Function calls to the other processor are IPIs.
        before = interrupts(shell)["CAL"][0] + interrupts(shell)["TLB"][0] + interrupts(shell)["RES"][0]
        shell("for n in 0 1 0 1; do taskset -c $n sh -c 'seq 1 1000 | sort -n > /dev/null'; done")
        after = interrupts(shell)["CAL"][0] + interrupts(shell)["TLB"][0] + interrupts(shell)["RES"][0]
        assert after > before


@pytest.mark.parametrize(
    ("options", "kept"), [("noxsave", set()), ("noxsaveopt", {"avx", "xsave"}), ("", {"avx", "xsave", "xsaveopt"})]
)
def test_kernel_without_extended_state_hides_what_needs_it(
    guest_image: GuestImage, options: str, kept: set[str]
) -> None:
    with boot(guest_image, options) as guest:
        shell = Shell.boot(guest)
        flags = set(shell("sed -n 's/^flags[^:]*: //p' /proc/cpuinfo").split())
        assert {"avx", "xsave", "xsaveopt"} & flags == kept
        assert shell("for n in 1 2 3; do awk 'BEGIN { printf \"%.9f \", 22 / 7 }' & done; wait") == "3.142857143 " * 3


# -- without ACPI ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpus", [2, 4])
@pytest.mark.parametrize(
    ("options", "controller"), [("", "IO-APIC"), ("noapic", "XT-PIC"), ("nox2apic", "IO-APIC")], ids=str
)
def test_processors_are_found_in_the_multiprocessor_tables(
    guest_image: GuestImage, generic_kernel: Path, cpus: int, options: str, controller: str
) -> None:
    """Debian's cloud kernel does not read them; its usual one does."""
    append = f"{APPEND} quiet acpi=off {options}"
    with pyhyve.Machine(
        generic_kernel, initrd=guest_image.initramfs, append=append, processor="bt", cpus=cpus
    ) as guest:
        shell = Shell.boot(guest)
        assert shell("grep -c ^processor /proc/cpuinfo") == str(cpus)
        log = shell("dmesg")
        assert "found SMP MP-table at [mem 0x000f0000-" in log
        assert "ACPI: Interpreter enabled" not in log
        assert controller in interrupts(shell)["4"][1]
        check_time_passes(shell)
        check_log(shell)
        shell.type("poweroff -f\n")
        outcome = guest.wait(20)
        assert outcome is not None
        assert outcome.kind is pyhyve.OutcomeKind.HALTED, "nobody but ACPI can switch it off"


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ("", pyhyve.OutcomeKind.REBOOTED),
        ("reboot=k", pyhyve.OutcomeKind.REBOOTED),
        ("reboot=p", pyhyve.OutcomeKind.REBOOTED),
        ("reboot=b", pyhyve.OutcomeKind.REBOOTED),
        ("reboot=t", pyhyve.OutcomeKind.TRIPLE_FAULT),
    ],
)
@pytest.mark.parametrize("acpi", ["", "acpi=off"])
def test_restart_ends_the_run_whichever_way_the_kernel_takes(
    guest_image: GuestImage, acpi: str, option: str, kind: pyhyve.OutcomeKind
) -> None:
    """By ACPI's reset register, the keyboard controller, port CF9H, the BIOS's entry, a triple fault."""
    with boot(guest_image, f"{acpi} {option}") as guest:
        guest.start()
        guest.console.expect(PROMPT, timeout=BOOT_S)
        guest.console.send("reboot -f\n")
        outcome = guest.wait(20)
    assert outcome is not None
    assert outcome.kind is kind
