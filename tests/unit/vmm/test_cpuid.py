"""What processor a guest sees, from what the host is."""

import pytest

from pyhyve.cpu.processor import Capabilities, CpuidEntry
from pyhyve.vmm import hostcpu
from pyhyve.vmm.cpuid import ARCH_CAPABILITIES_IMMUNE, CpuidPolicy, limited
from pyhyve.vmm.topology import Topology

EVERYTHING = 0xFFFF_FFFF


def words(text):
    raw = text.encode()
    return [int.from_bytes(raw[i : i + 4], "little") for i in (0, 4, 8)]


def host_with_everything(vendor):
    """A host whose every feature bit is set."""

    def cpuid(leaf, subleaf=0):
        if leaf == 0:
            ebx, edx, ecx = words(vendor)
            return 0x20, ebx, ecx, edx
        if leaf == 0x8000_0000:
            return 0x8000_0028, 0, 0, 0
        if leaf == 0x8000_0008:
            return 0x3930, EVERYTHING, EVERYTHING, 0
        if leaf == 0xD and subleaf == 0:
            return 0x2E7, 0x988, 0xA88, 0
        if leaf == 0xD and subleaf == 2:
            return 256, 576, 0, 0
        if leaf in (4, 0x8000_001D):
            return (0x1C004000 | (subleaf + 1) << 5 | 1 if subleaf < 4 else 0), 0x3F, 0x3F, 0
        if leaf == 7 and subleaf == 0:
            return 2, EVERYTHING, EVERYTHING, EVERYTHING
        return EVERYTHING, EVERYTHING, EVERYTHING, EVERYTHING

    return cpuid


def table(vendor="GenuineIntel", topology=Topology(), apic_id=0, **capabilities):  # noqa: B008 (it is frozen)
    host = host_with_everything(vendor)
    policy = CpuidPolicy(host, Capabilities("test", **capabilities), topology, 2_596_132, 1_000_000)
    return {(entry.leaf, entry.subleaf): entry for entry in policy.entries(apic_id)}


@pytest.fixture(params=["GenuineIntel", "AuthenticAMD"])
def vendor(request):
    return request.param


def test_what_an_engine_offers_beyond_the_common_is_shown(vendor):
    shown = table(vendor, xcr0=0xE7, notes=("avx512", "pku", "xsaves"))
    assert shown[7, 0].ebx >> 16 & 1
    assert shown[7, 1].eax >> 5 & 1
    assert shown[7, 0].ecx >> 3 & 1
    assert shown[0xD, 1].eax >> 3 & 1
    assert shown[0xD, 0].eax == 0x2E7
    assert (0xD, 9) in shown


def test_vendor_is_the_hosts(vendor):
    entry = table(vendor)[0, None]
    assert [entry.ebx, entry.edx, entry.ecx] == words(vendor)


@pytest.mark.parametrize(
    ("leaf", "subleaf", "register", "bit", "name"),
    [
        (1, None, "ecx", 3, "MONITOR"),
        (1, None, "ecx", 5, "VMX"),
        (1, None, "ecx", 17, "PCID"),
        (1, None, "ecx", 27, "OSXSAVE"),
        (1, None, "edx", 22, "ACPI throttling"),
        (7, 0, "ebx", 4, "HLE"),
        (7, 0, "ebx", 11, "RTM"),
        (7, 0, "ebx", 14, "MPX"),
        (7, 0, "ebx", 16, "AVX512F"),
        (7, 0, "ebx", 10, "INVPCID"),
        (7, 0, "ecx", 3, "PKU"),
        (7, 0, "ecx", 7, "CET_SS"),
        (7, 0, "ecx", 16, "LA57"),
        (7, 0, "ecx", 5, "WAITPKG"),
        (7, 0, "edx", 20, "CET_IBT"),
        (7, 0, "edx", 24, "AMX-TILE"),
        (7, 1, "eax", 5, "AVX512_BF16"),
        (0xD, 1, "eax", 3, "XSAVES"),
        (0x8000_0001, None, "ecx", 2, "SVM"),
        (0x8000_0001, None, "ecx", 29, "MONITORX"),
        (0x8000_0001, None, "edx", 31, "3DNow!"),
    ],
)
def test_hidden(vendor, leaf, subleaf, register, bit, name):
    assert not getattr(table(vendor)[leaf, subleaf], register) >> bit & 1, name


