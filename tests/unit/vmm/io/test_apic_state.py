"""The state of a local APIC's interrupts: the monitor's own and the software processor's agree, whatever happens."""

import random

import pytest

from pyhyve.cpu import select
from pyhyve.cpu.processor import ApicState, KeepsApicState
from pyhyve.vmm.io.vlapicpriority import PlainApicState


@pytest.fixture
def states():
    vcpu = select.processor("bt").create_vm().create_vcpu(0)
    assert isinstance(vcpu, KeepsApicState)
    return PlainApicState(), vcpu.apic


def seen(state: ApicState) -> tuple[object, ...]:
    return (state.irr, state.isr, state.tmr, state.tpr, state.ppr, state.pending(), state.icr_low, state.icr_high)


@pytest.mark.parametrize("seed", range(20))
def test_both_do_the_same(states: tuple[ApicState, ApicState], seed: int) -> None:
    draw = random.Random(seed)
    for state in states:
        state.accepting = True
    for _ in range(500):
        kind = draw.choice(("accept", "accept", "take", "complete", "tpr", "icr", "set", "clear", "accepting"))
        vector, bits, level = draw.randrange(16, 256), draw.getrandbits(256), draw.random() < 0.3
        answers = []
        for state in states:
            match kind:
                case "accept":
                    answers.append(state.accept(vector, level))
                case "take":
                    answers.append(state.pending())
                    if state.pending() >= 0:
                        state.acknowledge(state.pending())
                case "complete":
                    answers.append(state.complete())
                case "tpr":
                    state.tpr = vector
                case "icr":
                    state.icr_low, state.icr_high = vector, bits & 0xFFFF_FFFF
                case "accepting":
                    state.accepting = level
                case "set" if level:
                    state.irr, state.isr, state.tmr = bits, bits >> 128, bits >> 64
                case "clear" if level:
                    state.clear()
        assert answers[:1] == answers[1:]
        assert seen(states[0]) == seen(states[1])
