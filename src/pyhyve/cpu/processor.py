"""The contract between the monitor and a processor, whatever runs the guest's instructions.

It follows VT-x: the monitor sets state, asks for intercepts and an interrupt window, injects an event, calls `run()`,
and reads an exit. Nothing here names an engine; engines are found through `pyhyve.cpu.select`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, runtime_checkable

# Indices of registers in `VcpuBackend.get`/`set`, by the names that users type.
GPR_NAMES: Final = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
SEGMENT_NAMES: Final = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
CONTROL_NAMES: Final = (
    "rip", "rflags", "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "xcr0", "apic_base",
    "dr0", "dr1", "dr2", "dr3", "dr6", "dr7",
)  # fmt: skip
MSR_NAMES: Final = (
    "star", "lstar", "cstar", "sfmask", "kernel_gs_base", "sysenter_cs", "sysenter_esp", "sysenter_eip",
    "tsc_aux", "pat", "tsc_offset",
)  # fmt: skip

# Event types of inject(): VT-x's interruption types.
INJECT_EXTERNAL: Final = 0
INJECT_NMI: Final = 2
INJECT_EXCEPTION: Final = 3
INJECT_SOFTWARE: Final = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register with its hidden part; `attr` is VT-x's access-rights format (type 0-3, S 4, DPL 5-6, P 7,
    AVL 12, L 13, D/B 14, G 15, unusable 16); `limit` in bytes."""

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    attr: int = 0x93


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a processor can do; the monitor adapts to it and never asks which engine it is."""

    name: str
    ept_ad: bool = True
    ept_2m: bool = True
    ept_1g: bool = True
    max_vcpus: int = 64
    xcr0: int = 7
    """XCR0 bits that guests may set."""
    notes: Sequence[str] = field(default=())


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """One CPUID answer; subleaf None answers all subleaves of the leaf."""

    leaf: int
    subleaf: int | None
    eax: int
    ebx: int
    ecx: int
    edx: int


class Exit(Protocol):
    """The last exit, filled in place by `run()`; see exits.py for `reason`.

    EPT_VIOLATION: qualification (bit 0 read, 1 write, 2 fetch), gpa, gla; RIP at the instruction.
    IO: io_port, io_size (1, 2, 4), io_in, io_value for OUT. RIP is already behind the instruction; an IN is completed
    by `VcpuBackend.complete_io(value)`. With io_string (INS/OUTS) RIP is at the instruction: the monitor emulates it;
    an engine that decodes strings itself exits once for each element instead, without io_string.
    RDMSR, WRMSR: msr, msr_value; RIP at the instruction; finish by `complete_rdmsr(value)` or `complete_wrmsr()`, or
    inject #GP. HLT: RIP behind it. CPUID, CR_ACCESS, PAUSE, VMCALL, ...: RIP at the instruction, `length` its bytes.
    CR_ACCESS is a write to CR8 that is not carried out yet; TPR_BELOW_THRESHOLD follows one that is. An engine need not
    exit for one that lowers nothing: register `cr8` is the task priority, and the local APIC's TPR follows it.
    MMIO: mmio_gpa, mmio_size (1-8 bytes, within a page), mmio_write, mmio_value for a write. A read is completed by
    `complete_mmio(value)`; one left alone reads all ones. An instruction may exit several times (a string operation,
    an operand over a page end); RIP is behind it after the last.
    """

    reason: int
    length: int
    qualification: int
    gpa: int
    gla: int
    io_port: int
    io_size: int
    io_in: bool
    io_string: bool
    io_value: int
    msr: int
    msr_value: int
    mmio_gpa: int
    mmio_size: int
    mmio_write: bool
    mmio_value: int


class ApicTimer(Protocol):
    """A local APIC's timer, where the engine keeps it: it posts the interrupt, and starts anew in periodic mode. Times
    are the guest's time-stamp counter. Set by the vCPU's thread, while `run()` does not run."""

    lvt: int
    """The LVT entry: vector, mask, mode."""
    deadline: int
    """When the interrupt is due; 0: the timer does not run."""

    @property
    def initial(self) -> int:
        """The initial count."""
        ...

    def set_clock(self, tsc_hz: int, bus_hz: int, shortest_ns: int) -> None:
        """What is counted, and the shortest period that is kept: what falls between merges."""
        ...

    def set_divisor(self, divisor: int) -> None: ...

    def start(self, count: int) -> None:
        """Write the initial count: start from there, or stop with 0."""
        ...

    def look(self) -> None:
        """Post the interrupt if it is due: the engine may not have come to it yet."""
        ...

    def take_error(self) -> bool:
        """True, once, if the interrupt was due and its vector below 16."""
        ...


class ApicState(Protocol):
    """What decides when a local APIC's interrupts are delivered, where the engine keeps it: IRR, ISR and TMR (ints of
    256 bits), TPR and PPR (0-255), and the ICR's halves as the xAPIC page shows them.

    While `direct` is true, `run()` carries out itself what needs nobody else: it delivers interrupts, completes
    edge-triggered ones (EOI), sends fixed ones to other vCPUs of the VM, and waits in HLT until one comes. What it
    leaves to the monitor comes as the exits that there are without it, and APIC_WRITE. `accept` may come from any
    thread, and `halted` may be read by any.
    """

    irr: int
    isr: int
    tmr: int
    tpr: int
    icr_low: int
    icr_high: int
    accepting: bool
    """Enabled by hardware and software."""
    direct: bool
    resting: bool
    """Set by the monitor: the next `run()` goes on with a HLT that came out of it. Cleared when it does."""

    @property
    def timer(self) -> ApicTimer | None:
        """The timer; None if it is the monitor's."""
        ...

    @property
    def ppr(self) -> int:
        """Follows `tpr` and `isr`."""
        ...

    @property
    def halted(self) -> bool:
        """`run()` waits in HLT, with interrupts on."""
        ...

    @property
    def halted_cycles(self) -> int:
        """For how long it ever did, in cycles of the host's TSC."""
        ...

    @property
    def activity(self) -> int:
        """A number that grows with each thing that is done without an exit."""
        ...

    def configure(self, apic_id: int, enabled: bool, x2apic: bool, ldr: int, dfr: int) -> None:
        """The registers by which IPIs find their destination, and IA32_APIC_BASE's mode; at each change."""
        ...

    def clear(self) -> None:
        """All zero, as after INIT; but what is for `configure`, and `accepting`."""
        ...

    def accept(self, vector: int, level: bool) -> bool:
        """Set the bit in IRR, and TMR; True if it is new and the monitor must make the vCPU look."""
        ...

    def pending(self) -> int:
        """The vector that the vCPU would take now by IRR and PPR, or -1."""
        ...

    def acknowledge(self, vector: int) -> None:
        """IRR to ISR."""
        ...

    def complete(self) -> int:
        """End the highest interrupt in service; return its vector if it was level-triggered, else -1."""
        ...

    def delivered(self) -> Sequence[int]:
        """How many `run()` has delivered, by vector."""
        ...


