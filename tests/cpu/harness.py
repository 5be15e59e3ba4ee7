"""A minimal machine straight on the processor contract, so that one small guest runs on every engine.

`run_code` runs machine code, `run_asm` assembles it first. The guest finds memory, page tables, a GDT, a TSS, an IDT
(or IVT) and its registers set up as in the layout below; it ends with END, which run_asm appends, with HLT, or with an
exception that no handler of the test takes. END is OUT to DONE_PORT, and in user mode, where a para-virtual KVM grants
neither IOPL nor INT, a marked UD2.

Linear addresses below 8 MiB are guest-physical ones, mapped by 4 KiB pages below 2 MiB and by large pages above, all
open to user mode; the 8 MiB are seen once more at ALIAS.
"""

import ctypes
import mmap
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

from asm import assemble

from pyhyve.base.errors import HostError
from pyhyve.cpu import exits
from pyhyve.cpu.processor import GPR_NAMES, CpuidEntry, Processor, Segment, VcpuBackend
from pyhyve.cpu.select import processor

Mode = Literal["long64", "prot32", "real16"]

MEMORY_SIZE: Final = 8 << 20
PAGE_BYTES: Final = 4096
PML4: Final = 0x1000
PDPT: Final = 0x2000
PD: Final = 0x3000
PT: Final = 0x4000
PD_ALIAS: Final = 0x5000
GDT: Final = 0x6000
IDT: Final = 0x7000
STUBS: Final = 0x8000
TSS: Final = 0xA000
KERNEL_STACK: Final = 0xD000
"""Top of the stack on which user mode's exceptions arrive."""
IST_STACK: Final = 0xF000
CODE: Final = 0x10000
CODE16: Final = 0x7C00
HANDLERS: Final = 0x30000
DATA: Final = 0x40000
STACK: Final = 0x60000
STACK16: Final = 0x7000
ALIAS: Final = 0x4000_0000

DONE_PORT: Final = 0xF4
USER_END: Final = b"\x0f\x0bdone"
FAULT_PORT: Final = 0xF5

# Selectors, in the order that SYSCALL and SYSRET want.
KCODE64, KDATA, UCODE32, UDATA, UCODE64, TSS64, KCODE32, CODE16_SEL, DATA16_SEL, TSS32 = (
    0x08, 0x10, 0x1B, 0x23, 0x2B, 0x30, 0x40, 0x48, 0x50, 0x58,
)  # fmt: skip

CF, PF, AF, ZF, SF, TF, IF, DF, OF, RF, AC = 0x1, 0x4, 0x10, 0x40, 0x80, 0x100, 0x200, 0x400, 0x800, 0x10000, 0x40000
STATUS: Final = CF | PF | AF | ZF | SF | OF

HAS_ERROR: Final = frozenset({8, 10, 11, 12, 13, 14, 17, 21})

CODE_SEGMENT: Final = {"long64": 0xA09B, "prot32": 0xC09B, "real16": 0x9B}
DATA_SEGMENT: Final = {"long64": 0xC093, "prot32": 0xC093, "real16": 0x93}


@dataclass(frozen=True)
class Fault:
    """An exception that no handler took. rsp and ss are those of the interrupted code."""

    vector: int
    error: int
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int
    cr2: int


@dataclass
class Outcome:
    """How a guest ended: `exit` is "done", "fault" or an exit's name."""

    exit: str
    regs: dict[str, int]
    rflags: int
    memory: dict[int, bytes]
    fault: Fault | None = None
    io: list[tuple[int, int, int]] = field(default_factory=list)
    """What OUT wrote: (port, bytes, value)."""
    message: str = ""

    @property
    def flags(self) -> int:
        """The six status flags."""
        return self.rflags & STATUS

    def __getitem__(self, register: str) -> int:
        return self.regs[register]


@cache
def host_flags() -> frozenset[str]:
    """The host processor's features by the kernel's names, and its vendor."""
    words: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "vendor_id"):
            words.update(value.split())
    return frozenset(words)


