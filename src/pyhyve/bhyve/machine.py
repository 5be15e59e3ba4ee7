"""The machine: the one place where processor, memory, chips, tables and loader are put together.

A PC as Linux expects it: two 8259s and an I/O APIC, 8254, RTC, HPET, ACPI's fixed hardware, a UART, PCI with a host
bridge. Addresses are `layout`'s.
"""

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from pyhyve.base.errors import UsageError
from pyhyve.base.names import NameLock, own_name
from pyhyve.base.protocols import IoHandler, IrqPin
from pyhyve.bhyve import layout
from pyhyve.bhyve.acpi import build_acpi
from pyhyve.bhyve.boot import bios
from pyhyve.bhyve.boot.loader import load_kernel
from pyhyve.bhyve.boot.state import BootState
from pyhyve.bhyve.config import MachineConfig, format_size
from pyhyve.bhyve.console import Console, Quit
from pyhyve.bhyve.control.methods import methods
from pyhyve.bhyve.control.server import ControlNode
from pyhyve.bhyve.lpc import fwcfg, testdev
from pyhyve.bhyve.lpc.com import ComPort
from pyhyve.bhyve.lpc.debugexit import DebugExit
from pyhyve.bhyve.lpc.i8042 import I8042
from pyhyve.bhyve.lpc.options import DebugExitOptions, FwCfgOptions, LpcOptions, PcTestdevOptions
from pyhyve.bhyve.lpc.pm import PM1_LENGTH, PowerManagement
from pyhyve.bhyve.lpc.port92 import SystemControl
from pyhyve.bhyve.lpc.post import PostCode
from pyhyve.bhyve.lpc.reset import ResetControl
from pyhyve.bhyve.mptable import build_mptable
from pyhyve.bhyve.outcome import ConsoleWatch, Outcome, OutcomeKind, classify
from pyhyve.bhyve.pci.bus import ConfigPorts, Ecam, PciBus
from pyhyve.bhyve.pci.device import BarKind
from pyhyve.bhyve.pci.hostbridge import HostBridge
from pyhyve.cpu import select
from pyhyve.cpu.processor import Segment
from pyhyve.vmm.cpuid import NOTE_HARDWARE
from pyhyve.vmm.diagnosis.interrupts import Interrupts
from pyhyve.vmm.io.apicregs import VERSION_INTEGRATED
from pyhyve.vmm.io.vatpic import Vatpic
from pyhyve.vmm.io.vatpit import Vatpit
from pyhyve.vmm.io.vhpet import Vhpet
from pyhyve.vmm.io.vioapic import PINS as PINS_WITHOUT_EOI
from pyhyve.vmm.io.vioapic import Vioapic
from pyhyve.vmm.io.vlapic import Vlapic
from pyhyve.vmm.io.vpmtmr import Vpmtmr
from pyhyve.vmm.io.vrtc import Vrtc
from pyhyve.vmm.memory.arena import host_memory
from pyhyve.vmm.pins import FabricPin, FanOut, Switch
from pyhyve.vmm.vcpu import Vcpu
from pyhyve.vmm.vm import State, Suspend, Vm

_PANIC_GRACE_NS: Final = 2_000_000_000
"""After a panic's first line the guest may go on printing this long; then it is stopped if it has not ended itself."""
_FLUSH_NS: Final = 2_000_000
"""How long the guest's output may wait for the end of its line."""
_PIC_PORTS: Final = 2


