"""Assembling small guests with GNU as and ld, Intel syntax."""

import re
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
    """Return the machine code of `source`, placed at the linear address `origin`, for 16-, 32- or 64-bit mode.

    A symbol at_HEX, as in [rip + at_40041000], is that address.
    """
    places = [f"--defsym={name}=0x{name[3:]}" for name in sorted(set(re.findall(r"\bat_[0-9a-f]+\b", source)))]
    with tempfile.TemporaryDirectory(prefix="pyhyve-asm-") as place:
        text, obj, out = (f"{place}/a.{suffix}" for suffix in ("s", "o", "bin"))
        Path(text).write_text(f".intel_syntax noprefix\n.code{bits}\n.text\n{source}\n")
        kind, machine = ("--64", "elf_x86_64") if bits == 64 else ("--32", "elf_i386")
        for command in (
            f"as {kind} -mx86-used-note=no -o {obj} {text}",
            f"ld -m {machine} -N --oformat binary -e 0 -Ttext {origin:#x} {' '.join(places)} -o {out} {obj}",
        ):
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                numbered = "\n".join(f"{n:4} {line}" for n, line in enumerate(source.splitlines(), 4))
                raise ValueError(f"{done.stderr}\n{numbered}")
        return Path(out).read_bytes()
