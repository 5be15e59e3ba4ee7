"""The Python API: a machine in one call, its console, its registers and memory, its outcome."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pyhyve.bhyve import config, machine
from pyhyve.bhyve.console import CaptureConsole, Console, open_console
from pyhyve.bhyve.layout import IOAPIC_PINS
from pyhyve.bhyve.lpc.options import FwCfgFile, checked_file, parse_lpc
from pyhyve.bhyve.machine import VcpuView
from pyhyve.bhyve.outcome import Outcome
from pyhyve.cpu.processor import DEFAULT_CODE_CACHE
from pyhyve.vmm.cpufeatures import parse_cpu_features
from pyhyve.vmm.diagnosis.interrupts import Interrupts

__all__ = ["Machine", "Outcome", "VcpuView"]


class Machine:
    """A virtual machine that boots a kernel. A context manager: leaving it ends the guest.

    `kernel` is a Linux kernel, a Multiboot image or a PVH kernel; `modules` ("FILE ARGUMENTS") are for the latter two.
    `lpc` names devices as `-l` does ("isa-debug-exit,iobase=0xf4"); `fwcfg` gives fw_cfg's files by name.
    `memory` is bytes or text ("256M"), `cpus` a number or text ("4,cores=2,threads=2"), `ioapic_pins` 24 or 32; `rtc`
    is "utc" or "local". `console` is "capture" (see `.console`), one of the command line's ("stdio", "pty",
    "file:PATH", "none") or an object of your own. UsageError and HostError, one line each, where it cannot be.
    """

    def __init__(
        self,
        kernel: str | os.PathLike[str],
        *,
        initrd: str | os.PathLike[str] | None = None,
        append: str | None = None,
        modules: Sequence[str] = (),
        memory: str | int = config.DEFAULT_MEMORY,
        cpus: int | str = 1,
        console: str | Console = "capture",
        name: str | None = None,
        processor: str = "auto",
        code_cache: str | int = DEFAULT_CODE_CACHE,
        cpu_features: Mapping[str, bool] | None = None,
        ioapic_pins: int = IOAPIC_PINS,
        rtc: str = "utc",
        kaslr: bool = False,
        lpc: Sequence[str] = (),
        fwcfg: Mapping[str, str | bytes] | None = None,
        pins: Mapping[int, Iterable[int]] | None = None,
        hang_seconds: float = config.DEFAULT_HANG_SECONDS,
        timing: bool = False,
    ) -> None:
        description = config.MachineConfig(
            kernel=Path(kernel),
            initrd=None if initrd is None else Path(initrd),
            append=append,
            modules=tuple(map(config.parse_module, modules)),
            memory=config.parse_size(memory, "memory") if isinstance(memory, str) else memory,
            topology=config.parse_cpus(str(cpus), "cpus"),
            name=name,
            processor=processor,
            code_cache=config.parse_size(code_cache, "code_cache") if isinstance(code_cache, str) else code_cache,
            cpu_features=parse_cpu_features(
                (f"{name}={'on' if wanted else 'off'}" for name, wanted in (cpu_features or {}).items()), "cpu_features"
            ),
            ioapic_pins=ioapic_pins,
            rtc_utc=config.parse_rtc(rtc, "rtc"),
            kaslr=kaslr,
            lpc=tuple(map(parse_lpc, lpc)),
            fwcfg=tuple(_fwcfg_file(name, data) for name, data in (fwcfg or {}).items()),
            pins={vcpu: frozenset(cpus) for vcpu, cpus in (pins or {}).items()},
            hang_seconds=hang_seconds,
        )
        self._console = _console(console)
        self._machine = machine.Machine(description, self._console, timing=timing)

    @property
    def name(self) -> str:
        return self._machine.name

    @property
    def console(self) -> CaptureConsole:
        """What the guest prints (`expect`, `output`) and the way to type (`send`). TypeError for another console."""
        if not isinstance(self._console, CaptureConsole):
            raise TypeError('only a machine made with console="capture" has its console here')
        return self._console

    @property
    def vcpus(self) -> Sequence[VcpuView]:
        """The virtual processors: `vcpus[0].get("rip")`."""
        return self._machine.vcpus

    @property
    def interrupts(self) -> Interrupts:
        """Where an interrupt is and what holds it: `interrupts.explain(irq=4)`."""
        return self._machine.interrupts

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended; None before that."""
        return self._machine.outcome

    def start(self) -> None:
        """Start the guest, and return."""
        self._machine.start()

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait until the guest has ended; return its outcome, or None after `timeout` seconds."""
        return self._machine.wait(timeout)

    def run(self, timeout: float | None = None) -> Outcome:
        """Start the guest and return its outcome; after `timeout` seconds it is stopped and that is its outcome."""
        return self._machine.run(timeout)

    def stop(self) -> Outcome:
        """End the guest where it is."""
        return self._machine.stop()

    def pause(self) -> None:
        """Let the guest and its clocks stand still until `resume()`."""
        self._machine.vm.pause()

    def resume(self) -> None:
        self._machine.vm.resume()

    def press_power_button(self) -> bool:
        """Ask the guest to shut down; False if it does not listen for that."""
        return self._machine.press_power_button()

    def read_memory(self, gpa: int, length: int) -> bytes:
        """Return guest-physical memory. IndexError outside it."""
        return self._machine.read_memory(gpa, length)

    def write_memory(self, gpa: int, data: bytes) -> None:
        self._machine.write_memory(gpa, data)

    def statistics(self) -> dict[str, object]:
        """Return exits by reason, times, the processor's counters, and what the guest touched in vain."""
        return self._machine.statistics()

    def close(self) -> None:
        """End the guest if it runs, and release everything. Idempotent."""
        self._machine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _fwcfg_file(name: str, data: str | bytes) -> FwCfgFile:
    return checked_file(name, data.encode() if isinstance(data, str) else data)


def _console(console: str | Console) -> Console:
    if not isinstance(console, str):
        return console
    return CaptureConsole() if console == "capture" else open_console(console)
