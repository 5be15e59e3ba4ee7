"""Who receives an interrupt: destination modes, shorthands, lowest priority."""

import pytest

from pyhyve.vmm.io.apicbus import FIXED, LOWEST_PRIORITY, NMI, SMI


@pytest.mark.seed("S7")
def test_a_message_that_is_no_interrupt_is_counted_and_dropped(board, cpu):
    board.bus.send_msi(0x1000, 0x41)
    assert board.bus.dropped == 1
    assert board.pending() == {}


@pytest.mark.seed("S7")
def test_an_msi_reaches_the_physical_destination(board):
    board.add(0)
    board.add(1)
    board.bus.send_msi(0xFEE01000, 0x4041)
    assert board.pending() == {1: 0x41}


@pytest.mark.seed("S8")
def test_dm_without_rh_is_physical(board):
    for n in range(3):
        board.add(n).write(0xD0, 4, 1 << (24 + n))
    board.bus.send_msi(0xFEE02004, 0x41)
    assert board.pending() == {2: 0x41}


@pytest.mark.seed("S8")
def test_flat_destinations_are_a_set_of_bits(board):
    for n in range(4):
        board.add(n).write(0xD0, 4, 1 << (24 + n))
    board.bus.send_msi(0xFEE0A00C, 0x41)
    assert board.pending() == {1: 0x41, 3: 0x41}


