"""Device operands that the monitor cannot emulate: private nested tables, and what goes to the device."""

import ctypes

import pytest
from iced_x86 import Decoder

from pyhyve.cpu import exits
from pyhyve.vmm.assist import Access, Assistant, Pages, memory_accesses

DEVICE = 0x1_2345_6000
PRESENT = 7


class Exit:
    gpa = 0
    qualification = 0


class Tables:
    """Nested page tables with one page of RAM beside the device's place, in the same table."""

    def __init__(self):
        self.pages = Pages(8)
        self.ram, self.ram_view = self.pages.take()
        table, view = self.pages.take()
        self._put(view, (DEVICE >> 12) + 1 & 511, self.ram)
        for level in (1, 2, 3):
            above, view = self.pages.take()
            self._put(view, DEVICE >> 12 + 9 * level & 511, table)
            table = above
        self.root = table

    @staticmethod
    def _put(view, index, address):
        view[8 * index : 8 * index + 8] = (address | PRESENT).to_bytes(8, "little")


def walk(eptp, gpa):
    """The host address of a page, as the processor finds it; None if it is not there."""
    table = eptp & ~0xFFF
    for level in (3, 2, 1, 0):
        entry = ctypes.c_uint64.from_address(table + 8 * (gpa >> 12 + 9 * level & 511)).value
        if not entry & PRESENT:
            return None
        table = entry & 0x000F_FFFF_FFFF_F000
    return table


class Processor:
    """Runs `instruction(eptp)` as its one instruction; before that, it makes these exits."""

    def __init__(self, tables, instruction, *exits_before):
        self.eptp = tables.root | 0x5E
        self.instruction = instruction
        self.before = list(exits_before)
        self.exit = Exit()

    def step(self, eptp):
        assert eptp & 0xFFF == 0x5E
        if self.before:
            self.exit.gpa, reason = self.before.pop(0)
            return reason
        self.instruction(eptp)
        return exits.MONITOR_TRAP


class Device:
    def __init__(self):
        self.log = []

    def is_device(self, gpa):
        return gpa >> 12 == DEVICE >> 12

    def read_device(self, gpa, size):
        self.log.append(("read", gpa - DEVICE, size))
        return 0x1122_3344_5566_7788 & (1 << 8 * size) - 1

    def write_device(self, gpa, size, value):
        self.log.append(("write", gpa - DEVICE, size, value))


def assist(processor, device, accesses, *, done=True, resident=True):
    assistant = Assistant(processor, device, lambda gpa, access: resident)
    return assistant.run(accesses, processor.exit, lambda: done)


def test_instruction_finds_the_devices_bytes_and_its_own_memory():
    tables, device = Tables(), Device()
    seen = []

    def instruction(eptp):
        seen.append(ctypes.string_at(walk(eptp, DEVICE) + 8, 16))
        seen.append(walk(eptp, DEVICE + 0x1000))
        seen.append(walk(eptp, DEVICE + 0x40_0000))

    assert assist(Processor(tables, instruction), device, [Access(DEVICE + 8, 16, True, False)])
    assert seen == [bytes.fromhex("8877665544332211") * 2, tables.ram, None]
    assert device.log == [("read", 8, 8), ("read", 16, 8)]
    assert walk(tables.root, DEVICE) is None, "the VM's own tables are as they were"


def test_what_is_stored_goes_to_the_device_in_aligned_pieces():
    device = Device()

    def instruction(eptp):
        ctypes.memmove(walk(eptp, DEVICE) + 3, bytes(range(10)), 10)

    assert assist(Processor(Tables(), instruction), device, [Access(DEVICE + 3, 10, False, True)])
    assert device.log == [
        ("write", 3, 1, 0),
        ("write", 4, 4, 0x04030201),
        ("write", 8, 4, 0x08070605),
        ("write", 12, 1, 9),
    ]


def test_fault_of_the_instruction_writes_nothing():
    device = Device()
    processor = Processor(Tables(), lambda eptp: None)
    assert assist(processor, device, [Access(DEVICE, 4, False, True)], done=False)
    assert device.log == []


def test_memory_that_is_not_resident_is_made_so():
    done = []
    processor = Processor(Tables(), done.append, (0x1000, exits.EPT_VIOLATION), (0x2000, exits.EPT_VIOLATION))
    assert assist(processor, Device(), [Access(DEVICE, 4, True, False)])
    assert len(done) == 1


@pytest.mark.parametrize("before", [(0x1000, exits.EPT_VIOLATION), (0, exits.TRIPLE_FAULT), (0, exits.CPUID)])
def test_other_exits_give_up(before):
    processor = Processor(Tables(), lambda eptp: None, before)
    assert not assist(processor, Device(), [Access(DEVICE, 4, True, True)], resident=False)


def test_an_operand_may_lie_in_as_many_pages_as_there_are_for_it():
    accesses = [Access(DEVICE + 0x1000 * n, 1, True, False) for n in range(5)]
    assert assist(Processor(Tables(), lambda eptp: None), Device(), accesses[:4])
    assert not assist(Processor(Tables(), lambda eptp: None), Device(), accesses)


@pytest.mark.parametrize(
    ("code", "bits", "expected"),
    [
        ("0f1045 0a", 64, [("ss", 0x55A, 16, True, False)]),
        ("0f2944 3db0", 64, [("ss", 0x520, 16, False, True)]),
        ("660f6f05 00010000", 64, [("ds", 0x1108, 16, True, False)]),
        ("ff742408", 64, [("ss", 0x448, 8, True, False), ("ss", 0x438, 8, False, True)]),
        ("67f30f6f00", 64, [("ds", 0x4000_0000, 16, True, False)]),
        ("64dd00", 64, [("fs", 0x1_4000_0000, 8, True, False)]),
        ("0fb110", 64, [("ds", 0x1_4000_0000, 4, True, True)]),
        ("c4e27192 0490", 64, None),
        ("0fae20", 64, None),
    ],
)
def test_accesses_of_instructions(code, bits, expected):
    """RAX has 4 GiB more than a 32-bit address can; RSP is 0x440, RBP 0x550, RDI 0x20."""
    gprs = {0: 0x1_4000_0000, 4: 0x440, 5: 0x550, 7: 0x20}
    instruction = Decoder(bits, bytes.fromhex(code), ip=0x1000).decode()
    found = memory_accesses(
        instruction, lambda index: gprs.get(index, 0), lambda segment, offset, size: (segment, offset)
    )
    flat = None if found is None else [(*at, size, reads, writes) for at, size, reads, writes in found]
    assert flat == expected
