"""Names of running VMs: a lock file each, in the user's runtime directory.

The lock is flock(2)'s: it goes with its process, whatever way that ends, so a file left behind locks nothing and is
taken over. The file's text (the holder's process id) is for people.
"""

import fcntl
import os
import re
import stat
from pathlib import Path
from typing import Final

from pyhyve.base.errors import HostError, UsageError
from pyhyve.base.wire import node_path

RUN_DIR_VARIABLE: Final = "PYHYVE_RUN_DIR"
"""Names the directory of running VMs, where the usual one will not do."""

_ATTEMPTS: Final = 16
_OWN_NAME: Final = re.compile(r"vm-(\d+)-[0-9a-f]+")


def own_name(owner: object) -> str:
    """Return a name for one run that nobody else takes."""
    return f"vm-{os.getpid()}-{id(owner) & 0xFFFFFF:x}"


def runtime_directory() -> Path:
    """Return (and make, mode 0700) the directory of this user's running VMs."""
    own = os.environ.get(RUN_DIR_VARIABLE, "")
    configured = os.environ.get("XDG_RUNTIME_DIR", "")
    if own.startswith("/"):
        path = Path(own)
    elif own:
        raise UsageError(f"{RUN_DIR_VARIABLE}={own}: not an absolute path; name a directory of your own")
    elif configured.startswith("/"):
        path = Path(configured) / "pyhyve"
    elif os.geteuid() == 0:
        path = Path("/run/pyhyve")
    else:
        path = Path("/tmp") / f"pyhyve-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise HostError(
            f"cannot make {path} ({error.strerror}); set {RUN_DIR_VARIABLE} to a directory of your own"
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise HostError(f"{path} is not a directory that only you can write; set {RUN_DIR_VARIABLE} to one of your own")
    return path


class NameLock:
    """Holds a VM's name until `release()` or the end of the process. `directory` is where the VM's nodes go."""

    def __init__(self, name: str, directory: Path | None = None) -> None:
        self.name = name
        self.directory = runtime_directory() if directory is None else directory
        self.path = self.directory / "lock" / name
        self._fd = -1
        try:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            self._fd = self._acquire()
        except OSError as error:
            raise HostError(f"cannot lock {self.path}: {error.strerror}") from None

    def _acquire(self) -> int:
        for _ in range(_ATTEMPTS):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(fd, 64).decode("ascii", "replace").strip() or "another process"
                os.close(fd)
                raise UsageError(
                    f"--name {self.name}: a VM of this name is running (process {holder}); "
                    "choose another name, or stop it"
                ) from None
            # The last holder may have removed the file between our open and our lock.
            if self._is_current(fd):
                os.ftruncate(fd, 0)
                os.write(fd, f"{os.getpid()}\n".encode())
                self._sweep()
                return fd
            os.close(fd)
        raise HostError(f"cannot lock {self.path}: it keeps being replaced")

    def _is_current(self, fd: int, path: Path | None = None) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(path or self.path))
        except FileNotFoundError:
            return False

    def _sweep(self) -> None:
        """Remove what killed processes left of the names made for one run: nobody asks for those again."""
        for path in self.path.parent.iterdir():
            match = _OWN_NAME.fullmatch(path.name)
            if match is None or os.path.exists(f"/proc/{match[1]}"):
                continue
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # As release() does: whoever opened it before sees that it is no longer the one.
                if self._is_current(fd, path):
                    node_path(self.directory, path.name).unlink(missing_ok=True)
                    path.unlink(missing_ok=True)
            except OSError:
                pass  # somebody's
            finally:
                os.close(fd)

    def release(self) -> None:
        """Give the name back. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(fd)