@runtime_checkable
class KeepsApicState(Protocol):
    """A vCPU of an engine that works on its local APIC's state itself."""

    apic: ApicState


class VcpuBackend(Protocol):
    """One virtual processor of an engine. All methods but `kick` are called by the thread that runs it, or while it
    does not run; `kick` by any thread at any time."""

    exit: Exit

    def run(self) -> int:
        """Run guest instructions without the GIL until there is something for the monitor; return exit.reason."""
        ...

    def kick(self) -> None:
        """Make the present or the next `run()` return EXTERNAL_INTERRUPT soon (microseconds)."""
        ...

    def inject(self, vector: int, kind: int, error: int | None = None) -> None:
        """Deliver an event at the next entry, before any guest instruction. One at a time."""
        ...

    def injection_pending(self) -> bool:
        """True while an injected event has not been delivered."""
        ...

    def interruptible(self) -> bool:
        """True if an external interrupt may be injected now: IF=1, no STI or MOV SS shadow, nothing pending."""
        ...

    def nmi_allowed(self) -> bool: ...

    def request_interrupt_window(self, wanted: bool) -> None:
        """Exit with INTERRUPT_WINDOW as soon as `interruptible()` is true. Stays in force until turned off."""
        ...

    def request_nmi_window(self, wanted: bool) -> None: ...

    def get(self, name: str) -> int:
        """A register by name (GPR_NAMES, CONTROL_NAMES, MSR_NAMES). KeyError if there is none of that name."""
        ...

    def set(self, name: str, value: int) -> None: ...

    def get_gpr(self, index: int) -> int: ...

    def set_gpr(self, index: int, value: int) -> None: ...

    def get_segment(self, name: str) -> Segment: ...

    def set_segment(self, name: str, segment: Segment) -> None: ...

    def get_table(self, name: str) -> tuple[int, int]:
        """`gdtr` or `idtr`: (base, limit)."""
        ...

    def set_table(self, name: str, base: int, limit: int) -> None: ...

    def get_xsave(self) -> bytes:
        """The x87/SSE/AVX state in the standard (non-compacted) XSAVE format."""
        ...

    def set_xsave(self, area: bytes) -> None: ...

    def complete_io(self, value: int) -> None: ...

    def complete_rdmsr(self, value: int) -> None: ...

    def complete_wrmsr(self) -> None: ...

    def complete_mmio(self, value: int) -> None:
        """The answer to an MMIO exit's read; for a write it has no effect. Only engines that exit with MMIO have it do
        anything."""
        ...

    def skip(self, length: int) -> None:
        """RIP += length; ends an STI/MOV SS shadow."""
        ...

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None: ...

    def set_ept(self, eptp: int, generation: int) -> None:
        """Use this EPT (an EPTP value whose root and frame numbers are host addresses of this process). A generation
        other than the last one drops all cached translations."""
        ...

    def invalidate_code(self, hva: int, length: int) -> None:
        """Host memory that may hold guest code was written by someone other than a vCPU. Any thread may call this at
        any time; the vCPU acts on it before it takes its next interrupt or enters the guest again."""
        ...

    def translate(self, gla: int, access: int = 0) -> int | None:
        """Guest-linear to guest-physical, as a supervisor access (0 read, 1 write, 2 fetch); None if not mapped."""
        ...

    def counters(self) -> Mapping[str, int]: ...

    def message(self) -> str:
        """What ENGINE_ERROR was about."""
        ...


