"""What the benchmarks put into their guests: programs of guest/, compiled here, and an initramfs with them."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from processes import BenchError

SOURCES: Final = Path(__file__).resolve().parent / "guest"
COMPILER: Final = "gcc"
_FLAT: Final = (
    "-O2", "-ffreestanding", "-fno-pic", "-no-pie", "-mno-red-zone", "-mgeneral-regs-only", "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables", "-nostdlib", "-static", "-Wl,--oformat=binary", "-Wl,--build-id=none",
)  # fmt: skip
_STATIC: Final = ("-O2", "-static", "-march=x86-64", "-ffp-contract=off")


def compile_static(name: str, directory: Path, options: tuple[str, ...] = ()) -> Path:
    """Compile guest/<name>.c to a static program in `directory`; return its path. BenchError says what is missing.

    For the oldest x86-64, so that host, pyhyve and QEMU run the same instructions.
    """
    return _compile(name, directory / name, (*_STATIC, *options))


def compile_flat(name: str, directory: Path) -> Path:
    """Compile guest/<name>.c, laid out by guest/bare.ld, to a flat image in `directory`; return its path."""
    return _compile(name, directory / f"{name}.bin", (*_FLAT, f"-Wl,-T,{SOURCES / 'bare.ld'}"))


def _compile(name: str, program: Path, options: tuple[str, ...]) -> Path:
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise BenchError(f"{name}: needs a C compiler; install it: sudo apt-get install {COMPILER} libc6-dev")
    command = [compiler, *options, "-o", str(program), str(SOURCES / f"{name}.c")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{name}: {COMPILER} cannot compile it (is libc6-dev installed?)", done.stderr.rstrip())
    return program


def write_initramfs(busybox: Path, programs: Mapping[str, Path], path: Path) -> Path:
    """Write the guest's usual initramfs, with these programs by their path in the guest, to `path`; return that."""
    from pyhyve.bhyve.boot.initramfs import build_initramfs

    path.write_bytes(
        build_initramfs(busybox.read_bytes(), {name: each.read_bytes() for name, each in programs.items()})
    )
    return path
