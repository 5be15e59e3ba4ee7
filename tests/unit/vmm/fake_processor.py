"""A processor that runs no instructions: its guest is a script of exits.

A script is a generator function that is given the vCPU; each exit it wants it makes with the vCPU's helpers and yields
its reason. After its end the guest spins until it is kicked.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from pyhyve.cpu import exits
from pyhyve.cpu.processor import (
    CONTROL_NAMES,
    GPR_NAMES,
    MSR_NAMES,
    SEGMENT_NAMES,
    Capabilities,
    CpuidEntry,
    Segment,
)

IF = 1 << 9
Script = Callable[["FakeVcpu"], Iterator[int]]


class FakeVcpu:
    """Registers in a dict; linear addresses are physical ones unless `pages` says otherwise."""

    def __init__(self, vcpu_id: int, script: Script | None) -> None:
        self.vcpu_id = vcpu_id
        self.exit: Any = SimpleNamespace(
            reason=0, length=0, qualification=0, gpa=0, gla=0, io_port=0, io_size=1, io_in=False, io_string=False,
            io_value=0, msr=0, msr_value=0, mmio_gpa=0, mmio_size=4, mmio_write=False, mmio_value=0,
        )  # fmt: skip
        self.gprs = [0] * 16
        self.registers = dict.fromkeys((*CONTROL_NAMES, *MSR_NAMES), 0)
        self.registers.update(rflags=2, cr0=0x60000010, rip=0xFFF0)
        self.segments = dict.fromkeys(SEGMENT_NAMES, Segment())
        self.tables = {"gdtr": (0, 0xFFFF), "idtr": (0, 0xFFFF)}
        self.pages: dict[int, int | None] = {}
        self.read_only: set[int] = set()
        self.injected: list[tuple[int, int, int | None]] = []
        self.completed: list[tuple[str, int]] = []
        self.skipped: list[int] = []
        self.epts: list[tuple[int, int]] = []
        self.cpuid: list[CpuidEntry] = []
        self.window = False
        self.nmi_window = False
        self.nmi_blocked = False
        self.entries = 0
        self.kicks = 0
        self._pending: tuple[int, int, int | None] | None = None
        self._kicked = threading.Event()
        self._script = iter(()) if script is None else script(self)

    # -- for scripts

    def out(self, port: int, value: int, size: int = 1) -> int:
        self.exit.io_port, self.exit.io_value, self.exit.io_size = port, value, size
        self.exit.io_in = self.exit.io_string = False
        return exits.IO

    def inp(self, port: int, size: int = 1) -> int:
        self.exit.io_port, self.exit.io_size = port, size
        self.exit.io_in, self.exit.io_string = True, False
        return exits.IO

    def rdmsr(self, msr: int) -> int:
        self.exit.msr = msr
        return exits.RDMSR

    def wrmsr(self, msr: int, value: int) -> int:
        self.exit.msr, self.exit.msr_value = msr, value
        return exits.WRMSR

    def violation(self, gpa: int, access: int) -> int:
        self.exit.gpa = self.exit.gla = gpa
        self.exit.qualification = access
        return exits.EPT_VIOLATION

    def hlt(self, interrupts: bool = True) -> int:
        self.registers["rflags"] = 2 | (IF if interrupts else 0)
        return exits.HLT

    def error(self, text: str) -> int:
        self.text = text
        return exits.ENGINE_ERROR

    text = ""

    # -- the contract

    def run(self) -> int:
        self.entries += 1
        if self._pending is not None:
            self.injected.append(self._pending)
            self._pending = None
        if self._kicked.is_set():
            self._kicked.clear()
            return exits.EXTERNAL_INTERRUPT
        if self.window and self.interruptible():
            return exits.INTERRUPT_WINDOW
        if self.nmi_window and self.nmi_allowed():
            return exits.NMI_WINDOW
        for reason in self._script:
            self.exit.reason = reason
            return reason
        self._kicked.wait()
        self._kicked.clear()
        return exits.EXTERNAL_INTERRUPT

    def kick(self) -> None:
        self.kicks += 1
        self._kicked.set()

    def inject(self, vector: int, kind: int, error: int | None = None) -> None:
        assert self._pending is None, "two events injected at one entry"
        self._pending = (vector, kind, error)

    def injection_pending(self) -> bool:
        return self._pending is not None

    def interruptible(self) -> bool:
        return bool(self.registers["rflags"] & IF) and self._pending is None

    def nmi_allowed(self) -> bool:
        return not self.nmi_blocked and self._pending is None

    def request_interrupt_window(self, wanted: bool) -> None:
        self.window = wanted

    def request_nmi_window(self, wanted: bool) -> None:
        self.nmi_window = wanted

    def get(self, name: str) -> int:
        if name in GPR_NAMES:
            return self.gprs[GPR_NAMES.index(name)]
        return self.registers[name]

    def set(self, name: str, value: int) -> None:
        assert 0 <= value < 1 << 64, f"{name} = {value}"
        if name in GPR_NAMES:
            self.gprs[GPR_NAMES.index(name)] = value
        else:
            assert name in self.registers
            self.registers[name] = value

    def get_gpr(self, index: int) -> int:
        return self.gprs[index]

    def set_gpr(self, index: int, value: int) -> None:
        assert 0 <= value < 1 << 64, f"{GPR_NAMES[index]} = {value}"
        self.gprs[index] = value

    def get_segment(self, name: str) -> Segment:
        return self.segments[name]

    def set_segment(self, name: str, segment: Segment) -> None:
        self.segments[name] = segment

    def get_table(self, name: str) -> tuple[int, int]:
        return self.tables[name]

    def set_table(self, name: str, base: int, limit: int) -> None:
        self.tables[name] = (base, limit)

    def get_xsave(self) -> bytes:
        return bytes(832)

    def set_xsave(self, area: bytes) -> None:
        pass

    def complete_io(self, value: int) -> None:
        self.completed.append(("io", value))

    def complete_rdmsr(self, value: int) -> None:
        self.completed.append(("rdmsr", value))

    def complete_wrmsr(self) -> None:
        self.completed.append(("wrmsr", 0))

    def complete_mmio(self, value: int) -> None:
        self.completed.append(("mmio", value))

    def skip(self, length: int) -> None:
        self.skipped.append(length)
        self.registers["rip"] += length

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        self.cpuid = list(entries)

    def set_ept(self, eptp: int, generation: int) -> None:
        self.epts.append((eptp, generation))

    def invalidate_code(self, hva: int, length: int) -> None:
        pass

    def translate(self, gla: int, access: int = 0) -> int | None:
        page = self.pages.get(gla >> 12, gla >> 12)
        if page is None or (access == 1 and gla >> 12 in self.read_only):
            return None
        return page << 12 | gla & 0xFFF

    def counters(self) -> Mapping[str, int]:
        return {"entries": self.entries}

    def message(self) -> str:
        return self.text


class FakeVm:
    def __init__(self, processor: "FakeProcessor") -> None:
        self.processor = processor
        self.vcpus: list[FakeVcpu] = []
        self.memory: list[tuple[int, int, int, bool]] = []
        self.closed = False

    def create_vcpu(self, vcpu_id: int) -> FakeVcpu:
        scripts = self.processor.scripts
        vcpu = FakeVcpu(vcpu_id, scripts[vcpu_id] if vcpu_id < len(scripts) else None)
        self.vcpus.append(vcpu)
        return vcpu

    def map_memory(self, gpa: int, hva: int, length: int, writable: bool) -> None:
        self.memory.append((gpa, hva, length, writable))

    def unmap_memory(self, gpa: int, length: int) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class FakeProcessor:
    """`scripts[n]` is the guest of vCPU n."""

    name = "fake"

    def __init__(self, *scripts: Script, **capabilities: Any) -> None:
        self.scripts = scripts
        self._capabilities = Capabilities("fake", **capabilities)
        self.vm: FakeVm | None = None

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def unavailable(self) -> str | None:
        return None

    def create_vm(self) -> FakeVm:
        self.vm = FakeVm(self)
        return self.vm

    @property
    def vcpus(self) -> list[FakeVcpu]:
        assert self.vm is not None
        return self.vm.vcpus


class Device:
    """A device that does nothing; tests override what they need."""

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass
