"""The console for programs."""

import re
import threading
import time

import pytest

from pyhyve.bhyve.console import CaptureConsole, ExpectClosed, ExpectTimeout


def test_expect_finds_what_is_there_and_goes_on_behind_it() -> None:
    console = CaptureConsole()
    console.write(b"one two one three")
    assert console.expect("one", 0).start() == 0
    assert console.expect("one", 0).group() == "one"
    with pytest.raises(ExpectTimeout):
        console.expect("one", 0)
    console.expect("three", 0)


def test_a_str_is_literal_and_a_compiled_pattern_is_not() -> None:
    console = CaptureConsole()
    console.write(b"[  0.12] pid=42 a.c")
    console.expect("[  0.12]", 0)
    assert console.expect(re.compile(r"pid=(\d+)"), 0).group(1) == "42"
    with pytest.raises(ExpectTimeout):
        console.expect("a?c", 0)


def test_expect_waits_for_a_guest_that_prints_a_byte_at_a_time() -> None:
    console = CaptureConsole()

    def guest() -> None:
        for byte in b"Linux version 6.1\r\n~ # ":
            console.write(bytes((byte,)))
            time.sleep(0.001)

    thread = threading.Thread(target=guest)
    thread.start()
    console.expect("~ # ", 10)
    thread.join()


def test_a_timeout_shows_the_end_of_the_output() -> None:
    console = CaptureConsole()
    console.write(b"x" * 5000 + b"\r\nKernel panic")
    started = time.monotonic()
    with pytest.raises(ExpectTimeout, match=r"'login:' did not come in 0\.05 s; the output ends:(.|\n)*Kernel panic$"):
        console.expect("login:", 0.05)
    assert time.monotonic() - started < 5
    with pytest.raises(ExpectTimeout, match="no output"):
        CaptureConsole().expect("x", 0)


def test_the_end_of_the_vm_ends_the_waiting() -> None:
    console = CaptureConsole()
    console.start(lambda data: None, lambda reason: None)
    threading.Timer(0.05, console.stop).start()
    with pytest.raises(ExpectClosed, match="VM ended before it printed 'never'"):
        console.expect("never", 60)


def test_what_came_before_the_end_is_still_found() -> None:
    console = CaptureConsole()
    console.write(b"bye")
    console.stop()
    console.expect("bye", 0)


def test_memory_is_bounded_and_keeps_the_end() -> None:
    console = CaptureConsole(limit=1000)
    for n in range(1000):
        console.write(b"line %04d\n" % n)
    assert len(console.output) <= 1000
    assert console.output.endswith("line 0999\n")
    console.expect("line 0998", 0)


def test_output_is_text_whatever_the_guest_writes() -> None:
    console = CaptureConsole()
    console.write("é\xff".encode("latin-1") + "grün ".encode() + b"\xe2\x82")
    assert console.output == "\ufffd\ufffdgrün \ufffd"
    console.expect("grün", 0)
    console.write(b"\xac!")  # the rest of a character that the last search found torn
    assert console.expect(re.compile("€!"), 0).group() == "€!"


def test_input_is_delivered_also_when_sent_before_the_start() -> None:
    console = CaptureConsole()
    console.send("early é\n")
    got = bytearray()
    console.start(got.extend, lambda reason: None)
    console.send(b"\x01x")
    assert got == "early é\n\x01x".encode()
    console.stop()
    console.send("late")
    assert not got.endswith(b"late")
