"""What a PCI device declares: identity, BARs, capabilities. The base class makes a configuration space of it.

```python
class Rng(PciDevice):
    IDENTITY = Identity(0x1AF4, 0x1005, class_code=0x00FF00)
    BARS = {0: Bar(32, BarKind.IO)}
```
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

from pyhyve.base.protocols import IoHandler
from pyhyve.bhyve.pci import bits
from pyhyve.bhyve.pci.cfgspace import ConfigSpace


@dataclass(frozen=True, slots=True)
class Identity:
    """What a driver is chosen by. `class_code` is base class, subclass, interface: 24 bits."""

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


class BarKind(enum.Enum):
    IO = "I/O ports"
    MEM32 = "32-bit memory"
    MEM64 = "64-bit memory"


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register. `size` is a power of two: bytes, at least 4 of I/O or 16 of memory."""

    size: int
    kind: BarKind
    prefetchable: bool = False

    def __post_init__(self) -> None:
        least = bits.BAR_IO_MIN if self.kind is BarKind.IO else bits.BAR_MEM_MIN
        if self.size < least or self.size & self.size - 1:
            raise ValueError(f"a BAR of {self.size} bytes: need a power of two, at least {least}")

    @property
    def flags(self) -> int:
        """The read-only low bits."""
        if self.kind is BarKind.IO:
            return bits.BAR_IO
        memory = bits.BAR_MEM64 if self.kind is BarKind.MEM64 else 0
        return memory | (bits.BAR_PREFETCHABLE if self.prefetchable else 0)

    @property
    def slots(self) -> int:
        """How many of the six registers it takes."""
        return 2 if self.kind is BarKind.MEM64 else 1


@dataclass(frozen=True, slots=True)
class Capability:
    """An entry of the capability list: `body` follows the id and the link; `writable` masks it (absent: read-only)."""

    id: int
    body: bytes
    writable: bytes = b""


class BarSpace(Protocol):
    """Where decoded BARs appear: the machine's port and memory buses.

    A guest may put a BAR anywhere, also onto something else: that is to be refused in silence, not raised.
    """

    def map_bar(self, kind: BarKind, base: int, size: int, handler: IoHandler) -> None: ...

    def unmap_bar(self, kind: BarKind, base: int, size: int) -> None: ...


class _NoSpace:
    def map_bar(self, kind: BarKind, base: int, size: int, handler: IoHandler) -> None:
        pass

    def unmap_bar(self, kind: BarKind, base: int, size: int) -> None:
        pass


