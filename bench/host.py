"""What the numbers were measured on and with; where the programs are."""

import datetime
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from processes import BenchError

QEMU: Final = "qemu-system-x86_64"
_QEMU_PACKAGE: Final = "qemu-system-x86"


def find_qemu() -> str:
    """Return QEMU's path. BenchError names the package that has it."""
    path = shutil.which(QEMU)
    if path is None:
        raise BenchError(f"{QEMU}: not found; install it: sudo apt-get install {_QEMU_PACKAGE}")
    return path


def pyhyve_command() -> list[str]:
    """Return the command `pyhyve` of this Python: the installed script, or what the script would do."""
    script = Path(sys.executable).with_name("pyhyve")
    return [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-m", "pyhyve.cli.main"]


def require_processor() -> None:
    """BenchError unless pyhyve is built and its software processor works here."""
    try:
        from pyhyve.base.errors import PyhyveError
        from pyhyve.cpu import select
    except ImportError as error:
        raise BenchError(f"pyhyve: not installed for {sys.executable} ({error}); make bench does that") from None
    try:
        select.processor("bt")
    except ImportError as error:
        raise BenchError(f"pyhyve: not built ({error}); make bench does that") from None
    except PyhyveError as error:
        raise BenchError(f"pyhyve: {error}") from None


def first_line(command: list[str]) -> str:
    """Return the first line that a program prints about itself."""
    output = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False).stdout
    return output.partition("\n")[0].strip()


def describe() -> dict[str, object]:
    """Return the host: processor, memory, kernel, Python, pyhyve, how busy it is now."""
    from pyhyve import __version__

    model, hypervisor = _processor()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "virtualized": hypervisor,
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "pyhyve": __version__,
        "load": round(os.getloadavg()[0], 2),
    }


def busy() -> str | None:
    """Return a warning if somebody else uses the host's processors too."""
    load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load < 0.3 * cpus:
        return None
    return f"the host is busy (load {load:.2f} on {cpus} processors): the times will tell more about that than about us"


def _processor() -> tuple[str, bool]:
    model, flags = platform.machine(), ""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
        for line in info:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = value
                break
    return model, "hypervisor" in flags.split()
