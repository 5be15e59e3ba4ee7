"""Features of the guest's processor that a user may switch (`--cpu-feature`), by the names that Linux gives them.

Switching one off takes what needs it along. What every x86-64 processor has (CMOV, SSE2, ...) and what is the monitor's
own (x2APIC, the TSC deadline timer) cannot be switched. Bits are named as in Intel SDM vol 2, "CPUID—CPU
Identification", and AMD APM vol 3, appendix E.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.cpu.processor import Capabilities
from pyhyve.vmm.hostcpu import CpuidFunction

_EXTENDED: Final = 0x8000_0001
_PV_FEATURES: Final = 0x4000_0101

# name: (leaf, subleaf, register, bit), what it needs
FEATURES: Final[Mapping[str, tuple[int, int, str, int, tuple[str, ...]]]] = {
    "sse3": (1, 0, "ecx", 0, ()),
    "pclmulqdq": (1, 0, "ecx", 1, ()),
    "ssse3": (1, 0, "ecx", 9, ("sse3",)),
    "fma": (1, 0, "ecx", 12, ("avx",)),
    "cx16": (1, 0, "ecx", 13, ()),
    "pcid": (1, 0, "ecx", 17, ()),
    "x2apic": (1, 0, "ecx", 21, ()),
    "tsc_deadline": (1, 0, "ecx", 24, ()),
    "sse4_1": (1, 0, "ecx", 19, ("ssse3",)),
    "sse4_2": (1, 0, "ecx", 20, ("sse4_1",)),
    "movbe": (1, 0, "ecx", 22, ()),
    "popcnt": (1, 0, "ecx", 23, ()),
    "aes": (1, 0, "ecx", 25, ()),
    "xsave": (1, 0, "ecx", 26, ()),
    "avx": (1, 0, "ecx", 28, ("xsave", "sse4_2")),
    "f16c": (1, 0, "ecx", 29, ("avx",)),
    "rdrand": (1, 0, "ecx", 30, ()),
    "fsgsbase": (7, 0, "ebx", 0, ()),
    "bmi1": (7, 0, "ebx", 3, ()),
    "avx2": (7, 0, "ebx", 5, ("avx",)),
    "smep": (7, 0, "ebx", 7, ()),
    "bmi2": (7, 0, "ebx", 8, ()),
    "invpcid": (7, 0, "ebx", 10, ("pcid",)),
    "avx512f": (7, 0, "ebx", 16, ("avx2", "fma", "f16c")),
    "avx512dq": (7, 0, "ebx", 17, ("avx512f",)),
    "rdseed": (7, 0, "ebx", 18, ()),
    "adx": (7, 0, "ebx", 19, ()),
    "smap": (7, 0, "ebx", 20, ()),
    "avx512ifma": (7, 0, "ebx", 21, ("avx512f",)),
    "clflushopt": (7, 0, "ebx", 23, ()),
    "clwb": (7, 0, "ebx", 24, ()),
    "avx512cd": (7, 0, "ebx", 28, ("avx512f",)),
    "sha_ni": (7, 0, "ebx", 29, ()),
    "avx512bw": (7, 0, "ebx", 30, ("avx512f",)),
    "avx512vl": (7, 0, "ebx", 31, ("avx512f",)),
    "avx512vbmi": (7, 0, "ecx", 1, ("avx512bw",)),
    "umip": (7, 0, "ecx", 2, ()),
    "pku": (7, 0, "ecx", 3, ("xsave",)),
    "avx512_vbmi2": (7, 0, "ecx", 6, ("avx512bw",)),
    "gfni": (7, 0, "ecx", 8, ()),
    "vaes": (7, 0, "ecx", 9, ("avx", "aes")),
    "vpclmulqdq": (7, 0, "ecx", 10, ("avx", "pclmulqdq")),
    "avx512_vnni": (7, 0, "ecx", 11, ("avx512f",)),
    "avx512_bitalg": (7, 0, "ecx", 12, ("avx512bw",)),
    "avx512_vpopcntdq": (7, 0, "ecx", 14, ("avx512f",)),
    "la57": (7, 0, "ecx", 16, ()),
    "rdpid": (7, 0, "ecx", 22, ()),
    "movdiri": (7, 0, "ecx", 27, ()),
    "avx512_vp2intersect": (7, 0, "edx", 8, ("avx512f",)),
    "avx512_fp16": (7, 0, "edx", 23, ("avx512bw",)),
    "sha512": (7, 1, "eax", 0, ("avx2",)),
    "sm3": (7, 1, "eax", 1, ("avx",)),
    "sm4": (7, 1, "eax", 2, ("avx",)),
    "avx_vnni": (7, 1, "eax", 4, ("avx2",)),
    "avx512_bf16": (7, 1, "eax", 5, ("avx512bw",)),
    "avx_ifma": (7, 1, "eax", 23, ("avx2",)),
    "avx_vnni_int8": (7, 1, "edx", 4, ("avx2",)),
    "avx_ne_convert": (7, 1, "edx", 5, ("avx2",)),
    "avx_vnni_int16": (7, 1, "edx", 10, ("avx2",)),
    "xsaveopt": (0xD, 1, "eax", 0, ("xsave",)),
    "xsavec": (0xD, 1, "eax", 1, ("xsave",)),
    "xsaves": (0xD, 1, "eax", 3, ("xsavec",)),
    "abm": (_EXTENDED, 0, "ecx", 5, ()),
    "sse4a": (_EXTENDED, 0, "ecx", 6, ("sse3",)),
    "pdpe1gb": (_EXTENDED, 0, "edx", 26, ()),
    "rdtscp": (_EXTENDED, 0, "edx", 27, ()),
    "msi_ext_dest_id": (_PV_FEATURES, 0, "eax", 15, ()),
}
_REGISTERS: Final = ("eax", "ebx", "ecx", "edx")
ON_REQUEST: Final = frozenset({"la57", "msi_ext_dest_id"})
"""Off unless asked for: five levels of page tables cost time at each miss of the TLB, and Linux uses all there are;
messages with destinations of 15 bits are of use where APIC ids are above 254."""
_STATE: Final = {"avx": 0xE4, "avx512f": 0xE0, "pku": 0x200}
"""XCR0 bits that go with a feature."""


def parse_cpu_features(words: Iterable[str], option: str = "--cpu-feature") -> dict[str, bool]:
    """Return {name: wanted} of words like "avx512f=off", several in one joined by commas; the last word on a feature
    counts. UsageError, one line, for anything else."""
    found: dict[str, bool] = {}
    for word in (part for text in words for part in text.split(",")):
        name, _, state = word.partition("=")
        if state not in ("on", "off"):
            raise UsageError(f"{option} {word!r}: write NAME=on or NAME=off, for instance avx512f=off")
        if name not in FEATURES:
            raise UsageError(f"{option} {word!r}: no feature of that name; '{option} help' lists them")
        found[name] = state == "on"
    for name, wanted in found.items():
        for missing in sorted(needed_by(name)) if wanted else ():
            if found.get(missing) is False:
                raise UsageError(f"{option} {name}=on: needs {missing}, which {missing}=off switches off")
    return found


def needed_by(name: str) -> set[str]:
    """Return all that a feature needs, near and far."""
    found: set[str] = set()
    for need in FEATURES[name][4]:
        found |= {need} | needed_by(need)
    return found


def switched_off(switches: Mapping[str, bool]) -> set[str]:
    """Return the features that are off, those that need them included."""
    off = {name for name, wanted in switches.items() if not wanted}
    return off | {name for name in FEATURES if needed_by(name) & off}


def of_the_monitor(switches: Mapping[str, bool]) -> dict[str, bool]:
    """Return which of the features that no processor has to support are to be there: CpuidPolicy's own arguments."""
    return {name: switches.get(name, name not in ON_REQUEST) for name in ("x2apic", "tsc_deadline", "msi_ext_dest_id")}


