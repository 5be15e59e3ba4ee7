"""Configuration space: what a guest may change."""

import pytest

from pyhyve.bhyve.pci.cfgspace import ConfigSpace


def test_only_writable_bits_change() -> None:
    config = ConfigSpace()
    config.define(0x04, 2, 0x0100, writable=0x0007)
    config.write(0x04, 2, 0xFFFF)
    assert config.read(0x04, 2) == 0x0107
    config.write(0x04, 1, 0x02)
    assert config.read(0x04, 2) == 0x0102


def test_status_bits_are_cleared_by_writing_one() -> None:
    config = ConfigSpace()
    config.define(0x06, 2, 0xF910, clear=0xF900)
    config.write(0x06, 2, 0x8010)
    assert config.read(0x06, 2) == 0x7910


def test_undefined_registers_read_zero_and_ignore_writes() -> None:
    config = ConfigSpace()
    config.write(0x40, 4, 0xFFFF_FFFF)
    assert config.read(0x40, 4) == 0


def test_beyond_the_space_all_ones_are_read_and_writes_are_dropped() -> None:
    config = ConfigSpace(256)
    assert config.read(256, 4) == 0xFFFF_FFFF
    assert config.read(254, 4) == 0xFFFF_0000
    config.write(254, 4, 0xFFFF_FFFF)
    config.write(256, 4, 0)
    assert len(config.save()) == 256


def test_a_register_outside_the_space_cannot_be_defined() -> None:
    with pytest.raises(ValueError, match="outside"):
        ConfigSpace(256).define(254, 4, 0)


def test_restore_takes_only_what_fits() -> None:
    config = ConfigSpace()
    config.define(0, 4, 0x12345678)
    other = ConfigSpace()
    other.restore(config.save())
    assert other.read(0, 4) == 0x12345678
    with pytest.raises(ValueError, match="configuration space"):
        other.restore(b"short")
