"""Continuous batching of questions from any number of threads, in one session of the engine.

A dedicated thread owns the session. It samples one token per question at a time; between tokens, new questions join and
cancelled ones leave. When the last is answered, it closes the session, which frees the memory of its cache.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from itertools import count
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

from search_e1.agent.answer import Answer, Reading
from search_e1.config import Prompts, RolloutConfig
from search_e1.data.answers import in_language
from search_e1.errors import ModelError, SearchE1Error
from search_e1.retrieval.base import Retriever
from search_e1.rollout.engines.base import Engine
from search_e1.rollout.loop import RolloutLoop, Spent, open_loop
from search_e1.rollout.starts import Start
from search_e1.text.prompts import plain_prompt
from search_e1.text.protocols import protocol_of
from search_e1.types import Passage, Question, Trajectory, Turn

logger = logging.getLogger(__name__)
_LOWEST = 0.01
"""Lower temperatures become greedy: logits divided by one near 0 overflow, which would fail the whole batch."""
OnText = Callable[[str], None]
OnTurn = Callable[[Turn, Sequence[Passage]], None]


class QuestionError(ModelError):
    """One question that cannot be answered; others can."""


@dataclass(slots=True, eq=False)
class Job:
    """A question in progress."""

    question: Question
    seed: int
    temperature: float
    on_text: OnText | None
    on_turn: OnTurn | None
    number: int
    reading: Reading
    max_tokens: int | None = None
    """Maximum number of tokens to sample."""
    answer: Future[Answer] = field(default_factory=Future)
    """The answer or error; cancelled by ``Scheduler.cancel``."""
    stream: "TextStream | None" = None


class Scheduler:
    """Answers questions. ``submit`` is thread-safe; callbacks run in the scheduler's thread and block it."""

    def __init__(self, engine: Engine, retriever: Retriever, prompts: Prompts, limits: RolloutConfig) -> None:
        """
        Raises:
            ModelError: the tokenizer does not fit the protocol.
        """
        self._engine, self._retriever, self._prompts = engine, retriever, prompts
        self._limits = limits.without_reward
        self.protocol = protocol_of(engine.tokenizer, prompts)
        self._special = frozenset(getattr(engine.tokenizer, "all_special_ids", ()))
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._jobs: dict[int, Job] = {}
        """Jobs taken from the inbox that have not ended."""
        self._numbers = count()
        self._thread = Thread(target=self._run, name="agent", daemon=True)
        self._closed, self._closing = False, Lock()
        self._thread.start()

    def submit(
        self,
        question: Question,
        *,
        seed: int = 0,
        temperature: float = 0.0,
        max_tokens: int | None = None,
        on_text: OnText | None = None,
        on_turn: OnTurn | None = None,
    ) -> Job:
        """Add ``question`` to the batch. With the same ``seed``, ``rollout`` samples the same ids.

        ``on_text`` gets the text without end tokens: as it is sampled if the engine supports it, else once per turn.
        ``on_turn`` gets each complete turn with the passages that were read, truncated ones included.

        Raises:
            SearchE1Error: the scheduler is closed.
        """
        temperature = temperature if temperature >= _LOWEST else 0.0
        stream = TextStream(self._engine.tokenizer, self._special, on_text) if on_text else None
        job = Job(
            question, seed, temperature, on_text, on_turn, next(self._numbers), Reading(self.protocol), max_tokens,
            stream=stream,
        )  # fmt: skip
        with self._closing:  # a job put after the end would never be answered
            if self._closed:
                raise SearchE1Error("the agent is closed; open it again")
            self._inbox.put(job)
        return job

    def said(self, turn: Turn) -> str:
        """The text sampled in ``turn``, without end tokens, as ``on_text`` gets it."""
        heard: list[str] = []
        TextStream(self._engine.tokenizer, self._special, heard.append).finish(turn.action_ids)
        return "".join(heard)

    def cancel(self, job: Job) -> None:
        """Cancel a question and its ``answer``, unless it is answered already."""
        if job.answer.cancel():
            self._inbox.put(job)  # to be dropped

    def close(self) -> None:
        """Cancel unanswered questions, and wait for the thread to end."""
        self._end_of_inbox()
        self._thread.join()

    def _end_of_inbox(self) -> None:
        with self._closing:
            self._closed = True
            self._inbox.put(None)

    # Everything below runs in the thread.

    def _run(self) -> None:
        while job := self._inbox.get():
            if job.answer.cancelled():
                continue
            try:
                self._session(job)
            except BaseException as error:
                if not self._jobs:  # all are answered, so nobody gets the error
                    logger.warning("%s", error)
                self._fail(error)
                if not isinstance(error, Exception):
                    self._end_of_inbox()
                    self._fail(CancelledError())
                    raise
        self._fail(CancelledError())

    def _session(self, first: Job) -> None:
        """Answer ``first`` and all questions that arrive meanwhile."""
        spent = Spent()
        self._jobs[first.number] = first  # so that it gets the error if the session cannot be opened
        opened = open_loop(
            self._engine, self._retriever, self._limits, self._prompts, temperature=0.0, seed=0, on_turn=self._turn,
            on_trajectory=self._end,
        )  # fmt: skip
        with in_language(self._limits.answer_language), opened as loop:
            loop.waits_for_all = False
            self._take(loop, first)
            while self._admit(loop) and loop.busy:
                loop.step(spent)
                self._tell(loop)
                self._drop_ended(loop)

    def _admit(self, loop: RolloutLoop) -> bool:
        """Admit the jobs in the inbox; false when the scheduler is closing."""
        while True:
            try:
                job = self._inbox.get_nowait()
            except Empty:
                return True
            if job is None:
                self._inbox.put(None)  # for ``_run``
                return False
            self._take(loop, job)

    def _take(self, loop: RolloutLoop, job: Job) -> None:
        if job.answer.cancelled():
            self._jobs.pop(job.number, None)
            if job.number in loop.rows:
                loop.drop(job.number)
            return
        try:
            ids = plain_prompt(self._engine.tokenizer, self._prompts, job.question.text)
            self._jobs[job.number] = job
            start = Start(job.question, ids, seed=job.seed, temperature=job.temperature, max_sampled=job.max_tokens)
            loop.add(job.number, start)
        except ModelError as error:  # concerns only this question
            self._jobs.pop(job.number, None)
            _set(job.answer, QuestionError(str(error)))

    def _turn(self, number: int, turn: Turn, passages: Sequence[Passage]) -> None:
        if job := self._jobs.get(number):
            read = job.reading.add(turn, passages)
            if job.stream:
                self._call(job, job.stream.finish, turn.action_ids)
            self._call(job, job.on_turn, turn, read)

    def _call(self, job: Job, callback: Callable[..., None] | None, *arguments: Any) -> None:
        """Call ``callback``; an exception in it ends only its own question."""
        try:
            if callback and not job.answer.done():
                callback(*arguments)
        except Exception as error:
            self._jobs.pop(job.number, None)
            _set(job.answer, error)

    def _end(self, number: int, trajectory: Trajectory) -> None:
        if job := self._jobs.pop(number, None):
            # No reward: the right answer is not known.
            plain = trajectory.model_copy(update={"reward": 0.0, "f1": 0.0})
            _set(job.answer, job.reading.answer(job.question.text, plain))

    def _tell(self, loop: RolloutLoop) -> None:
        """Pass sampled text on to the jobs with ``on_text``."""
        listening = [job for job in self._jobs.values() if job.stream]
        if not listening:
            return
        begun = loop.begun()
        for job in listening:
            if job.stream and job.number in begun:
                self._call(job, job.stream.feed, begun[job.number].ids)

    def _drop_ended(self, loop: RolloutLoop) -> None:
        for number in [number for number in loop.rows if number not in self._jobs]:
            loop.drop(number)

    def _fail(self, error: BaseException) -> None:
        """End all questions of a failed session with ``error``."""
        jobs, self._jobs = list(self._jobs.values()), {}
        if isinstance(error, CancelledError):
            while not self._inbox.empty():
                if job := self._inbox.get():
                    jobs.append(job)
        for job in jobs:
            _set(job.answer, error)


