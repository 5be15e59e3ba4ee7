"""What the benchmarks share: what was measured on and with, where the programs are, command lines, and how one ends."""

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from processes import BenchError, Interrupted, interrupt
from results import OUTPUT, write_json

QEMU: Final = "qemu-system-x86_64"
_QEMU_PACKAGE: Final = "qemu-system-x86"
_PROCESS_CLOCK: Final = 2
"""With a process id above it: the clock of that process's processor time (clock_getcpuclockid)."""


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


def prepare(qemu: str | None = None) -> dict[str, object]:
    """Return `describe()` with what is measured: pyhyve's software processor, and QEMU where that is compared.

    BenchError unless pyhyve works here; a busy host is said on standard error.
    """
    require_processor()
    warning = busy()
    if warning is not None:
        print(f"bench: {warning}", file=sys.stderr)
    machine = describe() | {"processor": "bt"}
    return machine if qemu is None else machine | {"qemu": first_line([qemu, "--version"])}


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and its threads, those that have ended too: to the nanosecond."""
    return time.clock_gettime(~pid << 3 | _PROCESS_CLOCK)


# -- command lines -----------------------------------------------------------------------------------------------------


def add_runs(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument("--runs", type=int, metavar="N", default=default, help="median of N (%(default)s)")


def add_json(parser: argparse.ArgumentParser, instead_of: str) -> None:
    parser.add_argument(
        "--json", action="store_true", dest="as_json", help=f"print the JSON instead of the {instead_of}"
    )


def check_runs(parser: argparse.ArgumentParser, runs: int) -> None:
    if runs < 1:
        parser.error(f"--runs {runs}: not a number of runs; write 1 or more")


def chosen(parser: argparse.ArgumentParser, only: str | None, names: Sequence[str]) -> tuple[str, ...]:
    """Return what `--only NAME,...` names, in the order of `names`; all of them without it."""
    asked = set(names) if only is None else {name.strip() for name in only.split(",")}
    unknown = sorted(asked - set(names))
    if unknown:
        parser.error(f"--only {unknown[0]}: no such benchmark; there are {', '.join(names)}")
    return tuple(name for name in names if name in asked)


def run(measure: Callable[[], Mapping[str, object]], file: str, show: Callable[[], object] | None) -> int:
    """Be a benchmark's main(): measure, write the result to bench/out/<file>, `show` it (None: print the JSON).

    Returns the exit status. An error is one line behind the last of what a program printed; a signal ends everything
    that was started, and nothing is written then.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        document = measure()
        write_json(OUTPUT / file, document)
    except BenchError as error:
        if error.output:
            print(error.output, file=sys.stderr)
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print("bench: interrupted; nothing was written", file=sys.stderr)
        return 128 + interrupted.number
    if show is None:
        print(json.dumps(document, indent=2))
    else:
        show()
    print(f"bench: wrote {os.path.relpath(OUTPUT / file)}", file=sys.stderr)
    return 0


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
