"""Real guests: a shell on the stock kernel, the command line, small kernels of the tests' own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "cpu"))
sys.path.insert(2, str(Path(__file__).parents[1] / "unit" / "bhyve" / "boot"))

from commandline import CommandLine


@pytest.fixture
def command(tmp_path: Path) -> Iterator[CommandLine]:
    """The command line. Whatever a test does with it, nothing may be left behind."""
    commands = CommandLine(tmp_path)
    try:
        yield commands
        assert commands.left_behind() == []
    finally:
        commands.close()