class _BarWindow:
    """A BAR as an IoHandler."""

    def __init__(self, device: "PciDevice", index: int) -> None:
        self._device = device
        self._index = index

    def read(self, offset: int, size: int) -> int:
        return self._device.bar_read(self._index, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.bar_write(self._index, offset, size, value)


class PciDevice:
    """One function with a type 0 header. A subclass declares; it answers `bar_read` and `bar_write` if it has BARs."""

    IDENTITY: ClassVar[Identity]
    BARS: ClassVar[Mapping[int, Bar]] = {}
    CAPABILITIES: ClassVar[Sequence[Capability]] = ()
    INTERRUPT_PIN: ClassVar[int] = 0
    """0 for none, 1-4 for INTA-INTD."""

    def __init__(self) -> None:
        self.rid: int | None = None
        """The requester id, from PciBus.add()."""
        self.multi_function = False
        self._space: BarSpace = _NoSpace()
        self._placed: dict[int, int] = {}
        self._windows = {index: _BarWindow(self, index) for index in self.BARS}
        self.config = self._build_config()

    def connect(self, rid: int, space: BarSpace | None = None) -> None:
        """Take a place on the bus: the requester id, and where BARs are to appear."""
        self.rid = rid
        if space is not None:
            self._space = space

    def reset(self) -> None:
        """Conventional reset: configuration space as declared, no BAR decoded."""
        self.config = self._build_config()
        self._update_decoding()

    # For subclasses

    def bar_read(self, index: int, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def bar_write(self, index: int, offset: int, size: int, value: int) -> None:
        pass

    def config_written(self, offset: int, size: int) -> None:
        """The guest has written configuration space (registers behind the header are the subclass's to follow)."""

    # Configuration space

    def read_config(self, offset: int, size: int) -> int:
        value = self.config.read(offset, size)
        if self.multi_function and offset <= bits.HEADER_TYPE < offset + size:
            value |= bits.HEADER_MULTI_FUNCTION << 8 * (bits.HEADER_TYPE - offset)
        return value

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.config.write(offset, size, value)
        if offset < bits.BAR0 + 4 * bits.BAR_COUNT and offset + size > bits.COMMAND:
            self._update_decoding()
        self.config_written(offset, size)

    def bar_base(self, index: int) -> int:
        """Return the address that BAR `index` holds, decoded or not."""
        bar = self.BARS[index]
        flags = bits.BAR_IO_FLAGS if bar.kind is BarKind.IO else bits.BAR_MEM_FLAGS
        return self.config.get(bits.BAR0 + 4 * index, 4 * bar.slots) & ~flags

    def set_bar(self, index: int, base: int) -> None:
        """Assign an address, as firmware does before the guest starts. Raise ValueError if it is not aligned."""
        bar = self.BARS[index]
        if base % bar.size:
            raise ValueError(f"BAR {index} at {base:#x} is not aligned to its {bar.size:#x} bytes")
        self.config.put(bits.BAR0 + 4 * index, 4 * bar.slots, base | bar.flags)
        self._update_decoding()

    @property
    def decoded(self) -> Mapping[int, int]:
        """Where BARs answer now: base by index."""
        return dict(self._placed)

    def _update_decoding(self) -> None:
        command = self.config.get(bits.COMMAND, 2)
        wanted = {}
        for index, bar in self.BARS.items():
            enable = bits.COMMAND_IO if bar.kind is BarKind.IO else bits.COMMAND_MEMORY
            if command & enable and (base := self.bar_base(index)):
                wanted[index] = base
        for index, base in list(self._placed.items()):
            if wanted.get(index) != base:
                self._space.unmap_bar(self.BARS[index].kind, base, self.BARS[index].size)
                del self._placed[index]
        for index, base in wanted.items():
            if index not in self._placed:
                self._placed[index] = base
                self._space.map_bar(self.BARS[index].kind, base, self.BARS[index].size, self._windows[index])

    def _build_config(self) -> ConfigSpace:
        express = any(capability.id == bits.CAP_EXPRESS for capability in self.CAPABILITIES)
        config = ConfigSpace(bits.EXPRESS_CONFIG_SIZE if express else bits.CONFIG_SIZE)
        identity = self.IDENTITY
        config.define(bits.VENDOR_ID, 2, identity.vendor)
        config.define(bits.DEVICE_ID, 2, identity.device)
        config.define(bits.COMMAND, 2, 0, writable=bits.COMMAND_WRITABLE)
        status = bits.STATUS_CAPABILITIES if self.CAPABILITIES else 0
        config.define(bits.STATUS, 2, status, clear=bits.STATUS_WRITE_1_CLEAR)
        config.define(bits.REVISION_ID, 1, identity.revision)
        config.define(bits.CLASS_CODE, 3, identity.class_code)
        config.define(bits.CACHE_LINE_SIZE, 1, 0, writable=0xFF)
        config.define(bits.LATENCY_TIMER, 1, 0, writable=0xFF)
        config.define(bits.SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor)
        config.define(bits.SUBSYSTEM_ID, 2, identity.subsystem)
        config.define(bits.INTERRUPT_LINE, 1, 0, writable=0xFF)
        config.define(bits.INTERRUPT_PIN, 1, self.INTERRUPT_PIN)
        taken: set[int] = set()
        for index, bar in self.BARS.items():
            places = set(range(index, index + bar.slots))
            if places & taken or not places <= set(range(bits.BAR_COUNT)):
                raise ValueError(f"{type(self).__name__}: BAR {index} overlaps another or does not exist")
            taken |= places
            size = 4 * bar.slots
            # I/O space has 64 Ki ports, but the register has 32 bits and is sized with all of them.
            writable = (1 << 8 * size) - bar.size
            config.define(bits.BAR0 + 4 * index, size, bar.flags, writable=writable)
        _define_capabilities(config, self.CAPABILITIES)
        return config


_CAPABILITY_ALIGN: Final = 4


def _define_capabilities(config: ConfigSpace, capabilities: Sequence[Capability]) -> None:
    """Chain the capabilities, in order, from the end of the header; ValueError if they do not fit 256 bytes."""
    link = bits.CAPABILITIES_POINTER
    offset = bits.HEADER_END
    for capability in capabilities:
        length = 2 + len(capability.body)
        if offset + length > bits.CONFIG_SIZE:
            raise ValueError("the capabilities do not fit configuration space")
        config.put(link, 1, offset)
        config.define(offset, 2, capability.id)
        config.define(
            offset + 2,
            len(capability.body),
            int.from_bytes(capability.body, "little"),
            writable=int.from_bytes(capability.writable, "little"),
        )
        link = offset + 1
        offset = -(-(offset + length) // _CAPABILITY_ALIGN) * _CAPABILITY_ALIGN
