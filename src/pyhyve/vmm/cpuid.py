"""CPUID policy: what processor a guest sees.

The host's features that the engine can run, by lists of what is passed: a feature that the lists do not name is hidden,
so that a new host brings no surprise. The vendor and the model are the host's. docs/cpuid.md tells why each part is as
it is; bits are named as in Intel SDM vol 2, "CPUID—CPU Identification", and AMD APM vol 3, appendix E.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pyhyve.cpu.processor import Capabilities, CpuidEntry
from pyhyve.vmm.hostcpu import CpuidFunction, signature
from pyhyve.vmm.topology import Topology

HYPERVISOR_BASE: Final = 0x4000_0000
HYPERVISOR_TIMING: Final = 0x4000_0010
PV_BASE: Final = 0x4000_0100
PV_FEATURES: Final = PV_BASE + 1
PV_TIMING: Final = PV_BASE + 0x10

BHYVE_SIGNATURE: Final = "bhyve bhyve "
PV_SIGNATURE: Final = "KVMKVMKVM\0\0\0"

# Features of the paravirtual interface (Linux Documentation/virt/kvm/x86/cpuid.rst).
PV_NOP_IO_DELAY: Final = 1 << 1
PV_CLOCKSOURCE2: Final = 1 << 3
PV_MSI_EXT_DEST_ID: Final = 1 << 15
PV_CLOCKSOURCE_STABLE: Final = 1 << 24

# Notes of an engine (Capabilities.notes) that this policy heeds.
NOTE_PCID: Final = "pcid"
NOTE_AVX512: Final = "avx512"
NOTE_PKU: Final = "pku"
"""Protection keys are the engine's own: they work on any host."""
NOTE_XSAVES: Final = "xsaves"
NOTE_LA57: Final = "la57"
"""Five levels of page tables, the engine's own as well."""
NOTE_HARDWARE: Final = "hardware"
"""The guest runs on the host's processor itself: the host's own word on vulnerabilities is passed, not ours."""


def _bits(*numbers: int) -> int:
    return sum(1 << n for n in numbers)


_ALL: Final = 0xFFFF_FFFF

# Leaf 1.
_L1_ECX_PASS: Final = _bits(0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30)
"""SSE3 PCLMULQDQ SSSE3 FMA CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES XSAVE AVX F16C RDRAND."""
_L1_ECX_PCID: Final = _bits(17)
_L1_ECX_SHOW: Final = _bits(31)
"""Hypervisor."""
_L1_ECX_X2APIC: Final = _bits(21)
_L1_ECX_TSC_DEADLINE: Final = _bits(24)
"""The monitor's own."""
CPUID_APIC: Final = 1 << 9
"""Leaf 1, EDX: clear while the local APIC is switched off by IA32_APIC_BASE."""
_L1_EDX_PASS: Final = _bits(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27)
"""FPU VME DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2 SS."""
_L1_EDX_HTT: Final = _bits(28)

# Leaf 7, subleaf 0.
_L7_EBX_PASS: Final = _bits(0, 3, 5, 6, 7, 8, 13, 18, 19, 20, 23, 24, 29)
"""FSGSBASE BMI1 AVX2 FDP_EXCPTN_ONLY SMEP BMI2 no-FCS/FDS RDSEED ADX SMAP CLFLUSHOPT CLWB SHA."""
_L7_EBX_SHOW: Final = _bits(1, 9)
"""IA32_TSC_ADJUST (the monitor's), ERMS (a promise of speed, which both kinds of engine keep)."""
_L7_EBX_PCID: Final = _bits(10)
_L7_EBX_AVX512: Final = _bits(16, 17, 21, 28, 30, 31)
_L7_ECX_PASS: Final = _bits(2, 8, 9, 10, 22, 27)
"""UMIP GFNI VAES VPCLMULQDQ RDPID MOVDIRI."""
"""F DQ IFMA CD BW VL."""
_L7_ECX_AVX512: Final = _bits(1, 6, 11, 12, 14)
"""VBMI VBMI2 VNNI BITALG VPOPCNTDQ."""
_L7_EDX_AVX512: Final = _bits(8, 23)
"""VP2INTERSECT FP16."""
_L7_EDX_SHOW: Final = _bits(4)
"""FSRM."""
_L7_EDX_MITIGATION: Final = _bits(26, 29)
"""IBRS (the SPEC_CTRL MSR), ARCH_CAPABILITIES."""
_L7_EDX_HARDWARE: Final = _bits(10, 26, 27, 28, 29, 31)
"""MD_CLEAR IBRS/IBPB STIBP L1D_FLUSH ARCH_CAPABILITIES SSBD."""
_L7_1_EAX_PASS: Final = _bits(0, 1, 2, 4, 23)
"""SHA512 SM3 SM4 AVX-VNNI AVX-IFMA."""
_L7_1_EAX_AVX512: Final = _bits(5)
"""AVX512-BF16."""
_L7_1_EDX_PASS: Final = _bits(4, 5, 10)
"""AVX-VNNI-INT8 AVX-NE-CONVERT AVX-VNNI-INT16."""

