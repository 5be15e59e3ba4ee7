"""Unpacking a bzImage's payload on the host.

The guest would do it too, but slower; and then its boot has one more program to get right. All of Linux's formats are
here: whatever packed it, the last 4 bytes of a payload are the unpacked size (a gzip stream ends so by itself; for the
others the kernel's build appends it: Linux Documentation/arch/x86/boot.rst, "payload_length").
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Final, Protocol

from pyhyve.base.errors import UsageError

MAX_UNPACKED: Final = 1 << 30
"""A payload that claims more is refused: the largest kernels unpack to a tenth of this."""

_MEMORY_LIMIT: Final = 1 << 28
"""What a decoder may need for its dictionary (the kernel's build uses up to 128 MiB)."""
_LZ4_LEGACY: Final = 0x184C2102
_LZ4_BLOCK: Final = 8 << 20
"""Every block of the legacy format unpacks to this, but the last (lz4_Frame_format.md, "Legacy frame")."""
_LZO_BLOCK_MAX: Final = 64 << 20


class _Damaged(Exception):
    """The packed data contradicts its format."""


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: memoryview, max_length: int, /) -> bytes: ...


def _whole(decoder: _Decoder, data: memoryview, size: int) -> bytes:
    """Unpack up to `size` + 1 bytes. The stream's end must come: its checksum is there."""
    output = decoder.decompress(data, size + 1)
    if len(output) <= size and not decoder.eof:
        raise _Damaged("it ends too early")
    return output


def _gzip(data: memoryview, size: int) -> bytes:
    return _whole(zlib.decompressobj(wbits=31), data, size)


def _bzip2(data: memoryview, size: int) -> bytes:
    return _whole(bz2.BZ2Decompressor(), data, size)


def _xz(data: memoryview, size: int) -> bytes:
    # The kernel's x86 branch filter is part of the stream's own description.
    return _whole(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_LIMIT), data, size)


def _lzma(data: memoryview, size: int) -> bytes:
    return _whole(lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_MEMORY_LIMIT), data, size)


def _zstd(data: memoryview, size: int) -> bytes:
    import zstandard

    try:
        with zstandard.ZstdDecompressor(max_window_size=_MEMORY_LIMIT).stream_reader(data) as stream:
            return stream.read(size + 1)
    except zstandard.ZstdError as error:
        raise _Damaged(str(error)) from None


def _lz4(data: memoryview, size: int) -> bytes:
    import lz4.block  # type: ignore[import-untyped]  # the package has no annotations; only this call is made

    output = bytearray()
    position = 4
    while position + 4 <= len(data) and len(output) <= size:
        length = int.from_bytes(data[position : position + 4], "little")
        position += 4
        if length == _LZ4_LEGACY:  # frames may follow each other
            continue
        if length > len(data) - position:
            break
        try:
            output += lz4.block.decompress(data[position : position + length], uncompressed_size=_LZ4_BLOCK)
        except lz4.block.LZ4BlockError as error:
            raise _Damaged(str(error)) from None
        position += length
    return bytes(output)


def _lzo(data: memoryview, size: int) -> bytes:
    """lzop's format: a header, then blocks with checksums, all numbers big-endian (lzop's format, version 0x0940)."""
    import lzallright

    stream = io.BytesIO(data)

    def number(length: int) -> int:
        return int.from_bytes(stream.read(length), "big")

    stream.seek(9)
    recent = number(2) >= 0x0940
    stream.seek(2 + (2 if recent else 0) + 1 + (1 if recent else 0), io.SEEK_CUR)  # versions, method, level
    flags = number(4)
    # filter, mode, time (with its high half), name, checksum of the header
    stream.seek((4 if flags & 0x800 else 0) + 4 + 4 + (4 if recent else 0), io.SEEK_CUR)
    stream.seek(number(1) + 4, io.SEEK_CUR)
    if flags & 0x40:
        stream.seek(number(4) + 4, io.SEEK_CUR)

    output = bytearray()
    while len(output) <= size and (unpacked := number(4)):
        packed = number(4)
        adler = number(4) if flags & 0x001 else None
        crc = number(4) if flags & 0x100 else None
        if packed < unpacked:
            stream.seek((4 if flags & 0x002 else 0) + (4 if flags & 0x200 else 0), io.SEEK_CUR)
        block = stream.read(packed)
        if packed > unpacked or unpacked > _LZO_BLOCK_MAX or len(block) < packed:
            raise _Damaged("a block exceeds its bounds")
        if packed < unpacked:
            try:
                block = lzallright.LZOCompressor.decompress(block, unpacked)
            except lzallright.LZOError:
                raise _Damaged("a block cannot be unpacked") from None
        if (adler is not None and zlib.adler32(block) != adler) or (crc is not None and zlib.crc32(block) != crc):
            raise _Damaged("a block's checksum differs")
        output += block
    return bytes(output)


_FORMATS: Final[tuple[tuple[bytes, str, Callable[[memoryview, int], bytes]], ...]] = (
    (b"\x1f\x8b", "gzip", _gzip),
    (b"\xfd7zXZ\0", "xz", _xz),
    (b"\x5d\0\0", "lzma", _lzma),
    (b"BZh", "bzip2", _bzip2),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
    (_LZ4_LEGACY.to_bytes(4, "little"), "lz4", _lz4),
    (b"\x89LZO", "lzo", _lzo),
)


def compression(data: bytes | memoryview) -> str | None:
    """Return the name of the format by which `data` is packed, None if it is none of Linux's."""
    start = bytes(data[:8])
    return next((name for magic, name, _ in _FORMATS if start.startswith(magic)), None)


def unpack(payload: memoryview, subject: str) -> bytes:
    """Return the unpacked kernel; `subject` begins the UsageError's text where that is impossible."""
    size = int.from_bytes(payload[-4:], "little")
    name = compression(payload)
    decoder = next((decoder for _, known, decoder in _FORMATS if known == name), None)
    if name is None or decoder is None:
        magic = bytes(payload[:4]).hex(" ")
        raise UsageError(
            f"{subject}: packed by an unknown method (it starts with {magic}); --kaslr lets it unpack itself"
        )
    if size > MAX_UNPACKED:
        raise UsageError(f"{subject}: damaged: it would unpack to {size} bytes; get it anew")
    packed = payload if name == "gzip" else payload[:-4]
    try:
        kernel = decoder(packed, size)
    except (_Damaged, OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise UsageError(f"{subject}: its {name} payload is damaged ({error}); get it anew") from None
    if len(kernel) != size:
        found = f"more than {size}" if len(kernel) > size else f"{len(kernel)} of {size}"
        raise UsageError(f"{subject}: its {name} payload is damaged (it unpacks to {found} bytes); get it anew")
    return kernel