@pytest.mark.parametrize(
    ("leaf", "subleaf", "register", "bit", "name"),
    [
        (1, None, "ecx", 21, "x2APIC"),
        (1, None, "ecx", 24, "TSC deadline"),
        (1, None, "ecx", 26, "XSAVE"),
        (1, None, "ecx", 28, "AVX"),
        (1, None, "ecx", 31, "hypervisor"),
        (1, None, "edx", 16, "PAT"),
        (7, 0, "ebx", 1, "TSC_ADJUST"),
        (7, 0, "ebx", 9, "ERMS"),
        (7, 0, "ebx", 20, "SMAP"),
        (7, 0, "edx", 4, "FSRM"),
        (7, 0, "edx", 29, "ARCH_CAPABILITIES"),
        (6, None, "eax", 2, "ARAT"),
        (0x8000_0001, None, "edx", 11, "SYSCALL"),
        (0x8000_0001, None, "edx", 20, "NX"),
        (0x8000_0001, None, "edx", 26, "1G pages"),
        (0x8000_0001, None, "edx", 27, "RDTSCP"),
        (0x8000_0007, None, "edx", 8, "invariant TSC"),
    ],
)
def test_shown(vendor, leaf, subleaf, register, bit, name):
    assert getattr(table(vendor)[leaf, subleaf], register) >> bit & 1, name


def test_pcid_and_avx512_are_shown_to_engines_that_run_them():
    entries = table(notes=("pcid", "avx512"), xcr0=0xE7)
    assert entries[1, None].ecx >> 17 & 1
    assert entries[7, 0].ebx >> 10 & 1
    assert entries[7, 0].ebx >> 16 & 1
    assert not table(notes=("avx512",), xcr0=7)[7, 0].ebx >> 16 & 1, "not without its state"


def test_no_vector_features_without_their_state():
    entries = table(xcr0=3)
    assert not entries[1, None].ecx >> 28 & 1
    assert not entries[7, 0].ebx >> 5 & 1
    assert entries[0xD, 0].eax == 3
    assert entries[0xD, 0].ecx == 576
    entries = table(xcr0=0)
    assert (0xD, 0) not in entries
    assert not entries[1, None].ecx >> 26 & 1


def test_xsave_area_fits_its_components():
    entries = table(xcr0=7)
    assert entries[0xD, 0].eax == 7
    assert entries[0xD, 0].ebx == entries[0xD, 0].ecx == 832
    assert (entries[0xD, 2].eax, entries[0xD, 2].ebx) == (256, 576)


def test_own_signature_comes_first_and_the_clock_interface_second():
    entries = table()
    base = entries[0x4000_0000, None]
    assert [base.ebx, base.ecx, base.edx] == words("bhyve bhyve ")
    assert base.eax >= 0x4000_0010
    timing = entries[0x4000_0010, None]
    assert (timing.eax, timing.ebx) == (2_596_132, 1_000_000)
    clock = entries[0x4000_0100, None]
    assert [clock.ebx, clock.ecx, clock.edx] == words("KVMKVMKVM\0\0\0")
    assert entries[0x4000_0101, None].eax == 1 << 1 | 1 << 3 | 1 << 24


def test_the_interrupts_own_bits_can_be_hidden_or_asked_for():
    given = CpuidPolicy(
        host_with_everything("GenuineIntel"),
        Capabilities("test"),
        Topology(),
        2_000_000,
        1_000_000,
        x2apic=False,
        tsc_deadline=False,
        msi_ext_dest_id=True,
    ).reported()
    assert given[1, 0]["ecx"] & (1 << 21 | 1 << 24) == 0
    assert given[1, 0]["edx"] >> 9 & 1
    assert given[0x4000_0101, 0]["eax"] >> 15 & 1
    assert given[6, 0]["eax"] == 1 << 2


