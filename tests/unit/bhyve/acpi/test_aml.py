"""The encodings of ACPI machine language."""

import pytest

from pyhyve.bhyve.acpi import aml


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0x10000, "0c00000100"),
        (1 << 32, "0e0000000001000000"),
        ((1 << 64) - 1, "0effffffffffffffff"),
    ],
)
def test_integers_take_their_shortest_form(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("PIC", b"PIC_"),
        ("\\_S5", b"\\_S5_"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"),
        ("_SB.PCI0.COM1", b"\x2f\x03_SB_PCI0COM1"),
    ],
)
def test_names_are_padded_and_prefixed(text: str, encoded: bytes) -> None:
    assert aml.path(text) == encoded


@pytest.mark.parametrize("text", ["", "1ABC", "TOOLONG", "lowr", "A.B..C", "A B"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no ACPI name"):
        aml.path(text)


def test_eisa_ids_are_packed_big_endian() -> None:
    assert aml.eisa_id("PNP0A03").hex() == "0c41d00a03"
    with pytest.raises(ValueError, match="no EISA id"):
        aml.eisa_id("PNP")


@pytest.mark.parametrize(("size", "header"), [(62, "3f"), (63, "4104"), (4093, "4fff"), (4094, "810001")])
def test_package_lengths_count_themselves_in_one_to_four_bytes(size: int, header: str) -> None:
    # A scope's body is its name and its terms.
    encoded = aml.scope("TEST", bytes(size - 4))
    assert encoded[1 : 1 + len(header) // 2].hex() == header
