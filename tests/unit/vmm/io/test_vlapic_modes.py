"""The local APIC's modes and how its registers are reached: the page, the MSRs, what they refuse."""

import pytest
from board import assert_gp

from pyhyve.vmm.io.apicbus import FIXED
from pyhyve.vmm.io.apicregs import ApicFeatures

APIC_BASE = 0x1B
ENABLED = 0xFEE00800
X2APIC = 0xFEE00C00


def test_the_page_is_open_bus_in_x2apic_mode(board):
    vlapic = board.add(0, x2apic=True)
    assert vlapic.read(0x20, 4) == 0xFFFFFFFF
    vlapic.write(0x80, 4, 0xF0)
    assert vlapic.cr8 == 0


def test_x2apic_id_is_32_bits_and_ldr_derives_from_it(board):
    vlapic = board.add(0x123, x2apic=True)
    assert vlapic.rdmsr(0x802) == 0x123
    assert vlapic.rdmsr(0x80D) == 0x12 << 16 | 1 << 3
    assert vlapic.x2apic


def test_x2apic_msrs_fault_in_xapic_mode(cpu):
    assert_gp(cpu.rdmsr, 0x802)
    assert_gp(cpu.wrmsr, 0x808, 0)


@pytest.mark.parametrize("msr", [0x800, 0x80B, 0x80E, 0x831, 0x83F, 0x840, 0x8FF])
def test_unreadable_x2apic_msrs_fault(board, msr):
    assert_gp(board.add(0, x2apic=True).rdmsr, msr)


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        (0x802, 0), (0x803, 0), (0x80A, 0), (0x80D, 0), (0x80E, 0), (0x810, 0), (0x839, 0), (0x831, 0),
        (0x808, 0x100), (0x80B, 1), (0x828, 1), (0x80F, 1 << 10), (0x832, 1 << 19), (0x838, 1 << 32),
        (0x83E, 4), (0x83F, 0x100), (0x830, 1 << 20), (0x880, 0),
    ],
)  # fmt: skip
def test_read_only_x2apic_msrs_and_reserved_bits_fault(board, msr, value):
    assert_gp(board.add(0, x2apic=True).wrmsr, msr, value)


def test_interrupts_and_state_survive_the_switch_to_x2apic(cpu):
    cpu.write(0x80, 4, 0x20)
    cpu.post(0x41)
    cpu.wrmsr(APIC_BASE, cpu.base_msr | 0x400)
    assert cpu.rdmsr(0x808) == 0x20
    assert cpu.pending_vector() == 0x41
    cpu.acknowledge(0x41)
    cpu.wrmsr(0x80B, 0)
    assert cpu.rdmsr(0x812) == 0


def test_illegal_mode_changes_fault(cpu):
    assert_gp(cpu.wrmsr, APIC_BASE, 0xFEE00400)  # x2APIC without enable
    cpu.wrmsr(APIC_BASE, 0xFEE00000)
    assert_gp(cpu.wrmsr, APIC_BASE, X2APIC)  # off to x2APIC
    cpu.wrmsr(APIC_BASE, ENABLED)
    cpu.wrmsr(APIC_BASE, X2APIC)
    assert_gp(cpu.wrmsr, APIC_BASE, ENABLED)  # back to xAPIC
    assert cpu.base_msr == X2APIC


@pytest.mark.parametrize("bit", [*range(8), 9, 52, 63])
def test_reserved_bits_of_the_base_fault(cpu, bit):
    assert_gp(cpu.wrmsr, APIC_BASE, cpu.base_msr | 1 << bit)
    assert cpu.base_msr == ENABLED | 0x100


def test_address_bits_of_the_base_end_at_maxphyaddr(board):
    vlapic = board.add(0, features=ApicFeatures(phys_bits=40))
    vlapic.wrmsr(APIC_BASE, 0xFF_FEE0_0900)
    assert vlapic.page == 0xFFFEE00
    assert_gp(vlapic.wrmsr, APIC_BASE, 1 << 40 | ENABLED)


def test_the_page_moves_with_the_base(board, cpu):
    assert cpu.page == 0xFEE00
    board.events.clear()
    cpu.wrmsr(APIC_BASE, 0xFED40900)
    assert cpu.page == 0xFED40
    assert board.names(0) == ["base"]
    assert cpu.read(0x30, 4) == 0x01060014


def test_no_page_is_decoded_while_off_or_in_x2apic_mode(cpu):
    cpu.wrmsr(APIC_BASE, X2APIC)
    assert cpu.page == -1
    cpu.wrmsr(APIC_BASE, 0xFEE00000)
    assert cpu.page == -1
    cpu.reset()
    assert cpu.page == 0xFEE00


