"""Writer of cpio archives in the "newc" format, as Linux unpacks its initramfs.

The format (Linux Documentation/driver-api/early-userspace/buffer-format.rst): a header of 110 ASCII characters, the
name and its NUL padded with the header to 4 bytes, the contents padded to 4 bytes; a last entry "TRAILER!!!".
The same calls give the same bytes: times and owners are 0 and inode numbers count up.
"""

import gzip
import stat
from typing import Final

_MAGIC: Final = "070701"
_TRAILER: Final = "TRAILER!!!"
_FIELD_MAX: Final = 0xFFFF_FFFF
_DEVICE_TYPES: Final = {"c": stat.S_IFCHR, "b": stat.S_IFBLK}


class CpioWriter:
    """An archive in the making. Paths may start with "/"; missing parent directories (mode 0755) are added first."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._paths: set[str] = set()
        self._inode = 0

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory. Adding one a second time is harmless; its mode stays."""
        name = _normal(path)
        if name not in self._paths:
            self._add(name, stat.S_IFDIR | mode, b"", links=2)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file (less than 4 GiB)."""
        self._add(_normal(path), stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link; `target` is taken as it stands."""
        self._add(_normal(path), stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, kind: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a device node; `kind` is "c" or "b"."""
        self._add(_normal(path), _DEVICE_TYPES[kind] | mode, b"", device=(major, minor))

    def finish(self, *, compress: bool = False) -> bytes:
        """Return the archive, gzipped if asked. More can be added and the archive finished again."""
        archive = b"".join((*self._parts, _entry(_TRAILER, 0, 0, b"", 1, (0, 0))))
        return gzip.compress(archive, mtime=0) if compress else archive

    def _add(self, name: str, mode: int, data: bytes, *, links: int = 1, device: tuple[int, int] = (0, 0)) -> None:
        if name in self._paths:
            raise ValueError(f"{name}: already in the archive")
        if len(data) > _FIELD_MAX:
            raise ValueError(f"{name}: {len(data)} bytes; a cpio entry holds less than 4 GiB")
        parent = name.rpartition("/")[0]
        if parent:
            self.directory(parent)
        self._paths.add(name)
        self._inode += 1
        self._parts.append(_entry(name, self._inode, mode, data, links, device))


def _normal(path: str) -> str:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "\0" in path:
        raise ValueError(f"{path!r}: not a path inside an archive")
    return "/".join(parts)


def _entry(name: str, inode: int, mode: int, data: bytes, links: int, device: tuple[int, int]) -> bytes:
    encoded = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device's major and minor, node's major and minor, name's size, check
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(encoded), 0)
    header = _MAGIC.encode() + b"".join(b"%08X" % value for value in fields) + encoded
    return _padded(header) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