@cache
def engine_called(name: str) -> Processor | str:
    """The engine, or why it cannot be had here."""
    try:
        return processor(name)
    except ImportError as error:
        return f"{name} is not built: {error}"
    except HostError as error:
        return str(error)


@cache
def paravirtual(name: str) -> str | None:
    """Not None where the engine is a para-virtual KVM: one that emulates ring 0, many instructions at a time, without
    vector state, and cannot offset the TSC."""
    if name != "kvm" or isinstance(engine_called(name), str):
        return None
    with Machine(name) as machine:
        machine.write(CODE, b"\x0f\x31\xf4")  # RDTSC; HLT
        machine.vcpu.set("tsc_offset", 1 << 50)
        machine.run()
        return None if machine.vcpu.get("rdx") >> 18 else "this host's KVM is para-virtual and emulates ring 0"


def cpuid_table(xcr0: int) -> list[CpuidEntry]:
    """A plain 64-bit processor of the host's vendor, with AVX where `xcr0` has it."""
    amd = "AuthenticAMD" in host_flags()
    name = b"AuthenticAMD" if amd else b"GenuineIntel"
    ebx, edx, ecx = struct.unpack("<III", name)
    features = sum(1 << bit for bit in (0, 9, 13, 19, 20, 22, 23))  # SSE3 SSSE3 CX16 SSE4.1 SSE4.2 MOVBE POPCNT
    if xcr0:
        features |= 1 << 26
    if xcr0 & 4:
        features |= 1 << 28 | 1 << 12 | 1 << 29  # AVX FMA F16C
    edx1 = sum(1 << bit for bit in (0, 2, 3, 4, 5, 6, 8, 9, 11, 13, 15, 16, 17, 19, 23, 24, 25, 26))
    structured = 1 << 0 | 1 << 3 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 20  # FSGSBASE BMI1 SMEP BMI2 ERMS SMAP
    structured_c = 0
    if xcr0 & 4:
        structured |= 1 << 5
    for flag, bit in {"pclmulqdq": 1, "aes": 25, "rdrand": 30}.items():
        features |= (flag in host_flags()) << bit
    for flag, bit in {"rdseed": 18, "adx": 19, "clflushopt": 23, "clwb": 24, "sha_ni": 29}.items():
        structured |= (flag in host_flags()) << bit
    for flag, bit in {"gfni": 8, "vaes": 9, "vpclmulqdq": 10, "rdpid": 22}.items():
        structured_c |= (flag in host_flags()) << bit
    table = [
        CpuidEntry(0, None, 0xD, ebx, ecx, edx),
        CpuidEntry(1, None, 0xA10F11 if amd else 0x806F8, 0x800, features, edx1),
        CpuidEntry(7, 0, 0, structured, structured_c, 0),
        CpuidEntry(0x8000_0000, None, 0x8000_0008, ebx, ecx, edx),
        CpuidEntry(0x8000_0001, None, 0xA10F11 if amd else 0, 0, 0x121, 1 << 11 | 1 << 20 | 1 << 27 | 1 << 29),
        CpuidEntry(0x8000_0008, None, 0x3028, 0, 0, 0),
    ]
    if xcr0:
        table += [
            CpuidEntry(0xD, 0, xcr0 & 7, 832 if xcr0 & 4 else 576, 832, 0),
            CpuidEntry(0xD, 1, 0, 0, 0, 0),
            CpuidEntry(0xD, 2, 256 if xcr0 & 4 else 0, 576 if xcr0 & 4 else 0, 0, 0),
        ]
    return table


