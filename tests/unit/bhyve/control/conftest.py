"""A control node of a few methods of the tests' own, and clients without manners."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from wires import Wire

from pyhyve.base.errors import UsageError
from pyhyve.bhyve.control.rpc import Method, Parameter
from pyhyve.bhyve.control.server import ControlNode


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
    assert made.node.failures == 0
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
