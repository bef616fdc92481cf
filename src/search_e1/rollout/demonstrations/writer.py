"""Writes turns in the policy's protocol and token ids, with observations from the retriever."""

import os
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

from search_e1.config import Prompts, RolloutConfig
from search_e1.data.answers import f1, language_in_force, put_in_force
from search_e1.retrieval.base import Retriever
from search_e1.rollout.rewards.scorer import open_scorer
from search_e1.runs.progress import Progress, silent
from search_e1.runs.tokenizing import tokenizing
from search_e1.text.prompts import plain_prompt
from search_e1.text.protocol import Action
from search_e1.text.protocols import protocol_of
from search_e1.types import ActionKind, Passage, Question, StopReason, Trajectory, Turn

_BATCH = 256  # queries per retriever call
_DETOURS = 2

Item = TypeVar("Item")
Made = TypeVar("Made")


class Writer:
    """Writes turns and trajectories. Thread-safe."""

    def __init__(self, tokenizer: Any, prompts: Prompts, rollout: RolloutConfig, retriever: Retriever) -> None:
        """
        Raises:
            ModelError: the tokenizer does not support the protocol.
        """
        self.tokenizer, self.prompts, self.rollout, self.retriever = tokenizer, prompts, rollout, retriever
        self.protocol = protocol_of(tokenizer, prompts)
        self._reward = open_scorer(rollout)
        self._found: dict[str, Sequence[Passage]] = {}
        self._lock = Lock()

    def retrieve(self, queries: Iterable[str], progress: Progress = silent) -> None:
        """Retrieve passages for new queries, in batches."""
        new = [query for query in dict.fromkeys(queries) if query not in self._found]
        total = len(self._found) + len(new)
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            self._found |= zip(batch, self.retriever.search(batch, self.rollout.topk), strict=True)
            progress(len(self._found), total, "queries")

    def passages(self, query: str) -> Sequence[Passage]:
        """The passages retrieved for ``query``."""
        if query not in self._found:
            with self._lock:
                self.retrieve([query])
        return self._found[query]

    def retrieves(self, query: str, wanted: Iterable[str]) -> bool:
        """Whether ``query`` retrieves a passage whose id is one of ``wanted``."""
        return not frozenset(wanted).isdisjoint(passage.id for passage in self.passages(query))

    def search(self, thought: str, query: str) -> Turn:
        return self.searched(self.protocol.write(thought, Action(ActionKind.SEARCH, query)), query)

    def searched(self, action: str, query: str) -> Turn:
        """The turn of ``action``, a text that searches for ``query``."""
        passages = self.passages(query)
        text, ids = self.protocol.observe(action, passages, self.rollout.max_observation_tokens)
        return Turn(
            action_ids=self.ids(action), action_text=action, kind=ActionKind.SEARCH, argument=query,
            observation_text=text, observation_ids=ids, passage_ids=tuple(passage.id for passage in passages),
        )  # fmt: skip

    def answer(self, thought: str, answer: str) -> Turn:
        return self.answered(self.protocol.write(thought, Action(ActionKind.ANSWER, answer)), answer)

    def answered(self, action: str, answer: str) -> Turn:
        """The turn of ``action``, a text that gives ``answer``."""
        return Turn(action_ids=self.ids(action), action_text=action, kind=ActionKind.ANSWER, argument=answer)

    def trajectory(self, question: Question, turns: Sequence[Turn]) -> Trajectory:
        return trajectory(self.tokenizer, self.prompts, question, turns, self._reward)

    def fits(self, trajectory: Trajectory) -> bool:
        """Whether a rollout could have produced ``trajectory``: within the limits, and every action parses as intended."""
        return (
            len(trajectory.prompt_ids) + len(trajectory.response_ids) <= self.rollout.max_tokens
            and trajectory.searches <= self.rollout.max_searches
            and all(len(turn.action_ids) <= self.rollout.max_action_tokens for turn in trajectory.turns)
            and all(self.protocol.parse(t.action_text) == Action(t.kind, t.argument) for t in trajectory.turns)
        )

    def ids(self, text: str) -> tuple[int, ...]:
        with tokenizing(self.tokenizer):
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def map(self, write: Callable[[Item], Made | None], items: Sequence[Item]) -> list[Made]:
        """The results of ``write`` on ``items`` in order, without ``None``; runs in threads."""
        self.ids("")  # sets truncation and padding, which is not thread-safe
        language = (language_in_force(),)
        with ThreadPoolExecutor(
            os.cpu_count(), initializer=put_in_force, initargs=language
        ) as pool:  # the tokenizer releases the GIL
            return [made for made in pool.map(write, items) if made is not None]


def detours(question: str, rng: random.Random) -> tuple[str, ...]:
    """Queries that are unlikely to retrieve anything useful."""
    words = [word for word in question.rstrip("?").split() if len(word) > 3] or question.split()
    return tuple(" ".join(rng.sample(words, min(2, len(words)))) for _ in range(_DETOURS))


def trajectory(
    tokenizer: Any, prompts: Prompts, question: Question, turns: Sequence[Turn], reward: Callable[[str | None, Question], float]
) -> Trajectory:
    """A trajectory of ``turns``, ending with an answer, under the plain prompt."""
    answer = turns[-1].argument
    return Trajectory(
        question_id=question.id,
        prompt_ids=plain_prompt(tokenizer, prompts, question.text),
        turns=tuple(turns),
        stop_reason=StopReason.ANSWERED,
        answer=answer,
        reward=reward(answer, question),
        f1=f1(answer, question.answers),
    )


def seen(trajectory: Trajectory) -> frozenset[str]:
    """Ids of the passages that the trajectory's searches returned."""
    return frozenset(id for turn in trajectory.turns for id in turn.passage_ids)
