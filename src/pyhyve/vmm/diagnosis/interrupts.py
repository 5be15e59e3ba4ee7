"""`vm.interrupts`: questions about a machine's interrupts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from pyhyve.base.errors import UsageError
from pyhyve.base.explanation import Explanation
from pyhyve.vmm.diagnosis.explain import explain_irq, explain_nmi, explain_vector
from pyhyve.vmm.diagnosis.hooks import attach
from pyhyve.vmm.diagnosis.snapshot import Snapshot, take
from pyhyve.vmm.diagnosis.trace import DEFAULT_EVENTS, InterruptTrace
from pyhyve.vmm.io.vatpic import Vatpic
from pyhyve.vmm.io.vioapic import Vioapic
from pyhyve.vmm.vm import Vm


class Interrupts:
    """A machine's interrupts, seen from outside. Made by the machine, which knows its controllers.

    Every question stops the guest for a moment; none may come from a vCPU's thread.
    """

    def __init__(self, vm: Vm, vioapic: Vioapic, vatpic: Vatpic, isa_pins: Mapping[int, int]) -> None:
        self._vm = vm
        self._vioapic = vioapic
        self._vatpic = vatpic
        self._isa_pins = dict(isa_pins)
        self._detach: Callable[[], None] | None = None
        self.traced: InterruptTrace | None = None
        """The present trace, or the last one."""

    def snapshot(self) -> Snapshot:
        """The state of all that an interrupt passes, at one moment."""
        last = {} if self.traced is None else self.traced.last
        return take(self._vm, self._vioapic, self._vatpic, self._isa_pins, last)

    def explain(
        self, irq: int | None = None, *, vector: int | None = None, nmi: bool = False, vcpu: int | None = None
    ) -> Explanation:
        """Say where an interrupt is on its way, and what holds it there.

        One of: `irq`, an ISA interrupt or a pin of the I/O APIC; `vector`, 0 to 255; `nmi`. `vcpu` looks at one virtual
        processor only (of an NMI: 0 unless given). UsageError for a number that there is not.
        """
        if (irq is not None) + (vector is not None) + nmi != 1:
            raise UsageError("explain: name one thing, an IRQ, a vector or the NMI")
        snapshot = self.snapshot()
        if irq is not None:
            return explain_irq(snapshot, irq, vcpu)
        if vector is not None:
            return explain_vector(snapshot, vector, vcpu)
        return explain_nmi(snapshot, vcpu or 0)

    # -- tracing -------------------------------------------------------------------------------------------------------

    @property
    def tracing(self) -> bool:
        return self._detach is not None

    def start_trace(self, size: int = DEFAULT_EVENTS) -> InterruptTrace:
        """Record interrupts from now on; of the events, the last `size`. UsageError if that is so already."""
        with self._vm.stopped(), self._vm.lock:
            if self._detach is not None:
                raise UsageError("interrupts are traced already; end that trace first")
            self.traced = trace = InterruptTrace(self._vm.clock.now, size)
            self._detach = attach(trace, self._vm, self._vioapic)
            return trace

    def stop_trace(self) -> None:
        """End the trace; what it has stays. Harmless if there is none."""
        with self._vm.stopped(), self._vm.lock:
            detach, self._detach = self._detach, None
            if detach is not None:
                detach()

    @contextmanager
    def trace(self, size: int = DEFAULT_EVENTS) -> Iterator[InterruptTrace]:
        """Record interrupts while this lasts: `with interrupts.trace() as trace: ...; print(trace)`."""
        trace = self.start_trace(size)
        try:
            yield trace
        finally:
            self.stop_trace()