_L7_ECX_PKU: Final = _bits(3)
_L7_ECX_LA57: Final = _bits(16)

# Leaf 0DH, subleaf 1: XSAVEOPT, XSAVEC, XGETBV with ECX=1, XSAVES. There are no supervisor components.
_LD_1_EAX_PASS: Final = _bits(0, 1, 2)
_LD_1_EAX_XSAVES: Final = _bits(3)

XCR0_PKRU: Final = 1 << 9

# Extended leaves.
_E1_ECX_PASS: Final = _bits(0, 5, 6, 7, 8)
"""LAHF/SAHF LZCNT SSE4A MISALIGNSSE PREFETCHW."""
_E1_ECX_CMP_LEGACY: Final = _bits(1)
_E1_EDX_PASS: Final = _bits(11, 20, 22, 25, 26, 27, 29)
"""SYSCALL NX MMXEXT FXSR_OPT 1G-pages RDTSCP LM."""
_E1_EDX_COPIES: Final = _bits(0, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 23, 24)
"""AMD repeats these bits of leaf 1 here."""
_E8_EBX_PASS: Final = _bits(2)
"""XSAVEERPTR."""
_E8_EBX_IMMUNE: Final = _bits(26, 29)
"""SSB_NO, BTC_NO."""
_E8_EBX_HARDWARE: Final = _bits(12, 14, 15, 16, 17, 18, 19, 24, 25, 26, 28, 29, 30)
_E21_EAX_PASS: Final = _bits(2, 6)
"""LFENCE always serialises, null selectors clear the base."""
_E21_EAX_IMMUNE: Final = _bits(29, 30)
"""SRSO_NO, SRSO_USER_KERNEL_NO."""
_E21_EAX_HARDWARE: Final = _bits(8, 27, 28, 29, 30)
_E21_ECX_IMMUNE: Final = _bits(1, 2)
"""TSA_SQ_NO, TSA_L1_NO."""

ARCH_CAPABILITIES_IMMUNE: Final = _bits(0, 1, 3, 4, 5, 6, 8, 13, 14, 15, 20, 24, 26, 27, 62)
"""IA32_ARCH_CAPABILITIES: RDCL_NO IBRS_ALL SKIP_L1DFL SSB_NO MDS_NO PSCHANGE_MC_NO TAA_NO SBDR_SSDP_NO FBSDP_NO
PSDP_NO BHI_NO PBRSB_NO GDS_NO RFDS_NO ITS_NO."""

_E1_ECX_TOPOLOGY: Final = _bits(22)
"""AMD's leaves 8000_001DH and 8000_001EH."""

_LEVEL_SMT: Final = 1 << 8
_LEVEL_CORE: Final = 2 << 8
_CACHES: Final = 8
_MAX_BASIC: Final = 0x1F
_MAX_EXTENDED: Final = 0x8000_0021


_FEATURE_WORDS: Final = {
    (1, 0): "cd",
    (7, 0): "bcd",
    (7, 1): "abcd",
    (0xD, 1): "a",
    (0x8000_0001, 0): "cd",
    (0x8000_0008, 0): "b",
    (0x8000_0021, 0): "ac",
}
"""(leaf, subleaf) → the registers that are feature bits; the rest describes the processor."""


def limited(host: CpuidFunction, supported: Sequence[CpuidEntry]) -> CpuidFunction:
    """Return the host's CPUID with the features that `supported` does not have taken out: an engine's own limits."""
    limits = {(entry.leaf, entry.subleaf or 0): entry for entry in supported}

    def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        registers = host(leaf, subleaf)
        words = _FEATURE_WORDS.get((leaf, subleaf))
        if words is None:
            return registers
        entry = limits.get((leaf, subleaf))
        masks = (entry.eax, entry.ebx, entry.ecx, entry.edx) if entry is not None else (0, 0, 0, 0)
        eax, ebx, ecx, edx = (
            value & mask if word in words else value for value, mask, word in zip(registers, masks, "abcd", strict=True)
        )
        return eax, ebx, ecx, edx

    return cpuid