@pytest.mark.seed("S8")
def test_cluster_destinations_name_a_cluster_and_bits_in_it(board):
    for n in range(6):
        vlapic = board.add(n)
        vlapic.write(0xE0, 4, 0x0FFFFFFF)
        vlapic.write(0xD0, 4, (n // 3) << 28 | 1 << (24 + n % 3))
    board.bus.send_msi(0xFEE1500C, 0x41)
    assert board.pending() == {3: 0x41, 5: 0x41}


@pytest.mark.seed("S8")
def test_x2apic_logical_destinations_name_a_cluster_of_sixteen(board):
    for n in (0, 1, 16, 17, 33):
        board.add(n, x2apic=True)
    board.bus.deliver(1 << 16 | 0b11, True, FIXED, 0x41, False, x2apic=True)
    assert board.pending() == {16: 0x41, 17: 0x41}


@pytest.mark.seed("S8")
def test_0xff_is_everyone_for_an_eight_bit_sender(board):
    board.add(0)
    board.add(1)
    board.add(2, x2apic=True)
    board.bus.send_msi(0xFEEFF000, 0x41)
    assert board.pending() == {0: 0x41, 1: 0x41, 2: 0x41}


@pytest.mark.seed("S8")
def test_0xffffffff_is_everyone_for_an_x2apic_sender_and_0xff_is_an_id(board):
    first = board.add(0, x2apic=True)
    board.add(1, x2apic=True)
    board.add(255, x2apic=True)
    first.wrmsr(0x830, 0xFF << 32 | 0x42)
    assert board.pending() == {255: 0x42}
    first.wrmsr(0x830, 0xFFFFFFFF << 32 | 0x43)
    assert board.pending() == {0: 0x43, 1: 0x43, 255: 0x43}


@pytest.mark.seed("S8")
def test_lowest_priority_picks_one_of_the_least_busy(board):
    for n in range(3):
        vlapic = board.add(n)
        vlapic.write(0xD0, 4, 1 << (24 + n))
    board.cpus[0].cr8 = 5
    board.cpus[2].cr8 = 3
    board.bus.send_msi(0xFEE0700C, LOWEST_PRIORITY << 8 | 0x61)
    assert board.pending() == {1: 0x61}


@pytest.mark.seed("S8")
def test_lowest_priority_passes_over_disabled_apics(board):
    board.add(0, enable=False).write(0xD0, 4, 1 << 24)
    board.add(1).write(0xD0, 4, 2 << 24)
    board.cpus[1].cr8 = 2
    board.bus.send_msi(0xFEE0300C, LOWEST_PRIORITY << 8 | 0x61)
    assert board.pending() == {1: 0x61}


def test_lowest_priority_spreads_vectors_over_equals(board):
    for n in range(2):
        board.add(n).write(0xD0, 4, 1 << (24 + n))
    board.bus.send_msi(0xFEE0300C, LOWEST_PRIORITY << 8 | 0x60)
    board.bus.send_msi(0xFEE0300C, LOWEST_PRIORITY << 8 | 0x61)
    assert board.pending() == {0: 0x60, 1: 0x61}


def test_lowest_priority_goes_to_the_focus_processor(board):
    for n in range(3):
        board.add(n).write(0xD0, 4, 1 << (24 + n))
    board.cpus[2].post(0x61)
    board.take(board.cpus[2])
    board.bus.send_msi(0xFEE0700C, LOWEST_PRIORITY << 8 | 0x61)
    assert board.cpus[2].irr == 1 << 0x61
    board.cpus[2].write(0xF0, 4, 0x3FF)  # no focus checking
    board.cpus[0].cr8 = 1
    board.bus.send_msi(0xFEE0700C, LOWEST_PRIORITY << 8 | 0x61)
    assert board.pending() == {1: 0x61}


@pytest.mark.seed("S8")
def test_fixed_interrupts_go_to_all_that_a_redirectable_message_names(board):
    for n in range(3):
        board.add(n).write(0xD0, 4, 1 << (24 + n))
    board.bus.send_msi(0xFEE0600C, 0x61)
    assert board.pending() == {1: 0x61, 2: 0x61}


def test_a_level_message_asserts_and_its_deassertion_is_nothing(board, cpu):
    board.bus.send_msi(0xFEE00000, 0xC041)
    assert cpu.tmr == 1 << 0x41
    assert board.take(cpu) == 0x41
    board.bus.send_msi(0xFEE00000, 0x8041)
    assert cpu.irr == 0
    assert board.bus.dropped == 0


def test_reserved_delivery_modes_are_counted_and_dropped(board, cpu):
    for mode in (3, 6):
        board.bus.send_msi(0xFEE00000, mode << 8 | 0x41)
    assert board.bus.dropped == 2
    board.bus.send_msi(0xFEE00000, SMI << 8)
    assert board.bus.undelivered == 1


def test_an_illegal_vector_in_a_message_is_an_error_received(board, cpu):
    board.bus.send_msi(0xFEE00000, 0x0F)
    cpu.write(0x280, 4, 0)
    assert cpu.read(0x280, 4) == 1 << 6


def test_extended_destinations_have_fifteen_bits(board):
    board.add(0x12C, x2apic=True)
    board.add(0x2C)
    board.bus.send_msi(0xFEE2C020, 0x41)
    assert board.pending() == {0x2C: 0x41}
    board.bus.extended_ids = True
    board.bus.send_msi(0xFEE2C020, 0x42)
    assert board.pending() == {0x2C: 0x41, 0x12C: 0x42}
    board.bus.send_msi(0xFEE2C030, 0x43)
    assert board.bus.dropped == 1


def test_the_paravirtual_ipi_reaches_the_ids_of_its_bits(board):
    for n in (0, 1, 5, 70):
        board.add(n, x2apic=True)
    assert board.bus.send_to_many(1 << 65 | 1 << 0 | 1 << 9, 5, 0x41) == 2
    assert board.pending() == {5: 0x41, 70: 0x41}
    assert board.bus.send_to_many(1, 1, NMI << 8) == 1
    assert board.names(1)[-1] == "nmi"
    assert board.bus.send_to_many(0xFFFFFFFF, 0xFFFFFFFF, 0) == 0
    assert board.bus.send_to_many(1, 0, 1 << 18 | 0x41) < 0
    assert board.bus.send_to_many(1, 0, 0x541) < 0


def test_an_interrupt_for_nobody_is_counted(board, cpu):
    assert board.bus.deliver(9, False, FIXED, 0x41, False) == 0
    assert board.bus.deliver(0, False, SMI, 0, False) == 0
    assert board.bus.undelivered == 2


def test_an_nmi_message_reaches_the_vcpu_and_not_irr(board, cpu):
    board.bus.send_msi(0xFEE00000, NMI << 8)
    assert board.names(0) == ["nmi"]
    assert board.pending() == {}


def test_two_apics_of_one_id_are_refused(board, cpu):
    with pytest.raises(ValueError, match="id 0"):
        board.bus.attach(cpu)


def test_counters_survive_save_and_restore(board):
    board.bus.send_msi(0, 0)
    state = board.bus.save()
    board.bus.send_msi(0, 0)
    board.bus.restore(state)
    assert board.bus.dropped == 1


def test_the_last_bad_message_is_kept(board):
    board.bus.send_msi(0xFED0_0000, 0x31)
    board.bus.send_msi(0x1234_5678, 0x42)
    assert board.bus.dropped == 2
    assert board.bus.last_dropped == (0x1234_5678, 0x42)


def test_the_last_interrupt_for_nobody_is_kept(board, cpu):
    assert board.bus.deliver(0x77, False, FIXED, 0x31, False) == 0
    assert board.bus.last_undelivered == (0x77, False, FIXED, 0x31)
