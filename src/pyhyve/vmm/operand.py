"""Operands of decoded instructions: what the decoder says, turned once into what emulation needs at run time."""

from dataclasses import dataclass
from typing import Any, Final

from iced_x86 import Instruction, MemorySize, MemorySizeExt, OpKind, Register


def _gpr_table() -> dict[int, tuple[int, int, int]]:
    """Register → (index as in GPR_NAMES, bytes, shift: 8 for AH, CH, DH, BH)."""
    table: dict[int, tuple[int, int, int]] = {}
    old = ("AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI")
    for index, name in enumerate(old):
        low = name[0] + "L" if index < 4 else name + "L"
        for register, size in ((low, 1), (name, 2), ("E" + name, 4), ("R" + name, 8)):
            table[getattr(Register, register)] = (index, size, 0)
        if index < 4:
            table[getattr(Register, name[0] + "H")] = (index, 1, 8)
    for index in range(8, 16):
        for suffix, size in (("L", 1), ("W", 2), ("D", 4), ("", 8)):
            table[getattr(Register, f"R{index}{suffix}")] = (index, size, 0)
    return table


GPRS: Final = _gpr_table()
SEGMENTS: Final[dict[int, str]] = {
    getattr(Register, name.upper()): name for name in ("es", "cs", "ss", "ds", "fs", "gs")
}

# What an operand is.
REG: Final = 0
IMM: Final = 1
MEM: Final = 2

_MEMORY_KINDS: Final[dict[int, tuple[bool, int, int]]] = {
    # kind: (segment override may apply, index register, address bytes)
    OpKind.MEMORY_SEG_SI: (True, 6, 2),
    OpKind.MEMORY_SEG_ESI: (True, 6, 4),
    OpKind.MEMORY_SEG_RSI: (True, 6, 8),
    OpKind.MEMORY_ESDI: (False, 7, 2),
    OpKind.MEMORY_ESEDI: (False, 7, 4),
    OpKind.MEMORY_ESRDI: (False, 7, 8),
}
_IMMEDIATES: Final = frozenset(getattr(OpKind, name) for name in dir(OpKind) if name.startswith("IMMEDIATE"))


@dataclass(slots=True)
class Operand:
    """`size` in bytes. REG: `index`, `shift`. IMM: `value`. MEM: segment, base + index * scale + value, `address_mask`;
    base and index are GPR numbers or -1; RIP-relative addresses are already absolute."""

    kind: int
    size: int
    index: int = -1
    shift: int = 0
    value: int = 0
    segment: str = ""
    base: int = -1
    scale: int = 1
    address_mask: int = (1 << 64) - 1


def operands(instruction: Instruction) -> list[Operand] | None:
    """Return the explicit operands, or None if one of them is of a kind that only vector or system code has."""
    found: list[Operand] = []
    for number in range(instruction.op_count):
        kind = instruction.op_kind(number)
        if kind == OpKind.REGISTER:
            register = GPRS.get(instruction.op_register(number))
            if register is None:
                return None
            found.append(Operand(REG, register[1], index=register[0], shift=register[2]))
        elif kind == OpKind.MEMORY:
            found.append(_memory(instruction))
        elif kind in _MEMORY_KINDS:
            found.append(_string(instruction, kind))
        elif kind in _IMMEDIATES:
            found.append(Operand(IMM, 0, value=instruction.immediate(number)))
        else:
            return None
    return found


def memory_bytes(instruction: Instruction) -> int:
    """Return the size of the memory operand, 1 to 8 bytes (or whatever a vector instruction has)."""
    size: int = MemorySizeExt.size(_memory_size(instruction))
    return size


def _memory_size(instruction: Instruction) -> Any:
    return instruction.memory_size if instruction.memory_size else MemorySize.UINT8


def _memory(instruction: Instruction) -> Operand:
    base, index = instruction.memory_base, instruction.memory_index
    displacement = instruction.memory_displacement
    bits = 64
    base_index = index_index = -1
    if base in (Register.RIP, Register.EIP):
        bits = 32 if base == Register.EIP else 64
    elif base != Register.NONE:
        base_index, size, _ = GPRS[base]
        bits = size * 8
    if index != Register.NONE:
        index_index, size, _ = GPRS[index]
        bits = size * 8
    if base == Register.NONE and index == Register.NONE and instruction.memory_displ_size:
        bits = instruction.memory_displ_size * 8
    return Operand(
        MEM,
        memory_bytes(instruction),
        index=index_index,
        value=displacement,
        segment=SEGMENTS[instruction.memory_segment],
        base=base_index,
        scale=instruction.memory_index_scale,
        address_mask=(1 << bits) - 1,
    )


def _string(instruction: Instruction, kind: int) -> Operand:
    overridable, index, address_bytes = _MEMORY_KINDS[kind]
    segment = SEGMENTS[instruction.memory_segment] if overridable else "es"
    return Operand(
        MEM,
        memory_bytes(instruction),
        segment=segment,
        base=index,
        address_mask=(1 << 8 * address_bytes) - 1,
    )
