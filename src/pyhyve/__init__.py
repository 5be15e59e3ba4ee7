"""pyhyve: bhyve, rebuilt in Python for user space on Linux.

    import pyhyve

    with pyhyve.Machine(kernel="vmlinuz", initrd="initramfs.cpio") as machine:
        machine.start()
        machine.console.expect("# ", timeout=60)
        machine.console.send("poweroff -f\\n")
        print(machine.wait(timeout=30))

Everything is imported when it is first used: `import pyhyve` itself costs nothing.
"""

from typing import TYPE_CHECKING, Any

from pyhyve.base.version import __version__

if TYPE_CHECKING:
    from pyhyve.api import Machine
    from pyhyve.base.errors import HostError, PyhyveError, UsageError
    from pyhyve.bhyve.console import CaptureConsole, ExpectClosed, ExpectError, ExpectTimeout
    from pyhyve.bhyve.outcome import Outcome, OutcomeKind

__all__ = [
    "CaptureConsole",
    "ExpectClosed",
    "ExpectError",
    "ExpectTimeout",
    "HostError",
    "Machine",
    "Outcome",
    "OutcomeKind",
    "PyhyveError",
    "UsageError",
    "__version__",
]

_HOMES = {
    "Machine": "pyhyve.api",
    "PyhyveError": "pyhyve.base.errors",
    "UsageError": "pyhyve.base.errors",
    "HostError": "pyhyve.base.errors",
    "CaptureConsole": "pyhyve.bhyve.console",
    "ExpectError": "pyhyve.bhyve.console",
    "ExpectTimeout": "pyhyve.bhyve.console",
    "ExpectClosed": "pyhyve.bhyve.console",
    "Outcome": "pyhyve.bhyve.outcome",
    "OutcomeKind": "pyhyve.bhyve.outcome",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
