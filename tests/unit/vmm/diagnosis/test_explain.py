"""Each stage that can hold an interrupt is named when it does: real chips, one stage a test."""

import json
import time

import pytest
from fake_processor import IF
from switchboard import Bench, spin

from pyhyve.base.errors import UsageError
from pyhyve.base.explanation import Explanation
from pyhyve.vmm.io.apicregs import APIC_DEFAULT_BASE, BASE_ENABLED, BASE_X2APIC, MSR_APIC_BASE

VECTOR = 0x41
SVR, TPR, EOI, LDR, DFR = 0xF0, 0x80, 0xB0, 0xD0, 0xE0
LVT_TIMER, LVT_LINT0, LVT_LINT1, TIMER_INITIAL = 0x320, 0x350, 0x360, 0x380
LEVEL, MASKED, LOGICAL, ACTIVE_LOW = 1 << 15, 1 << 16, 1 << 11, 1 << 13


def held(explanation: Explanation, by: str | None, *words: str) -> Explanation:
    """Fail unless the verdict is about that stage and has those words."""
    assert explanation.held_by == by, str(explanation)
    for word in words:
        assert word in explanation.verdict, explanation.verdict
    assert explanation.verdict.endswith(".")
    assert "\n" not in explanation.verdict
    if by is not None:
        assert any(stage.name == by and stage.holds for stage in explanation.stages)
    return explanation


# -- the I/O APIC ------------------------------------------------------------------------------------------------------


def test_pin_that_nothing_asserts(bench):
    bench.route(4, VECTOR)
    held(bench.explain(4), "pin", "nothing asserts I/O APIC pin 4")


def test_pin_that_nothing_is_wired_to(bench):
    bench.route(20, VECTOR)
    held(bench.explain(20), "pin", "no device is wired to I/O APIC pin 20")


def test_masked_pin(bench):
    bench.set_up_pic(0xFF, 0xFF)
    bench.route(4, MASKED | VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "I/O APIC mask", "masked at the I/O APIC (pin 4, entry 0x10041)", "IMR 0xff")


def test_masked_pin_without_an_8259_behind_it(bench):
    bench.ioapic.pin(20).set_level(True)
    held(bench.explain(20), "I/O APIC mask", "pin 20 is masked", "while 1 of its sources assert it")


def test_edge_that_stays_high_after_its_interrupt(bench):
    bench.route(4, VECTOR)
    bench.irq[4].set_level(True)
    bench.take()
    bench.lapic(0).write(EOI, 4, 0)
    held(bench.explain(4), "I/O APIC trigger", "edge-triggered and has stayed active", "taken once")


def test_second_source_of_an_edge_pin_is_no_edge(bench):
    bench.route(4, VECTOR)
    second = bench.ioapic.pin(4)
    bench.irq[4].set_level(True)
    bench.take()
    bench.lapic(0).write(EOI, 4, 0)
    second.set_level(True)
    explanation = held(bench.explain(4), "I/O APIC trigger", "held by 2 of 2 sources")
    assert explanation.stages[0].registers == {"asserters": 2}


def test_polarity_that_is_not_the_lines(bench):
    bench.route(4, ACTIVE_LOW | LEVEL | MASKED | VECTOR)
    bench.irq[4].set_level(True)
    bench.route(4, ACTIVE_LOW | LEVEL | VECTOR)
    held(bench.explain(4), "I/O APIC polarity", "polarity (active low) is not that of its line")


def test_illegal_vector(bench):
    bench.route(4, 0x0B)
    bench.irq[4].set_level(True)
    bench.irq[4].set_level(False)
    explanation = bench.explain(4)
    assert any(stage.holds and "illegal vector 0xb" in stage.reason for stage in explanation.stages)


def test_delivery_mode_that_carries_nothing(bench):
    bench.route(20, 2 << 8)
    bench.ioapic.pin(20).set_level(True)
    explanation = bench.explain(20)
    assert any(stage.holds and "delivery mode SMI" in stage.reason for stage in explanation.stages)


