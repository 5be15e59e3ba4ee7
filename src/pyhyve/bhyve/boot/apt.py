"""Debian's apt as a source of packages: asked for the newest, for its checksums and to download; never to install."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyhyve.base.errors import HostError

_POLL_SECONDS: Final = 0.1
_ENVIRONMENT: Final = {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
_OWN_FILES: Final = "or name your own files: pyhyve run --kernel FILE --initrd FILE"


@dataclass(frozen=True, slots=True)
class Package:
    """A package as apt's metadata describe it; `size` in bytes, `sha256` in hexadecimal."""

    name: str
    version: str
    size: int
    sha256: str
    depends: str

    @property
    def spec(self) -> str:
        return f"{self.name}={self.version}"


class DownloadFailed(HostError):
    """apt could not download: stale lists, perhaps."""


def require() -> None:
    """Raise HostError where there is no apt."""
    for tool in ("apt-get", "apt-cache"):
        if shutil.which(tool) is None:
            raise HostError(
                f"{tool}: not found; a guest is fetched only where there is Debian's apt; "
                "name your own files: pyhyve run --kernel FILE --initrd FILE"
            )


def may_update() -> bool:
    """True if we may refresh apt's lists: only root may."""
    return os.geteuid() == 0


def update() -> None:
    """Refresh apt's lists of packages."""
    result = _run(["apt-get", "-q", "update"])
    if result.returncode != 0:
        raise HostError(f"apt-get update: {_reason(result.stderr)}; check the network, {_OWN_FILES}")


def show(spec: str) -> Package | None:
    """Return what apt knows of a package ("name" for the newest, "name=version"); None if nothing."""
    result = _run(["apt-cache", "show", "--no-all-versions", spec])
    for stanza in result.stdout.split("\n\n"):
        # Continuation lines start with a blank; none of the wanted fields has any.
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", stanza, re.MULTILINE))
        if {"Package", "Version", "Size", "SHA256"} <= fields.keys():
            return Package(
                fields["Package"],
                fields["Version"],
                int(fields["Size"]),
                fields["SHA256"].lower(),
                fields.get("Depends", ""),
            )
    return None


def download(packages: Sequence[Package], directory: Path, progress: Callable[[int], None]) -> list[Path]:
    """Download into an empty directory and check sizes and digests; return the files in the packages' order.

    `progress` is told the bytes that have arrived.
    """
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *(p.spec for p in packages)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            command,
            cwd=directory,
            env=os.environ | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
        ) as process,
    ):
        try:
            while process.poll() is None:
                progress(_bytes_in(directory))
                time.sleep(_POLL_SECONDS)
        except BaseException:
            process.terminate()
            raise
        log.seek(0)
        errors = log.read()
    if process.returncode != 0:
        raise DownloadFailed(f"apt-get download: {_reason(errors)}; check the network, {_OWN_FILES}")
    progress(_bytes_in(directory))
    return [_checked(package, directory) for package in packages]


def _checked(package: Package, directory: Path) -> Path:
    path = next(iter(sorted(directory.glob(f"{package.name}_*.deb"))), None)
    if path is None:
        raise DownloadFailed(f"apt-get download: said nothing, but brought no {package.name}; try again")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != package.sha256 or path.stat().st_size != package.size:
        raise DownloadFailed(
            f"package {package.name} {package.version}: what arrived has another SHA-256 than apt's metadata say; "
            "try again, or change the mirror"
        )
    return path


def _bytes_in(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # apt renames what is complete
            continue
    return total


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | _ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def _reason(errors: str) -> str:
    """apt's own last word on what went wrong."""
    lines = [line.removeprefix("E: ").strip() for line in errors.splitlines() if line.startswith(("E: ", "Err:"))]
    return lines[0] if lines else "failed without a word"
