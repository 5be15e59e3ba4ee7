"""Instruction decoding for the translator: lengths, operands, memory accesses and flags, by tables."""

from typing import Any

def decode_bytes(code: bytes, mode: int) -> dict[str, Any] | None:
    """Return the fields of the instruction at the start of `code` by name, None if bytes are missing.

    `mode` is 16, 32 or 64. "length" is -1 for an instruction of more than 15 bytes.
    """

def decode_rate(code: bytes, mode: int, rounds: int) -> int:
    """Decode `code` from start to end `rounds` times; return the number of instructions decoded, for timing."""
