"""Opens the requested writer: an endpoint, a policy, or rules."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from search_e1.errors import SearchE1Error
from search_e1.questions.completions import Costs, journal, open_endpoint, open_policy
from search_e1.questions.make import Writer
from search_e1.questions.rules import RuleWriter
from search_e1.questions.writer import ModelWriter
from search_e1.rollout.engines.endpoint import Endpoint
from search_e1.rollout.unfinished import Answers
from search_e1.types import Passage

_NOT_SETTINGS = ("out", "endpoint", "concurrency", "timeout", "costs")
"""Fields that do not affect the questions."""


@dataclass(slots=True)
class By:
    """Settings of the writer: ``endpoint`` and ``model``, ``policy``, or rules if neither is given."""

    out: Path
    endpoint: str | None
    model: str | None
    policy: str | None
    temperature: float
    max_tokens: int | None
    concurrency: int
    timeout: float
    per_passage: int
    seed: int
    costs: Costs | None = field(default=None, init=False)

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in _NOT_SETTINGS}

    @contextmanager
    def open(self, passages: Sequence[Passage], tell: Callable[[str], None]) -> Iterator[Writer]:
        """
        Raises:
            ConfigError, ModelError: the writer cannot be opened.
        """
        if not (self.endpoint or self.policy):
            yield RuleWriter(passages, self.per_passage, self.seed)
            return
        answers = Answers(journal(self.out), "questions")
        if self.endpoint:
            endpoint = Endpoint(
                self.endpoint, str(self.model), timeout=self.timeout, concurrency=self.concurrency, keys="--endpoint, --model"
            )
            opened = open_endpoint(endpoint, answers, self.max_tokens, self.seed)
        else:
            opened = open_policy(str(self.policy), answers, self.max_tokens, self.seed)
        with opened as completer:
            self.costs = completer.costs
            writer = ModelWriter(completer, self.per_passage, self.temperature, tell)
            try:
                yield writer
            except SearchE1Error:
                if not writer.usable:
                    self.forget()  # the next call may reach a better model under the same name
                raise

    def forget(self) -> None:
        """Remove the saved replies."""
        journal(self.out).unlink(missing_ok=True)
