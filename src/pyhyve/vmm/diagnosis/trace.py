"""A record of interrupts: raised by a source, accepted into IRR, delivered to the vCPU, ended by EOI."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, Final

from pyhyve.base.errors import HostError
from pyhyve.vmm.diagnosis.histogram import Histogram

DEFAULT_EVENTS: Final = 65536
RAISED, ACCEPTED, MERGED, DELIVERED, ENDED = "raised", "accepted", "merged", "delivered", "ended"
NMI_VECTOR: Final = 2
_NOBODY: Final = -1
EXTERNAL: Final = "8259"


@dataclass(frozen=True, slots=True)
class Event:
    """time: nanoseconds of the VM's clock. kind: raised, accepted, merged (it was pending already), delivered, ended.
    vcpu: -1 while it is not known. source: "pin 4", "MSI", "IPI from 0", "timer", "8259", "local"."""

    time: int
    kind: str
    vcpu: int
    vector: int
    source: str


class InterruptTrace:
    """The last `size` events, and the latencies of all: `waits` from the source to the vCPU, `services` from there to
    EOI, by vector. `now`: the time in ns."""

    SCHEMA: ClassVar[tuple[str, int]] = ("interrupt-trace", 1)

    def __init__(self, now: Callable[[], int], size: int = DEFAULT_EVENTS) -> None:
        if size < 1:
            raise ValueError(f"a trace has room for 1 event or more, not {size}")
        self._now = now
        self._events: deque[tuple[int, str, int, int, str]] = deque(maxlen=size)
        self._seen = 0
        self._pending: dict[tuple[int, int], tuple[int, str]] = {}
        self._serviced: dict[tuple[int, int], tuple[int, str]] = {}
        self._source: tuple[int, str] | None = None
        self.last: dict[tuple[int, int], int] = {}
        """When each vCPU took each vector last: (vCPU, vector) to ns of the VM's clock."""
        self.waits: dict[int, Histogram] = {}
        self.services: dict[int, Histogram] = {}

    # -- what the hooks report -----------------------------------------------------------------------------------------

    def raised(self, source: str, vector: int) -> tuple[int, str] | None:
        """A source sends: what is accepted until `settled()` comes from it. Return what `settled` is to be given.
        A source behind another (the bus behind a pin) is not the source."""
        before = self._source
        if before is None:
            self._source = (self._now(), source)
            self._add(self._source[0], RAISED, _NOBODY, vector, source)
        return before

    def settled(self, before: tuple[int, str] | None) -> None:
        self._source = before

    def accepted(self, vcpu: int, vector: int, pending: bool, local: str) -> None:
        """A local APIC takes a vector into IRR, where it may be `pending` already; `local` is the source if none was
        raised."""
        now = self._now()
        began, source = self._source or (now, local)
        if not pending:
            self._pending[vcpu, vector] = (began, source)
        self._add(now, MERGED if pending else ACCEPTED, vcpu, vector, source)

    def delivered(self, vcpu: int, vector: int) -> None:
        """The vCPU takes it; one that was pending before the trace began counts from now."""
        now = self._now()
        began, source = self._pending.pop((vcpu, vector), (now, ""))
        if source:
            self._count(self.waits, vector, now - began)
        self._serviced[vcpu, vector] = (now, source)
        self.last[vcpu, vector] = now
        self._add(now, DELIVERED, vcpu, vector, source)

    def ended(self, vcpu: int, vector: int) -> None:
        """Its handler has written EOI."""
        now = self._now()
        began, source = self._serviced.pop((vcpu, vector), (_NOBODY, ""))
        if began >= 0:
            self._count(self.services, vector, now - began)
        self._add(now, ENDED, vcpu, vector, source)

    def _add(self, time: int, kind: str, vcpu: int, vector: int, source: str) -> None:
        self._seen += 1
        self._events.append((time, kind, vcpu, vector, source))

    @staticmethod
    def _count(table: dict[int, Histogram], vector: int, ns: int) -> None:
        histogram = table.get(vector)
        if histogram is None:
            histogram = table[vector] = Histogram()
        histogram.add(ns)

    # -- what is asked of it -------------------------------------------------------------------------------------------

    @property
    def lost(self) -> int:
        """How many events had to make room for later ones."""
        return self._seen - len(self._events)

    def events(self) -> list[Event]:
        """What is in the ring, in the order of time."""
        return [Event(*each) for each in self._events.copy()]

    def as_json(self) -> dict[str, object]:
        """What is to be told of it but the events, in plain values."""
        return {"schema": ["interrupt-latency", 1], "events": self._seen, "lost": self.lost, **self.latencies()}

    def latencies(self) -> dict[str, object]:
        """`waits` and `services` by vector, in plain values; times in ns."""
        return {"waits": _by_vector(self.waits), "services": _by_vector(self.services)}

    def __str__(self) -> str:
        lines = []
        for title, table in (("from source to vCPU", self.waits), ("from there to EOI", self.services)):
            for vector, histogram in sorted(table.copy().items()):
                lines.append(f"vector {vector:#x}, {title}: {histogram}")
        return "\n".join(lines) or "no interrupts"

    def save(self, path: Path, name: str, vcpus: int) -> None:
        """Write the events as lines of JSON: a head, then an array each. HostError, one line, where it cannot be."""
        try:
            with path.open("w", encoding="ascii") as file:
                self._write(file, name, vcpus)
        except OSError as error:
            raise HostError(f"--trace-file {path}: {error.strerror}; name a file that can be written") from None

    def _write(self, file: IO[str], name: str, vcpus: int) -> None:
        head = {"schema": list(self.SCHEMA), "vm": name, "vcpus": vcpus, "events": self._seen, "lost": self.lost}
        file.write(json.dumps(head) + "\n")
        for event in self._events.copy():
            file.write(json.dumps(event, separators=(",", ":")) + "\n")


def _by_vector(table: Mapping[int, Histogram]) -> dict[str, object]:
    return {f"{vector:#x}": histogram.as_json() for vector, histogram in sorted(dict(table).items())}


def load(lines: Iterator[str]) -> tuple[dict[str, object], list[Event]]:
    """Read what `save` wrote: the head and the events. ValueError, one line, for anything else."""
    head: dict[str, object] | None = None
    events = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if head is None:
                if value["schema"] != list(InterruptTrace.SCHEMA):
                    raise ValueError(f"its schema is {value['schema']}")
                head = value
                continue
            time, kind, vcpu, vector, source = value
            events.append(Event(int(time), str(kind), int(vcpu), int(vector), str(source)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"line {number}: no interrupt trace ({str(error).splitlines()[0][:100]})") from None
    if head is None:
        raise ValueError("it is empty")
    return head, events
