"""A client of a running VM's control node.

with Client("web") as vm:
    print(vm.describe().state)
    print(vm.explain(irq=4))
"""

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from pyhyve.base.errors import HostError, PyhyveError, UsageError
from pyhyve.base.explanation import Explanation
from pyhyve.base.wire import MAX_RESPONSE, METHOD_NOT_FOUND, PROTOCOL, REFUSED, request
from pyhyve.libvmm import nodes

TIMEOUT_S: Final = 30.0
_CHUNK: Final = 256 << 10


class CallError(PyhyveError):
    """The VM answered with an error; `code` is JSON-RPC's."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Description:
    """A VM, as it describes itself. state: created, running, paused or stopped; ended_by: why it stopped, or None.
    topology: sockets, cores in each, threads in each of those; host_cpus: where each virtual processor may run.
    memory: bytes; made: seconds since 1970."""

    name: str
    pid: int
    state: str
    ended_by: str | None
    cpus: int
    topology: Mapping[str, int]
    host_cpus: Sequence[Sequence[int]]
    memory: int
    processor: str
    made: float


class Client:
    """A connection to the VM of a name. UsageError or HostError, one line, where there is none. Not for two threads at
    once; a context manager that closes."""

    def __init__(self, name: str, *, timeout: float = TIMEOUT_S, directory: Path | None = None) -> None:
        self.name = name
        self._socket: socket.socket = nodes.connect(name, timeout, directory)
        self._timeout = timeout
        self._number = 0
        self._inbox = bytearray()
        try:
            self._check_version()
        except BaseException:
            self.close()
            raise

    def _check_version(self) -> None:
        protocol = self.call("version").get("protocol")
        if protocol != PROTOCOL:
            raise HostError(
                f"{self.name}: it speaks version {protocol} of the control protocol, this program {PROTOCOL}; "
                "use the pyhyve that the VM was started with"
            )

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """Call a method; parameters that are None are left out. CallError for the VM's own errors."""
        self._number += 1
        given = {name: value for name, value in params.items() if value is not None}
        try:
            self._socket.sendall(request(self._number, method, given))
            while True:
                answer = json.loads(self._line())
                # An error without an id is about the connection, not about a call.
                if answer.get("id") == self._number or ("error" in answer and answer.get("id") is None):
                    return self._unwrap(answer)
        except TimeoutError:
            raise HostError(f"{self.name}: no answer in {self._timeout:g} s") from None
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise HostError(f"{self.name}: an answer that makes no sense ({error})") from None
        except OSError as error:
            raise HostError(f"{self.name}: the connection broke ({error.strerror or error})") from None

    def _line(self) -> bytes:
        while (end := self._inbox.find(b"\n")) < 0:
            data = self._socket.recv(_CHUNK)
            if not data:
                raise HostError(f"{self.name}: the VM has closed the connection: it has ended")
            self._inbox += data
            if len(self._inbox) > MAX_RESPONSE + _CHUNK:
                raise HostError(f"{self.name}: an answer of more than {MAX_RESPONSE} bytes")
        line = bytes(self._inbox[:end])
        del self._inbox[: end + 1]
        return line

    @staticmethod
    def _unwrap(answer: Mapping[str, Any]) -> dict[str, Any]:
        error = answer.get("error")
        if error is None:
            value = answer["result"]
            if not isinstance(value, dict):
                raise TypeError("the result is no object")
            return value
        code, message = int(error["code"]), str(error["message"])
        if code == REFUSED:
            raise UsageError(message)
        if code == METHOD_NOT_FOUND:
            message = f"{message}; the VM was started with an older pyhyve"
        raise CallError(code, message)

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    # -- methods -------------------------------------------------------------------------------------------------------

    def capabilities(self) -> dict[str, Any]:
        """Return the methods, their parameters, and the limits of the node."""
        return self.call("capabilities")

    def describe(self) -> Description:
        answer = self.call("describe")
        try:
            return Description(**{name: answer[name] for name in Description.__slots__})
        except KeyError as error:
            raise HostError(f"{self.name}: its description lacks {error}") from None

    def statistics(self) -> dict[str, Any]:
        """Return exits by reason, times, the processor's counters, and what the guest touched in vain."""
        return self.call("stats")

    def explain(
        self, irq: int | None = None, *, vector: int | None = None, nmi: bool = False, vcpu: int | None = None
    ) -> Explanation:
        """Say which stage of its way holds an interrupt: one of `irq`, `vector` and `nmi`."""
        answer = self.call("interrupts.explain", irq=irq, vector=vector, nmi=nmi or None, vcpu=vcpu)
        try:
            return Explanation.from_json(answer)
        except ValueError as error:
            raise HostError(f"{self.name}: {error}") from None

    def trace_interrupts(self, on: bool) -> None:
        """Begin a trace of interrupts (unless there is one), or end it; what it has stays."""
        self.call("interrupts.trace", on=on)

    def interrupt_latency(self) -> dict[str, Any]:
        """Return the latencies of the present or last trace, by vector, times in ns; `text`: the same for people.
        UsageError if there has been no trace."""
        return self.call("interrupts.latency")


def running(timeout: float = 2.0, directory: Path | None = None) -> list[Description]:
    """Return all VMs of this user that answer, by name; nodes of killed ones are removed on the way."""
    found = []
    for name in nodes.names(directory):
        try:
            with Client(name, timeout=timeout, directory=directory) as client:
                found.append(client.describe())
        except PyhyveError:
            continue
    return found
