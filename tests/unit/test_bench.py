"""The benchmark's arithmetic, its reading of a guest's console, and that nothing of it is left behind."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import iced_x86
import pytest
import rich.console

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import console  # noqa: E402 - these are found by the path above
import devices  # noqa: E402
import engine  # noqa: E402
import guests  # noqa: E402
import host  # noqa: E402
import interrupts  # noqa: E402
import many  # noqa: E402
import results  # noqa: E402
import sides  # noqa: E402
from console import Measured, parse, workload_started  # noqa: E402
from processes import BenchError, Finished, Line, Signals, run_to_end  # noqa: E402
from results import Samples, Speedups, geometric_mean, make_row, report, write_json  # noqa: E402
from run import parse_arguments  # noqa: E402

from pyhyve.bhyve.boot.multiboot import find_header  # noqa: E402

DIGEST = "0123456789abcdef0123456789abcdef"
MACHINE = dict.fromkeys(("date", "cpu", "cpus", "kernel", "guest", "qemu", "python", "load"), "?")


def lines(*texts: str, step: float = 1.0) -> list[Line]:
    return [Line(index * step, text) for index, text in enumerate(texts)]


# -- the console -------------------------------------------------------------------------------------------------------


def test_times_and_digests_are_read_whatever_firmware_left_on_the_line() -> None:
    read = parse(
        lines(
            "SeaBIOS (version 1.16.2)\r",
            "Booting from ROM..\x1bc\x1b[?7l\x1b[2JRUN dd\r",
            "BENCH dd 1.000100\r",
            f"CHECK dd {DIGEST}\r",
            "[   38.288437] reboot: Power down\r",
        ),
        ["dd"],
    )
    assert read == {"dd": Measured(1.0001, DIGEST)}


@pytest.mark.parametrize(
    ("texts", "fault"),
    [
        (["RUN dd", "BENCH dd 1.000000"], "dd: did not end"),
        (["RUN dd", f"CHECK dd {DIGEST}"], "dd: did not end"),
        (["RUN dd", "BENCH dd 1.00", "BENCH dd 1.00", f"CHECK dd {DIGEST}"], "dd: two lines of BENCH"),
        (["RUN dd", "BENCH dd 0.000000", f"CHECK dd {DIGEST}"], "dd: took 0 s by the guest's clock"),
        (["RUN dd", "BENCH dd 0.010000", f"CHECK dd {DIGEST}"], "dd: took 0.010 s by the guest's clock, 1.000 s by"),
        (["BENCH dd 1.000000", f"CHECK dd {DIGEST}"], "dd: took 1.000 s by the guest's clock, 0.000 s by"),
        (["RUN dd", "BENCH dd 1.000000", f"CHECK dd {DIGEST[:-1]}"], "dd: did not end"),
        (["RUN gzip", "BENCH gzip 1.000000", f"CHECK gzip {DIGEST}"], "dd: did not end"),
    ],
)
def test_a_workload_that_is_not_whole_is_an_error(texts: list[str], fault: str) -> None:
    with pytest.raises(BenchError, match=re.escape(fault)):
        parse(lines(*texts), ["dd"])


def test_a_workload_that_nobody_asked_for_is_an_error() -> None:
    texts = [text for name in ("dd", "awk") for text in (f"RUN {name}", f"BENCH {name} 1.0", f"CHECK {name} {DIGEST}")]
    with pytest.raises(BenchError, match="awk: ran"):
        parse(lines(*texts), ["dd"])


def test_the_start_of_a_workload_is_seen_for_the_progress_line() -> None:
    assert workload_started("\x1b[2JRUN sort\r") == "sort"
    assert workload_started("BENCH sort 1.0") is None
    assert workload_started("TRUN sort") is None


def test_a_boot_counts_only_if_it_reached_user_space_and_powered_off() -> None:
    good = [console.NOTHING_RUN + "\r", "[    2.083650] reboot: Power down\r"]
    console.check_boot(Finished(1.0, 0, lines(*good)))
    for status, texts, fault in [
        (0, good[1:], "user space"),
        (0, good[:1], "did not power off"),
        (7, good, "exit status 7"),
    ]:
        with pytest.raises(BenchError, match=fault):
            console.check_boot(Finished(1.0, status, lines(*texts)))


# -- the arithmetic ----------------------------------------------------------------------------------------------------


def eight(pyhyve: float = 1.0, qemu: float = 2.0, native: float = 0.5) -> dict[str, Samples]:
    return {name: Samples([pyhyve], [qemu], [native]) for name in results.WORKLOADS}


def test_a_row_is_made_of_medians() -> None:
    row = make_row("dd", Samples([3.0, 1.0, 2.0], [8.0, 4.0, 1.0], [0.5, 0.25, 9.0]))
    assert (row.pyhyve, row.qemu, row.native) == (2.0, 4.0, 0.5)
    assert (row.vs_qemu, row.vs_native, row.runs) == (0.5, 4.0, 3)


def test_a_boot_has_no_native_side() -> None:
    row = make_row("boot", Samples([1.0], [2.0]))
    assert (row.native, row.vs_native) == (None, None)


@pytest.mark.parametrize("samples", [Samples(), Samples([1.0], [2.0]), Samples([1.0], [1.0, 2.0], [1.0])])
def test_a_side_that_was_measured_less_often_is_an_error(samples: Samples) -> None:
    with pytest.raises(ValueError, match="dd: measured"):
        make_row("dd", samples)


def test_the_geometric_mean_is_over_the_eight_workloads_without_the_boot() -> None:
    samples = eight() | {"boot": Samples([100.0], [1.0])}
    samples["awk"] = Samples([256.0], [2.0], [1.0])
    rows = [make_row(name, each) for name, each in samples.items()]
    # Seven of 1/2 and one of 128: (2**-7 * 2**7) ** (1/8).
    assert geometric_mean(rows, "vs_qemu") == pytest.approx(1.0)
    # Seven of 2 and one of 256.
    assert geometric_mean(rows, "vs_native") == pytest.approx((2**7 * 256) ** (1 / 8))


def test_there_is_no_geometric_mean_of_fewer() -> None:
    samples = eight()
    del samples["sort"]
    rows = [make_row(name, each) for name, each in samples.items()]
    assert geometric_mean(rows, "vs_qemu") is None
    assert report({}, rows)["geomean"] == {"vs_qemu": None, "vs_native": None}


def test_the_json_has_the_documented_form(tmp_path: Path) -> None:
    samples = {"boot": Samples([1.5], [2.0])} | eight() | {"fp": Samples([1.0], [10.0], [0.5])}
    path = tmp_path / "out" / "latest.json"
    write_json(path, report({"cpu": "a processor"}, [make_row(name, each) for name, each in samples.items()]))
    document = json.loads(path.read_text())
    assert list(document) == ["machine", "rows", "geomean", "parallel", "targets"]
    assert document["machine"] == {"cpu": "a processor"}
    assert [row["name"] for row in document["rows"]] == [name for name in results.NAMES if name != results.PARALLEL]
    assert document["parallel"] is None
    assert document["rows"][0] == {
        "name": "boot", "pyhyve": 1.5, "qemu": 2.0, "native": None, "vs_qemu": 0.75, "vs_native": None, "runs": 1
    }  # fmt: skip
    assert document["rows"][1] == {
        "name": "sha256sum", "pyhyve": 1.0, "qemu": 2.0, "native": 0.5, "vs_qemu": 0.5, "vs_native": 2.0, "runs": 1
    }  # fmt: skip
    assert document["geomean"] == {"vs_qemu": 0.5, "vs_native": 2.0}
    assert os.listdir(path.parent) == ["latest.json"]


def test_floating_point_has_no_part_in_the_geometric_mean() -> None:
    rows = [make_row(name, each) for name, each in (eight() | {"fp": Samples([1.0], [100.0], [1.0])}).items()]
    assert geometric_mean(rows, "vs_qemu") == pytest.approx(0.5)


def test_a_speedup_is_the_median_of_the_runs_own() -> None:
    speedups = Speedups()
    for serial, parallel in [(3.0, 2.0), (4.0, 2.0), (9.0, 5.0)]:
        for side in results.SIDES:
            speedups.add(side, serial, parallel)
    assert speedups.of("pyhyve") == pytest.approx(1.8)
    assert speedups.to_json()["qemu"] == {"serial": 4.0, "parallel": 2.0, "speedup": 1.8}


def test_targets_are_shown_beside_what_was_measured() -> None:
    samples = {"boot": Samples([1.5], [2.0])} | eight() | {"fp": Samples([1.0], [10.0], [0.5])}
    rows = [make_row(name, each) for name, each in samples.items()]
    speedups = Speedups()
    for side in results.SIDES:
        speedups.add(side, 3.0, 2.0)
    console_ = rich.console.Console(width=100, file=io.StringIO())
    console_.print(results.table(rows, samples, speedups))
    drawn = console_.file.getvalue()  # type: ignore[attr-defined]
    for name, verdict in [("boot", "≤0.6 missed"), ("dd", "≤0.5 met"), ("fp", "≤0.1 met"), ("parallel", "≥1.7 missed")]:
        assert re.search(rf"{name} .*{re.escape(verdict)}", drawn), drawn
    assert "≤0.2 missed" in drawn
    assert "vs native: ≤3 met" in drawn
    text = results.markdown(report(MACHINE, rows, speedups))
    assert "| fp | 1.000 | 10.000 | 0.500 | 0.10 | ≤ 0.1 | 2.00 | 1 |" in text
    assert "pyhyve 1.50 times as fast" in text


def test_the_table_of_the_documentation_is_made_of_the_json() -> None:
    rows = [make_row(name, each) for name, each in ({"boot": Samples([1.5], [2.0])} | eight()).items()]
    text = results.markdown(report(MACHINE, rows)).splitlines()
    assert text[4] == "| boot | 1.500 | 2.000 | - | 0.75 | ≤ 0.6 | - | 1 |"
    assert text[5] == "| sha256sum | 1.000 | 2.000 | 0.500 | 0.50 | ≤ 0.5 | 2.00 | 1 |"
    assert text[-1] == "| **geometric mean of the eight** | | | | 0.50 | ≤ 0.2 | 2.00 (target ≤ 3) | |"


def test_a_result_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "latest.json"
    write_json(path, {"rows": []})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"rows": [float("nan")]})
    assert json.loads(path.read_text()) == {"rows": []}
    assert os.listdir(tmp_path) == ["latest.json"]


# -- what is put into guests -------------------------------------------------------------------------------------------


def test_without_a_compiler_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match=r"^fp: needs a C compiler; install it: sudo apt-get install gcc libc6-dev$"):
        guests.compile_static("fp", tmp_path)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_the_floating_point_program_computes_what_it_computed_before(tmp_path: Path) -> None:
    program = guests.compile_static("fp", tmp_path)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout.split() == [
        "mandelbrot", "41743c31b3b080dc", "nbody", "4089600971eab422",
        "matrix", "4121dfc4151dcd0c", "polynomial", "413610fb318198f9",
    ]  # fmt: skip


# -- what is asked for -------------------------------------------------------------------------------------------------


def test_everything_is_measured_five_times_unless_told_otherwise() -> None:
    options = parse_arguments([])
    assert (options.runs, options.names, options.as_json) == (5, results.NAMES, False)
    assert parse_arguments(["--quick"]).runs == 1
    assert parse_arguments(["--runs", "9"]).runs == 9
    assert parse_arguments(["--only", "sort,boot"]).names == ("boot", "sort")


@pytest.mark.parametrize(
    "words", [["--runs", "0"], ["--only", "quake"], ["--quick", "--runs", "2"], ["--timeout", "0"]]
)
def test_what_cannot_be_measured_is_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(words)
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


# -- processes ---------------------------------------------------------------------------------------------------------


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def test_a_program_is_timed_to_its_end_and_its_output_is_read_with_times() -> None:
    finished = run_to_end(shell("echo a; sleep 0.2; echo b >&2; sleep 0.2; printf c; exit 3"), timeout=30)
    assert finished.status == 3
    assert [line.text for line in finished.lines] == ["a", "b", "c"]
    assert finished.lines[1].at - finished.lines[0].at >= 0.19
    assert finished.seconds >= 0.39


def gone(pid: int) -> bool:
    """Whether a process has ended, within a moment."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_a_program_that_is_late_is_ended_with_all_that_it_started() -> None:
    with pytest.raises(BenchError, match=r"not at its end after 0\.5 s") as caught:
        run_to_end(shell("sleep 60 & echo $!; wait"), timeout=0.5)
    assert gone(int(caught.value.output))


