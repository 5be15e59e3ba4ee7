"""The local APIC: priorities, EOI, commands, modes and LINT pins."""

import random
import threading

import pytest

from pyhyve.base.errors import GuestFault
from pyhyve.vmm.io.apicregs import ApicFeatures

APIC_BASE = 0x1B
ENABLED = 0xFEE00800
X2APIC = 0xFEE00C00


def eoi(vlapic):
    vlapic.write(0xB0, 4, 0)


# -- power-up


def test_power_up_state_is_the_manuals(board):
    vlapic = board.add(3, enable=False)
    assert vlapic.base_msr == ENABLED
    assert vlapic.read(0x20, 4) == 3 << 24
    assert vlapic.read(0x30, 4) == 0x01060014
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


def test_disabling_by_svr_leaves_what_is_pending_to_the_processor_and_masks_the_lvt(cpu):
    """ "Local APIC State After It Has Been Software Disabled": IRR and ISR are held, and want handling."""
    cpu.write(0x350, 4, 0x700)
    cpu.post(0x41)
    cpu.write(0xF0, 4, 0xFF)
    assert not cpu.post(0x42)
    assert cpu.pending_vector() == 0x41
    assert cpu.read(0x350, 4) == 0x10700
    cpu.write(0x350, 4, 0x700)
    assert cpu.read(0x350, 4) == 0x10700
    cpu.write(0xF0, 4, 0x1FF)
    assert cpu.pending_vector() == 0x41
    assert cpu.read(0x350, 4) == 0x10700


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
    assert cpu.read(0x32, 2) == 0x0106
    assert cpu.read(0x30, 8) == 0x01060014


@pytest.mark.parametrize("seed", range(8))
def test_no_sequence_of_accesses_does_worse_than_a_fault(board, seed):
    """A guest's input never raises anything but #GP, in any order of modes, registers, interrupts and time."""
    chance = random.Random(seed)
    less = ApicFeatures(cmci=False, tsc_deadline=False, eoi_suppression=False)
    for apic_id in range(3):
        board.add(apic_id, x2apic=apic_id == seed % 3, features=less if seed & 1 else None)
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


# -- the manual's corners


def test_esr_shows_what_had_happened_at_the_last_write(cpu):
    cpu.write(0x300, 4, 0x05)
    assert cpu.read(0x280, 4) == 0
    cpu.write(0x280, 4, 0)
    cpu.read(0x3F0, 4)
    assert cpu.read(0x280, 4) == 1 << 5
    cpu.write(0x280, 4, 0)
    assert cpu.read(0x280, 4) == 1 << 7
    cpu.write(0x280, 4, 0)
    assert cpu.read(0x280, 4) == 0


def test_a_lowest_priority_ipi_in_x2apic_mode_is_only_a_redirectable_error(board):
    vlapic = board.add(0, x2apic=True)
    vlapic.wrmsr(0x837, 0x71)
    vlapic.wrmsr(0x830, 0x105)
    vlapic.wrmsr(0x828, 0)
    assert vlapic.rdmsr(0x828) == 1 << 4
    assert board.take(vlapic) == 0x71
    assert vlapic.pending_vector() is None


def test_an_illegal_self_ipi_is_an_error_sent(board):
    vlapic = board.add(0, x2apic=True)
    vlapic.wrmsr(0x83F, 0x0F)
    vlapic.wrmsr(0x828, 0)
    assert vlapic.rdmsr(0x828) == 1 << 5


def test_a_vector_that_is_not_pending_any_more_is_delivered_as_the_spurious_one(cpu):
    cpu.write(0xF0, 4, 0x1EE)
    assert cpu.acknowledge(0x41) == 0xEE
    assert cpu.isr == 0
    cpu.post(0x41)
    assert cpu.acknowledge(0x41) == 0x41
    assert cpu.isr == 1 << 0x41


def test_an_init_level_deassert_does_nothing(board, cpu):
    board.add(1)
    board.events.clear()
    cpu.write(0x310, 4, 1 << 24)
    cpu.write(0x300, 4, 0x8500)
    assert board.events == []
    cpu.write(0x300, 4, 0xC500)
    assert board.names(1) == ["init"]


@pytest.mark.parametrize("mode", [2, 3, 7])
def test_smi_extint_and_reserved_commands_send_nothing(board, cpu, mode):
    board.add(1)
    board.events.clear()
    cpu.write(0x310, 4, 1 << 24)
    cpu.write(0x300, 4, mode << 8 | 0x41)
    assert board.events == []
    assert board.pending() == {}


def test_ipis_are_edges_whatever_the_trigger_bit_says(board, cpu):
    cpu.write(0x300, 4, 0x4C041)
    assert cpu.tmr == 0
    assert board.take(cpu) == 0x41


def test_ppr_is_the_higher_of_tpr_and_the_vector_in_service(cpu):
    cpu.write(0x80, 4, 0x35)
    assert cpu.read(0xA0, 4) == 0x35
    cpu.post(0x52)
    cpu.acknowledge(0x52)
    assert cpu.read(0xA0, 4) == 0x50
    cpu.write(0x80, 4, 0x5F)
    assert cpu.read(0xA0, 4) == 0x5F
    eoi(cpu)
    cpu.write(0x80, 4, 0x10)
    assert cpu.read(0xA0, 4) == 0x10


def test_cr8_and_tpr_are_one(cpu):
    cpu.cr8 = 9
    assert cpu.read(0x80, 4) == 0x90
    cpu.write(0x80, 4, 0x47)
    assert cpu.cr8 == 4


def test_a_suppressed_eoi_stays_in_the_local_apic(board, cpu):
    class Listener:
        def __init__(self):
            self.heard = []

        def eoi(self, vector):
            self.heard.append(vector)

    listener = Listener()
    board.bus.attach_ioapic(listener)
    for svr, heard in ((0x11FF, []), (0x1FF, [0x41])):
        cpu.write(0xF0, 4, svr)
        cpu.post(0x41, True)
        board.take(cpu)
        eoi(cpu)
        assert listener.heard == heard
        assert cpu.isr == 0


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
