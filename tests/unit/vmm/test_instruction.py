"""Emulated instructions: results, addresses, faults."""

import pytest
from fake_processor import FakeVcpu

from pyhyve.base.errors import GuestFault
from pyhyve.cpu.processor import Segment
from pyhyve.vmm.instruction import InstructionEmulator

CODE = 0x1000
DEVICE = 0x1000_0000
CF, PF, AF, ZF, SF, DF, OF = 1, 4, 0x10, 0x40, 0x80, 0x400, 0x800


class Ram:
    """64 KiB at 0; pages in `read_only` take no writes."""

    def __init__(self):
        self.data = bytearray(0x10000)
        self.read_only = set()

    def read(self, gpa, length):
        if gpa + length > len(self.data):
            raise IndexError(gpa)
        return bytes(self.data[gpa : gpa + length])

    def write(self, gpa, data):
        if gpa + len(data) > len(self.data) or gpa >> 12 in self.read_only:
            raise IndexError(gpa)
        self.data[gpa : gpa + len(data)] = data


class Devices:
    """Device memory from DEVICE on, 8 KiB, and every port; all accesses are recorded."""

    def __init__(self):
        self.data = bytearray(range(256)) * 32
        self.log = []
        self.port_value = 0

    def is_device(self, gpa):
        return DEVICE <= gpa < DEVICE + len(self.data)

    def read_device(self, gpa, size):
        self.log.append(("read", gpa, size))
        if not self.is_device(gpa):
            return (1 << 8 * size) - 1
        return int.from_bytes(self.data[gpa - DEVICE :][:size], "little")

    def write_device(self, gpa, size, value):
        self.log.append(("write", gpa, size, value))
        if self.is_device(gpa):
            self.data[gpa - DEVICE : gpa - DEVICE + size] = value.to_bytes(size, "little")

    def read_port(self, port, size):
        self.port_value += 1
        self.log.append(("in", port, size))
        return self.port_value

    def write_port(self, port, size, value):
        self.log.append(("out", port, size, value))


class _OneVcpu:
    def __init__(self, backend):
        self.backend = backend


class Bench:
    """A vCPU in 64-bit mode with RAM and a device; `step` emulates one instruction."""

    def __init__(self):
        self.cpu = FakeVcpu(0, None)
        self.ram = Ram()
        self.devices = Devices()
        self.emulator = InstructionEmulator(_OneVcpu(self.cpu), self.ram, self.devices)
        self.cpu.set("efer", 1 << 10)
        self.cpu.set_segment("cs", Segment(8, 0, 0xFFFFFFFF, 0xA09B))
        for name in ("es", "ss", "ds"):
            self.cpu.set_segment(name, Segment(16, 0, 0xFFFFFFFF, 0xC093))
        self.cpu.set("rdi", DEVICE)
        self.cpu.set("rsp", 0x8000)

    def legacy(self, bits, **bases):
        self.cpu.set("efer", 0)
        self.cpu.set_segment("cs", Segment(8, 0, 0xFFFFFFFF, 0xC09B if bits == 32 else 0x9B))
        for name in ("es", "ss", "ds", "fs", "gs"):
            attributes = 0xC093 if bits == 32 else 0x93
            self.cpu.set_segment(name, Segment(16, bases.get(name, 0), 0xFFFFFFFF, attributes))

    def step(self, code, at=CODE):
        raw = bytes.fromhex(code)
        self.ram.data[at : at + len(raw)] = raw
        self.cpu.set("rip", at)
        self.emulator.emulate()
        return self.cpu.get("rip") - at

    @property
    def accesses(self):
        return self.devices.log

    def fault(self, code, at=CODE):
        before = (list(self.cpu.gprs), dict(self.cpu.registers) | {"rip": at}, bytes(self.devices.data))
        with pytest.raises(GuestFault) as caught:
            self.step(code, at)
        after = (list(self.cpu.gprs), dict(self.cpu.registers), bytes(self.devices.data))
        assert before == after, "a fault leaves the instruction undone"
        return caught.value.vector, caught.value.error, caught.value.addr


@pytest.fixture
def bench():
    return Bench()


