"""Model-specific registers that the monitor answers: a table from number to reader and writer, for each vCPU.

What the engine keeps itself (SYSCALL's registers, segment bases, PAT, EFER) never comes here while the engine does not
exit for it; if it does, it is passed on by name. A register that nobody knows is #GP, as in hardware, and counted.

Numbers and names: Intel SDM vol 4, "Architectural MSRs"; AMD APM vol 2, appendix "MSR Cross-Reference".
"""

from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol

from pyhyve.base.errors import GuestFault
from pyhyve.cpu.processor import Segment, VcpuBackend
from pyhyve.vmm.cpuid import ARCH_CAPABILITIES_IMMUNE
from pyhyve.vmm.tsc import GuestTsc, PvClock

Reader = Callable[[int], int]
Writer = Callable[[int, int], object]

TSC: Final = 0x10
PLATFORM_ID: Final = 0x17
APIC_BASE: Final = 0x1B
FEATURE_CONTROL: Final = 0x3A
TSC_ADJUST: Final = 0x3B
SPEC_CTRL: Final = 0x48
PRED_CMD: Final = 0x49
BIOS_UPDATE: Final = 0x79
BIOS_SIGN_ID: Final = 0x8B
PLATFORM_INFO: Final = 0xCE
MTRR_CAP: Final = 0xFE
ARCH_CAPABILITIES: Final = 0x10A
FLUSH_CMD: Final = 0x10B
MCG_CAP: Final = 0x179
MCG_CMCI_P: Final = 1 << 10
MCG_STATUS: Final = 0x17A
PERF_STATUS: Final = 0x198
PERF_CTL: Final = 0x199
MISC_ENABLE: Final = 0x1A0
DEBUGCTL: Final = 0x1D9
MTRR_PHYSBASE0: Final = 0x200
MTRR_VARIABLE: Final = 8
MTRR_FIXED: Final = (0x250, 0x258, 0x259, *range(0x268, 0x270))
MTRR_DEF_TYPE: Final = 0x2FF
TSC_DEADLINE: Final = 0x6E0
X2APIC_FIRST: Final = 0x800
X2APIC_LAST: Final = 0x8FF
X2APIC_TPR: Final = 0x808
X2APIC_PPR: Final = 0x80A
PV_WALL_CLOCK: Final = 0x4B56_4D00
PV_SYSTEM_TIME: Final = 0x4B56_4D01

AMD_SYSCFG: Final = 0xC001_0010
AMD_HWCR: Final = 0xC001_0015
AMD_TOP_MEM: Final = 0xC001_001A
AMD_TOP_MEM2: Final = 0xC001_001D
AMD_NB_CFG: Final = 0xC001_001F
AMD_PATCH_LOADER: Final = 0xC001_0020
AMD_PERFORMANCE_COUNTERS: Final = range(0xC001_0000, 0xC001_0008)
"""PERF_LEGACY_CTL0-3 and PERF_LEGACY_CTR0-3."""
AMD_INT_PENDING: Final = 0xC001_0055
AMD_MMIO_CONF_BASE: Final = 0xC001_0058
AMD_VIRT_SPEC_CTRL: Final = 0xC001_011F
AMD_LS_CFG: Final = 0xC001_1020
AMD_IC_CFG: Final = 0xC001_1021
AMD_DC_CFG: Final = 0xC001_1022
AMD_BU_CFG2: Final = 0xC001_102A
AMD_DE_CFG: Final = 0xC001_1029
AMD_CU_CFG3: Final = 0xC001_102B
DE_CFG_LFENCE_SERIALIZE: Final = 1 << 1
HWCR_TSC_FREQ_SEL: Final = 1 << 24

MISC_ENABLE_FAST_STRINGS: Final = 1 << 0
MISC_ENABLE_BTS_UNAVAILABLE: Final = 1 << 11
MISC_ENABLE_PEBS_UNAVAILABLE: Final = 1 << 12
MISC_ENABLE_NX_DISABLE: Final = 1 << 34

_SPEC_CTRL_VALID: Final = 0x4F7  # IBRS STIBP SSBD IPRED_DIS_U/S RRSBA_DIS_U/S PSFD BHI_DIS_S
_WRITE_BACK: Final = 6
_MTRR_ENABLE: Final = 1 << 11 | 1 << 10
_MTRR_VALID: Final = 1 << 11
_MEMORY_TYPES: Final = frozenset((0, 1, 4, 5, 6))

_ENGINE_MSRS: Final = {
    0x174: "sysenter_cs",
    0x175: "sysenter_esp",
    0x176: "sysenter_eip",
    0x277: "pat",
    0xC000_0080: "efer",
    0xC000_0081: "star",
    0xC000_0082: "lstar",
    0xC000_0083: "cstar",
    0xC000_0084: "sfmask",
    0xC000_0102: "kernel_gs_base",
    0xC000_0103: "tsc_aux",
}
_SEGMENT_MSRS: Final = {0xC000_0100: "fs", 0xC000_0101: "gs"}


