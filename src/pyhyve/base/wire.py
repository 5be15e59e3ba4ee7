"""The control protocol, as both ends need it: JSON-RPC 2.0, one object a line, UTF-8, on a Unix socket.

https://www.jsonrpc.org/specification; docs/design/control.md has the methods and the limits.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

PROTOCOL: Final = 1
"""Raised by a change that an older client or server would not understand; new methods and results are none."""
MAX_REQUEST: Final = 64 << 10
"""Bytes of a request's line, with its end."""
MAX_RESPONSE: Final = 16 << 20

# "Error object", and from -32000 on our own.
PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
REFUSED: Final = -32000
"""What was asked cannot be: `message` is a line for the user."""
NOT_YOURS: Final = -32001
BUSY: Final = -32002

NODES: Final = "vmm"
"""The directory of control nodes, in the run directory."""

Id = str | int | float | None


class RpcError(Exception):
    """An error object: `message` is one line."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def node_path(directory: Path, name: str) -> Path:
    """Where the control node of a VM is."""
    return directory / NODES / name


def decode(line: bytes) -> object:
    """Parse a line. RpcError for what is no JSON, or JSON that nobody sends in earnest (depth, digits, NaN)."""
    try:
        return json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        text = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise RpcError(PARSE_ERROR, f"not JSON: {text.splitlines()[0][:200]}") from None


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def encode(document: Mapping[str, Any]) -> bytes:
    """Return a line for an object. ASCII, so that no reader can take a part of a character for an end of line."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def request(number: int, method: str, params: Mapping[str, Any]) -> bytes:
    return encode({"jsonrpc": "2.0", "id": number, "method": method, "params": dict(params)})


def result(number: Id, value: object) -> bytes:
    return encode({"jsonrpc": "2.0", "id": number, "result": value})


def failure(number: Id, error: RpcError) -> bytes:
    return encode({"jsonrpc": "2.0", "id": number, "error": {"code": error.code, "message": error.message}})
