"""What a control node offers: the methods of one machine."""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Protocol

from pyhyve.base.errors import UsageError
from pyhyve.base.version import __version__
from pyhyve.base.wire import MAX_REQUEST, MAX_RESPONSE, PROTOCOL
from pyhyve.bhyve.config import MachineConfig
from pyhyve.bhyve.control.rpc import Method, Parameter
from pyhyve.vmm.diagnosis.interrupts import Interrupts
from pyhyve.vmm.vm import Vm


class Served(Protocol):
    """What the methods ask of a machine."""

    vm: Vm
    config: MachineConfig
    interrupts: Interrupts

    @property
    def name(self) -> str: ...

    def statistics(self) -> dict[str, object]: ...


def methods(machine: Served) -> Mapping[str, Method]:
    """Return the table of a machine's methods. They are called on the node's thread."""
    made = time.time()

    def version() -> dict[str, object]:
        return {"protocol": PROTOCOL, "pyhyve": __version__}

    def capabilities() -> dict[str, object]:
        return {
            "methods": {name: method.describe() for name, method in table.items()},
            "limits": {"request_bytes": MAX_REQUEST, "response_bytes": MAX_RESPONSE},
        }

    def describe() -> dict[str, object]:
        suspended = machine.vm.suspended
        return {
            "name": machine.name,
            "pid": os.getpid(),
            "state": machine.vm.state.value,
            "ended_by": None if suspended is None else suspended.how.value,
            "cpus": machine.config.cpus,
            "topology": asdict(machine.config.topology),
            "host_cpus": [sorted(vcpu.host_cpus) for vcpu in machine.vm.vcpus],
            "memory": machine.config.memory,
            "processor": machine.vm.capabilities.name,
            "made": made,
        }

    def statistics() -> dict[str, object]:
        with machine.vm.lock:
            return machine.statistics()

    def explain(
        irq: int | None = None, vector: int | None = None, nmi: bool = False, vcpu: int | None = None
    ) -> dict[str, object]:
        return machine.interrupts.explain(irq, vector=vector, nmi=nmi, vcpu=vcpu).as_json()

    def trace(on: bool = True) -> dict[str, object]:
        if on and not machine.interrupts.tracing:
            machine.interrupts.start_trace()
        elif not on:
            machine.interrupts.stop_trace()
        return {"tracing": machine.interrupts.tracing}

    def latency() -> dict[str, object]:
        traced = machine.interrupts.traced
        if traced is None:
            raise UsageError("interrupts have not been traced; switch that on first")
        return {"tracing": machine.interrupts.tracing, "text": str(traced), **traced.as_json()}

    table = {
        "version": Method(version, "the protocol's version, and pyhyve's"),
        "capabilities": Method(capabilities, "the methods, their parameters, and the limits"),
        "describe": Method(describe, "the VM: name, process, state, processors, memory"),
        "stats": Method(statistics, "exits by reason, times, counters, what the guest touched in vain"),
        "interrupts.explain": Method(
            explain,
            "which stage of its way holds an interrupt; one of irq, vector and nmi",
            {
                "irq": Parameter(int, "an ISA interrupt, or a pin of the I/O APIC"),
                "vector": Parameter(int, "0 to 255"),
                "nmi": Parameter(bool, "the non-maskable interrupt"),
                "vcpu": Parameter(int, "look at this virtual processor only"),
            },
            pauses=True,
        ),
        "interrupts.trace": Method(
            trace,
            "begin a new trace of interrupts (unless there is one), or end it",
            {"on": Parameter(bool, "false: end it; what it has stays")},
            pauses=True,
        ),
        "interrupts.latency": Method(latency, "the latencies of the present or last trace, by vector"),
    }
    return table
