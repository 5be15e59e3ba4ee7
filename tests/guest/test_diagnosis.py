"""A running guest is asked why its interrupts do not come, through vmmctl."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asm import MISSING
from commandline import CommandLine, Ended
from small import kernel

from pyhyve.bhyve.boot.guestimage import GuestImage

TOUR = "console=ttyS0 quiet panic=-1 pyhyve.tour"
WAIT_S = 60.0
ASSERT_COM1 = """
    mov dx, 0x3fc
    mov al, 8                       # OUT2
    out dx, al
    mov dx, 0x3f9
    mov al, 2                       # transmitter empty
    out dx, al
"""
SPIN = "7: pause\njmp 7b\n"
OPEN_PIN_4 = """
    mov ebx, 0xfec00000
    mov dword ptr [rbx], 0x18
    mov dword ptr [rbx+0x10], 0x41
"""


def vmmctl(command: CommandLine, *arguments: object) -> Ended:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "pyhyve.vmmctl.main", *map(str, arguments)],
        env=command.environment,
        cwd=command.current,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return command.finish(process)


def explanation(command: CommandLine, *question: object, held_by: str | None) -> dict[str, Any]:
    """Ask until that stage holds it: the guest needs a while to get there."""
    deadline = time.monotonic() + WAIT_S
    while True:
        ended = vmmctl(command, "--vm=web", "--json", *question)
        if ended.status == 0:
            document: dict[str, Any] = json.loads(ended.stdout)
            if document["held_by"] == held_by:
                return document
        assert time.monotonic() < deadline, ended
        time.sleep(0.1)


def injected(command: CommandLine) -> int:
    """How many interrupts the guest has taken."""
    return int(json.loads(command.run("ctl", "web", "stats", "--json").stdout)["injected"])


@pytest.fixture
def stop(command: CommandLine) -> Iterator[list[subprocess.Popen[str]]]:
    """What is put here is ended at the end, in order."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.send_signal(signal.SIGHUP)
        assert command.finish(process).status == 129


def small(command: CommandLine, place: Path, source: str) -> subprocess.Popen[str]:
    path = kernel(source + SPIN, place)
    options = ("--console", "none", "--hang", "0", "-m", "32M", "--processor", "bt")
    return command.start("run", "--name", "web", "--kernel", path, *options)


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
def test_masked_pin(command: CommandLine, stop: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    stop.append(small(command, tmp_path, ASSERT_COM1))
    found = explanation(command, "--explain-irq=4", held_by="I/O APIC mask")
    while found["stages"][0]["registers"] != {"asserters": 1}:
        found = explanation(command, "--explain-irq=4", held_by="I/O APIC mask")
    assert "masked at the I/O APIC (pin 4, entry 0x10000)" in found["verdict"]
    assert "the master 8259 has not been initialized" in found["verdict"]


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
def test_interrupts_off(command: CommandLine, stop: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    stop.append(small(command, tmp_path, OPEN_PIN_4 + ASSERT_COM1))
    found = explanation(command, "--explain-irq=4", held_by="vCPU 0 RFLAGS.IF")
    assert "vCPU 0 runs with interrupts off" in found["verdict"]
    same = explanation(command, "--explain-vector=0x41", "--cpu=0", held_by="vCPU 0 RFLAGS.IF")
    assert same["stages"][-1]["registers"] == {"count": 0}


def test_stock_kernel(command: CommandLine, stop: list[subprocess.Popen[str]], guest_image: GuestImage) -> None:
    """Its idle lines: COM1 works and is quiet, IRQ 3 is masked, the timer is armed."""
    arguments = ("--kernel", guest_image.kernel, "--initrd", guest_image.initramfs, "--console", "none")
    stop.append(command.start("run", "--name", "web", "-c", "2", *arguments))
    found = explanation(command, "--explain-irq=4", held_by="pin")
    assert "nothing asserts I/O APIC pin 4" in found["verdict"]
    assert "masked" in explanation(command, "--explain-irq=3", held_by="I/O APIC mask")["verdict"]
    listed = json.loads(command.run("ls", "--json").stdout)
    assert [(each["name"], each["state"], each["cpus"]) for each in listed] == [("web", "running", 2)]
    text = command.run("ctl", "web", "explain", "irq", "4")
    assert text.status == 0
    assert text.stdout.splitlines()[0].startswith("IRQ 4: ")
    assert vmmctl(command, "--vm=web", "--explain-irq=99").stderr == "vmmctl: IRQ 99: this machine has 0 to 31\n"
    assert "have not been traced" in vmmctl(command, "--vm=web", "--get-interrupt-latency").stderr
    assert vmmctl(command, "--vm=web", "--trace-interrupts=on").status == 0
    deadline = time.monotonic() + WAIT_S
    while not (latency := json.loads(command.run("ctl", "web", "latency", "--json").stdout))["services"]:
        assert time.monotonic() < deadline, "a kernel that idles still has a timer"
        time.sleep(0.1)
    assert latency["tracing"]
    assert command.run("ctl", "web", "trace", "off").status == 0
    before = injected(command)
    while injected(command) <= before:
        assert time.monotonic() < deadline, "the guest's timer has stopped with the trace"
        time.sleep(0.2)
    assert "from source to vCPU" in command.run("ctl", "web", "latency").stdout
    assert "hlt" in vmmctl(command, "--vm=web", "--get-stats").stdout


def test_killed_vm_stops_nobody(command: CommandLine, guest_image: GuestImage) -> None:
    arguments = ("run", "--name", "web", "--kernel", guest_image.kernel, "--initrd", guest_image.initramfs)
    first = command.start(*arguments, "--console", "none")
    explanation(command, "--explain-irq=3", held_by="I/O APIC mask")
    first.kill()
    first.wait()
    assert "the VM has ended without a word" in vmmctl(command, "--vm=web", "--explain-irq=4").stderr
    again = command.run(*arguments, "--append", TOUR, timeout=90)
    assert again.status == 0
    assert command.run("ls").stdout == ""


def test_trace_of_a_whole_run(command: CommandLine, guest_image: GuestImage) -> None:
    """Every interrupt that the guest took is in the trace, and has its end."""
    file = command.current / "trace"
    guest = ("--kernel", guest_image.kernel, "--initrd", guest_image.initramfs, "--append", TOUR)
    ended = command.run("run", *guest, "--json", "--stats", "--trace", "interrupts", "--trace-file", file, timeout=90)
    assert ended.status == 0, ended
    figures = json.loads(ended.stdout.splitlines()[-1])["statistics"]
    latency = figures["interrupt_latency"]
    taken = sum(each["count"] for vector, each in latency["waits"].items() if vector != "0x2")
    assert taken == figures["injected"]
    assert sum(each["count"] for each in latency["services"].values()) > taken // 2  # the 8259s' have no EOI here
    document = json.loads(command.run("trace", "convert", file).stdout)
    assert {each["ph"] for each in document["traceEvents"]} >= {"X", "b", "e", "M"}
    shown = command.run("run", *guest, "--stats", "--trace", "interrupts", "--trace-file", file, timeout=90)
    assert re.search(r"^vector 0xec, from source to vCPU: [0-9,]+: min ", shown.stderr, re.MULTILINE)
    alone = command.run("run", *guest, "--trace", "interrupts")
    assert alone.complaint == "--trace: not by itself; add --trace-file FILE"
    nowhere = command.run("run", *guest, "--trace", "interrupts", "--trace-file", "/nowhere/x")
    assert nowhere.complaint.startswith("--trace-file /nowhere/x: No such file")
