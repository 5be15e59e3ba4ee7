"""The state in which a loader leaves the boot processor."""

from collections.abc import Mapping
from dataclasses import dataclass

from pyhyve.cpu.processor import Segment


@dataclass(frozen=True, slots=True)
class BootState:
    """Everything of the boot processor that the loader decides; what is not here keeps its value after reset.

    Registers are named as `VcpuBackend.set` and `set_segment` name them.
    """

    rip: int
    rflags: int
    cr0: int
    segments: Mapping[str, Segment]
    """All eight, by name."""
    gdt_base: int
    gdt_limit: int
    idt_base: int = 0
    idt_limit: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    bios: bool = False
    """Whether the kernel may count on interrupt controllers and timer as a PC's BIOS leaves them."""
    rsp: int = 0
    rsi: int = 0
    """Linux's boot protocol: the guest-physical address of struct boot_params."""
    rax: int = 0
    """Multiboot: the loader's magic number."""
    rbx: int = 0
    """Multiboot and PVH: the guest-physical address of what the kernel is told."""

    def registers(self) -> dict[str, int]:
        """Return the registers by name, in an order in which a processor can take them (EFER and CR4 before CR0)."""
        return {
            "efer": self.efer,
            "cr3": self.cr3,
            "cr4": self.cr4,
            "cr0": self.cr0,
            "rflags": self.rflags,
            "rip": self.rip,
            "rsp": self.rsp,
            "rsi": self.rsi,
            "rax": self.rax,
            "rbx": self.rbx,
        }
