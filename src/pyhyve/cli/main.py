"""The command `pyhyve`: finds the verb, and turns what goes wrong into one line and an exit status.

Only what is needed is imported: `pyhyve --help` answers in 0.1 s. A verb is a module of this package with `SUMMARY`,
`add_arguments(parser)` and `run(arguments)`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final, Protocol, cast

from pyhyve.base.command import USER_ERROR, run_command
from pyhyve.base.errors import UsageError
from pyhyve.base.parser import Namespace, Parser, did_you_mean
from pyhyve.base.version import __version__

VERBS: Final = {
    "run": "boot a Linux kernel in a virtual machine",
    "demo": "get a guest and boot it: a shell, or a tour where there is no terminal",
    "ls": "list the running virtual machines",
    "ctl": "ask a running virtual machine",
    "trace": "make something of a file of --trace-file",
    "image": "fetch, list and remove guest images",
    "completion": "print a completion script for bash, zsh or fish",
    "version": "print the version and which processors work here",
}


class Verb(Protocol):
    """What a verb's module has."""

    SUMMARY: str

    def add_arguments(self, parser: Parser) -> None: ...

    def run(self, arguments: Namespace) -> int: ...


def verb_module(name: str) -> Verb:
    return cast(Verb, import_module(f"pyhyve.cli.{name}"))


def verb_parser(name: str) -> Parser:
    """Return the parser of a verb's own arguments."""
    module = verb_module(name)
    parser = Parser(prog=f"pyhyve {name}", description=module.SUMMARY)
    module.add_arguments(parser)
    return parser


def top_parser() -> Parser:
    """Return the parser of what stands before the verb."""
    verbs = "\n".join(f"  {name:<12} {summary}" for name, summary in VERBS.items())
    parser = Parser(
        prog="pyhyve",
        usage="pyhyve [-h] [--version] VERB ...",
        description="bhyve, rebuilt in Python: virtual machines on a software processor, or on the host's.",
        epilog=f"verbs:\n{verbs}\n\n'pyhyve VERB --help' tells about a verb.",
    )
    parser.add_argument("--version", action="version", version=f"pyhyve {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_command("pyhyve", _dispatch, argv)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        parser = top_parser()
        parser.parse_args(arguments)
        parser.print_help()
        return USER_ERROR
    verb, *rest = arguments
    if verb not in VERBS:
        raise UsageError(f"{verb}: no such verb{did_you_mean(verb, VERBS)}; there are {', '.join(VERBS)}")
    parser = verb_parser(verb)
    return verb_module(verb).run(parser.parse_args(rest))


if __name__ == "__main__":
    sys.exit(main())
