"""The firmware configuration device, as its driver sees it."""

import struct

import pytest

from pyhyve.bhyve import layout
from pyhyve.bhyve.lpc import fwcfg
from pyhyve.bhyve.lpc.fwcfg import FwCfg

REQUEST = 0x1000
READ, SKIP, SELECT, WRITE = 2, 4, 8, 16


class Ram:
    def __init__(self, size=0x10000):
        self.data = bytearray(size)

    def read(self, gpa, length):
        if gpa + length > len(self.data):
            raise IndexError(gpa)
        return bytes(self.data[gpa : gpa + length])

    def write(self, gpa, data):
        if gpa + len(data) > len(self.data):
            raise IndexError(gpa)
        self.data[gpa : gpa + len(data)] = data


@pytest.fixture
def ram():
    return Ram()


@pytest.fixture
def device(ram):
    made = FwCfg(ram)
    fwcfg.add_standard(made, 3, 64 << 20, layout.memory_map(64 << 20, 0))
    made.add_file("opt/b", b"second")
    made.add_file("opt/a", bytes(range(100)))
    return made


def item(device, key, size):
    device.selector.write(0, 2, key)
    return bytes(device.selector.read(1, 1) for _ in range(size))


def dma(device, ram, control, length, address):
    """Make a request and return its control word afterwards."""
    ram.write(REQUEST, struct.pack(">IIQ", control, length, address))
    device.dma.write(0, 4, 0)
    device.dma.write(4, 4, int.from_bytes(REQUEST.to_bytes(4, "big"), "little"))
    return int.from_bytes(ram.read(REQUEST, 4), "big")


def directory(device):
    count = int.from_bytes(item(device, fwcfg.FILE_DIR, 4), "big")
    data = item(device, fwcfg.FILE_DIR, 4 + 64 * count)[4:]
    entries = struct.iter_unpack(">IHH56s", data)
    return {name.rstrip(b"\0").decode(): (size, key) for size, key, _, name in entries}


def test_signature_and_identity(device):
    assert item(device, fwcfg.SIGNATURE, 6) == b"QEMU\0\0"
    assert item(device, fwcfg.ID, 4) == b"\3\0\0\0"
    assert int.from_bytes(item(device, fwcfg.NB_CPUS, 2), "little") == 3
    assert int.from_bytes(item(device, fwcfg.RAM_SIZE, 8), "little") == 64 << 20


def test_selecting_starts_from_the_first_byte_again(device):
    assert item(device, fwcfg.SIGNATURE, 2) == b"QE"
    assert item(device, fwcfg.SIGNATURE, 2) == b"QE"


def test_unknown_items_and_byte_selectors_give_zeros(device):
    assert item(device, 0x1234, 4) == bytes(4)
    item(device, fwcfg.SIGNATURE, 1)
    device.selector.write(0, 1, 5)
    assert device.selector.read(1, 1) == ord("E")


def test_directory_is_sorted_and_leads_to_the_files(device):
    files = directory(device)
    assert list(files) == ["etc/e820", "opt/a", "opt/b"]
    assert item(device, files["opt/b"][1], files["opt/b"][0]) == b"second"
    size, key = files["etc/e820"]
    assert [layout.MemoryRange(*entry) for entry in struct.iter_unpack("<QQI", item(device, key, size))] == list(
        layout.memory_map(64 << 20, 0)
    )


def test_a_name_is_taken_once(device):
    with pytest.raises(ValueError, match="opt/a"):
        device.add_file("opt/a", b"")


def test_dma_shows_its_signature(device):
    assert [device.dma.read(offset, 4).to_bytes(4, "little") for offset in (0, 4)] == [b"QEMU", b" CFG"]


def test_dma_reads_on_skips_and_pads_with_zeros(device, ram):
    key = directory(device)["opt/a"][1]
    assert dma(device, ram, key << 16 | SELECT | READ, 4, 0x2000) == 0
    assert dma(device, ram, SKIP, 90, 0) == 0
    assert dma(device, ram, READ, 10, 0x2004) == 0
    assert ram.read(0x2000, 14) == bytes((0, 1, 2, 3, *range(94, 100), 0, 0, 0, 0))


def test_dma_outside_memory_and_writes_fail(device, ram):
    assert dma(device, ram, SELECT | READ, 8, 0xFFFC) == 1
    assert dma(device, ram, READ, 1 << 31, 0) == 1
    assert dma(device, ram, SELECT | WRITE, 4, 0x2000) == 1


def test_dma_request_outside_memory_is_lost(device):
    device.dma.write(0, 4, 0xFFFF_FFFF)
    device.dma.write(4, 4, 0xFFFF_FFFF)
    device.dma.write(4, 2, 0x1234)
    device.dma.write(1, 4, 0x1234)
