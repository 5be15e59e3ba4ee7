"""The host bridge, 00:00.0, as bhyve's: NetApp's ids, and a root port's capability, which tells a guest that this is
PCI Express and that message-signalled interrupts can be trusted."""

import struct
from typing import ClassVar, Final

from pyhyve.bhyve.pci import bits
from pyhyve.bhyve.pci.device import Capability, Identity, PciDevice

VENDOR_NETAPP: Final = 0x1275
DEVICE_HOST_BRIDGE: Final = 0x1275

_LINK_CAPABILITIES: Final = 0x411  # 2.5 GT/s, one lane, L0s
_LINK_STATUS: Final = 0x11
_EXPRESS_BODY_SIZE: Final = 0x3C - 2


def express_capability(port_type: int) -> Capability:
    """Return a version 2 PCI Express capability with a link of one lane (PCI Express Base Specification,
    "PCI Express Capability Structure")."""
    head = struct.pack(
        "<HIHHIHH",
        bits.EXPRESS_VERSION | port_type << 4,
        0,  # device capabilities
        0,  # device control
        0,  # device status
        _LINK_CAPABILITIES,
        0,  # link control
        _LINK_STATUS,
    )
    return Capability(bits.CAP_EXPRESS, head.ljust(_EXPRESS_BODY_SIZE, b"\0"))


class HostBridge(PciDevice):
    IDENTITY: ClassVar = Identity(VENDOR_NETAPP, DEVICE_HOST_BRIDGE, bits.CLASS_BRIDGE_HOST)
    CAPABILITIES: ClassVar = (express_capability(bits.EXPRESS_ROOT_PORT),)
