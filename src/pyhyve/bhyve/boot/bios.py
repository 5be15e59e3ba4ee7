"""What little of a PC's BIOS a Multiboot kernel may count on: the state in which it leaves memory and interrupts.

Real-mode interrupts return at once; the timer's counts a tick. There are no services. Source: IBM PC AT Technical
Reference, "ROM BIOS" (interrupt vectors, BIOS data area, the timer interrupt).
"""

import struct
from typing import Final

from pyhyve.base.protocols import GuestMemory, IoHandler
from pyhyve.bhyve import layout

_SEGMENT: Final = layout.BIOS_BASE >> 4
_VECTORS: Final = 256
_TIMER_VECTOR: Final = 8
_BASE_MEMORY: Final = 0x413
"""KiB of conventional memory, 16 bits."""

_IRET: Final = b"\xcf"
_TIMER: Final = bytes.fromhex(
    "1e"  # push ds
    "50"  # push ax
    "31c0"  # xor ax, ax
    "8ed8"  # mov ds, ax
    "66ff066c04"  # inc dword [0x46c]
    "b020"  # mov al, 0x20
    "e620"  # out 0x20, al
    "58"  # pop ax
    "1f"  # pop ds
    "cf"  # iret
)
_RESET: Final = bytes.fromhex(
    "baf90c"  # mov dx, 0xcf9
    "b006"  # mov al, 6
    "ee"  # out dx, al
    "f4"  # hlt
    "ebfd"  # jmp back to the hlt
)


def write_reset(memory: GuestMemory) -> None:
    """Write what a guest finds at the BIOS's entry, when it jumps there to restart: a reset."""
    memory.write(layout.BIOS_RESET, _RESET)


def write_memory(memory: GuestMemory) -> None:
    """Write the interrupt vectors, the data area, and the code that they lead to."""
    memory.write(layout.BIOS_STUBS, _IRET + _TIMER)
    offset = layout.BIOS_STUBS - layout.BIOS_BASE
    vectors = [struct.pack("<HH", offset, _SEGMENT)] * _VECTORS
    vectors[_TIMER_VECTOR] = struct.pack("<HH", offset + len(_IRET), _SEGMENT)
    memory.write(0, b"".join(vectors))
    memory.write(_BASE_MEMORY, struct.pack("<H", layout.CONVENTIONAL_LIMIT >> 10))


def set_up_interrupts(pic: IoHandler, pit: IoHandler) -> None:
    """Program the 8259s to vectors 8 and 0x70, with nothing open but the timer's line, and let the timer tick."""
    for port, values in (
        (layout.PIC_MASTER_PORT, (0x11, 0x08, 0x04, 0x01, 0xFA)),
        (layout.PIC_SLAVE_PORT, (0x11, 0x70, 0x02, 0x01, 0xFF)),
    ):
        pic.write(port, 1, values[0])
        for value in values[1:]:
            pic.write(port + 1, 1, value)
    pit.write(layout.PIT_PORT + 3, 1, 0x34)  # channel 0, low and high byte, rate generator
    pit.write(layout.PIT_PORT, 1, 0)
    pit.write(layout.PIT_PORT, 1, 0)
