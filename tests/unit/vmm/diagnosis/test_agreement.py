"""What is explained is what happens: after random operations, a vCPU takes just what nothing is said to hold."""

from fake_processor import IF, FakeProcessor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from switchboard import EOI, SVR, TPR, Bench, spin

from pyhyve.cpu.processor import INJECT_EXTERNAL
from pyhyve.vmm.io.apicregs import APIC_DEFAULT_BASE, BASE_BSP, BASE_ENABLED, MSR_APIC_BASE

IRQS = (0, 1, 3, 4, 9, 11)
VECTORS = (0x31, 0x35, 0x41, 0x91, 0xEC)
LVT_LINT0 = 0x350
ENTRIES = st.builds(
    lambda vector, level, low, masked, dest: vector | low << 13 | level << 15 | masked << 16 | dest << 56,
    st.sampled_from((*VECTORS, 0x0B)),
    st.booleans(),
    st.sampled_from((0, 0, 0, 1)),
    st.sampled_from((0, 0, 1)),
    st.sampled_from((0, 0, 0xFF, 0x77)),
)
OPERATIONS = st.one_of(
    st.tuples(st.just("level"), st.sampled_from(IRQS), st.booleans()),
    st.tuples(st.just("route"), st.sampled_from(IRQS), ENTRIES),
    st.tuples(st.just("post"), st.sampled_from(VECTORS), st.just(0)),
    st.tuples(st.just("tpr"), st.sampled_from((0, 0x20, 0x40, 0xF0)), st.just(0)),
    st.tuples(st.just("if"), st.booleans(), st.just(0)),
    st.tuples(st.just("svr"), st.sampled_from((0x1FF, 0x1FF, 0xFF)), st.just(0)),
    st.tuples(st.just("base"), st.sampled_from((BASE_ENABLED, BASE_ENABLED, 0)), st.just(0)),
    st.tuples(st.just("lint0"), st.sampled_from((0x700, 0x10700, 0x41)), st.just(0)),
    st.tuples(st.just("pic"), st.sampled_from((0, 0, 0x12, 0xFF)), st.sampled_from((0, 0xFF))),
    st.tuples(st.just("pic-eoi"), st.sampled_from((0x20, 0xA0)), st.sampled_from((0x20, 0xA0, 0xC1))),
    st.tuples(st.just("eoi"), st.just(0), st.just(0)),
    st.tuples(st.just("nmi"), st.booleans(), st.just(0)),
    st.tuples(st.just("take"), st.just(0), st.just(0)),
)


def carry_out(bench: Bench, operation: str, first: int, second: int) -> None:
    lapic, backend = bench.lapic(0), bench.backends[0]
    match operation:
        case "level":
            bench.irq[first].set_level(bool(second))
        case "route":
            bench.route(2 if first == 0 else first, second)
        case "post":
            lapic.post(first)
        case "tpr":
            bench.vm.vcpus[0].write_apic(TPR, 4, first)
        case "if":
            backend.registers["rflags"] = 2 | (IF if first else 0)
        case "svr":
            lapic.write(SVR, 4, first)
        case "base":
            lapic.wrmsr(MSR_APIC_BASE, APIC_DEFAULT_BASE | BASE_BSP | first)
        case "lint0":
            lapic.write(LVT_LINT0, 4, first)
        case "pic":
            bench.set_up_pic(first, second)
        case "pic-eoi":
            bench.pic.write(first, 1, second)
        case "eoi":
            lapic.write(EOI, 4, 0)
        case "nmi":
            backend.nmi_blocked = bool(first)
            bench.vm.vcpus[0].post_nmi()
        case "take":
            bench.take()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(legacy=st.booleans(), operations=st.lists(OPERATIONS, max_size=25))
def test_explanations_agree_with_what_the_vcpu_does(make_vm, legacy, operations):
    processor: FakeProcessor
    vm, processor = make_vm(spin)
    bench = Bench(vm, processor)
    if legacy:
        bench.set_up_pic()
    for operation, first, second in operations:
        carry_out(bench, operation, first, second)
    explained = {vector: bench.explain(vector=vector) for vector in (*VECTORS, *range(0x20, 0x30))}
    by_irq = {irq: bench.explain(irq) for irq in IRQS}
    nmi = bench.explain(nmi=True)
    backend = bench.backends[0]
    vm.vcpus[0].attend()
    event = backend._pending
    taken = event[0] if event is not None and event[1] == INJECT_EXTERNAL else None
    waiting = {vector for vector, each in explained.items() if "is taken at the next entry" in each.verdict}
    by_line = {irq for irq, each in by_irq.items() if "is taken at the next entry" in each.verdict}
    assert waiting <= {taken}, explained[min(waiting)]
    for irq in by_line:
        assert f"vector {taken:#x}" in by_irq[irq].verdict
    if taken is not None:
        assert waiting or by_line, f"vector {taken:#x} was taken, though: {explained[taken]}"
    assert ("is taken at the next entry" in nmi.verdict) == (event is not None and event[0] == 2)
    vm.close()
