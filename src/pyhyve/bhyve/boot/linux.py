"""The Linux boot loader (64-bit boot protocol)."""

from pathlib import Path

from pyhyve.base.protocols import GuestMemory
from pyhyve.bhyve.boot.state import BootState

__all__ = ["BootState", "load_linux"]


def load_linux(
    memory: GuestMemory,
    kernel: Path,
    initrd: Path | None,
    cmdline: str,
    low_ram: int,
    high_ram: int,
    *,
    kaslr: bool = False,
    rsdp: int,
) -> BootState:
    raise NotImplementedError