@pytest.mark.seed("S25")
@pytest.mark.parametrize(
    ("code", "access"),
    [
        ("8807", ("write", DEVICE, 1, 0x88)),  # mov [rdi], al
        ("668907", ("write", DEVICE, 2, 0x7788)),
        ("8907", ("write", DEVICE, 4, 0x55667788)),
        ("488907", ("write", DEVICE, 8, 0x1122334455667788)),
        ("8867f0", ("write", DEVICE - 0x10, 1, 0x77)),  # mov [rdi-16], ah
        ("c60780", ("write", DEVICE, 1, 0x80)),
        ("48c74708ffffffff", ("write", DEVICE + 8, 8, 0xFFFFFFFFFFFFFFFF)),
        ("89448f10", ("write", DEVICE + 0x10 + 4 * 3, 4, 0x55667788)),  # mov [rdi+rcx*4+16], eax
        ("67894710", ("write", DEVICE + 0x10, 4, 0x55667788)),  # mov [edi+16], eax
        ("a300000010 00000000", ("write", DEVICE, 4, 0x55667788)),  # movabs [0x10000000], eax
        ("890425 04000010", ("write", DEVICE + 4, 4, 0x55667788)),
        ("8905 faffff0f", ("write", DEVICE + 0x1000, 4, 0x55667788)),  # mov [rip+…], eax
        ("480fc307", ("write", DEVICE, 8, 0x1122334455667788)),  # movnti
        ("0f38f107", ("write", DEVICE, 4, 0x88776655)),  # movbe
    ],
)
def test_stores_by_every_addressing_mode(bench, code, access):
    bench.cpu.set("rax", 0x1122334455667788)
    bench.cpu.set("rcx", 3)
    assert bench.step(code) == len(bytes.fromhex(code))
    assert bench.accesses == [access]


@pytest.mark.seed("S25")
@pytest.mark.parametrize(
    ("code", "rax"),
    [
        ("8a4780", 0xAAAAAAAA_AAAAAA80),  # mov al, [rdi-128]: the rest stays
        ("8a6780", 0xAAAAAAAA_AAAA80AA),  # mov ah, …
        ("668b4780", 0xAAAAAAAA_AAAA8180),
        ("8b4780", 0x83828180),  # 32 bits clear the upper half
        ("488b4780", 0x8786858483828180),
        ("0fb64780", 0x80),  # movzx eax, byte
        ("660fbe4780", 0xAAAAAAAA_AAAAFF80),  # movsx ax, byte
        ("0fbf4780", 0xFFFF8180),  # movsx eax, word
        ("480fbf4780", 0xFFFFFFFF_FFFF8180),
        ("48634780", 0xFFFFFFFF_83828180),  # movsxd
        ("0f38f04780", 0x80818283),
    ],
)
def test_loads_fill_the_register_as_the_width_says(bench, code, rax):
    bench.cpu.set("rdi", DEVICE + 0x100)
    bench.cpu.set("rax", 0xAAAAAAAA_AAAAAAAA)
    bench.step(code)
    assert bench.cpu.get("rax") == rax


@pytest.mark.seed("S25")
@pytest.mark.parametrize(
    ("code", "value", "flags"),
    [
        ("0107", 0x4040403F, CF | PF),  # add [rdi], eax
        ("2907", 0x40404041, CF | AF | PF),
        ("2107", 0x40404040, 0),
        ("0907", 0xFFFFFFFF, SF | PF),
        ("3107", 0xBFBFBFBF, SF),
        ("ff07", 0x40404041, PF),  # inc
        ("ff0f", 0x4040403F, AF | PF),  # dec
        ("f71f", 0xBFBFBFC0, CF | SF | PF),  # neg
        ("f717", 0xBFBFBFBF, None),  # not: flags stay
        ("0fba3f05", 0x40404060, 0),  # btc [rdi], 5
        ("0faf00", None, None),
    ],
)
def test_read_modify_write(bench, code, value, flags):
    if value is None:
        assert bench.fault(code)[0] == 6, "an instruction that is not emulated is undefined"
        return
    bench.cpu.set("rax", 0xFFFFFFFF)
    bench.devices.data[0:4] = b"\x40" * 4
    bench.cpu.set("rflags", 2)
    bench.step(code)
    assert bench.accesses == [("read", DEVICE, 4), ("write", DEVICE, 4, value)]
    known = CF | ZF | SF | PF | OF | (AF if code in ("0107", "2907", "ff07", "ff0f", "f71f") else 0)
    if code.startswith("0fba"):
        known = CF
    if flags is not None:
        assert bench.cpu.get("rflags") & known == flags & known
    else:
        assert bench.cpu.get("rflags") == 2


