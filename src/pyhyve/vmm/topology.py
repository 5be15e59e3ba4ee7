"""How a VM's processors are grouped into sockets, cores and threads, and the APIC ids that tell a guest.

An APIC id has a field of bits for each level, wide enough for what the level holds (Intel SDM vol 3, "Hierarchical
Mapping of Shared Resources"): ids leave gaps where a number is no power of two.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topology:
    """`sockets` packages of `cores` cores with `threads` threads each, all 1 or more."""

    sockets: int = 1
    cores: int = 1
    threads: int = 1

    @property
    def cpus(self) -> int:
        return self.sockets * self.package

    @property
    def package(self) -> int:
        """How many processors a package has."""
        return self.cores * self.threads

    @property
    def core_shift(self) -> int:
        """Width of the thread's field: an APIC id shifted right by this many bits names its core."""
        return (self.threads - 1).bit_length()

    @property
    def package_shift(self) -> int:
        """Width of the fields of thread and core: an APIC id shifted right by this many bits names its package."""
        return self.core_shift + (self.cores - 1).bit_length()

    def apic_id(self, index: int) -> int:
        """Return the APIC id of a vCPU (0 <= index < cpus); threads of one core are next to each other."""
        package, inside = divmod(index, self.package)
        core, thread = divmod(inside, self.threads)
        return package << self.package_shift | core << self.core_shift | thread

    @property
    def apic_ids(self) -> tuple[int, ...]:
        """The APIC ids of all vCPUs, ascending."""
        return tuple(map(self.apic_id, range(self.cpus)))
