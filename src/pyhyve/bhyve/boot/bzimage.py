"""The bzImage, Linux's own container on x86: a setup header, a protected-mode part and the packed kernel in it.

Source: Linux Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header" and "Details of Header Fields".
"""

from dataclasses import dataclass
from typing import Final

from pyhyve.base.errors import UsageError

HEADER_START: Final = 0x1F1
"""The setup header begins here, in the file and in struct boot_params alike."""
SECTOR: Final = 512
ENTRY_64: Final = 0x200
"""The 64-bit entry, from the start of the protected-mode part."""
MIN_PROTOCOL: Final = 0x020C
XLF_KERNEL_64: Final = 1 << 0
XLF_5LEVEL: Final = 3 << 5
"""The kernel can do with five levels of page tables, and is made to use them."""

_HEADER_MIN: Final = 0x268
"""Bytes from the file's start that protocol 2.12 defines (up to handover_offset)."""
_DEFAULT_SETUP_SECTORS: Final = 4


@dataclass(frozen=True, slots=True)
class BzImage:
    """A checked bzImage. Fields are named as in the setup header."""

    data: bytes
    version: int
    setup_header: bytes
    """From HEADER_START; as long as this protocol's version has it."""
    setup_size: int
    """Bytes before the protected-mode part."""
    protected_size: int
    initrd_addr_max: int
    kernel_alignment: int
    cmdline_size: int
    payload_offset: int
    payload_length: int
    pref_address: int
    init_size: int

    @property
    def five_levels(self) -> bool:
        flags = int.from_bytes(self.data[0x236:0x238], "little")
        return flags & XLF_5LEVEL == XLF_5LEVEL

    @property
    def protected(self) -> memoryview:
        """The protected-mode part: code that unpacks the kernel, with the kernel packed inside it."""
        return memoryview(self.data)[self.setup_size : self.setup_size + self.protected_size]

    @property
    def payload(self) -> memoryview:
        """The packed kernel."""
        return self.protected[self.payload_offset : self.payload_offset + self.payload_length]


def is_bzimage(data: bytes) -> bool:
    """Tell whether this has a setup header, whatever else may be wrong with it."""
    return data[0x202:0x206] == b"HdrS"


def parse_bzimage(data: bytes, subject: str) -> BzImage:
    """Return the checked image; `subject` begins the UsageError's text where it cannot be used."""
    if len(data) < _HEADER_MIN:
        raise UsageError(f"{subject}: truncated: {len(data)} bytes do not even hold its header; get it anew")

    def field(offset: int, size: int) -> int:
        return int.from_bytes(data[offset : offset + size], "little")

    version = field(0x206, 2)
    if version < MIN_PROTOCOL:
        raise UsageError(
            f"{subject}: its boot protocol is {version >> 8}.{version & 0xFF:02}; "
            f"pyhyve needs 2.12 (Linux 3.8) or later"
        )
    if not field(0x236, 2) & XLF_KERNEL_64:
        raise UsageError(f"{subject}: a 32-bit (i386) kernel; pyhyve boots 64-bit (x86-64) kernels")

    header_end = min(0x202 + field(0x201, 1), len(data))
    setup_size = ((field(0x1F1, 1) or _DEFAULT_SETUP_SECTORS) + 1) * SECTOR
    protected_size = field(0x1F4, 4) * 16
    image = BzImage(
        data=data,
        version=version,
        setup_header=data[HEADER_START:header_end],
        setup_size=setup_size,
        protected_size=protected_size,
        initrd_addr_max=field(0x22C, 4),
        kernel_alignment=field(0x230, 4),
        cmdline_size=field(0x238, 4),
        payload_offset=field(0x248, 4),
        payload_length=field(0x24C, 4),
        pref_address=field(0x258, 8),
        init_size=field(0x260, 4),
    )
    # syssize counts paragraphs of 16 bytes; a file may end within the last one.
    if len(data) + 15 < setup_size + protected_size:
        raise UsageError(
            f"{subject}: truncated: it has {len(data)} of {setup_size + protected_size} bytes; get it anew"
        )
    if protected_size <= ENTRY_64 or image.payload_offset + image.payload_length > protected_size:
        raise UsageError(f"{subject}: damaged: its header places the kernel outside the file; get it anew")
    return image
