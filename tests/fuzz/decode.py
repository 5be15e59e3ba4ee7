"""Compare the decoder with iced-x86 on random instructions, in several processes.

    python tests/fuzz/decode.py [--count N] [--seed N] [--workers N]

The comparison is that of tests/cpu/test_decode.py, where the deliberate differences are listed. All three code sizes,
prefixes and encodings. Exit status: 1 if there is a difference.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))

PIECE: Final = 20_000


def piece(seed: int) -> list[str]:
    """Compare PIECE random instructions; return what differs."""
    import test_decode  # type: ignore[import-not-found]

    rng = random.Random(seed)
    wrong = []
    for n in range(PIECE):
        mode = (64, 64, 32, 16)[n & 3]
        code = rng.randbytes(15) if n % 7 == 0 else test_decode.random_instruction(rng, mode)
        found = test_decode.differences(code, mode)
        if found:
            wrong.append(f"{mode} {code.hex()}: {', '.join(found)}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz-decode", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000_000, help="instructions (10 million)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    chosen = parser.parse_args()
    pieces = -(-chosen.count // PIECE)
    start = time.monotonic()
    differences = 0
    with multiprocessing.get_context("spawn").Pool(chosen.workers) as pool:
        seeds = range(chosen.seed * 1_000_000, chosen.seed * 1_000_000 + pieces)
        for done, wrong in enumerate(pool.imap_unordered(piece, seeds), 1):
            differences += len(wrong)
            for line in wrong[:5]:
                print(line)
            if done % 50 == 0 or done == pieces:
                rate = done * PIECE / (time.monotonic() - start)
                print(f"{done * PIECE:,} instructions, {differences} differences, {rate:,.0f}/s", flush=True)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
