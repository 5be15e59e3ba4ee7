"""The devices that `-l` names, and the files of `-f`: what users type, checked."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.bhyve.boot.files import read_file
from pyhyve.bhyve.layout import MIB
from pyhyve.bhyve.lpc.fwcfg import E820_FILE, NAME_MAX

_PORTS: Final = 1 << 16
_FILE_MAX: Final = 64 * MIB


@dataclass(frozen=True, slots=True)
class DebugExitOptions:
    """`-l isa-debug-exit`: `iosize` ports from `iobase` on end the run."""

    iobase: int = 0x501
    iosize: int = 2


@dataclass(frozen=True, slots=True)
class FwCfgOptions:
    """`-l fwcfg,qemu`"""


@dataclass(frozen=True, slots=True)
class PcTestdevOptions:
    """`-l pc-testdev`: the ports and the memory of `lpc.testdev`, and an exit port unless isa-debug-exit is named."""


LpcOptions = DebugExitOptions | FwCfgOptions | PcTestdevOptions


@dataclass(frozen=True, slots=True)
class FwCfgFile:
    """A file of the firmware configuration device."""

    name: str
    data: bytes


def _debug_exit(values: Mapping[str, str], text: str) -> DebugExitOptions:
    numbers = {name: _number(value, name, text) for name, value in values.items()}
    options = DebugExitOptions(**numbers)
    if not (0 < options.iosize <= 4 and options.iobase + options.iosize <= _PORTS):
        raise UsageError(f"-l {text}: iosize is 1 to 4, and iobase + iosize at most {_PORTS:#x}")
    return options


def _fwcfg(values: Mapping[str, str], text: str) -> FwCfgOptions:
    if "qemu" not in values:
        raise UsageError(f"-l {text}: which kind? pyhyve has QEMU's; write -l fwcfg,qemu")
    return FwCfgOptions()


@dataclass(frozen=True, slots=True)
class _Kind:
    make: Callable[[Mapping[str, str], str], LpcOptions]
    options: tuple[str, ...]
    """Those that take a value end in `=`."""
    help: str


_KINDS: Final[Mapping[str, _Kind]] = {
    "fwcfg": _Kind(_fwcfg, ("qemu",), "fwcfg,qemu: QEMU's firmware configuration, with the files of -f"),
    "isa-debug-exit": _Kind(
        _debug_exit,
        ("iobase=", "iosize="),
        "isa-debug-exit[,iobase=PORT][,iosize=N]: a write of V ends the run with status 2V + 1 (0x501, 2)",
    ),
    "pc-testdev": _Kind(
        lambda values, text: PcTestdevOptions(), (), "pc-testdev: what kvm-unit-tests ask for, and an exit port at 0xf4"
    ),
}
LPC_DEVICES: Final = tuple(_KINDS)


def lpc_help() -> str:
    """Return what `-l help` prints."""
    return "\n".join(kind.help for kind in _KINDS.values())


def parse_lpc(text: str) -> LpcOptions:
    """Return the device for "isa-debug-exit,iobase=0xf4". UsageError, one line, for what is none."""
    name, *words = text.split(",")
    kind = _KINDS.get(name)
    if kind is None:
        raise UsageError(f"-l {text}: no such device; there are {', '.join(_KINDS)} (-l help tells more)")
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key + equals not in kind.options or key in values:
            known = ", ".join(kind.options) or "none"
            raise UsageError(f"-l {text}: {word!r} is no option of {name}, or is there twice; there are: {known}")
        values[key] = value
    return kind.make(values, text)


def _number(text: str, name: str, whole: str) -> int:
    match = re.fullmatch(r"0[xX]([0-9a-fA-F]{1,8})|([0-9]{1,8})", text)
    if match is None:
        raise UsageError(f"-l {whole}: {name} is a number, for instance {name}=0xf4")
    return int(match[1], 16) if match[1] else int(match[2])


def parse_fwcfg_file(text: str) -> FwCfgFile:
    """Return the file for "opt/NAME,string=TEXT" or "opt/NAME,file=PATH". UsageError, one line, where there is none."""
    name, _, source = text.partition(",")
    kind, equals, value = source.partition("=")
    if kind not in ("string", "file") or not equals:
        raise UsageError(f"-f {text}: not a file; write NAME,string=TEXT or NAME,file=PATH")
    if kind == "string":
        return checked_file(name, value.encode(errors="surrogateescape"))
    checked_file(name, b"")
    return FwCfgFile(name, read_file(Path(value), f"-f {name}:", max_size=_FILE_MAX))


def checked_file(name: str, data: bytes) -> FwCfgFile:
    """Return the file, unless its name cannot be: UsageError."""
    if not name or not name.isascii() or not name.isprintable() or len(name) > NAME_MAX:
        raise UsageError(f"-f {name}: a name is 1 to {NAME_MAX} ASCII characters, for instance opt/org.example/x")
    if name == E820_FILE:
        raise UsageError(f"-f {name}: the machine has a file of this name; take another, such as opt/org.example/x")
    return FwCfgFile(name, data)
