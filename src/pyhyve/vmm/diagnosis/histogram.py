"""Latencies, counted: exact at the ends, within an eighth in between, in a few hundred integers however many."""

from typing import Final

_STEPS_SHIFT: Final = 3
_STEPS: Final = 1 << _STEPS_SHIFT
_BAR: Final = 40


class Histogram:
    """Nanoseconds, 0 or more. Each power of two is counted in eight parts."""

    __slots__ = ("_counts", "count", "longest", "shortest", "total")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.total = 0
        self.shortest = 0
        self.longest = 0

    def add(self, ns: int) -> None:
        """Count a latency; a negative one is 0."""
        ns = max(0, ns)
        if not self.count or ns < self.shortest:
            self.shortest = ns
        if ns > self.longest:
            self.longest = ns
        self.count += 1
        self.total += ns
        part = _part(ns)
        self._counts[part] = self._counts.get(part, 0) + 1

    def percentile(self, percent: float) -> int:
        """Return what `percent` of the latencies do not exceed, at most an eighth too high; 0 where there are none."""
        wanted = self.count * percent / 100
        seen = 0
        for part in sorted(self._counts):
            seen += self._counts[part]
            if seen >= wanted:
                return min(self.longest, max(self.shortest, _start(part + 1) - 1))
        return self.longest

    def buckets(self) -> dict[int, int]:
        """Return counts by powers of two: those from 2**n to below 2**(n+1) under 2**n, and 0 under 0."""
        found: dict[int, int] = {}
        for part, count in sorted(self._counts.items()):
            start = _start(part)
            power = 1 << (start.bit_length() - 1) if start else 0
            found[power] = found.get(power, 0) + count
        return found

    def as_json(self) -> dict[str, object]:
        """Plain values; times in ns."""
        return {
            "count": self.count,
            "min_ns": self.shortest,
            "median_ns": self.percentile(50),
            "p99_ns": self.percentile(99),
            "max_ns": self.longest,
            "mean_ns": self.total // self.count if self.count else 0,
            "buckets": {str(start): count for start, count in self.buckets().items()},
        }

    def __str__(self) -> str:
        """A line of figures, then a bar for each power of two."""
        figures = (self.shortest, self.percentile(50), self.percentile(99), self.longest)
        words = ("min", "median", "99 %", "max")
        head = ", ".join(f"{word} {duration(value)}" for word, value in zip(words, figures, strict=True))
        lines = [f"{self.count:,}: {head}"]
        buckets = self.buckets()
        most = max(buckets.values(), default=1)
        for start, count in buckets.items():
            lines.append(f"  {duration(start):>9} {count:>9,} {'#' * -(-count * _BAR // most)}")
        return "\n".join(lines)


def _part(ns: int) -> int:
    """The number of a latency's part: below 8 ns each its own."""
    shift = ns.bit_length() - 1 - _STEPS_SHIFT
    return ns if shift < 0 else shift * _STEPS + (ns >> shift)


def _start(part: int) -> int:
    """The least latency of a part."""
    if part < 2 * _STEPS:
        return part
    shift = part // _STEPS - 1
    return (part % _STEPS + _STEPS) << shift


def duration(ns: int) -> str:
    """Return a time in words of three digits: "1.25 ms"."""
    for unit, size in (("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1_000)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}" if ns < 1000 * size else f"{ns // size} {unit}"
    return f"{ns} ns"
