"""The control node and its clients: polite, slow, broken and hostile ones."""

import contextlib
import json
import os
import socket
import stat
import time

import pytest
from wires import Wire

from pyhyve.base.errors import HostError
from pyhyve.base.wire import (
    BUSY,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    MAX_REQUEST,
    METHOD_NOT_FOUND,
    NOT_YOURS,
    PARSE_ERROR,
    REFUSED,
)
from pyhyve.bhyve.control import server
from pyhyve.bhyve.control.server import ControlNode


def code(answer):
    assert answer["jsonrpc"] == "2.0"
    assert "\n" not in answer["error"]["message"]
    return answer["error"]["code"]


def test_call_and_answer(connect):
    assert connect().ask("add", a=2, b=3) == {"jsonrpc": "2.0", "id": 1, "result": {"sum": 5}}


def test_ids_come_back_as_they_were(connect):
    wire = connect()
    for number in ("a", 7, 1.5, None):
        wire.send(json.dumps({"jsonrpc": "2.0", "id": number, "method": "echo"}).encode() + b"\n")
        assert wire.line()["id"] == number


def test_notification_has_no_answer(connect, served):
    wire = connect()
    wire.send(b'{"jsonrpc":"2.0","method":"add","params":{"a":9}}\n')
    wire.send(b'{"jsonrpc":"2.0","method":"nonsense"}\n')
    assert wire.ask("add", a=1)["result"] == {"sum": 1}
    assert served.calls == [(9, 0), (1, 0)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"nonsense", PARSE_ERROR),
        (b"{", PARSE_ERROR),
        (b"\xff\xfe", PARSE_ERROR),
        (b"[" * 30_000, PARSE_ERROR),
        (b'{"a":' * 10_000, PARSE_ERROR),
        (b"1" * 10_000, PARSE_ERROR),
        (b'{"id": NaN}', PARSE_ERROR),
        (b"[]", INVALID_REQUEST),
        (b"4", INVALID_REQUEST),
        (b"{}", INVALID_REQUEST),
        (b'{"jsonrpc":"1.0","id":1,"method":"add"}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","id":1,"method":4}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","id":[1],"method":"add"}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","id":true,"method":"add"}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","id":"' + b"x" * 5000 + b'","method":"add"}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","id":1,"method":"ad"}', METHOD_NOT_FOUND),
        (b'{"jsonrpc":"2.0","id":1,"method":"__class__"}', METHOD_NOT_FOUND),
        (b'{"jsonrpc":"2.0","id":1,"method":"add","params":[1]}', INVALID_PARAMS),
        (b'{"jsonrpc":"2.0","id":1,"method":"add","params":{"c":1}}', INVALID_PARAMS),
        (b'{"jsonrpc":"2.0","id":1,"method":"add","params":{"a":"1"}}', INVALID_PARAMS),
        (b'{"jsonrpc":"2.0","id":1,"method":"add","params":{"a":true}}', INVALID_PARAMS),
        (b'{"jsonrpc":"2.0","id":1,"method":"refuse"}', REFUSED),
        (b'{"jsonrpc":"2.0","id":1,"method":"fail"}', INTERNAL_ERROR),
        (b'{"jsonrpc":"2.0","id":1,"method":"odd"}', INTERNAL_ERROR),
        (b'{"jsonrpc":"2.0","id":1,"method":"big","params":{"size":20000000}}', INTERNAL_ERROR),
    ],
)
def test_bad_request_is_answered_and_the_connection_goes_on(connect, line, expected):
    wire = connect()
    wire.send(line + b"\n")
    assert code(wire.line()) == expected
    assert "result" in wire.ask("add")


def test_suggestions(connect):
    wire = connect()
    assert "did you mean 'add'" in wire.ask("ad")["error"]["message"]
    assert "did you mean 'text'" in wire.ask("echo", txt="a")["error"]["message"]


def test_line_that_is_too_long_ends_the_connection_only(connect):
    wire, other = connect(), connect()
    try:
        for _ in range(10 << 20 >> 16):  # 10 MiB
            wire.send(b"x" * (1 << 16))
    except (BrokenPipeError, ConnectionResetError):
        pass
    with contextlib.suppress(ConnectionResetError):  # it may have been too busy sending to be told why
        assert code(wire.line()) == INVALID_REQUEST
    assert wire.ended()
    assert "result" in other.ask("add")


def test_longest_line_passes(connect):
    text = "x" * (MAX_REQUEST - 100)
    assert connect().ask("echo", text=text)["result"]["text"] == text


def test_request_in_pieces(connect):
    wire = connect()
    for byte in b'{"jsonrpc":"2.0","id":1,"method":"add","params":{"a":4}}\r\n':
        wire.send(bytes([byte]))
    assert wire.line()["result"] == {"sum": 4}


