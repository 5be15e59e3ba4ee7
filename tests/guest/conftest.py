"""Real guests: a shell on the stock kernel, the command line, small kernels of the tests' own."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "cpu"))
sys.path.insert(2, str(Path(__file__).parents[1] / "unit" / "bhyve" / "boot"))

from commandline import CommandLine

from pyhyve.base.errors import HostError
from pyhyve.bhyve.boot import apt, deb, guestimage


@pytest.fixture
def command(tmp_path: Path) -> Iterator[CommandLine]:
    """The command line. Whatever a test does with it, nothing may be left behind."""
    commands = CommandLine(tmp_path)
    try:
        yield commands
        assert commands.left_behind() == []
    finally:
        commands.close()


@pytest.fixture(scope="session")
def generic_kernel() -> Path:
    """Debian's kernel for real machines, which has drivers that its cloud kernel has not (MultiProcessor tables, for
    one): kept beside the guests, fetched if it is not there (70 MB). Skipped where it cannot be had, but not in CI."""
    kept = guestimage.cache_directory().parent / "tests" / "vmlinuz-generic"
    if not kept.exists():
        try:
            fetch_kernel("linux-image-amd64", kept)
        except HostError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(error))
    return kept


def fetch_kernel(metapackage: str, path: Path) -> None:
    """Get the kernel that a metapackage of Debian's depends on. HostError if there is no way."""
    apt.require()
    meta = apt.show(metapackage)
    name = re.search(r"linux-image-[^ ,|]+", meta.depends if meta else "")
    package = apt.show(name[0]) if name else None
    if package is None:
        raise HostError(f"apt: offers no {metapackage}")
    with tempfile.TemporaryDirectory() as directory:
        (archive,) = apt.download([package], Path(directory), lambda done: None)
        kernel = deb.read_members(archive, ("boot/vmlinuz-*",))["boot/vmlinuz-*"]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(kernel)
    partial.rename(path)
