"""The command line: one line and a status for what goes wrong, a typed outcome for what goes right."""

import json
import os
import signal
import struct
import subprocess
import sys
import time

import pytest

from pyhyve.base.errors import HostError
from pyhyve.cli import main as cli
from pyhyve.cpu import select

ENTRY = 0x100_0000
POWER_OFF = bytes.fromhex("ba04040000 b800340000 66ef")
SLEEP = bytes.fromhex("fb f4 ebfd")
READY = b"".join(b"\xba\xf8\x03\0\0\xb0" + bytes((c,)) + b"\xee" for c in b"ready\n")
COMMAND = (sys.executable, "-m", "pyhyve.cli.main")


def kernel_of(code):
    segment = struct.pack("<IIQQQQQQ", 1, 7, 64 + 56, ENTRY, ENTRY, len(code), 0x10000, 0x1000)
    ident = b"\x7fELF" + bytes((2, 1, 1, 0)) + bytes(8)
    return ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, 1, 0, 0, 0) + segment + code


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def kernel(tmp_path):
    try:
        select.processor("bt")
    except (HostError, ImportError) as error:
        pytest.skip(str(error))

    def make(code):
        path = tmp_path / "kernel"
        path.write_bytes(kernel_of(code))
        return str(path)

    return make


def run(capfd, *arguments):
    """Return (status, output, error output) of a command line."""
    try:
        status = cli.main(arguments)
    except SystemExit as ended:
        status = ended.code or 0
    captured = capfd.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["rum"],
            "rum: no such verb; did you mean 'run'?; there are run, demo, ls, ctl, trace, image, completion, version",
        ),
        (["--verion"], "--verion: unknown option; did you mean '--version'?; see 'pyhyve --help'"),
        (["run", "--kernal", "x"], "--kernal: unknown option; did you mean '--kernel'?; see 'pyhyve run --help'"),
        (["run", "--kern", "x"], "--kern: unknown option; did you mean '--kernel'?; see 'pyhyve run --help'"),
        (["run", "--zzz=1"], "--zzz: unknown option; see 'pyhyve run --help'"),
        (["run"], "--kernel: missing; name a kernel, or try 'pyhyve demo', which gets one"),
        (["run", "--kernel"], "--kernel: expected one argument; see 'pyhyve run --help'"),
        (["run", "--kernel", "x", "y"], "y: unexpected argument of run; see 'pyhyve run --help'"),
        (["run", "--kernel", "/nowhere/x"], "kernel /nowhere/x: no such file; check the path"),
        (["run", "--kernel", "x", "--processor", "kvn"], "--processor kvn: unknown; did you mean 'kvm'?"),
        (["run", "--kernel", "x", "-m", "lots"], "-m lots: not a size; write a number and K, M, G or T"),
        (["run", "--kernel", "x", "-m", "0"], "-m 0K: too little memory"),
        (["run", "--kernel", "x", "-m", "1M"], "-m 1M: too little memory"),
        (["run", "--kernel", "x", "-m", "900T"], "-m 900T: the host has"),
        (["run", "--kernel", "x", "-c", "two"], "-c two: not a number; write how many processors"),
        (["run", "--kernel", "x", "-c", "0"], "-c 0: a machine has 1 to 254 processors"),
        (["run", "--kernel", "x", "-p", "0"], "-p 0: not a pinning"),
        (["run", "--kernel", "x", "--timeout", "soon"], "--timeout soon: not a time; write a number of seconds"),
        (["run", "--kernel", "x", "--timeout", "nan"], "--timeout nan: not a time"),
        (["run", "--kernel", "x", "--hang", "-1"], "--hang -1: not a time"),
        (["run", "--kernel", "x", "--console", "stdo"], "--console: unknown console 'stdo'; did you mean 'stdio'?"),
        (["run", "--kernel", "x", "--name", "a/b"], "--name 'a/b': not a name"),
        (["image", "list", "x"], "image list: takes no version; see 'pyhyve image --help'"),
        (["image", "lst"], "action lst: unknown; did you mean 'list'?; there are fetch, list, remove"),
        (["image", "remove", "7"], "guest 7: not in the cache; the cache is empty"),
        (["completion", "tcsh"], "shell tcsh: unknown"),
        (["demo", "--memory", "?"], "-m ?: not a size"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_status_2(capfd, arguments, line):
    status, out, err = run(capfd, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith(f"pyhyve: {line}")
    assert err.count("\n") == 1


def test_help_and_version(capfd):
    status, out, _ = run(capfd, "--help")
    assert status == 0
    assert all(verb in out for verb in cli.VERBS)
    assert run(capfd, "--version") == (0, "pyhyve 0.1.0\n", "")
    status, out, _ = run(capfd, "run", "--help")
    assert status == 0
    for word in ("--kernel", "--initrd", "--append", "--cpus", "--memory", "--name", "--processor", "--console",
                 "--timeout", "--stats", "--json", "--kaslr", "exit status"):  # fmt: skip
        assert word in out
    status, out, _ = run(capfd)
    assert status == 2
    assert "verbs:" in out


def test_version_tells_which_processors_work(capfd):
    status, out, _ = run(capfd, "version")
    assert status == 0
    assert "\n  bt " in out
    assert "\n  kvm " in out


def test_help_imports_neither_machine_nor_decoder():
    code = (
        "import sys; from pyhyve.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('iced_x86', 'rich', 'elftools')"
        " or m.startswith(('pyhyve.vmm', 'pyhyve.bhyve', 'pyhyve.cpu'))]\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_run_ends_with_the_outcome_as_a_line(capfd, kernel):
    status, out, err = run(capfd, "run", "--kernel", kernel(READY + POWER_OFF), "-m", "32M", "--console", "stdio")
    assert status == 0
    assert out == "ready\n"
    assert err.startswith("pyhyve: powered-off (after ")
    assert err.count("\n") == 1


def test_json_is_the_last_line_and_carries_the_statistics(capfd, kernel):
    status, out, err = run(
        capfd, "run", "--kernel", kernel(b"\xf4\xfa\xf4" + POWER_OFF), "-m", "32M", "--json", "--stats", "--name", "n",
        "--timeout", "20",
    )  # fmt: skip
    assert err == ""
    document = json.loads(out.splitlines()[-1])
    assert status == document["exit_status"] == 7
    assert (document["name"], document["outcome"]) == ("n", "hung")
    assert document["statistics"]["exits"]["hlt"] == 1


def test_statistics_are_a_table_for_people(capfd, kernel):
    _, _, err = run(capfd, "run", "--kernel", kernel(POWER_OFF), "-m", "32M", "--stats", "--console", "none")
    for word in ("exits:", "  io  ", "guest seconds", "handler seconds", "resident bytes", "pyhyve: powered-off"):
        assert word in err


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (POWER_OFF, 0),
        (bytes.fromhex("baf90c0000 b006 ee"), 3),
        (bytes.fromhex("0f0b"), 5),
        (bytes.fromhex("faf4"), 7),
        (SLEEP, 124),
    ],
    ids=["power-off", "reset", "triple-fault", "hung", "timed-out"],
)
def test_exit_status_tells_the_outcome(capfd, kernel, code, status):
    arguments = ("run", "--kernel", kernel(code), "-m", "32M", "--console", "none", "--timeout", "1.5")
    assert run(capfd, *arguments)[0] == status


def test_console_goes_to_a_file(capfd, kernel, tmp_path):
    log = tmp_path / "log"
    assert run(capfd, "run", "--kernel", kernel(READY + POWER_OFF), "-m", "32M", "--console", f"file:{log}")[0] == 0
    assert log.read_bytes() == b"ready\n"


def start(*arguments):
    return subprocess.Popen(
        [*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("console", ["stdio", "none"])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_signal_ends_it_in_order(kernel, tmp_path, console, number, status):
    process = start("run", "--kernel", kernel(READY + SLEEP), "-m", "32M", "--console", console, "--name", "x")
    lock = tmp_path / "pyhyve" / "lock" / "x"
    if console == "stdio":
        assert process.stdout.readline() == b"ready\n"
    else:
        deadline = time.monotonic() + 20
        while not lock.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(1)
    assert lock.exists()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert b"Traceback" not in err
    assert err.count(b"\n") == 1
    assert not lock.exists(), "nothing is left behind"


LISTEN = bytes.fromhex("bab2000000b0a0ee ba02040000b80001000066ef")
"""ACPI on, and the power button enabled in PM1."""
OBEY = bytes.fromhex("ba0004000066edf6c40174f4 ba04040000b80034000066efebfe")
"""Wait for the button's status bit, then enter S5."""


def test_sigterm_presses_the_power_button_of_a_guest_that_listens(kernel):
    process = start("run", "--kernel", kernel(LISTEN + READY + OBEY), "-m", "32M")
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert b"pyhyve: powered-off" in err


@pytest.mark.parametrize("console", ["stdio", "file"])
def test_a_second_sigterm_ends_a_guest_that_did_not_obey(kernel, tmp_path, console):
    where = f"file:{tmp_path / 'out'}" if console == "file" else console
    process = start("run", "--kernel", kernel(LISTEN + READY + SLEEP), "-m", "32M", "--console", where)
    if console == "file":
        while not (tmp_path / "out").exists() or (tmp_path / "out").read_bytes() != b"ready\n":
            time.sleep(0.01)
    else:
        assert process.stdout.readline() == b"ready\n"
    process.terminate()
    assert process.stderr.readline() == b"pyhyve: pressed the guest's power button; a second SIGTERM ends it\n"
    assert process.poll() is None
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert b"a signal asked it to end" in err
    assert b"power button" not in err


def test_sigterm_ends_a_guest_that_does_not_listen_for_the_power_button(kernel):
    process = start("run", "--kernel", kernel(READY + SLEEP), "-m", "32M")
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert b"a signal asked it to end; the guest does not listen for the power button" in err


def test_killed_run_leaves_a_name_that_the_next_one_takes(capfd, kernel):
    path = kernel(READY + SLEEP)
    process = start("run", "--kernel", path, "-m", "32M", "--name", "x")
    assert process.stdout.readline() == b"ready\n"
    status, _, err = run(capfd, "run", "--kernel", path, "-m", "32M", "--name", "x", "--console", "none")
    assert status == 2
    assert err == (
        f"pyhyve: --name x: a VM of this name is running (process {process.pid}); choose another name, or stop it\n"
    )
    process.kill()
    process.communicate()
    arguments = ("run", "--kernel", kernel(POWER_OFF), "-m", "32M", "--name", "x", "--console", "none")
    assert run(capfd, *arguments)[0] == 0


def test_output_to_nobody_is_no_traceback():
    process = start("--help")
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait(20)
    assert b"Traceback" not in err


def test_image_list_of_an_empty_cache_is_empty(capfd):
    assert run(capfd, "image", "list") == (0, "", "")
    assert run(capfd, "image", "remove") == (0, "", "")


def test_demo_boots_the_guest_it_gets_and_shows_the_tour(capfd, guest_image, monkeypatch, kernel):
    monkeypatch.setattr("pyhyve.bhyve.boot.guestimage.get", lambda progress: guest_image)
    status, out, err = run(capfd, "demo", "--timeout", "120")
    assert status == 0
    assert "--- pyhyve: a tour of the guest" in out
    assert "the 1000th prime is 7919" in out
    assert "pyhyve: powered-off" in err
    assert os.isatty(0) or "Ctrl-A" not in err
