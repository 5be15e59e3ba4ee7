"""What a trace sees of real chips, and that nothing of it is there before and after."""

import json

import pytest

from pyhyve.base.errors import HostError, UsageError
from pyhyve.cli import main as cli
from pyhyve.vmm.diagnosis.chrome import convert
from pyhyve.vmm.diagnosis.trace import InterruptTrace, load
from pyhyve.vmm.io.apicregs import APIC_DEFAULT_BASE, BASE_ENABLED, BASE_X2APIC, MSR_APIC_BASE

VECTOR = 0x41
EOI, ICR_LOW, ICR_HIGH, LVT_TIMER = 0xB0, 0x300, 0x310, 0x320
EOI_MSR = 0x80B


def seen(trace):
    """Kind, vCPU, vector and source of each event; times only grow."""
    events = trace.events()
    assert [event.time for event in events] == sorted(event.time for event in events)
    return [(event.kind, event.vcpu, event.vector, event.source) for event in events]


def test_interrupt_of_a_pin_from_its_source_to_its_eoi(bench):
    bench.route(4, VECTOR)
    with bench.interrupts.trace() as trace:
        bench.irq[4].pulse()
        bench.take()
        bench.vm.vcpus[0].write_apic(EOI, 4, 0)
    assert seen(trace) == [
        ("raised", -1, VECTOR, "pin 4"),
        ("accepted", 0, VECTOR, "pin 4"),
        ("delivered", 0, VECTOR, "pin 4"),
        ("ended", 0, VECTOR, "pin 4"),
    ]
    raised, _, delivered, ended = trace.events()
    assert trace.waits[VECTOR].total == delivered.time - raised.time
    assert trace.services[VECTOR].total == ended.time - delivered.time


def test_masked_pin_raises_nothing(bench):
    with bench.interrupts.trace() as trace:
        bench.irq[4].pulse()
    assert seen(trace) == []


def test_second_interrupt_before_the_first_is_taken_is_merged(bench):
    bench.route(4, VECTOR)
    with bench.interrupts.trace() as trace:
        bench.irq[4].pulse()
        bench.irq[4].pulse()
        bench.take()
    assert [event[0] for event in seen(trace)] == ["raised", "accepted", "raised", "merged", "delivered"]
    assert trace.waits[VECTOR].count == 1
    assert trace.waits[VECTOR].total == trace.events()[-1].time - trace.events()[0].time


def test_message(bench):
    with bench.interrupts.trace() as trace:
        bench.vm.apic_bus.send_msi(0xFEE0_0000, 0x55)
        bench.vm.apic_bus.send_msi(0x1000, 0x66)
    assert seen(trace) == [("raised", -1, 0x55, "MSI"), ("accepted", 0, 0x55, "MSI"), ("raised", -1, 0x66, "MSI")]


def test_ipi_to_another_vcpu(make_bench):
    bench = make_bench(2)
    with bench.interrupts.trace() as trace:
        bench.lapic(0).write(ICR_HIGH, 4, 1 << 24)
        bench.lapic(0).write(ICR_LOW, 4, 0x55)
        bench.lapic(0).write(ICR_LOW, 4, 3 << 18 | 0x56)
        bench.take(1)
    assert seen(trace) == [
        ("raised", -1, 0x55, "IPI"),
        ("accepted", 1, 0x55, "IPI"),
        ("raised", -1, 0x56, "IPI"),
        ("accepted", 1, 0x56, "IPI"),
        ("delivered", 1, 0x56, "IPI"),
    ]


def test_local_timer(bench):
    bench.lapic(0).write(LVT_TIMER, 4, 0xEC)
    with bench.interrupts.trace() as trace:
        bench.lapic(0).post(0xEC)
        bench.lapic(0).post(0x99)
    assert seen(trace) == [("accepted", 0, 0xEC, "timer"), ("accepted", 0, 0x99, "local")]


def test_interrupt_of_the_8259(bench):
    bench.set_up_pic()
    with bench.interrupts.trace() as trace:
        bench.irq[4].pulse()
        bench.take()
    assert [event[:3] for event in seen(trace)] == [("accepted", 0, 0x24), ("delivered", 0, 0x24)]


def test_nmi(bench):
    with bench.interrupts.trace() as trace:
        bench.vm.vcpus[0].post_nmi()
        bench.take()
    assert ("delivered", 0, 2, "NMI") in seen(trace)


def test_eoi_in_x2apic_mode(bench):
    bench.lapic(0).wrmsr(MSR_APIC_BASE, APIC_DEFAULT_BASE | BASE_ENABLED | BASE_X2APIC)
    with bench.interrupts.trace() as trace:
        bench.lapic(0).post(VECTOR)
        bench.take()
        bench.vm.vcpus[0].msrs.writers[EOI_MSR](EOI_MSR, 0)
    assert seen(trace)[-1] == ("ended", 0, VECTOR, "local")
    assert bench.lapic(0).isr == 0


def test_interrupt_from_before_the_trace_has_no_latency(bench):
    bench.lapic(0).post(VECTOR)
    with bench.interrupts.trace() as trace:
        bench.take()
        bench.vm.vcpus[0].write_apic(EOI, 4, 0)
    assert [event[0] for event in seen(trace)] == ["delivered", "ended"]
    assert trace.waits == {}


