"""The names of stages: ``grpo-1``, ``ofsd-1``, ``evaluation-base``, ``index``."""

from dataclasses import dataclass
from typing import Self

OF_ROUND = ("grpo", "pool", "pairs", "lead", "ofsd")
"""The kinds of a round's stages, in loop order."""


@dataclass(frozen=True, slots=True)
class StageId:
    """A stage of a run: its kind, and its round or the policy that it evaluates."""

    kind: str
    """``index``, ``coldstart``, ``preflight``, ``grpo``, ``pool``, ``pairs``, ``lead``, ``ofsd``, ``recall`` or
    ``evaluation``."""
    round: int | None = None
    of: str | None = None
    """Name of the evaluated policy: the stage that made it, ``base``, or a user's own name."""

    def __str__(self) -> str:
        part = self.of if self.round is None else str(self.round)
        return self.kind if part is None else f"{self.kind}-{part}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """The inverse of ``str``."""
        kind, dash, rest = name.partition("-")
        if not dash:
            return cls(kind)
        return cls(kind, of=rest) if kind == "evaluation" else cls(kind, round=int(rest)) if rest.isdigit() else cls(name)

    @property
    def subject(self) -> "StageId":
        """The stage whose policy an evaluation evaluates."""
        return StageId.parse(self.of or "")
