"""Accesses wider than a register: an ISA bus splits them into bytes."""

from collections.abc import Callable

OPEN_BUS = 0xFF


def read_bytes(read: Callable[[int], int], port: int, size: int) -> int:
    """Little-endian value of `size` byte reads from `port` on."""
    value = 0
    for index in range(size):
        value |= read(port + index) << (8 * index)
    return value


def write_bytes(write: Callable[[int, int], None], port: int, size: int, value: int) -> None:
    """Write `size` bytes of `value`, lowest first, from `port` on."""
    for index in range(size):
        write(port + index, value >> (8 * index) & 0xFF)
