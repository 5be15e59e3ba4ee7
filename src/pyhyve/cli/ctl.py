"""pyhyve ctl: ask a running virtual machine."""

from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.base.parser import Namespace, Parser

SUMMARY: Final = "Ask a running virtual machine: 'pyhyve ctl web explain irq 4', 'pyhyve ctl web stats'."
_ACTIONS: Final = ("describe", "explain", "latency", "stats", "trace")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="VM", help="the VM's name, as 'pyhyve ls' lists it")
    parser.add_argument("action", choices=_ACTIONS, help="what to ask")
    parser.add_argument("what", nargs="*", help="of explain: irq N, vector N or nmi; of trace: on or off")
    parser.add_argument("--cpu", metavar="N", help="look at this virtual processor only")
    parser.add_argument("--json", action="store_true", help="answer in JSON")


def run(arguments: Namespace) -> int:
    from pyhyve.libvmm.client import Client
    from pyhyve.vmmctl.actions import describe, explain, latency, number, statistics

    words = arguments.what
    if arguments.action == "trace" and words not in (["on"], ["off"]):
        raise UsageError("trace: write 'on' or 'off'")
    if arguments.action not in ("explain", "trace") and words:
        raise UsageError(f"{words[0]}: unexpected argument of {arguments.action}")
    if arguments.action == "explain" and not 1 <= len(words) <= 2:
        raise UsageError("explain: write 'irq N', 'vector N' or 'nmi'")
    cpu = None if arguments.cpu is None else number(arguments.cpu, "--cpu")
    with Client(arguments.name) as client:
        if arguments.action == "describe":
            print(describe(client, arguments.json))
        elif arguments.action == "trace":
            client.trace_interrupts(words == ["on"])
        elif arguments.action == "latency":
            print(latency(client, arguments.json))
        elif arguments.action == "stats":
            print(statistics(client, arguments.json))
        else:
            which = number(words[1], f"explain {words[0]}") if len(words) == 2 else None
            print(explain(client, words[0], which, cpu, arguments.json))
    return 0
