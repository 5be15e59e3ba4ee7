"""One machine run from the command line: signals, the line that tells the outcome, JSON, statistics, exit status."""

import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from pyhyve.base.output import say, table
from pyhyve.bhyve.config import MachineConfig
from pyhyve.bhyve.console import Console, Quit
from pyhyve.bhyve.console.stdio import StdioConsole
from pyhyve.bhyve.machine import Machine
from pyhyve.bhyve.outcome import Outcome, OutcomeKind
from pyhyve.vmm.diagnosis.trace import InterruptTrace

_QUIT_STATUS: Final = {Quit.KEY: 0, Quit.CLOSED: 129, Quit.TERMINATED: 143}


def run_machine(
    config: MachineConfig,
    console: Console,
    *,
    timeout: float | None = None,
    statistics: bool = False,
    as_json: bool = False,
    trace_file: Path | None = None,
) -> int:
    """Build the machine, run it to its end, tell how it ended; return the exit status.

    trace_file: interrupts are traced, and what the trace has at the end is written there.
    """
    with Machine(config, console, timing=statistics) as machine:
        trace = machine.interrupts.start_trace() if trace_file is not None else None
        if trace_file is not None and trace is not None:
            trace.save(trace_file, machine.name, config.cpus)  # that it cannot be written is told now
        with _signals(machine, console):
            outcome = machine.run(timeout)
        if trace_file is not None and trace is not None:
            trace.save(trace_file, machine.name, config.cpus)
        figures = machine.statistics() if statistics else None
        status = outcome.exit_status
        if outcome.kind is OutcomeKind.STOPPED and machine.quit_reason is not None:
            status = _QUIT_STATUS[machine.quit_reason]
    if as_json:
        _print_json(machine.name, outcome, figures, status)
    else:
        _print_outcome(outcome, figures, trace)
    return status


@contextmanager
def _signals(machine: Machine, console: Console) -> Iterator[None]:
    """SIGTERM presses the power button, again it ends the machine in order, as SIGHUP does at once.

    (A console on the terminal sees to that itself.)
    """
    machine.on_power_button = _tell_of_power_button
    if isinstance(console, StdioConsole):
        yield
        return

    asked = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if number == signal.SIGHUP:
            machine.quit(Quit.CLOSED)
        else:
            machine.quit(Quit.TERMINATED if asked else Quit.SHUTDOWN)
            asked = True

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _tell_of_power_button() -> None:
    line = "pyhyve: pressed the guest's power button; a second SIGTERM ends it"
    if sys.stderr is not None and sys.stderr.isatty():
        line = f"\r{line}\r"  # the terminal may be raw
    # Not here: whoever reads the line may be slow, and the guest's devices would wait for it.
    threading.Thread(target=say, args=(line, sys.stderr), daemon=True).start()


def _print_json(name: str, outcome: Outcome, figures: Mapping[str, object] | None, status: int) -> None:
    import json

    document: dict[str, object] = {"name": name, **outcome.to_json(), "exit_status": status}
    if figures is not None:
        document["statistics"] = figures
    say(json.dumps(document), sys.stdout)


def _print_outcome(outcome: Outcome, figures: Mapping[str, object] | None, trace: InterruptTrace | None) -> None:
    if figures is not None:
        # A trace has a better text than its figures in a table.
        say(table({name: value for name, value in figures.items() if name != "interrupt_latency"}), sys.stderr)
        if trace is not None:
            say(f"interrupt latency:\n{trace}", sys.stderr)
    say(f"pyhyve: {outcome}", sys.stderr)
    if outcome.report:
        say(outcome.report, sys.stderr)
