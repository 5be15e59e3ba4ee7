"""What a diagnosis says: the stages that an interrupt passes, each with its state, and the verdict in a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

_NAME_WIDTH = 22


@dataclass(frozen=True, slots=True)
class Stage:
    """One place on the way from a source to its handler.

    state: its registers in words. registers: the raw values behind that. reason: where it holds the interrupt, a clause
    that says how; empty where it does not.
    """

    name: str
    state: str
    reason: str = ""
    registers: Mapping[str, int] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether the interrupt cannot get past this stage now."""
        return bool(self.reason)

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "state": self.state,
            "holds": self.holds,
            "reason": self.reason,
            "registers": dict(self.registers),
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why an interrupt was or was not delivered. held_by: the name of the stage that the verdict is about, or None
    where nothing holds it."""

    SCHEMA: ClassVar[tuple[str, int]] = ("explanation", 1)
    subject: str
    verdict: str
    held_by: str | None
    stages: tuple[Stage, ...]

    def as_json(self) -> dict[str, object]:
        """Plain values for `json.dumps`."""
        return {
            "schema": list(self.SCHEMA),
            "subject": self.subject,
            "verdict": self.verdict,
            "held_by": self.held_by,
            "stages": [stage.as_json() for stage in self.stages],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> "Explanation":
        """What `as_json` wrote. ValueError for anything else."""
        try:
            stages = document["stages"]
            assert isinstance(stages, list)
            return cls(
                str(document["subject"]),
                str(document["verdict"]),
                None if document["held_by"] is None else str(document["held_by"]),
                tuple(Stage(each["name"], each["state"], each["reason"], each["registers"]) for each in stages),
            )
        except (KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"not an explanation: {error}") from None

    def __str__(self) -> str:
        """The verdict, then a line for each stage; `*` marks those that hold the interrupt."""
        lines = [self.verdict]
        for stage in self.stages:
            mark = "*" if stage.holds else " "
            lines.append(f"{mark} {stage.name:<{_NAME_WIDTH}} {stage.state}")
        return "\n".join(lines)