def test_the_boot_processors_bit_can_be_written(board):
    vlapic = board.add(1)
    vlapic.wrmsr(APIC_BASE, ENABLED | 0x100)
    assert vlapic.base_msr == ENABLED | 0x100
    vlapic.init()
    assert vlapic.base_msr == ENABLED | 0x100


MODES = {"off": 0xFEE00000, "invalid": 0xFEE00400, "xapic": ENABLED, "x2apic": X2APIC}
WAYS = {"off": [], "xapic": [ENABLED], "x2apic": [ENABLED, X2APIC]}
ALLOWED = {("off", "off"), ("off", "xapic"), ("xapic", "off"), ("xapic", "xapic"), ("xapic", "x2apic"),
           ("x2apic", "off"), ("x2apic", "x2apic")}  # fmt: skip


@pytest.mark.parametrize("old", WAYS)
@pytest.mark.parametrize("new", MODES)
def test_every_change_of_mode_is_the_manuals(board, old, new):
    """ "x2APIC State Transitions", the figure "Local x2APIC State Transitions with IA32_APIC_BASE, INIT, and Reset"."""
    vlapic = board.add(0, enable=False)
    vlapic.wrmsr(APIC_BASE, 0xFEE00000)
    for value in WAYS[old]:
        vlapic.wrmsr(APIC_BASE, value)
    before = vlapic.base_msr
    if (old, new) in ALLOWED:
        vlapic.wrmsr(APIC_BASE, MODES[new])
        assert vlapic.base_msr == MODES[new]
    else:
        assert_gp(vlapic.wrmsr, APIC_BASE, MODES[new])
        assert vlapic.base_msr == before
    vlapic.init()
    assert vlapic.base_msr == (MODES[new] if (old, new) in ALLOWED else before)


def test_x2apic_mode_is_refused_where_it_is_not_reported(board):
    vlapic = board.add(0, features=ApicFeatures(x2apic=False))
    assert_gp(vlapic.wrmsr, APIC_BASE, X2APIC)
    assert vlapic.page == 0xFEE00


def test_the_switch_to_x2apic_keeps_all_but_ids_and_the_high_half_of_icr(board):
    vlapic = board.add(0x21)
    for offset, value in ((0x80, 0x35), (0xF0, 0x1AA), (0x320, 0x10031), (0x370, 0x41), (0x3E0, 3), (0xD0, 0x55 << 24),
                          (0x310, 7 << 24), (0x300, 0x40041)):  # fmt: skip
        vlapic.write(offset, 4, value)
    vlapic.wrmsr(APIC_BASE, X2APIC)
    kept = {0x808: 0x35, 0x80F: 0x1AA, 0x832: 0x10031, 0x837: 0x41, 0x83E: 3, 0x830: 0x40041}
    assert {msr: vlapic.rdmsr(msr) for msr in kept} == kept
    assert (vlapic.rdmsr(0x802), vlapic.rdmsr(0x80D)) == (0x21, 0x20002)


def test_an_id_that_software_wrote_is_where_ipis_go_until_the_mode_changes(board, cpu):
    other = board.add(1)
    other.write(0x20, 4, 9 << 24)
    assert other.read(0x20, 4) == 9 << 24
    assert board.bus.deliver(9, False, FIXED, 0x41, False) == 1
    assert board.bus.deliver(1, False, FIXED, 0x42, False) == 0
    other.wrmsr(APIC_BASE, X2APIC)
    assert other.rdmsr(0x802) == 1
    assert board.bus.deliver(1, False, FIXED, 0x43, False) == 1
    assert board.pending() == {1: 0x43}


def test_two_apics_of_one_written_id_both_get_what_is_sent_there(board, cpu):
    board.add(1).write(0x20, 4, 0)
    assert board.bus.deliver(0, False, FIXED, 0x41, False) == 2


def test_an_id_above_255_is_reached_before_the_switch_to_x2apic(board, cpu):
    """A processor that has just been started is still in xAPIC mode."""
    other = board.add(0x12C, enable=False)
    cpu.wrmsr(APIC_BASE, X2APIC | 0x100)
    cpu.wrmsr(0x830, 0x12C << 32 | 0x4500)
    cpu.wrmsr(0x830, 0x12C << 32 | 0x4608)
    assert [event for event in board.events if event[1] in ("init", "sipi")] == [(300, "init", 0), (300, "sipi", 8)]
    assert other.read(0x20, 4) == 0x2C << 24


