"""pyhyve run: boot a kernel."""

from pathlib import Path
from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.base.parser import Namespace, Parser

SUMMARY: Final = "Boot a kernel in a virtual machine."

_STATUSES: Final = """\
exit status:
  0 powered off (or left with Ctrl-A x)   3 rebooted      6 panicked
  1 error in pyhyve                       4 halted        7 hung: no progress
  2 what you asked for cannot be          5 triple fault  124 timed out
  2V + 1: the guest wrote V to a debug-exit port (-l)
  130, 143, 129: ended by SIGINT, SIGTERM, SIGHUP"""


def add_arguments(parser: Parser) -> None:
    parser.epilog = _STATUSES
    parser.add_argument(
        "--kernel", metavar="FILE", type=Path, help="bzImage, ELF vmlinux, or an image with a Multiboot or PVH entry"
    )
    parser.add_argument("--initrd", metavar="FILE", type=Path, help="initial RAM disk")
    parser.add_argument(
        "--module",
        metavar="FILE",
        action="append",
        default=[],
        help="'FILE ARGUMENTS': a module for a Multiboot or PVH kernel; may be repeated",
    )
    parser.add_argument("--append", metavar="STR", help="kernel command line (console=ttyS0 for Linux)")
    parser.add_argument(
        "-c",
        "--cpus",
        metavar="N",
        default="1",
        help="virtual processors: N, or [cpus=N][,sockets=N][,cores=N][,threads=N] (%(default)s)",
    )
    parser.add_argument("-m", "--memory", metavar="SIZE", default="256M", help="memory (%(default)s)")
    parser.add_argument(
        "-p",
        "--pin",
        metavar="VCPU:CPU",
        action="append",
        default=[],
        help="let a vCPU run on this host CPU only; repeats add up",
    )
    parser.add_argument("--name", metavar="NAME", help="the VM's name; two of one name do not run together")
    parser.add_argument(
        "--processor", choices=("auto", "bt", "kvm"), default="auto", help="bt: software; kvm: the host's"
    )
    parser.add_argument(
        "--code-cache",
        metavar="SIZE",
        default="64M",
        help="translated code that a vCPU of bt keeps (%(default)s)",
    )
    parser.add_argument(
        "--cpu-feature",
        metavar="NAME=on|off",
        action="append",
        default=[],
        help="insist on a feature of the guest's processor, or hide it; may be repeated; 'help' lists them",
    )
    parser.add_argument(
        "--console", metavar="WHERE", default="stdio", help="stdio, pty, file:PATH or none (%(default)s)"
    )
    parser.add_argument(
        "-l",
        "--lpc",
        metavar="DEVICE",
        action="append",
        default=[],
        help="a device on the ISA bus, DEVICE[,OPTION...]; may be repeated; 'help' lists them",
    )
    parser.add_argument(
        "-f",
        "--fwcfg",
        metavar="NAME",
        action="append",
        default=[],
        help="a file for -l fwcfg,qemu: NAME,string=TEXT or NAME,file=PATH; may be repeated",
    )
    parser.add_argument(
        "--ioapic-pins", choices=("24", "32"), default="32", help="how many pins the I/O APIC has (%(default)s)"
    )
    parser.add_argument(
        "--rtc", choices=("utc", "local"), default="utc", help="what the real-time clock shows (%(default)s)"
    )
    parser.add_argument("-u", dest="rtc", action="store_const", const="utc", help="the same as --rtc utc")
    parser.add_argument("--kaslr", action="store_true", help="let the kernel unpack itself, at a random address")
    parser.add_argument("--timeout", metavar="SECONDS", help="stop the guest after this long")
    parser.add_argument(
        "--hang",
        metavar="SECONDS",
        default="20",
        help="a spin without an exit this long is a hang; 0: never (%(default)s)",
    )
    parser.add_argument("--trace", choices=("interrupts",), help="record what happens, in the file of --trace-file")
    parser.add_argument("--trace-file", metavar="FILE", type=Path, help="'pyhyve trace' makes more of it")
    parser.add_argument("--stats", action="store_true", help="print exits, times and counters at the end")
    parser.add_argument(
        "--json", action="store_true", help="print the outcome as a line of JSON, the last of the output"
    )


def seconds(text: str, option: str) -> float:
    """Return a number of seconds, 0 or more. UsageError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise UsageError(f"{option} {text}: not a time; write a number of seconds")
    return value


def run(arguments: Namespace) -> int:
    if "help" in arguments.lpc:
        from pyhyve.bhyve.lpc.options import lpc_help

        print(lpc_help())
        return 0
    if "help" in arguments.cpu_feature:
        from pyhyve.vmm.cpufeatures import cpu_feature_help

        print(cpu_feature_help())
        return 0
    if arguments.kernel is None:
        raise UsageError("--kernel: missing; name a kernel, or try 'pyhyve demo', which gets one")
    if (arguments.trace is None) != (arguments.trace_file is None):
        there, missing = ("--trace", "--trace-file FILE") if arguments.trace else ("--trace-file", "--trace interrupts")
        raise UsageError(f"{there}: not by itself; add {missing}")
    timeout = None
    if arguments.timeout is not None:
        timeout = seconds(arguments.timeout, "--timeout")
    hang = seconds(arguments.hang, "--hang")

    from pyhyve.vmm import hostcpu

    hostcpu.start_measuring()  # while the rest is loaded
    from pyhyve.bhyve.config import MachineConfig, parse_cpus, parse_module, parse_pin, parse_size
    from pyhyve.bhyve.console import open_console
    from pyhyve.bhyve.lpc.options import parse_fwcfg_file, parse_lpc
    from pyhyve.cli.session import run_machine
    from pyhyve.vmm.cpufeatures import parse_cpu_features

    pins: dict[int, frozenset[int]] = {}
    for text in arguments.pin:
        vcpu, cpu = parse_pin(text)
        pins[vcpu] = pins.get(vcpu, frozenset()) | {cpu}
    config = MachineConfig(
        kernel=arguments.kernel,
        initrd=arguments.initrd,
        append=arguments.append,
        modules=tuple(map(parse_module, arguments.module)),
        memory=parse_size(arguments.memory),
        topology=parse_cpus(arguments.cpus),
        name=arguments.name,
        processor=arguments.processor,
        code_cache=parse_size(arguments.code_cache, "--code-cache"),
        cpu_features=parse_cpu_features(arguments.cpu_feature),
        ioapic_pins=int(arguments.ioapic_pins),
        rtc_utc=arguments.rtc == "utc",
        kaslr=arguments.kaslr,
        lpc=tuple(map(parse_lpc, arguments.lpc)),
        fwcfg=tuple(map(parse_fwcfg_file, arguments.fwcfg)),
        pins=pins,
        hang_seconds=hang,
    )
    return run_machine(
        config,
        open_console(arguments.console),
        timeout=timeout,
        statistics=arguments.stats,
        as_json=arguments.json,
        trace_file=arguments.trace_file,
    )