def nearest_fraction(numerator: int, denominator: int, limit: int) -> tuple[int, int]:
    """Return the (numerator, denominator), the latter at most `limit`, next to a fraction: a continued fraction's
    last convergent that fits."""
    before, last = (0, 1), (1, 0)
    while denominator:
        whole, rest = divmod(numerator, denominator)
        following = (before[0] + whole * last[0], before[1] + whole * last[1])
        if following[1] > limit:
            break
        before, last = last, following
        numerator, denominator = denominator, rest
    return last


@dataclass(frozen=True, slots=True)
class CpuidPolicy:
    """Makes the CPUID answers of each vCPU of one VM."""

    host: CpuidFunction
    capabilities: Capabilities
    topology: Topology
    tsc_khz: int
    apic_bus_khz: int
    x2apic: bool = True
    tsc_deadline: bool = True
    msi_ext_dest_id: bool = False
    """The guest is told that messages have destinations of 15 bits."""

    @property
    def vendor(self) -> str:
        _, ebx, ecx, edx = self.host(0, 0)
        return signature(ebx, edx, ecx)

    @property
    def intel(self) -> bool:
        return self.vendor == "GenuineIntel"

    @property
    def hardware(self) -> bool:
        return NOTE_HARDWARE in self.capabilities.notes

    @property
    def xcr0(self) -> int:
        """The XCR0 bits that a guest may set: those that the engine passes and the host has."""
        mask = self.capabilities.xcr0 & self.host(0xD, 0)[0]
        if NOTE_PKU in self.capabilities.notes:
            mask |= XCR0_PKRU
        return mask if mask & 2 and self.host(1, 0)[2] >> 26 & 1 else 0

    @property
    def physical_bits(self) -> int:
        """Width of a guest-physical address: the host's, but no more than four EPT levels reach."""
        if self.host(0x8000_0000, 0)[0] >= 0x8000_0008:
            return min(48, self.host(0x8000_0008, 0)[0] & 0xFF)
        return 36

    def entries(self, apic_id: int) -> list[CpuidEntry]:
        """Return the answers of the vCPU with this APIC id, one of the topology's."""
        return [*self._basic(apic_id), *self._hypervisor(), *self._extended(apic_id)]

    def reported(self) -> dict[tuple[int, int], dict[str, int]]:
        """Return the answers by (leaf, subleaf) and register."""
        return {
            (entry.leaf, entry.subleaf or 0): {name: getattr(entry, name) for name in ("eax", "ebx", "ecx", "edx")}
            for entry in self.entries(0)
        }

    def _basic(self, apic_id: int) -> Iterator[CpuidEntry]:
        host, topology = self.host, self.topology
        pcid = NOTE_PCID in self.capabilities.notes
        avx512 = NOTE_AVX512 in self.capabilities.notes and self.xcr0 & 0xE0 == 0xE0

        _, ebx, ecx, edx = host(0, 0)
        yield CpuidEntry(0, None, _MAX_BASIC, ebx, ecx, edx)

        eax, ebx, ecx, edx = host(1, 0)
        ecx_pass = _L1_ECX_PASS | (_L1_ECX_PCID if pcid else 0)
        if not self.xcr0 & 4:
            ecx_pass &= ~_bits(12, 28, 29)  # FMA, AVX and F16C are of no use without AVX state
        if not self.xcr0:
            ecx_pass &= ~_bits(26)
        leaf1_edx = edx & _L1_EDX_PASS | (_L1_EDX_HTT if topology.package > 1 else 0)
        # Intel counts the ids that a package may have, AMD the processors that it has.
        package = 1 << topology.package_shift if self.intel else topology.package
        ebx = (apic_id & 0xFF) << 24 | min(package, 255) << 16 | ebx & 0xFF00  # CLFLUSH's line
        ecx = ecx & ecx_pass | _L1_ECX_SHOW
        ecx |= (_L1_ECX_X2APIC if self.x2apic else 0) | (_L1_ECX_TSC_DEADLINE if self.tsc_deadline else 0)
        yield CpuidEntry(1, None, eax, ebx, ecx, leaf1_edx | CPUID_APIC)

        if self.intel:
            yield CpuidEntry(2, None, *host(2, 0))
            yield from self._caches(4)
        yield CpuidEntry(6, None, 1 << 2, 0, 0, 0)  # ARAT: the APIC timer never stops

        _, ebx, ecx, edx = host(7, 0)
        ebx_pass = _L7_EBX_PASS | (_L7_EBX_PCID if pcid else 0) | (_L7_EBX_AVX512 if avx512 else 0)
        ecx_pass = _L7_ECX_PASS | (_L7_ECX_AVX512 if avx512 else 0)
        if not self.xcr0 & 4:
            ebx_pass &= ~_bits(5)
            ecx_pass &= ~_bits(9, 10)
        speculation = edx & _L7_EDX_HARDWARE if self.hardware else _L7_EDX_MITIGATION
        sub1 = host(7, 1) if host(7, 0)[0] >= 1 else (0, 0, 0, 0)
        pku = _L7_ECX_PKU if self.xcr0 & XCR0_PKRU else 0
        la57 = _L7_ECX_LA57 if NOTE_LA57 in self.capabilities.notes else 0
        edx = edx & (_L7_EDX_AVX512 if avx512 else 0) | _L7_EDX_SHOW | speculation
        yield CpuidEntry(7, 0, 1, ebx & ebx_pass | _L7_EBX_SHOW, ecx & ecx_pass | pku | la57, edx)
        eax = sub1[0] & (_L7_1_EAX_PASS | (_L7_1_EAX_AVX512 if avx512 else 0))
        yield CpuidEntry(7, 1, *((eax, 0, 0, sub1[3] & _L7_1_EDX_PASS) if self.xcr0 & 4 else (0, 0, 0, 0)))

        for leaf in (0xB, 0x1F):
            yield CpuidEntry(leaf, 0, topology.core_shift, topology.threads, _LEVEL_SMT, apic_id)
            yield CpuidEntry(leaf, 1, topology.package_shift, topology.package, _LEVEL_CORE | 1, apic_id)
            yield CpuidEntry(leaf, 2, 0, 0, 2, apic_id)

        if self.xcr0:
            yield from self._xsave()

        # The crystal is the clock of the APIC timer. Linux computes crystal * numerator / denominator in 32 bits.
        crystal = self.apic_bus_khz
        numerator, denominator = nearest_fraction(self.tsc_khz, crystal, max(1, (1 << 32) // self.tsc_khz - 1))
        yield CpuidEntry(0x15, None, denominator, numerator, crystal * 1000, 0)
        mhz = round(self.tsc_khz / 1000)
        yield CpuidEntry(0x16, None, mhz, mhz, 100, 0)

    def _caches(self, leaf: int) -> Iterator[CpuidEntry]:
        """The host's caches by leaf 4 (AMD: 8000_001DH), shared as here: the first two levels are a core's own."""
        topology = self.topology
        cores = min((1 << topology.package_shift - topology.core_shift) - 1, 0x3F) << 26 if self.intel else 0
        for subleaf in range(_CACHES):
            eax, ebx, ecx, edx = self.host(leaf, subleaf)
            if eax & 0x1F == 0:
                break
            shift = topology.package_shift if eax >> 5 & 7 >= 3 else topology.core_shift
            sharing = min((1 << shift) - 1, 0xFFF) << 14
            yield CpuidEntry(leaf, subleaf, eax & 0x3FFF | sharing | cores, ebx, ecx, edx)

    def _xsave(self) -> Iterator[CpuidEntry]:
        """Leaf 0DH. The engine keeps EBX of subleaf 0 (the size for the present XCR0) itself where it can."""
        components = [(n, self._component(n)) for n in range(2, 63) if self.xcr0 >> n & 1]
        size = max([576, *(offset + length for _, (length, offset, _, _) in components)])
        yield CpuidEntry(0xD, 0, self.xcr0 & _ALL, size, size, self.xcr0 >> 32)
        passed = _LD_1_EAX_PASS | (_LD_1_EAX_XSAVES if NOTE_XSAVES in self.capabilities.notes else 0)
        yield CpuidEntry(0xD, 1, self.host(0xD, 1)[0] & passed, size, 0, 0)
        for n, registers in components:
            yield CpuidEntry(0xD, n, *registers)

    def _component(self, n: int) -> tuple[int, int, int, int]:
        """(bytes, offset, flags, 0) of a state component: the host's, and PKRU behind those where it has none."""
        found = self.host(0xD, n)
        if n != 9 or found[0]:
            return found
        others = [self.host(0xD, k) for k in range(2, 9)]
        return 8, max([576, *(size + offset for size, offset, flags, _ in others if not flags & 1)]), 0, 0

    def _hypervisor(self) -> Iterator[CpuidEntry]:
        def words(text: str) -> Sequence[int]:
            raw = text.encode("ascii")
            return [int.from_bytes(raw[i : i + 4], "little") for i in (0, 4, 8)]

        yield CpuidEntry(HYPERVISOR_BASE, None, HYPERVISOR_TIMING, *words(BHYVE_SIGNATURE))
        yield CpuidEntry(HYPERVISOR_TIMING, None, self.tsc_khz, self.apic_bus_khz, 0, 0)
        yield CpuidEntry(PV_BASE, None, PV_TIMING, *words(PV_SIGNATURE))
        features = PV_NOP_IO_DELAY | PV_CLOCKSOURCE2 | PV_CLOCKSOURCE_STABLE
        if self.msi_ext_dest_id:
            features |= PV_MSI_EXT_DEST_ID
        yield CpuidEntry(PV_FEATURES, None, features, 0, 0, 0)
        yield CpuidEntry(PV_TIMING, None, self.tsc_khz, self.apic_bus_khz, 0, 0)

    def _extended(self, apic_id: int) -> Iterator[CpuidEntry]:
        host, intel, topology = self.host, self.intel, self.topology
        _, ebx, ecx, edx = host(0x8000_0000, 0)
        yield CpuidEntry(0x8000_0000, None, 0x8000_0008 if intel else _MAX_EXTENDED, ebx, ecx, edx)

        eax, ebx, ecx, edx = host(0x8000_0001, 0)
        edx_pass, ecx_pass = _E1_EDX_PASS, _E1_ECX_PASS
        copies = shown = 0
        if not intel:
            copies = host(1, 0)[3] & _E1_EDX_COPIES
            shown = _E1_ECX_TOPOLOGY | (_E1_ECX_CMP_LEGACY if topology.package > 1 else 0)
        if not self.capabilities.ept_1g and self.hardware:
            edx_pass &= ~_bits(26)
        yield CpuidEntry(0x8000_0001, None, eax, 0 if intel else ebx, ecx & ecx_pass | shown, edx & edx_pass | copies)

        for leaf in (0x8000_0002, 0x8000_0003, 0x8000_0004):
            yield CpuidEntry(leaf, None, *host(leaf, 0))
        yield CpuidEntry(0x8000_0005, None, *((0, 0, 0, 0) if intel else host(0x8000_0005, 0)))
        yield CpuidEntry(0x8000_0006, None, *host(0x8000_0006, 0))
        yield CpuidEntry(0x8000_0007, None, 0, 0, 0, 1 << 8)  # invariant TSC

        _, ebx, _, _ = host(0x8000_0008, 0)
        address_bits = self.physical_bits | (57 if NOTE_LA57 in self.capabilities.notes else 48) << 8
        if intel:
            yield CpuidEntry(0x8000_0008, None, address_bits, 0, 0, 0)
            return
        immune = ebx & _E8_EBX_HARDWARE if self.hardware else _E8_EBX_IMMUNE
        threads = min(topology.package - 1, 0xFF) | topology.package_shift << 12
        yield CpuidEntry(0x8000_0008, None, address_bits, ebx & _E8_EBX_PASS | immune, threads, 0)
        if host(0x8000_0000, 0)[0] >= 0x8000_001D:
            yield from self._caches(0x8000_001D)
        core = apic_id >> topology.core_shift & (1 << topology.package_shift - topology.core_shift) - 1
        yield CpuidEntry(
            0x8000_001E, None, apic_id, topology.threads - 1 << 8 | core, apic_id >> topology.package_shift, 0
        )
        eax, _, ecx, _ = host(0x8000_0021, 0) if host(0x8000_0000, 0)[0] >= 0x8000_0021 else (0, 0, 0, 0)
        if self.hardware:
            yield CpuidEntry(0x8000_0021, None, eax & (_E21_EAX_PASS | _E21_EAX_HARDWARE), 0, ecx & _E21_ECX_IMMUNE, 0)
        else:
            yield CpuidEntry(0x8000_0021, None, _E21_EAX_PASS | _E21_EAX_IMMUNE, 0, _E21_ECX_IMMUNE, 0)
