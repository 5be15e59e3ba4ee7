"""The tables as a guest follows them, and as ACPI's own compiler reads them."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from pyhyve.base.fakes import FakeClock, FakeMsiSink, FakePin, FakeTimers
from pyhyve.bhyve import layout
from pyhyve.bhyve.acpi import build_acpi
from pyhyve.bhyve.acpi import tables as acpi
from pyhyve.vmm.io.vhpet import Vhpet

IASL = shutil.which("iasl")
needs_iasl = pytest.mark.skipif(IASL is None, reason="iasl is not installed (Debian: acpica-tools)")
COUNTS = [1, 2, 255, 300]


def by_signature(placed: list[tuple[int, bytes]]) -> dict[str, tuple[int, bytes]]:
    return {table[:4].decode(): (gpa, table) for gpa, table in placed}


def entries(madt: bytes) -> list[bytes]:
    out, offset = [], 44
    while offset < len(madt):
        length = madt[offset + 1]
        out.append(madt[offset : offset + length])
        offset += length
    return out


def test_the_root_pointer_leads_to_every_table() -> None:
    placed = build_acpi(range(2))
    memory = dict(placed)
    rsdp = memory[layout.RSDP]
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp[:20]) & 0xFF == sum(rsdp) & 0xFF == 0
    xsdt = memory[struct.unpack_from("<Q", rsdp, 24)[0]]
    pointers = struct.unpack_from(f"<{(len(xsdt) - 36) // 8}Q", xsdt, 36)
    assert [memory[gpa][:4] for gpa in pointers] == [b"FACP", b"APIC", b"HPET", b"MCFG"]
    fadt = memory[pointers[0]]
    for narrow, wide, signature in ((36, 132, b"FACS"), (40, 140, b"DSDT")):
        gpa = struct.unpack_from("<I", fadt, narrow)[0]
        assert struct.unpack_from("<Q", fadt, wide)[0] == gpa
        assert memory[gpa][:4] == signature


@pytest.mark.parametrize("cpus", COUNTS)
def test_tables_have_valid_sums_and_lengths_and_do_not_overlap(cpus: int) -> None:
    end = 0
    for gpa, table in build_acpi(range(cpus), high_ram=layout.GIB):
        assert gpa >= end
        assert gpa % 64 == 0
        end = gpa + len(table)
        if table[:4] == b"RSD ":
            continue
        assert struct.unpack_from("<I", table, 4)[0] == len(table)
        if table[:4] != b"FACS":
            assert sum(table) & 0xFF == 0
    assert end <= layout.ACPI_LIMIT


def test_too_many_processors_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        build_acpi(range(10_000))
    with pytest.raises(ValueError, match="at least 1"):
        build_acpi(())


def test_processors_beyond_the_last_8_bit_apic_id_are_x2apics() -> None:
    madt = entries(acpi.build_madt(range(300)))
    narrow = [entry for entry in madt if entry[0] == acpi.MADT_LAPIC]
    wide = [entry for entry in madt if entry[0] == acpi.MADT_X2APIC]
    assert [entry[3] for entry in narrow] == list(range(255))
    assert [struct.unpack_from("<I", entry, 4)[0] for entry in wide] == list(range(255, 300))
    assert any(entry[0] == acpi.MADT_X2APIC_NMI for entry in madt)


def test_the_timer_is_on_pin_2_and_the_sci_is_level_low() -> None:
    overrides = [entry for entry in entries(acpi.build_madt((0,))) if entry[0] == acpi.MADT_SOURCE_OVERRIDE]
    assert [struct.unpack_from("<BIH", entry, 3) for entry in overrides] == [(0, 2, 0x5), (9, 9, 0xF)]
    low = {pin for pin in range(layout.IOAPIC_PINS) if layout.IOAPIC_ACTIVE_LOW >> pin & 1}
    assert low == {layout.SCI_IRQ, *range(layout.PCI_IOAPIC_PIN_BASE, layout.IOAPIC_PINS)}


def test_the_hpets_table_says_what_its_register_says() -> None:
    table = acpi.build_hpet()
    hpet = Vhpet(FakeClock(), FakeTimers(FakeClock()), FakeMsiSink(), lambda n: FakePin(), (FakePin(), FakePin()))
    identity, space, address = struct.unpack_from("<IB3xQ", table, 36)
    assert (identity, space, address) == (hpet.read(0, 4), 0, layout.HPET_BASE)
    assert struct.unpack_from("<H", table, 53)[0] == 200  # 20 microseconds


def test_the_fadt_promises_what_the_machine_has() -> None:
    fadt = acpi.build_fadt(0x1000, 0x2000)
    boot = struct.unpack_from("<H", fadt, 109)[0]
    flags = struct.unpack_from("<I", fadt, 112)[0]
    assert not boot & acpi.BOOT_8042
    assert boot & acpi.BOOT_NO_VGA
    assert boot & acpi.BOOT_LEGACY_DEVICES
    assert flags & acpi.FADT_RESET_REGISTER
    assert flags & acpi.FADT_TIMER_32_BIT
    assert not flags & 1 << 4  # the power button is fixed hardware
    assert not flags & 1 << 20  # and so is the rest: not hardware-reduced
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, layout.RESET_PORT, 0x06)
    assert struct.unpack_from("<H", fadt, 46)[0] == layout.SCI_IRQ
    assert struct.unpack_from("<I", fadt, 48)[0] == layout.SMI_CMD_PORT


@needs_iasl
@pytest.mark.parametrize("cpus", COUNTS)
def test_acpis_compiler_reads_every_table_and_builds_it_again(cpus: int, tmp_path: Path) -> None:
    assert IASL is not None
    for signature, (_, table) in by_signature(build_acpi(range(cpus), high_ram=layout.GIB, com=layout.COM)).items():
        if signature == "RSD ":
            continue  # it is no table to iasl; a test above follows it
        source = tmp_path / f"{signature}.aml"
        source.write_bytes(table)
        read = subprocess.run([IASL, "-d", source.name], cwd=tmp_path, capture_output=True, text=True, check=False)
        said = read.stdout + read.stderr
        assert read.returncode == 0, said
        listing = source.with_suffix(".dsl").read_text()
        for complaint in ("Error", "Invalid", "Unknown", "incorrect", "terminates in the middle", "Warning"):
            assert complaint not in said + listing
        built = tmp_path / "built.aml"
        again = subprocess.run(
            [IASL, "-oi", "-p", "built", f"{signature}.dsl"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert again.returncode == 0, again.stdout + again.stderr
        assert "0 Errors, 0 Warnings" in again.stdout
        if signature == "FACS":
            assert built.read_bytes() == table
        elif signature != "DSDT":
            # All but the checksum and the compiler's own id and revision.
            assert built.read_bytes()[36:] == table[36:]


@needs_iasl
def test_the_dsdt_describes_the_layout(tmp_path: Path) -> None:
    assert IASL is not None
    dsdt = by_signature(build_acpi((0,), high_ram=40 * layout.GIB, com=layout.COM[:2]))["DSDT"][1]
    (tmp_path / "dsdt.aml").write_bytes(dsdt)
    subprocess.run([IASL, "-d", "dsdt.aml"], cwd=tmp_path, capture_output=True, check=True)
    listing = (tmp_path / "dsdt.dsl").read_text()
    for device in ("PCI0", "PIC", "TIMR", "RTC", "COM1", "COM2", "HPET", "MBRD"):
        assert f"Device ({device})" in listing
    assert "Device (COM3)" not in listing
    assert f"0x{layout.pci_mem64_base(40 * layout.GIB):016X}, // Range Minimum" in listing
    assert f"0x{layout.PCI_MEM32_LIMIT - 1:08X},         // Range Maximum" in listing
    assert f"0x{layout.PCI_ECAM_BASE:08X},         // Address Base" in listing
