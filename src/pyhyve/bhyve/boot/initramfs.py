"""The initramfs of pyhyve's own guest: a static busybox, an init script and the benchmark's workloads."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Final

from pyhyve.bhyve.boot.cpio import CpioWriter

GUEST_BENCH: Final = "/etc/pyhyve/bench.sh"
"""Where the benchmark's script is in the guest; it looks beside itself for programs that it runs."""

_GUEST_FILES = files("pyhyve.bhyve.boot") / "guest"


def guest_script(name: str) -> bytes:
    """Return one of the scripts that run in the guest: "init.sh" or "bench.sh"."""
    return (_GUEST_FILES / name).read_bytes()


def build_initramfs(busybox: bytes, extra: Mapping[str, bytes] | None = None, *, compress: bool = False) -> bytes:
    """Return an initramfs around `busybox`, a statically linked executable; the same input gives the same bytes.

    `extra` adds executable files by path: a script /run.sh for the command line's pyhyve.run=/run.sh, say.
    What the guest does is told by its command line; see guest/init.sh. The applets' links are made in the guest, so
    that nothing of the guest is executed on the host. Not compressed unless asked: unpacking costs the guest more
    than copying.
    """
    archive = CpioWriter()
    for path in ("bin", "dev", "etc", "proc", "run", "sbin", "sys", "usr/bin", "usr/sbin"):
        archive.directory(path)
    archive.directory("root", 0o700)
    archive.directory("tmp", 0o1777)
    # The kernel opens /dev/console for init before init can mount anything there.
    archive.device("dev/console", "c", 5, 1)
    archive.device("dev/null", "c", 1, 3, 0o666)
    archive.file("bin/busybox", busybox, 0o755)
    archive.symlink("bin/sh", "busybox")
    archive.file("init", guest_script("init.sh"), 0o755)
    archive.file(GUEST_BENCH, guest_script("bench.sh"), 0o755)
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\n")
    for path, data in (extra or {}).items():
        archive.file(path, data, 0o755)
    return archive.finish(compress=compress)
