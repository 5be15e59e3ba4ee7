"""The local vector table: LINT pins, error, thermal, performance counters and CMCI."""

import pytest

from pyhyve.vmm.io.apicbus import EXTINT, FIXED, INIT, NMI, SMI
from pyhyve.vmm.io.apicregs import LVT_CMCI, LVT_PMC, LVT_THERMAL

MODED = {0x2F0: LVT_CMCI, 0x330: LVT_THERMAL, 0x340: LVT_PMC}


def eoi(vlapic):
    vlapic.write(0xB0, 4, 0)


def test_lint0_in_extint_mode_lets_the_8259_through(board, cpu):
    assert not cpu.extint_enabled()
    cpu.write(0x350, 4, 0x700)
    assert cpu.extint_enabled()
    board.events.clear()
    cpu.lint(0, True)
    cpu.lint(0, True)
    assert board.names(0) == ["notify"]
    cpu.write(0x350, 4, 0x10700)
    assert not cpu.extint_enabled()


def test_unmasking_lint0_under_an_asserted_intr_notifies(board, cpu):
    cpu.lint(0, True)
    assert board.events == []
    cpu.write(0x350, 4, 0x700)
    assert board.names(0) == ["notify"]


def test_virtual_wire_is_what_firmware_leaves(board):
    vlapic = board.add(0, enable=False)
    vlapic.lint(0, True)
    vlapic.virtual_wire()
    assert vlapic.extint_enabled()
    assert board.names(0) == ["notify"]
    vlapic.lint(1, True)
    assert board.names(0)[-1] == "nmi"


def test_lint1_as_nmi_fires_on_each_rising_edge(board, cpu):
    cpu.write(0x360, 4, 0x400)
    for level in (True, False, True):
        cpu.lint(1, level)
    assert board.names(0) == ["nmi", "nmi"]


def test_a_level_triggered_lint_is_sent_again_at_eoi_while_asserted(board, cpu):
    cpu.write(0x350, 4, 0x8041)
    cpu.lint(0, True)
    assert cpu.read(0x350, 4) & 1 << 14
    assert board.take(cpu) == 0x41
    eoi(cpu)
    assert board.take(cpu) == 0x41
    cpu.lint(0, False)
    eoi(cpu)
    assert board.take(cpu) is None
    assert not cpu.read(0x350, 4) & 1 << 14


def test_an_extint_message_asks_the_8259_once(board, cpu):
    board.bus.extint = lambda: 0x38
    board.bus.send_msi(0xFEE00000, 0x700)
    assert cpu.extint_enabled()
    assert cpu.acknowledge_extint() == 0x38
    assert not cpu.extint_enabled()


@pytest.mark.parametrize("pin", [0, 1])
@pytest.mark.parametrize("level", [0, 0x8000])
@pytest.mark.parametrize(
    ("mode", "heard"), [(FIXED, []), (SMI, []), (NMI, ["nmi"]), (INIT, ["init"]), (EXTINT, []), (1, None), (3, [])]
)
def test_a_pin_in_each_delivery_mode(board, cpu, pin, level, mode, heard):
    cpu.write(0x350 + 0x10 * pin, 4, level | mode << 8 | 0x41)
    board.events.clear()
    cpu.lint(pin, True)
    assert board.take(cpu) == (0x41 if mode in (FIXED, 1) else None)
    if heard is not None:
        assert [name for name in board.names(0) if name != "notify"] == heard
    assert cpu.extint_enabled() == (mode == EXTINT and pin == 0)
    cpu.lint(pin, True)
    assert board.take(cpu) is None


def test_lint1_knows_edges_only(board, cpu):
    cpu.write(0x360, 4, 0x8041)
    cpu.lint(1, True)
    assert board.take(cpu) == 0x41
    assert not cpu.read(0x360, 4) & 1 << 14
    eoi(cpu)
    assert board.take(cpu) is None


@pytest.mark.parametrize("level", [0, 0x8000])
def test_an_active_low_pin_interrupts_when_it_falls(board, cpu, level):
    cpu.lint(0, True)
    cpu.write(0x350, 4, 0x2041 | level)
    assert board.take(cpu) is None
    cpu.lint(0, False)
    assert board.take(cpu) == 0x41
    cpu.lint(0, True)
    eoi(cpu)
    assert board.take(cpu) is None


