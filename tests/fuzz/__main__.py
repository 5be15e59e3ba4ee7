"""Compare the software processor with the host's on random instructions, for some minutes.

    python tests/fuzz [--minutes M] [--setup NAME]… [--seed N] [--workers N] [--json] [--fresh]

It goes on where the last run stopped (--fresh: from the beginning). Differences are shrunk, shown, and written to a
file of cases that tests/fuzz/regressions takes. Ctrl-C lets the units that run come to their end; once more does not.
Exit status: 0 without differences, 1 with some, 2 if it cannot run, 130 if it was stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, Final

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it
sys.path.insert(0, str(Path(__file__).parent))

import coverage
import worker
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from guest import Machine

VERSION: Final = 2
"""Of what a seed means: another number begins again."""

HUNG: Final = 60.0
"""Seconds without a word after which a worker is taken for hung."""


class Tally:
    """What all runs since the first gave; kept in a file."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.next_unit = 0
        self.instructions = 0
        self.runs = 0
        self.faults = 0
        self.seconds = 0.0
        self.coverage: Counter[tuple[int, ...]] = Counter()
        self.by_setup: Counter[str] = Counter()
        self.excused: Counter[str] = Counter()
        self.differences = 0
        if not fresh and path.exists():
            self._load(json.loads(path.read_text()))

    def _load(self, kept: dict[str, Any]) -> None:
        if kept.get("version") != VERSION:
            return
        for name in ("next_unit", "instructions", "runs", "faults", "seconds", "differences"):
            setattr(self, name, kept[name])
        self.coverage = Counter({tuple(key): count for *key, count in kept["coverage"]})
        self.by_setup = Counter(kept["by_setup"])
        self.excused = Counter(kept["excused"])

    def save(self) -> None:
        kept = {name: getattr(self, name) for name in ("next_unit", "instructions", "runs", "faults", "seconds",
                                                       "differences", "by_setup", "excused")}  # fmt: skip
        kept |= {"version": VERSION, "coverage": [(*key, count) for key, count in self.coverage.items()]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(kept))
        part.replace(self.path)

    def add(self, result: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
        """Count a unit's results; return its differences."""
        self.instructions += result["instructions"]
        self.runs += result["runs"]
        self.faults += result["faults"]
        self.by_setup[result["setup"]] += result["instructions"]
        for *key, count in result["coverage"]:
            self.coverage[tuple(key)] += count
        differences = []
        for kind, text, case in result["found"]:
            if kind.startswith("excused: "):
                self.excused[kind.removeprefix("excused: ")] += 1
            else:
                differences.append((kind, text, case))
        self.differences += len(differences)
        return differences


class Pool:
    """Worker processes, each with the unit that it runs; one that dies or hangs is replaced."""

    def __init__(self, count: int) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.cpus = sorted(os.sched_getaffinity(0))
        self.workers: list[tuple[Any, Connection]] = [self._start(n) for n in range(count)]
        self.running: list[tuple[int, str] | None] = [None] * count
        self.seeds = [0] * count
        self.heard = [time.monotonic()] * count

    def _start(self, n: int) -> tuple[Any, Connection]:
        here, there = self.context.Pipe()
        cpu = self.cpus[n % len(self.cpus)]
        process = self.context.Process(target=worker.serve, args=(there, cpu), daemon=True)
        # Ctrl-C goes to the whole process group, and is the parent's alone
        kept = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, kept)
        there.close()
        return process, here

    def replace(self, n: int) -> None:
        process, link = self.workers[n]
        process.kill()
        process.join()
        link.close()
        self.workers[n] = self._start(n)
        self.running[n] = None
        self.heard[n] = time.monotonic()

    def send(self, n: int, unit: int, setup: str) -> None:
        self.running[n] = (unit, setup)
        self.heard[n] = time.monotonic()
        self.workers[n][1].send((unit, setup))

    def close(self) -> None:
        for process, link in self.workers:
            link.close()
            process.kill()
        for process, _ in self.workers:
            process.join()


