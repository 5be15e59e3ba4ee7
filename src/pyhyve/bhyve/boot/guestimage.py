"""Getting a guest: Debian's newest cloud kernel and static busybox, kept in the user's cache.

    $XDG_CACHE_HOME/pyhyve/guests/<version>/    vmlinuz, System.map, busybox, guest.json, initramfs-<digest>.cpio

A version's directory appears whole or not at all. The initramfs is packed when a guest is opened and its scripts (or
busybox) are not those of the one that is there; its name carries their digest.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from pyhyve.base.errors import HostError, UsageError
from pyhyve.bhyve.boot import apt, deb
from pyhyve.bhyve.boot.initramfs import build_initramfs

KERNEL_METAPACKAGE: Final = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE: Final = "busybox-static"

_DESCRIPTION: Final = "guest.json"
_FILES: Final = ("vmlinuz", "System.map", "busybox", _DESCRIPTION)
_STAGING_PREFIX: Final = ".fetch-"


class Progress(Protocol):
    """Told of each step, and repeatedly during a slow one. `done` of `total` in bytes; a total of 0 is unknown."""

    def __call__(self, step: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A guest in the cache."""

    version: str
    """The kernel package's name without "linux-image-", "_", its version."""
    kernel: Path
    initramfs: Path
    system_map: Path
    """As the package has it: Debian ships a placeholder, and the real one in its debug package."""
    busybox: Path