def test_nothing_of_it_is_left(make_bench):
    """While nothing is traced, the chips have their own classes and the tables their own functions: no cost."""
    bench = make_bench(2)

    def hooked():
        for vcpu in bench.vm.vcpus:
            yield type(vcpu.vlapic)
            yield vcpu.msrs.writers[EOI_MSR]
            yield vcpu.__dict__.get("_take_nmi")
        yield type(bench.vm.apic_bus)
        yield type(bench.ioapic)

    before = list(hooked())
    with bench.interrupts.trace() as trace:
        assert not set(before) & (set(hooked()) - {None})
    assert list(hooked()) == before
    bench.lapic(0).post(VECTOR)
    assert seen(trace) == []


def test_traced_interrupt_has_a_time_in_its_explanation(bench):
    bench.route(4, VECTOR)
    with bench.interrupts.trace():
        bench.irq[4].pulse()
        bench.take()
        bench.vm.vcpus[0].write_apic(EOI, 4, 0)
    delivered = next(stage for stage in bench.explain(4).stages if stage.name == "vCPU 0 delivered")
    assert delivered.state.startswith("vector 0x41 taken once, the last time ")
    assert delivered.registers["count"] == 1
    assert delivered.registers["ago_ns"] > 0


def test_one_trace_at_a_time(bench):
    with bench.interrupts.trace():
        assert bench.interrupts.tracing
        with pytest.raises(UsageError, match="traced already"):
            bench.interrupts.start_trace()
    assert not bench.interrupts.tracing
    bench.interrupts.stop_trace()
    with bench.interrupts.trace() as second:
        assert bench.interrupts.traced is second


def test_ring_keeps_the_last(bench):
    with bench.interrupts.trace(size=3) as trace:
        for vector in range(0x40, 0x48):
            bench.lapic(0).post(vector)
    assert [event.vector for event in trace.events()] == [0x45, 0x46, 0x47]
    assert trace.lost == 5
    with pytest.raises(ValueError, match="1 event or more"):
        InterruptTrace(lambda: 0, 0)


def test_text_and_json(bench):
    with bench.interrupts.trace() as trace:
        assert str(trace) == "no interrupts"
        for _ in range(5):
            bench.lapic(0).post(VECTOR)
            bench.take()
            bench.vm.vcpus[0].write_apic(EOI, 4, 0)
    assert "vector 0x41, from source to vCPU: 5: min " in str(trace)
    document = json.loads(json.dumps(trace.as_json()))
    assert document["waits"]["0x41"]["count"] == document["services"]["0x41"]["count"] == 5
    assert sum(document["waits"]["0x41"]["buckets"].values()) == 5


@pytest.fixture
def saved(bench, tmp_path):
    bench.route(4, VECTOR)
    with bench.interrupts.trace() as trace:
        bench.irq[4].pulse()
        bench.irq[4].pulse()
        bench.take()
        bench.vm.vcpus[0].write_apic(EOI, 4, 0)
        bench.irq[4].pulse()
    path = tmp_path / "trace"
    trace.save(path, "web", 1)
    return trace, path


def test_file(saved):
    trace, path = saved
    with path.open() as file:
        head, events = load(file)
    assert head == {"schema": ["interrupt-trace", 1], "vm": "web", "vcpus": 1, "events": 8, "lost": 0}
    assert events == trace.events()


def test_perfetto(saved):
    trace, _ = saved
    raised, _, _, _, delivered, ended = trace.events()[:6]
    made = convert({"vm": "web"}, trace.events())["traceEvents"]
    handler = next(each for each in made if each["ph"] == "X")
    assert handler["name"] == "0x41 (pin 4)"
    assert handler["ts"] == delivered.time / 1000
    assert handler["dur"] == pytest.approx((ended.time - delivered.time) / 1000)
    begin, end = (next(each for each in made if each["ph"] == phase) for phase in "be")
    assert (begin["ts"], end["ts"]) == (raised.time / 1000, delivered.time / 1000)
    assert begin["id"] == end["id"]
    assert [each["args"]["name"] for each in made if each["ph"] == "M"] == ["web", "vCPU 0"]


def test_commands(saved, capsys, tmp_path):
    _, path = saved
    assert cli.main(["trace", "convert", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["displayTimeUnit"] == "ns"
    output = tmp_path / "out.json"
    assert cli.main(["trace", "convert", str(path), "-o", str(output)]) == 0
    assert "traceEvents" in json.loads(output.read_text())
    assert cli.main(["trace", "show", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[1].split()[1:] == ["accepted", "vCPU", "0", "0x41", "pin", "4"]


@pytest.mark.parametrize("text", ["", "nonsense\n", "[]\n", '{"schema": 1}\n', "{}\n", "[" * 10_000, "\xff\n"])
def test_file_that_is_no_trace(capsys, tmp_path, text):
    path = tmp_path / "trace"
    path.write_text(text)
    assert cli.main(["trace", "show", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pyhyve: {path}: ")
    assert error.count("\n") == 1


def test_file_with_a_bad_line(saved, capsys):
    _, path = saved
    path.write_text(path.read_text() + "[1,2]\n")
    assert cli.main(["trace", "show", str(path)]) == 2
    assert "line 10: no interrupt trace" in capsys.readouterr().err


def test_places_that_cannot_be(saved, capsys, tmp_path):
    trace, path = saved
    with pytest.raises(HostError, match="--trace-file"):
        trace.save(tmp_path, "web", 1)
    assert cli.main(["trace", "show", str(tmp_path / "nowhere")]) == 2
    assert cli.main(["trace", "convert", str(path), "-o", str(tmp_path)]) == 2
    assert "-o " in capsys.readouterr().err
