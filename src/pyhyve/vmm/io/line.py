"""An input line shared by several sources: it is asserted while any of them holds it."""

from collections.abc import Callable, Sequence


class Line:
    """Counts its asserters (`count`); `changed(asserted)` is called at 0 to 1 and at 1 to 0, and at no other time."""

    __slots__ = ("_changed", "_sources", "count")

    def __init__(self, changed: Callable[[bool], None]) -> None:
        self._changed = changed
        self._sources: list[LineSource] = []
        self.count = 0

    def source(self) -> "LineSource":
        """A new source of this line, released."""
        source = LineSource(self)
        self._sources.append(source)
        return source

    def assert_one(self) -> None:
        self.count += 1
        if self.count == 1:
            self._changed(True)

    def release_one(self) -> None:
        self.count -= 1
        if self.count == 0:
            self._changed(False)

    def levels(self) -> tuple[bool, ...]:
        """What each source holds, in the order in which they were made: part of the controller's saved state."""
        return tuple(source.level for source in self._sources)

    def restore(self, levels: Sequence[bool]) -> None:
        """Set what each source holds, telling nobody."""
        for index, source in enumerate(self._sources):
            source.level = index < len(levels) and levels[index]
        self.count = sum(source.level for source in self._sources)


class LineSource:
    """One source's hold on a line: an `IrqPin`."""

    __slots__ = ("_line", "level")

    def __init__(self, line: Line) -> None:
        self._line = line
        self.level = False

    def set_level(self, asserted: bool) -> None:
        if asserted == self.level:
            return
        self.level = asserted
        if asserted:
            self._line.assert_one()
        else:
            self._line.release_one()

    def pulse(self) -> None:
        self.set_level(True)
        self.set_level(False)
