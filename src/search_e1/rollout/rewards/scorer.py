"""The reward of a run: by answer type, with "not in the documents" as an answer, and with a judge."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from search_e1.config import RolloutConfig
from search_e1.data.answers import normalize_answer
from search_e1.errors import ConfigError, DataError
from search_e1.rollout.rewards import JUDGE, TYPED, Reward, checked, open_reward
from search_e1.rollout.rewards.dates import date
from search_e1.rollout.rewards.numbers import number
from search_e1.types import Question

if TYPE_CHECKING:  # imports an HTTP client
    from search_e1.rollout.rewards.judge import Judge

TYPES = {"text": "em", "number": "number", "date": "date", "list": "list", "yes_no": "yes_no"}
"""``metadata.answer_type`` -> reward, unless ``rollout.rewards.types`` overrides it."""


class Scorer:
    """Computes the reward of an answer to a question, from 0 to 1."""

    def __init__(self, config: RolloutConfig) -> None:
        """Use ``open_scorer``."""
        self.name, self._config = config.reward, config.rewards
        self._not_found = {normalize_answer(text) for text in config.rewards.not_found}
        names = {**TYPES, **config.rewards.types} if config.reward == TYPED else {}
        self._by_type = {kind: self._open(name, f"rollout.rewards.types.{kind}") for kind, name in names.items()}
        self._reward = self._open("em" if config.reward == TYPED else config.reward, "rollout.reward")

    @property
    def is_default(self) -> bool:
        """Whether the reward is plain exact match."""
        return self.name == "em" and not self._not_found

    def __call__(self, answer: str | None, question: Question) -> float:
        """
        Raises:
            ConfigError: a user's reward function returned something other than a number from 0 to 1.
            DataError: the question's ``metadata.answer_type`` is unknown.
            EndpointError: the judge did not answer, or its answer is not a verdict.
        """
        if (settled := self._settled(answer, question)) is not None:
            return settled
        found = self._of(question)
        return found(answer, question.answers) if callable(found) else found.verdict(answer or "", question)

    def check(self, questions: Iterable[Question]) -> None:
        """
        Raises:
            DataError: the ``metadata.answer_type`` of a question is unknown.
        """
        for question in questions:
            self._of(question)

    def begin(self, answer: str | None, question: Question) -> None:
        """Request a judge's verdict in advance, if a judge decides."""
        if self._settled(answer, question) is None and not callable(found := self._of(question)):
            found.begin(answer or "", question)

    def ready(self, answer: str | None, question: Question) -> bool:
        """Whether a call would not block."""
        if self._settled(answer, question) is not None or callable(found := self._of(question)):
            return True
        return found.ready(answer or "", question)

    def tell(self, *, seldom: bool = False) -> None:
        """Log the judges' usage so far; see ``Judge.tell``."""
        for found in (self._reward, *self._by_type.values()):
            if not callable(found):
                found.tell(seldom=seldom)

    def _settled(self, answer: str | None, question: Question) -> float | None:
        """The reward if no reward function is needed: no answer, or "not found"; else ``None``."""
        if answer is None:
            return 0.0
        if not self._not_found:
            return None
        says_so = normalize_answer(answer) in self._not_found
        return float(says_so) if question.unanswerable else 0.0 if says_so else None

    def _of(self, question: Question) -> "Reward | Judge":
        kind = question.metadata.get("answer_type") if self._by_type else None
        if kind is None:
            return self._reward
        if kind not in self._by_type:
            raise DataError(
                f"question {question.id!r}: metadata.answer_type = {kind!r}; known: {', '.join(self._by_type)}; fix it, or "
                "add it to rollout.rewards.types"
            )
        return self._by_type[kind]

    def _open(self, name: str, key: str) -> "Reward | Judge":
        configured: dict[str, Callable[[str | None, Sequence[str]], float]] = {
            "number": partial(number, tolerance=self._config.tolerance),
            "date": partial(date, order=self._config.date_order),
        }
        if name == JUDGE and self._config.judge:
            from search_e1.rollout.rewards.judge import open_judge

            return open_judge(self._config.judge)
        if name in (TYPED, JUDGE):
            raise ConfigError(f"{key} = {name!r}: cannot be used here; name the reward of one kind of answer")
        return checked(configured[name], name, key) if name in configured else open_reward(name, key)


def open_scorer(config: RolloutConfig, instruction: str | None = None) -> Scorer:
    """The scorer for ``config``. ``instruction``: the policy's instruction, if it should be checked.

    Raises:
        ConfigError: there is no such reward function, or the instruction does not mention the "not found" answer.
    """
    texts = config.rewards.not_found
    if texts and instruction is not None and not any(text.lower() in instruction.lower() for text in texts):
        raise ConfigError(
            f"prompts.instruction does not tell the policy to answer {texts[0]!r} where the documents hold no answer, which "
            "rollout.rewards.not_found rewards; add that to it"
        )
    return Scorer(config)
