"""Flags that instructions leave undefined, by the manual.

Source: Intel SDM vol 2, the entry of each instruction, "Flags Affected". Where that depends on the operands (a shift's
count), the flags that any count may leave undefined are given: both sides need not agree on them.
"""

from __future__ import annotations

from functools import cache
from typing import Final

from iced_x86 import Decoder, Mnemonic, RflagsBits

CF, PF, AF, ZF, SF, OF = 0x1, 0x4, 0x10, 0x40, 0x80, 0x800
ALL: Final = CF | PF | AF | ZF | SF | OF

UNDEFINED: Final[dict[str, tuple[int, str]]] = {
    "AAA": (OF | SF | ZF | PF, "AAA—ASCII Adjust After Addition"),
    "AAS": (OF | SF | ZF | PF, "AAS—ASCII Adjust AL After Subtraction"),
    "AAD": (OF | AF | CF, "AAD—ASCII Adjust AX Before Division"),
    "AAM": (OF | AF | CF, "AAM—ASCII Adjust AX After Multiply"),
    "DAA": (OF, "DAA—Decimal Adjust AL After Addition"),
    "DAS": (OF, "DAS—Decimal Adjust AL After Subtraction"),
    "AND": (AF, "AND—Logical AND"),
    "OR": (AF, "OR—Logical Inclusive OR"),
    "XOR": (AF, "XOR—Logical Exclusive OR"),
    "TEST": (AF, "TEST—Logical Compare"),
    "MUL": (SF | ZF | AF | PF, "MUL—Unsigned Multiply"),
    "IMUL": (SF | ZF | AF | PF, "IMUL—Signed Multiply"),
    "DIV": (ALL, "DIV—Unsigned Divide"),
    "IDIV": (ALL, "IDIV—Signed Divide"),
    "SHL": (CF | AF | OF, "SAL/SAR/SHL/SHR—Shift"),
    "SAL": (CF | AF | OF, "SAL/SAR/SHL/SHR—Shift"),
    "SHR": (CF | AF | OF, "SAL/SAR/SHL/SHR—Shift"),
    "SAR": (AF | OF, "SAL/SAR/SHL/SHR—Shift"),
    "ROL": (OF, "RCL/RCR/ROL/ROR—Rotate"),
    "ROR": (OF, "RCL/RCR/ROL/ROR—Rotate"),
    "RCL": (OF, "RCL/RCR/ROL/ROR—Rotate"),
    "RCR": (OF, "RCL/RCR/ROL/ROR—Rotate"),
    "SHLD": (ALL, "SHLD—Double Precision Shift Left"),
    "SHRD": (ALL, "SHRD—Double Precision Shift Right"),
    "BSF": (CF | OF | SF | AF | PF, "BSF—Bit Scan Forward"),
    "BSR": (CF | OF | SF | AF | PF, "BSR—Bit Scan Reverse"),
    "BT": (OF | SF | AF | PF, "BT—Bit Test"),
    "BTC": (OF | SF | AF | PF, "BTC—Bit Test and Complement"),
    "BTR": (OF | SF | AF | PF, "BTR—Bit Test and Reset"),
    "BTS": (OF | SF | AF | PF, "BTS—Bit Test and Set"),
    "LZCNT": (OF | SF | PF | AF, "LZCNT—Count the Number of Leading Zero Bits"),
    "TZCNT": (OF | SF | PF | AF, "TZCNT—Count the Number of Trailing Zero Bits"),
    "ANDN": (AF | PF, "ANDN—Logical AND NOT"),
    "BEXTR": (AF | SF | PF, "BEXTR—Bit Field Extract"),
    "BLSI": (AF | PF, "BLSI—Extract Lowest Set Isolated Bit"),
    "BLSMSK": (AF | PF, "BLSMSK—Get Mask Up to Lowest Set Bit"),
    "BLSR": (AF | PF, "BLSR—Reset Lowest Set Bit"),
    "BZHI": (AF | PF, "BZHI—Zero High Bits Starting with Specified Bit Position"),
}
"""Flags and the entry of the manual, by mnemonic."""

_BITS: Final = {RflagsBits.CF: CF, RflagsBits.PF: PF, RflagsBits.AF: AF, RflagsBits.ZF: ZF, RflagsBits.SF: SF,
                RflagsBits.OF: OF}  # fmt: skip
_NAMES: Final = {value: name for name, value in vars(Mnemonic).items() if name.isupper() and isinstance(value, int)}


def undefined_by(mnemonic: int) -> int:
    """RFLAGS bits that the instruction of this iced-x86 mnemonic may leave undefined."""
    return UNDEFINED.get(_NAMES[mnemonic], (0, ""))[0]


def flags_of(code: bytes, bits: int = 64) -> tuple[int, int, int]:
    """RFLAGS bits that the instruction defines, those that it may leave undefined, those that it reads."""
    insn = next(iter(Decoder(bits, code)))
    unknown = undefined_by(insn.mnemonic)
    written = read = 0
    for bit, flag in _BITS.items():
        if (insn.rflags_modified | insn.rflags_undefined) & bit:
            written |= flag
        if insn.rflags_read & bit:
            read |= flag
    return written & ~unknown, unknown & written, read


@cache
def table(bits: int) -> bytes:
    """undefined_by() by encoding: (((encoding * 4 + map) * 4 + prefix) * 256 + opcode) * 8 + ModRM.reg, a byte each
    with CF PF AF ZF SF OF in bits 0 to 5. Encodings are legacy and VEX, prefixes none, 66, F3, F2."""
    found = bytearray(2 * 4 * 4 * 256 * 8)
    escapes = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")
    at = 0
    for encoding in range(2):
        for map_ in range(4):
            for prefix in range(4):
                for opcode in range(256):
                    for reg in range(8):
                        tail = bytes((opcode, 0xC1 | reg << 3)) + bytes(8)
                        if encoding == 0:
                            code = (b"", b"\x66", b"\xf3", b"\xf2")[prefix] + escapes[map_] + tail
                        else:
                            code = bytes((0xC4, 0xE0 | map_, 0x70 | prefix)) + tail
                        if opcode in _RELEVANT[encoding][map_]:
                            insn = Decoder(bits, code).decode()
                            found[at] = sum(1 << n for n, flag in enumerate(_BITS.values())
                                            if undefined_by(insn.mnemonic) & flag)  # fmt: skip
                        at += 1
    return bytes(found)


_RELEVANT: Final[tuple[tuple[frozenset[int], ...], ...]] = (
    (frozenset(range(256)) - {0x0F, 0x62, 0xC4, 0xC5, 0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65},
     frozenset(range(0xA0, 0xC0)), frozenset(), frozenset()),
    (frozenset(), frozenset(), frozenset(range(0xF0, 0x100)), frozenset()),
)  # fmt: skip
"""Opcodes that are looked at: the others have no flags or define them all."""
