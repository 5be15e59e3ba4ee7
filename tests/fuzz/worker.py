"""One process of the fuzzer: it runs units (some batches of one kind) and sends what they gave.

Random code runs natively in this process. Should it destroy the process in spite of all care, the parent sees which
batch it was and starts another.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from multiprocessing.connection import Connection
from typing import Any, Final

BATCHES: Final = 32
"""Batches of a unit: about a third of a second."""
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def seed_of(unit: int, setup: int, batch: int) -> int:
    return (unit * 16 + setup) * 4096 + batch


def serve(link: Connection, cpu: int | None) -> None:
    """Take units (number, setup) from the parent; send ("batch", seed), then ("done", results)."""
    # a signal may not arrive while FS belongs to the random code
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, *_FAULTS})
    # whatever ends the parent: a worker that random code holds must not run on for ever
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if cpu is not None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {cpu})
    import judge

    from guest import Machine

    machine = Machine()
    setups = list(Machine.SETUPS)
    try:
        while True:
            unit, setup = link.recv()
            link.send(("done", run_unit(machine, judge, link, unit, setup, setups.index(setup))))
    except (EOFError, BrokenPipeError):
        os._exit(0)


_FAULTS: Final = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP}


def run_unit(machine: Any, judge: Any, link: Connection | None, unit: int, setup: str, index: int) -> dict[str, Any]:
    """Run a unit; return counts and what was found."""
    fuzzer = machine.fuzzer
    fuzzer.forget()
    fill = unit & 0xFFFF
    found = []
    machine.enter(setup)
    machine.fill(fill)
    for batch in range(BATCHES):
        seed = seed_of(unit, index, batch)
        if link is not None:
            link.send(("batch", seed))
        if fuzzer.batch(seed):
            found += judge.judge(machine, setup, fill, seed)
    instructions, runs, faults = fuzzer.counts()
    coverage = [(*key, count) for key, count in fuzzer.coverage().items()]
    return {
        "unit": unit, "setup": setup, "instructions": instructions, "runs": runs, "faults": faults,
        "vectors": fuzzer.vector_counts(), "coverage": coverage, "found": found,
    }  # fmt: skip
