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
_COMMANDS: Final = ("pyhyve", "vmmctl")
_VM_NAMES: Final = "pyhyve ls --quiet 2>/dev/null"
_CONSOLES: Final = ("stdio", "pty", "file:", "none")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("shell", choices=_SHELLS, help="the shell to complete in")
    parser.add_argument(
        "command", choices=_COMMANDS, nargs="?", default="pyhyve", help="the command to complete (%(default)s)"
    )


@dataclass(frozen=True, slots=True)
class Argument:
    """An option (or, without `names`, a positional argument): what it takes and what it is for."""

    names: tuple[str, ...]
    help: str
    takes_value: bool
    is_file: bool
    is_vm: bool
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
        is_vm=action.metavar == "VM",
        choices=choices,
    )


def run(arguments: Namespace) -> int:
    if arguments.command == "vmmctl":
        from pyhyve.vmmctl.main import parser

        print(_ALONE[arguments.shell]("vmmctl", describe(parser())), end="")
        return 0
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
                lines.append(f"\t{patterns}) {_bash_values(option)}; return ;;")
    lines += ["\tesac", '\tcase "$verb" in']
    for verb, options in verbs.items():
        words = [name for option in options for name in option.names]
        words += [choice for option in options if not option.names for choice in option.choices]
        words += [f"$({_VM_NAMES})" for option in options if not option.names and option.is_vm]
        lines.append(f'\t{verb}) mapfile -t COMPREPLY < <(compgen -W "{" ".join(words)}" -- "$current") ;;')
    lines += ["\tesac", "}", "complete -o filenames -F _pyhyve pyhyve", ""]
    return "\n".join(lines)


def bash_alone(command: str, options: list[Argument]) -> str:
    """Return the script for bash, of a command without verbs."""
    lines = [
        f"# bash completion for {command}",
        f"_{command}() {{",
        "\tlocal current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}",
        # COMP_WORDBREAKS has "=": --vm=web are three words.
        "\t[[ $current == = ]] && current=",
        "\t[[ $previous == = ]] && previous=${COMP_WORDS[COMP_CWORD-2]}",
        '\tcase "$previous" in',
    ]
    for option in options:
        if option.takes_value:
            lines.append(f"\t{'|'.join(option.names)}) {_bash_values(option)}; return ;;")
    words = " ".join(name for option in options for name in option.names)
    lines += ["\tesac", f'\tmapfile -t COMPREPLY < <(compgen -W "{words}" -- "$current")']
    lines += ["}", f"complete -F _{command} {command}", ""]
    return "\n".join(lines)


def _bash_values(option: Argument) -> str:
    words = f"$({_VM_NAMES})" if option.is_vm else " ".join(option.choices)
    action = "-f" if option.is_file else f'-W "{words}"'
    return f'mapfile -t COMPREPLY < <(compgen {action} -- "$current")'


def _quote(text: str) -> str:
    return text.replace("'", "'\\''")


def _zsh_text(text: str) -> str:
    return _quote(text).replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")


def _zsh_specs(options: Iterable[Argument]) -> Iterable[str]:
    """What _arguments takes."""
    for position, option in enumerate(options, 1):
        values = "_files" if option.is_file else f"({' '.join(option.choices)})" if option.choices else ""
        if option.is_vm:
            values = f"{{compadd -- $({_VM_NAMES})}}"
        if not option.names:
            yield f"'{position}:{_zsh_text(option.help)}:{values}'"
            continue
        for name in option.names:
            yield f"'{name}[{_zsh_text(option.help)}]{f':value:{values}' if option.takes_value else ''}'"


def zsh(summaries: dict[str, str], verbs: dict[str, list[Argument]]) -> str:
    """Return the script for zsh."""

    lines = ["#compdef pyhyve", "_pyhyve() {", "  local -a verbs=("]
    lines += [f"    '{name}:{_quote(summary)}'" for name, summary in summaries.items()]
    lines += ["  )", "  if ((CURRENT == 2)); then", "    _describe verb verbs", "    return", "  fi"]
    lines += ["  local verb=$words[2]", "  shift words", "  ((CURRENT--))", "  case $verb in"]
    for verb, options in verbs.items():
        positionals = [option for option in options if not option.names]
        named = [option for option in options if option.names]
        joined = " ".join([*_zsh_specs(positionals), *_zsh_specs(named)])
        lines.append(f"    {verb}) _arguments {joined} ;;")
    lines += ["  esac", "}", "compdef _pyhyve pyhyve", ""]
    return "\n".join(lines)


def zsh_alone(command: str, options: list[Argument]) -> str:
    """Return the script for zsh, of a command without verbs."""
    specs = " ".join(_zsh_specs(options))
    return f"#compdef {command}\n_{command}() {{\n  _arguments {specs}\n}}\ncompdef _{command} {command}\n"


def fish(summaries: dict[str, str], verbs: dict[str, list[Argument]]) -> str:
    """Return the script for fish."""
    lines = ["# fish completion for pyhyve", "complete -c pyhyve -f"]
    for name, summary in summaries.items():
        lines.append(f"complete -c pyhyve -n __fish_use_subcommand -a {name} -d '{_quote(summary)}'")
    for verb, options in verbs.items():
        condition = f"-n '__fish_seen_subcommand_from {verb}'"
        for option in options:
            lines.append(f"complete -c pyhyve {condition} {_fish_spec(option)}")
    return "\n".join(lines) + "\n"


def _fish_spec(option: Argument) -> str:
    values = f"({_VM_NAMES})" if option.is_vm else " ".join(option.choices)
    text = f"-d '{_quote(option.help)}'"
    if not option.names:
        return f"-a '{values}' {text}"
    names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
    takes = ""
    if option.takes_value:
        takes = " -r" + (" -F" if option.is_file else f" -a '{values}'" if values else "")
    return f"{names}{takes} {text}"


def fish_alone(command: str, options: list[Argument]) -> str:
    """Return the script for fish, of a command without verbs."""
    lines = [f"# fish completion for {command}", f"complete -c {command} -f"]
    lines += [f"complete -c {command} {_fish_spec(option)}" for option in options]
    return "\n".join(lines) + "\n"


_ALONE: Final = {"bash": bash_alone, "zsh": zsh_alone, "fish": fish_alone}