class Stop:
    """Ctrl-C: the first asks for an end, the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt
        self.asked = True


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fuzz-cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (5)")
    parser.add_argument("--setup", action="append", choices=list(Machine.SETUPS), help="only code of this kind")
    parser.add_argument("--seed", type=int, help="begin with this unit, keep no account")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (one for each CPU)"
    )
    parser.add_argument("--stop", action="store_true", help="stop at the first difference")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs did")
    parser.add_argument("--cases", type=Path, help="where differences are written (beside the account)")
    return parser.parse_args(arguments)


def state_directory() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "pyhyve" / "fuzz-cpu"


def main(arguments: list[str] | None = None) -> int:
    stop = Stop()
    chosen = options(arguments)
    directory = state_directory()
    tally = Tally(directory / "account.json", chosen.fresh or chosen.seed is not None)
    if chosen.seed is not None:
        tally.next_unit = chosen.seed
    setups = chosen.setup or list(Machine.SETUPS)
    cases = chosen.cases or directory / "cases.json"
    console = Console(stderr=True)
    before = tally.instructions
    start = time.monotonic()
    found: list[tuple[str, str, dict[str, Any]]] = []
    with contextlib.suppress(KeyboardInterrupt):
        run(tally, setups, chosen, console, found, start, stop)
    seconds = time.monotonic() - start
    tally.seconds += seconds
    if chosen.seed is None:
        tally.save()
    if found:
        known = json.loads(cases.read_text()) if cases.exists() else []
        cases.parent.mkdir(parents=True, exist_ok=True)
        cases.write_text(json.dumps(known + [case for _, _, case in found if case], indent=1) + "\n")
    done = tally.instructions - before
    if stop.asked and not chosen.json:
        console.print(
            f"stopped after {seconds:.0f} s: {done:,} instructions, {len(found)} differences; "
            f"the next run goes on with unit {tally.next_unit}", highlight=False, soft_wrap=True,
        )  # fmt: skip
    else:
        summary(tally, chosen.json, console, len(found), done, seconds, cases)
    return 130 if stop.asked else 1 if found else 0


def run(
    tally: Tally, setups: list[str], chosen: argparse.Namespace, console: Console,
    found: list[tuple[str, str, dict[str, Any]]], start: float, stop: Stop,
) -> None:  # fmt: skip
    pool = Pool(chosen.workers)
    columns = (TextColumn("fuzz-cpu"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[told]}"))
    known = coverage.known(64)
    last_line = start
    base = tally.instructions
    setup_at = 0
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=chosen.minutes * 60, told="")
            while True:
                now = time.monotonic()
                wanted = now - start < chosen.minutes * 60 and not stop.asked and not (chosen.stop and found)
                # a unit is run with each of the setups: the next run begins with another one
                over = not wanted and setup_at % len(setups) == 0
                for n in range(chosen.workers):
                    if pool.running[n] is None and (wanted or setup_at % len(setups)):
                        pool.send(n, tally.next_unit, setups[setup_at % len(setups)])
                        setup_at += 1
                        tally.next_unit += setup_at % len(setups) == 0
                    elif pool.running[n] is not None and now - pool.heard[n] > HUNG:
                        found.append(("hung", lost(pool, n, "hangs"), {}))
                        console.print(found[-1][1], markup=False, highlight=False)
                        pool.replace(n)
                if over and all(unit is None for unit in pool.running):
                    return
                for n in ready(pool):
                    hear(pool, n, tally, found, console)
                told = report(tally, known, base, now - start, len(found))
                progress.update(task, completed=now - start, told=told)
                if not console.is_terminal and now - last_line >= 15:
                    last_line = now
                    console.print(f"{now - start:5.0f} s  {told}", highlight=False)
    except KeyboardInterrupt:
        tally.next_unit = min([tally.next_unit, *(unit for unit, _ in filter(None, pool.running))])
        raise
    finally:
        pool.close()


def ready(pool: Pool) -> list[int]:
    links = [link for _, link in pool.workers]
    return [links.index(link) for link in wait(links, timeout=0.5) if isinstance(link, Connection)]


def lost(pool: Pool, n: int, how: str) -> str:
    return f"the worker {how} in batch {pool.seeds[n]} of unit {pool.running[n]}"


def hear(pool: Pool, n: int, tally: Tally, found: list[tuple[str, str, dict[str, Any]]], console: Console) -> None:
    pool.heard[n] = time.monotonic()
    try:
        kind, value = pool.workers[n][1].recv()
    except (EOFError, OSError):
        found.append(("died", lost(pool, n, "dies"), {}))
        console.print(found[-1][1], markup=False, highlight=False)
        pool.replace(n)
        return
    if kind == "batch":
        pool.seeds[n] = value
        return
    pool.running[n] = None
    for difference in tally.add(value):
        found.append(difference)
        if len(found) <= 40:
            console.print(f"{difference[0]}: {difference[1]}", markup=False, highlight=False)


def report(tally: Tally, known: dict[str, set[tuple[int, int, int]]], base: int, seconds: float, found: int) -> str:
    done, of = coverage.totals(known, tally.coverage)
    rate = (tally.instructions - base) / max(seconds, 0.001)
    return (f"{tally.instructions / 1e6:,.1f} M instructions ({rate / 1e3:,.0f} k/s), {done}/{of} opcodes, "
            f"{found} differences")  # fmt: skip


def summary(
    tally: Tally, as_json: bool, console: Console, found: int, instructions: int, seconds: float, cases: Path
) -> None:
    known = coverage.known(64)
    table = coverage.table(known, tally.coverage)
    if as_json:
        print(json.dumps({
            "instructions": instructions, "seconds": round(seconds, 1), "differences": found,
            "total": {"instructions": tally.instructions, "runs": tally.runs, "exceptions": tally.faults,
                      "units": tally.next_unit, "by_setup": tally.by_setup},
            "coverage": {row: {"run": done, "known": of} for row, done, of, _ in table}, "excused": tally.excused,
        }))  # fmt: skip
        return
    console.print(f"{instructions:,} instructions in {seconds:.0f} s, {found} differences", highlight=False)
    console.print(
        f"since the first: {tally.instructions:,} instructions in {tally.runs:,} runs, {tally.faults:,} exceptions, "
        f"{tally.next_unit} units", highlight=False,
    )  # fmt: skip
    for row, done, of, missing in table:
        rest = f"  not run: {missing}" if missing else ""
        console.print(f"  {row:<14} {done:4}/{of:<4} opcodes{rest}", highlight=False)
    for reason, count in tally.excused.most_common():
        console.print(f"  not compared, {count}: {reason}", highlight=False, markup=False)
    if found:
        console.print(f"the cases are in {cases}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