def test_a_program_that_ignores_the_request_to_end_is_made_to() -> None:
    with pytest.raises(BenchError) as caught:
        run_to_end(shell("trap '' TERM; echo $$; while :; do sleep 1; done"), timeout=0.3)
    assert gone(int(caught.value.output))


def test_a_guest_that_panics_is_not_waited_for() -> None:
    with pytest.raises(BenchError, match="the guest panicked: Attempted to kill init"):
        run_to_end(shell("echo '[ 1.0] Kernel panic - not syncing: Attempted to kill init!'; sleep 60"), timeout=30)


def test_a_signal_ends_the_program_first_and_raises_then(tmp_path: Path) -> None:
    # In a process of its own: pytest has its own way with SIGINT.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from processes import Interrupted, run_to_end\n"
        "try:\n"
        "    run_to_end(['/bin/sh', '-c', 'echo $$; sleep 60'], 30, on_line=lambda text: print(text, flush=True))\n"
        "except Interrupted as interrupted:\n"
        "    print('interrupted', interrupted.number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(BENCH)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == f"interrupted {int(signal.SIGINT)}\n"
    assert gone(pid)


def test_signal_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction", ["in", "out"])
def test_the_port_loop_touches_the_device_between_two_marks(instruction: str) -> None:
    code = devices.port_loop(instruction, 1000)
    decoded = list(iced_x86.Decoder(64, code, ip=0x1000))
    text = [f"{each}" for each in decoded]
    assert text == [
        "mov edx,200h", "out dx,al", "mov edx,300h", "mov ecx,3E8h",
        "in al,dx" if instruction == "in" else "out dx,al", "dec ecx", f"jne short {decoded[4].ip:016X}h",
        "mov edx,200h", "out dx,al", "cli", "hlt",
    ]  # fmt: skip


