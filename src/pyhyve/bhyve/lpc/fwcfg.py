"""QEMU's firmware configuration device: numbered items of bytes, read through a port or by DMA.

Source: QEMU docs/specs/fw_cfg, "QEMU Firmware Configuration (fw_cfg) Device".
"""

import struct
from collections.abc import Sequence
from typing import Final

from pyhyve.base.protocols import GuestMemory
from pyhyve.bhyve import layout

SIGNATURE: Final = 0x0000
ID: Final = 0x0001
RAM_SIZE: Final = 0x0003
NOGRAPHIC: Final = 0x0004
NB_CPUS: Final = 0x0005
MAX_CPUS: Final = 0x000F
FILE_DIR: Final = 0x0019
FILE_FIRST: Final = 0x0020
FILE_MAX: Final = 0x1000
"""Files have the items 0x20 to 0xFFF."""
NAME_MAX: Final = 55
"""Bytes of a file's name; a NUL follows."""
E820_FILE: Final = "etc/e820"

_TRADITIONAL: Final = 1 << 0
_DMA: Final = 1 << 1
_DMA_SIGNATURE: Final = int.from_bytes(b"QEMU CFG", "big")

_CONTROL_ERROR: Final = 1 << 0
_CONTROL_READ: Final = 1 << 1
_CONTROL_SKIP: Final = 1 << 2
_CONTROL_SELECT: Final = 1 << 3
_CONTROL_WRITE: Final = 1 << 4
_REQUEST: Final = struct.Struct(">IIQ")
_CHUNK: Final = layout.MIB


class FwCfg:
    """The items, and which byte of which of them is next. Handlers: `.selector` (2 ports), `.dma` (8 ports)."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._items: dict[int, bytes] = {
            SIGNATURE: b"QEMU",
            ID: struct.pack("<I", _TRADITIONAL | _DMA),
            FILE_DIR: struct.pack(">I", 0),
        }
        self._files: list[tuple[str, int, int]] = []
        self._item = b""
        self._offset = 0
        self.selector = _Selector(self)
        self.dma = _Dma(self)

    def add_item(self, key: int, data: bytes) -> None:
        self._items[key] = data

    def add_file(self, name: str, data: bytes) -> None:
        """Add a named file. ValueError if there is one of that name, or no room in the directory."""
        key = FILE_FIRST + len(self._files)
        if key >= FILE_MAX or any(name == other for other, _, _ in self._files):
            raise ValueError(f"{name}: there is such a file, or there are too many")
        self._files.append((name, key, len(data)))
        self._items[key] = data
        # The directory is sorted by name; the items keep their numbers.
        entries = b"".join(
            struct.pack(">IHH56s", size, key, 0, name.encode()) for name, key, size in sorted(self._files)
        )
        self._items[FILE_DIR] = struct.pack(">I", len(self._files)) + entries

    def select(self, key: int) -> None:
        self._item = self._items.get(key, b"")
        self._offset = 0

    def next_byte(self) -> int:
        """The selected item's next byte; 0 behind its end."""
        offset = self._offset
        if offset >= len(self._item):
            return 0
        self._offset = offset + 1
        return self._item[offset]

    def run_dma(self, gpa: int) -> None:
        """Carry out the request at `gpa`. Its control word is 0 afterwards, or _CONTROL_ERROR."""
        try:
            control, length, address = _REQUEST.unpack(self._memory.read(gpa, _REQUEST.size))
        except IndexError:
            return
        if control & _CONTROL_SELECT:
            self.select(control >> 16)
        error = 0
        if control & _CONTROL_READ:
            error = self._copy(address, length)
        elif control & _CONTROL_WRITE:
            error = _CONTROL_ERROR  # no item may be written
        elif control & _CONTROL_SKIP:
            self._offset = min(self._offset + length, len(self._item))
        try:
            self._memory.write(gpa, struct.pack(">I", error))
        except IndexError:
            return

    def _copy(self, address: int, length: int) -> int:
        """Write `length` bytes of the item, and zeros behind its end, to guest memory."""
        data = memoryview(self._item)[self._offset : self._offset + length]
        self._offset += len(data)
        zeros = bytes(min(_CHUNK, length - len(data)))
        try:
            self._memory.write(address, bytes(data))
            done = len(data)
            while done < length:
                step = min(_CHUNK, length - done)
                self._memory.write(address + done, zeros[:step])
                done += step
        except IndexError:
            return _CONTROL_ERROR
        return 0


class _Selector:
    """Port 0x510 takes the item's number, port 0x511 gives its bytes."""

    def __init__(self, device: FwCfg) -> None:
        self._device = device

    def read(self, offset: int, size: int) -> int:
        return self._device.next_byte() if offset == 1 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 2:
            self._device.select(value)


class _Dma:
    """The request's address, 64 bits, big-endian; writing its lower half starts the request. Reads give a signature."""

    def __init__(self, device: FwCfg) -> None:
        self._device = device
        self._high = 0

    def read(self, offset: int, size: int) -> int:
        signature = _DMA_SIGNATURE.to_bytes(8, "big")
        return int.from_bytes(signature[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4:
            return
        half = int.from_bytes(value.to_bytes(4, "little"), "big")
        if offset == 0:
            self._high = half
        elif offset == 4:
            gpa = self._high << 32 | half
            self._high = 0
            self._device.run_dma(gpa)


def add_standard(device: FwCfg, cpus: int, memory: int, ranges: Sequence[layout.MemoryRange]) -> None:
    """Add what every machine tells: `cpus` processors, `memory` bytes of RAM, and the memory map as a file."""
    device.add_item(NB_CPUS, struct.pack("<H", cpus))
    device.add_item(MAX_CPUS, struct.pack("<H", cpus))
    device.add_item(RAM_SIZE, struct.pack("<Q", memory))
    device.add_item(NOGRAPHIC, struct.pack("<H", 1))
    device.add_file(E820_FILE, b"".join(struct.pack("<QQI", *entry) for entry in ranges))
