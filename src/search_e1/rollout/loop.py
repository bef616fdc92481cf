"""The rollout loop: sample an action, answer it, and go on until every trajectory has ended.

It is the only one: GRPO, pools, the teacher's lead, evaluation and ``ask`` all sample through it. Trajectories do not wait
for one another: while some are being sampled, the retriever answers others.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any

from search_e1.config import Prompts, RolloutConfig
from search_e1.data.answers import f1
from search_e1.errors import ModelError
from search_e1.retrieval.base import Retriever
from search_e1.rollout.engines.base import Engine, Generation, Interrupted, Request, Session, never
from search_e1.rollout.environment import Environment, ToolCall
from search_e1.rollout.rewards import Reward, open_reward
from search_e1.rollout.unfinished import Unfinished, UnfinishedRow
from search_e1.runs import derived_seed
from search_e1.runs.stopping import Stop
from search_e1.text.prompts import plain_prompt
from search_e1.text.protocol import MALFORMED, Protocol
from search_e1.text.protocols import protocol_of
from search_e1.text.tools import SEARCH, Call
from search_e1.types import ActionKind, Question, StopReason, Trajectory, Turn

logger = logging.getLogger(__name__)
OnTurn = Callable[[int, Turn], None]
OnTrajectory = Callable[[int, Trajectory], None]


@dataclass(slots=True)
class Spent:
    """Seconds that rollouts took, by what they went into; filled by ``rollout``."""

    sampling: float = 0.0
    retrieval: float = 0.0
    """Waiting for the retriever. What it did while others were sampled is not in it."""
    rest: float = 0.0

    @contextmanager
    def _on(self, part: str) -> Iterator[None]:
        clock = time.perf_counter()
        yield
        setattr(self, part, getattr(self, part) + time.perf_counter() - clock)


@dataclass(slots=True)
class Start:
    """Where a rollout begins: a question, the prompt to ask it with, and turns that were already taken (none, usually)."""

    question: Question
    prompt_ids: tuple[int, ...]
    turns: Sequence[Turn] = ()
    sample: int = 0
    """Which of the question's trajectories it is. Two with the same number would be sampled alike."""


@dataclass(slots=True)
class _Row:
    """A trajectory in the making."""

    start: Start
    reward: Reward
    turns: list[Turn] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    stop: StopReason | None = None

    def __post_init__(self) -> None:
        self.context += self.start.prompt_ids
        for turn in self.start.turns:
            self.append(turn)

    def append(self, turn: Turn) -> None:
        self.turns.append(turn)
        self.context += turn.action_ids + turn.observation_ids

    def finish(self) -> Trajectory:
        assert self.stop is not None
        # An observation that no action followed (the context was full) was never read: it is not part of the record.
        if self.turns and self.turns[-1].observation_ids:
            last = self.turns[-1]
            self.turns[-1] = last.model_copy(update={"observation_ids": (), "observation_text": "", "passage_ids": ()})
        question, answer = self.start.question, self.turns[-1].argument if self.stop is StopReason.ANSWERED else None
        return Trajectory(
            question_id=question.id, prompt_ids=self.start.prompt_ids, turns=tuple(self.turns), stop_reason=self.stop,
            answer=answer, reward=self.reward(answer, question.answers), f1=f1(answer, question.answers),
        )  # fmt: skip


def starts(tokenizer, prompts: Prompts, questions: Sequence[Question], group_size: int = 1) -> list[Start]:
    """Plain starts, ``group_size`` for each question, siblings side by side."""
    asked = ((question, plain_prompt(tokenizer, prompts, question.text)) for question in questions)
    return [Start(question, ids, sample=sample) for question, ids in asked for sample in range(group_size)]


