"""Packages are read without dpkg."""

from pathlib import Path

import pytest
from debs import make_deb

from pyhyve.base.errors import HostError
from pyhyve.bhyve.boot.deb import read_members

FILES = {"usr/share/doc/x": b"text", "boot/vmlinuz-6.1": b"kernel" * 1000, "boot/System.map-6.1": b"map", "odd": b""}


@pytest.mark.parametrize("packer", ["xz", "zst", "gz", ""])
def test_members_are_found_by_pattern(tmp_path: Path, packer: str) -> None:
    package = tmp_path / "p.deb"
    package.write_bytes(make_deb(FILES, packer=packer))
    members = read_members(package, ("boot/System.map-*", "boot/vmlinuz-*"))
    assert members == {"boot/vmlinuz-*": b"kernel" * 1000, "boot/System.map-*": b"map"}


def test_missing_member_is_named(tmp_path: Path) -> None:
    package = tmp_path / "p.deb"
    package.write_bytes(make_deb(FILES))
    with pytest.raises(HostError, match=r"^package p\.deb: holds no boot/initrd-\*"):
        read_members(package, ("boot/initrd-*",))


@pytest.mark.parametrize("packer", ["xz", "zst"])
def test_damage_is_one_line(tmp_path: Path, packer: str) -> None:
    package = tmp_path / "p.deb"
    whole = make_deb(FILES, packer=packer)
    for content in (
        b"",
        b"no archive",
        whole[:100],
        whole[:-20],
        make_deb({}, with_data=False),
        b"!<arch>\n" + b"x" * 80,
    ):
        package.write_bytes(content)
        with pytest.raises(HostError, match=r"^package p\.deb: [^\n]+$"):
            read_members(package, ("boot/vmlinuz-*", "boot/no"))