def test_compares_and_tests_only_read(bench):
    bench.devices.data[0:4] = bytes.fromhex("05000000")
    bench.step("833f05")  # cmp dword [rdi], 5
    assert bench.cpu.get("rflags") & ZF
    bench.step("f60704")  # test byte [rdi], 4
    assert not bench.cpu.get("rflags") & ZF
    bench.cpu.set("rax", 6)
    bench.step("3b07")  # cmp eax, [rdi]
    assert not bench.cpu.get("rflags") & (ZF | CF)
    assert [access[0] for access in bench.accesses] == ["read"] * 3


def test_bit_number_in_a_register_reaches_beyond_the_operand(bench):
    bench.cpu.set("rax", 100)
    bench.step("0fa307")  # bt [rdi], eax
    assert bench.accesses == [("read", DEVICE + 12, 4)]
    bench.cpu.set("rdi", DEVICE + 64)
    bench.cpu.set("rax", 0xFFFFFFFF)  # -1
    bench.step("0fab07")  # bts
    assert bench.accesses[-1][:3] == ("write", DEVICE + 60, 4)
    bench.step("0fba2f21")  # bts dword [rdi], 33: the number is taken modulo 32
    assert bench.accesses[-1][:3] == ("write", DEVICE + 64, 4)


def test_exchanges(bench):
    bench.devices.data[0:4] = bytes.fromhex("11000000")
    bench.cpu.set("rax", 0xFFFFFFFF_00000022)
    bench.step("8707")  # xchg [rdi], eax
    assert bench.cpu.get("rax") == 0x11
    assert bench.accesses[-1] == ("write", DEVICE, 4, 0x22)
    bench.cpu.set("rcx", 0x33)
    bench.cpu.set("rax", 0x22)
    bench.step("f00fb10f")  # lock cmpxchg [rdi], ecx: equal
    assert bench.accesses[-1] == ("write", DEVICE, 4, 0x33)
    assert bench.cpu.get("rflags") & ZF
    bench.step("f00fb10f")  # now it differs
    assert bench.cpu.get("rax") == 0x33
    assert not bench.cpu.get("rflags") & ZF
    bench.step("f00fc10f")  # lock xadd [rdi], ecx
    assert bench.accesses[-1] == ("write", DEVICE, 4, 0x66)
    assert bench.cpu.get("rcx") == 0x33


@pytest.mark.seed("S25")
def test_push_and_pop_with_either_side_in_the_device(bench):
    bench.devices.data[0:8] = bytes.fromhex("efbeadde00000000")
    bench.step("ff37")  # push qword [rdi]
    assert bench.cpu.get("rsp") == 0x7FF8
    assert bench.ram.read(0x7FF8, 4) == bytes.fromhex("efbeadde")
    bench.cpu.set("rdi", DEVICE + 16)
    bench.step("8f07")  # pop qword [rdi]
    assert bench.cpu.get("rsp") == 0x8000
    assert bench.accesses[-1] == ("write", DEVICE + 16, 8, 0xDEADBEEF)
    bench.cpu.set("rsp", DEVICE + 0x100)
    bench.cpu.set("rax", 7)
    bench.step("50")  # push rax, on a stack in the device
    assert bench.accesses[-1] == ("write", DEVICE + 0xF8, 8, 7)
    bench.step("5b")  # pop rbx
    assert bench.cpu.get("rbx") == 7
    bench.step("6a80")  # push -128: sign-extended
    assert bench.accesses[-1] == ("write", DEVICE + 0xF8, 8, (1 << 64) - 128)


def test_pop_uses_the_stack_pointer_after_it(bench):
    bench.cpu.set("rsp", 0x8000)
    bench.ram.write(0x8000, (DEVICE).to_bytes(8, "little"))
    bench.step("8f0424")  # pop [rsp]
    assert bench.ram.read(0x8008, 8) == DEVICE.to_bytes(8, "little")


