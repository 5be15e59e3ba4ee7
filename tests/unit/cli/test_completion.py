"""Completion scripts: made from the parsers, and taken by the shells."""

import shutil
import subprocess

import pytest

from pyhyve.cli.completion import bash, describe, fish, zsh
from pyhyve.cli.main import VERBS, main, verb_parser

SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}


def script(shell):
    return SCRIPTS[shell](VERBS, {name: describe(verb_parser(name)) for name in VERBS})


def test_options_are_described_from_the_parser():
    options = {name: option for option in describe(verb_parser("run")) for name in option.names}
    assert options["--kernel"].is_file
    assert options["--processor"].choices == ("auto", "bt", "kvm")
    assert options["--console"].choices == ("stdio", "pty", "file:", "none")
    assert not options["--json"].takes_value
    assert options["-m"] is options["--memory"]
    assert "%" not in options["--memory"].help


@pytest.mark.parametrize("shell", SCRIPTS)
def test_every_verb_and_option_is_in_the_script(shell, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert text == script(shell)
    for verb in VERBS:
        assert verb in text
        for option in describe(verb_parser(verb)):
            for name in option.names:
                assert (name if shell != "fish" else name.lstrip("-")) in text


@pytest.mark.parametrize("shell", SCRIPTS)
def test_shell_takes_the_script(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "script"
    path.write_text(script(shell))
    subprocess.run([shell, "-n", str(path)], check=True)


def complete(*words):
    """Return what bash offers for the last of these words."""
    line = " ".join(f"'{word}'" for word in words)
    code = (
        f"{script('bash')}\nCOMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _pyhyve; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    found = subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True)
    return found.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_verbs_options_and_values(tmp_path, monkeypatch):
    assert complete("pyhyve", "de") == ["demo"]
    assert complete("pyhyve", "run", "--ker") == ["--kernel"]
    assert complete("pyhyve", "run", "--processor", "k") == ["kvm"]
    assert complete("pyhyve", "image", "f") == ["fetch"]
    assert complete("pyhyve", "completion", "z") == ["zsh"]
    (tmp_path / "vmlinuz").write_text("")
    monkeypatch.chdir(tmp_path)
    assert complete("pyhyve", "run", "--kernel", "vm") == ["vmlinuz"]