@pytest.mark.parametrize("khz", [800_000, 1_000_000, 2_400_000, 2_596_132, 3_792_874, 5_700_001])
def test_crystal_leaf_gives_the_frequency_in_linuxs_arithmetic(khz):
    policy = CpuidPolicy(host_with_everything("GenuineIntel"), Capabilities("test"), Topology(), khz, 1_000_000)
    (entry,) = [entry for entry in policy.entries(0) if entry.leaf == 0x15]
    product = entry.ecx // 1000 * entry.ebx
    assert product < 1 << 32, "Linux multiplies in 32 bits"
    assert product // entry.eax == pytest.approx(khz, rel=3e-6)


def test_immunity_is_claimed_for_translated_guests_only():
    entries = table("AuthenticAMD")
    assert entries[0x8000_0021, None].eax >> 29 & 1, "SRSO_NO"
    assert entries[0x8000_0008, None].ebx == 1 << 26 | 1 << 29 | 1 << 2
    for bit, name in ((0, "RDCL_NO"), (1, "IBRS_ALL"), (5, "MDS_NO"), (8, "TAA_NO"), (20, "BHI_NO"), (62, "ITS_NO")):
        assert ARCH_CAPABILITIES_IMMUNE >> bit & 1, name
    hardware = table("AuthenticAMD", notes=("hardware",))
    assert hardware[7, 0].edx >> 31 & 1, "SSBD, as the host says"
    assert hardware[0x8000_0008, None].ebx >> 12 & 1, "IBPB, as the host says"


def test_topology_is_one_package_of_single_threaded_cores(vendor):
    entries = table(vendor, Topology(cores=6), apic_id=5)
    assert entries[1, None].ebx >> 24 == 5
    assert entries[1, None].ebx >> 16 & 0xFF == (8 if vendor == "GenuineIntel" else 6)
    assert entries[1, None].edx >> 28 & 1
    assert (entries[0xB, 0].eax, entries[0xB, 0].ebx, entries[0xB, 0].edx) == (0, 1, 5)
    assert (entries[0xB, 1].eax, entries[0xB, 1].ebx, entries[0xB, 1].edx) == (3, 6, 5)
    if vendor == "GenuineIntel":
        assert entries[4, 0].eax >> 26 == 7
        assert entries[4, 0].eax >> 14 & 0xFFF == 0, "the first level is a core's own"
        assert entries[4, 2].eax >> 14 & 0xFFF == 7, "the third is shared"
    else:
        assert entries[0x8000_0008, None].ecx == 3 << 12 | 5
    assert not table(vendor)[1, None].edx >> 28 & 1


def test_leaves_tell_of_sockets_cores_and_threads(vendor):
    topology = Topology(sockets=2, cores=3, threads=2)
    assert topology.apic_ids == (0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13), "a package has the ids of 4 cores"
    entries = table(vendor, topology, apic_id=11)
    assert entries[0, None].eax >= 0x1F
    for leaf in (0xB, 0x1F):
        assert [(entries[leaf, n].eax, entries[leaf, n].ebx) for n in range(3)] == [(1, 2), (3, 6), (0, 0)]
        assert [entries[leaf, n].ecx for n in range(3)] == [0x100, 0x201, 2], "threads, cores, and no more"
        assert {entries[leaf, n].edx for n in range(3)} == {11}
    assert entries[1, None].ebx >> 24 == 11
    assert entries[1, None].edx >> 28 & 1
    caches = 4 if vendor == "GenuineIntel" else 0x8000_001D
    assert [entries[caches, n].eax >> 14 & 0xFFF for n in range(3)] == [1, 1, 7], "by core, by core, by package"
    if vendor == "GenuineIntel":
        assert entries[1, None].ebx >> 16 & 0xFF == 8
        assert entries[4, 0].eax >> 26 == 3, "a package has the ids of 4 cores"
    else:
        assert entries[1, None].ebx >> 16 & 0xFF == 6
        assert entries[0x8000_0001, None].ecx & (1 << 22 | 1 << 1) == 1 << 22 | 1 << 1, "extended topology, several"
        assert entries[0x8000_0008, None].ecx == 3 << 12 | 5
        extended = entries[0x8000_001E, None]
        assert (extended.eax, extended.ebx, extended.ecx) == (11, 1 << 8 | 1, 1), "core 1 of 2 threads, in node 1"


