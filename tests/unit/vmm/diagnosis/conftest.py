"""Machines of interrupt controllers: see switchboard."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_processor import FakeProcessor
from switchboard import Bench, spin

from pyhyve.vmm.vm import Vm


@pytest.fixture
def make_bench(make_vm: Callable[..., tuple[Vm, FakeProcessor]]) -> Callable[..., Bench]:
    return lambda cpus=1: Bench(*make_vm(*[spin] * cpus))


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()
