"""How a run ended, from what the monitor saw and what the guest said."""

import pytest

from pyhyve.bhyve.outcome import EXIT_STATUS, ConsoleWatch, Outcome, OutcomeKind, classify
from pyhyve.vmm.vm import Suspend, Suspended


class Said:
    """A console that is read along; `text` is what reached it, in the pieces in which it did."""

    def __init__(self, text=""):
        self.pieces = []
        self.panics = []
        self.idle = 0
        self.watch = ConsoleWatch(self.pieces.append, self.panics.append, self.began)
        for byte in text.encode():
            self.watch.write(bytes((byte,)))

    def began(self):
        self.idle += 1


PANIC = "[    1.5] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n"


@pytest.mark.parametrize(
    ("how", "said", "kind"),
    [
        (Suspend.POWEROFF, "", OutcomeKind.POWERED_OFF),
        (Suspend.RESET, "", OutcomeKind.REBOOTED),
        (Suspend.HALT, "[   1.0] reboot: System halted\r\n", OutcomeKind.HALTED),
        (Suspend.HALT, "", OutcomeKind.HUNG),
        (Suspend.HANG, "", OutcomeKind.HUNG),
        (Suspend.TRIPLE_FAULT, "", OutcomeKind.TRIPLE_FAULT),
        (Suspend.REQUEST, "", OutcomeKind.STOPPED),
        (Suspend.ERROR, PANIC, OutcomeKind.ERROR),
        (Suspend.RESET, PANIC, OutcomeKind.PANICKED),
        (Suspend.HANG, PANIC, OutcomeKind.PANICKED),
        (Suspend.HALT, PANIC, OutcomeKind.PANICKED),
        (Suspend.REQUEST, PANIC, OutcomeKind.PANICKED),
        (Suspend.EXIT, PANIC, OutcomeKind.EXITED),
    ],
)
def test_kind(how, said, kind):
    assert classify(Suspended(how, 0, "what"), Said(said).watch, 1.0).kind is kind


def test_timed_out_unless_the_guest_had_panicked():
    stopped = Suspended(Suspend.REQUEST, -1, "stopped after 3 s")
    assert classify(stopped, Said().watch, 3.0, timed_out=True) == Outcome(
        OutcomeKind.TIMED_OUT, "stopped after 3 s", 3.0
    )
    assert classify(stopped, Said(PANIC).watch, 3.0, timed_out=True).kind is OutcomeKind.PANICKED


@pytest.mark.parametrize(("value", "status"), [(0, 1), (0x10, 0x21), (0x7F, 0xFF), (0x1_0003, 7)])
def test_guest_chooses_its_status_at_the_exit_port(value, status):
    outcome = classify(Suspended(Suspend.EXIT, 0, "the guest wrote", value), Said().watch, 1.0)
    assert (outcome.exit_status, outcome.value, outcome.ok) == (status, value, True)
    assert outcome.to_json()["value"] == value


def test_panic_line_is_the_guests_own():
    outcome = classify(Suspended(Suspend.RESET), Said("boot\n" + PANIC).watch, 2.0)
    assert outcome.detail == "VFS: Unable to mount root fs"
    assert str(outcome) == "panicked: VFS: Unable to mount root fs (after 2.00 s)"


def test_panic_is_told_when_it_begins_and_when_it_ends():
    said = Said(PANIC + "[ 1.6] CPU: 0 PID: 1\n[ 1.7] ---[ end Kernel panic - not syncing: VFS ]---\n")
    assert said.panics == [False, True]


def test_words_of_a_panic_in_other_text_are_none():
    said = Said("the words kernel panic in lower case\nKernel panic\n")
    assert said.watch.panic is None
    assert said.panics == []


def test_error_keeps_its_report_apart():
    outcome = classify(Suspended(Suspend.ERROR, 0, "ValueError: x\nTraceback\n  ..."), Said().watch, 0.5)
    assert (outcome.detail, outcome.report) == ("ValueError: x", "Traceback\n  ...")
    assert outcome.to_json()["report"] == "Traceback\n  ..."


def test_output_is_gathered_to_lines():
    said = Said("one\ntwo\nthr")
    assert said.pieces == [b"one\n", b"two\n"]
    assert said.idle == 3
    said.watch.flush()
    said.watch.flush()
    assert said.pieces[-1] == b"thr"
    said.watch.write(b"ee\n")
    assert said.watch.last_line == "three", "a line that was passed on in pieces is still read as one"


def test_endless_line_is_passed_on_and_forgotten():
    said = Said("x" * 100_000)
    said.watch.flush()
    assert sum(map(len, said.pieces)) == 100_000
    assert len(said.watch._line) <= 4096 + 512


def test_every_kind_has_its_own_exit_status():
    assert set(EXIT_STATUS) == set(OutcomeKind) - {OutcomeKind.EXITED}
    ended = {status for kind, status in EXIT_STATUS.items() if kind is not OutcomeKind.STOPPED}
    assert len(ended) == len(EXIT_STATUS) - 1
    assert 2 not in ended, "that is a user's error"


def test_json_says_all_of_it():
    assert Outcome(OutcomeKind.HUNG, "no exit in 20 s", 21.5).to_json() == {
        "outcome": "hung",
        "detail": "no exit in 20 s",
        "seconds": 21.5,
        "exit_status": 7,
    }
