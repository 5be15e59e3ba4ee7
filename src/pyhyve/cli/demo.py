"""pyhyve demo: get a guest, boot it."""

import sys
from typing import Final

from pyhyve.base.parser import Namespace, Parser
from pyhyve.cli.run import seconds

SUMMARY: Final = (
    "Get Debian's newest cloud kernel and busybox, boot them, and give you a shell (a tour without a terminal)."
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("-m", "--memory", metavar="SIZE", default="256M", help="memory (%(default)s)")
    parser.add_argument(
        "--processor", choices=("auto", "bt", "kvm"), default="auto", help="bt: software; kvm: the host's"
    )
    parser.add_argument("--tour", action="store_true", help="the tour, even on a terminal")
    parser.add_argument("--verbose", action="store_true", help="show the kernel's messages")
    parser.add_argument("--timeout", metavar="SECONDS", help="stop the guest after this long")
    parser.add_argument("--stats", action="store_true", help="print exits, times and counters at the end")


def run(arguments: Namespace) -> int:
    timeout = None if arguments.timeout is None else seconds(arguments.timeout, "--timeout")

    from pyhyve.vmm import hostcpu

    hostcpu.start_measuring()  # while the rest is loaded
    from pyhyve.bhyve.boot import guestimage
    from pyhyve.bhyve.config import MachineConfig, parse_size
    from pyhyve.bhyve.console import open_console
    from pyhyve.cli.progress import Progress
    from pyhyve.cli.session import run_machine

    memory = parse_size(arguments.memory)
    progress = Progress()
    try:
        image = guestimage.get(progress)
    finally:
        progress.finish()
    tour = arguments.tour or not (sys.stdin.isatty() and sys.stdout.isatty())
    words = ["console=ttyS0", "panic=-1", *([] if arguments.verbose else ["quiet"]), *(["pyhyve.tour"] if tour else [])]
    print(f"pyhyve: booting {image.version} ({arguments.processor} processor)", file=sys.stderr, flush=True)
    if not tour:
        print("pyhyve: Ctrl-A x quits, Ctrl-A h helps", file=sys.stderr, flush=True)
    config = MachineConfig(
        kernel=image.kernel,
        initrd=image.initramfs,
        append=" ".join(words),
        memory=memory,
        processor=arguments.processor,
    )
    return run_machine(config, open_console("stdio"), timeout=timeout, statistics=arguments.stats)
