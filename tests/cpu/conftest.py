"""One test runs on every processor: `engine` is each engine's name, skipped with the reason where it cannot run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import asm
import harness


@pytest.fixture(params=["bt", "kvm"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    found = harness.engine_called(name)
    if isinstance(found, str):
        pytest.skip(found)
    if asm.MISSING:
        pytest.skip(asm.MISSING)
    return name