def test_guest_memory_is_told_from_the_rest() -> None:
    smaps = """\
00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/python3.11
Size:                328 kB
Rss:                 300 kB
Pss:                 200 kB
Pss_Dirty:             4 kB
7f0000000000-7f0010000000 rw-s 00000000 00:01 4099 /memfd:pyhyve-ram (deleted)
Rss:               40960 kB
Pss:               40960 kB
7f0010000000-7f0010100000 r-xs 00000000 00:01 4100 /memfd:pyhyve-code (deleted)
Pss:                1024 kB
"""
    assert devices.mapped_memory(smaps) == (40960 << 10, 1224 << 10)


def test_a_figure_says_whether_its_target_is_reached() -> None:
    rate = devices.Figure("ports", 250_000.0, "1/s", 200_000, True, 5)
    idle = devices.Figure("idle", 2.5, "% of a core", 2.0, False, 1)
    assert (rate.reached, idle.reached) == (True, False)
    assert devices.report({"cpus": 2}, [idle]) == {
        "machine": {"cpus": 2},
        "rows": [
            {
                "name": "idle", "value": 2.5, "unit": "% of a core", "target": 2.0, "larger": False, "runs": 1,
                "reached": False,
            }
        ],
    }  # fmt: skip


def test_processor_time_is_that_of_all_threads() -> None:
    before = host.cpu_seconds(os.getpid())
    start = time.thread_time()
    while time.thread_time() - start < 0.05:
        pass
    assert 0.04 < host.cpu_seconds(os.getpid()) - before < 5


