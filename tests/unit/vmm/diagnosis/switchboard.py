"""A machine's interrupt controllers, real ones, with vCPUs that run nothing: each test puts an interrupt somewhere."""

from fake_processor import IF, FakeProcessor

from pyhyve.base.explanation import Explanation
from pyhyve.base.protocols import IrqPin
from pyhyve.vmm.diagnosis.interrupts import Interrupts
from pyhyve.vmm.io.vatpic import Vatpic
from pyhyve.vmm.io.vioapic import IOREDTBL, IOREGSEL, IOWIN, Vioapic
from pyhyve.vmm.io.vlapic import Vlapic
from pyhyve.vmm.pins import FanOut
from pyhyve.vmm.vm import Vm

VECTOR = 0x41
SVR, TPR, EOI, LDR, DFR = 0xF0, 0x80, 0xB0, 0xD0, 0xE0


class Bench:
    """IRQ `n` is wired to both controllers; the local APICs are on, as firmware leaves the first; interrupts are on."""

    def __init__(self, vm: Vm, processor: FakeProcessor, pins: int = 24) -> None:
        self.vm = vm
        self.backends = processor.vcpus
        self.vlapics = [vcpu.vlapic for vcpu in vm.vcpus]
        bootstrap = self.lapic(0)
        self.ioapic = Vioapic(vm.apic_bus, 0, pins)
        vm.apic_bus.attach_ioapic(self.ioapic)
        self.pic = Vatpic(lambda level: bootstrap.lint(0, level))
        vm.attach_pic(self.pic)
        self.interrupts = Interrupts(vm, self.ioapic, self.pic, {0: 2})
        self.irq: dict[int, IrqPin] = {
            n: FanOut(self.pic.pin(n), self.ioapic.pin(2 if n == 0 else n)) for n in (0, 1, 3, 4, 9, 11)
        }
        for vcpu in vm.vcpus:
            self.lapic(vcpu.index).write(SVR, 4, 0x1FF)
            vcpu.state = 0
        bootstrap.virtual_wire()
        for backend in self.backends:
            backend.registers["rflags"] = 2 | IF

    def lapic(self, index: int) -> Vlapic:
        vlapic = self.vm.vcpus[index].vlapic
        assert isinstance(vlapic, Vlapic)
        return vlapic

    def route(self, pin: int, entry: int) -> None:
        """Write a redirection entry."""
        for half in (1, 0):
            self.ioapic.write(IOREGSEL, 4, IOREDTBL + 2 * pin + half)
            self.ioapic.write(IOWIN, 4, entry >> 32 * half & 0xFFFFFFFF)

    def set_up_pic(self, master_mask: int = 0, slave_mask: int = 0) -> None:
        """Initialize the 8259s with vectors 0x20 and 0x28."""
        for port, words in ((0x20, (0x11, 0x20, 4, 1)), (0xA0, (0x11, 0x28, 2, 1))):
            self.pic.write(port, 1, words[0])
            for word in words[1:]:
                self.pic.write(port + 1, 1, word)
        self.pic.write(0x21, 1, master_mask)
        self.pic.write(0xA1, 1, slave_mask)

    def take(self, index: int = 0) -> None:
        """The vCPU looks at what waits for it, and enters its handler."""
        self.vm.vcpus[index].attend()
        self.backends[index].run()

    def explain(self, *arguments: int, **options: object) -> Explanation:
        return self.interrupts.explain(*arguments, **options)  # type: ignore[arg-type]


def spin(cpu):
    """A guest that does nothing; the first entry of a test must not wait for a kick."""
    while True:
        yield cpu.out(0x80, 1)
