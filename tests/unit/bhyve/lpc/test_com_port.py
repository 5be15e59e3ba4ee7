"""UART and console, wired."""

import threading

from pyhyve.base.fakes import FakePin
from pyhyve.bhyve.console import CaptureConsole
from pyhyve.bhyve.lpc import uart as chip
from pyhyve.bhyve.lpc.com import BACKLOG_LIMIT, ComPort


def wired() -> tuple[ComPort, CaptureConsole]:
    console = CaptureConsole()
    port = ComPort(FakePin(), console)
    console.start(port.receive, lambda reason: None)
    return port, console


def listen(port: ComPort) -> None:
    port.write(chip.FCR, 1, chip.FCR_ENABLE)
    port.write(chip.IER, 1, chip.IER_RX_DATA)


def read_all(port: ComPort) -> bytes:
    out = bytearray()
    while port.read(chip.LSR, 1) & chip.LSR_DATA_READY:
        out.append(port.read(chip.RBR, 1))
    return bytes(out)


def test_output_reaches_the_console() -> None:
    port, console = wired()
    for byte in b"login:":
        port.write(chip.THR, 1, byte)
    assert console.output == "login:"


def test_nothing_typed_is_lost_when_it_exceeds_the_fifo() -> None:
    port, console = wired()
    listen(port)
    typed = bytes(range(256)) * 4
    console.send(typed)
    assert read_all(port) == typed
    assert not port.read(chip.LSR, 1) & chip.LSR_OVERRUN


def test_what_is_typed_before_the_guest_listens_survives_its_opening_of_the_port() -> None:
    port, console = wired()
    console.send(b"uname -a\n")
    port.write(chip.FCR, 1, chip.FCR_ENABLE | chip.FCR_RX_RESET)
    port.read(chip.RBR, 1)
    listen(port)
    assert read_all(port) == b"uname -a\n"


def test_what_a_driver_flushes_when_it_opens_the_port_comes_again() -> None:
    """Linux takes receive interrupts first, and then turns the FIFO on, which empties it."""
    port, console = wired()
    console.send(b"uname -a\n")
    for _ in range(2):
        port.write(chip.IER, 1, chip.IER_RX_DATA)
        port.write(chip.FCR, 1, chip.FCR_ENABLE)
        port.write(chip.FCR, 1, chip.FCR_ENABLE | chip.FCR_RX_RESET)
        port.write(chip.FCR, 1, 0)
        port.write(chip.IER, 1, 0)
    listen(port)
    assert read_all(port) == b"uname -a\n"


def test_what_the_guest_sent_itself_in_loopback_does_not_come_again() -> None:
    port, _ = wired()
    listen(port)
    port.write(chip.MCR, 1, chip.MCR_LOOPBACK)
    port.write(chip.THR, 1, 0x55)
    port.write(chip.MCR, 1, 0)
    port.write(chip.FCR, 1, chip.FCR_ENABLE | chip.FCR_RX_RESET)
    assert read_all(port) == b""


def test_a_source_faster_than_the_guest_waits_until_the_port_is_closed() -> None:
    port, _ = wired()
    port.receive(bytes(BACKLOG_LIMIT))
    waiter = threading.Thread(target=port.receive, args=(b"more",))
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    port.close()
    waiter.join(5)
    assert not waiter.is_alive()


def test_a_source_that_waits_goes_on_when_the_guest_reads() -> None:
    port, _ = wired()
    port.receive(bytes(BACKLOG_LIMIT))
    waiter = threading.Thread(target=port.receive, args=(b"more",))
    waiter.start()
    listen(port)
    waiter.join(5)
    assert not waiter.is_alive()
    assert read_all(port) == bytes(BACKLOG_LIMIT) + b"more"
