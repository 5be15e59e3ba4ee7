"""pyhyve ls: the running virtual machines of this user."""

import json
from typing import Final

from pyhyve.base.parser import Namespace, Parser

SUMMARY: Final = "List the running virtual machines; what killed ones left behind is removed."
_ROW: Final = "{:<24} {:>8} {:<9} {:>5} {:>9} {}"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print a line of JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="print names only")


def run(arguments: Namespace) -> int:
    from pyhyve.libvmm.client import running

    found = running()
    if arguments.json:
        print(json.dumps([{name: getattr(each, name) for name in each.__slots__} for each in found]))
    elif arguments.quiet:
        for each in found:
            print(each.name)
    elif found:
        print(_ROW.format("NAME", "PROCESS", "STATE", "VCPUS", "MEMORY", "PROCESSOR"))
        for each in found:
            memory = f"{each.memory >> 20} MiB"
            print(_ROW.format(each.name, each.pid, each.state, each.cpus, memory, each.processor))
    return 0
