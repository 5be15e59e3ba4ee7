"""Why a processor returned to the monitor: VT-x's basic exit reasons, where VT-x has one.

Source: Intel SDM vol 3, appendix "VMX Basic Exit Reasons".
"""

from typing import Final

EXCEPTION: Final = 0
EXTERNAL_INTERRUPT: Final = 1
"""Another thread called kick()."""
TRIPLE_FAULT: Final = 2
INTERRUPT_WINDOW: Final = 7
NMI_WINDOW: Final = 8
TASK_SWITCH: Final = 9
CPUID: Final = 10
HLT: Final = 12
VMCALL: Final = 18
CR_ACCESS: Final = 28
IO: Final = 30
RDMSR: Final = 31
WRMSR: Final = 32
MWAIT: Final = 36
MONITOR_TRAP: Final = 37
PAUSE: Final = 40
TPR_BELOW_THRESHOLD: Final = 43
EPT_VIOLATION: Final = 48
EPT_MISCONFIG: Final = 49
WBINVD: Final = 54
APIC_WRITE: Final = 56
"""The vCPU has sent an IPI itself (`ApicState.direct`); bit n of `qualification`: vCPU n, not in `run()`, must look."""
ENGINE_ERROR: Final = 255
"""The engine met something that it cannot run (a limit or a bug); `qualification` and `message()` say what."""
MMIO: Final = 256
"""An access outside RAM that the processor has decoded itself; finish it by `complete_mmio(value)`. Not of VT-x: an
engine that leaves decoding to the monitor exits with EPT_VIOLATION instead."""

NAMES: Final[dict[int, str]] = {
    value: name.lower().replace("_", "-") for name, value in list(globals().items()) if isinstance(value, int)
}