def test_sockets_of_one_processor_are_not_multithreaded(vendor):
    entries = table(vendor, Topology(sockets=4), apic_id=3)
    assert not entries[1, None].edx >> 28 & 1
    assert (entries[0xB, 1].eax, entries[0xB, 1].ebx, entries[0xB, 1].edx) == (0, 1, 3)


def test_addresses_are_no_wider_than_the_page_tables(vendor):
    entry = table(vendor)[0x8000_0008, None]
    assert entry.eax & 0xFF == 48
    assert entry.eax >> 8 & 0xFF == 48


def test_engines_own_limits_are_heeded():
    supported = [CpuidEntry(1, None, 0, 0, 1 << 0 | 1 << 20, 0x078BFBFF), CpuidEntry(7, 0, 0, 1 << 0, 0, 0)]
    host = limited(host_with_everything("GenuineIntel"), supported)
    assert host(1, 0) == (EVERYTHING, EVERYTHING, 1 << 0 | 1 << 20, 0x078BFBFF), "what is no feature stays"
    assert host(7, 0) == (2, 1, 0, 0)
    assert host(0x8000_0001, 0)[2:] == (0, 0)
    policy = CpuidPolicy(host, Capabilities("test", xcr0=0), Topology(), 2_596_132, 1_000_000)
    entries = {(entry.leaf, entry.subleaf): entry for entry in policy.entries(0)}
    assert entries[1, None].ecx == 1 << 0 | 1 << 20 | 1 << 21 | 1 << 24 | 1 << 31


def test_host_itself_gives_a_consistent_table():
    policy = CpuidPolicy(hostcpu.cpuid, Capabilities("test"), Topology(cores=2), hostcpu.tsc_khz(), 1_000_000)
    entries = policy.entries(1)
    keys = [(entry.leaf, entry.subleaf) for entry in entries]
    assert len(keys) == len(set(keys))
    for entry in entries:
        assert all(0 <= value < 1 << 32 for value in (entry.eax, entry.ebx, entry.ecx, entry.edx)), entry


def test_hosts_counter_is_measured_well():
    khz = hostcpu.tsc_khz()
    rdtsc = hostcpu.rdtsc_function()
    import time

    before, start = rdtsc(), time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    time.sleep(0.2)
    after, end = rdtsc(), time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    assert (after - before) * 1e6 / (end - start) == pytest.approx(khz, rel=5e-4)


def test_stated_frequency_is_taken_where_the_host_has_one():
    def intel(leaf, subleaf):
        return {
            0: (0x16, *(words("GenuineIntel")[i] for i in (0, 2, 1))),
            0x15: (2, 208, 25_000_000, 0),
        }.get(leaf, (0, 0, 0, 0))

    assert hostcpu._stated_khz(intel) == 2_600_000

    def guest(leaf, subleaf):
        return {
            0: (0x10, *(words("AuthenticAMD")[i] for i in (0, 2, 1))),
            1: (0, 0, 1 << 31, 0),
            0x4000_0000: (0x4000_0010, *words("bhyve bhyve ")),
            0x4000_0010: (3_000_000, 1_000_000, 0, 0),
        }.get(leaf, (0, 0, 0, 0))

    assert hostcpu._stated_khz(guest) == 3_000_000

    def xen(leaf, subleaf):
        return {
            0: (0x10, *(words("AuthenticAMD")[i] for i in (0, 2, 1))),
            1: (0, 0, 1 << 31, 0),
            0x4000_0000: (0x4000_0010, *words("XenVMMXenVMM")),
            0x4000_0010: (3_000_000, 1_000_000, 0, 0),
        }.get(leaf, (0, 0, 0, 0))

    assert hostcpu._stated_khz(xen) is None, "others mean other things by that leaf"
