"""What every chip's saved state promises: a new chip that is given it goes on as the old one does.

A test makes a `Bench` (one chip, and fakes for what it is wired to), lets hypothesis choose the operations, and calls
`assert_goes_on_alike`. The new chip's clock starts at another time, so that a state with absolute times in it fails.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

ELSEWHEN = 987_654_321_012
"""Nanoseconds between the old chip's clock and the new one's."""

_PLAIN = (int, bool, str, bytes, type(None))


class Bench(Protocol):
    """One chip, with fakes for its pins, clock and bus."""

    def apply(self, operation: Any) -> Any:
        """Carry out one operation; return whatever others can see of it: values read, pins, messages."""
        ...

    def save(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


def assert_goes_on_alike(make: Callable[[int], Bench], before: Sequence[Any], after: Sequence[Any]) -> None:
    """Apply `before`, save, restore into a new chip, apply `after` to both: they answer alike, and end alike.

    `make(start)` returns a chip as at power-up, on a clock that shows `start` nanoseconds.
    """
    old = make(1_000)
    for operation in before:
        old.apply(operation)
    state = old.save()
    assert_is_a_state(state)
    new = make(1_000 + ELSEWHEN)
    new.restore(state)
    assert new.save() == state, "a restored chip has another state"
    assert old.save() == state, "saving or restoring changed the chip that was saved"
    for number, operation in enumerate(after):
        was, now = old.apply(operation), new.apply(operation)
        assert was == now, f"operation {number} after the restore, {operation}: {was} before, {now} restored"
    assert new.save() == old.save()


def assert_is_a_state(state: Any) -> None:
    """A frozen dataclass with a name and a version, of plain values, tuples and such dataclasses only."""
    name, version = state.SCHEMA
    assert isinstance(name, str)
    assert isinstance(version, int)
    assert version >= 1
    _assert_is_plain(state, name)


def _assert_is_plain(value: Any, where: str) -> None:
    if dataclasses.is_dataclass(value):
        assert type(value).__dataclass_params__.frozen, f"{where} is not frozen"  # type: ignore[attr-defined]
        for each in dataclasses.fields(value):
            _assert_is_plain(getattr(value, each.name), f"{where}.{each.name}")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            _assert_is_plain(item, f"{where}[{index}]")
    else:
        assert isinstance(value, _PLAIN), f"{where} is a {type(value).__name__}"
