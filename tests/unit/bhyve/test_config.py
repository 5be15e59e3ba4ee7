"""What a machine may be made of, and how users write it."""

import os
from pathlib import Path

import pytest

from pyhyve.base.errors import UsageError
from pyhyve.bhyve.config import MachineConfig, format_size, parse_cpus, parse_pin, parse_size
from pyhyve.vmm.topology import Topology

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256M", 256 * MIB),
        ("256m", 256 * MIB),
        ("256MB", 256 * MIB),
        ("256MiB", 256 * MIB),
        ("1G", 1024 * MIB),
        ("1.5G", 1536 * MIB),
        ("2T", 2048 * 1024 * MIB),
        ("65536K", 64 * MIB),
        ("256", 256 * MIB),
        ("268435456", 256 * MIB),
        (" 64M ", 64 * MIB),
        ("512B", 512),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "x", "-1M", "1Q", "1 2", "0x100", "1e3", "1.M", "٣M"])
def test_what_is_no_size_is_one_line(text):
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert str(caught.value).startswith(f"-m {text}: not a size; ")


def test_an_io_apic_of_other_pins_is_the_users_error(tmp_path):
    with pytest.raises(UsageError, match="--ioapic-pins 28: an I/O APIC here has 24 pins or 32"):
        MachineConfig(tmp_path, ioapic_pins=28)


def test_sizes_are_shown_as_they_are_written():
    assert [format_size(n) for n in (256 * MIB, 1536 * MIB, 3 << 40, 4096)] == ["256M", "1.5G", "3T", "4K"]


@pytest.mark.parametrize(
    ("text", "sockets", "cores", "threads"),
    [
        ("1", 1, 1, 1),
        ("4", 1, 4, 1),
        ("cpus=4", 1, 4, 1),
        ("cpus=4,sockets=1,cores=2,threads=2", 1, 2, 2),
        ("threads=2,cores=2", 1, 2, 2),
        ("sockets=3", 3, 1, 1),
        ("8,threads=2", 1, 4, 2),
        ("8,cores=2", 4, 2, 1),
        ("8,sockets=2,cores=2", 2, 2, 2),
        ("8,sockets=4,sockets=2,threads=2", 2, 2, 2),
    ],
)
def test_processors(text, sockets, cores, threads):
    assert parse_cpus(text) == Topology(sockets, cores, threads)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("two", "-c two: not a number; write how many processors, for instance -c 2"),
        ("4,core=2", "-c 4,core=2: 'core=2' is no setting; there are cpus, sockets, cores, threads"),
        ("4,2", "-c 4,2: '2' is no setting; there are cpus, sockets, cores, threads"),
        ("", "-c : not a number; write how many processors, for instance -c 2"),
        ("4,cores=", "-c 4,cores=: not a number; write how many processors, for instance -c 2"),
        ("4,cores=0", "-c cores=0: there is at least 1 of each; write a number from 1 on"),
        ("-1,cores=2", "-c -1: a machine has 1 to 254 processors"),
        (
            "4,sockets=2,cores=2,threads=2",
            "-c 4,sockets=2,cores=2,threads=2: sockets=2 times cores=2 times threads=2 is not 4; "
            "leave out what may follow from the rest",
        ),
        ("6,threads=4", "-c 6,threads=4: threads=4 does not divide 6; leave out what may follow from the rest"),
    ],
)
def test_processors_that_do_not_come_out_are_refused_in_one_line(text, line):
    with pytest.raises(UsageError) as error:
        parse_cpus(text)
    assert str(error.value) == line


def test_pinning():
    assert parse_pin("3:1") == (3, 1)
    with pytest.raises(UsageError, match="-p 3: not a pinning"):
        parse_pin("3")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory": 0}, "-m 0K: too little memory"),
        ({"memory": MIB}, "-m 1M: too little memory"),
        ({"memory": 64 * MIB + 1}, "not a multiple of 4096"),
        ({"code_cache": MIB - 4096}, "--code-cache 1020K: write whole pages, 1M to 1G"),
        ({"code_cache": 2048 * MIB}, "--code-cache 2G: write whole pages, 1M to 1G"),
        ({"code_cache": MIB + 1}, "write whole pages"),
        ({"topology": Topology(cores=0)}, "-c 0: a machine has 1 to"),
        ({"topology": Topology(sockets=5, cores=51)}, "-c 255"),
        ({"name": ""}, "--name '': not a name"),
        ({"name": "../x"}, "--name '../x'"),
        ({"name": "x" * 65}, "not a name"),
        ({"hang_seconds": -1.0}, "--hang -1"),
        ({"pins": {1: frozenset((0,))}}, "-p 1: there is no such vCPU"),
        ({"pins": {0: frozenset((4095,))}}, "-p 0:4095: no such host CPU"),
    ],
)
def test_what_cannot_be_is_one_line(values, message):
    with pytest.raises(UsageError) as caught:
        MachineConfig(kernel=Path("vmlinuz"), **values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_defaults_are_a_small_machine():
    config = MachineConfig(kernel=Path("vmlinuz"), pins={0: frozenset((min(os.sched_getaffinity(0)),))})
    assert (config.memory, config.cpus, config.processor) == (256 * MIB, 1, "auto")
