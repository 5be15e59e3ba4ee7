"""pyhyve trace: make something of what `pyhyve run --trace-file` wrote."""

import json
import sys
from pathlib import Path
from typing import Final

from pyhyve.base.errors import HostError, UsageError
from pyhyve.base.parser import Namespace, Parser

SUMMARY: Final = "Make something of a trace: 'pyhyve trace convert FILE -o trace.json' for ui.perfetto.dev."


def add_arguments(parser: Parser) -> None:
    parser.add_argument("action", choices=("convert", "show"), help="convert: to Perfetto's JSON; show: as text")
    parser.add_argument("file", metavar="FILE", type=Path, help="what 'pyhyve run --trace-file' wrote")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="where to (standard output)")


def run(arguments: Namespace) -> int:
    from pyhyve.vmm.diagnosis.chrome import convert
    from pyhyve.vmm.diagnosis.trace import load

    try:
        with arguments.file.open(encoding="ascii", errors="replace") as file:
            head, events = load(file)
    except OSError as error:
        raise UsageError(f"{arguments.file}: {error.strerror}; name a file of --trace-file") from None
    except ValueError as error:
        raise UsageError(f"{arguments.file}: {error}; name a file of --trace-file") from None
    if arguments.action == "convert":
        text = json.dumps(convert(head, events))
    else:
        text = "\n".join(
            f"{event.time / 1e9:14.9f} {event.kind:<9} {f'vCPU {event.vcpu}' if event.vcpu >= 0 else '':<8} "
            f"{event.vector:#04x} {event.source}".rstrip()
            for event in events
        )
    if arguments.output is None:
        sys.stdout.write(text + "\n")
        return 0
    try:
        arguments.output.write_text(text + "\n", encoding="ascii")
    except OSError as error:
        raise HostError(f"-o {arguments.output}: {error.strerror}; name a file that can be written") from None
    return 0
