"""pyhyve completion: completion scripts, made from the parsers themselves."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pyhyve.base.parser import Namespace, Parser
from pyhyve.bhyve.config import CPU_SETTINGS
from pyhyve.bhyve.lpc.options import LPC_DEVICES
from pyhyve.vmm.cpufeatures import FEATURES

SUMMARY: Final = "Print a completion script: pyhyve completion bash > ~/.local/share/bash-completion/completions/pyhyve"

_SHELLS: Final = ("bash", "zsh", "fish")
_CONSOLES: Final = ("stdio", "pty", "file:", "none")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("shell", choices=_SHELLS, help="the shell to complete in")


@dataclass(frozen=True, slots=True)
class Argument:
    """An option (or, without `names`, a positional argument): what it takes and what it is for."""

    names: tuple[str, ...]
    help: str
    takes_value: bool
    is_file: bool
    choices: tuple[str, ...]


def describe(parser: Parser) -> list[Argument]:
    """Return what a parser takes."""
    return [_argument(action) for action in parser.options()]


def _argument(action: argparse.Action) -> Argument:
    choices = tuple(str(choice) for choice in action.choices or ())
    if "--console" in action.option_strings:
        choices = _CONSOLES
    if "--cpus" in action.option_strings:
        choices = tuple(f"{name}=" for name in CPU_SETTINGS)
    if "--lpc" in action.option_strings:
        choices = (*LPC_DEVICES, "help")
    if "--cpu-feature" in action.option_strings:
        choices = (*(f"{name}={state}" for name in FEATURES for state in ("on", "off")), "help")
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    return Argument(
        names=tuple(action.option_strings),
        help=text,
        takes_value=action.nargs != 0,
        is_file=action.metavar == "FILE",
        choices=choices,
    )


def run(arguments: Namespace) -> int:
    from pyhyve.cli.main import VERBS, verb_parser

    verbs = {name: describe(verb_parser(name)) for name in VERBS}
    print({"bash": bash, "zsh": zsh, "fish": fish}[arguments.shell](VERBS, verbs), end="")
    return 0


def bash(summaries: dict[str, str], verbs: dict[str, list[Argument]]) -> str:
    """Return the script for bash."""
    lines = [
        "# bash completion for pyhyve",
        "_pyhyve() {",
        "\tlocal current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} verb=${COMP_WORDS[1]}",
        "\tif ((COMP_CWORD == 1)); then",
        f'\t\tmapfile -t COMPREPLY < <(compgen -W "{" ".join(summaries)} --help --version" -- "$current")',
        "\t\treturn",
        "\tfi",
        '\tcase "$verb $previous" in',
    ]
    for verb, options in verbs.items():
        for option in options:
            if option.names and option.takes_value:
                patterns = "|".join(f'"{verb} {name}"' for name in option.names)
                action = "-f" if option.is_file else f'-W "{" ".join(option.choices)}"'
                lines.append(f'\t{patterns}) mapfile -t COMPREPLY < <(compgen {action} -- "$current"); return ;;')
    lines += ["\tesac", '\tcase "$verb" in']
    for verb, options in verbs.items():
        words = [name for option in options for name in option.names]
        words += [choice for option in options if not option.names for choice in option.choices]
        lines.append(f'\t{verb}) mapfile -t COMPREPLY < <(compgen -W "{" ".join(words)}" -- "$current") ;;')
    lines += ["\tesac", "}", "complete -o filenames -F _pyhyve pyhyve", ""]
    return "\n".join(lines)


def _quote(text: str) -> str:
    return text.replace("'", "'\\''")


def zsh(summaries: dict[str, str], verbs: dict[str, list[Argument]]) -> str:
    """Return the script for zsh."""

    def bracket(text: str) -> str:
        return _quote(text).replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")

    def specs(options: Iterable[Argument]) -> Iterable[str]:
        for position, option in enumerate(options, 1):
            values = "_files" if option.is_file else f"({' '.join(option.choices)})" if option.choices else ""
            if not option.names:
                yield f"'{position}:{bracket(option.help)}:{values}'"
                continue
            for name in option.names:
                yield f"'{name}[{bracket(option.help)}]{f':value:{values}' if option.takes_value else ''}'"

    lines = ["#compdef pyhyve", "_pyhyve() {", "  local -a verbs=("]
    lines += [f"    '{name}:{_quote(summary)}'" for name, summary in summaries.items()]
    lines += ["  )", "  if ((CURRENT == 2)); then", "    _describe verb verbs", "    return", "  fi"]
    lines += ["  local verb=$words[2]", "  shift words", "  ((CURRENT--))", "  case $verb in"]
    for verb, options in verbs.items():
        positionals = [option for option in options if not option.names]
        named = [option for option in options if option.names]
        joined = " ".join([*specs(positionals), *specs(named)])
        lines.append(f"    {verb}) _arguments {joined} ;;")
    lines += ["  esac", "}", "compdef _pyhyve pyhyve", ""]
    return "\n".join(lines)


def fish(summaries: dict[str, str], verbs: dict[str, list[Argument]]) -> str:
    """Return the script for fish."""
    lines = ["# fish completion for pyhyve", "complete -c pyhyve -f"]
    for name, summary in summaries.items():
        lines.append(f"complete -c pyhyve -n __fish_use_subcommand -a {name} -d '{_quote(summary)}'")
    for verb, options in verbs.items():
        condition = f"-n '__fish_seen_subcommand_from {verb}'"
        for option in options:
            if not option.names:
                lines.append(
                    f"complete -c pyhyve {condition} -a '{' '.join(option.choices)}' -d '{_quote(option.help)}'"
                )
                continue
            names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
            values = ""
            if option.takes_value:
                values = " -r" + (
                    " -F" if option.is_file else f" -a '{' '.join(option.choices)}'" if option.choices else ""
                )
            lines.append(f"complete -c pyhyve {condition} {names}{values} -d '{_quote(option.help)}'")
    return "\n".join(lines) + "\n"