@pytest.mark.seed("S25")
def test_strings_move_between_memory_and_device(bench):
    bench.ram.write(0x4000, bytes(range(64)))
    bench.cpu.set("rsi", 0x4000)
    bench.cpu.set("rcx", 8)
    bench.step("f3a5")  # rep movsd
    assert bytes(bench.devices.data[:32]) == bytes(range(32))
    assert (bench.cpu.get("rcx"), bench.cpu.get("rsi"), bench.cpu.get("rdi")) == (0, 0x4020, DEVICE + 32)
    assert len(bench.accesses) == 8
    bench.cpu.set("rax", 0xEE)
    bench.cpu.set("rcx", 3)
    bench.cpu.set("rflags", 2 | DF)
    bench.step("f3aa")  # rep stosb, downwards
    assert bench.cpu.get("rdi") == DEVICE + 29
    assert bytes(bench.devices.data[30:33]) == b"\xee" * 3
    bench.cpu.set("rflags", 2)
    bench.cpu.set("rsi", DEVICE + 30)
    bench.step("66ad")  # lodsw
    assert bench.cpu.get("rax") == 0xEEEE
    bench.cpu.set("rcx", 0)
    assert bench.step("f348a5") == 3, "nothing to do is done at once"


def test_comparing_strings_stop_where_they_differ(bench):
    bench.ram.write(0x4000, bytes((0, 1, 2, 9, 4)))
    bench.cpu.set("rsi", 0x4000)
    bench.cpu.set("rcx", 5)
    bench.step("f3a6")  # repe cmpsb
    assert (bench.cpu.get("rcx"), bench.cpu.get("rsi")) == (1, 0x4004)
    bench.cpu.set("rdi", DEVICE)
    bench.cpu.set("rcx", 100)
    bench.cpu.set("rax", 0x20)
    bench.step("f2ae")  # repne scasb
    assert bench.cpu.get("rdi") == DEVICE + 0x21
    assert bench.cpu.get("rflags") & ZF


def test_long_strings_come_back_for_the_rest(bench):
    bench.cpu.set("rcx", 3000)
    assert bench.step("f3aa") == 0
    assert bench.cpu.get("rcx") == 3000 - 1024
    assert bench.step("f3aa") == 0
    assert bench.step("f3aa") == 2
    assert bench.cpu.get("rcx") == 0


def test_port_strings(bench):
    bench.cpu.set("rdx", 0x1F0)
    bench.cpu.set("rdi", 0x4000)
    bench.cpu.set("rcx", 3)
    bench.step("f3666d")  # rep insw
    assert bench.ram.read(0x4000, 6) == bytes.fromhex("010002000300")
    bench.cpu.set("rsi", 0x4000)
    bench.step("6e")  # outsb
    assert bench.accesses[-1] == ("out", 0x1F0, 1, 1)


def test_operand_over_a_page_end_is_two_accesses(bench):
    bench.cpu.set("rdi", DEVICE + 0xFFE)
    bench.cpu.set("rax", 0x44332211)
    bench.step("8907")
    assert bench.accesses == [("write", DEVICE + 0xFFE, 2, 0x2211), ("write", DEVICE + 0x1000, 2, 0x4433)]
    bench.cpu.pages[(DEVICE >> 12) + 1] = 5  # the second page is RAM
    bench.step("8907")
    assert bench.ram.read(0x5000, 2) == bytes.fromhex("3344")


def test_write_to_read_only_memory_is_lost_in_open_bus(bench):
    bench.ram.read_only.add(6)
    bench.cpu.set("rdi", 0x6000)
    bench.step("c60755")
    assert bench.ram.read(0x6000, 1) == b"\0"
    bench.step("8a07")
    assert bench.cpu.get("rax") == 0


