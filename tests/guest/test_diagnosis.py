"""A running guest is asked why its interrupts do not come, through vmmctl."""

import json
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


@pytest.fixture
def stop(command: CommandLine) -> Iterator[list[subprocess.Popen[str]]]:
    """What is put here is ended at the end, in order."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.terminate()
        assert command.finish(process).status == 143


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
    assert "hlt" in vmmctl(command, "--vm=web", "--get-stats").stdout


def test_killed_vm_stops_nobody(command: CommandLine, guest_image: GuestImage) -> None:
    arguments = ("run", "--name", "web", "--kernel", guest_image.kernel, "--initrd", guest_image.initramfs)
    first = command.start(*arguments, "--console", "none")
    explanation(command, "--explain-irq=3", held_by="I/O APIC mask")
    first.kill()
    first.wait()
    assert "the VM has ended without a word" in vmmctl(command, "--vm=web", "--explain-irq=4").stderr
    again = command.run(*arguments, "--append", "console=ttyS0 quiet pyhyve.tour", timeout=90)
    assert again.status == 0
    assert command.run("ls").stdout == ""
