"""The command `vmmctl`: asks a running VM, with bhyvectl's manners."""

import sys
from collections.abc import Sequence
from typing import Final

from pyhyve.base.command import run_command
from pyhyve.base.errors import UsageError
from pyhyve.base.parser import Parser
from pyhyve.base.version import __version__

SUMMARY: Final = "Ask a running virtual machine. What is asked together is answered in the order of this list."


def parser() -> Parser:
    """Return the parser of vmmctl's options."""
    made = Parser(prog="vmmctl", description=SUMMARY)
    made.add_argument("--version", action="version", version=f"vmmctl {__version__}")
    made.add_argument("--vm", metavar="VM", help="the VM's name; 'pyhyve ls' lists those that run")
    made.add_argument("--cpu", metavar="N", help="look at this virtual processor only")
    made.add_argument(
        "--explain-irq",
        metavar="IRQ",
        action="append",
        default=[],
        help="what holds an ISA interrupt or a pin of the I/O APIC",
    )
    made.add_argument(
        "--explain-vector", metavar="VECTOR", action="append", default=[], help="what holds a vector, for instance 0x31"
    )
    made.add_argument("--explain-nmi", action="store_true", help="what holds the non-maskable interrupt")
    made.add_argument("--get-stats", action="store_true", help="exits by reason, times and counters")
    made.add_argument("--trace-interrupts", choices=("on", "off"), help="begin a trace of interrupts, or end it")
    made.add_argument("--get-interrupt-latency", action="store_true", help="latencies of the present or last trace")
    made.add_argument("--json", action="store_true", help="answer in JSON")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_command("vmmctl", _run, argv)


def _run(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.vm is None:
        raise UsageError("--vm: missing; name a VM, as 'pyhyve ls' lists them")
    from pyhyve.libvmm.client import Client
    from pyhyve.vmmctl.actions import explain, latency, number, statistics

    cpu = None if arguments.cpu is None else number(arguments.cpu, "--cpu")
    questions: list[tuple[str, int | None]] = []
    questions += [("irq", number(text, "--explain-irq")) for text in arguments.explain_irq]
    questions += [("vector", number(text, "--explain-vector")) for text in arguments.explain_vector]
    if arguments.explain_nmi:
        questions.append(("nmi", None))
    others = (arguments.get_stats, arguments.trace_interrupts, arguments.get_interrupt_latency)
    if not questions and not any(others):
        raise UsageError("nothing is asked; add for instance --explain-irq 4 or --get-stats; see 'vmmctl --help'")
    with Client(arguments.vm) as client:
        for what, which in questions:
            print(explain(client, what, which, cpu, arguments.json))
        if arguments.get_stats:
            print(statistics(client, arguments.json))
        if arguments.trace_interrupts is not None:
            client.trace_interrupts(arguments.trace_interrupts == "on")
        if arguments.get_interrupt_latency:
            print(latency(client, arguments.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
