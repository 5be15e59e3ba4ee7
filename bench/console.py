"""What a run printed: the lines of guest/bench.sh found in it, each held against the host's clock."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from processes import BenchError, Finished, Line

POWER_DOWN: Final = "reboot: Power down"
NOTHING_RUN: Final = "pyhyve.run: /dev/null ended with status 0"
"""What the guest's init says after a script that does nothing: the boot reached user space."""

_ESCAPES: Final = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|.)")
_WORD: Final = re.compile(r"(?:^|\W)(?:(RUN) (\w+)|(BENCH) (\w+) (\d+\.\d+)|(CHECK) (\w+) ([0-9a-f]{32}))$")
"""At a line's end: firmware may have left something before it."""

_DISAGREEMENT_S: Final = 0.25
_DISAGREEMENT: Final = 0.1
"""How far a guest's time may be from the host's between the same two lines: seconds, or this part of it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One workload: the seconds that the script measured, and the digest of what the workload put out."""

    seconds: float
    digest: str


def clean(text: str) -> str:
    """Return a line of the console without terminal escapes and line ends."""
    return _ESCAPES.sub("", text).strip()


def workload_started(text: str) -> str | None:
    """Return the name if this is the line that a workload starts with."""
    match = _WORD.search(clean(text))
    return match[2] if match is not None and match[1] else None


def parse(lines: Sequence[Line], names: Sequence[str]) -> dict[str, Measured]:
    """Return what was measured for each of `names`.

    BenchError if one is missing, comes twice, took no time, or took another time by the host's clock.
    """
    started: dict[str, float] = {}
    seconds: dict[str, float] = {}
    digests: dict[str, str] = {}
    for at, keyword, name, value in _words(lines):
        found: dict[str, object] = {"RUN": started, "BENCH": seconds, "CHECK": digests}[keyword]  # type: ignore[assignment]
        if name in found:
            raise BenchError(f"{name}: two lines of {keyword}")
        if keyword == "RUN":
            started[name] = at
        elif keyword == "CHECK":
            digests[name] = value
        else:
            seconds[name] = _checked(name, float(value), at - started.get(name, at))
    for name in names:
        if name not in seconds or name not in digests:
            raise BenchError(f"{name}: did not end; the console has no line 'BENCH {name} seconds' with its CHECK")
    if set(seconds) != set(names):
        raise BenchError(f"{', '.join(sorted(set(seconds) - set(names)))}: ran, but nobody asked for it")
    return {name: Measured(seconds[name], digests[name]) for name in names}


def check_boot(finished: Finished) -> None:
    """BenchError unless the guest reached its user space and powered itself off."""
    text = "\n".join(clean(line.text) for line in finished.lines)
    if NOTHING_RUN not in text:
        raise BenchError("the guest did not get to its user space")
    check_power_off(finished)


def check_power_off(finished: Finished) -> None:
    if finished.status != 0:
        raise BenchError(f"exit status {finished.status}")
    if not any(POWER_DOWN in line.text for line in finished.lines):
        raise BenchError(f"the guest did not power off; the console has no line '{POWER_DOWN}'")


def _words(lines: Sequence[Line]) -> Iterator[tuple[float, str, str, str]]:
    for line in lines:
        match = _WORD.search(clean(line.text))
        if match is None:
            continue
        if match[1]:
            yield line.at, "RUN", match[2], ""
        elif match[3]:
            yield line.at, "BENCH", match[4], match[5]
        else:
            yield line.at, "CHECK", match[7], match[8]


def _checked(name: str, seconds: float, by_host: float) -> float:
    if seconds <= 0:
        raise BenchError(f"{name}: took {seconds:g} s by the guest's clock")
    if abs(by_host - seconds) > max(_DISAGREEMENT_S, _DISAGREEMENT * by_host):
        raise BenchError(f"{name}: took {seconds:.3f} s by the guest's clock, {by_host:.3f} s by the host's")
    return seconds