def test_many_requests_in_one_piece(connect):
    wire = connect()
    wire.send(b'{"jsonrpc":"2.0","id":1,"method":"add"}\n' * 500)
    for _ in range(500):
        assert wire.line()["result"] == {"sum": 0}


def test_client_that_asks_and_closes_its_side_gets_its_answers(connect):
    wire = connect()
    wire.send(b'{"jsonrpc":"2.0","id":1,"method":"add"}\n{"jsonrpc":"2.0","id":2,"method":"stop"}\n{"half')
    wire.socket.shutdown(socket.SHUT_WR)
    assert [wire.line()["id"] for _ in range(2)] == [1, 2]
    assert wire.ended()


def test_client_that_goes_in_the_middle(connect):
    for data in (b"", b'{"jsonrpc"', b'{"jsonrpc":"2.0","id":1,"method":"stop"}\n' * 10):
        wire = connect()
        wire.send(data)
        wire.close()
    assert "result" in connect().ask("add")


def test_client_that_never_reads_keeps_nobody_waiting(connect, served, monkeypatch):
    monkeypatch.setattr(server, "SEND_TIMEOUT_S", 0.3)
    slow = connect()
    slow.socket.settimeout(0.2)
    line = b'{"jsonrpc":"2.0","id":1,"method":"big","params":{"size":100000}}\n'
    try:
        while True:
            slow.send(line)
    except TimeoutError:
        pass
    quick = connect()
    for _ in range(100):
        assert "result" in quick.ask("add")
    unsent = sum(len(client.unsent) for client in served.node._clients.values())
    assert unsent < 1 << 20, "answers that nobody takes must not pile up"
    deadline = time.monotonic() + 20
    while len(served.node._clients) > 1:
        assert time.monotonic() < deadline, "it was not given up"
        quick.ask("add")


def test_one_client_too_many_takes_the_place_of_the_most_silent(connect):
    wires = [connect() for _ in range(server.MAX_CLIENTS)]
    for wire in wires:
        assert "result" in wire.ask("add")
    assert "result" in wires[0].ask("add")  # so that the second is the most silent
    assert "result" in connect().ask("add")
    assert wires[1].ended()
    assert "result" in wires[0].ask("add")


def test_calls_that_stop_the_guest_leave_it_most_of_the_time(connect, served):
    wires = [connect() for _ in range(3)]
    for wire in wires:
        wire.send(b'{"jsonrpc":"2.0","id":1,"method":"stop"}\n' * 4)
    for wire in wires:
        for _ in range(4):
            assert "result" in wire.line()
    assert len(served.pauses) == 12
    for (began, ended), (again, _) in zip(served.pauses, served.pauses[1:], strict=False):
        assert again - ended >= 8 * (ended - began)


def test_flood_of_calls_that_stop_the_guest_is_refused(connect):
    wires = [connect() for _ in range(8)]
    for wire in wires:
        wire.send(b'{"jsonrpc":"2.0","id":1,"method":"stop"}\n' * 16)
    errors = 0
    for wire in wires:
        for _ in range(16):
            answer = wire.line()
            errors += "error" in answer
            assert "result" in answer or code(answer) == BUSY
    assert errors > 0


def test_node_is_its_owners_alone(served):
    status = served.node.path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert stat.S_IMODE(served.node.path.parent.stat().st_mode) == 0o700


def test_another_user_is_refused(connect, monkeypatch):
    owner = os.geteuid() + 1
    monkeypatch.setattr(server.os, "geteuid", lambda: owner)
    monkeypatch.setattr(server, "_TRUSTED", ())
    wire = connect()
    assert code(wire.line()) == NOT_YOURS
    assert wire.ended()


def test_node_left_behind_is_taken_over(tmp_path, served):
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(tmp_path / "vmm" / "db"))
    dead.close()
    node = ControlNode(tmp_path, "db", {})
    node.start()
    node.close()
    node.close()
    assert not (tmp_path / "vmm" / "db").exists()


def test_node_of_another_is_not_removed(tmp_path):
    first = ControlNode(tmp_path, "web", {})
    second = ControlNode(tmp_path, "web", {})
    first.close()
    assert second.path.exists()
    second.close()


def test_long_path(tmp_path):
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    node = ControlNode(directory, "web", {})
    assert node.path.is_socket()
    node.close()
    assert not node.path.exists()


def test_place_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "vmm").write_text("")
    with pytest.raises(HostError, match="cannot make the control node"):
        ControlNode(tmp_path, "web", {})


def test_bug_of_the_node_costs_its_clients_only(tmp_path, monkeypatch):
    node = ControlNode(tmp_path, "web", {})
    node.start()
    first = Wire(node.path)
    monkeypatch.setattr(node, "_serve", lambda client, events: 1 // 0)
    first.send(b"{}\n")
    assert first.ended()
    monkeypatch.undo()
    second = Wire(node.path)
    assert code(second.ask("nothing")) == METHOD_NOT_FOUND
    assert node.failures == 1
    first.close()
    second.close()
    node.close()
