"""The software processor as an engine: see pyhyve.cpu.processor."""

from pyhyve.cpu.bt.run import BtShared, BtVcpu, host_has_avx512, host_lacks
from pyhyve.cpu.processor import DEFAULT_CODE_CACHE, Capabilities


class BtVm:
    """What the software processor keeps for a VM: its vCPUs, each with a code cache of `code_cache` bytes at most.
    Memory it finds through the EPT."""

    def __init__(self, code_cache: int = DEFAULT_CODE_CACHE) -> None:
        self.code_cache = code_cache
        self.shared = BtShared()
        self.vcpus: list[BtVcpu] = []

    def create_vcpu(self, vcpu_id: int) -> BtVcpu:
        vcpu = BtVcpu(vcpu_id, self.shared, self.code_cache)
        self.vcpus.append(vcpu)
        return vcpu

    def map_memory(self, gpa: int, hva: int, length: int, writable: bool) -> None:
        """Nothing to do: the processor walks the EPT."""

    def unmap_memory(self, gpa: int, length: int) -> None:
        """Nothing to do: the EPT's generation tells."""

    def close(self) -> None:
        self.vcpus.clear()


class Engine:
    """Binary translation to the host's own instruction set; works without hardware virtualization."""

    name = "bt"

    def __init__(self) -> None:
        self.code_cache = DEFAULT_CODE_CACHE

    def capabilities(self) -> Capabilities:
        avx512 = host_has_avx512()
        return Capabilities(
            name="bt",
            ept_ad=True,
            ept_2m=True,
            ept_1g=True,
            max_vcpus=64,
            xcr0=0xE7 if avx512 else 7,
            notes=("pcid", "pku", "xsaves", "la57", *(("avx512",) if avx512 else ())),
        )

    def unavailable(self) -> str | None:
        return host_lacks()

    def create_vm(self) -> BtVm:
        return BtVm(self.code_cache)
