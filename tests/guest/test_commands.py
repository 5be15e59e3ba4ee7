"""The command line with the stock kernel: consoles, outcomes, signals, terminals, and nothing left behind."""

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commandline import CommandLine, Line, read_until

from pyhyve.bhyve.boot.guestimage import GuestImage

SHELL = b"root@pyhyve:~# "
BANNER = "Linux version"


def run_arguments(image: GuestImage, append: str = "quiet", *options: object) -> list[object]:
    """`pyhyve run` of the stock guest; `append` goes behind the console's setting."""
    line = f"console=ttyS0 panic=-1 {append}"
    return ["run", "--kernel", image.kernel, "--initrd", image.initramfs, "--append", line, *options]


def wait_for_text(path: Path, text: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while text not in (path.read_text(errors="replace") if path.exists() else ""):
        assert time.monotonic() < deadline, f"{text!r} did not come in {path}"
        time.sleep(0.02)


# -- without a terminal ------------------------------------------------------------------------------------------------


def test_demo_without_a_terminal_is_a_tour_that_powers_off(command: CommandLine, guest_image: GuestImage) -> None:
    ended = command.run("demo")
    assert ended.status == 0, ended
    digest = hashlib.sha256("".join(f"{i}\n" for i in range(1, 10001)).encode()).hexdigest()
    for expected in (
        "--- pyhyve: a tour of the guest",
        f"Linux pyhyve {guest_image.version.partition('_')[0]} ",
        "the 1000th prime is 7919",
        f"sha256 of the numbers to 10000 is {digest[:16]}...",
        "--- the tour is over",
    ):
        assert expected in ended.stdout
    assert re.search(r"^uptime: +[0-9.]+ s$", ended.stdout, re.MULTILINE)
    assert ended.stderr.splitlines()[-1].startswith("pyhyve: powered-off (after ")
    assert all(line.startswith("pyhyve: ") for line in ended.stderr.splitlines())


def test_json_is_the_last_line_and_documents_the_run(command: CommandLine, guest_image: GuestImage) -> None:
    ended = command.run(*run_arguments(guest_image, "quiet pyhyve.tour", "--name", "web", "--json", "--stats"))
    assert ended.status == 0
    document = json.loads(ended.stdout.splitlines()[-1])
    assert set(document) == {"name", "outcome", "detail", "seconds", "exit_status", "statistics"}
    assert (document["name"], document["outcome"], document["exit_status"]) == ("web", "powered-off", 0)
    assert 0 < document["seconds"] < 60
    figures = document["statistics"]
    assert figures["processor"] == "bt"
    assert figures["exits"]["io"] > 0
    assert figures["engine"]["blocks_translated"] > 1000
    assert figures["guest_seconds"] > figures["handler_seconds"] > 0
    assert ended.stderr == ""


def test_json_tells_of_a_panic_too(command: CommandLine, guest_image: GuestImage) -> None:
    ended = command.run(*run_arguments(guest_image, "quiet rdinit=/nothing", "--json", "--console", "none"))
    assert ended.status == 6
    document = json.loads(ended.stdout)
    assert (document["outcome"], document["exit_status"]) == ("panicked", 6)
    assert document["detail"].startswith("VFS: Unable to mount root fs")


def test_statistics_are_a_table_of_all_that_was_asked_for(command: CommandLine, guest_image: GuestImage) -> None:
    ended = command.run(*run_arguments(guest_image, "quiet pyhyve.tour", "--stats"))
    assert ended.status == 0
    figures = dict(re.findall(r"^ *([a-z][\w -]*?) +([\d,.]+)$", ended.stderr, re.MULTILINE))
    for name in (
        "io", "ept-violation",
        "blocks translated", "tlb misses read", "tlb misses write", "guest faults", "guest page faults",
        "guest seconds", "handler seconds", "resident bytes",
    ):  # fmt: skip
        assert float(figures[name].replace(",", "")) > 0, name


def test_time_out_ends_it_with_status_124(command: CommandLine, guest_image: GuestImage) -> None:
    started = time.monotonic()
    ended = command.run(*run_arguments(guest_image, "quiet", "--timeout", "0.5"))
    assert ended.status == 124
    assert re.fullmatch(r"timed-out: stopped after 0\.5 s; rip 0x[0-9a-f]+ \(after 0\.\d+ s\)", ended.complaint)
    assert time.monotonic() - started < 15


def test_console_in_a_file_is_all_of_the_output(command: CommandLine, guest_image: GuestImage) -> None:
    path = command.current / "console.txt"
    path.write_text("what was there before\n")
    ended = command.run(*run_arguments(guest_image, "pyhyve.tour", "--console", f"file:{path}"))
    assert (ended.status, ended.stdout) == (0, "")
    text = path.read_text()
    assert "what was there before" not in text
    assert BANNER in text
    assert "--- the tour is over" in text
    assert text.splitlines()[-1].endswith("reboot: Power down")


def test_console_that_is_none_prints_nothing(command: CommandLine, guest_image: GuestImage) -> None:
    ended = command.run(*run_arguments(guest_image, "pyhyve.tour", "--console", "none"))
    assert (ended.status, ended.stdout) == (0, "")
    assert ended.complaint.startswith("powered-off")


def test_console_on_a_pty_is_a_terminal_to_come_to_and_leave(command: CommandLine, guest_image: GuestImage) -> None:
    process = command.start(*run_arguments(guest_image, "quiet", "--console", "pty"))
    assert process.stderr is not None
    path = read_until(process.stderr, r"^console: (/dev/pts/\d+)$")[1]
    line = Line(path)
    line.expect(SHELL)
    line.type(b"echo $((6 * 7))\n")
    line.expect(rb"\r\n42\r\n")
    line.close()
    # Nobody is there for a while; what was printed meanwhile is kept.
    assert process.poll() is None
    line = Line(path)
    line.type(b"echo ba''ck; poweroff -f\n")
    line.expect(rb"\r\nback\r\n")
    ended = command.finish(process)
    line.close()
    assert (ended.status, ended.stdout) == (0, "")
    assert not Path(path).exists() or Path(path).stat().st_nlink == 1


def test_input_from_a_pipe_is_typed_and_its_end_ends_nothing(command: CommandLine, guest_image: GuestImage) -> None:
    script = command.current / "script"
    script.write_text("echo $((6 * 7))\nsleep 0.3\necho do''ne\nexit\n")
    with script.open() as stdin:
        ended = command.run(*run_arguments(guest_image), stdin=stdin)
    assert ended.status == 0
    assert "\n42\n" in ended.stdout
    assert "\ndone\n" in ended.stdout


# -- names and signals -------------------------------------------------------------------------------------------------


def test_second_machine_of_a_name_is_refused_while_the_first_runs(
    command: CommandLine, guest_image: GuestImage
) -> None:
    console = command.current / "console.txt"
    arguments = run_arguments(guest_image, "", "--name", "web", "--console", f"file:{console}")
    first = command.start(*arguments)
    wait_for_text(console, BANNER)
    second = command.run(*run_arguments(guest_image, "", "--name", "web", "--console", "none"))
    assert (second.status, second.stdout) == (2, "")
    assert second.complaint == (
        f"--name web: a VM of this name is running (process {first.pid}); choose another name, or stop it"
    )
    other = command.run(*run_arguments(guest_image, "", "--name", "web2", "--console", "none", "--timeout", "0.1"))
    assert other.status == 124
    assert first.poll() is None
    first.terminate()
    command.finish(first)
    assert command.run(*run_arguments(guest_image, "", "--name", "web", "--timeout", "0.1")).status == 124


@pytest.mark.parametrize("console", ["stdio", "file"])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=str
)
def test_signal_in_the_middle_ends_it_and_leaves_nothing(
    command: CommandLine, guest_image: GuestImage, number: signal.Signals, status: int, console: str
) -> None:
    output = command.current / "output"
    where = f"file:{output}" if console == "file" else "stdio"
    with (command.current / "stdout").open("wb") as stdout:
        process = command.start(*run_arguments(guest_image, "", "--name", "web", "--console", where), stdout=stdout)
        wait_for_text(output if console == "file" else command.current / "stdout", BANNER)
        assert len(command.left_behind()) == 3, "a process, the lock of its name, and its node"
        process.send_signal(number)
        ended = command.finish(process, 15)
    assert ended.status == status, ended
    assert ended.complaint
    assert command.left_behind() == []


