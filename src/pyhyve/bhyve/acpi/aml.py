"""A small ACPI machine language builder: each function returns the bytes of one term.

```python
device("COM1", name("_HID", eisa_id("PNP0501")), name("_CRS", resources(io(0x3F8, 8), irq(4))))
```
Source: ACPI 6.5, "ACPI Machine Language (AML) Specification" and "Resource Data Types for ACPI".
"""

import re
import struct
from typing import Final

ZERO: Final = b"\x00"
ONE: Final = b"\x01"
ARG0: Final = b"\x68"

_SEGMENT: Final = re.compile("[A-Z_][A-Z0-9_]{0,3}")

_NAME: Final = b"\x08"
_SCOPE: Final = b"\x10"
_BUFFER: Final = b"\x11"
_PACKAGE: Final = b"\x12"
_METHOD: Final = b"\x14"
_DUAL_NAME: Final = b"\x2e"
_MULTI_NAME: Final = b"\x2f"
_DEVICE: Final = b"\x5b\x82"
_STORE: Final = b"\x70"
_IF: Final = b"\xa0"
_RETURN: Final = b"\xa4"

# --- Names and data ----------------------------------------------------------------------------------------------


def path(text: str) -> bytes:
    """Encode a name such as "_CRS" or "\\\\_SB.PCI0". Raise ValueError for what is no name."""
    root = b"\\" if text.startswith("\\") else b""
    segments = text[len(root) :].split(".")
    encoded = []
    for segment in segments:
        if not _SEGMENT.fullmatch(segment):
            raise ValueError(f"{segment!r} in {text!r} is no ACPI name segment")
        encoded.append(segment.ljust(4, "_").encode("ascii"))
    if len(encoded) == 1:
        return root + encoded[0]
    if len(encoded) == 2:
        return root + _DUAL_NAME + b"".join(encoded)
    return root + _MULTI_NAME + bytes((len(encoded),)) + b"".join(encoded)


def integer(value: int) -> bytes:
    """Encode 0 <= value < 2**64 in its shortest form."""
    if value == 0:
        return ZERO
    if value == 1:
        return ONE
    if value < 1 << 8:
        return struct.pack("<BB", 0x0A, value)
    if value < 1 << 16:
        return struct.pack("<BH", 0x0B, value)
    if value < 1 << 32:
        return struct.pack("<BI", 0x0C, value)
    return struct.pack("<BQ", 0x0E, value)


def string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """Encode an id such as "PNP0A08": three letters of five bits, four hexadecimal digits, big-endian."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    if len(text) != 7 or not all(0 < letter < 27 for letter in letters):
        raise ValueError(f"{text!r} is no EISA id")
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return integer(int.from_bytes(value.to_bytes(4, "big"), "little"))


def buffer(data: bytes) -> bytes:
    return _BUFFER + _sized(integer(len(data)) + data)


def package(*elements: bytes) -> bytes:
    if len(elements) > 255:
        raise ValueError(f"a package of {len(elements)} elements: at most 255")
    return _PACKAGE + _sized(bytes((len(elements),)) + b"".join(elements))


def _sized(body: bytes) -> bytes:
    """Put the package length, which counts itself, before `body`."""
    if len(body) + 1 < 1 << 6:
        return bytes((len(body) + 1,)) + body
    for extra in (1, 2, 3):
        length = len(body) + 1 + extra
        if length < 1 << 4 + 8 * extra:
            return bytes((extra << 6 | length & 0xF,)) + (length >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"{len(body)} bytes do not fit an AML package")


# --- Terms -------------------------------------------------------------------------------------------------------


def name(at: str, value: bytes) -> bytes:
    return _NAME + path(at) + value


def scope(at: str, *terms: bytes) -> bytes:
    return _SCOPE + _sized(path(at) + b"".join(terms))


def device(at: str, *terms: bytes) -> bytes:
    return _DEVICE + _sized(path(at) + b"".join(terms))


def method(at: str, arguments: int, *terms: bytes) -> bytes:
    """A method of 0-7 arguments, not serialized."""
    return _METHOD + _sized(path(at) + bytes((arguments,)) + b"".join(terms))


def store(source: bytes, target: str) -> bytes:
    return _STORE + source + path(target)


def if_(predicate: bytes, *terms: bytes) -> bytes:
    return _IF + _sized(predicate + b"".join(terms))


def return_(value: bytes) -> bytes:
    return _RETURN + value


# --- Resources ---------------------------------------------------------------------------------------------------

_FIXED: Final = 0x0C  # minimum and maximum are fixed; the bridge produces the range
_MEMORY: Final = 0
_IO: Final = 1
_BUS: Final = 2
_ENTIRE_RANGE: Final = 3
_READ_WRITE: Final = 1
_CACHEABLE: Final = 1 << 1


def resources(*descriptors: bytes) -> bytes:
    """Return a resource template; the end tag's checksum of zero means none."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(port: int, length: int) -> bytes:
    """A fixed range of 16-bit decoded I/O ports."""
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 0, length)


def irq(line: int) -> bytes:
    """An ISA interrupt: edge, active high, exclusive."""
    return struct.pack("<BH", 0x22, 1 << line)


def memory32(base: int, length: int) -> bytes:
    """A fixed range of writable memory below 4 GiB."""
    return struct.pack("<BHBII", 0x86, 9, _READ_WRITE, base, length)


def bus_window(first: int, last: int) -> bytes:
    """Bus numbers that a bridge passes on, both included."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, _BUS, _FIXED, 0, 0, first, last, 0, last - first + 1)


def io_window(first: int, last: int) -> bytes:
    """I/O ports that a bridge passes on, both included."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, _IO, _FIXED, _ENTIRE_RANGE, 0, first, last, 0, last - first + 1)


def memory_window32(base: int, limit: int) -> bytes:
    """Memory below 4 GiB that a bridge passes on: base <= address < limit."""
    return struct.pack("<BHBBBIIIII", 0x87, 23, _MEMORY, _FIXED, _READ_WRITE, 0, base, limit - 1, 0, limit - base)


def memory_window64(base: int, limit: int) -> bytes:
    """Memory anywhere that a bridge passes on: base <= address < limit."""
    flags = _READ_WRITE | _CACHEABLE
    return struct.pack("<BHBBBQQQQQ", 0x8A, 43, _MEMORY, _FIXED, flags, 0, base, limit - 1, 0, limit - base)