def test_remote_irr_whose_eoi_is_lost(bench):
    bench.route(4, LEVEL | VECTOR)
    bench.irq[4].set_level(True)
    bench.lapic(0).init()  # forgets what it had
    bench.lapic(0).write(SVR, 4, 0x1FF)
    held(bench.explain(4), "I/O APIC remote IRR", "that EOI is lost")


def test_remote_irr_while_eois_are_not_broadcast(make_vm):
    vm, processor = make_vm(spin)
    bench = Bench(vm, processor, pins=32)  # with an EOI register
    bench.lapic(0).write(SVR, 4, 0x11FF)
    bench.route(4, LEVEL | VECTOR)
    bench.irq[4].set_level(True)
    bench.take()
    bench.lapic(0).write(EOI, 4, 0)
    held(bench.explain(4), "I/O APIC remote IRR", "its own EOI register", "vCPU 0 does not broadcast EOIs")


def test_level_in_service_is_no_lost_eoi(bench):
    bench.route(4, LEVEL | VECTOR)
    bench.irq[4].set_level(True)
    bench.take()
    held(bench.explain(4), "vCPU 0 ISR", "vector 0x41 in service", "has not written EOI")


def test_destination_that_nobody_has_shows_everybody(make_bench):
    bench = make_bench(2)
    bench.route(4, 0x77 << 56 | LEVEL | VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "destination", "physical destination 0x77 names no local APIC", "APIC 0: flat", "APIC 1")


def test_logical_destination_shows_ldr_and_dfr(make_bench):
    bench = make_bench(2)
    for n in range(2):
        bench.lapic(n).write(DFR, 4, 0x0FFF_FFFF)
        bench.lapic(n).write(LDR, 4, (n << 28) | 1 << 24)
    bench.route(4, 0x22 << 56 | LOGICAL | LEVEL | VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "destination", "logical destination 0x22", "cluster, LDR 0x11, DFR 0xfffffff")


def test_destination_is_another_vcpu(make_bench):
    bench = make_bench(2)
    bench.route(4, 1 << 56 | VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4, vcpu=1), None, "waits and is taken at the next entry")
    explanation = bench.explain(4, vcpu=0)
    assert any(stage.holds and "does not name vCPU 0" in stage.reason for stage in explanation.stages)


# -- local APIC and vCPU -----------------------------------------------------------------------------------------------


def test_local_apic_off_by_hardware(bench):
    bench.lapic(0).wrmsr(MSR_APIC_BASE, APIC_DEFAULT_BASE)
    bench.route(4, LEVEL | VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "vCPU 0 local APIC", "switched off in IA32_APIC_BASE")


def test_local_apic_off_by_software(bench):
    bench.lapic(0).write(SVR, 4, 0xFF)
    bench.route(4, LEVEL | VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "vCPU 0 local APIC", "disabled by software (SVR 0xff")


def test_task_priority(bench):
    bench.route(4, VECTOR)
    bench.backends[0].registers["cr8"] = 4  # the processor's, which the local APIC has not heard of
    bench.irq[4].set_level(True)
    held(bench.explain(4), "vCPU 0 priority", "TPR 0x40, CR8 4", "blocks priority class 4")


def test_higher_priority_in_service(bench):
    bench.lapic(0).post(0x91)
    bench.take()
    bench.route(4, VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "vCPU 0 ISR", "vector 0x91 in service, of priority class 9")


def test_interrupts_off(bench):
    bench.backends[0].registers.update(rflags=2, rip=0x1234)
    bench.route(4, VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "vCPU 0 RFLAGS.IF", "RFLAGS.IF is 0", "rip 0x1234")


def test_shadow_of_sti(bench):
    backend = bench.backends[0]
    backend.interruptible = lambda: False
    bench.route(4, VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "vCPU 0 shadow", "shadow of STI or MOV SS")


def test_another_event_first(bench):
    bench.backends[0].inject(14, 3, 0)
    bench.route(4, VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "vCPU 0 entry", "takes the event that is on its way into its handler first")


def test_higher_vector_first(bench):
    bench.lapic(0).post(VECTOR)
    bench.lapic(0).post(0x91)
    held(bench.explain(vector=VECTOR), "vCPU 0 entry", "takes vector 0x91 first")


