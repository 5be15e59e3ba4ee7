"""Build of the Cython processor engines.

PYHYVE_DEBUG=1   bounds checks, counters, -O1 -g
PYHYVE_EXT=a,b   build only the extensions whose module name contains one of these words
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("PYHYVE_DEBUG", "") not in ("", "0")
ONLY = [w for w in os.environ.get("PYHYVE_EXT", "").split(",") if w]

COMMON = ["-O1", "-g"] if DEBUG else ["-O2", "-g1", "-fno-semantic-interposition"]
COMMON += ["-fno-strict-aliasing", "-fwrapv", "-Wno-unreachable-code", "-Wno-unused-function", "-fvisibility=hidden"]
# What generated code calls must leave the guest's vector and x87 registers alone: general registers only, and no
# loop that the compiler may turn into a call of the C library's (vectorised) memcpy or memset.
HELPER = [
    "-msse4.2",  # the CRC32 instruction (on general registers)
    "-mgeneral-regs-only",
    "-ffreestanding",
    "-fno-tree-loop-distribute-patterns",
    "-fno-builtin",
    "-fno-tree-vectorize",
]
NO_HELPER = {"pyhyve.cpu.bt.run", "pyhyve.cpu.bt.apicstate", "pyhyve.cpu.bt._fuzz", "pyhyve.cpu.kvm.engine"}


def extensions() -> list[Extension]:
    found = []
    for pyx in sorted(Path("src").rglob("*.pyx")):
        module = ".".join(pyx.relative_to("src").with_suffix("").parts)
        if ONLY and not any(word in module for word in ONLY):
            continue
        flags = list(COMMON)
        if module.startswith("pyhyve.cpu.bt.") and module not in NO_HELPER:
            flags += HELPER
        # what a module includes and cimports is added by cythonize
        found.append(Extension(module, [str(pyx)], depends=["setup.py"], extra_compile_args=flags))
    return found


setup(
    ext_modules=cythonize(
        extensions(),
        include_path=["src"],
        language_level=3,
        nthreads=0,
        compiler_directives={
            "boundscheck": DEBUG,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": DEBUG,
            "embedsignature": True,
            "binding": True,
        },
    )
)
