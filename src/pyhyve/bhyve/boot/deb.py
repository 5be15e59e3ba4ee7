"""Reading files out of Debian packages, without dpkg.

A package is an ar archive: debian-binary, control.tar.*, data.tar.* (deb(5), "FORMAT").
"""

import io
import tarfile
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Final, cast

from pyhyve.base.errors import HostError

_AR_MAGIC: Final = b"!<arch>\n"
_AR_HEADER: Final = 60
_AR_END: Final = b"`\n"


def read_members(package: Path, patterns: Collection[str]) -> dict[str, bytes]:
    """Return, for each pattern, the first regular file of the package that matches it: paths without leading "./",
    patterns as fnmatch's. Reads no further than needed. HostError if the package is damaged or lacks one.
    """
    found: dict[str, bytes] = {}
    try:
        with package.open("rb") as stream, _open_data(stream) as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                wanted = next((p for p in patterns if p not in found and fnmatchcase(name, p)), None)
                if wanted is None or not member.isfile():
                    continue
                content = archive.extractfile(member)
                if content is not None:
                    found[wanted] = content.read()
                if len(found) == len(patterns):
                    return found
    except (tarfile.TarError, EOFError, ValueError, _zstd_error()) as error:
        raise HostError(f"package {package.name}: damaged ({error}); fetch it again") from None
    missing = ", ".join(sorted(set(patterns) - set(found)))
    raise HostError(f"package {package.name}: holds no {missing}; pyhyve does not know packages built like this")


def _open_data(stream: IO[bytes]) -> tarfile.TarFile:
    """The data archive, to be read once from front to back."""
    if stream.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise ValueError("it is not an ar archive")
    while header := stream.read(_AR_HEADER):
        if len(header) < _AR_HEADER or header[58:] != _AR_END:
            raise ValueError("its ar headers make no sense")
        name = header[:16].decode("ascii", "replace").rstrip().removesuffix("/")
        size = int(header[48:58])
        if name.startswith("data.tar"):
            return _open_tar(stream, name)
        stream.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("it has no data archive")


def _open_tar(stream: IO[bytes], name: str) -> tarfile.TarFile:
    # What follows the data archive, if anything, is a later ar member, which a decoder ignores.
    if name.endswith(".zst"):
        import zstandard

        # A stream reader is all of IO that tarfile's stream mode asks for.
        reader = cast(IO[bytes], zstandard.ZstdDecompressor().stream_reader(stream))
        return tarfile.open(fileobj=reader, mode="r|")
    return tarfile.open(fileobj=stream, mode="r|*")


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError
