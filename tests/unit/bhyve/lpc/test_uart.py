"""The 16550A at its registers."""

import pytest

from pyhyve.base.fakes import FakePin
from pyhyve.bhyve.lpc import uart as chip
from pyhyve.bhyve.lpc.uart import Uart


class Line:
    def __init__(self) -> None:
        self.pin = FakePin()
        self.sent = bytearray()
        self.uart = Uart(self.pin, self.sent.extend)

    def read(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def write(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)

    def read_all(self) -> bytes:
        out = bytearray()
        while self.read(chip.LSR) & chip.LSR_DATA_READY:
            out.append(self.read(chip.RBR))
        return bytes(out)


@pytest.fixture
def line() -> Line:
    return Line()


def test_what_the_guest_writes_reaches_the_sink_and_the_transmitter_stays_empty(line: Line) -> None:
    for byte in b"hello":
        assert line.read(chip.LSR) == chip.LSR_THR_EMPTY | chip.LSR_TX_IDLE
        line.write(chip.THR, byte)
    assert line.sent == b"hello"
    assert not line.pin.level


def test_divisor_latch_hides_data_and_interrupt_registers(line: Line) -> None:
    line.write(chip.IER, chip.IER_RX_DATA)
    line.write(chip.LCR, chip.LCR_DLAB | 3)
    line.write(0, 0x34)
    line.write(1, 0x12)
    assert (line.read(0), line.read(1)) == (0x34, 0x12)
    line.write(chip.LCR, 3)
    assert line.sent == b""
    assert line.read(chip.IER) == chip.IER_RX_DATA


def test_scratch_register_keeps_what_is_written_and_fcr_shows_in_iir(line: Line) -> None:
    line.write(chip.SCR, 0xA5)
    assert line.read(chip.SCR) == 0xA5
    assert line.read(chip.IIR) == chip.IIR_NONE
    line.write(chip.FCR, chip.FCR_ENABLE)
    assert line.read(chip.IIR) == chip.IIR_NONE | chip.IIR_FIFOS


def test_interrupt_enable_has_four_bits(line: Line) -> None:
    line.write(chip.IER, 0xFF)
    assert line.read(chip.IER) == 0x0F


def test_enabling_the_transmit_interrupt_raises_it_and_reading_iir_clears_it(line: Line) -> None:
    line.write(chip.IER, chip.IER_TX_EMPTY)
    assert line.pin.level
    assert line.read(chip.IIR) == chip.IIR_TX_EMPTY
    assert not line.pin.level
    assert line.read(chip.IIR) == chip.IIR_NONE
    line.write(chip.THR, 0x41)
    assert line.pin.level
    assert line.pin.edges == 2


def test_transmit_interrupt_survives_the_reading_of_a_higher_one(line: Line) -> None:
    line.write(chip.IER, chip.IER_TX_EMPTY | chip.IER_RX_DATA)
    line.uart.receive(b"x")
    assert line.read(chip.IIR) == chip.IIR_RX_DATA
    assert line.read(chip.RBR) == ord("x")
    assert line.read(chip.IIR) == chip.IIR_TX_EMPTY


def test_interrupts_are_identified_in_order_of_priority(line: Line) -> None:
    line.write(chip.MCR, chip.MCR_LOOPBACK)  # the peer's lines fall: modem status
    line.write(chip.MCR, 0)
    line.uart.receive(b"ab")  # one too many without a FIFO: line status
    line.write(chip.IER, chip.IER_MASK)
    assert line.read(chip.IIR) == chip.IIR_LINE_STATUS
    assert line.read(chip.LSR) & chip.LSR_OVERRUN
    assert line.read(chip.IIR) == chip.IIR_RX_DATA
    line.read(chip.RBR)
    assert line.read(chip.IIR) == chip.IIR_TX_EMPTY
    assert line.read(chip.IIR) == chip.IIR_MODEM_STATUS
    line.read(chip.MSR)
    assert line.read(chip.IIR) == chip.IIR_NONE
    assert not line.pin.level


def test_fifo_holds_sixteen_and_overrun_keeps_them(line: Line) -> None:
    line.write(chip.FCR, chip.FCR_ENABLE)
    assert line.uart.room() == 16
    line.uart.receive(bytes(range(17)))
    assert line.uart.room() == 0
    assert line.read(chip.LSR) & (chip.LSR_OVERRUN | chip.LSR_DATA_READY) == 3
    assert not line.read(chip.LSR) & chip.LSR_OVERRUN
    assert line.read_all() == bytes(range(16))


def test_without_a_fifo_the_newer_character_replaces_the_older(line: Line) -> None:
    assert line.uart.room() == 1
    line.uart.receive(b"ab")
    assert line.read(chip.LSR) & chip.LSR_OVERRUN
    assert line.read_all() == b"b"


@pytest.mark.parametrize(("code", "level"), list(enumerate(chip.TRIGGER_LEVELS)))
def test_below_the_trigger_level_characters_time_out_at_once(line: Line, code: int, level: int) -> None:
    line.write(chip.FCR, chip.FCR_ENABLE | code << 6)
    line.write(chip.IER, chip.IER_RX_DATA)
    line.uart.receive(bytes(level - 1))
    if level > 1:
        assert line.pin.level
        assert line.read(chip.IIR) & 0x0F == chip.IIR_RX_TIMEOUT
    line.uart.receive(b"x")
    assert line.read(chip.IIR) & 0x0F == chip.IIR_RX_DATA
    line.read_all()
    assert not line.pin.level


def test_receiver_reset_empties_the_fifo_and_drops_the_interrupt(line: Line) -> None:
    line.write(chip.FCR, chip.FCR_ENABLE)
    line.write(chip.IER, chip.IER_RX_DATA)
    line.uart.receive(b"abc")
    line.write(chip.FCR, chip.FCR_ENABLE | chip.FCR_RX_RESET)
    assert not line.pin.level
    assert line.read_all() == b""
    assert line.uart.room() == 16


def test_an_empty_receiver_reads_as_zero(line: Line) -> None:
    assert line.read(chip.RBR) == 0


def test_room_is_announced_when_the_receiver_runs_empty_and_when_the_guest_begins_to_listen(line: Line) -> None:
    rooms: list[int] = []
    line.uart.on_room = lambda: rooms.append(line.uart.room())
    line.write(chip.FCR, chip.FCR_ENABLE)
    assert not line.uart.listening
    line.write(chip.IER, chip.IER_RX_DATA)
    assert line.uart.listening
    assert rooms == [16]
    line.uart.receive(b"ab")
    line.read(chip.RBR)
    assert rooms == [16]
    line.read(chip.RBR)
    assert rooms == [16, 16]


def test_loopback_turns_the_transmitter_on_the_receiver_and_cuts_the_line_off(line: Line) -> None:
    line.write(chip.FCR, chip.FCR_ENABLE)
    line.write(chip.MCR, chip.MCR_LOOPBACK)
    line.uart.receive(b"line")
    assert line.uart.room() == 0
    line.write(chip.THR, ord("l"))
    assert line.read_all() == b"l"
    assert line.sent == b""
    line.write(chip.MCR, 0)
    line.write(chip.THR, ord("o"))
    assert line.sent == b"o"


def test_loopback_shows_modem_outputs_as_inputs(line: Line) -> None:
    assert line.read(chip.MSR) == chip.MSR_DCD | chip.MSR_DSR | chip.MSR_CTS
    # The pattern by which drivers recognize the chip.
    line.write(chip.MCR, chip.MCR_LOOPBACK | chip.MCR_OUT2 | chip.MCR_RTS)
    assert line.read(chip.MSR) & 0xF0 == chip.MSR_DCD | chip.MSR_CTS
    assert line.read(chip.MSR) & 0x0F == 0
    line.write(chip.MCR, chip.MCR_LOOPBACK | chip.MCR_OUT1)
    line.read(chip.MSR)
    line.write(chip.MCR, chip.MCR_LOOPBACK)
    assert line.read(chip.MSR) & 0x0F == chip.MSR_TRAILING_RI


def test_wide_accesses_are_bytes_side_by_side(line: Line) -> None:
    line.uart.write(chip.LCR, 2, 0x0B03)
    assert (line.read(chip.LCR), line.read(chip.MCR)) == (0x03, 0x0B)
    assert line.uart.read(chip.LCR, 2) == 0x0B03
    line.uart.write(chip.SCR, 4, 0x11223344)
    assert line.uart.read(chip.SCR, 4) == 0xFFFFFF44
    line.uart.write(chip.THR, 2, 0x0041)
    assert line.sent == b"A"


def test_restore_brings_back_registers_queue_and_pin(line: Line) -> None:
    line.write(chip.LCR, chip.LCR_DLAB)
    line.write(0, 12)
    line.write(chip.LCR, 3)
    line.write(chip.FCR, chip.FCR_ENABLE | 0x80)
    line.write(chip.IER, chip.IER_RX_DATA | chip.IER_TX_EMPTY)
    line.write(chip.MCR, chip.MCR_DTR | chip.MCR_RTS)
    line.uart.receive(b"queued")
    other = Line()
    other.uart.restore(line.uart.save())
    assert other.pin.level
    assert other.uart.save() == line.uart.save()
    assert other.read_all() == b"queued"
    assert other.read(chip.IIR) & 0x0F == chip.IIR_TX_EMPTY


def test_reset_returns_to_power_on_state(line: Line) -> None:
    fresh = line.uart.save()
    line.write(chip.IER, chip.IER_MASK)
    line.uart.receive(b"abc")
    line.write(chip.MCR, chip.MCR_LOOPBACK)
    line.uart.reset()
    assert line.uart.save() == fresh
    assert not line.pin.level
    line.write(chip.THR, 0x41)
    assert line.sent == b"A"