def test_nmi_first(bench):
    bench.lapic(0).post(VECTOR)
    bench.vm.vcpus[0].post_nmi()
    held(bench.explain(vector=VECTOR), "vCPU 0 entry", "takes an NMI first")


def test_init_first(bench):
    bench.lapic(0).post(VECTOR)
    bench.vm.vcpus[0].post_init()
    held(bench.explain(vector=VECTOR), "vCPU 0 state", "an INIT resets vCPU 0 first")


def test_vcpu_that_nobody_started(make_bench):
    bench = make_bench(2)
    bench.vm.vcpus[1].state = 2
    bench.route(4, 1 << 56 | VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "vCPU 1 state", "waits for a start-up IPI")


def test_paused_vm(bench):
    bench.vm.start()
    bench.vm.pause()
    bench.route(4, VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "vCPU 0 state", "the VM is paused")
    bench.vm.resume()


def test_halted_vcpu_with_interrupts_off(bench):
    bench.backends[0].registers["rflags"] = 2
    bench.vm.vcpus[0].state = 1
    bench.route(4, VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "vCPU 0 RFLAGS.IF", "has halted")


def test_deliverable_interrupt_is_held_by_nothing(bench):
    bench.route(4, VECTOR)
    bench.irq[4].set_level(True)
    held(bench.explain(4), None, "nothing holds it", "vector 0x41 waits and is taken at the next entry")


def test_delivered_is_counted(bench):
    bench.route(4, VECTOR)
    for _ in range(3):
        bench.irq[4].pulse()
        bench.take()
        bench.lapic(0).write(EOI, 4, 0)
    explanation = held(bench.explain(4), "pin", "taken 3 times")
    delivered = next(stage for stage in explanation.stages if stage.name == "vCPU 0 delivered")
    assert delivered.registers == {"count": 3}


def test_isa_interrupt_0_is_pin_2(bench):
    bench.route(2, LEVEL | VECTOR)
    bench.irq[0].set_level(True)
    assert "pin 2" in bench.explain(0).subject
    held(bench.explain(0), None, "nothing holds it")


# -- the 8259s ---------------------------------------------------------------------------------------------------------


def test_8259_that_nobody_initialized(bench):
    bench.irq[4].set_level(True)
    held(bench.explain(4), "I/O APIC mask", "has not been initialized")


def test_8259_line_that_nothing_asserts(bench):
    bench.set_up_pic()
    held(bench.explain(4), "ISA line", "nothing asserts IRQ 4")


def test_8259_edge_that_stays_high(bench):
    bench.set_up_pic()
    bench.irq[4].set_level(True)
    bench.take()
    bench.pic.write(0x20, 1, 0x20)
    held(bench.explain(4), "master 8259 trigger", "has stayed high")


def test_8259_slave_that_withdrew_what_it_asked_for(bench):
    bench.set_up_pic()
    bench.pic.write(0x4D1, 1, 0x02)
    bench.irq[9].set_level(True)
    bench.irq[9].set_level(False)
    bench.pic.write(0xA1, 1, 0xFF)
    said = bench.explain(vector=0x2F)
    assert said.held_by is None
    assert "is taken at the next entry" in said.verdict
    assert "spurious: the slave has withdrawn" in str(said)
    bench.take()
    assert "next entry" not in bench.explain(vector=0x2F).verdict


def test_8259_input_in_service(bench):
    bench.set_up_pic()
    bench.irq[4].set_level(True)
    bench.take()
    held(bench.explain(4), "master 8259 ISR", "IRQ 4 is in service", "no EOI has come")


def test_8259_priority(bench):
    bench.set_up_pic()
    bench.irq[1].set_level(True)
    bench.take()
    bench.irq[4].set_level(True)
    held(bench.explain(4), "master 8259 ISR", "input 1, of higher priority")


def test_8259_rotated_priority(bench):
    bench.set_up_pic()
    bench.pic.write(0x20, 1, 0xC0 | 1)  # 1 is the lowest, 2 the highest
    bench.irq[4].set_level(True)
    bench.take()
    bench.irq[1].set_level(True)
    held(bench.explain(1), "master 8259 ISR", "input 4, of higher priority", "never taken")


