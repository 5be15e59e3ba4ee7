"""A connection by bytes: for clients without manners."""

import json
import socket
from pathlib import Path

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
