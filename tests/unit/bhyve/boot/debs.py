"""Packages made for tests."""

import io
import lzma
import tarfile
from collections.abc import Mapping

import zstandard


def make_deb(files: Mapping[str, bytes], *, packer: str = "xz", with_data: bool = True) -> bytes:
    """A Debian package with these files (paths without leading slash); `packer` is xz, zst, gz or empty."""
    members = [("debian-binary", b"2.0\n"), ("control.tar.xz", lzma.compress(b"odd"))]
    if with_data:
        members.append((f"data.tar.{packer}".rstrip("."), _tar(files, packer)))
    deb = b"!<arch>\n"
    for name, content in members:
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        deb += b"\n" * (len(content) % 2)
    return deb


def _tar(files: Mapping[str, bytes], packer: str) -> bytes:
    stream = io.BytesIO()
    mode = f"w:{packer}" if packer in ("xz", "gz") else "w"
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for path, content in files.items():
            member = tarfile.TarInfo(f"./{path}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return zstandard.compress(stream.getvalue()) if packer == "zst" else stream.getvalue()
