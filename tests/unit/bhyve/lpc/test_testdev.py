"""The test suites' device, and the options that make it and its neighbours."""

import pytest

from pyhyve.base.errors import UsageError
from pyhyve.base.fakes import FakePin
from pyhyve.bhyve.lpc.debugexit import DebugExit
from pyhyve.bhyve.lpc.options import (
    DebugExitOptions,
    FwCfgFile,
    FwCfgOptions,
    PcTestdevOptions,
    checked_file,
    lpc_help,
    parse_fwcfg_file,
    parse_lpc,
)
from pyhyve.bhyve.lpc.testdev import IrqLines, Register


def test_register_keeps_what_is_written():
    register = Register(4)
    register.write(0, 4, 0x44332211)
    register.write(1, 1, 0xAA)
    assert [register.read(0, 1), register.read(0, 2), register.read(0, 4)] == [0x11, 0xAA11, 0x4433AA11]
    register.write(3, 4, 0xDDCCBBEE)
    assert register.read(0, 4) == 0xEE33AA11, "behind its end is nothing"


def test_a_port_drives_its_line():
    pins = [FakePin(), FakePin()]
    lines = IrqLines(pins)
    lines.write(1, 1, 1)
    assert [pin.level for pin in pins] == [False, True]
    lines.write(1, 1, 0)
    assert not pins[1].level


def test_debug_exit_passes_the_number_on():
    got = []
    port = DebugExit(got.append)
    port.write(0, 4, 0x10)
    assert got == [0x10]
    assert port.read(0, 1) == 0xFF


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("isa-debug-exit", DebugExitOptions(0x501, 2)),
        ("isa-debug-exit,iobase=0xf4,iosize=4", DebugExitOptions(0xF4, 4)),
        ("isa-debug-exit,iobase=244", DebugExitOptions(0xF4, 2)),
        ("fwcfg,qemu", FwCfgOptions()),
        ("pc-testdev", PcTestdevOptions()),
    ],
)
def test_devices_as_people_write_them(text, device):
    assert parse_lpc(text) == device
    assert text.partition(",")[0] in lpc_help()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no such device; there are fwcfg, isa-debug-exit, pc-testdev"),
        ("com1,stdio", "no such device"),
        ("fwcfg", "write -l fwcfg,qemu"),
        ("fwcfg,bhyve", "'bhyve' is no option of fwcfg"),
        ("pc-testdev,x", "there are: none"),
        ("isa-debug-exit,iobase", "'iobase' is no option"),
        ("isa-debug-exit,iobase=0xg", "iobase is a number"),
        ("isa-debug-exit,iobase=1,iobase=2", "twice"),
        ("isa-debug-exit,iobase=0xffff", "iobase + iosize at most 0x10000"),
        ("isa-debug-exit,iosize=0", "iosize is 1 to 4"),
    ],
)
def test_what_is_no_device_is_one_line(text, complaint):
    with pytest.raises(UsageError) as caught:
        parse_lpc(text)
    assert str(caught.value).startswith(f"-l {text}: ")
    assert complaint in str(caught.value)


def test_files_as_people_write_them(tmp_path):
    path = tmp_path / "a,b=c"
    path.write_bytes(b"content")
    assert parse_fwcfg_file("opt/x,string=a,b=c") == FwCfgFile("opt/x", b"a,b=c")
    assert parse_fwcfg_file(f"opt/x,file={path}") == FwCfgFile("opt/x", b"content")
    assert checked_file("opt/x", b"\0") == FwCfgFile("opt/x", b"\0")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("opt/x", "write NAME,string=TEXT or NAME,file=PATH"),
        ("opt/x,text=y", "not a file"),
        (",string=y", "1 to 55 ASCII characters"),
        ("x" * 56 + ",string=y", "1 to 55 ASCII characters"),
        ("opt/ä,string=y", "1 to 55 ASCII characters"),
        ("etc/e820,string=", "has a file of this name"),
        ("opt/x,file=/nowhere", "/nowhere: no such file"),
    ],
)
def test_what_is_no_file_is_one_line(text, complaint):
    with pytest.raises(UsageError) as caught:
        parse_fwcfg_file(text)
    assert str(caught.value).startswith("-f ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
