"""The control node's thread: a Unix socket, many clients, and nothing that any of them can do to the guest.

Everything a client sends or does not take is bounded, in size, in number and in time. Methods that make the guest
stand still get a tenth of the time at most; the guest has the rest.
"""

import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from pyhyve.base.errors import HostError
from pyhyve.base.wire import (
    BUSY,
    INTERNAL_ERROR,
    INVALID_REQUEST,
    MAX_REQUEST,
    MAX_RESPONSE,
    NOT_YOURS,
    RpcError,
    failure,
    node_path,
    result,
)
from pyhyve.bhyve.control.rpc import BadCall, Call, Method, carry_out, parse

MAX_CLIENTS: Final = 32
"""One more takes the place of the one that has been silent longest."""
MAX_WAITING: Final = 64
"""Calls that wait for their turn to stop the guest."""
MAX_UNSENT: Final = MAX_RESPONSE + (1 << 20)
_ENOUGH_UNSENT: Final = 256 << 10
"""A client that leaves this much unread gets no further answers before it reads."""
SEND_TIMEOUT_S: Final = 10.0
_CHUNK: Final = 64 << 10
_SHARE: Final = 9
"""Times as long as a call made it stand still, the guest runs before the next."""
_MAX_REST_S: Final = 1.0
_NO_FILES_S: Final = 1.0
_MOST_FAILURES: Final = 16
_DIRECT_PATH: Final = 100
"""sun_path has 108 bytes; longer paths go by a descriptor of the directory."""
_TRUSTED: Final = (0,)
"""Users who may ask any VM."""
_UCRED: Final = struct.Struct("3i")


class _Client:
    """A connection. lines: what it asked and nobody has looked at; unsent: what it has not taken."""

    __slots__ = ("closing", "ended", "heard", "inbox", "lines", "sent", "socket", "unsent", "waiting")

    def __init__(self, connection: socket.socket, now: float) -> None:
        self.socket = connection
        self.inbox = bytearray()
        self.lines: deque[bytes] = deque()
        self.unsent = bytearray()
        self.heard = self.sent = now
        self.waiting = 0
        """Its calls that wait for their turn."""
        self.ended = False
        """It sends no more, but may still take answers."""
        self.closing = False
        """It takes one last answer and nothing else."""

    @property
    def done(self) -> bool:
        return not self.unsent and (self.closing or (self.ended and not self.lines and not self.waiting))