class Machine:
    """One VM with one vCPU and 8 MiB of memory, ready to run code in `mode`."""

    def __init__(self, engine_name: str, mode: Mode = "long64", cpl: int = 0, paging: bool | None = None) -> None:
        engine = engine_called(engine_name)
        if isinstance(engine, str):
            raise HostError(engine)
        self.engine = engine
        self.mode: Mode = mode
        self.cpl = cpl
        self.paging = mode == "long64" if paging is None else paging
        self.io: list[tuple[int, int, int]] = []
        self.inputs: dict[int, int] = {}
        self.ram = mmap.mmap(-1, MEMORY_SIZE)
        self._ram_pin = ctypes.c_char.from_buffer(self.ram)
        self.hva = ctypes.addressof(self._ram_pin)
        self._build_ept()
        self.vm = engine.create_vm()
        self.vm.map_memory(0, self.hva, MEMORY_SIZE, True)
        self.vcpu: VcpuBackend = self.vm.create_vcpu(0)
        self.xcr0 = engine.capabilities().xcr0 & 7
        self.vcpu.set_cpuid(cpuid_table(self.xcr0))
        self.vcpu.set_ept(self.eptp, 1)
        if mode == "real16":
            self._enter_real()
        else:
            self._enter_protected()

    def __enter__(self) -> "Machine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.vm.close()
        with suppress(AttributeError):
            del self._ram_pin, self._ept_pin
        with suppress(BufferError):  # an engine may still hold what it was told of
            self.ram.close()
            self.ept.close()

    # -- construction -------------------------------------------------------------------------------------------------

    def _build_ept(self) -> None:
        """RAM by 4 KiB leaves: R, W, X and write-back; frames and tables are addresses of this process."""
        pages = MEMORY_SIZE >> 12
        self.ept = mmap.mmap(-1, 3 * 4096 + pages * 8)
        self._ept_pin = ctypes.c_char.from_buffer(self.ept)
        base = ctypes.addressof(self._ept_pin)
        self.ept_leaves = 3 * 4096
        for table in range(2):
            self.ept[table * 4096 : table * 4096 + 8] = struct.pack("<Q", base + (table + 1) * 4096 | 7)
        for index in range(pages * 8 // 4096):
            offset = 2 * 4096 + index * 8
            self.ept[offset : offset + 8] = struct.pack("<Q", base + (3 + index) * 4096 | 7)
        leaves = [self.hva + page * 4096 | 7 | 6 << 3 for page in range(pages)]
        self.ept[self.ept_leaves :] = struct.pack(f"<{pages}Q", *leaves)
        self.eptp = base | 6 | 3 << 3 | 1 << 6

    def _build_tables(self) -> None:
        def put(address: int, *entries: int) -> None:
            self.write(address, struct.pack(f"<{len(entries)}Q", *entries))

        if self.paging and self.mode == "long64":
            put(PML4, PDPT | 7)
            put(PDPT, PD | 7, PD_ALIAS | 7)
            put(PD, PT | 7, *(frame << 21 | 0x87 for frame in range(1, MEMORY_SIZE >> 21)))
            put(PT, *(page << 12 | 7 for page in range(512)))
            put(PD_ALIAS, *(frame << 21 | 0x87 for frame in range(MEMORY_SIZE >> 21)))
        elif self.paging:
            words = [PT | 7, *(frame << 22 | 0x87 for frame in range(1, MEMORY_SIZE >> 22))]
            self.write(PML4, struct.pack(f"<{len(words)}I", *words))
            self.write(PT, struct.pack("<1024I", *(page << 12 | 7 for page in range(1024))))
        tss = 0x0000_8B00_0000_0067 | TSS << 16
        put(
            GDT, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF,
            0x00AF_FB00_0000_FFFF, tss, 0, 0x00CF_9B00_0000_FFFF, 0x0000_9B00_0000_FFFF, 0x0000_9300_0000_FFFF, tss,
        )  # fmt: skip
        self.write(TSS, bytes(0x68))
        self.write(TSS + 0x66, struct.pack("<H", 0x68))
        if self.mode == "long64":
            self.write(TSS + 4, struct.pack("<Q", KERNEL_STACK))
            self.write(TSS + 0x24, struct.pack("<Q", IST_STACK))
        else:
            self.write(TSS + 4, struct.pack("<II", KERNEL_STACK, KDATA))
        for vector in range(256):
            stub = b"" if vector in HAS_ERROR else b"\x6a\x00"
            stub += b"\x68" + struct.pack("<I", vector) + bytes((0xE6, FAULT_PORT, 0xF4))
            self.write(STUBS + vector * 16, stub)
            self.gate(vector, STUBS + vector * 16, ist=1 if vector == 8 else 0)

    def gate(self, vector: int, handler: int, dpl: int | None = None, ist: int = 0) -> None:
        """Point the vector at a handler: an interrupt gate, that user mode may call by #BP, #OF and from 0x20 on."""
        if dpl is None:
            dpl = 3 if vector in (3, 4) or vector >= 0x20 else 0
        if self.mode == "real16":
            self.write(vector * 4, struct.pack("<HH", handler & 0xFFFF, 0))
            return
        selector = KCODE64 if self.mode == "long64" else KCODE32
        low = handler & 0xFFFF | selector << 16 | ist << 32 | (0x8E | dpl << 5) << 40 | (handler >> 16 & 0xFFFF) << 48
        if self.mode == "long64":
            self.write(IDT + vector * 16, struct.pack("<QQ", low, handler >> 32))
        else:
            self.write(IDT + vector * 8, struct.pack("<Q", low))

    def _enter_protected(self) -> None:
        self._build_tables()
        vcpu, long = self.vcpu, self.mode == "long64"
        user = 0x60 if self.cpl == 3 else 0
        if long:
            code_selector = UCODE64 if self.cpl else KCODE64
        else:
            code_selector = UCODE32 if self.cpl else KCODE32
        data = Segment(UDATA if self.cpl else KDATA, 0, 0xFFFF_FFFF, DATA_SEGMENT[self.mode] | user)
        vcpu.set_segment("cs", Segment(code_selector, 0, 0xFFFF_FFFF, CODE_SEGMENT[self.mode] | user))
        for name in ("ss", "ds", "es", "fs", "gs"):
            vcpu.set_segment(name, data)
        vcpu.set_segment("tr", Segment(TSS64 if long else TSS32, TSS, 0x67, 0x8B))
        vcpu.set_segment("ldtr", Segment(0, 0, 0, 0x10000))
        vcpu.set_table("gdtr", GDT, 0x5F)
        vcpu.set_table("idtr", IDT, 256 * (16 if long else 8) - 1)
        vcpu.set("cr0", 0x10033 | (1 << 31 if self.paging else 0))
        vcpu.set("cr3", PML4)
        paging = 1 << 5 if long else (1 << 4 if self.paging else 0)
        vcpu.set("cr4", paging | 0x600 | (1 << 18 if self.xcr0 else 0))
        vcpu.set("efer", 0xD01 if long else 0)
        if self.xcr0:
            vcpu.set("xcr0", self.xcr0)
        vcpu.set("rsp", STACK)
        vcpu.set("rip", CODE)
        vcpu.set("rflags", 0x3002 if self.cpl == 3 else 2)
        vcpu.set("rdx", 0)

    def _enter_real(self) -> None:
        vcpu = self.vcpu
        for vector in range(256):
            push = struct.pack("<BH", 0x68, vector)
            self.write(STUBS + vector * 16, push + bytes((0xE6, FAULT_PORT, 0xF4)))
            self.gate(vector, STUBS + vector * 16)
        vcpu.set_segment("cs", Segment(0, 0, 0xFFFF, CODE_SEGMENT["real16"]))
        for name in ("ss", "ds", "es", "fs", "gs"):
            vcpu.set_segment(name, Segment(0, 0, 0xFFFF, DATA_SEGMENT["real16"]))
        vcpu.set_table("idtr", 0, 0x3FF)
        vcpu.set("cr0", 0x30)
        vcpu.set("rsp", STACK16)
        vcpu.set("rip", CODE16)
        vcpu.set("rflags", 2)
        vcpu.set("rdx", 0)

    # -- memory -------------------------------------------------------------------------------------------------------

    def write(self, gpa: int, data: bytes) -> None:
        self.ram[gpa : gpa + len(data)] = data

    def read(self, gpa: int, length: int) -> bytes:
        return self.ram[gpa : gpa + length]

    def read_int(self, gpa: int, length: int = 8) -> int:
        return int.from_bytes(self.read(gpa, length), "little")

    def read_linear(self, address: int, length: int) -> bytes:
        """Guest memory by linear address, within a page; zeroes where nothing is mapped."""
        gpa = self.vcpu.translate(address)
        return bytes(length) if gpa is None or gpa + length > MEMORY_SIZE else self.read(gpa, length)

    def protect(self, page: int, entry: int) -> None:
        """Make `entry` (flags included) the leaf of a 4 KiB page below 2 MiB. Only before the guest runs."""
        size = 8 if self.mode == "long64" else 4
        self.write(PT + (page >> 12) * size, entry.to_bytes(size, "little"))

    def leaf(self, page: int) -> int:
        size = 8 if self.mode == "long64" else 4
        return self.read_int(PT + (page >> 12) * size, size)

    # -- running ------------------------------------------------------------------------------------------------------

    def load(self, source: str) -> None:
        """Assemble at the place where the guest starts."""
        origin, bits = {"long64": (CODE, 64), "prot32": (CODE, 32), "real16": (CODE16, 16)}[self.mode]
        self.write(origin, assemble(source, origin, bits))

    def step(self) -> int:
        """Run to the next exit but for kicks; ports are answered here, OUT is noted and every exit returned."""
        reason = self.vcpu.run()
        if reason == exits.IO:
            event = self.vcpu.exit
            if event.io_in:
                self.vcpu.complete_io(self.inputs.get(event.io_port, 0))
            else:
                self.io.append((event.io_port, event.io_size, event.io_value))
        return reason

    def run(self, max_ms: int = 5000, hook: Callable[["Machine", int], bool] | None = None) -> str:
        """Run to the end. `hook` sees each exit first and says whether it was its own.

        Returns "done", "fault" or the exit's name; raises TimeoutError if the guest does not end.
        """
        deadline = time.monotonic() + max_ms / 1000
        alarm = threading.Timer(max_ms / 1000, self.vcpu.kick)
        alarm.daemon = True
        alarm.start()
        try:
            while True:
                reason = self.step()
                if hook is not None and hook(self, reason):
                    continue
                if reason == exits.EXTERNAL_INTERRUPT:
                    if time.monotonic() >= deadline:
                        raise TimeoutError(f"the guest still runs at rip {self.vcpu.get('rip'):#x}")
                elif reason == exits.IO:
                    event = self.vcpu.exit
                    if event.io_port in (DONE_PORT, FAULT_PORT) and not event.io_in:
                        self.io.pop()
                        return "done" if event.io_port == DONE_PORT else "fault"
                else:
                    return exits.NAMES[reason]
        finally:
            alarm.cancel()
            alarm.join()

    def fault(self) -> Fault:
        """The exception on the stack of the stub that took it."""
        vcpu = self.vcpu
        rsp = vcpu.get("rsp")
        cr2 = vcpu.get("cr2")
        if self.mode == "real16":
            vector, ip, cs, flags = struct.unpack("<4H", self.read_linear(vcpu.get_segment("ss").base + rsp, 8))
            return Fault(vector, 0, ip, cs, flags, rsp + 8, vcpu.get_segment("ss").selector, cr2)
        if self.mode == "long64":
            vector, error, rip, cs, rflags, old_rsp, ss = struct.unpack("<7Q", self.read_linear(rsp, 56))
            return Fault(vector, error, rip, cs, rflags, old_rsp, ss, cr2)
        vector, error, eip, cs, eflags, esp, ss = struct.unpack("<7I", self.read_linear(rsp, 28))
        if not cs & 3:
            esp, ss = rsp + 20, KDATA
        return Fault(vector, error, eip, cs & 0xFFFF, eflags, esp, ss & 0xFFFF, cr2)

    def outcome(self, ended: str, memory: Mapping[int, bytes]) -> Outcome:
        vcpu = self.vcpu
        regs = {name: vcpu.get(name) for name in (*GPR_NAMES, "rip", "cr2")}
        result = Outcome(
            ended, regs, vcpu.get("rflags"), {at: self.read(at, len(data)) for at, data in memory.items()}, io=self.io,
            message=vcpu.message() if ended == "engine-error" else "",
        )  # fmt: skip
        if ended == "fault":
            frame = self.fault()
            regs["rsp"], regs["rip"], result.rflags = frame.rsp, frame.rip, frame.rflags
            if frame.vector == 6 and self.read_linear(frame.rip, len(USER_END)) == USER_END:
                result.exit = "done"
                result.rflags &= ~RF
            else:
                result.fault = frame
        return result


def run_code(
    engine_name: str,
    code: bytes,
    regs: Mapping[str, int] | None = None,
    memory: Mapping[int, bytes] | None = None,
    mode: Mode = "long64",
    cpl: int = 0,
    max_ms: int = 5000,
    setup: Callable[[Machine], None] | None = None,
    paging: bool | None = None,
    hook: Callable[[Machine, int], bool] | None = None,
) -> Outcome:
    """Run machine code from CODE (CODE16 in real mode) to its end and return what it left.

    regs: registers by the contract's names. memory: bytes to put at guest-physical addresses; the same ranges come
    back in `Outcome.memory`. setup: called when all that is in place. hook: see Machine.run.
    """
    memory = memory or {}
    with Machine(engine_name, mode, cpl, paging) as machine:
        machine.write(CODE16 if mode == "real16" else CODE, code)
        for at, data in memory.items():
            machine.write(at, data)
        for name, value in (regs or {}).items():
            machine.vcpu.set(name, value)
        if setup is not None:
            setup(machine)
        return machine.outcome(machine.run(max_ms, hook), memory)


def run_asm(
    engine_name: str,
    source: str,
    regs: Mapping[str, int] | None = None,
    memory: Mapping[int, bytes] | None = None,
    mode: Mode = "long64",
    cpl: int = 0,
    max_ms: int = 5000,
    handlers: Mapping[int, str] | None = None,
    setup: Callable[[Machine], None] | None = None,
    paging: bool | None = None,
    hook: Callable[[Machine, int], bool] | None = None,
) -> Outcome:
    """Assemble (Intel syntax), append the OUT that ends a guest, and run_code. handlers: source by vector."""
    origin, bits = {"long64": (CODE, 64), "prot32": (CODE, 32), "real16": (CODE16, 16)}[mode]
    end = f".byte {', '.join(map(str, USER_END))}" if cpl == 3 else f"out {DONE_PORT}, al\nhlt"
    code = assemble(f"{source}\n{end}", origin, bits)

    def prepare(machine: Machine) -> None:
        for vector, text in (handlers or {}).items():
            at = (STUBS + 0x1000 if mode == "real16" else HANDLERS) + vector * 0x100
            machine.write(at, assemble(text, at, bits))
            machine.gate(vector, at)
        if setup is not None:
            setup(machine)

    return run_code(engine_name, code, regs, memory, mode, cpl, max_ms, prepare, paging, hook)


class Runner:
    """Runs 64-bit assembly on one engine at one privilege level."""

    def __init__(self, engine_name: str, cpl: int) -> None:
        self.engine = engine_name
        self.cpl = cpl

    def __call__(
        self, source: str, regs: Mapping[str, int] | None = None, memory: Mapping[int, bytes] | None = None
    ) -> Outcome:
        return run_asm(self.engine, source, regs, memory, cpl=self.cpl)
