"""Features of the guest's processor that are switched off, and what goes with them."""

import pytest

from pyhyve.base.errors import UsageError
from pyhyve.cpu.bt.features import NUMBERS
from pyhyve.cpu.processor import Capabilities
from pyhyve.vmm.cpufeatures import (
    FEATURES,
    ON_REQUEST,
    check_wanted,
    cpu_feature_help,
    needed_by,
    of_the_monitor,
    parse_cpu_features,
    switched_off,
    without,
)
from pyhyve.vmm.cpuid import CpuidPolicy
from pyhyve.vmm.topology import Topology


def host(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """A processor that has everything."""
    if leaf == 0:
        return 0x20, 0x68747541, 0x444D4163, 0x69746E65
    if leaf == 0x8000_0000:
        return 0x8000_0028, 0, 0, 0
    if leaf == 0xD and subleaf == 0:
        return 0x2E7, 2440, 2440, 0
    if leaf == 0xD and subleaf > 1:
        return {2: (256, 576, 0, 0), 5: (64, 832, 0, 0), 6: (512, 896, 0, 0), 7: (1024, 1408, 0, 0)}.get(
            subleaf, (0, 0, 0, 0)
        )
    return (0xFFFF_FFFF,) * 4


CAPABILITIES = Capabilities("test", xcr0=0xE7, notes=("pcid", "pku", "xsaves", "la57", "avx512"))


def policy(*words: str) -> CpuidPolicy:
    switches = parse_cpu_features(words)
    host_and_engine = without(host, CAPABILITIES, switches)
    return CpuidPolicy(*host_and_engine, Topology(), 2_000_000, 1_000_000, **of_the_monitor(switches))


def reported(of: CpuidPolicy) -> set[str]:
    words = of.reported()
    return {
        name
        for name, (leaf, subleaf, register, bit, _) in FEATURES.items()
        if words.get((leaf, subleaf), {}).get(register, 0) >> bit & 1
    }


def test_everything_is_reported_without_switches() -> None:
    assert reported(policy()) == set(FEATURES) - ON_REQUEST


@pytest.mark.parametrize("name", sorted(FEATURES))
def test_a_feature_takes_along_what_needs_it_and_nothing_else(name: str) -> None:
    gone = {other for other in FEATURES if other == name or name in needed_by(other)}
    assert set(FEATURES) - reported(policy(f"{name}=off")) == gone | ON_REQUEST


@pytest.mark.parametrize(
    ("word", "xcr0"),
    [("avx512f=off", 0x207), ("avx=off", 0x203), ("pku=off", 0xE7), ("xsave=off", 0), ("aes=on", 0x2E7)],
)
def test_state_goes_with_its_feature(word: str, xcr0: int) -> None:
    assert policy(word).xcr0 == xcr0


def test_words_are_joined_by_commas_and_the_last_counts() -> None:
    assert parse_cpu_features(["avx2=off,aes=on", "avx2=on"]) == {"avx2": True, "aes": True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["avx2"], "--cpu-feature 'avx2': write NAME=on or NAME=off, for instance avx512f=off"),
        (["avx2=yes"], "--cpu-feature 'avx2=yes': write NAME=on"),
        (["sse2=off"], "--cpu-feature 'sse2=off': no feature of that name; '--cpu-feature help' lists them"),
        (["", "aes=on"], "--cpu-feature '': write"),
        (["vaes=on,aes=off"], "--cpu-feature vaes=on: needs aes, which aes=off switches off"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_cpu_features(words)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_feature_that_is_insisted_on_must_be_there() -> None:
    check_wanted({"aes": True, "avx": False}, policy().reported(), "bt")
    with pytest.raises(UsageError, match="avx512f=on: the bt processor cannot offer it"):
        check_wanted({"avx512f": True}, policy("avx512f=off").reported(), "bt")


def test_five_level_paging_is_off_unless_asked_for() -> None:
    for words, on in (((), False), (("la57=off",), False), (("la57=on",), True), (("avx=off,la57=on",), True)):
        reported = policy(*words).reported()
        assert reported[7, 0]["ecx"] >> 16 & 1 == on
        assert reported[0x8000_0008, 0]["eax"] >> 8 == (57 if on else 48)
    other = CpuidPolicy(
        *without(host, Capabilities("other"), {"la57": True}), Topology(), 2_000_000, 1_000_000
    ).reported()
    with pytest.raises(UsageError, match="la57=on: the other processor cannot offer it"):
        check_wanted({"la57": True}, other, "other")


def test_help_names_every_feature() -> None:
    assert all(name in cpu_feature_help() for name in FEATURES)
    assert switched_off({"avx512f": False}) >= {"avx512vl", "avx512_bf16"}


def test_the_translator_knows_the_same_places() -> None:
    """What a switch hides, the software processor makes undefined."""
    from pyhyve.cpu.bt import features

    places = {place[1:] for place in features._PLACES}
    apart = {
        "pcid",
        "xsave",
        "avx",
        "avx512f",
        "avx512vl",
        "smep",
        "umip",
        "pdpe1gb",
        "la57",
    }  # by CR4, XCR0 or page walks
    for name, (*place, _) in FEATURES.items():
        if name in of_the_monitor({}):
            continue
        assert (tuple(place) in places) == (name not in apart), name
    assert len(NUMBERS) == len(places) + 1
