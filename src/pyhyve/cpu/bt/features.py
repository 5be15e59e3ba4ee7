"""Which instructions the guest's CPUID reports, as the translator asks: a bit for each feature of `decode.pxd` (FT_*).

Bits are named as in Intel SDM vol 2, "CPUID—CPU Identification", and AMD APM vol 3, appendix E.
"""

from collections.abc import Iterable
from typing import Final

from pyhyve.cpu.processor import CpuidEntry

AVX512VL: Final = 63
ALL: Final = (1 << 64) - 1

_EXTENDED: Final = 0x8000_0001

# In the order of FT_*, from 1 on: (leaf, subleaf, register, bit).
_PLACES: Final[tuple[tuple[str, int, int, str, int], ...]] = (
    ("sse3", 1, 0, "ecx", 0),
    ("ssse3", 1, 0, "ecx", 9),
    ("sse4_1", 1, 0, "ecx", 19),
    ("sse4_2", 1, 0, "ecx", 20),
    ("sse4a", _EXTENDED, 0, "ecx", 6),
    ("popcnt", 1, 0, "ecx", 23),
    ("lzcnt", _EXTENDED, 0, "ecx", 5),
    ("bmi1", 7, 0, "ebx", 3),
    ("bmi2", 7, 0, "ebx", 8),
    ("movbe", 1, 0, "ecx", 22),
    ("aes", 1, 0, "ecx", 25),
    ("pclmulqdq", 1, 0, "ecx", 1),
    ("sha", 7, 0, "ebx", 29),
    ("adx", 7, 0, "ebx", 19),
    ("rdrand", 1, 0, "ecx", 30),
    ("rdseed", 7, 0, "ebx", 18),
    ("gfni", 7, 0, "ecx", 8),
    ("f16c", 1, 0, "ecx", 29),
    ("fma", 1, 0, "ecx", 12),
    ("avx2", 7, 0, "ebx", 5),
    ("vaes", 7, 0, "ecx", 9),
    ("vpclmulqdq", 7, 0, "ecx", 10),
    ("avx_vnni", 7, 1, "eax", 4),
    ("avx_ifma", 7, 1, "eax", 23),
    ("avx_vnni_int8", 7, 1, "edx", 4),
    ("avx_ne_convert", 7, 1, "edx", 5),
    ("avx_vnni_int16", 7, 1, "edx", 10),
    ("sha512", 7, 1, "eax", 0),
    ("sm3", 7, 1, "eax", 1),
    ("sm4", 7, 1, "eax", 2),
    ("avx512dq", 7, 0, "ebx", 17),
    ("avx512_ifma", 7, 0, "ebx", 21),
    ("avx512cd", 7, 0, "ebx", 28),
    ("avx512bw", 7, 0, "ebx", 30),
    ("avx512_vbmi", 7, 0, "ecx", 1),
    ("avx512_vbmi2", 7, 0, "ecx", 6),
    ("avx512_vnni", 7, 0, "ecx", 11),
    ("avx512_bitalg", 7, 0, "ecx", 12),
    ("avx512_vpopcntdq", 7, 0, "ecx", 14),
    ("avx512_bf16", 7, 1, "eax", 5),
    ("avx512_fp16", 7, 0, "edx", 23),
    ("avx512_vp2intersect", 7, 0, "edx", 8),
    ("clflushopt", 7, 0, "ebx", 23),
    ("clwb", 7, 0, "ebx", 24),
    ("cmpxchg16b", 1, 0, "ecx", 13),
    ("rdtscp", _EXTENDED, 0, "edx", 27),
    ("rdpid", 7, 0, "ecx", 22),
    ("invpcid", 7, 0, "ebx", 10),
    ("smap", 7, 0, "ebx", 20),
    ("xsaveopt", 0xD, 1, "eax", 0),
    ("xsavec", 0xD, 1, "eax", 1),
    ("xsaves", 0xD, 1, "eax", 3),
    ("serialize", 7, 0, "edx", 14),
    ("movdiri", 7, 0, "ecx", 27),
    ("pku", 7, 0, "ecx", 3),
    ("fsgsbase", 7, 0, "ebx", 0),
)
NUMBERS: Final = {name: number for number, (name, *_) in enumerate(_PLACES, 1)} | {"avx512vl": AVX512VL}


def feature_mask(entries: Iterable[CpuidEntry]) -> int:
    """Return the bits of what these answers report; without any answers, all."""
    words = {(entry.leaf, entry.subleaf or 0): entry for entry in entries}
    if not words:
        return ALL

    def reported(leaf: int, subleaf: int, register: str, bit: int) -> bool:
        entry = words.get((leaf, subleaf))
        return entry is not None and bool(getattr(entry, register) >> bit & 1)

    found = 1 | reported(7, 0, "ebx", 31) << AVX512VL
    for number, (_, leaf, subleaf, register, bit) in enumerate(_PLACES, 1):
        found |= reported(leaf, subleaf, register, bit) << number
    return found