def test_remote_irr_holds_a_level_back_and_is_read_only(board, cpu):
    cpu.write(0x350, 4, 0xC041)
    assert not cpu.read(0x350, 4) & 1 << 14
    cpu.lint(0, True)
    cpu.lint(0, False)
    cpu.lint(0, True)
    assert board.take(cpu) == 0x41
    cpu.write(0x350, 4, 0x8041)
    assert cpu.read(0x350, 4) & 1 << 14
    assert board.take(cpu) is None
    cpu.write(0x350, 4, 0x0041)
    assert not cpu.read(0x350, 4) & 1 << 14


def test_a_masked_pin_loses_edges_and_keeps_levels(board, cpu):
    cpu.write(0x350, 4, 0x10041)
    cpu.lint(0, True)
    cpu.write(0x350, 4, 0x00041)
    assert board.take(cpu) is None
    cpu.write(0x350, 4, 0x18041)
    cpu.write(0x350, 4, 0x08041)
    assert board.take(cpu) == 0x41


@pytest.mark.parametrize("offset", MODED)
@pytest.mark.parametrize(
    ("mode", "heard"), [(FIXED, ["notify"]), (NMI, ["nmi"]), (INIT, ["init"]), (SMI, []), (EXTINT, []), (3, [])]
)
def test_a_processors_own_source_in_each_delivery_mode(board, cpu, offset, mode, heard):
    cpu.write(offset, 4, mode << 8 | 0x41)
    board.events.clear()
    cpu.local_interrupt(MODED[offset])
    assert board.names(0) == heard
    assert board.take(cpu) == (0x41 if mode == FIXED else None)


@pytest.mark.parametrize("offset", MODED)
def test_only_performance_counters_mask_their_entry_when_they_interrupt(board, cpu, offset):
    cpu.write(offset, 4, 0x41)
    cpu.local_interrupt(MODED[offset])
    assert cpu.read(offset, 4) == (0x10041 if offset == 0x340 else 0x41)
    assert board.take(cpu) == 0x41
    eoi(cpu)
    cpu.local_interrupt(MODED[offset])
    assert board.take(cpu) == (None if offset == 0x340 else 0x41)


@pytest.mark.parametrize("offset", MODED)
def test_a_masked_entry_is_silent(board, cpu, offset):
    cpu.write(offset, 4, 0x10041)
    cpu.local_interrupt(MODED[offset])
    assert board.take(cpu) is None


@pytest.mark.parametrize(
    ("offset", "kept"),
    [(0x2F0, 0x107FF), (0x320, 0x700FF), (0x330, 0x107FF), (0x340, 0x107FF), (0x350, 0x1A7FF), (0x360, 0x1A7FF),
     (0x370, 0x100FF)],
)  # fmt: skip
def test_an_entry_keeps_its_fields_and_no_other_bits(cpu, offset, kept):
    cpu.write(offset, 4, 0xFFFFFFFF)
    assert cpu.read(offset, 4) & ~(1 << 14) == kept
    cpu.write(offset, 4, 0)
    assert cpu.read(offset, 4) == 0


def test_every_entry_is_masked_while_the_apic_is_disabled_by_software(cpu):
    offsets = (0x2F0, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370)
    for offset in offsets:
        cpu.write(offset, 4, 0x41)
    cpu.write(0xF0, 4, 0xFF)
    assert all(cpu.read(offset, 4) == 0x10041 for offset in offsets)
    for offset in offsets:
        cpu.write(offset, 4, 0x42)
    assert all(cpu.read(offset, 4) == 0x10042 for offset in offsets)


def test_with_the_apic_off_the_pins_are_intr_and_nmi(board, cpu):
    cpu.wrmsr(0x1B, 0xFEE00000)
    board.events.clear()
    cpu.lint(0, True)
    cpu.lint(1, True)
    cpu.lint(1, False)
    assert board.names(0) == ["notify", "nmi"]


def test_an_illegal_vector_of_an_entry_is_an_error_received(board, cpu):
    cpu.write(0x350, 4, 0x0F)
    cpu.lint(0, True)
    cpu.write(0x280, 4, 0)
    assert cpu.read(0x280, 4) == 1 << 6
    assert cpu.pending_vector() is None