def test_8259_cascade_masked(bench):
    bench.set_up_pic(master_mask=1 << 2)
    bench.irq[11].set_level(True)
    held(bench.explain(11), "I/O APIC mask", "the cascade (IRQ 2) is masked")


def test_8259_elcr_is_shown(bench):
    bench.set_up_pic()
    bench.pic.write(0x4D1, 1, 1 << 3)
    bench.irq[11].set_level(True)
    explanation = bench.explain(11)
    held(explanation, None, "from the 8259s")
    assert any(stage.state == "level-triggered (ELCR 0x08)" for stage in explanation.stages)


def test_8259_input_of_higher_priority_first(bench):
    bench.set_up_pic()
    bench.irq[4].set_level(True)
    bench.irq[1].set_level(True)
    held(bench.explain(4), "vCPU 0 entry", "takes vector 0x21 of the 8259s first")


def test_local_apic_before_the_8259(bench):
    bench.set_up_pic()
    bench.irq[4].set_level(True)
    bench.lapic(0).post(0x91)
    held(bench.explain(4), "vCPU 0 entry", "takes vector 0x91 of its local APIC first")


def test_lint0_masked(bench):
    bench.set_up_pic()
    bench.lapic(0).write(LVT_LINT0, 4, MASKED | 0x700)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "8259 INTR", "masked at LINT0 of vCPU 0")


def test_lint0_in_another_mode(bench):
    bench.set_up_pic()
    bench.lapic(0).write(LVT_LINT0, 4, 0x41)
    bench.irq[4].set_level(True)
    held(bench.explain(4), "8259 INTR", "delivery mode fixed, not ExtINT")


def test_8259_with_interrupts_off(bench):
    bench.set_up_pic()
    bench.backends[0].registers["rflags"] = 2
    bench.irq[4].set_level(True)
    held(bench.explain(4), "vCPU 0 RFLAGS.IF", "IRQ 4 (vector 0x24) waits")


def test_8259_passes_a_switched_off_local_apic(bench):
    bench.set_up_pic()
    bench.lapic(0).wrmsr(MSR_APIC_BASE, APIC_DEFAULT_BASE)
    bench.irq[4].set_level(True)
    held(bench.explain(4), None, "vector 0x24, from the 8259s")


# -- vectors -----------------------------------------------------------------------------------------------------------


def test_vector_leads_to_its_pin(bench):
    bench.route(4, VECTOR)
    held(bench.explain(vector=VECTOR), "pin", "nothing asserts I/O APIC pin 4")


def test_vector_leads_to_the_8259(bench):
    bench.set_up_pic()
    held(bench.explain(vector=0x24), "ISA line", "nothing asserts IRQ 4")


def test_vector_of_a_masked_timer(bench):
    bench.lapic(0).write(LVT_TIMER, 4, MASKED | 0xEC)
    held(bench.explain(vector=0xEC), "vCPU 0 LVT timer", "local vector of the timer is masked")


def test_vector_of_a_timer_that_is_not_armed(bench):
    bench.lapic(0).write(LVT_TIMER, 4, 0xEC)
    held(bench.explain(vector=0xEC), "vCPU 0 timer", "is not armed")


def test_vector_of_an_armed_timer(bench):
    bench.lapic(0).write(LVT_TIMER, 4, 1 << 17 | 0xEC)
    bench.lapic(0).write(TIMER_INITIAL, 4, 0xFFFF_FFFF)
    explanation = held(bench.explain(vector=0xEC), None, "nothing holds or awaits it")
    assert any(stage.state.startswith("periodic, due in") for stage in explanation.stages)


def test_vector_that_waits_at_one_of_two(make_bench):
    bench = make_bench(2)
    bench.backends[1].registers["rflags"] = 2
    bench.lapic(1).post(0x55)
    held(bench.explain(vector=0x55), "vCPU 1 RFLAGS.IF", "vCPU 1 runs with interrupts off")
    held(bench.explain(vector=0x55, vcpu=0), None, "only an IPI or a message")


