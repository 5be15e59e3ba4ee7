"""A board without a processor, and its first local APIC."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from board import Board

from pyhyve.vmm.io.vlapic import Vlapic


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def cpu(board: Board) -> Vlapic:
    """CPU 0 of `board`, enabled, in xAPIC mode."""
    return board.add(0)
