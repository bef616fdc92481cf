"""Lessons, and their forms as training samples: direct, sloppy, or following a reference."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from search_e1.config import ColdstartConfig
from search_e1.errors import DataError
from search_e1.rollout.demonstrations.writer import Writer
from search_e1.text.prompts import privileged_prompt
from search_e1.types import Question, Sample, Trajectory, Turn

_DRILL_FACTOR = 6  # a batch of drills has this many times the samples of a batch of demonstrations
_UNANSWERED = dict(observation_ids=(), observation_text="", passage_ids=())
_FIRST_TITLE = re.compile(r"Doc 1\(Title: (.*?)\)")


@dataclass(frozen=True)
class Lesson:
    """A correct, direct trajectory, and needless searches that could precede it."""

    question: Question
    clean: Trajectory
    writer: Writer
    queries: tuple[str, ...]
    """Queries of the needless searches."""
    needed: frozenset[str]
    """Ids of passages that no needless search may retrieve: it would not be needless."""

    @cached_property
    def detours(self) -> tuple[Turn, ...]:
        """The needless searches that retrieve passages but none of ``needed``; run on first access.

        Raises:
            RetrievalError: from the retriever.
        """
        return tuple(
            self.writer.search(f"I need to find {query}.", query)
            for query in self.queries
            if self.writer.passages(query) and not self.writer.retrieves(query, self.needed)
        )


def batches(taught: Sequence[Lesson], config: ColdstartConfig, *, seed: int = 0) -> Iterator[list[Sample]]:
    """Endless batches: first ``config.drills`` batches of first searches only, then whole demonstrations.

    Every pass over the lessons has a new order and draws new forms.

    Raises:
        DataError: there are no lessons.
        RetrievalError: a needless search failed (raised when it is drawn).
    """
    if not taught:
        raise DataError(
            "no question gives a demonstration; give training questions whose metadata names gold_passage_ids or "
            "answer_passage_ids of data.corpus, or whose answers the retriever finds, or demonstrations of your own"
        )
    return _draw(taught, config, random.Random(seed))


def _draw(taught: Sequence[Lesson], config: ColdstartConfig, rng: random.Random) -> Iterator[list[Sample]]:
    for _ in range(config.drills):
        # Many short samples: everything else builds on copying a name from the question into a query.
        yield [
            _sample(lesson, lesson.clean.prompt_ids, [lesson.clean.turns[0].model_copy(update=_UNANSWERED)])
            for lesson in rng.choices(taught, k=_DRILL_FACTOR * config.batch_size)
        ]
    batch: list[Sample] = []
    while True:
        for lesson in rng.sample(taught, len(taught)):
            batch.append(demonstration(lesson, config, rng))
            if len(batch) == config.batch_size:
                yield batch
                batch = []


def demonstration(lesson: Lesson, config: ColdstartConfig, rng: random.Random) -> Sample:
    """``lesson`` in a form drawn by the shares of ``config``: following a reference, direct, or sloppy."""
    clean, tokenizer, rollout = lesson.clean, lesson.writer.tokenizer, lesson.writer.rollout
    may_search = clean.searches < rollout.max_searches
    if rng.random() < config.privileged:
        off_track = may_search and rng.random() < config.off_track
        detour = (rng.choice((*lesson.detours, clean.turns[0])),) if off_track else ()
        prompt = privileged_prompt(tokenizer, lesson.writer.prompts, lesson.question.text, clean.text)
        followed = _sample(lesson, prompt, (*detour, *clean.turns), read_only=len(detour))
        if len(followed) <= rollout.max_tokens:
            return followed
    draw = rng.random()
    turns = clean.turns
    if draw < config.early:
        found = _FIRST_TITLE.search(turns[0].observation_text)
        turns = (turns[0], _premature_answer(lesson.writer, found[1])) if found else turns
    elif draw < config.early + config.duplicate:
        turns = (turns[0], *turns) if may_search else turns
    elif draw < config.early + config.duplicate + config.irrelevant:
        turns = (rng.choice(lesson.detours), *turns) if may_search and lesson.detours else turns
    sloppy = _sample(lesson, clean.prompt_ids, turns)
    return sloppy if len(sloppy) <= rollout.max_tokens else _sample(lesson, clean.prompt_ids, clean.turns)


def _sample(lesson: Lesson, prompt_ids: tuple[int, ...], turns: Sequence[Turn], read_only: int = 0) -> Sample:
    """A sample of ``turns``; the actions of the first ``read_only`` turns are masked out."""
    ids: list[int] = []
    mask: list[int] = []
    for number, turn in enumerate(turns):
        ids += turn.action_ids + turn.observation_ids
        mask += [int(number >= read_only)] * len(turn.action_ids) + [0] * len(turn.observation_ids)
    return Sample(question_id=lesson.question.id, prompt_ids=prompt_ids, response_ids=tuple(ids), action_mask=tuple(mask))


def _premature_answer(writer: Writer, title: str) -> Turn:
    """An answer with the title of the first passage."""
    return writer.answer(f"So the answer is {title}.", title)
