"""The files that a user names, and reading them, with one line for each way in which that fails."""

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyhyve.base.errors import UsageError


@dataclass(frozen=True, slots=True)
class ModuleFile:
    """A file that goes into memory beside the kernel, and the text that the kernel gets with it."""

    path: Path
    text: str = ""


@dataclass(frozen=True, slots=True)
class BootFiles:
    """What the user names for the guest to begin with."""

    kernel: Path
    initrd: Path | None = None
    append: str | None = None
    """The kernel's command line; None: what suits the kind of kernel."""
    modules: Sequence[ModuleFile] = ()
    kaslr: bool = False
    la57: bool = False
    """The processor has page tables of five levels."""


def read_file(path: Path, what: str, *, max_size: int) -> bytes:
    """Return the contents of a regular file of 1 to `max_size` bytes. `what` ("kernel") begins a UsageError's text."""
    subject = f"{what} {path}"
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UsageError(f"{subject}: is a directory; name a file")
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{subject}: is not a regular file; copy it to one")
        if status.st_size == 0:
            raise UsageError(f"{subject}: is empty; get it anew, or leave the option out")
        if status.st_size > max_size:
            raise UsageError(
                f"{subject}: is too large: {_mib(status.st_size)}; at most {_mib(max_size)} fit; "
                f"give more memory (-m) or a smaller file"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{subject}: no such file; check the path") from None
    except PermissionError:
        raise UsageError(f"{subject}: may not be read; check its permissions") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{subject}: cannot be read ({reason}); check the path") from None


def _mib(size: int) -> str:
    """A size for a person: whole MiB rounded up, bytes below one."""
    return f"{size} bytes" if size < 1 << 20 else f"{-(-size >> 20)} MiB"