class ProcessorVm(Protocol):
    """What an engine keeps for one VM."""

    def create_vcpu(self, vcpu_id: int) -> VcpuBackend:
        """A vCPU in the architecture's reset state."""
        ...

    def map_memory(self, gpa: int, hva: int, length: int, writable: bool) -> None:
        """Tell the engine of a RAM range (engines that walk the EPT ignore it; others make a memory slot of it)."""
        ...

    def unmap_memory(self, gpa: int, length: int) -> None: ...

    def close(self) -> None:
        """Release everything; vCPUs must not run any more. Idempotent."""
        ...


DEFAULT_CODE_CACHE: Final = 64 << 20
MIN_CODE_CACHE: Final = 1 << 20
MAX_CODE_CACHE: Final = 1 << 30
"""Bytes of translated code that a vCPU keeps: jumps within the cache have 31 bits."""


@runtime_checkable
class CachesCode(Protocol):
    """An engine that translates. Set before `create_vm`: MIN_CODE_CACHE to MAX_CODE_CACHE, whole pages."""

    code_cache: int


class Processor(Protocol):
    """An engine. Made by `pyhyve.cpu.select`."""

    name: str

    def capabilities(self) -> Capabilities: ...

    def unavailable(self) -> str | None:
        """None if the engine works on this host, else one line that says what is missing and the remedy."""
        ...

    def create_vm(self) -> ProcessorVm: ...