def rollout(
    engine: Engine,
    retriever: Retriever,
    starts: Sequence[Start],
    config: RolloutConfig,
    *,
    temperature: float,
    seed: int,
    prompts: Prompts | None = None,
    on_turn: OnTurn | None = None,
    on_trajectory: OnTrajectory | None = None,
    spent: Spent | None = None,
    unfinished: Unfinished | None = None,
) -> list[Trajectory]:
    """Roll out every start to its end; trajectories in the order of ``starts``.

    A policy takes at most ``config.max_searches`` turns that are answered (with passages, or with a correction) and
    then one last generation. ``prompts`` says how it acts and is corrected (without them: Search-R1's tags). ``on_turn``
    and ``on_trajectory`` are called with the index of the start as things happen.

    What a trajectory samples depends on ``seed``, its question's id and its ``sample``, not on the others, but for rounding:
    a matrix product of more rows may differ in the last bit. The same call gives the same bits: searches are answered at
    steps of the engine's, not when the retriever happens to have found something.

    ``unfinished``: where rows go when a signal interrupts the call, and where the same call resumes them. What is resumed
    differs from what would have been sampled by rounding at most.

    Raises:
        Stopped: a signal asked to stop; what was sampled is in ``unfinished``.
        ConfigError: there is no such reward function or tool, or the retriever cannot serve a tool.
        ModelError: a start's context leaves no room for a single token, or the tokenizer does not fit the protocol.
        RetrievalError: from the retriever; nothing is returned then.
    """
    prompts = prompts or Prompts()
    protocol = protocol_of(engine.tokenizer, prompts)
    environment = Environment(retriever, protocol, prompts, config)
    limit = min(config.max_tokens, engine.context_length)
    reward = open_reward(config.reward)
    rows = [_Row(start, reward) for start in starts]
    for row in rows:
        if len(row.context) >= limit:
            raise ModelError(
                f"question {row.start.question.id!r}: a context of {len(row.context)} tokens does not fit into {limit}; "
                "raise rollout.max_tokens, or use a policy with a longer context"
            )
    spent, unfinished = spent or Spent(), unfinished or Unfinished(None, Stop())
    call = _call(engine.tokenizer, starts, seed, temperature, config)
    clock, before = time.perf_counter(), spent.sampling + spent.retrieval
    begun = engine.session(temperature=temperature, stop=protocol.stop, max_tokens=limit)
    with unfinished.stop.finishing(), begun as session, _Calls(environment) as searches:
        session.interrupted = searches.interrupted = lambda: unfinished.stop.asked is not None
        if keep := getattr(session, "keep", None):
            keep(unfinished.answers(call))
        run = _Rollout(rows, session, searches, engine.tokenizer, protocol, config, limit, seed, on_turn, on_trajectory)
        with suppress(Interrupted):
            run.run(spent, unfinished.load(call))
        if searches.interrupted():  # perhaps since the last row has ended; `finishing` raises
            unfinished.save(call, run.rows_so_far())
        else:
            unfinished.discard()
    spent.rest += time.perf_counter() - clock - (spent.sampling + spent.retrieval - before)
    return [row.finish() for row in rows]


def _call(tokenizer: Any, starts: Sequence[Start], *arguments: object) -> tuple[object, ...]:
    """What tells one call from another. Ids of an endpoint's words are those of one process, their text is not."""
    as_text = getattr(tokenizer, "ids_of_process", False)
    prompts = (tokenizer.decode(s.prompt_ids) if as_text else s.prompt_ids for s in starts)
    rows = ((s.question.id, s.sample, len(s.turns), prompt) for s, prompt in zip(starts, prompts, strict=True))
    return *arguments, *rows


