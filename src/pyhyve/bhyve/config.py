"""What a machine is made of: a frozen, checked description, and the parsers of what users type."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.bhyve.boot.files import BootFiles, ModuleFile
from pyhyve.bhyve.layout import IOAPIC_PIN_CHOICES, IOAPIC_PINS, MIB, MIN_RAM, PAGE_SIZE
from pyhyve.bhyve.lpc.options import FwCfgFile, FwCfgOptions, LpcOptions
from pyhyve.cpu.processor import DEFAULT_CODE_CACHE, MAX_CODE_CACHE, MIN_CODE_CACHE
from pyhyve.vmm.topology import Topology

DEFAULT_MEMORY: Final = 256 * MIB
DEFAULT_HANG_SECONDS: Final = 20.0
MAX_CPUS: Final = 254
"""8-bit APIC ids but 255, the broadcast, and 254, left to the I/O APIC of guests that number them together."""

CPU_SETTINGS: Final = ("cpus", "sockets", "cores", "threads")
_ONE: Final = Topology()
_UNITS: Final = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE: Final = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE | re.ASCII)
"""Python refuses to convert thousands of digits, and nobody means them."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def parse_size(text: str, option: str = "-m") -> int:
    """Return bytes for "256M", "1G", "1.5GiB", ... A bare number below 1 MiB counts MiB, as in bhyve.

    UsageError, beginning with `option`, for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{option} {text}: not a size; write a number and K, M, G or T, for instance 256M")
    number, unit = match[1], match[2].upper()
    size = int(float(number) * (1 << _UNITS[unit])) if "." in number else int(number) << _UNITS[unit]
    return size * MIB if not unit and "B" not in text.upper() and size < MIB else size


def format_size(size: int) -> str:
    """Return "256M", "1.5G", ... for a number of bytes."""
    for unit in "TGM":
        if size >= 1 << _UNITS[unit]:
            return f"{size / (1 << _UNITS[unit]):g}{unit}"
    return f"{size >> 10}K"


def parse_cpus(text: str, option: str = "-c") -> Topology:
    """Return the topology for "4" or "[[cpus=]N][,sockets=N][,cores=N][,threads=N]"; the last of a kind counts.

    What is left out is 1, but for the first of cores, sockets and threads, which takes what the number of processors
    asks for. UsageError, one line, for anything else.
    """
    given: dict[str, int] = {}
    for position, word in enumerate(text.split(",")):
        name, equals, value = word.partition("=")
        if not equals:
            name, value = "cpus" if position == 0 else "", word
        if name not in CPU_SETTINGS:
            raise UsageError(f"{option} {text}: {word!r} is no setting; there are {', '.join(CPU_SETTINGS)}")
        if not re.fullmatch(r"-?[0-9]{1,9}", value):
            raise UsageError(f"{option} {text}: not a number; write how many processors, for instance {option} 2")
        given[name] = int(value)
        if name != "cpus" and given[name] < 1:
            raise UsageError(f"{option} {word}: there is at least 1 of each; write a number from 1 on")
    cpus = given.pop("cpus", None)
    if cpus is None:
        return Topology(**given)
    _check_cpu_count(cpus, option)
    group = math.prod(given.values())
    rest = next((name for name in ("cores", "sockets", "threads") if name not in given), None)
    if cpus % group or (rest is None and cpus != group):
        parts = " times ".join(f"{name}={count}" for name, count in given.items())
        wanted = f"is not {cpus}" if rest is None else f"does not divide {cpus}"
        raise UsageError(f"{option} {text}: {parts} {wanted}; leave out what may follow from the rest")
    if rest is not None:
        given[rest] = cpus // group
    return Topology(**given)


def _check_cpu_count(cpus: int, option: str = "-c") -> None:
    if not 1 <= cpus <= MAX_CPUS:
        raise UsageError(f"{option} {cpus}: a machine has 1 to {MAX_CPUS} processors")


def parse_pin(text: str, option: str = "-p") -> tuple[int, int]:
    """Return (vCPU, host CPU) for "0:1"."""
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if match is None:
        raise UsageError(f"{option} {text}: not a pinning; write vCPU:hostCPU, for instance {option} 0:1")
    return int(match[1]), int(match[2])


def parse_rtc(text: str, option: str = "--rtc") -> bool:
    """Return whether "utc" or "local" is UTC."""
    if text not in ("utc", "local"):
        raise UsageError(f"{option} {text}: unknown; the real-time clock shows utc or local time")
    return text == "utc"


def parse_module(text: str) -> ModuleFile:
    """Return the module for "FILE" or "FILE ARGUMENTS"; a name with spaces is taken whole if there is such a file."""
    path, _, arguments = text.partition(" ")
    if Path(text).exists() or not path:
        return ModuleFile(Path(text))
    return ModuleFile(Path(path), arguments.strip())


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """A machine to be built. Checked when it is made: UsageError, one line, for what cannot be."""

    kernel: Path
    initrd: Path | None = None
    append: str | None = None
    """None: what suits the kind of kernel, `boot.loader.LINUX_APPEND` for Linux."""
    modules: Sequence[ModuleFile] = ()
    """Files for a Multiboot or PVH kernel, behind the initrd."""
    memory: int = DEFAULT_MEMORY
    """RAM in bytes."""
    topology: Topology = _ONE
    """How many processors, in how many sockets, cores and threads."""
    name: str | None = None
    """None: a name of its own that nobody else takes."""
    processor: str = "auto"
    code_cache: int = DEFAULT_CODE_CACHE
    """Bytes of translated code that each vCPU keeps, MIN_CODE_CACHE to MAX_CODE_CACHE; only the software processor."""
    cpu_features: Mapping[str, bool] = field(default_factory=dict)
    """Features of the guest's processor that must be there (True) or are hidden: `vmm.cpufeatures`."""
    ioapic_pins: int = IOAPIC_PINS
    """IOAPIC_PIN_CHOICES: 24, as in a PC's 82093AA, or 32 and an EOI register."""
    rtc_utc: bool = True
    """Whether the real-time clock starts with the host's UTC, or with its local time."""
    kaslr: bool = False
    lpc: Sequence[LpcOptions] = ()
    """Devices on the ISA bus besides those that every machine has."""
    fwcfg: Sequence[FwCfgFile] = ()
    pins: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """vCPU → the host CPUs that it may run on."""
    hang_seconds: float = DEFAULT_HANG_SECONDS
    """A guest that spins this long without an exit has hung; 0: it may."""

    def __post_init__(self) -> None:
        self._check_memory()
        self._check_cpus()
        if not MIN_CODE_CACHE <= self.code_cache <= MAX_CODE_CACHE or self.code_cache % PAGE_SIZE:
            low, high = format_size(MIN_CODE_CACHE), format_size(MAX_CODE_CACHE)
            raise UsageError(
                f"--code-cache {format_size(self.code_cache)}: write whole pages, {low} to {high}, for instance 64M"
            )
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise UsageError(
                f"--name {self.name!r}: not a name; use up to 64 letters, digits, '.', '_' and '-', "
                "a letter or a digit first"
            )
        if self.ioapic_pins not in IOAPIC_PIN_CHOICES:
            raise UsageError(f"--ioapic-pins {self.ioapic_pins}: an I/O APIC here has 24 pins or 32")
        if self.hang_seconds < 0:
            raise UsageError(f"--hang {self.hang_seconds:g}: not a time; write seconds, or 0 for never")

        kinds = [type(device) for device in self.lpc]
        if self.fwcfg and FwCfgOptions not in kinds:
            raise UsageError(f"-f {self.fwcfg[0].name}: there is no firmware configuration; add -l fwcfg,qemu")
        for file in self.fwcfg:
            if sum(file.name == other.name for other in self.fwcfg) > 1:
                raise UsageError(f"-f {file.name}: there is such a file already; give each name once")

    @property
    def cpus(self) -> int:
        return self.topology.cpus

    @property
    def files(self) -> BootFiles:
        """What the guest begins with."""
        la57 = self.cpu_features.get("la57", False)
        return BootFiles(self.kernel, self.initrd, self.append, self.modules, self.kaslr, la57)

    def _check_memory(self) -> None:
        if self.memory < MIN_RAM:
            raise UsageError(
                f"-m {format_size(self.memory)}: too little memory; "
                f"a 64-bit Linux needs at least {format_size(MIN_RAM)}, better 128M"
            )
        if self.memory % PAGE_SIZE:
            raise UsageError(f"-m {self.memory}: not a multiple of {PAGE_SIZE} bytes; write MiB, as in 256M")

    def _check_cpus(self) -> None:
        _check_cpu_count(self.cpus)
        host = os.sched_getaffinity(0)
        for vcpu, cpus in self.pins.items():
            if not 0 <= vcpu < self.cpus:
                raise UsageError(f"-p {vcpu}: there is no such vCPU; this machine has 0 to {self.cpus - 1}")
            missing = sorted(cpus - host)
            if missing:
                allowed = ", ".join(map(str, sorted(host)))
                raise UsageError(f"-p {vcpu}:{missing[0]}: no such host CPU for this process; it may use {allowed}")