def _set(future: "Future[Any]", value: Any) -> None:
    """Set the outcome of a future that its owner may cancel at any time."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(value, CancelledError):
        future.set_exception(SearchE1Error("the agent was closed before it answered; open it again"))
    elif isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)


class TextStream:
    """Decodes the ids of successive generations incrementally: each character once, when it is complete."""

    def __init__(self, tokenizer: Any, special: frozenset[int], on_text: OnText) -> None:
        self._tokenizer, self._special, self._on_text = tokenizer, special, on_text
        self._begin()

    def _begin(self) -> None:
        self._fed = 0
        """Number of ids processed."""
        self._ids: list[int] = []
        """The processed ids without special tokens."""
        self._context = self._shown = 0
        """Text of ids before ``_shown`` was passed on; ids from ``_context`` on are decoded with new ones, as context."""

    def feed(self, ids: Sequence[int]) -> None:
        """``ids``: all ids of the generation so far."""
        self._ids += [id for id in ids[self._fed :] if id not in self._special]
        self._fed = len(ids)
        before, now = self._decode(self._ids[self._context : self._shown]), self._decode(self._ids[self._context :])
        if len(now) > len(before) and not now.endswith("\N{REPLACEMENT CHARACTER}"):
            self._on_text(now[len(before) :])
            self._context, self._shown = self._shown, len(self._ids)

    def finish(self, ids: Sequence[int]) -> None:
        """Complete the generation: pass on its remaining complete characters."""
        self.feed(ids)
        before, now = self._decode(self._ids[self._context : self._shown]), self._decode(self._ids[self._context :])
        rest = now[len(before) :].rstrip("\N{REPLACEMENT CHARACTER}")
        if self._shown < len(self._ids) and rest:
            self._on_text(rest)
        self._begin()

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