@pytest.mark.seed("S25")
def test_faults_are_hardwares(bench):
    bench.cpu.pages[(DEVICE >> 12) + 1] = None
    bench.cpu.set("rdi", DEVICE + 0x1000)
    assert bench.fault("8907") == (14, 2, DEVICE + 0x1000), "not present, a write"
    assert bench.fault("8b07") == (14, 0, DEVICE + 0x1000)
    bench.cpu.set("rdi", DEVICE + 0xFFE)
    assert bench.fault("8907") == (14, 2, DEVICE + 0x1000), "the second page; nothing of the first is written"
    bench.cpu.read_only.add(DEVICE >> 12)
    bench.cpu.set("rdi", DEVICE)
    bench.cpu.set_segment("ss", Segment(0x23, 0, 0xFFFFFFFF, 0xC0F3))
    assert bench.fault("8907") == (14, 7, DEVICE), "present, a write, from user mode"
    bench.cpu.set("rdi", 0x8000_0000_0000)
    assert bench.fault("8907") == (13, 0, 0), "not canonical"


def test_noncanonical_stack_is_a_stack_fault(bench):
    bench.cpu.set("rsp", 0x9000_0000_0000_0000)
    assert bench.fault("ff37")[:2] == (12, 0)


def test_instruction_over_a_page_end(bench):
    bench.cpu.set("rax", 9)
    assert bench.step("48894708", at=0x1FFE) == 4
    assert bench.accesses == [("write", DEVICE + 8, 8, 9)]
    bench.cpu.pages[2] = None
    assert bench.fault("48894708", at=0x1FFE) == (14, 0x10, 0x2000)


def test_fs_and_gs_bases_count_in_long_mode(bench):
    bench.cpu.set_segment("gs", Segment(0, 0x1000, 0, 0x10000))
    bench.cpu.set("rax", 1)
    bench.step("658907")
    assert bench.accesses == [("write", DEVICE + 0x1000, 4, 1)]


def test_segments_in_protected_mode(bench):
    bench.legacy(32, ds=0x1000, es=0x2000)
    bench.cpu.set("rax", 1)
    bench.step("8907")
    bench.step("268907")
    assert bench.accesses == [("write", DEVICE + 0x1000, 4, 1), ("write", DEVICE + 0x2000, 4, 1)]
    bench.cpu.set_segment("ds", Segment(16, 0, 0xFFF, 0x4093))
    assert bench.fault("8907")[:2] == (13, 0), "beyond the limit"
    bench.cpu.set_segment("ds", Segment(0, 0, 0, 0x10000))
    bench.cpu.set("rdi", 0)
    assert bench.fault("8907")[:2] == (13, 0), "an unusable segment"


def test_expand_down_segment(bench):
    bench.legacy(32)
    bench.cpu.set_segment("ds", Segment(16, DEVICE, 0x0FFF, 0x4097))
    bench.cpu.set("rdi", 0x1000)
    bench.step("8807")
    assert bench.accesses[0][1] == DEVICE + 0x1000
    bench.cpu.set("rdi", 0xFFF)
    assert bench.fault("8807")[:2] == (13, 0)


def test_sixteen_bit_addresses_wrap(bench):
    bench.legacy(16, ds=DEVICE)
    bench.cpu.set("rbx", 0xFFFF)
    bench.cpu.set("rsi", 3)
    bench.cpu.set("rax", 0x7F)
    bench.step("8800")  # mov [bx+si], al
    assert bench.accesses == [("write", DEVICE + 2, 1, 0x7F)]


def test_sixteen_bit_strings_keep_the_upper_halves(bench):
    bench.legacy(16, es=DEVICE)
    bench.cpu.set("rdi", 0xABCD_FFFF)
    bench.step("aa")  # stosb
    assert bench.cpu.get("rdi") == 0xABCD_0000


def test_code_that_cannot_be_decoded_is_undefined(bench):
    assert bench.fault("0fff")[0] == 6
    bench.cpu.set("rip", 0x20000)
    with pytest.raises(GuestFault) as caught:
        bench.emulator.emulate()
    assert caught.value.vector == 6
    assert bench.fault("0f7f07")[0] == 6  # movq [rdi], mm0
    assert bench.emulator.unknown["movq [rdi],mm0"] == 1


def test_decoding_is_kept_by_address_and_bytes(bench):
    bench.step("c60711")
    bench.step("c60711")
    bench.step("c60722")  # the same address, other bytes
    assert [access[3] for access in bench.accesses] == [0x11, 0x11, 0x22]
    assert len(bench.emulator._plans) == 2