def without(
    host: CpuidFunction, capabilities: Capabilities, switches: Mapping[str, bool]
) -> tuple[CpuidFunction, Capabilities]:
    """Return a host's CPUID and an engine's capabilities less what is switched off."""
    off = switched_off(switches) | {name for name in ON_REQUEST if not switches.get(name)}
    if not off:
        return host, capabilities
    state = 0
    for name in off:
        state |= _STATE.get(name, 0)
    kept = tuple(note for note in capabilities.notes if note not in off)
    if "avx512f" in off:
        kept = tuple(note for note in kept if note != "avx512")
    masks: dict[tuple[int, int], list[int]] = {}
    for name in off:
        leaf, subleaf, register, bit, _ = FEATURES[name]
        masks.setdefault((leaf, subleaf), [0] * 4)[_REGISTERS.index(register)] |= 1 << bit

    def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        eax, ebx, ecx, edx = host(leaf, subleaf)
        a, b, c, d = masks.get((leaf, subleaf), (0, 0, 0, 0))
        return eax & ~a, ebx & ~b, ecx & ~c, edx & ~d

    return cpuid, replace(capabilities, xcr0=capabilities.xcr0 & ~state, notes=kept)


def check_wanted(
    switches: Mapping[str, bool], reported: Mapping[tuple[int, int], Mapping[str, int]], processor: str
) -> None:
    """UsageError if a feature that is switched on is not in what the guest's CPUID reports."""
    for name, wanted in switches.items():
        leaf, subleaf, register, bit, _ = FEATURES[name]
        if wanted and not reported.get((leaf, subleaf), {}).get(register, 0) >> bit & 1:
            raise UsageError(f"--cpu-feature {name}=on: the {processor} processor cannot offer it on this host")


def cpu_feature_help() -> str:
    """Return what `--cpu-feature help` prints."""
    width = max(map(len, FEATURES))
    lines = ["NAME=off hides a feature from the guest, and all that need it; NAME=on insists on it.", ""]
    on_request = f"Off unless asked for: {', '.join(sorted(ON_REQUEST))}."
    for name in sorted(FEATURES):
        needs = FEATURES[name][4]
        lines.append(f"{name:{width}}  needs {', '.join(needs)}" if needs else name)
    return "\n".join((*lines, "", on_request))