def test_message_that_was_dropped(bench):
    bench.vm.apic_bus.send_msi(0xFED0_0000, 0x66)
    held(bench.explain(vector=0x66), "messages dropped", "0xfed00000, which is no interrupt message")
    assert bench.explain(vector=0x67).held_by is None


def test_message_for_nobody(bench):
    bench.vm.apic_bus.send_msi(0xFEE7_7000, 0x66)
    held(bench.explain(vector=0x66), "messages for nobody", "physical destination 0x77", "APIC 0: flat")


def test_x2apic_ids_are_shown_whole(bench):
    bench.lapic(0).wrmsr(MSR_APIC_BASE, APIC_DEFAULT_BASE | BASE_ENABLED | BASE_X2APIC)
    bench.vm.apic_bus.send_msi(0xFEE7_7000, 0x66)
    held(bench.explain(vector=0x66), "messages for nobody", "APIC 0: x2APIC, LDR 0x1")


# -- NMI ---------------------------------------------------------------------------------------------------------------


def test_no_nmi(bench):
    held(bench.explain(nmi=True), "NMI latch", "no NMI waits")


def test_nmi_that_waits_behind_another(bench):
    backend = bench.backends[0]
    backend.nmi_blocked = True
    bench.vm.vcpus[0].post_nmi()
    held(bench.explain(nmi=True), "NMI blocking", "until its IRET")


def test_nmi_masked_at_its_pin(bench):
    bench.lapic(0).write(LVT_LINT1, 4, MASKED | 0x400)
    bench.lapic(0).lint(1, True)
    held(bench.explain(nmi=True), "LINT1", "is asserted, but masked")


def test_nmi_does_not_mind_interrupts_off(bench):
    bench.backends[0].registers["rflags"] = 2 & ~IF
    bench.vm.vcpus[0].post_nmi()
    held(bench.explain(nmi=True), None, "the NMI waits and is taken at the next entry")
    bench.take()
    held(bench.explain(nmi=True), "NMI latch", "taken once")


def test_nmi_of_a_vcpu_that_nobody_started(make_bench):
    bench = make_bench(2)
    bench.vm.vcpus[1].state = 2
    bench.vm.vcpus[1].post_nmi()
    held(bench.explain(nmi=True, vcpu=1), "vCPU 1 state", "waits for a start-up IPI")


# -- the answer itself -------------------------------------------------------------------------------------------------


def test_questions_that_cannot_be(bench):
    for options, words in (
        ({"irq": 24}, "IRQ 24: this machine has 0 to 23"),
        ({"irq": -1}, "IRQ -1"),
        ({"irq": 4, "vcpu": 1}, "vCPU 1: this machine has 0 to 0"),
        ({"vector": 256}, "vectors are 0 to 255"),
        ({}, "name one thing"),
        ({"irq": 4, "nmi": True}, "name one thing"),
    ):
        with pytest.raises(UsageError, match=words):
            bench.explain(**options)


def test_explanation_survives_json(bench):
    bench.set_up_pic()
    for question in ({"irq": 4}, {"vector": VECTOR}, {"nmi": True}, {"irq": 20}):
        explanation = bench.explain(**question)
        document = json.loads(json.dumps(explanation.as_json()))
        assert document["schema"] == ["explanation", 1]
        assert Explanation.from_json(document) == explanation
    with pytest.raises(ValueError, match="not an explanation"):
        Explanation.from_json({"subject": "IRQ 4"})


def test_text_marks_what_holds(bench):
    bench.route(4, VECTOR)
    lines = str(bench.explain(4)).splitlines()
    assert lines[0].startswith("IRQ 4: nothing asserts")
    assert [line for line in lines if line.startswith("* ")] == [lines[1]]


def test_question_to_a_running_vm_leaves_it_running(bench):
    bench.vm.start()
    bench.route(4, VECTOR)
    for _ in range(20):
        assert bench.explain(4).held_by == "pin"
    assert bench.vm.state.value == "running"
    before, deadline = bench.backends[0].entries, time.monotonic() + 30
    while bench.backends[0].entries == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    bench.vm.stop()
    assert "the VM has ended" in "".join(stage.state for stage in bench.explain(4).stages)