class VcpuView:
    """A vCPU as programs see it: its registers, read while the VM stands still."""

    def __init__(self, vm: Vm, vcpu: Vcpu) -> None:
        self._vm = vm
        self._vcpu = vcpu

    def get(self, name: str) -> int:
        """Return a register by the processor contract's name ("rip", "rax", "cr3", ...); KeyError if there is none."""
        with self._vm.stopped():
            return self._vcpu.backend.get(name)

    def set(self, name: str, value: int) -> None:
        with self._vm.stopped():
            self._vcpu.backend.set(name, value)

    def get_segment(self, name: str) -> Segment:
        with self._vm.stopped():
            return self._vcpu.backend.get_segment(name)

    def translate(self, gla: int) -> int | None:
        """Guest-linear to guest-physical, by the tables that the vCPU uses now; None if it is not mapped."""
        with self._vm.stopped():
            return self._vcpu.backend.translate(gla)

    @property
    def host_cpus(self) -> frozenset[int]:
        """The host CPUs that its thread may run on: those that it is pinned to, or all of the process's."""
        return self._vcpu.host_cpus


class Machine:
    """A built machine: `start()`, `wait()`, `close()`, or all of it by `run()`. A context manager that closes.

    UsageError or HostError, one line, where the description cannot be met; nothing is left behind then.
    """

    def __init__(self, config: MachineConfig, console: Console, *, timing: bool = False) -> None:
        self.config = config
        self.console = console
        self.outcome: Outcome | None = None
        self.quit_reason: Quit | None = None
        self.on_power_button: Callable[[], None] = lambda: None
        """Called on the event thread when `quit` has pressed the power button."""
        self._started_at = 0.0
        self._ended_at = 0.0
        self._timed_out = False
        self._closed = False
        self._finish_lock = threading.Lock()
        engine = select.processor(config.processor, config.code_cache)
        most = engine.capabilities().max_vcpus
        if config.cpus > most:
            raise UsageError(f"-c {config.cpus}: the {engine.name} processor has at most {most}")
        with contextlib.ExitStack() as undo:
            self._lock = NameLock(config.name or own_name(self))
            undo.callback(self._lock.release)
            self.vm = Vm(
                self._lock.name,
                engine,
                config.topology,
                timing=timing,
                cpu_features=config.cpu_features,
                directed_eoi=config.ioapic_pins > PINS_WITHOUT_EOI,
            )
            undo.callback(self.vm.close)
            self.vm.hang_ns = int(config.hang_seconds * 1e9)
            self.vm.on_suspend = self._on_suspend
            for index, cpus in config.pins.items():
                self.vm.vcpus[index].pin(cpus)
            self._flush_armed = False
            self.watch = ConsoleWatch(console.write, self._on_panic, self._flush_soon)
            self._build()
            self._node = ControlNode(self._lock.directory, self.name, methods(self))
            undo.callback(self._node.close)
            self._node.start()
            undo.pop_all()
        self.vcpus = [VcpuView(self.vm, vcpu) for vcpu in self.vm.vcpus]

    @property
    def name(self) -> str:
        return self._lock.name

    # -- assembly ------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        vm = self.vm
        memory, most = self.config.memory, host_memory()
        if memory > most:
            raise UsageError(f"-m {format_size(memory)}: the host has {most >> 20} MiB with swap; ask for that or less")
        low, high = layout.split_ram(memory)
        vm.map_ram(0, low)
        if high:
            vm.map_ram(layout.HIGH_RAM_BASE, high)
        self._add_interrupt_controllers()
        self._add_timers()
        self._add_power()
        self._add_serial()
        self._add_pci()
        for device in self.config.lpc:
            self._add_lpc(device)
        has_fwcfg = any(isinstance(device, FwCfgOptions) for device in self.config.lpc)
        apic_ids, pins = self.config.topology.apic_ids, self.config.ioapic_pins
        for gpa, table in build_acpi(apic_ids, high, fwcfg=has_fwcfg, ioapic_pins=pins):
            vm.memory.write(gpa, table)
        vm.memory.write(layout.MPTABLE_BASE, self._mptable())
        bios.write_reset(vm.memory)
        self._boot(load_kernel(vm.memory, self.config.files, low, high, rsdp=layout.RSDP))
        _release_heap()

    def _mptable(self) -> bytes:
        leaf = self.vm.cpuid.reported()[1, 0]
        return build_mptable(
            self.config.topology.apic_ids,
            signature=leaf["eax"],
            features=leaf["edx"],
            lapic_version=VERSION_INTEGRATED,
            ioapic_version=self.vioapic.version,
            ioapic_pins=self.config.ioapic_pins,
        )

    def _add_interrupt_controllers(self) -> None:
        vm = self.vm
        bootstrap = vm.vcpus[0].vlapic
        assert isinstance(bootstrap, Vlapic)
        self.vioapic = Vioapic(vm.apic_bus, 0, self.config.ioapic_pins, layout.IOAPIC_ACTIVE_LOW)
        vm.apic_bus.attach_ioapic(self.vioapic)
        vm.mmio.attach(layout.IOAPIC_BASE, layout.IOAPIC_SIZE, self.vioapic)
        self.vatpic = Vatpic(lambda level: bootstrap.lint(0, level))
        vm.attach_pic(self.vatpic)
        for port in (layout.PIC_MASTER_PORT, layout.PIC_SLAVE_PORT, layout.PIC_ELCR_PORT):
            vm.ports.attach(port, _PIC_PORTS, self.vatpic, base=0)
        self.interrupts = Interrupts(vm, self.vioapic, self.vatpic, {layout.PIT_IRQ: layout.PIT_IOAPIC_PIN})

    def _isa_pin(self, irq: int) -> IrqPin:
        """A new source of an ISA interrupt line, which both kinds of controller see."""
        ioapic_pin = layout.PIT_IOAPIC_PIN if irq == layout.PIT_IRQ else irq
        return FanOut(self.vatpic.pin(irq), self.vioapic.pin(ioapic_pin))

    def _add_timers(self) -> None:
        vm = self.vm
        clock, timers = vm.clock, vm.timers
        pit_line, rtc_line = Switch(self._isa_pin(layout.PIT_IRQ)), Switch(self._isa_pin(layout.RTC_IRQ))

        def replace_legacy(replaced: bool) -> None:
            pit_line.connect(not replaced)
            rtc_line.connect(not replaced)

        self.vatpit = Vatpit(clock, timers, pit_line)
        vm.ports.attach(layout.PIT_PORT, 4, self.vatpit, base=0)
        vm.ports.attach(layout.PIT_NMISC_PORT, 1, self.vatpit, base=0)
        self.vrtc = Vrtc(clock, timers, rtc_line, utc=self.config.rtc_utc)
        low, high = layout.split_ram(self.config.memory)
        self.vrtc.set_memory_size(low, high)
        vm.ports.attach(layout.RTC_PORT, 2, self.vrtc, base=0)
        legacy = (self._isa_pin(layout.PIT_IRQ), self._isa_pin(layout.RTC_IRQ))
        self.vhpet = Vhpet(clock, timers, vm.apic_bus, self.vioapic.pin, legacy, replace_legacy)
        vm.mmio.attach(layout.HPET_BASE, layout.HPET_SIZE, self.vhpet)

    def _add_power(self) -> None:
        vm = self.vm
        self.pm = PowerManagement(self._isa_pin(layout.SCI_IRQ), lambda: vm.suspend(Suspend.POWEROFF))
        vm.ports.attach(layout.PM1_EVENT_PORT, PM1_LENGTH, self.pm)
        self.vpmtmr = Vpmtmr(vm.clock, vm.timers, self.pm.timer_carried)
        vm.ports.attach(layout.PM_TIMER_PORT, layout.PM_TIMER_SIZE, self.vpmtmr)
        vm.ports.attach(layout.GPE0_PORT, layout.GPE0_SIZE, self.pm.gpe0)
        vm.ports.attach(layout.SMI_CMD_PORT, 1, self.pm.smi_command)
        keyboard = I8042(self._reset)
        vm.ports.attach(layout.KBC_DATA_PORT, 1, keyboard.data)
        vm.ports.attach(layout.KBC_STATUS_PORT, 1, keyboard.command)
        vm.ports.attach(layout.FAST_A20_PORT, 1, SystemControl(self._reset, None if self._hardware else self._gate_a20))
        vm.ports.attach(layout.POST_PORT, 1, PostCode())

    @property
    def _hardware(self) -> bool:
        """Does the processor have its own view of memory, which does not change?"""
        return NOTE_HARDWARE in self.vm.capabilities.notes

    def _gate_a20(self, through: bool) -> None:
        """Without address line 20, the second megabyte is the first one again; that is what wraps at 1 MiB."""
        if through:
            self.vm.memory.unalias(layout.MIB)
        else:
            self.vm.memory.alias(layout.MIB, 0, layout.MIB)

    def _reset(self) -> None:
        self.vm.suspend(Suspend.RESET)

    def _add_serial(self) -> None:
        vm = self.vm
        pin = FabricPin(self._isa_pin(layout.COM1.irq), vm.lock, vm.events.call_soon)
        self.com1 = ComPort(pin, _Watched(self.console, self.watch.write))
        vm.ports.attach(layout.COM1.port, layout.COM_SIZE, self.com1)

    def _add_pci(self) -> None:
        vm = self.vm
        self.pci = PciBus(_Bars(vm))
        self.pci.add(HostBridge(), 0)
        ports = ConfigPorts(self.pci, ResetControl(self._reset))
        vm.ports.attach(layout.PCI_CONFIG_ADDRESS, 8, ports)
        vm.mmio.attach(layout.PCI_ECAM_BASE, layout.PCI_ECAM_SIZE, Ecam(self.pci))

    def _add_lpc(self, device: LpcOptions) -> None:
        match device:
            case FwCfgOptions():
                self._add_fwcfg()
            case PcTestdevOptions():
                self._add_testdev()
            case DebugExitOptions():
                self._add_ports("isa-debug-exit", device.iobase, device.iosize, DebugExit(self._debug_exit))

    def _add_ports(self, name: str, port: int, length: int, handler: IoHandler) -> None:
        try:
            self.vm.ports.attach(port, length, handler)
        except ValueError as error:
            raise UsageError(f"-l {name}: {error}; name each device once, and ports that nobody has") from None

    def _debug_exit(self, value: int) -> None:
        self.vm.suspend(Suspend.EXIT, detail=f"the guest wrote {value:#x}", value=value)

    def _add_fwcfg(self) -> None:
        low, high = layout.split_ram(self.config.memory)
        device = fwcfg.FwCfg(self.vm.memory)
        fwcfg.add_standard(device, self.config.cpus, self.config.memory, layout.memory_map(low, high))
        for file in self.config.fwcfg:
            device.add_file(file.name, file.data)
        self._add_ports("fwcfg", layout.FWCFG_SELECTOR_PORT, 2, device.selector)
        self._add_ports("fwcfg", layout.FWCFG_DMA_PORT, 8, device.dma)

    def _add_testdev(self) -> None:
        """The 8259s have no line behind their inputs 0 to 15, and input 2 is their cascade."""
        pins: list[IrqPin] = []
        for irq in range(testdev.IRQ_LINES):
            on_ioapic = irq == layout.PIT_IOAPIC_PIN or irq >= testdev.ISA_LINES
            pins.append(self.vioapic.pin(irq) if on_ioapic else self._isa_pin(irq))
        for port, length, handler in (
            (testdev.REGISTER_PORT, testdev.REGISTER_SIZE, testdev.Register(testdev.REGISTER_SIZE)),
            (testdev.FLUSH_PORT, testdev.REGISTER_SIZE, testdev.FlushPage()),
            (testdev.BYTES_PORT, testdev.REGISTER_SIZE, testdev.Register(testdev.REGISTER_SIZE)),
            (testdev.IRQ_PORT, testdev.IRQ_LINES, testdev.IrqLines(pins)),
        ):
            self._add_ports("pc-testdev", port, length, handler)
        if not any(isinstance(device, DebugExitOptions) for device in self.config.lpc):
            self._add_ports("pc-testdev", testdev.EXIT_PORT, testdev.EXIT_SIZE, DebugExit(self._debug_exit))
        self.vm.mmio.attach(testdev.MEMORY_BASE, testdev.MEMORY_SIZE, testdev.Register(testdev.MEMORY_SIZE))

    def _boot(self, state: BootState) -> None:
        """Put the bootstrap processor into the loader's state, its local APIC as firmware leaves it."""
        vcpu = self.vm.vcpus[0]
        backend = vcpu.backend
        assert isinstance(vcpu.vlapic, Vlapic)
        vcpu.vlapic.virtual_wire()
        if state.bios:
            bios.set_up_interrupts(self.vatpic, self.vatpit)
        for name, segment in state.segments.items():
            backend.set_segment(name, segment)
        backend.set_table("gdtr", state.gdt_base, state.gdt_limit)
        backend.set_table("idtr", state.idt_base, state.idt_limit)
        for name, value in state.registers().items():
            backend.set(name, value)

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the console and the guest."""
        if self.vm.state is not State.CREATED:
            raise RuntimeError("a machine starts once; make another for another run")
        self.console.start(self.com1.receive, self.quit)
        self._started_at = time.monotonic()
        self.vm.start()

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait until the guest has ended; return its outcome, or None if `timeout` seconds were not enough."""
        if not self.vm.wait(timeout):
            return None
        return self._finish()

    def run(self, timeout: float | None = None) -> Outcome:
        """Start, wait and return the outcome; after `timeout` seconds the machine is stopped: timed-out."""
        self.start()
        outcome = self.wait(timeout)
        if outcome is None:
            self._timed_out = True
            self.vm.suspend(Suspend.REQUEST, detail=f"stopped after {timeout:g} s")
            outcome = self._finish()
        return outcome

    def stop(self, detail: str = "stopped from outside") -> Outcome:
        """Stop the guest where it is and return the outcome (of a guest that had ended already: its own)."""
        self.vm.suspend(Suspend.REQUEST, detail=detail)
        return self._finish()

    def press_power_button(self) -> bool:
        """Ask the guest to shut down, as the button does; False if it does not listen for that."""
        with self.vm.lock:
            return self.pm.press_power_button()

    def _finish(self) -> Outcome:
        with self._finish_lock:
            if self.outcome is not None:
                return self.outcome
            ended = self.vm.join()
            self.com1.close()
            self.watch.flush()
            self.console.stop()
            suspended = self.vm.suspended
            assert suspended is not None
            seconds = max(0.0, (self._ended_at or time.monotonic()) - self._started_at) if self._started_at else 0.0
            outcome = classify(suspended, self.watch, seconds, timed_out=self._timed_out)
            if ended and outcome.kind in (OutcomeKind.HUNG, OutcomeKind.TIMED_OUT):
                rip = self.vm.vcpus[max(0, suspended.vcpu)].backend.get("rip")
                if "rip" not in outcome.detail:
                    detail = f"{outcome.detail}; rip {rip:#x}"
                    outcome = Outcome(outcome.kind, detail, outcome.seconds, outcome.report)
            self.outcome = outcome
            return outcome

    def close(self) -> None:
        """End the guest if it runs, and release everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            if self.vm.state is not State.CREATED:
                self.stop()
        finally:
            self._node.close()
            self.vm.close()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- looking -------------------------------------------------------------------------------------------------------

    def read_memory(self, gpa: int, length: int) -> bytes:
        """Return guest-physical memory. IndexError outside it."""
        return self.vm.memory.read(gpa, length)

    def write_memory(self, gpa: int, data: bytes) -> None:
        self.vm.memory.write(gpa, data)

    def statistics(self) -> dict[str, object]:
        """Return what the run cost: exits by reason, times, the engine's own counters, what nobody claimed."""
        vm = self.vm
        counters: dict[str, int] = {}
        for vcpu in vm.vcpus:
            for name, value in vcpu.backend.counters().items():
                counters[name] = counters.get(name, 0) + value
        traced = self.interrupts.traced
        return {
            "processor": vm.capabilities.name,
            "exits": vm.exit_counts(),
            "injected": sum(vcpu.injected for vcpu in vm.vcpus),
            "guest_seconds": sum(vcpu.guest_ns - vcpu.halted_ns for vcpu in vm.vcpus) / 1e9,
            "handler_seconds": sum(vcpu.handler_ns for vcpu in vm.vcpus) / 1e9,
            "engine": counters,
            "resident_bytes": vm.memory.resident(),
            **({} if traced is None else {"interrupt_latency": traced.latencies()}),
            "unclaimed_ports": {f"{port:#x}": count for port, count in sorted(vm.ports.unclaimed.items())},
            "unclaimed_pages": {f"{page << 12:#x}": count for page, count in sorted(vm.mmio.unclaimed.items())},
            "unknown_msrs": {
                f"{msr:#x}": count for vcpu in vm.vcpus for msr, count in sorted(vcpu.msrs.unknown.items())
            },
        }

    # -- what happens on other threads ---------------------------------------------------------------------------------

    def _on_suspend(self, suspended: object) -> None:
        self._ended_at = time.monotonic()

    def quit(self, reason: Quit) -> None:
        """End the guest because its user, or a signal, asked for it; from any thread, also in a signal handler.

        SHUTDOWN asks the guest itself, and ends it only if it does not listen.
        """
        # A signal handler may have interrupted its own thread anywhere: another one does the work.
        if reason is Quit.SHUTDOWN:
            self.vm.events.call_soon(self._shut_down)
            return
        self.quit_reason = reason
        self.vm.events.call_soon(lambda: self.vm.suspend(Suspend.REQUEST, detail=reason.value))

    def _shut_down(self) -> None:
        if self.press_power_button():
            self.on_power_button()
            return
        self.quit_reason = Quit.TERMINATED
        detail = f"{Quit.TERMINATED.value}; the guest does not listen for the power button"
        self.vm.suspend(Suspend.REQUEST, detail=detail)

    def _flush_soon(self) -> None:
        """The guest began to print: pass it on before long, whether or not it ends its line."""
        if not self._flush_armed:
            self._flush_armed = True
            self.vm.timers.call_at(self.vm.clock.now() + _FLUSH_NS, self._flush)

    def _flush(self) -> None:
        self._flush_armed = False
        self.watch.flush()

    def _on_panic(self, last: bool) -> None:
        """The guest's console shows a panic: let it finish its report, then stop it unless it restarts by itself."""
        vm = self.vm
        delay = _PANIC_GRACE_NS // 10 if last else _PANIC_GRACE_NS
        vm.timers.call_at(vm.clock.now() + delay, lambda: vm.suspend(Suspend.REQUEST, detail="after the guest's panic"))


class _Watched:
    """A console whose output is read along."""

    def __init__(self, console: Console, write: Callable[[bytes], None]) -> None:
        self.write = write
        self.start = console.start
        self.stop = console.stop


class _Bars:
    """Where PCI devices' BARs appear: the two buses of the VM.

    A guest may put a BAR over something else: then it is not decoded, and what was there stays.
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._mapped: set[tuple[BarKind, int, int]] = set()

    def map_bar(self, kind: BarKind, base: int, size: int, handler: IoHandler) -> None:
        bus = self._vm.ports if kind is BarKind.IO else self._vm.mmio
        with contextlib.suppress(ValueError):
            bus.attach(base, size, handler)
            self._mapped.add((kind, base, size))

    def unmap_bar(self, kind: BarKind, base: int, size: int) -> None:
        if (kind, base, size) in self._mapped:
            self._mapped.remove((kind, base, size))
            bus = self._vm.ports if kind is BarKind.IO else self._vm.mmio
            bus.detach(base, size)


def _release_heap() -> None:
    """Give the host what the loader took to unpack the kernel: the C library would keep it for as long as we run."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not every C library has it
    if trim is not None:
        trim(0)