# -- the engine --------------------------------------------------------------------------------------------------------


def engine_lines(seconds: float, **changed: str) -> list[Line]:
    """What the engine's guest prints, on a processor of 1 GHz: 10 operations of each kind, 1,000 cycles in all."""
    texts = {name: f"M {name} 10 1000\r" for name in (*engine.NAMES, "wait")} | {"wait": "M wait 10 400\r"} | changed
    cycles = round(seconds * 1e9)
    return [
        Line(1.0, "SeaBIOS\x1b[2JSTART\r"),
        *(Line(1.0, text) for text in texts.values()),
        Line(3.0, f"END {cycles}\r"),
    ]


def test_an_operation_takes_its_part_of_the_loop_and_halting_is_taken_off() -> None:
    measured = engine.parse(Finished(4.0, 33, engine_lines(2.0)), 1e9)
    assert measured["syscall"] == pytest.approx(100.0)
    assert measured["ipi_halted"] == pytest.approx(60.0)


@pytest.mark.parametrize(
    ("status", "seconds", "changed", "fault"),
    [
        (33, 2.6, {}, "2.600 s by the guest's clock, 2.000 s by the host's"),
        (1, 2.0, {}, "did not get to its end (exit status 1)"),
        (33, 2.0, {"syscall": ""}, "syscall: not measured"),
        (33, 2.0, {"syscall": "UNEXPECTED exception 6 0"}, "something unexpected: UNEXPECTED exception 6 0"),
    ],
)
def test_a_guest_of_the_engine_that_is_not_whole_is_an_error(
    status: int, seconds: float, changed: dict[str, str], fault: str
) -> None:
    with pytest.raises(BenchError, match=re.escape(fault)):
        engine.parse(Finished(4.0, status, engine_lines(seconds, **changed)), 1e9)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc, which compiles the guest, is not installed")