def test_signal_while_it_starts_ends_it_too(command: CommandLine, guest_image: GuestImage) -> None:
    """At any time from the first instruction on: by the signal, or in order."""
    for delay in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6):
        process = command.start(*run_arguments(guest_image, "", "--name", "web", "--console", "none"))
        time.sleep(delay)
        process.terminate()
        ended = command.finish(process, 15)
        assert ended.status in (143, -signal.SIGTERM)
        assert "Traceback" not in ended.stderr
        assert [each for each in command.left_behind() if each.startswith("process")] == []
    # A lock file that a killed process left locks nothing, and goes with the next use of the name.
    assert command.run(*run_arguments(guest_image, "", "--name", "web", "--timeout", "0.1")).status == 124


def test_killed_machine_s_name_is_free_at_once(command: CommandLine, guest_image: GuestImage) -> None:
    console = command.current / "console.txt"
    process = command.start(*run_arguments(guest_image, "", "--name", "web", "--console", f"file:{console}"))
    wait_for_text(console, BANNER)
    process.kill()
    assert command.finish(process).status == -signal.SIGKILL
    assert [each for each in command.left_behind() if each.startswith("process")] == []
    again = command.run(*run_arguments(guest_image, "", "--name", "web", "--console", "none", "--timeout", "0.1"))
    assert again.status == 124