@dataclass(slots=True)
class _Rollout:
    """One call of ``rollout``."""

    rows: Sequence[_Row]
    session: Session
    searches: "_Calls"
    tokenizer: Any
    protocol: Protocol
    config: RolloutConfig
    limit: int
    seed: int
    on_turn: OnTurn | None
    on_trajectory: OnTrajectory | None
    sampling: int = 0
    """Rows that the session has."""
    searching: dict[int, Generation] = field(default_factory=dict)
    """Actions that are being answered."""

    def run(self, spent: Spent, resumed: Mapping[int, UnfinishedRow]) -> None:
        for i in range(len(self.rows)):
            self._resume(i, resumed[i]) if i in resumed else self._sample(i)
        complete = [(i, Generation(saved.ids, saved.logprobs)) for i, saved in resumed.items() if saved.complete]
        self.sampling += len(complete)
        self._answer(complete)
        steps = 0
        while self.sampling or self.searches.under_way:
            if self.searches.under_way and (not self.sampling or steps % self.session.admission_interval == 0):
                with spent._on("retrieval"):
                    found = self.searches.collect()
                for i, draft in found:
                    self._take(i, draft)
            if self.searches.interrupted():
                raise Interrupted
            if self.sampling:
                with spent._on("sampling"):
                    finished = self.session.step()
                steps += 1
                self._answer(finished)

    def _resume(self, i: int, saved: UnfinishedRow) -> None:
        """Go on with a row where an interrupted call left it."""
        row = self.rows[i]
        for turn in saved.turns[len(row.turns) :]:
            row.append(turn)
        row.stop = saved.stop
        if row.stop is None and not saved.complete:
            self._sample(i, Generation(saved.ids, saved.logprobs))
        elif row.stop is not None and self.on_trajectory:
            self.on_trajectory(i, row.finish())

    def rows_so_far(self) -> dict[int, UnfinishedRow]:
        """All rows as they are; none of ids that mean nothing to another process, whose session keeps answers instead."""
        if getattr(self.tokenizer, "ids_of_process", False):
            return {}
        begun, nothing = getattr(self.session, "begun", dict)() | self.searching, Generation(())
        return {
            i: UnfinishedRow(
                turns=tuple(row.turns), stop=row.stop, ids=begun.get(i, nothing).ids,
                logprobs=begun.get(i, nothing).logprobs, complete=i in self.searching,
            )
            for i, row in enumerate(self.rows)
        }  # fmt: skip

    def _sample(self, i: int, begun: Generation = Generation(())) -> None:  # noqa: B008  it is frozen
        start, context = self.rows[i].start, self.rows[i].context
        own = derived_seed(self.seed, start.question.id, start.sample, len(self.rows[i].turns))
        most = min(self.config.max_action_tokens, self.limit - len(context))
        self.session.submit(Request(i, context, most, own, begun))
        self.sampling += 1

    def _answer(self, finished: Sequence[tuple[int, Generation]]) -> None:
        self.sampling -= len(finished)
        calls = []
        for i, generation in finished:
            draft = self._draft(self.rows[i], generation)
            if self.rows[i].stop is None and draft["kind"].is_call:
                seen = next((turn.passage_ids for turn in reversed(self.rows[i].turns) if turn.served), ())
                tool = ToolCall(draft["tool"] or SEARCH.name, Call(draft["argument"], seen), draft["action_text"])
                calls.append((i, draft, tool))
                self.searching[i] = generation
            else:
                self._take(i, draft)
        self.searches.launch(calls)

    def _draft(self, row: _Row, generation: Generation) -> "_Draft":
        """What a generation says, with the correction that a malformed one gets; sets ``stop`` on a row that ends with it."""
        text = self.tokenizer.decode(generation.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        action = MALFORMED if generation.stop else self.protocol.parse(text)
        draft: _Draft = dict(
            action_ids=generation.ids, action_text=text, kind=action.kind, argument=action.argument, tool=action.tool,
            sampling_logprobs=generation.logprobs,
        )  # fmt: skip
        if generation.stop:
            row.stop = generation.stop
            if row.stop is StopReason.REFUSED:
                asked = row.start.question.id
                logger.warning("question %r: refused by the endpoint (%s); scored as no answer", asked, generation.words)
        elif action.kind is ActionKind.ANSWER:
            row.stop = StopReason.ANSWERED
        elif len(row.turns) >= self.config.max_searches:
            row.stop = StopReason.MAX_TURNS if action.kind.is_call else StopReason.MALFORMED
        elif action.kind is ActionKind.MALFORMED:
            told, ids = self.protocol.correct(text)
            draft |= dict(observation_text=told, observation_ids=ids)
        return draft

    def _take(self, i: int, draft: "_Draft") -> None:
        """Add a turn, and sample on or end."""
        row, turn = self.rows[i], Turn(**draft)
        self.searching.pop(i, None)
        row.append(turn)
        if self.on_turn:
            self.on_turn(i, turn)
        if row.stop is None and len(row.context) >= self.limit:
            row.stop = StopReason.MAX_TOKENS
        if row.stop is None:
            self._sample(i)
            return
        self.session.release(i)
        if self.on_trajectory:
            self.on_trajectory(i, row.finish())


_POLL = 0.5
"""Seconds between two looks for a signal while searches are awaited."""
_Draft = dict[str, Any]
"""The fields of a turn, as far as they are known."""
_Answered = list[tuple[int, _Draft]]
"""Rows, and their turns with observations."""
_Batch = Sequence[tuple[int, _Draft, ToolCall]]


class _Calls:
    """Calls that the environment answers in the background, one batch after another."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._queue: SimpleQueue[tuple[Future[_Answered], _Batch] | None] = SimpleQueue()
        self.interrupted: Callable[[], bool] = never
        self.under_way: list[Future[_Answered]] = []

    def __enter__(self) -> "_Calls":
        # A daemon, unlike an executor's threads: a process that is to end does not wait for a server's time-out.
        Thread(target=self._work, name="retriever", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for batch in self.under_way:
            batch.cancel()
        self._queue.put(None)

    def _work(self) -> None:
        while job := self._queue.get():
            future, calls = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                replies = self._environment.answer([call for _, _, call in calls])
                future.set_result([(i, draft | reply) for (i, draft, _), reply in zip(calls, replies, strict=True)])
            except BaseException as error:  # raised where it is collected
                future.set_exception(error)

    def launch(self, calls: _Batch) -> None:
        """Begin to answer rows' calls, unless there are none."""
        if calls:
            self.under_way.append(Future())
            self._queue.put((self.under_way[-1], calls))

    def collect(self) -> _Answered:
        """Wait for all that was launched.

        Raises:
            Interrupted: before all were answered.
        """
        while wait(self.under_way, timeout=_POLL).not_done:
            if self.interrupted():
                raise Interrupted
        batches, self.under_way = self.under_way, []
        return [answered for batch in batches for answered in batch.result()]
