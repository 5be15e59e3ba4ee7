"""Whatever a client sends, the next one is served."""

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
NEAR = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | JSON,
        "id": st.integers() | JSON,
        "method": st.sampled_from(["add", "echo", "fail", "odd", "refuse", "stop", "big"]) | JSON,
        "params": st.dictionaries(st.sampled_from(["a", "b", "text", "size", "x"]), JSON, max_size=3) | JSON,
    },
)
LINES = st.one_of(
    st.binary(max_size=200),
    NEAR.map(lambda document: json.dumps(document).encode()),
    JSON.map(lambda document: json.dumps(document).encode()),
    st.integers(1, 20_000).map(lambda depth: b"[" * depth),
    st.integers(1, 100_000).map(lambda size: b"x" * size),
)
ACTIONS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["line", "half", "close", "shut"]), LINES), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_node_survives_anything(connect, served, actions):
    wires = [connect() for _ in range(3)]
    for which, action, data in actions:
        wire = wires[which]
        try:
            if action == "close":
                wire.close()
                wires[which] = connect()
            elif action == "shut":
                wire.socket.shutdown(1)
            else:
                wire.send(data + (b"\n" if action == "line" else b""))
        except OSError:
            wires[which] = connect()  # it was ended for what it had sent
    polite = connect()
    assert polite.ask("add", a=1, b=2) == {"jsonrpc": "2.0", "id": 1, "result": {"sum": 3}}
    for wire in (*wires, polite):
        wire.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=LINES.filter(lambda line: b"\n" not in line and line.strip() and len(line) < 60_000))
def test_every_line_has_at_most_one_answer_and_that_is_json_rpc(connect, served, line):
    wire = connect()
    wire.send(line + b"\n")
    wire.send(b'{"jsonrpc":"2.0","id":"last","method":"add"}\n')
    answers = [wire.line()]
    while answers[-1].get("id") != "last":
        answers.append(wire.line())
    assert len(answers) <= 2
    for answer in answers:
        assert answer["jsonrpc"] == "2.0"
        assert ("result" in answer) != ("error" in answer)
    wire.close()
