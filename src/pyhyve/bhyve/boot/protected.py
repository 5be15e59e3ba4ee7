"""A flat 32-bit environment: what Multiboot and PVH kernels are entered in, with paging and interrupts off.

Source: Multiboot Specification 0.6.96, "Machine state"; Xen docs/misc/pvh.pandoc, "x86/HVM direct boot ABI".
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from pyhyve.base.protocols import GuestMemory
from pyhyve.bhyve.boot.descriptors import write_table
from pyhyve.bhyve.boot.state import BootState
from pyhyve.cpu.processor import Segment

CODE_SELECTOR: Final = 0x10
DATA_SELECTOR: Final = 0x18
TASK_SELECTOR: Final = 0x20

CR0: Final = 1 << 4 | 1 << 0
"""ET, PE."""
RFLAGS: Final = 1 << 1

_CODE: Final = Segment(CODE_SELECTOR, 0, 0xFFFF_FFFF, 0xC09B)
_DATA: Final = Segment(DATA_SELECTOR, 0, 0xFFFF_FFFF, 0xC093)
_TASK: Final = Segment(TASK_SELECTOR, 0, 0x67, 0x008B)
_UNUSABLE: Final = Segment(0, 0, 0, 0x1_0082)

SEGMENTS: Final[Mapping[str, Segment]] = MappingProxyType(
    dict.fromkeys(("es", "ss", "ds", "fs", "gs"), _DATA) | {"cs": _CODE, "tr": _TASK, "ldtr": _UNUSABLE}
)
GDT_SIZE: Final = 48


def entry_state(memory: GuestMemory, gdt: int, *, rip: int, rax: int = 0, rbx: int) -> BootState:
    """Write the descriptor table at `gdt` (GDT_SIZE bytes); return the state that enters the kernel at `rip`."""
    limit = write_table(memory, gdt, (Segment(attr=0), _CODE, _DATA, _TASK))
    return BootState(
        rip=rip, rflags=RFLAGS, cr0=CR0, segments=SEGMENTS, gdt_base=gdt, gdt_limit=limit, rax=rax, rbx=rbx
    )