class ApicMsrs(Protocol):
    """The part of a local APIC that MSRs reach: IA32_APIC_BASE, IA32_TSC_DEADLINE, the x2APIC range."""

    def rdmsr(self, msr: int) -> int: ...

    def wrmsr(self, msr: int, value: int) -> None: ...


class MsrTable:
    """One vCPU's registers. `readers` and `writers` are the tables that the run loop indexes.

    Both kinds of function raise GuestFault for what hardware answers with #GP.
    """

    def __init__(
        self,
        backend: VcpuBackend,
        vlapic: ApicMsrs,
        tsc: GuestTsc,
        pv_clock: PvClock,
        *,
        intel: bool,
        hardware: bool,
        phys_bits: int,
        cmci: bool = False,
        mmio_hole: tuple[int, int] = (0xC000_0000, 0x4000_0000),
    ) -> None:
        self._backend = backend
        self._tsc = tsc
        self._phys_bits = phys_bits
        self._mmio_hole = mmio_hole
        self._values: dict[int, int] = {}
        self._pv_clock = pv_clock
        self.unknown: Counter[int] = Counter()
        """How often the guest touched each register that nobody knows."""
        self.readers: dict[int, Reader] = {}
        self.writers: dict[int, Writer] = {}

        for number in (APIC_BASE, TSC_DEADLINE, *range(X2APIC_FIRST, X2APIC_LAST + 1)):
            self.readers[number] = vlapic.rdmsr
            self.writers[number] = vlapic.wrmsr
        self._define(TSC, lambda _: tsc.now(), lambda _, value: tsc.write(value))
        self._define(TSC_ADJUST, lambda _: tsc.adjust, lambda _, value: tsc.write_adjust(value))
        self._define(PV_SYSTEM_TIME, lambda _: pv_clock.system_time, lambda _, v: pv_clock.write_system_time(v))
        self._define(PV_WALL_CLOCK, lambda _: pv_clock.wall_clock, lambda _, v: pv_clock.write_wall_clock(v))
        for number in _ENGINE_MSRS:
            self._define(number, self._read_engine, self._write_engine)
        for number in _SEGMENT_MSRS:
            self._define(number, self._read_segment_base, self._write_segment_base)
        self._define_mtrrs()
        # No banks; CMCI as the local APIC's version register has it.
        self._constant(MCG_CAP, MCG_CMCI_P if cmci else 0)
        self._plain(MCG_STATUS, 0)
        self._define(BIOS_SIGN_ID, self._read, _ignore)
        self._define(BIOS_UPDATE, None, _ignore)
        self._define(SPEC_CTRL, self._read, self._write_spec_ctrl)
        self._define(PRED_CMD, None, _ignore)
        if not hardware:
            self._constant(ARCH_CAPABILITIES, ARCH_CAPABILITIES_IMMUNE)
        self._plain(DEBUGCTL, 0)
        # AMD has none, but every hypervisor that guests know shows it.
        self._plain(MISC_ENABLE, MISC_ENABLE_FAST_STRINGS | MISC_ENABLE_BTS_UNAVAILABLE | MISC_ENABLE_PEBS_UNAVAILABLE)
        for number in range(0x1DB, 0x1DF):  # last branch and last interrupt: none recorded
            self._constant(number, 0)
        if intel:
            self._define_intel()
        else:
            self._define_amd()
        self._defaults = dict(self._values)

    def reset(self) -> None:
        """All registers as after a reset (IA32_TIME_STAMP_COUNTER starts from 0 again: the caller sets the offset)."""
        self._values = dict(self._defaults)
        self._pv_clock.reset()
        self._tsc.adjust = 0

    def share_task_priority(self, reader: Reader, writer: Writer) -> None:
        """The local APIC's registers that show or change the task priority go through these: it is CR8 as well."""
        for msr in (X2APIC_TPR, X2APIC_PPR):
            self.readers[msr] = reader
        for msr in (APIC_BASE, X2APIC_TPR):  # an APIC that is turned off is reset
            self.writers[msr] = writer

    def read(self, msr: int) -> int:
        """Return the register's value. Raises GuestFault (#GP) for one that is not there."""
        reader = self.readers.get(msr)
        if reader is None:
            self.unknown[msr] += 1
            raise GuestFault(13, 0)
        return reader(msr)

    def write(self, msr: int, value: int) -> None:
        writer = self.writers.get(msr)
        if writer is None:
            self.unknown[msr] += 1
            raise GuestFault(13, 0)
        writer(msr, value)

    def _define(self, msr: int, reader: Reader | None, writer: Writer | None) -> None:
        if reader is not None:
            self.readers[msr] = reader
            self._values.setdefault(msr, 0)
        if writer is not None:
            self.writers[msr] = writer

    def _plain(self, msr: int, value: int) -> None:
        """A register that keeps what is written."""
        self._define(msr, self._read, self._store)
        self._values[msr] = value

    def _constant(self, msr: int, value: int) -> None:
        """A register that is read only: writing is #GP."""
        self._define(msr, self._read, None)
        self._values[msr] = value

    def _define_mtrrs(self) -> None:
        """As firmware leaves them: write-back, but for the hole in which the chips and PCI windows lie."""
        self._constant(MTRR_CAP, MTRR_VARIABLE | 1 << 8 | 1 << 10)
        for number in MTRR_FIXED:
            self._define(number, self._read, self._write_mtrr_fixed)
            self._values[number] = 0x0606_0606_0606_0606
        for index in range(MTRR_VARIABLE):
            self._define(MTRR_PHYSBASE0 + 2 * index, self._read, self._write_mtrr_base)
            self._define(MTRR_PHYSBASE0 + 2 * index + 1, self._read, self._write_mtrr_mask)
        base, size = self._mmio_hole
        self._values[MTRR_PHYSBASE0] = base
        self._values[MTRR_PHYSBASE0 + 1] = (1 << self._phys_bits) - size | _MTRR_VALID
        self._define(MTRR_DEF_TYPE, self._read, self._write_mtrr_def_type)
        self._values[MTRR_DEF_TYPE] = _MTRR_ENABLE | _WRITE_BACK

    def _define_intel(self) -> None:
        self._define(FLUSH_CMD, None, _ignore)
        self._constant(PLATFORM_ID, 0)
        self._constant(FEATURE_CONTROL, 1)  # locked, with VMX off
        ratio = round(self._tsc.khz / 100_000) & 0xFF
        self._constant(PLATFORM_INFO, ratio << 8)
        self._constant(PERF_STATUS, ratio << 8)
        self._plain(PERF_CTL, 0)
        self._values[BIOS_SIGN_ID] = 1 << 32

    def _define_amd(self) -> None:
        self._values[BIOS_SIGN_ID] = 0x0100_0065
        self._plain(AMD_SYSCFG, 0)
        self._plain(AMD_HWCR, HWCR_TSC_FREQ_SEL)
        for number in (AMD_TOP_MEM, AMD_TOP_MEM2, AMD_NB_CFG, AMD_INT_PENDING, AMD_MMIO_CONF_BASE, AMD_VIRT_SPEC_CTRL):
            self._plain(number, 0)
        for number in (AMD_LS_CFG, AMD_IC_CFG, AMD_DC_CFG, AMD_BU_CFG2, AMD_CU_CFG3):
            self._plain(number, 0)
        self._plain(AMD_DE_CFG, DE_CFG_LFENCE_SERIALIZE)
        self._define(AMD_PATCH_LOADER, None, _ignore)
        for number in AMD_PERFORMANCE_COUNTERS:  # every AMD processor has them; these never count
            self._define(number, self._read, _ignore)

    def _read(self, msr: int) -> int:
        return self._values[msr]

    def _store(self, msr: int, value: int) -> None:
        self._values[msr] = value

    def _read_engine(self, msr: int) -> int:
        return self._backend.get(_ENGINE_MSRS[msr])

    def _write_engine(self, msr: int, value: int) -> None:
        self._backend.set(_ENGINE_MSRS[msr], value)

    def _read_segment_base(self, msr: int) -> int:
        return self._backend.get_segment(_SEGMENT_MSRS[msr]).base

    def _write_segment_base(self, msr: int, value: int) -> None:
        name = _SEGMENT_MSRS[msr]
        old = self._backend.get_segment(name)
        self._backend.set_segment(name, Segment(old.selector, value, old.limit, old.attr))

    def _write_spec_ctrl(self, msr: int, value: int) -> None:
        if value & ~_SPEC_CTRL_VALID:
            raise GuestFault(13, 0)
        self._values[msr] = value

    def _write_mtrr_fixed(self, msr: int, value: int) -> None:
        if any(byte not in _MEMORY_TYPES for byte in value.to_bytes(8, "little")):
            raise GuestFault(13, 0)
        self._values[msr] = value

    def _write_mtrr_base(self, msr: int, value: int) -> None:
        if value & 0xFF not in _MEMORY_TYPES or value & 0xF00 or value >> self._phys_bits:
            raise GuestFault(13, 0)
        self._values[msr] = value

    def _write_mtrr_mask(self, msr: int, value: int) -> None:
        if value & 0x7FF or value >> self._phys_bits:
            raise GuestFault(13, 0)
        self._values[msr] = value

    def _write_mtrr_def_type(self, msr: int, value: int) -> None:
        if value & ~0xCFF or value & 0xFF not in _MEMORY_TYPES:
            raise GuestFault(13, 0)
        self._values[msr] = value


def _ignore(msr: int, value: int) -> None:
    """A write that has no effect here."""