@pytest.mark.parametrize("name", ["engine", "interrupts"])
def test_a_guest_without_an_operating_system_is_a_multiboot_image(name: str, tmp_path: Path) -> None:
    header = find_header(guests.compile_flat(name, tmp_path).read_bytes())
    assert header is not None
    assert (header.offset, header.load_addr, header.header_addr) == (0, 0x100000, 0x100000)


@pytest.mark.parametrize(("title", "names"), [("Single operations", engine.NAMES), ("Interrupts", interrupts.NAMES)])
def test_what_such_a_guest_measures_is_documented(title: str, names: Sequence[str]) -> None:
    text = (BENCH.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    section = text.partition(f"## {title}")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (\w+) \| [\d,.]+ \| (?:[\d,.]+|-) \|", section, re.MULTILINE) == list(names)


def test_a_tick_takes_its_part_of_the_processor_time_between_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = iter([1.0, 1.5])
    monkeypatch.setattr(host, "cpu_seconds", lambda pid: next(spent))
    meter = interrupts.TickMeter()
    meter.start(1)
    for text in ("T tick_pit\r", "M eoi 1 5", "D tick_pit 1000\r"):
        meter.line(text)
    assert meter.nanoseconds == {"tick_pit": pytest.approx(500_000.0)}


def test_what_a_side_lacks_is_left_out() -> None:
    row = sides.Row("eoi_x2apic", 100.0, None)
    assert row.to_json() == {"name": "eoi_x2apic", "pyhyve_ns": 100.0, "qemu_ns": None, "vs_qemu": None}
    assert sides.markdown([row], {"eoi_x2apic": "what"}).splitlines()[-1] == "| eoi_x2apic | 100.0 | - | - | what |"


# -- many guests -------------------------------------------------------------------------------------------------------


def test_guests_are_waited_for_until_each_is_at_its_prompt() -> None:
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        started = many.Guests(stack)
        for _ in range(3):
            started.start(shell("printf 'boot\\nroot@pyhyve:~\033[0m# '; sleep 60"))
        started.await_prompts(signals, 20)
        pids = [process.pid for process in started.processes]
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize(
    ("script", "fault"), [("echo no", "ended before its prompt"), ("sleep 60", "1 guests are not")]
)
def test_a_guest_that_does_not_get_to_its_prompt_is_an_error(script: str, fault: str) -> None:
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        started = many.Guests(stack)
        started.start(shell(script))
        with pytest.raises(BenchError, match=fault):
            started.await_prompts(signals, 1)