def cache_directory() -> Path:
    """Return where guests are kept (XDG Base Directory Specification; a relative value is ignored as it says)."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(configured) if configured.startswith("/") else Path.home() / ".cache"
    return base / "pyhyve" / "guests"


def get(progress: Progress | None = None) -> GuestImage:
    """Return the newest guest in the cache; fetch one if there is none."""
    cached = list_cached()
    return cached[0] if cached else fetch(progress)


def list_cached() -> tuple[GuestImage, ...]:
    """Return the guests in the cache, the newest version first."""
    root = cache_directory()
    with _cache_errors(root):
        return tuple(_open(root / version) for version in _versions(root) if _complete(root / version))


def remove(version: str | None = None) -> tuple[str, ...]:
    """Remove one guest from the cache, or all; return the versions removed. UsageError for one that is not there."""
    versions = _versions(cache_directory())
    if version is not None and version not in versions:
        known = f"there are: {', '.join(versions)}" if versions else "the cache is empty"
        raise UsageError(f"guest {version}: not in the cache; {known}")
    root = cache_directory()
    if not root.is_dir():
        return ()
    with _cache_errors(root), _locked(root, _silent):
        chosen = versions if version is None else (version,)
        for name in chosen:
            # Out of sight first: nobody may find half a guest.
            staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=root))
            with contextlib.suppress(FileNotFoundError):
                (root / name).rename(staging / name)
            shutil.rmtree(staging)
    return chosen


def fetch(progress: Progress | None = None) -> GuestImage:
    """Return the newest guest that apt offers; download, check and unpack it if the cache does not have it.

    apt's lists are refreshed where they are missing or stale, if we may. HostError names what is missing otherwise.
    """
    report = progress or _silent
    apt.require()
    root = cache_directory()
    with _cache_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root, report):
            return _fetch(root, report)


def _fetch(root: Path, report: Progress) -> GuestImage:
    report("asking apt for the newest guest", 0, 0)
    updated = False
    packages = _resolve()
    if packages is None:
        _refresh(report)
        updated = True
        packages = _resolve()
    if packages is None:
        raise HostError(
            f"apt: offers no {KERNEL_METAPACKAGE} and {BUSYBOX_PACKAGE} (Debian on amd64 does); "
            "name your own files: pyhyve run --kernel FILE --initrd FILE"
        )
    for leftover in root.glob(f"{_STAGING_PREFIX}*"):  # we hold the lock: whoever made it was killed
        shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=root))
    try:
        try:
            return _install(packages, root, staging, report)
        except apt.DownloadFailed:
            if updated or not apt.may_update():
                raise
        # The lists may name what the mirror has replaced since.
        _refresh(report)
        return _install(_resolve() or packages, root, staging, report)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refresh(report: Progress) -> None:
    if not apt.may_update():
        raise HostError("apt: its package lists are missing or stale; run: sudo apt-get update")
    report("refreshing apt's package lists", 0, 0)
    apt.update()


def _resolve() -> tuple[apt.Package, apt.Package] | None:
    """The newest kernel, behind its metapackage, and busybox; None if apt knows of no such thing."""
    metapackage = apt.show(KERNEL_METAPACKAGE)
    if metapackage is None:
        return None
    dependency = re.search(r"(linux-image-[^ ,|]+)(?: \(= ([^)]+)\))?", metapackage.depends)
    if dependency is None:
        return None
    name, version = dependency.groups()
    kernel = apt.show(f"{name}={version}" if version else name)
    busybox = apt.show(BUSYBOX_PACKAGE)
    return (kernel, busybox) if kernel and busybox else None


def _version(kernel: apt.Package) -> str:
    # A version's ":" and "~" are safe in a file name; "/" cannot occur (deb-version(7)).
    return f"{kernel.name.removeprefix('linux-image-')}_{kernel.version}"


def _install(packages: tuple[apt.Package, apt.Package], root: Path, staging: Path, report: Progress) -> GuestImage:
    """Put the guest in its place, unless it is there."""
    target = root / _version(packages[0])
    if _complete(target):
        return _open(target)
    total = sum(package.size for package in packages)
    step = f"downloading {packages[0].name} and {packages[1].name}"
    downloads = staging / "download"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir()
    kernel_deb, busybox_deb = apt.download(packages, downloads, lambda done: report(step, min(done, total), total))
    report("unpacking the guest", 0, 0)
    guest = staging / "guest"
    guest.mkdir(exist_ok=True)
    boot = deb.read_members(kernel_deb, ("boot/vmlinuz-*", "boot/System.map-*"))
    # Debian 13 has moved /bin into /usr.
    programs = deb.read_members(busybox_deb, ("*bin/busybox",))
    (guest / "vmlinuz").write_bytes(boot["boot/vmlinuz-*"])
    (guest / "System.map").write_bytes(boot["boot/System.map-*"])
    (guest / "busybox").write_bytes(programs["*bin/busybox"])
    (guest / "busybox").chmod(0o755)
    description = {
        "version": target.name,
        "packages": [{"name": p.name, "version": p.version, "sha256": p.sha256} for p in packages],
    }
    (guest / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    _initramfs(guest)
    shutil.rmtree(target, ignore_errors=True)  # something incomplete, by someone's hand
    guest.rename(target)
    return _open(target)


def _versions(root: Path) -> tuple[str, ...]:
    """The directories of guests, the newest version first."""
    if not root.is_dir():
        return ()
    names = [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return tuple(sorted(names, key=_version_key, reverse=True))


def _complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in _FILES)


def _open(directory: Path) -> GuestImage:
    return GuestImage(
        version=directory.name,
        kernel=directory / "vmlinuz",
        initramfs=_initramfs(directory),
        system_map=directory / "System.map",
        busybox=directory / "busybox",
    )


def _initramfs(directory: Path) -> Path:
    """The guest's initramfs, packed now unless this very one is there."""
    archive = build_initramfs((directory / "busybox").read_bytes())
    path = directory / f"initramfs-{hashlib.sha256(archive).hexdigest()[:16]}.cpio"
    if not path.exists():
        handle, temporary = tempfile.mkstemp(prefix=".initramfs-", dir=directory)
        try:
            with open(handle, "wb") as stream:
                stream.write(archive)
            Path(temporary).chmod(0o644)
            for stale in directory.glob("initramfs-*.cpio"):
                stale.unlink(missing_ok=True)
            Path(temporary).rename(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path


@contextlib.contextmanager
def _cache_errors(root: Path) -> Iterator[None]:
    """What the file system refuses is the host's fault, in one line."""
    try:
        yield
    except OSError as error:
        raise HostError(f"guest cache {root}: {error.strerror}; make room there or set XDG_CACHE_HOME") from None


@contextlib.contextmanager
def _locked(root: Path, report: Progress) -> Iterator[None]:
    """Hold the cache against others; the kernel releases it however we end."""
    with (root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another pyhyve that fetches a guest", 0, 0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _version_key(version: str) -> list[tuple[int, str]]:
    """Numbers compare as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", version)]


def _silent(step: str, done: int, total: int) -> None:
    pass
