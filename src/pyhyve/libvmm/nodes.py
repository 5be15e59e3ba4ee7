"""Running VMs by name: their control nodes, and what killed ones left behind."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from pyhyve.base.errors import HostError, UsageError
from pyhyve.base.names import NameLock, runtime_directory
from pyhyve.base.parser import did_you_mean
from pyhyve.base.wire import NODES, node_path

_DIRECT_PATH = 100


class Stale(HostError):
    """The node is a VM's that was killed; it is removed."""


def names(directory: Path | None = None) -> list[str]:
    """Return the names that have a node, sorted; not all of them need answer."""
    place = (directory or runtime_directory()) / NODES
    try:
        return sorted(entry.name for entry in place.iterdir() if entry.is_socket())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError(f"cannot read {place}: {error.strerror}") from None


def remove_stale(name: str, directory: Path | None = None) -> bool:
    """Remove a node that nobody serves; False if its VM lives (or begins to) after all."""
    place = directory or runtime_directory()
    try:
        lock = NameLock(name, place)
    except (UsageError, HostError):
        return False
    try:
        node_path(place, name).unlink(missing_ok=True)
    finally:
        lock.release()
    return True


def connect(name: str, timeout: float, directory: Path | None = None) -> socket.socket:
    """Connect to a VM's node. UsageError or HostError, one line, where there is none that answers."""
    place = directory or runtime_directory()
    path = node_path(place, name)
    if "/" in name or name in ("", ".", ".."):
        raise UsageError(f"{name!r}: not a VM's name")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        _connect(connection, path)
    except FileNotFoundError:
        connection.close()
        raise UsageError(_unknown(name, place)) from None
    except ConnectionRefusedError:
        connection.close()
        if remove_stale(name, place):
            raise Stale(f"{name}: the VM has ended without a word; its node, left behind, is removed") from None
        raise HostError(f"{name}: the VM is just beginning or ending; try again") from None
    except PermissionError:
        connection.close()
        raise HostError(f"{name}: the VM is somebody else's ({path})") from None
    except OSError as error:
        connection.close()
        raise HostError(f"{name}: cannot connect to {path}: {error.strerror or error}") from None
    return connection


def _connect(connection: socket.socket, path: Path) -> None:
    """sun_path has 108 bytes: longer paths go by a descriptor of their directory."""
    if len(os.fsencode(path)) < _DIRECT_PATH:
        connection.connect(str(path))
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


def _unknown(name: str, place: Path) -> str:
    known: list[str] = []
    with suppress(HostError):
        known = names(place)
    if not known:
        return f"{name}: no VM of this name is running, nor any other (in {place})"
    shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    return f"{name}: no VM of this name is running{did_you_mean(name, known)}; there is {shown}"
