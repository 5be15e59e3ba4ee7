"""Assembling small guests with GNU as and ld, Intel syntax."""

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

MISSING: Final = next((f"{tool} (binutils) is not installed" for tool in ("as", "ld") if not shutil.which(tool)), None)
"""Why nothing can be assembled here, or None."""


@cache
def assemble(source: str, origin: int, bits: int = 64) -> bytes:
    """Return the machine code of `source`, placed at the linear address `origin`, for 16-, 32- or 64-bit mode."""
    with tempfile.TemporaryDirectory(prefix="pyhyve-asm-") as place:
        text, obj, out = (f"{place}/a.{suffix}" for suffix in ("s", "o", "bin"))
        Path(text).write_text(f".intel_syntax noprefix\n.code{bits}\n.text\n{source}\n")
        kind, machine = ("--64", "elf_x86_64") if bits == 64 else ("--32", "elf_i386")
        for command in (
            ["as", kind, "-mx86-used-note=no", "-o", obj, text],
            ["ld", "-m", machine, "-N", "--oformat", "binary", "-e", "0", "-Ttext", hex(origin), "-o", out, obj],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                numbered = "\n".join(f"{n:4} {line}" for n, line in enumerate(source.splitlines(), 4))
                raise ValueError(f"{done.stderr}\n{numbered}")
        return Path(out).read_bytes()
