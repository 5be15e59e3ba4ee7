"""The local APIC: priorities, EOI, commands, modes and LINT pins."""

import random
import threading

import pytest

from pyhyve.base.errors import GuestFault

APIC_BASE = 0x1B
ENABLED = 0xFEE00800
X2APIC = 0xFEE00C00


def eoi(vlapic):
    vlapic.write(0xB0, 4, 0)


def assert_gp(call, *args):
    with pytest.raises(GuestFault) as caught:
        call(*args)
    assert (caught.value.vector, caught.value.error) == (13, 0)


# -- power-up


def test_power_up_state_is_the_manuals(board):
    vlapic = board.add(3, enable=False)
    assert vlapic.base_msr == ENABLED
    assert vlapic.read(0x20, 4) == 3 << 24
    assert vlapic.read(0x30, 4) == 0x00060014
    assert vlapic.read(0xE0, 4) == 0xFFFFFFFF
    assert vlapic.read(0xF0, 4) == 0xFF
    assert all(vlapic.read(lvt, 4) == 0x10000 for lvt in (0x2F0, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370))


def test_apic_0_is_the_boot_processor(cpu):
    assert cpu.base_msr & 0x100


def test_a_software_disabled_apic_accepts_nothing(board):
    vlapic = board.add(0, enable=False)
    assert not vlapic.post(0x41)
    vlapic.write(0xF0, 4, 0x1FF)
    assert vlapic.pending_vector() is None


def test_disabling_by_svr_holds_what_is_pending_and_masks_the_lvt(cpu):
    cpu.write(0x350, 4, 0x700)
    cpu.post(0x41)
    cpu.write(0xF0, 4, 0xFF)
    assert cpu.pending_vector() is None
    assert cpu.read(0x350, 4) == 0x10700
    cpu.write(0x350, 4, 0x700)
    assert cpu.read(0x350, 4) == 0x10700
    cpu.write(0xF0, 4, 0x1FF)
    assert cpu.pending_vector() == 0x41


# -- acceptance and priorities


def test_the_highest_vector_is_taken_first(board, cpu):
    for vector in (0x31, 0xF1, 0x85):
        cpu.post(vector)
    assert [board.take(cpu) for _ in range(2)] == [0xF1, None]
    eoi(cpu)
    assert board.take(cpu) == 0x85


def test_an_interrupt_of_the_same_class_waits_for_eoi(board, cpu):
    cpu.post(0x41)
    assert board.take(cpu) == 0x41
    cpu.post(0x4F)
    assert cpu.pending_vector() is None
    eoi(cpu)
    assert cpu.pending_vector() == 0x4F


def test_a_higher_class_nests(board, cpu):
    cpu.post(0x41)
    board.take(cpu)
    cpu.post(0x51)
    assert board.take(cpu) == 0x51
    assert cpu.read(0xA0, 4) == 0x50
    eoi(cpu)
    assert cpu.read(0xA0, 4) == 0x40
    eoi(cpu)
    assert cpu.read(0xA0, 4) == 0


def test_tpr_blocks_its_class_and_below(cpu):
    cpu.write(0x80, 4, 0x4F)
    cpu.post(0x4F)
    assert cpu.pending_vector() is None
    assert cpu.read(0xA0, 4) == 0x4F
    cpu.post(0x50)
    assert cpu.pending_vector() == 0x50


def test_lowering_tpr_notifies_when_something_waits(board, cpu):
    cpu.cr8 = 15
    assert cpu.read(0x80, 4) == 0xF0
    cpu.post(0x41)
    board.events.clear()
    cpu.cr8 = 4
    assert board.events == []
    cpu.cr8 = 3
    assert board.names(0) == ["notify"]
    assert cpu.cr8 == 3


def test_registers_show_irr_isr_and_tmr(board, cpu):
    cpu.post(0x41, True)
    cpu.post(0x82)
    assert cpu.read(0x220, 4) == 1 << 1
    assert cpu.read(0x240, 4) == 1 << 2
    assert cpu.read(0x1A0, 4) == 1 << 1
    board.take(cpu)
    assert cpu.read(0x240, 4) == 0
    assert cpu.read(0x140, 4) == 1 << 2
    assert cpu.read(0x1C0, 4) == 0


def test_notify_is_called_once_for_a_vector_posted_twice(board, cpu):
    cpu.post(0x41)
    cpu.post(0x41)
    assert board.names(0) == ["notify"]


