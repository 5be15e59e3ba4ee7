"""A control node of a few methods of the tests' own, and clients without manners."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyhyve.base.errors import UsageError
from pyhyve.bhyve.control.rpc import Method, Parameter
from pyhyve.bhyve.control.server import ControlNode

TIMEOUT_S = 30.0


class Wire:
    """A connection, by bytes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(str(path))
        self.reader = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def line(self) -> dict:
        line = self.reader.readline()
        assert line.endswith(b"\n"), line
        return json.loads(line)

    def ask(self, method: str, **params: object) -> dict:
        document = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        self.send(json.dumps(document).encode() + b"\n")
        return self.line()

    def ended(self) -> bool:
        """Wait for the other side to close."""
        try:
            return self.reader.read(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.reader.close()
        self.socket.close()


class Served:
    """The node, and what its methods were called with."""

    def __init__(self, directory: Path) -> None:
        self.calls: list[object] = []
        self.gate = threading.Event()
        self.pauses: list[tuple[float, float]] = []
        self.node = ControlNode(
            directory,
            "web",
            {
                "add": Method(self.add, "adds", {"a": Parameter(int, "a"), "b": Parameter(int, "b")}),
                "big": Method(lambda size=0: {"data": "x" * size}, "much", {"size": Parameter(int, "bytes")}),
                "echo": Method(lambda text="": {"text": text}, "says it", {"text": Parameter(str, "text")}),
                "fail": Method(self.fail, "fails"),
                "odd": Method(lambda: {"data": object()}, "answers what is no JSON"),
                "refuse": Method(self.refuse, "refuses"),
                "stop": Method(self.stop, "stops the guest", pauses=True),
            },
        )
        self.node.start()

    def add(self, a: int = 0, b: int = 0) -> dict:
        self.calls.append((a, b))
        return {"sum": a + b}

    def fail(self) -> object:
        raise ZeroDivisionError("a bug\nof two lines")

    def refuse(self) -> object:
        raise UsageError("not today")

    def stop(self) -> dict:
        began = time.monotonic()
        time.sleep(0.01)
        self.pauses.append((began, time.monotonic()))
        return {}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    assert made.node._thread.is_alive(), "a client has ended the node's thread"
    made.node.close()
    assert not made.node.path.exists()


@pytest.fixture
def connect(served: Served) -> Iterator[Callable[[], Wire]]:
    made: list[Wire] = []

    def connect_one() -> Wire:
        made.append(Wire(served.node.path))
        return made[-1]

    yield connect_one
    for wire in made:
        wire.close()