class ControlNode:
    """Serves `methods` at the node of a VM whose name the caller holds. `start()`, and `close()` at the end."""

    def __init__(self, directory: Path, name: str, methods: Mapping[str, Method]) -> None:
        self.path = node_path(directory, name)
        self.methods = methods
        self.failures = 0
        """Bugs of the node's own that its thread has met."""
        self._clients: dict[int, _Client] = {}
        self._waiting: deque[tuple[_Client, Call]] = deque()
        self._not_before = 0.0
        self._accept_again = 0.0
        self._closing = False
        self._identity: tuple[int, int] | None = None
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name=f"{name}/control", daemon=True)
        try:
            self._bind()
        except OSError as error:
            self._release()
            raise HostError(f"cannot make the control node {self.path}: {error.strerror or error}") from None

    def _bind(self) -> None:
        """Put the socket there. A node that is there already is a dead VM's: the name is ours."""
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_RDONLY
        directory = os.open(self.path.parent, flags)
        try:
            os.fchmod(directory, 0o700)
            with suppress(FileNotFoundError):
                os.unlink(self.path.name, dir_fd=directory)
            self._socket.bind(socket_address(self.path, directory))
            os.chmod(self.path.name, 0o600, dir_fd=directory)
            status = os.stat(self.path.name, dir_fd=directory, follow_symlinks=False)
            self._identity = (status.st_dev, status.st_ino)
        finally:
            os.close(directory)
        self._socket.listen(MAX_CLIENTS)
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End all connections and remove the node. Idempotent."""
        if self._closing:
            return
        self._closing = True
        if self._thread.is_alive():
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        self._release()

    def _release(self) -> None:
        self._closing = True
        for client in list(self._clients.values()):
            self._drop(client)
        if self._identity is not None:
            with suppress(OSError):
                status = self.path.lstat()
                if (status.st_dev, status.st_ino) == self._identity:
                    self.path.unlink()
        self._selector.close()
        self._socket.close()
        os.close(self._wake)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing and self.failures < _MOST_FAILURES:
            try:
                self._turn()
            except Exception:
                # A bug here costs the clients their connections, and the guest nothing.
                self.failures += 1
                self._waiting.clear()
                for client in list(self._clients.values()):
                    self._drop(client)

    def _turn(self) -> None:
        """Wait for something to do, and do it."""
        for key, events in self._selector.select(self._patience()):
            if key.fileobj is self._socket:
                self._accept()
            elif key.data is not None:
                self._serve(key.data, events)
        if self._closing:
            return
        # A call each, so that nobody's flood keeps the others waiting.
        for client in list(self._clients.values()):
            self._take_call(client)
        self._run_waiting()
        self._expire()

    def _patience(self) -> float | None:
        """How long there is nothing to do, unless somebody writes; None: for ever."""
        now = time.monotonic()
        times = []
        for client in self._clients.values():
            if client.lines and self._may_answer(client):
                return 0.0
            if client.unsent:
                times.append(client.sent + SEND_TIMEOUT_S - now)
        if self._waiting:
            times.append(self._not_before - now)
        if self._accept_again:
            times.append(self._accept_again - now)
        return max(0.0, min(times)) if times else None

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError:
            # Out of descriptors: let those who are there be served.
            self._selector.unregister(self._socket)
            self._accept_again = time.monotonic() + _NO_FILES_S
            return
        connection.setblocking(False)
        _, user, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if user != os.geteuid() and user not in _TRUSTED:
            with connection, suppress(OSError):
                connection.send(failure(None, RpcError(NOT_YOURS, f"this VM belongs to user {os.geteuid()}")))
            return
        if len(self._clients) >= MAX_CLIENTS:
            self._drop(min(self._clients.values(), key=lambda client: client.heard))
        client = _Client(connection, time.monotonic())
        self._clients[connection.fileno()] = client
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _serve(self, client: _Client, events: int) -> None:
        """A client sent something, or takes something."""
        if client.socket.fileno() < 0:
            return
        if events & selectors.EVENT_WRITE:
            self._send(client)
        if events & selectors.EVENT_READ and client.socket.fileno() >= 0:
            self._receive(client)

    def _receive(self, client: _Client) -> None:
        try:
            data = client.socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        if not data:
            client.ended = True
            self._watch(client)
            return
        client.heard = time.monotonic()
        client.inbox += data
        if b"\n" not in data and len(client.inbox) < MAX_REQUEST:
            return
        *lines, rest = client.inbox.split(b"\n")
        if any(len(line) >= MAX_REQUEST for line in (*lines, rest)):
            self._end(client, RpcError(INVALID_REQUEST, f"a request has at most {MAX_REQUEST} bytes"))
            return
        client.inbox = rest
        client.lines.extend(bytes(line) for line in lines if line.strip())
        self._watch(client)

    def _take_call(self, client: _Client) -> None:
        """Look at the client's next line."""
        if not client.lines or not self._may_answer(client):
            return
        call = parse(client.lines.popleft(), self.methods)
        if isinstance(call, BadCall):
            if call.answered:
                self._reply(client, failure(call.number, call.error))
        elif not call.method.pauses:
            self._carry_out(client, call)
        elif len(self._waiting) >= MAX_WAITING:
            if call.answered:
                self._reply(client, failure(call.number, RpcError(BUSY, "too many calls wait; ask again later")))
        else:
            client.waiting += 1
            self._waiting.append((client, call))
        if client.socket.fileno() >= 0:
            self._watch(client)

    def _run_waiting(self) -> None:
        """Carry out one call that stops the guest, if it is time."""
        if not self._waiting or time.monotonic() < self._not_before:
            return
        client, call = self._waiting.popleft()
        client.waiting -= 1
        if client.socket.fileno() < 0:
            return
        began = time.monotonic()
        self._carry_out(client, call)
        ended = time.monotonic()
        self._not_before = ended + min(_SHARE * (ended - began), _MAX_REST_S)
        if client.socket.fileno() >= 0:
            self._watch(client)

    def _carry_out(self, client: _Client, call: Call) -> None:
        try:
            answer = result(call.number, carry_out(call))
            if len(answer) > MAX_RESPONSE:
                raise RpcError(INTERNAL_ERROR, f"the answer has {len(answer)} bytes, more than {MAX_RESPONSE}")
        except RpcError as error:
            answer = failure(call.number, error)
        except (TypeError, ValueError) as error:
            answer = failure(call.number, RpcError(INTERNAL_ERROR, f"the answer is no JSON: {error}"))
        if call.answered:
            self._reply(client, answer)

    # -- a client's two directions -------------------------------------------------------------------------------------

    def _may_answer(self, client: _Client) -> bool:
        return len(client.unsent) < _ENOUGH_UNSENT and client.waiting < MAX_WAITING // 4 and not client.closing

    def _reply(self, client: _Client, line: bytes) -> None:
        if not client.unsent:
            client.sent = time.monotonic()
        client.unsent += line
        self._send(client)

    def _send(self, client: _Client) -> None:
        try:
            count = client.socket.send(client.unsent)
        except BlockingIOError:
            count = 0
        except OSError:
            self._drop(client)
            return
        if count:
            del client.unsent[:count]
            client.sent = time.monotonic()
        if len(client.unsent) > MAX_UNSENT:
            self._drop(client)
        else:
            self._watch(client)

    def _watch(self, client: _Client) -> None:
        """Read on while its lines are few; write while there is something to write; let it go when all is said."""
        if client.done:
            self._drop(client)
            return
        silent = client.closing or client.ended or len(client.lines) >= MAX_WAITING
        events = 0 if silent else selectors.EVENT_READ
        if client.unsent:
            events |= selectors.EVENT_WRITE
        try:
            known = self._selector.get_key(client.socket)
        except KeyError:
            if events:
                self._selector.register(client.socket, events, client)
            return
        if not events:
            self._selector.unregister(client.socket)
        elif known.events != events:
            self._selector.modify(client.socket, events, client)

    def _end(self, client: _Client, error: RpcError) -> None:
        """Say why, and close when that is sent: what comes behind cannot be told apart."""
        client.lines.clear()
        client.inbox.clear()
        client.closing = True
        self._reply(client, failure(None, error))

    def _expire(self) -> None:
        now = time.monotonic()
        for client in list(self._clients.values()):
            if client.unsent and now - client.sent > SEND_TIMEOUT_S:
                self._drop(client)
        if self._accept_again and now >= self._accept_again:
            self._accept_again = 0.0
            self._selector.register(self._socket, selectors.EVENT_READ)

    def _drop(self, client: _Client) -> None:
        number = client.socket.fileno()
        if number < 0:
            return
        with suppress(KeyError, ValueError):
            self._selector.unregister(client.socket)
        self._clients.pop(number, None)
        client.socket.close()


def socket_address(path: Path, directory: int) -> str:
    """Return an address for a socket at `path`; `directory`: a descriptor of the directory that it is in."""
    text = str(path)
    return text if len(os.fsencode(text)) < _DIRECT_PATH else f"/proc/self/fd/{directory}/{path.name}"
