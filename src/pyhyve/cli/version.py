"""pyhyve version: the version, and which processors work on this host."""

from typing import Final

from pyhyve.base.parser import Namespace, Parser
from pyhyve.base.version import __version__

SUMMARY: Final = "Print the version and which processors work here."


def add_arguments(parser: Parser) -> None:
    """No arguments of its own."""


def run(arguments: Namespace) -> int:
    from pyhyve.base.errors import PyhyveError
    from pyhyve.cpu import select

    print(f"pyhyve {__version__}")
    for name in sorted(select.ENGINES):
        try:
            engine = select.processor(name)
        except PyhyveError as error:
            print(f"  {name:<5} no: {error}")
        except ImportError as error:
            print(f"  {name:<5} no: not built ({error})")
        else:
            print(f"  {name:<5} yes, up to {engine.capabilities().max_vcpus} vCPUs")
    return 0
