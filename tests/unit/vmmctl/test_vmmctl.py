"""vmmctl, `pyhyve ctl` and `pyhyve ls`: what they ask, show and refuse."""

import json
import subprocess

import pytest

from pyhyve.base.explanation import Explanation, Stage
from pyhyve.bhyve.control.rpc import Method, Parameter
from pyhyve.bhyve.control.server import ControlNode
from pyhyve.cli import main as pyhyve
from pyhyve.cli.completion import bash_alone, describe, fish_alone, zsh_alone
from pyhyve.vmmctl import main as vmmctl

PARAMETERS = {"irq": int, "vector": int, "nmi": bool, "vcpu": int}
STAGES = (Stage("pin", "held by nobody", "nothing asserts it", {"asserters": 0}), Stage("mask", "open"))


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A VM `web`; what it was asked to explain."""
    questions = []
    monkeypatch.setenv("PYHYVE_RUN_DIR", str(tmp_path))

    def explain(**question):
        questions.append(question)
        return Explanation("IRQ 4", "IRQ 4: nothing asserts it.", "pin", STAGES).as_json()

    description = {"name": "web", "pid": 7, "state": "running", "ended_by": None, "cpus": 2, "memory": 1 << 28}
    description |= {"processor": "bt", "made": 1.5, "topology": {"sockets": 2}, "host_cpus": [[0], [1]]}
    table = {
        "version": Method(lambda: {"protocol": 1}, ""),
        "describe": Method(lambda: description, ""),
        "stats": Method(lambda: {"exits": {"hlt": 12}}, ""),
        "interrupts.trace": Method(lambda on: questions.append(on) or {}, "", {"on": Parameter(bool, "")}),
        "interrupts.latency": Method(lambda: {"text": "vector 0x41: 5", "waits": {}}, ""),
        "interrupts.explain": Method(explain, "", {name: Parameter(kind, "") for name, kind in PARAMETERS.items()}),
    }
    node = ControlNode(tmp_path, "web", table)
    node.start()
    yield questions
    node.close()


TEXT = "IRQ 4: nothing asserts it.\n* pin                    held by nobody\n  mask                   open\n"


@pytest.mark.parametrize(
    ("arguments", "questions"),
    [
        (["--explain-irq", "4"], [{"irq": 4}]),
        (["--explain-irq=4", "--explain-irq=0x5"], [{"irq": 4}, {"irq": 5}]),
        (["--explain-vector", "0x31", "--cpu=1"], [{"vector": 0x31, "vcpu": 1}]),
        (["--explain-nmi"], [{"nmi": True}]),
    ],
)
def test_vmmctl_explains(asked, capsys, arguments, questions):
    assert vmmctl.main(["--vm=web", *arguments]) == 0
    assert asked == questions
    assert capsys.readouterr().out == TEXT * len(questions)


@pytest.mark.parametrize(
    ("arguments", "question"),
    [
        (["irq", "4"], {"irq": 4}),
        (["vector", "0x31", "--cpu", "1"], {"vector": 0x31, "vcpu": 1}),
        (["nmi"], {"nmi": True}),
    ],
)
def test_ctl_explains(asked, capsys, arguments, question):
    assert pyhyve.main(["ctl", "web", "explain", *arguments]) == 0
    assert asked == [question]
    assert capsys.readouterr().out == TEXT


def test_json(asked, capsys):
    assert vmmctl.main(["--vm=web", "--explain-irq", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["held_by"] == "pin"
    assert document["stages"][0]["registers"] == {"asserters": 0}


def test_statistics_and_description(asked, capsys):
    assert vmmctl.main(["--vm=web", "--get-stats"]) == 0
    assert capsys.readouterr().out.split() == ["exits:", "hlt", "12"]
    assert pyhyve.main(["ctl", "web", "stats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"exits": {"hlt": 12}}
    assert pyhyve.main(["ctl", "web", "describe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cpus"] == 2
    assert pyhyve.main(["ctl", "web", "describe"]) == 0
    assert "state       running" in capsys.readouterr().out


def test_traces(asked, capsys):
    assert vmmctl.main(["--vm=web", "--trace-interrupts=on", "--get-interrupt-latency"]) == 0
    assert capsys.readouterr().out == "vector 0x41: 5\n"
    assert pyhyve.main(["ctl", "web", "trace", "off"]) == 0
    assert asked == [True, False]
    assert pyhyve.main(["ctl", "web", "latency", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"waits": {}}


def test_ls(asked, capsys):
    assert pyhyve.main(["ls"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["NAME", "web"]
    assert pyhyve.main(["ls", "--quiet"]) == 0
    assert capsys.readouterr().out == "web\n"
    assert pyhyve.main(["ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["pid"] == 7


def test_ls_of_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYHYVE_RUN_DIR", str(tmp_path))
    assert pyhyve.main(["ls"]) == 0
    assert pyhyve.main(["ls", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--vm: missing; name a VM, as 'pyhyve ls' lists them"),
        (["--vm=web"], "nothing is asked; add for instance --explain-irq 4 or --get-stats"),
        (["--vm=wep", "--explain-irq", "4"], "wep: no VM of this name is running; did you mean 'web'?; there is web"),
        (["--vm=web", "--explain-irq", "four"], "--explain-irq four: not a number; write it like 4 or 0x31"),
        (["--vm=web", "--explain-irq", "-4"], "--explain-irq -4: not a number"),
        (["--vm=web", "--cpu", "9" * 5000, "--explain-nmi"], "--cpu 9999"),
        (["--vm=web", "--explain-irk", "4"], "--explain-irk: unknown option; did you mean '--explain-irq'?"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(asked, capsys, arguments, complaint):
    assert vmmctl.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"vmmctl: {complaint}")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["web", "explain"], "explain: write 'irq N', 'vector N' or 'nmi'"),
        (["web", "explain", "irk", "4"], "explain irk: there are irq, vector, nmi; did you mean 'irq'?"),
        (["web", "explain", "irq"], "explain irq: which one? add its number"),
        (["web", "explain", "nmi", "4"], "explain nmi: it has no number"),
        (["web", "stats", "4"], "4: unexpected argument of stats"),
        (["web", "trace"], "trace: write 'on' or 'off'"),
        (["web", "trace", "of"], "trace: write 'on' or 'off'"),
        (["web", "stat"], "action stat: unknown; did you mean 'stats'?"),
    ],
)
def test_what_a_user_of_ctl_gets_wrong_is_one_line(asked, capsys, arguments, complaint):
    assert pyhyve.main(["ctl", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pyhyve: {complaint}")
    assert error.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        vmmctl.main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("vmmctl ")


def test_completion(asked, capsys, tmp_path):
    options = describe(vmmctl.parser())
    for shell, script in (("bash", bash_alone), ("zsh", zsh_alone), ("fish", fish_alone)):
        assert pyhyve.main(["completion", shell, "vmmctl"]) == 0
        text = capsys.readouterr().out
        assert text == script("vmmctl", options)
        assert "pyhyve ls --quiet" in text
        for option in options:
            for name in option.names:
                assert name.lstrip("-") in text
    (tmp_path / "pyhyve").write_text("#!/bin/sh\necho web db\n")
    (tmp_path / "pyhyve").chmod(0o755)
    for words, expected in (
        (("vmmctl", "--vm", "w"), "web"),
        (("vmmctl", "--vm", "=", "d"), "db"),
        (("vmmctl", "--explain-v"), "--explain-vector"),
    ):
        line = " ".join(f"'{word}'" for word in words)
        code = (
            f"PATH={tmp_path}:$PATH\n{bash_alone('vmmctl', options)}\nCOMP_WORDS=({line})\n"
            "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _vmmctl; echo ${COMPREPLY[@]}"
        )
        found = subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True)
        assert found.stdout.split() == [expected]