def test_reader_of_the_output_that_goes_ends_it(command: CommandLine, guest_image: GuestImage) -> None:
    process = command.start(*run_arguments(guest_image, ""))
    assert process.stdout is not None
    read_until(process.stdout, BANNER)
    process.stdout.close()
    process.stdout = None
    assert process.wait(15) == 129
    assert command.finish(process).complaint.startswith("stopped: the terminal was closed")


@pytest.mark.parametrize("descriptors", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_standard_descriptors_that_are_closed_do_no_harm(
    command: CommandLine, guest_image: GuestImage, descriptors: str
) -> None:
    """A file that is opened then must not be taken for one of them."""
    console = command.current / "console.txt"
    arguments = run_arguments(guest_image, "quiet pyhyve.tour", "--console", f"file:{console}")
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {descriptors}', "sh", *command.command(arguments)],
        env=command.environment,
        cwd=command.current,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done
    assert "Traceback" not in done.stderr
    text = console.read_text()
    assert "--- the tour is over" in text
    assert "pyhyve: powered-off" not in text


# -- on a terminal -----------------------------------------------------------------------------------------------------


def test_shell_on_a_terminal_takes_keys_and_gives_the_terminal_back(
    command: CommandLine, guest_image: GuestImage
) -> None:
    terminal = command.on_terminal("demo")
    terminal.expect(rb"pyhyve: Ctrl-A x quits, Ctrl-A h helps\r\n")
    terminal.expect(SHELL)
    assert terminal.is_raw
    terminal.type(b"echo $((6 * 7))\r")
    terminal.expect(rb"\r\n42\r\n")
    # Ctrl-C is the guest's.
    terminal.type(b"sleep 100; echo sta''tus $?\r")
    terminal.expect(rb"echo sta''tus \$\?\r\n")
    time.sleep(0.3)
    terminal.type(b"\x03")
    terminal.expect(rb"\^C")
    terminal.type(b"echo still ''here\r")
    terminal.expect(rb"\r\nstill here\r\n")
    terminal.type(b"\x01h")
    terminal.expect(rb"\r\nCtrl-A x +quit.*\r\nCtrl-A h +this help\r\n")
    assert terminal.process.poll() is None
    terminal.type(b"\x01x")
    assert terminal.wait() == 0
    assert terminal.is_restored
    assert b"pyhyve: stopped: the user left with Ctrl-A x (after " in terminal.seen


def test_guest_s_own_end_gives_the_terminal_back(command: CommandLine, guest_image: GuestImage) -> None:
    terminal = command.on_terminal("demo")
    terminal.expect(SHELL)
    terminal.type(b"exit\r")
    assert terminal.wait() == 0
    assert terminal.is_restored
    assert b"\r\npyhyve: powered-off (after " in terminal.seen


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=str
)
def test_signal_gives_the_terminal_back(
    command: CommandLine, guest_image: GuestImage, number: signal.Signals, status: int
) -> None:
    terminal = command.on_terminal(*run_arguments(guest_image, "", "--name", "web"))
    terminal.expect(BANNER.encode())
    assert terminal.is_raw
    os.kill(terminal.process.pid, number)
    assert terminal.wait(15) == status
    assert terminal.is_restored
    assert b"Traceback" not in terminal.seen
    assert command.left_behind() == []


