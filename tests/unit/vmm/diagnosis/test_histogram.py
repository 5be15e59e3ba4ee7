"""Latencies by the hundred thousand in a few integers: what the figures may be off by."""

import math

from hypothesis import given
from hypothesis import strategies as st

from pyhyve.vmm.diagnosis.histogram import Histogram

LATENCIES = st.lists(st.integers(0, 10**12) | st.integers(0, 40), min_size=1, max_size=200)


def made(latencies):
    histogram = Histogram()
    for ns in latencies:
        histogram.add(ns)
    return histogram


@given(LATENCIES)
def test_ends_are_exact_and_percentiles_an_eighth_too_high_at_most(latencies):
    histogram = made(latencies)
    assert (histogram.shortest, histogram.longest) == (min(latencies), max(latencies))
    assert (histogram.count, histogram.total) == (len(latencies), sum(latencies))
    for percent in (1, 50, 99, 100):
        exact = sorted(latencies)[max(0, math.ceil(len(latencies) * percent / 100) - 1)]
        assert exact <= histogram.percentile(percent) <= exact * 9 // 8 + 1


@given(LATENCIES)
def test_buckets_are_powers_of_two(latencies):
    expected = {}
    for ns in sorted(latencies):
        start = 1 << (ns.bit_length() - 1) if ns else 0
        expected[start] = expected.get(start, 0) + 1
    assert made(latencies).buckets() == expected


def test_without_latencies():
    histogram = Histogram()
    assert histogram.percentile(50) == 0
    assert histogram.as_json()["count"] == 0
    assert str(histogram) == "0: min 0 ns, median 0 ns, 99 % 0 ns, max 0 ns"


def test_text_has_units_and_bars():
    text = str(made([7, 900, 1_500, 40_000, 40_001, 2_500_000, 3_000_000_000]))
    assert text.startswith("7: min 7 ns, median 4")
    lines = text.splitlines()[1:]
    assert lines[0].split()[:3] == ["4", "ns", "1"]
    assert max(lines, key=lambda line: line.count("#")).split()[2] == "2"
