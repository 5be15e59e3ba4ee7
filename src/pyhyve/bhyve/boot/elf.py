"""The kernel as an ELF file: vmlinux, or what a bzImage's payload unpacks to."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment, Segment

from pyhyve.base.errors import UsageError

MAGIC: Final = b"\x7fELF"
_NT_GNU_ABI_TAG: Final = "NT_GNU_ABI_TAG"
_MACHINES: Final = {
    "EM_386": "32-bit x86 (i386)",
    "EM_AARCH64": "arm64",
    "EM_ARM": "32-bit Arm",
    "EM_RISCV": "RISC-V",
    "EM_PPC64": "64-bit PowerPC",
    "EM_S390": "s390",
    "EM_MIPS": "MIPS",
    "EM_LOONGARCH": "LoongArch",
}


@dataclass(frozen=True, slots=True)
class ElfSegment:
    """What is loaded at the physical address `paddr`; up to `memsz`, it goes on with zeros."""

    paddr: int
    data: memoryview
    memsz: int


@dataclass(frozen=True, slots=True)
class ElfKernel:
    """A checked kernel; `entry` is a physical address inside one of its segments."""

    entry: int
    segments: Sequence[ElfSegment]

    @property
    def start(self) -> int:
        return min(segment.paddr for segment in self.segments)

    @property
    def end(self) -> int:
        return max(segment.paddr + segment.memsz for segment in self.segments)


def parse_elf(data: bytes, subject: str) -> ElfKernel:
    """Return the checked kernel; `subject` begins the UsageError's text where it cannot be used."""
    try:
        return _parse(data, subject)
    except (ELFError, ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError):
        # pyelftools trusts a header's numbers and trips over bad ones in many ways.
        raise UsageError(f"{subject}: truncated or damaged: its ELF headers make no sense; get it anew") from None


def _parse(data: bytes, subject: str) -> ElfKernel:
    elf = ELFFile(io.BytesIO(data))
    machine = elf["e_machine"]
    if machine != "EM_X86_64" or elf.elfclass != 64:
        name = _MACHINES.get(machine, str(machine))
        raise UsageError(f"{subject}: for another architecture, {name}; pyhyve boots x86-64 kernels")
    if elf["e_type"] != "ET_EXEC" or any(_is_program(segment) for segment in elf.iter_segments()):
        raise UsageError(f"{subject}: an x86-64 program or object file, not a kernel; give a bzImage or vmlinux")
    segments = []
    for segment in elf.iter_segments("PT_LOAD"):
        offset, filesz, memsz = segment["p_offset"], segment["p_filesz"], segment["p_memsz"]
        if offset + filesz > len(data):
            raise UsageError(f"{subject}: truncated: it has {len(data)} of {offset + filesz} bytes; get it anew")
        if memsz < filesz:
            raise ValueError("a segment is larger in the file than in memory")
        if memsz:
            segments.append(ElfSegment(segment["p_paddr"], memoryview(data)[offset : offset + filesz], memsz))
    entry = elf["e_entry"]
    if not any(segment.paddr <= entry < segment.paddr + len(segment.data) for segment in segments):
        raise UsageError(f"{subject}: its entry point {entry:#x} is in no loaded segment; give a bzImage or vmlinux")
    return ElfKernel(entry, tuple(segments))


def _is_program(segment: Segment) -> bool:
    """User space's executables have an interpreter, or say for which system's ABI they were linked."""
    if segment["p_type"] == "PT_INTERP":
        return True
    notes = segment.iter_notes() if isinstance(segment, NoteSegment) else ()
    return any(note["n_type"] == _NT_GNU_ABI_TAG and note["n_name"] == "GNU" for note in notes)