def test_notify_may_wait_for_a_thread_that_asks_for_the_pending_vector(board):
    """The monitor sleeps on a condition around `pending_vector`; a post must not deadlock with it."""
    vlapic = board.add(0)
    asked: list[int | None] = []

    def ask() -> None:
        asked.append(vlapic.pending_vector())

    def notify() -> None:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()

    vlapic._notify = notify
    vlapic.post(0x41)
    assert asked == [0x41]


def test_posts_from_many_threads_are_all_kept(cpu):
    def post(first: int) -> None:
        for vector in range(first, 256, 4):
            cpu.post(vector)

    threads = [threading.Thread(target=post, args=(first,)) for first in (32, 33, 34, 35)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cpu.save().irr == ((1 << 256) - 1) & ~((1 << 32) - 1)


# -- EOI


class Listener:
    def __init__(self):
        self.vectors = []

    def eoi(self, vector):
        self.vectors.append(vector)


@pytest.mark.seed("S10")
def test_only_level_triggered_vectors_forward_their_eoi(board, cpu):
    listener = Listener()
    board.bus.attach_ioapic(listener)
    cpu.post(0x41, False)
    board.take(cpu)
    eoi(cpu)
    cpu.post(0x51, True)
    board.take(cpu)
    eoi(cpu)
    assert listener.vectors == [0x51]


@pytest.mark.seed("S10")
def test_tmr_follows_the_last_acceptance_of_a_vector(board, cpu):
    listener = Listener()
    board.bus.attach_ioapic(listener)
    for level in (True, False):
        cpu.post(0x41, level)
        board.take(cpu)
        eoi(cpu)
    assert listener.vectors == [0x41]


def test_an_eoi_without_anything_in_service_is_harmless(cpu):
    eoi(cpu)
    assert cpu.pending_vector() is None


# -- interrupt commands


def test_xapic_icr_sends_to_the_id_in_the_high_half(board, cpu):
    board.add(2)
    cpu.write(0x310, 4, 2 << 24)
    cpu.write(0x300, 4, 0x41)
    assert board.pending() == {2: 0x41}
    assert cpu.read(0x300, 4) == 0x41
    assert cpu.read(0x310, 4) == 2 << 24


@pytest.mark.parametrize(("shorthand", "receivers"), [(1, {0}), (2, {0, 1, 2}), (3, {1, 2})])
def test_shorthands(board, cpu, shorthand, receivers):
    board.add(1)
    board.add(2)
    cpu.write(0x300, 4, shorthand << 18 | 0x41)
    assert set(board.pending()) == receivers


def test_init_sipi_and_nmi_reach_the_other_processor(board, cpu):
    board.add(1, enable=False)
    cpu.write(0x310, 4, 1 << 24)
    cpu.write(0x300, 4, 0x0C500)
    cpu.write(0x300, 4, 0x08500)  # INIT level de-assert: nothing
    cpu.write(0x300, 4, 0x0069F)
    cpu.write(0x300, 4, 0x00400)
    assert [event for event in board.events if event[0] == 1] == [(1, "init", 0), (1, "sipi", 0x9F), (1, "nmi", 0)]


def test_x2apic_icr_is_one_write_with_a_32_bit_destination(board):
    first = board.add(0, x2apic=True)
    board.add(300, x2apic=True)
    first.wrmsr(0x830, 300 << 32 | 0x41)
    assert board.pending() == {300: 0x41}
    assert first.rdmsr(0x830) == 300 << 32 | 0x41


def test_x2apic_icr_logical(board):
    first = board.add(0, x2apic=True)
    for n in (1, 2, 17):
        board.add(n, x2apic=True)
    first.wrmsr(0x830, 0b110 << 32 | 1 << 11 | 0x41)
    assert board.pending() == {1: 0x41, 2: 0x41}


def test_self_ipi(board):
    vlapic = board.add(0, x2apic=True)
    vlapic.wrmsr(0x83F, 0x41)
    assert board.pending() == {0: 0x41}


# -- errors


def test_an_illegal_vector_sent_is_latched_in_esr_by_a_write(cpu):
    cpu.write(0x300, 4, 1 << 18 | 5)
    assert cpu.read(0x280, 4) == 0
    cpu.write(0x280, 4, 0)
    assert cpu.read(0x280, 4) == 1 << 5
    cpu.write(0x280, 4, 0)
    assert cpu.read(0x280, 4) == 0


def test_an_illegal_vector_received_raises_the_error_interrupt(cpu):
    cpu.write(0x370, 4, 0xFE)
    assert not cpu.post(3)
    assert cpu.pending_vector() == 0xFE
    cpu.write(0x280, 4, 0)
    assert cpu.read(0x280, 4) == 1 << 6


def test_an_illegal_error_vector_does_not_recurse(cpu):
    cpu.write(0x370, 4, 0x05)
    cpu.post(3)
    assert cpu.pending_vector() is None


def test_an_access_to_no_register_is_noted_and_harmless(cpu):
    assert cpu.read(0x3F0, 4) == 0
    cpu.write(0x44, 4, 1)
    cpu.write(0x280, 4, 0)
    assert cpu.read(0x280, 4) == 1 << 7


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_no_access_to_the_page_raises(cpu, size):
    for offset in range(0, 0x1000, size):
        cpu.read(offset, size)
        cpu.write(offset, size, (1 << (8 * size)) - 1)


def test_narrow_reads_give_their_bytes(cpu):
    assert cpu.read(0x30, 1) == 0x14
    assert cpu.read(0x32, 2) == 0x0006
    assert cpu.read(0x30, 8) == 0x00060014


@pytest.mark.parametrize("seed", range(8))
def test_no_sequence_of_accesses_does_worse_than_a_fault(board, seed):
    """A guest's input never raises anything but #GP, in any order of modes, registers, interrupts and time."""
    chance = random.Random(seed)
    for apic_id in range(3):
        board.add(apic_id, x2apic=apic_id == seed % 3)
    for _ in range(3_000):
        vlapic = board.cpus[chance.randrange(3)]
        value = chance.choice((0, 1, chance.getrandbits(8), chance.getrandbits(20), chance.getrandbits(64)))
        action = chance.randrange(7)
        try:
            if action == 0:
                vlapic.write(chance.randrange(0x40) << 4, 4, value & 0xFFFFFFFF)
            elif action == 1:
                vlapic.wrmsr(chance.randrange(0x800, 0x840), value)
            elif action == 2:
                vlapic.wrmsr(chance.choice((APIC_BASE, 0x6E0)), chance.choice((value, ENABLED, X2APIC, 0xFEE00000)))
            elif action == 3:
                board.bus.send_msi(0xFEE00000 | value & 0xFF00C, value & 0xFFFF)
            elif action == 4:
                board.timers.advance(value & 0xFFFFF)
            elif action == 5:
                vlapic.rdmsr(chance.randrange(0x800, 0x840))
            else:
                board.take(vlapic)
        except GuestFault:
            pass  # what a guest may expect for a bad MSR
        vector = vlapic.pending_vector()
        assert vector is None or (vector >> 4 > vlapic.ppr >> 4 and vector >= 16)


# -- modes


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
        (0x808, 0x100), (0x80B, 1), (0x828, 1), (0x80F, 1 << 12), (0x832, 1 << 19), (0x838, 1 << 32),
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


@pytest.mark.parametrize("value", [0xFEE00801, 0xFEE00A00, 0xFED00800, 1 << 63 | ENABLED])
def test_reserved_bits_of_the_base_and_moving_the_page_fault(cpu, value):
    assert_gp(cpu.wrmsr, APIC_BASE, value)


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


# -- LINT pins


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


# -- saved state


def test_state_survives_save_and_restore(board, cpu):
    cpu.write(0x80, 4, 0x20)
    cpu.write(0x320, 4, 0x200EC)
    cpu.write(0x3E0, 4, 0xB)
    cpu.write(0x380, 4, 1_000_000)
    cpu.post(0x41, True)
    cpu.post(0x91)
    board.take(cpu)
    state = cpu.save()
    assert state.SCHEMA == ("vlapic", 1)

    other = type(board)()
    copy = other.add(0)
    copy.restore(state)
    assert copy.save() == state
    assert other.pending() == {}
    eoi(copy)
    assert other.take(copy) == 0x41
    eoi(copy)
    other.timers.advance(1_000_000)
    assert other.take(copy) == 0xEC


def test_a_state_of_another_id_is_refused(board, cpu):
    with pytest.raises(ValueError, match="local APIC 0"):
        board.add(1).restore(cpu.save())
