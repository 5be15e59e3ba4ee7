"""Kernels as ELF files: vmlinux, what a bzImage's payload unpacks to, and images for Multiboot and PVH loaders.

Source: System V ABI, "Object Files"; its AMD64 and i386 supplements.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment, Segment

from pyhyve.base.errors import UsageError

MAGIC: Final = b"\x7fELF"
_NT_GNU_ABI_TAG: Final = "NT_GNU_ABI_TAG"
_XEN_PHYS32_ENTRY: Final = 18
"""XEN_ELFNOTE_PHYS32_ENTRY: the note that holds a PVH entry point's physical address."""
_X86: Final = ("EM_X86_64", "EM_386")
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
    """What is loaded at the physical address `paddr`; up to `memsz`, it goes on with zeros. `vaddr`: where it runs."""

    paddr: int
    data: memoryview
    memsz: int
    vaddr: int


@dataclass(frozen=True, slots=True)
class ElfImage:
    """An x86 executable as its headers tell; nothing says yet that it is a kernel."""

    machine: str
    """EM_X86_64 or EM_386; other machines are left to whoever reports them."""
    bits: int
    kind: str
    entry: int
    """e_entry as it stands in the header."""
    segments: Sequence[ElfSegment]
    pvh_entry: int | None
    """Physical address of the 32-bit PVH entry point, where a Xen note names one."""
    is_program: bool
    """User space's executables have an interpreter, or say for which system's ABI they were linked."""

    @property
    def start(self) -> int:
        return min(segment.paddr for segment in self.segments)

    @property
    def end(self) -> int:
        return max(segment.paddr + segment.memsz for segment in self.segments)

    @property
    def physical_entry(self) -> int:
        """The entry point's physical address: some linkers' scripts give its virtual one."""
        for segment in self.segments:
            if segment.vaddr <= self.entry < segment.vaddr + segment.memsz:
                return self.entry - segment.vaddr + segment.paddr
        return self.entry

    def holds(self, address: int) -> bool:
        """Whether this physical address is in what the file brings along."""
        return any(segment.paddr <= address < segment.paddr + len(segment.data) for segment in self.segments)


def read_elf(data: bytes, subject: str) -> ElfImage:
    """Return what the headers tell; `subject` begins the UsageError's text where they are damaged."""
    try:
        return _read(data, subject)
    except (ELFError, ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError):
        # pyelftools trusts a header's numbers and trips over bad ones in many ways.
        raise UsageError(f"{subject}: truncated or damaged: its ELF headers make no sense; get it anew") from None


def _read(data: bytes, subject: str) -> ElfImage:
    elf = ELFFile(io.BytesIO(data))
    machine = str(elf["e_machine"])
    segments = []
    if machine in _X86 and elf["e_type"] == "ET_EXEC":
        for segment in elf.iter_segments("PT_LOAD"):
            offset, filesz, memsz = segment["p_offset"], segment["p_filesz"], segment["p_memsz"]
            if offset + filesz > len(data):
                raise UsageError(f"{subject}: truncated: it has {len(data)} of {offset + filesz} bytes; get it anew")
            if memsz < filesz:
                raise ValueError("a segment is larger in the file than in memory")
            if memsz:
                content = memoryview(data)[offset : offset + filesz]
                segments.append(ElfSegment(segment["p_paddr"], content, memsz, segment["p_vaddr"]))
    return ElfImage(
        machine=machine,
        bits=elf.elfclass,
        kind=str(elf["e_type"]),
        entry=elf["e_entry"],
        segments=tuple(segments),
        pvh_entry=next(_pvh_entries(elf), None) if segments else None,
        is_program=any(_is_program(segment) for segment in elf.iter_segments()),
    )


def check_kernel(image: ElfImage, subject: str) -> None:
    """Raise UsageError, one line, unless this is a 64-bit kernel that can be entered at its entry point."""
    if image.machine != "EM_X86_64" or image.bits != 64:
        name = _MACHINES.get(image.machine, image.machine)
        remedy = "pyhyve boots x86-64 kernels"
        if image.machine in _X86:
            remedy += ", and 32-bit ones with a Multiboot header or a PVH note"
        raise UsageError(f"{subject}: for another architecture, {name}; {remedy}")
    if image.kind != "ET_EXEC" or image.is_program:
        raise UsageError(f"{subject}: an x86-64 program or object file, not a kernel; give a bzImage or vmlinux")
    if not image.holds(image.entry):
        raise UsageError(
            f"{subject}: its entry point {image.entry:#x} is in no loaded segment; give a bzImage or vmlinux"
        )


def _pvh_entries(elf: ELFFile) -> Iterator[int]:
    for segment in elf.iter_segments("PT_NOTE"):
        for note in segment.iter_notes() if isinstance(segment, NoteSegment) else ():
            if note["n_name"] == "Xen" and note["n_type"] == _XEN_PHYS32_ENTRY:  # type: ignore[comparison-overlap]
                # 4 bytes, or 8 in a 64-bit kernel; the address is below 4 GiB either way.
                yield int.from_bytes(note["n_descdata"][:8], "little")


def _is_program(segment: Segment) -> bool:
    if segment["p_type"] == "PT_INTERP":
        return True
    notes = segment.iter_notes() if isinstance(segment, NoteSegment) else ()
    return any(note["n_type"] == _NT_GNU_ABI_TAG and note["n_name"] == "GNU" for note in notes)
