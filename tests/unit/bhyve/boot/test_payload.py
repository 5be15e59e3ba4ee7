"""Every way in which Linux packs its kernel can be unpacked, and damage is one line."""

import bz2
import contextlib
import gzip
import lzma
import struct
import subprocess
from collections.abc import Callable

import lz4.block
import pytest
import zstandard
from boot_images import make_elf
from hypothesis import given, settings
from hypothesis import strategies as st

from pyhyve.base.errors import UsageError
from pyhyve.bhyve.boot import payload
from pyhyve.bhyve.boot.guestimage import GuestImage

# Code-like bytes that do compress, over several of lzo's 256 KiB blocks.
KERNEL = make_elf(
    [(0x100_0000, b"".join(struct.pack("<BI", 0xE8, n * 977 % 65536) for n in range(150_000)), 0x20_0000)]
)


def sized(packed: bytes) -> bytes:
    return packed + struct.pack("<I", len(KERNEL))


def pack_xz(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 32 << 20}]
    return lzma.compress(data, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)


def pack_zstd(data: bytes) -> bytes:
    # As the kernel's build pipes it: no size in the frame's header, the largest window.
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


def pack_lz4(data: bytes) -> bytes:
    packed = struct.pack("<I", 0x184C2102)
    for start in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[start : start + (8 << 20)], mode="high_compression", store_size=False)
        packed += struct.pack("<I", len(block)) + block
    return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 9, mtime=0),
    "xz": lambda data: sized(pack_xz(data)),
    "lzma": lambda data: sized(lzma.compress(data, lzma.FORMAT_ALONE)),
    "bzip2": lambda data: sized(bz2.compress(data)),
    "zstd": lambda data: sized(pack_zstd(data)),
    "lz4": lambda data: sized(pack_lz4(data)),
}
PACKED = {name: packer(KERNEL) for name, packer in PACKERS.items()}


@pytest.mark.parametrize("name", PACKED)
def test_payload_unpacks_to_the_kernel(name: str) -> None:
    packed = memoryview(PACKED[name])
    assert payload.compression(packed) == name
    assert payload.unpack(packed, "kernel k") == KERNEL


def test_lz4_payload_of_several_blocks_unpacks() -> None:
    data = bytes(9 << 20) + KERNEL
    packed = pack_lz4(data) + struct.pack("<I", len(data))
    assert payload.unpack(memoryview(packed), "kernel k") == data


@pytest.mark.parametrize("incompressible", [False, True])
def test_lzo_payload_unpacks(guest_image: GuestImage, incompressible: bool) -> None:
    data = zstandard.compress(KERNEL) if incompressible else KERNEL
    packed = subprocess.run([guest_image.busybox, "lzop", "-c"], input=data, capture_output=True, check=True).stdout
    assert payload.unpack(memoryview(packed + struct.pack("<I", len(data))), "kernel k") == data


@pytest.mark.parametrize("name", PACKED)
def test_truncated_payload_is_one_line(name: str) -> None:
    packed = PACKED[name]
    for kept in (8, len(packed) // 2, len(packed) - 9):
        with pytest.raises(UsageError, match=rf"^kernel k: its {name} payload is damaged \([^\n]+\); get it anew$"):
            payload.unpack(memoryview(packed[:kept] + struct.pack("<I", len(KERNEL))), "kernel k")


@pytest.mark.parametrize("name", [name for name in PACKED if name != "gzip"])
def test_payload_larger_than_its_size_says_is_damaged(name: str) -> None:
    with pytest.raises(UsageError, match="more than 1000 bytes"):
        payload.unpack(memoryview(PACKED[name][:-4] + struct.pack("<I", 1000)), "kernel k")


def test_payload_that_claims_gigabytes_is_refused_before_unpacking() -> None:
    with pytest.raises(UsageError, match="4294967295 bytes"):
        payload.unpack(memoryview(PACKED["xz"][:-4] + b"\xff\xff\xff\xff"), "kernel k")


def test_unknown_packer_names_its_first_bytes() -> None:
    with pytest.raises(UsageError, match="12 34 56 78"):
        payload.unpack(memoryview(bytes.fromhex("12345678") + bytes(100)), "kernel k")


@pytest.fixture(scope="module")
def small(guest_image: GuestImage) -> dict[str, bytes]:
    data = KERNEL[:3000]
    packed = {name: packer(data) for name, packer in PACKERS.items()}
    lzo = subprocess.run([guest_image.busybox, "lzop", "-c"], input=data, capture_output=True, check=True).stdout
    packed["lzo"] = lzo + bytes(4)
    return {name: whole[:-4] + struct.pack("<I", len(data)) for name, whole in packed.items()}


@given(choice=st.data())
@settings(max_examples=300, deadline=None)
def test_any_damage_gives_the_kernel_or_a_usage_error(small: dict[str, bytes], choice: st.DataObject) -> None:
    name = choice.draw(st.sampled_from(sorted(small)))
    damaged = bytearray(small[name])
    for position, value in choice.draw(
        st.lists(st.tuples(st.integers(0, len(damaged) - 5), st.integers(0, 255)), min_size=1, max_size=8)
    ):
        damaged[position] = value
    with contextlib.suppress(UsageError):
        assert len(payload.unpack(memoryview(damaged), "kernel k")) == 3000
