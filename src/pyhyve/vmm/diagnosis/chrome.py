"""A trace as Perfetto and Chrome's tracing page read it: the "Trace Event Format", JSON.

Each vCPU is a track, with its handlers from delivery to EOI; what waits for it is above, from the source to delivery.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from pyhyve.vmm.diagnosis.trace import ACCEPTED, DELIVERED, ENDED, MERGED, RAISED, Event

_PROCESS: Final = 1
_US: Final = 1000


def convert(head: Mapping[str, object], events: Iterable[Event]) -> dict[str, object]:
    """Return the document. Times are microseconds; what had not ended when the trace did is left out."""
    made: list[dict[str, object]] = [_name("process_name", 0, str(head.get("vm", "VM")))]
    vcpus: set[int] = set()
    raised: dict[tuple[int, str], int] = {}
    waiting: dict[tuple[int, int], tuple[int, str]] = {}
    running: dict[tuple[int, int], tuple[int, str]] = {}
    for number, event in enumerate(events):
        key = (event.vcpu, event.vector)
        if event.vcpu >= 0:
            vcpus.add(event.vcpu)
        if event.kind == RAISED:
            raised[event.vector, event.source] = event.time
        elif event.kind == ACCEPTED:
            waiting[key] = (raised.pop((event.vector, event.source), event.time), event.source)
        elif event.kind == MERGED:
            made.append({**_base(event, "i", event.time), "s": "t"})
        elif event.kind == DELIVERED:
            began, source = waiting.pop(key, (event.time, ""))
            running[key] = (event.time, source)
            if source:
                for phase, time in (("b", began), ("e", event.time)):
                    made.append({**_base(event, phase, time), "cat": "waiting", "id": number})
        elif event.kind == ENDED and key in running:
            began, source = running.pop(key)
            made.append({**_base(event, "X", began), "dur": (event.time - began) / _US, "args": {"source": source}})
    made += [_name("thread_name", vcpu, f"vCPU {vcpu}") for vcpu in sorted(vcpus)]
    return {"traceEvents": made, "displayTimeUnit": "ns"}


def _base(event: Event, phase: str, time: int) -> dict[str, object]:
    source = f" ({event.source})" if event.source else ""
    return {
        "name": f"{event.vector:#x}{source}",
        "ph": phase,
        "pid": _PROCESS,
        "tid": event.vcpu,
        "ts": time / _US,
    }


def _name(kind: str, thread: int, name: str) -> dict[str, object]:
    return {"name": kind, "ph": "M", "pid": _PROCESS, "tid": thread, "args": {"name": name}}