@pytest.mark.parametrize("index", range(0x100))
def test_reading_and_writing_each_x2apic_register_is_as_the_table_says(board, index):
    """ "x2APIC Register Address Space": read-write, read-only, write-only, or reserved."""
    vlapic = board.add(0, x2apic=True)
    both = {0x08, 0x0F, 0x28, 0x2F, 0x30, *range(0x32, 0x39), 0x3E}
    readable = both | {0x02, 0x03, 0x0A, 0x0D, *range(0x10, 0x28), 0x39}
    writable = both | {0x0B, 0x3F}
    if index in readable:
        vlapic.rdmsr(0x800 + index)
    else:
        assert_gp(vlapic.rdmsr, 0x800 + index)
    value = {0x30: 0x40041, 0x3F: 0x41}.get(index, 0)
    if index in writable:
        vlapic.wrmsr(0x800 + index, value)
        assert_gp(vlapic.wrmsr, 0x800 + index, value | 1 << 63 if index != 0x30 else value | 1 << 20)
    else:
        assert_gp(vlapic.wrmsr, 0x800 + index, value)


def test_without_a_deadline_timer_its_msr_and_its_bit_are_reserved(board):
    vlapic = board.add(0, x2apic=True, features=ApicFeatures(tsc_deadline=False))
    assert_gp(vlapic.rdmsr, 0x6E0)
    assert_gp(vlapic.wrmsr, 0x6E0, 0)
    assert_gp(vlapic.wrmsr, 0x832, 0x40031)


def test_without_cmci_there_is_one_entry_less(board):
    vlapic = board.add(0, features=ApicFeatures(cmci=False, eoi_suppression=False))
    assert vlapic.read(0x30, 4) == 0x00050014
    assert vlapic.read(0x2F0, 4) == 0
    vlapic.write(0x2F0, 4, 0x41)
    vlapic.write(0xF0, 4, 0x11FF)
    assert vlapic.read(0xF0, 4) == 0x1FF
    vlapic.write(0x280, 4, 0)
    assert vlapic.read(0x280, 4) == 1 << 7
    vlapic.wrmsr(APIC_BASE, X2APIC | 0x100)
    assert_gp(vlapic.rdmsr, 0x82F)
    assert_gp(vlapic.wrmsr, 0x82F, 0)
    assert_gp(vlapic.wrmsr, 0x82F, 0x10000)
    assert_gp(vlapic.wrmsr, 0x80F, 0x11FF)


@pytest.mark.parametrize("offset", [0, 0x10, 0x40, 0x70, 0x290, 0x2E0, 0x3A0, 0x3D0, 0x3F0, 0x400, 0xFF0])
def test_reserved_offsets_read_zero_and_are_noted(cpu, offset):
    assert cpu.read(offset, 4) == 0
    cpu.write(offset, 4, 0x12345678)
    assert cpu.read(offset, 4) == 0
    cpu.write(0x280, 4, 0)
    assert cpu.read(0x280, 4) == 1 << 7


@pytest.mark.parametrize("offset", [0x90, 0xC0])
def test_registers_that_only_old_processors_have_are_not_noted(cpu, offset):
    assert cpu.read(offset, 4) == 0
    cpu.write(offset, 4, 0x12345678)
    cpu.write(0x280, 4, 0)
    assert cpu.read(0x280, 4) == 0


@pytest.mark.parametrize("offset", [0x84, 0x88, 0x8C, 0x81])
def test_a_write_beside_a_register_has_no_effect(cpu, offset):
    cpu.write(offset, 4, 0x50)
    assert cpu.read(0x80, 4) == 0


def test_a_wide_write_is_its_low_half(cpu):
    cpu.write(0x80, 8, 0x70_0000_0050)
    assert cpu.read(0x80, 8) == 0x50
    cpu.write(0x80, 1, 0x30)
    assert cpu.read(0x80, 4) == 0x30


def test_turning_the_apic_off_resets_it_and_lets_the_8259_through(cpu):
    cpu.post(0x41)
    assert not cpu.extint_enabled()
    cpu.wrmsr(APIC_BASE, 0xFEE00000)
    assert cpu.pending_vector() is None
    assert cpu.extint_enabled()
    assert cpu.read(0x20, 4) == 0xFFFFFFFF
    cpu.wrmsr(APIC_BASE, ENABLED)
    assert cpu.read(0xF0, 4) == 0xFF


def test_unknown_msrs_fault(cpu):
    assert_gp(cpu.rdmsr, 0x1C)
    assert_gp(cpu.wrmsr, 0x1C, 0)


def test_init_keeps_mode_and_id(board):
    vlapic = board.add(5, x2apic=True)
    vlapic.post(0x41)
    vlapic.init()
    assert vlapic.x2apic
    assert vlapic.rdmsr(0x802) == 5
    assert vlapic.rdmsr(0x80F) == 0xFF
    assert vlapic.pending_vector() is None
    vlapic.reset()
    assert not vlapic.x2apic
