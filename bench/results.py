"""The arithmetic of the benchmarks: medians, ratios, the geometric mean; as JSON and as a table. Measures nothing.

python bench/results.py prints bench/out/latest.json as the table of docs/performance.md, in Markdown.
"""

import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.table import Table

OUTPUT: Final = Path(__file__).resolve().parent / "out"

BOOT: Final = "boot"
WORKLOADS: Final = ("sha256sum", "gzip", "awk", "forkexec", "dd", "shell", "md5sum", "sort")
"""As guest/bench.sh names them, and in its order."""
FP: Final = "fp"
TIMED: Final = (*WORKLOADS, FP)
PARALLEL: Final = "parallel"
NAMES: Final = (BOOT, *TIMED, PARALLEL)
SIDES: Final = ("pyhyve", "qemu", "native")

VS_QEMU_TARGETS: Final = {BOOT: 0.6, FP: 0.1} | dict.fromkeys(WORKLOADS, 0.5)
"""Of pyhyve's time over QEMU's: at most this."""
GEOMEAN_TARGETS: Final = {"vs_qemu": 0.2, "vs_native": 3.0}
SPEEDUP_TARGET: Final = 1.7
"""Of two jobs at once over one after the other: at least this."""


@dataclass(slots=True)
class Samples:
    """Seconds measured for one row, by side, in the order of the runs. A boot has no native side."""

    pyhyve: list[float] = field(default_factory=list)
    qemu: list[float] = field(default_factory=list)
    native: list[float] = field(default_factory=list)

    def of(self, side: str) -> list[float]:
        """Return the list of a side (of SIDES)."""
        return {"pyhyve": self.pyhyve, "qemu": self.qemu, "native": self.native}[side]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the result: median seconds, and pyhyve's over the others' (smaller is better)."""

    name: str
    pyhyve: float
    qemu: float
    native: float | None
    vs_qemu: float
    vs_native: float | None
    runs: int

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "pyhyve": _rounded(self.pyhyve),
            "qemu": _rounded(self.qemu),
            "native": _rounded(self.native),
            "vs_qemu": _rounded(self.vs_qemu),
            "vs_native": _rounded(self.vs_native),
            "runs": self.runs,
        }


@dataclass(slots=True)
class Speedups:
    """Two independent jobs, one after the other and at the same time, on several processors: seconds, by side."""

    serial: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    parallel: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})

    def add(self, side: str, serial: float, parallel: float) -> None:
        self.serial[side].append(serial)
        self.parallel[side].append(parallel)

    def of(self, side: str) -> float:
        """Return the median, over the runs, of how many times faster the two are at the same time (at best 2)."""
        pairs = zip(self.serial[side], self.parallel[side], strict=True)
        return statistics.median(serial / parallel for serial, parallel in pairs)

    def to_json(self) -> dict[str, object]:
        return {
            side: {
                "serial": _rounded(statistics.median(self.serial[side])),
                "parallel": _rounded(statistics.median(self.parallel[side])),
                "speedup": _rounded(self.of(side)),
            }
            for side in SIDES
        } | {"runs": len(self.serial["pyhyve"])}


def make_row(name: str, samples: Samples) -> Row:
    """Return the row of medians. ValueError if a side was not measured as often as the others, or not at all."""
    runs = len(samples.pyhyve)
    counts = {len(samples.pyhyve), len(samples.qemu)} | ({len(samples.native)} if name != BOOT else set())
    if runs == 0 or counts != {runs}:
        raise ValueError(f"{name}: measured {', '.join(f'{len(samples.of(s))} times on {s}' for s in SIDES)}")
    pyhyve, qemu = statistics.median(samples.pyhyve), statistics.median(samples.qemu)
    native = statistics.median(samples.native) if samples.native else None
    vs_native = None if native is None else pyhyve / native
    return Row(name, pyhyve, qemu, native, pyhyve / qemu, vs_native, runs)


def geometric_mean(rows: Sequence[Row], attribute: str) -> float | None:
    """Return the geometric mean of a ratio over the eight workloads; None unless all eight are there."""
    ratios = {row.name: getattr(row, attribute) for row in rows if row.name in WORKLOADS}
    if len(ratios) != len(WORKLOADS) or None in ratios.values():
        return None
    return math.exp(math.fsum(math.log(ratio) for ratio in ratios.values()) / len(ratios))


def report(machine: Mapping[str, object], rows: Sequence[Row], speedups: Speedups | None = None) -> dict[str, object]:
    """Return the whole result as it is written. A geometric mean that is not over the eight workloads is null, as is
    what was not measured."""
    return {
        "machine": dict(machine),
        "rows": [row.to_json() for row in rows],
        "geomean": {name: _rounded(geometric_mean(rows, name)) for name in ("vs_qemu", "vs_native")},
        "parallel": None if speedups is None else speedups.to_json(),
        "targets": {
            "vs_qemu": VS_QEMU_TARGETS | {"geomean": GEOMEAN_TARGETS["vs_qemu"]},
            "vs_native": {"geomean": GEOMEAN_TARGETS["vs_native"]},
            "speedup": SPEEDUP_TARGET,
        },
    }


def write_json(path: Path, document: object) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def spread(values: Sequence[float]) -> float:
    """Return how far apart the samples lie: (largest - smallest) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def table(rows: Sequence[Row], samples: Mapping[str, Samples], speedups: Speedups | None = None) -> Table:
    """Return the rows for a person: seconds, ratios beside their targets, and the largest spread of a side."""
    runs = rows[0].runs if rows else len(speedups.serial["pyhyve"]) if speedups is not None else 0
    title = f"seconds (medians of {runs}); ratios of pyhyve's to the others', smaller is better"
    drawn = Table(
        title=title, title_justify="left", caption_justify="left", box=box.HORIZONTALS, show_edge=False, pad_edge=False
    )
    drawn.add_column("", min_width=9, no_wrap=True)
    for heading in ("pyhyve", "QEMU", "native", "vs QEMU", "target", "vs native", "spread"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        sides = [samples[row.name].of(side) for side in SIDES]
        drawn.add_row(
            row.name,
            *(_number(value, 3) for value in (row.pyhyve, row.qemu, row.native)),
            _number(row.vs_qemu, 2),
            _target(row.vs_qemu, VS_QEMU_TARGETS[row.name]),
            _number(row.vs_native, 2),
            f"{max(spread(values) for values in sides if values):.0%}" if row.runs > 1 else "-",
            end_section=row.name in (BOOT, WORKLOADS[-1]),
        )
    vs_qemu, vs_native = (geometric_mean(rows, name) for name in GEOMEAN_TARGETS)
    notes = []
    if vs_qemu is not None and vs_native is not None:
        drawn.add_section()
        targets = _target(vs_qemu, GEOMEAN_TARGETS["vs_qemu"]), _target(vs_native, GEOMEAN_TARGETS["vs_native"])
        drawn.add_row("geomean", "", "", "", f"{vs_qemu:.2f}", targets[0], f"{vs_native:.2f}", "", style="bold")
        notes.append(f"geomean: the geometric mean over the eight workloads; vs native: {targets[1]}")
    if speedups is not None:
        drawn.add_section()
        factors = [speedups.of(side) for side in SIDES]
        target = f"≥{SPEEDUP_TARGET} {'met' if factors[0] >= SPEEDUP_TARGET else 'missed'}"
        drawn.add_row(PARALLEL, *(f"{factor:.2f}x" for factor in factors), "", target, "", "")
        notes.append("parallel: how many times faster two jobs on four processors are done at once than in turn")
    drawn.caption = "\n".join(notes)
    return drawn


def _target(value: float, target: float) -> str:
    return f"≤{target:g} {'met' if value <= target else 'missed'}"


def _rounded(value: float | None) -> float | None:
    """Microseconds are what the clocks have; a ratio needs no more either."""
    return None if value is None else round(value, 6)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(document: Mapping[str, Any]) -> str:
    """Return a result, as `report` makes it, in Markdown."""
    machine, mean = document["machine"], document["geomean"]
    lines = [
        f"Measured {machine['date']} on {machine['cpu']} ({machine['cpus']} processors, {machine['kernel']}); "
        f"guest {machine['guest']}; {machine['qemu']}; Python {machine['python']}; "
        f"load at the start {machine['load']}.",
        "",
        "| | pyhyve, s | QEMU TCG, s | native, s | vs QEMU | target | vs native | runs |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in document["rows"]:
        seconds = [_number(row[side], 3) for side in SIDES]
        ratios = [_number(row["vs_qemu"], 2), f"≤ {VS_QEMU_TARGETS[row['name']]:g}", _number(row["vs_native"], 2)]
        lines.append(f"| {' | '.join([row['name'], *seconds, *ratios, str(row['runs'])])} |")
    means = [_number(mean[name], 2) for name in GEOMEAN_TARGETS]
    targets = [f"≤ {target:g}" for target in GEOMEAN_TARGETS.values()]
    lines.append(
        f"| **geometric mean of the eight** | | | | {means[0]} | {targets[0]} | {means[1]} (target {targets[1]}) | |"
    )
    if document.get("parallel") is not None:  # a file of an older version has none
        factors = {side: _number(document["parallel"][side]["speedup"], 2) for side in SIDES}
        lines += [
            "",
            "Two jobs at the same time on four processors, against one after the other: "
            f"pyhyve {factors['pyhyve']} times as fast, QEMU {factors['qemu']}, native {factors['native']}; "
            f"target {SPEEDUP_TARGET}.",
        ]
    return "\n".join(lines)


def main() -> int:
    path = OUTPUT / "latest.json"
    try:
        print(markdown(json.loads(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        print(f"bench: {os.path.relpath(path)}: not there yet; make bench writes it", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
