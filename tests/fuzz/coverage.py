"""Which opcodes the decoder's tables know, and which of them have run."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Final

from pyhyve.cpu.bt import _fuzzgen
from pyhyve.cpu.bt.decode import decode_bytes

Opcode = tuple[int, int, int]
"""Encoding (0 legacy, 1 VEX, 2 EVEX), map, opcode."""

ROWS: Final = {
    (0, 0): "one byte", (0, 1): "0F", (0, 2): "0F 38", (0, 3): "0F 3A", (1, 1): "VEX 0F", (1, 2): "VEX 0F 38",
    (1, 3): "VEX 0F 3A", (2, 1): "EVEX 0F", (2, 2): "EVEX 0F 38", (2, 3): "EVEX 0F 3A", (2, 5): "EVEX map 5",
    (2, 6): "EVEX map 6",
}  # fmt: skip
_ESCAPES: Final = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")
_PREFIXES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3, *range(0x40, 0x50)))


def _forms(encoding: int, map_: int, opcode: int) -> list[bytes]:
    tails = [bytes((opcode, modrm)) + bytes(8) for modrm in (0x43, 0xC3, 0x4B, 0xCB, 0x63, 0xE3, 0x73, 0xF3, 0x7B)]
    if encoding == 0:
        heads = [prefix + rex + _ESCAPES[map_] for prefix in (b"", b"\x66", b"\xf3", b"\xf2") for rex in (b"", b"\x48")]
    elif encoding == 1:
        heads = [bytes((0xC4, 0xE0 | map_, w << 7 | vvvv << 3 | length << 2 | pp))
                 for w in (0, 1) for vvvv in (15, 12) for length in (0, 1) for pp in range(4)]  # fmt: skip
    else:
        heads = [bytes((0x62, 0xF0 | map_, w << 7 | vvvv << 3 | 4 | pp, length << 5 | 8 | mask))
                 for w in (0, 1) for vvvv in (15, 12) for length in range(3)
                 for mask in (0, 1) for pp in range(4)]  # fmt: skip
    return [head + tail for head in heads for tail in tails]


@cache
def known(bits: int) -> dict[str, set[Opcode]]:
    """Opcodes that have a defined form which the fuzzer runs, by row of the tables."""
    found: dict[str, set[Opcode]] = {}
    for (encoding, map_), row in ROWS.items():
        opcodes = set()
        for opcode in range(256):
            if (encoding, map_) == (0, 0) and (opcode in _PREFIXES or opcode in (0x0F, 0x62, 0xC4, 0xC5)):
                continue
            if (encoding, map_) == (0, 1) and opcode in (0x38, 0x3A):
                continue
            for code in _forms(encoding, map_, opcode):
                insn = decode_bytes(code, bits)
                if insn is None or insn["cls"] == 0 or insn["opcode"] != opcode:
                    continue
                if not _fuzzgen.why_left_out(code, bits):
                    opcodes.add((encoding, map_, opcode))
                    break
        found[row] = opcodes
    return found


def seen(counts: Counter[tuple[int, ...]]) -> set[Opcode]:
    return {(key[0], key[1], key[2]) for key in counts}


def totals(all_known: dict[str, set[Opcode]], counts: Counter[tuple[int, ...]]) -> tuple[int, int]:
    """Opcodes that have run, and that are known."""
    run = seen(counts)
    return sum(len(run & opcodes) for opcodes in all_known.values()), sum(len(o) for o in all_known.values())


def table(all_known: dict[str, set[Opcode]], counts: Counter[tuple[int, ...]]) -> list[tuple[str, int, int, str]]:
    """For each row of the tables: its name, opcodes that have run, opcodes that are known, those that are missing."""
    run = seen(counts)
    rows = []
    for row, opcodes in all_known.items():
        missing = sorted(opcode for _, _, opcode in opcodes - run)
        text = " ".join(f"{opcode:02X}" for opcode in missing[:24]) + (" …" if len(missing) > 24 else "")
        if opcodes:
            rows.append((row, len(opcodes & run), len(opcodes), text))
    return rows
