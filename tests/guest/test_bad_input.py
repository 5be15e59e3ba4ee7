"""What users get wrong: one line that says so, exit status 2, no traceback, and nothing left behind."""

import os
import re
import stat
from pathlib import Path

import pytest
from boot_images import make_bzimage, make_elf
from commandline import CommandLine

from pyhyve.bhyve.boot.guestimage import GuestImage


def complaint(command: CommandLine, *arguments: object) -> str:
    """Run what cannot be; return the one line that says why."""
    ended = command.run(*arguments)
    assert ended.status == 2, ended
    assert ended.stdout == ""
    return ended.complaint


@pytest.fixture
def kernel(command: CommandLine) -> Path:
    """A file that is accepted for a kernel."""
    path = command.current / "vmlinux"
    path.write_bytes(make_elf())
    return path


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rum"], "rum: no such verb; did you mean 'run'?; there are "),
        (["--versoin"], "--versoin: unknown option; did you mean '--version'?; see 'pyhyve --help'"),
        (["run", "--kernal", "x"], "--kernal: unknown option; did you mean '--kernel'?; see 'pyhyve run --help'"),
        (["run", "--kernal=x"], "--kernal: unknown option; did you mean '--kernel'?; see 'pyhyve run --help'"),
        (["run", "--kern", "x"], "--kern: unknown option; did you mean '--kernel'?; see 'pyhyve run --help'"),
        (["run", "--zzz"], "--zzz: unknown option; see 'pyhyve run --help'"),
        (["run", "-z"], "-z: unknown option; see 'pyhyve run --help'"),
        (["run", "vmlinuz"], "vmlinuz: unexpected argument of run; see 'pyhyve run --help'"),
        (["run"], "--kernel: missing; name a kernel, or try 'pyhyve demo', which gets one"),
        (["run", "--kernel"], "--kernel: expected one argument; see 'pyhyve run --help'"),
        (["run", "--processor", "kwm"], "--processor kwm: unknown; did you mean 'kvm'?; there are auto, bt, kvm"),
        (["image", "fetsh"], "action fetsh: unknown; did you mean 'fetch'?; there are fetch, list, remove"),
        (["image", "remove", "no-such-version"], "no-such-version"),
        (["demo", "--tuor"], "--tuor: unknown option; did you mean '--tour'?; see 'pyhyve demo --help'"),
        (["completion"], "shell: missing; see 'pyhyve completion --help'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_word_is_one_line_with_a_guess(command: CommandLine, arguments: list[str], line: str) -> None:
    assert line in complaint(command, *arguments)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-m", "0"], "-m 0K: too little memory; a 64-bit Linux needs at least 16M, better 128M"),
        (["-m", "1M"], "-m 1M: too little memory; a 64-bit Linux needs at least 16M, better 128M"),
        (["-m", "lots"], "-m lots: not a size; write a number and K, M, G or T, for instance 256M"),
        (["-m", ""], "-m : not a size; write a number and K, M, G or T, for instance 256M"),
        (["-m", "64MM"], "-m 64MM: not a size; write a number and K, M, G or T, for instance 256M"),
        (["-m", "1e3M"], "-m 1e3M: not a size; write a number and K, M, G or T, for instance 256M"),
        (["-m", "16777217B"], "-m 16777217: not a multiple of 4096 bytes; write MiB, as in 256M"),
        (["-c", "0"], "-c 0: a machine has 1 to 254 processors"),
        (["-c", "-1"], "-c -1: a machine has 1 to 254 processors"),
        (["-c", "two"], "-c two: not a number; write how many processors, for instance -c 2"),
        (["-p", "0"], "-p 0: not a pinning; write vCPU:hostCPU, for instance -p 0:1"),
        (["-p", "9" * 5000 + ":0"], ":0: not a pinning; write vCPU:hostCPU, for instance -p 0:1"),
        (["-c", "9" * 5000], ": not a number; write how many processors, for instance -c 2"),
        (["-p", "7:0"], "-p 7: there is no such vCPU; this machine has 0 to 0"),
        (["-p", "0:4000"], "-p 0:4000: no such host CPU for this process; it may use "),
        (["--timeout", "soon"], "--timeout soon: not a time; write a number of seconds"),
        (["--timeout", "-1"], "--timeout -1: not a time; write a number of seconds"),
        (["--timeout", "nan"], "--timeout nan: not a time; write a number of seconds"),
        (["--hang", "inf"], "--hang inf: not a time; write a number of seconds"),
        (["--name", "../x"], "--name '../x': not a name; "),
        (["--name", ""], "--name '': not a name; "),
        (["--name", "a\nb"], "--name 'a\\nb': not a name; "),
        (["--console", "sdtio"], "--console: unknown console 'sdtio'; did you mean 'stdio'? It can be stdio, pty, "),
        (["--console", "file:"], "--console file:: no path; write file:PATH"),
        (["--console", "pty:1"], "--console pty:1: 'pty' takes no argument; write --console pty"),
        (["--console", "file:/no/such/place"], "--console file:/no/such/place: cannot be written: No such file or "),
        (["--console", "file:."], "--console file:.: cannot be written: Is a directory; name a file that can"),
        (["--append", "x" * 3000], "kernel command line: 3000 bytes; this kernel takes at most 2047; shorten it"),
        (["--kaslr"], "a vmlinux cannot place itself at random; give its bzImage, or no --kaslr"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_value_that_cannot_be_is_one_line_with_the_remedy(
    command: CommandLine, kernel: Path, arguments: list[str], line: str
) -> None:
    assert line in complaint(command, "run", "--kernel", kernel, *arguments)


@pytest.mark.parametrize("factor", [2, 1000])
def test_more_memory_than_the_host_has_is_refused(command: CommandLine, kernel: Path, factor: int) -> None:
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    line = complaint(command, "run", "--kernel", kernel, "-m", f"{host * factor >> 20}M")
    assert re.search(r"^-m .*host has", line), line


@pytest.mark.parametrize(
    "memory", ["1T", "99999T", "9" * 40, "9" * 5000 + "G", "9" * 400 + ".5"], ids=lambda text: text[:8]
)
def test_absurd_memory_is_refused_as_well(command: CommandLine, kernel: Path, memory: str) -> None:
    assert complaint(command, "run", "--kernel", kernel, "-m", memory).startswith("-m ")


# -- kernels -----------------------------------------------------------------------------------------------------------


def foreign(offset: int, magic: bytes) -> bytes:
    return (bytes(offset) + magic).ljust(8192, b"\0")


@pytest.mark.parametrize(
    ("contents", "line"),
    [
        (b"", "is empty"),
        (b"#!/bin/sh\necho hello\n", "not a Linux kernel; give a bzImage (vmlinuz) or vmlinux"),
        (bytes(100_000), "not a Linux kernel"),
        (b"\xff" * 100_000, "not a Linux kernel"),
        (b"\x7fELF", "truncated or damaged"),
        (make_elf()[:200], "truncated"),
        (make_elf(machine=183), "for another architecture, arm64; pyhyve boots x86-64 kernels"),
        (make_elf(machine=243), "for another architecture, RISC-V; pyhyve boots x86-64 kernels"),
        (make_elf(kind=3), "an x86-64 program or object file, not a kernel"),
        (make_elf(entry=0x55), "its entry point 0x55 is in no loaded segment"),
        (make_elf(((0x100_0000, b"\x90" * 64, 0xFFFF_FFFF_0000),)), "does not fit into 256 MiB of memory"),
        (foreign(0x38, b"ARM\x64"), "for another architecture, arm64"),
        (foreign(0x38, b"RSC\x05"), "for another architecture, RISC-V"),
        (foreign(0, b"070701"), "an initramfs (cpio), not a kernel; did you mean --initrd?"),
        (foreign(0, b"!<arch>\n"), "an archive or package, not a kernel"),
        (make_bzimage(b"\x1f\x8b\x08" + bytes(64)), "its gzip payload is damaged"),
        (
            make_bzimage(b"no such compression" * 9),
            "packed by an unknown method (it starts with 6e 6f 20 73); --kaslr",
        ),
        (make_bzimage(bytes(64), version=0x0204), "protocol"),
        (
            make_bzimage(bytes(64), payload_length=1 << 30),
            "damaged: its header places the kernel outside the file",
        ),
        (make_bzimage(bytes(64), xloadflags=0), "64-bit"),
    ],
)
def test_file_that_is_no_kernel_is_one_line_that_says_what_it_is(
    command: CommandLine, contents: bytes, line: str
) -> None:
    path = command.current / "kernel"
    path.write_bytes(contents)
    text = complaint(command, "run", "--kernel", path)
    assert text.startswith(f"kernel {path}: ")
    assert line in text


@pytest.mark.parametrize("kept", [0.001, 0.05, 0.5, 0.999])
def test_truncated_stock_kernel_is_found_out(command: CommandLine, guest_image: GuestImage, kept: float) -> None:
    whole = guest_image.kernel.read_bytes()
    path = command.current / "vmlinuz"
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert "truncated" in complaint(command, "run", "--kernel", path)


def test_damaged_stock_kernel_is_found_out(command: CommandLine, guest_image: GuestImage) -> None:
    """A hole in the compressed kernel; the decompressor of the host must notice, not the guest."""
    data = bytearray(guest_image.kernel.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)
    path = command.current / "vmlinuz"
    path.write_bytes(data)
    assert "damaged" in complaint(command, "run", "--kernel", path)


def test_program_of_the_host_is_no_kernel(command: CommandLine, guest_image: GuestImage) -> None:
    line = complaint(command, "run", "--kernel", guest_image.busybox)
    assert line.endswith("an x86-64 program or object file, not a kernel; give a bzImage or vmlinux")


@pytest.mark.parametrize("option", ["--kernel", "--initrd"])
def test_file_that_cannot_be_read_is_one_line(command: CommandLine, kernel: Path, option: str) -> None:
    fifo, loop, link = command.current / "fifo", command.current / "loop", command.current / "link"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    link.symlink_to("nowhere")
    for path, line in (
        (command.current / "missing", "no such file; check the path"),
        (link, "no such file; check the path"),
        (kernel / "below-a-file", "cannot be read (Not a directory); check the path"),
        (command.current, "is a directory; name a file"),
        (fifo, "is not a regular file; copy it to one"),
        ("/dev/zero", "is not a regular file; copy it to one"),
        (loop, "cannot be read (Too many levels of symbolic links); check the path"),
        ("x" * 5000, "cannot be read (File name too long); check the path"),
        ("", "name a file"),
        ("two\nlines\x1b[2J\udcff", "two\\nlines\\x1b[2J\\udcff: no such file; check the path"),
    ):
        other = [] if option == "--kernel" else ["--kernel", kernel]
        text = complaint(command, "run", *other, option, path)
        assert text.startswith(f"{option[2:]} "), text
        assert text.endswith(line), text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission_is_one_line(command: CommandLine, kernel: Path) -> None:
    kernel.chmod(stat.S_IWUSR)
    assert complaint(command, "run", "--kernel", kernel).endswith("may not be read; check its permissions")


# -- initrd ------------------------------------------------------------------------------------------------------------


def test_initrd_that_does_not_fit_is_refused(command: CommandLine, guest_image: GuestImage) -> None:
    initrd = command.current / "initrd"
    with initrd.open("wb") as file:
        file.truncate(300 << 20)  # no disk is used for it
    line = complaint(command, "run", "--kernel", guest_image.kernel, "--initrd", initrd, "-m", "256M")
    assert re.match(rf"initrd {initrd}: is too large: 300 MiB; at most \d+ MiB fit; give more memory \(-m\)", line), (
        line
    )


def test_memory_that_does_not_hold_the_kernel_is_refused(command: CommandLine, guest_image: GuestImage) -> None:
    line = complaint(command, "run", "--kernel", guest_image.kernel, "-m", "32M")
    assert re.search(r": does not fit into 32 MiB of memory: .*; give at least \d+ MiB \(-m\)$", line), line


def test_initrd_that_is_none_is_the_guest_s_to_tell(command: CommandLine, guest_image: GuestImage) -> None:
    initrd = command.current / "initrd"
    initrd.write_bytes(b"no archive at all" * 1000)
    ended = command.run(
        "run", "--kernel", guest_image.kernel, "--initrd", initrd, "--append", "console=ttyS0 panic=-1", "--console",
        "none",
    )  # fmt: skip
    assert ended.status == 6
    assert ended.complaint.startswith("panicked: VFS: Unable to mount root fs")


# -- the host ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "shared", "nowhere"])
def test_runtime_directory_that_will_not_do_is_one_line(command: CommandLine, kernel: Path, place: str) -> None:
    runtime = command.current / "run"
    if place == "file":
        runtime.write_text("a file")
    elif place == "shared":
        (runtime / "pyhyve").mkdir(parents=True)
        (runtime / "pyhyve").chmod(0o777)
    else:
        runtime = Path("/proc/self/nowhere")
    process = command.start("run", "--kernel", kernel, environment={"XDG_RUNTIME_DIR": str(runtime)})
    ended = command.finish(process)
    assert ended.status == 2
    assert "PYHYVE_RUN_DIR" in ended.complaint


def test_closed_output_of_help_is_no_traceback(command: CommandLine) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = command.run("run", "--help", stdout=writer)
    finally:
        os.close(writer)
    assert ended.stderr == ""


def test_complaint_that_nobody_reads_still_has_its_status(command: CommandLine) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = command.run("run", stderr=writer)
    finally:
        os.close(writer)
    assert (ended.status, ended.stdout) == (2, "")
