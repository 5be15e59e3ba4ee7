"""The runner that compares kvm-unit-tests: what it reads, and what it calls lost."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import kut
from kut import Result, missing

CONFIGURATION = """
# A comment.
[first]
file = first.flat
smp = 2
test_args = 'one "two three"'
qemu_params = -cpu max,-pcid,+umip,-nothing -m 2048
timeout = 30

[native]
file = first.flat
qemu_params = -cpu host

[not-built]
file = other.flat
"""


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "unittests.cfg").write_text(CONFIGURATION)
    (tmp_path / "first.flat").write_bytes(b"")
    return tmp_path


def test_tests_are_those_that_are_built(directory):
    first, native = kut.read_tests(directory)
    assert (first.name, first.cpus, first.memory, first.timeout) == ("first", 2, "2048", 30)
    assert first.arguments == 'one "two three"'
    assert not first.wants_kvm
    assert native.wants_kvm
    assert native.memory == "128M"


def test_commands_are_equal_in_what_both_can_be_told(directory):
    test = kut.read_tests(directory)[0]
    tcg, ours = kut.tcg_command(test, Path("env")), kut.pyhyve_command(test, Path("env"))
    for command, pairs in (
        (tcg, {"-smp": "2", "-m": "2048", "-append": test.arguments}),
        (ours, {"-c": "2", "-m": "2048", "--cpu-feature": "pcid=off"}),
    ):
        for option, value in pairs.items():
            assert command[len(command) - command[::-1].index(option)] == value
    assert f"--append={test.arguments}" in ours


def test_verdicts_are_read_with_equal_names_told_apart():
    text = "noise\nPASS: a\nFAIL: b\nPASS: a\nSKIP: c (why)\n"
    assert kut.subtests(text) == {"a": "PASS", "b": "FAIL", "a #2": "PASS", "c (why)": "SKIP"}


def result(status="ok", **tests):
    return Result(status, 1.0, {name.replace("_", " "): verdict for name, verdict in tests.items()})


@pytest.mark.parametrize(
    ("tcg", "ours", "lost"),
    [
        (result(a="PASS", b="FAIL"), result(a="PASS", b="PASS"), []),
        (result(a="PASS"), result("failed", a="FAIL"), ["a"]),
        (result(a="PASS"), result(b="PASS"), []),
        (result(a="PASS"), result("failed", b="FAIL"), ["(ends with failed)"]),
        (result(a="PASS"), result("timeout", b="PASS"), ["a"]),
        (result(got_0x10="PASS"), result(got_0x20="PASS"), []),
        (result(a="PASS"), result("skipped"), ["a"]),
        (result(), result("status 5"), ["(ends with status 5)"]),
        (result("not run"), result("status 5"), []),
    ],
    ids=["more", "fails", "not asked", "ends otherwise", "ended early", "number", "skipped", "no subtests", "not run"],
)
def test_lost_is_what_passes_there_and_not_here(tcg, ours, lost):
    assert missing(tcg, ours) == lost


def test_run_tells_how_it_ended(tmp_path):
    command = [sys.executable, "-c", "print('PASS: x'); raise SystemExit(3)"]
    ended = kut.run(command, 20)
    assert (ended.status, ended.tests) == ("failed", {"x": "PASS"})
    assert kut.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.2).status == "timeout"


def test_table_has_a_row_for_each_test():
    records = {
        "first": {
            "lost": ["a"],
            "tcg": {"status": "ok", "tests": {"a": "PASS"}},
            "pyhyve": {"status": "failed", "tests": {"a": "FAIL"}},
        }
    }
    assert kut.table(records).splitlines()[2] == "| first | 1/0/0 ok | 0/1/0 failed | 1 |"
    assert kut.Test("x", Path("x")).memory == "128M"


def test_a_bug_of_the_monitors_is_no_pass_though_its_exit_status_is_the_same():
    ended = kut.run(
        [sys.executable, "-c", "print('PASS: one'); print('pyhyve: error: a bug'); raise SystemExit(1)"], 20
    )
    assert ended.status == "error"
