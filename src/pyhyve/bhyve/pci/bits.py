"""PCI's registers: offsets and bits of configuration space.

Source: PCI Local Bus Specification 3.0, "Configuration Space"; PCI Express Base Specification, "Configuration Space".
"""

from typing import Final

CONFIG_SIZE: Final = 256
EXPRESS_CONFIG_SIZE: Final = 4096

VENDOR_ID: Final = 0x00
DEVICE_ID: Final = 0x02
COMMAND: Final = 0x04
STATUS: Final = 0x06
REVISION_ID: Final = 0x08
CLASS_CODE: Final = 0x09
"""Three bytes: programming interface, subclass, base class."""
CACHE_LINE_SIZE: Final = 0x0C
LATENCY_TIMER: Final = 0x0D
HEADER_TYPE: Final = 0x0E
BAR0: Final = 0x10
BAR_COUNT: Final = 6
SUBSYSTEM_VENDOR_ID: Final = 0x2C
SUBSYSTEM_ID: Final = 0x2E
CAPABILITIES_POINTER: Final = 0x34
INTERRUPT_LINE: Final = 0x3C
INTERRUPT_PIN: Final = 0x3D
HEADER_END: Final = 0x40

COMMAND_IO: Final = 1 << 0
COMMAND_MEMORY: Final = 1 << 1
COMMAND_BUS_MASTER: Final = 1 << 2
COMMAND_PARITY: Final = 1 << 6
COMMAND_SERR: Final = 1 << 8
COMMAND_INTX_DISABLE: Final = 1 << 10
COMMAND_WRITABLE: Final = (
    COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE
)

STATUS_INTERRUPT: Final = 1 << 3
STATUS_CAPABILITIES: Final = 1 << 4
STATUS_WRITE_1_CLEAR: Final = 0xF900

HEADER_MULTI_FUNCTION: Final = 1 << 7

BAR_IO: Final = 1 << 0
BAR_MEM64: Final = 2 << 1
BAR_PREFETCHABLE: Final = 1 << 3
BAR_IO_FLAGS: Final = 0x3
BAR_MEM_FLAGS: Final = 0xF
BAR_IO_MIN: Final = 4
BAR_MEM_MIN: Final = 16

CAP_POWER_MANAGEMENT: Final = 0x01
CAP_MSI: Final = 0x05
CAP_VENDOR: Final = 0x09
CAP_EXPRESS: Final = 0x10
CAP_MSIX: Final = 0x11

CLASS_BRIDGE_HOST: Final = 0x060000

EXPRESS_VERSION: Final = 2
EXPRESS_ENDPOINT: Final = 0
EXPRESS_ROOT_PORT: Final = 4
EXPRESS_ROOT_COMPLEX_ENDPOINT: Final = 9

# Mechanism 1: the address register.
ADDRESS_ENABLE: Final = 1 << 31
ADDRESS_WRITABLE: Final = 0x80FF_FFFC

BUSES: Final = 256
SLOTS: Final = 32
FUNCTIONS: Final = 8
