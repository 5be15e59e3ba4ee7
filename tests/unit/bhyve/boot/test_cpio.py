"""The archive is what cpio and Linux take it for."""

import gzip
import subprocess

import pytest

from pyhyve.bhyve.boot.cpio import CpioWriter
from pyhyve.bhyve.boot.guestimage import GuestImage


def sample() -> CpioWriter:
    archive = CpioWriter()
    archive.directory("tmp", 0o1777)
    archive.file("etc/motd", b"hello", 0o600)
    archive.symlink("bin/sh", "busybox")
    archive.device("dev/console", "c", 5, 1)
    archive.device("dev/vda", "b", 254, 0)
    return archive


def test_another_cpio_lists_what_was_put_in(guest_image: GuestImage) -> None:
    listing = subprocess.run(
        [guest_image.busybox, "cpio", "-tv"], input=sample().finish(), capture_output=True, check=True
    ).stdout.decode()
    kinds = {line.split()[-1]: line.split()[0] for line in listing.splitlines() if "->" not in line}
    assert kinds == {
        "tmp": "drwxrwxrwt",
        "etc": "drwxr-xr-x",
        "etc/motd": "-rw-------",
        "bin": "drwxr-xr-x",
        "dev": "drwxr-xr-x",
        "dev/console": "crw-------",
        "dev/vda": "brw-------",
    }
    assert "bin/sh -> busybox" in listing


def test_another_cpio_extracts_the_contents(guest_image: GuestImage) -> None:
    extract = [guest_image.busybox, "cpio", "-i", "--to-stdout", "etc/motd"]
    assert subprocess.run(extract, input=sample().finish(), capture_output=True, check=True).stdout == b"hello"


def test_entries_are_aligned_to_four_bytes() -> None:
    for length in range(5):
        archive = CpioWriter()
        archive.file("f" * (length + 1), b"x" * length)
        assert len(archive.finish()) % 4 == 0


def test_the_same_calls_give_the_same_bytes() -> None:
    assert sample().finish() == sample().finish()
    assert sample().finish(compress=True) == sample().finish(compress=True)


def test_compression_changes_only_the_container() -> None:
    assert gzip.decompress(sample().finish(compress=True)) == sample().finish()


def test_a_directory_may_be_added_twice_but_a_file_may_not() -> None:
    archive = sample()
    archive.directory("/etc/")
    with pytest.raises(ValueError, match="already"):
        archive.file("/etc/motd", b"")


@pytest.mark.parametrize("path", ["", "/", "..", "a/../b", "a\0b"])
def test_a_path_that_leaves_the_archive_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not a path"):
        CpioWriter().file(path, b"")