def test_terminal_that_is_closed_ends_it(command: CommandLine, guest_image: GuestImage) -> None:
    terminal = command.on_terminal(*run_arguments(guest_image, "", "--name", "web"))
    terminal.expect(BANNER.encode())
    terminal.hang_up()
    assert terminal.process.wait(15) == 129
    assert command.left_behind() == []


def test_tour_may_be_had_on_a_terminal(command: CommandLine, guest_image: GuestImage) -> None:
    terminal = command.on_terminal("demo", "--tour", "--verbose")
    terminal.expect(BANNER.encode())
    terminal.expect(rb"--- the tour is over")
    assert terminal.wait() == 0
    assert terminal.is_restored


# -- pinning -----------------------------------------------------------------------------------------------------------


@pytest.mark.seed("S20")
def test_pinned_processors_run_where_they_may(command: CommandLine, guest_image: GuestImage) -> None:
    """By the threads' own affinity; repeated options accumulate, and a processor that is not named runs anywhere."""
    cpus = sorted(os.sched_getaffinity(0))
    first, last = cpus[0], cpus[-1]
    console = command.current / "console.txt"
    process = command.start(
        *run_arguments(guest_image, "", "--name", "web", "--console", f"file:{console}", "-c", 3),
        *("-p", f"0:{first}", "-p", f"1:{first}", "-p", f"1:{last}"),
    )
    wait_for_text(console, BANNER)
    allowed = {}
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        name = (task / "comm").read_text().strip()
        if name.startswith("vcpu"):
            allowed[name] = os.sched_getaffinity(int(task.name))
    assert allowed == {"vcpu0 web": {first}, "vcpu1 web": {first, last}, "vcpu2 web": set(cpus)}
    process.terminate()
    assert command.finish(process).status == 143


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_guest_at_its_prompt_costs_the_host_little_memory(command: CommandLine, guest_image: GuestImage) -> None:
    """A 256 MiB guest: under 64 MiB beyond what the guest touched."""
    terminal = command.on_terminal(*run_arguments(guest_image, "quiet", "-m", "256M"))
    terminal.expect(SHELL)
    status = Path(f"/proc/{terminal.process.pid}/status").read_text()
    resident = {name: int(kib) for name, kib in re.findall(r"^(Rss\w+):\s+(\d+) kB$", status, re.MULTILINE)}
    # The guest's memory is shared memory; the rest is the monitor's.
    assert 16 << 10 < resident["RssShmem"] < 256 << 10
    terminal.type(b"\x01x")
    assert terminal.wait() == 0
    assert resident["RssAnon"] < 64 << 10
