"""The rollout loop: sample an action, insert its observation, repeat until every trajectory has ended.

GRPO, pools, the teacher's lead, evaluation and the agent all sample through this loop. Trajectories do not wait for one
another: while some are sampled, the retriever answers others.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from search_e1.config import Prompts, RolloutConfig
from search_e1.errors import ModelError
from search_e1.retrieval.base import Retriever
from search_e1.rollout.calls import Calls, Draft
from search_e1.rollout.engines.base import Engine, Generation, Interrupted, Request, Session
from search_e1.rollout.environment import Environment, ToolCall
from search_e1.rollout.rewards.scorer import Scorer, open_scorer
from search_e1.rollout.starts import Row, Start
from search_e1.rollout.unfinished import Unfinished, UnfinishedRow
from search_e1.runs import derived_seed
from search_e1.runs.stopping import Stop
from search_e1.text.protocol import MALFORMED, Protocol
from search_e1.text.protocols import protocol_of
from search_e1.text.tools import SEARCH, Call
from search_e1.types import ActionKind, Passage, StopReason, Trajectory, Turn

logger = logging.getLogger(__name__)
OnTurn = Callable[[int, Turn, Sequence[Passage]], None]
"""Called after each turn with the trajectory's number, the turn, and the passages of its observation."""
OnTrajectory = Callable[[int, Trajectory], None]


@dataclass(slots=True)
class Spent:
    """Seconds that rollouts spent on each part; filled by ``rollout``."""

    sampling: float = 0.0
    retrieval: float = 0.0
    """Time waiting for the retriever; excludes its work while other rows were sampled."""
    rest: float = 0.0

    @contextmanager
    def _on(self, part: str) -> Iterator[None]:
        clock = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - clock)


def rollout(
    engine: Engine,
    retriever: Retriever,
    starts: Sequence[Start],
    config: RolloutConfig,
    *,
    temperature: float,
    seed: int,
    prompts: Prompts | None = None,
    on_trajectory: OnTrajectory | None = None,
    spent: Spent | None = None,
    unfinished: Unfinished | None = None,
) -> list[Trajectory]:
    """Roll out every start to its end; returns trajectories in the order of ``starts``.

    A policy takes at most ``config.max_searches`` turns that get an observation (passages or a correction), and then one last
    generation. ``prompts`` sets the protocol and the correction (default: Search-R1's tags). ``on_trajectory`` is called with
    the index of a start when its trajectory has ended.

    A trajectory depends on ``seed``, its question's id and its ``sample``, not on other trajectories, except for rounding: a
    matrix product with more rows may differ in the last bit. The same call is reproducible bit for bit: observations arrive at
    fixed engine steps, not when the retriever happens to finish.

    ``unfinished``: where rows are saved when a signal interrupts the call, and from which the same call resumes. A resumed
    trajectory differs from an uninterrupted one at most by rounding.

    Raises:
        Stopped: a signal requested a stop; the sampled rows are in ``unfinished``.
        ConfigError: the reward function or a tool does not exist, or the retriever does not support a tool.
        EndpointError: from the judge.
        ModelError: a start's context leaves no room for a single token, or the tokenizer does not fit the protocol.
        RetrievalError: from the retriever; no trajectory is returned.
    """
    prompts = prompts or Prompts()
    spent, unfinished = spent or Spent(), unfinished or Unfinished(None, Stop())
    call = _call(engine.tokenizer, starts, seed, temperature, config)
    clock, before = time.perf_counter(), spent.sampling + spent.retrieval
    opened = open_loop(engine, retriever, config, prompts, temperature=temperature, seed=seed, on_trajectory=on_trajectory)
    with unfinished.stop.finishing(), opened as loop:
        loop.interrupted = lambda: unfinished.stop.asked is not None
        if keep := getattr(loop.session, "keep", None):
            keep(unfinished.answers(call))
        saved = unfinished.load(call)
        for i, start in enumerate(starts):
            loop.add(i, start, saved.get(i))
        with suppress(Interrupted):
            while loop.busy:
                loop.step(spent)
            loop.tell_ended(wait=True)
        if loop.interrupted():  # possibly set after the last row ended; `finishing` raises
            unfinished.save(call, loop.rows_so_far())
        else:
            unfinished.discard()
    spent.rest += time.perf_counter() - clock - (spent.sampling + spent.retrieval - before)
    finished = [loop.rows[i].finish() for i in range(len(starts))]
    loop.reward.tell(seldom=True)
    return finished


def _call(tokenizer: Any, starts: Sequence[Start], *arguments: object) -> tuple[object, ...]:
    """The identity of a call, for resuming. Word ids of an endpoint are valid in one process only, so their text is used."""
    as_text = getattr(tokenizer, "ids_of_process", False)
    prompts = (tokenizer.decode(s.prompt_ids) if as_text else s.prompt_ids for s in starts)
    rows = ((s.question.id, s.sample, len(s.turns), prompt) for s, prompt in zip(starts, prompts, strict=True))
    return *arguments, *rows


@contextmanager
def open_loop(
    engine: Engine,
    retriever: Retriever,
    config: RolloutConfig,
    prompts: Prompts,
    *,
    temperature: float,
    seed: int,
    on_turn: OnTurn | None = None,
    on_trajectory: OnTrajectory | None = None,
) -> Iterator["RolloutLoop"]:
    """A loop over one session of ``engine``; see ``rollout`` for the arguments.

    Raises:
        ConfigError: the reward function or a tool does not exist, or the retriever does not support a tool.
        ModelError: the tokenizer does not fit the protocol.
    """
    protocol = protocol_of(engine.tokenizer, prompts)
    environment = Environment(retriever, protocol, prompts, config)
    limit, reward = min(config.max_tokens, engine.context_length), open_scorer(config, prompts.instruction)
    begun = engine.session(temperature=temperature, stop=protocol.stop, max_tokens=limit)
    with begun as session, Calls(environment) as calls:
        yield RolloutLoop(session, calls, engine.tokenizer, protocol, config, limit, reward, seed, on_turn, on_trajectory)


@dataclass(slots=True)
class RolloutLoop:
    """Trajectories that are sampled together. Trajectories can join and be dropped at any time."""

    session: Session
    calls: Calls
    tokenizer: Any
    protocol: Protocol
    config: RolloutConfig
    limit: int
    """Maximum ids of a trajectory, its prompt included."""
    reward: Scorer
    seed: int
    on_turn: OnTurn | None
    on_trajectory: OnTrajectory | None
    rows: dict[int, Row] = field(default_factory=dict)
    """All rows that were added and not dropped, ended ones included."""
    sampling: set[int] = field(default_factory=set)
    """Rows in the session."""
    searching: dict[int, Generation] = field(default_factory=dict)
    """Rows whose calls are being answered, with their actions."""
    waits_for_all: bool = True
    """Whether observations are inserted only when all have arrived, which makes a call reproducible; else as they arrive."""
    _complete: list[tuple[int, Generation]] = field(default_factory=list)
    _unreported: list[int] = field(default_factory=list)
    """Rows that ended and were not reported to ``on_trajectory`` yet."""
    _steps: int = 0

    @property
    def interrupted(self) -> Callable[[], bool]:
        """Checked during long steps, which raise ``Interrupted`` when it is true."""
        return self.calls.interrupted

    @interrupted.setter
    def interrupted(self, asked: Callable[[], bool]) -> None:
        self.session.interrupted = self.calls.interrupted = asked

    @property
    def busy(self) -> bool:
        """Whether anything is left to sample or to wait for."""
        return bool(self.sampling or self._complete or self.calls.under_way)

    def add(self, i: int, start: Start, saved: UnfinishedRow | None = None) -> None:
        """Add trajectory ``i`` at ``start``, or resume it from ``saved``.

        Raises:
            ModelError: the context leaves no room for a single token.
        """
        row = Row(start, self.reward)
        if len(row.context) >= self.limit:
            raise ModelError(
                f"question {start.question.id!r}: a context of {len(row.context)} tokens does not fit into {self.limit}; "
                "raise rollout.max_tokens, or use a policy with a longer context"
            )
        self.rows[i] = row
        if saved is None:
            self._sample(i)
            return
        for turn in saved.turns[len(row.turns) :]:
            row.append(turn)
        row.stop = saved.stop
        action = Generation(saved.ids, saved.logprobs)
        if saved.complete:
            self._complete.append((i, action))
        elif row.stop is None:
            self._sample(i, action)
        else:
            self._end(i)

    def drop(self, i: int) -> None:
        """Drop a trajectory, ended or not. Pending results for it are ignored."""
        row = self.rows.pop(i)
        self.searching.pop(i, None)
        if row.stop is None:
            self.sampling.discard(i)
            self.session.release(i)

    def step(self, spent: Spent) -> None:
        """Insert the observations that are due, and sample a token of each row.

        Raises:
            Interrupted: ``interrupted`` is true; no row is lost.
            RetrievalError, ModelError, EndpointError: from the retriever or the engine.
        """
        complete, self._complete = self._complete, []
        self._answer(complete)
        if self.calls.under_way and (not self.sampling or self._steps % self.session.admission_interval == 0):
            # If a step is long, calls get the duration of one step before they are waited for.
            beside = bool(self.sampling) and getattr(self.session, "answers_wait", False)
            with spent._on("retrieval"):
                answered = self.calls.collect(marked=beside) if self.waits_for_all else self.calls.ready(wait=not self.sampling)
            for i, draft, passages in answered:
                self._take(i, draft, passages)
        if self.interrupted():
            raise Interrupted
        if self.sampling:
            self.calls.mark()
            with spent._on("sampling"):
                finished = self.session.step()
            self._steps += 1
            self._answer(finished)

    def begun(self) -> dict[int, Generation]:
        """The tokens sampled so far of the rows' current actions, if the session provides them."""
        return getattr(self.session, "begun", dict)()

    def rows_so_far(self) -> dict[int, UnfinishedRow]:
        """The current state of all rows; empty if the ids are valid in this process only (the session then keeps answers)."""
        if getattr(self.tokenizer, "ids_of_process", False):
            return {}
        begun, nothing = self.begun() | self.searching | dict(self._complete), Generation(())
        complete = self.searching.keys() | dict(self._complete)
        return {
            i: UnfinishedRow(
                turns=tuple(row.turns), stop=row.stop, ids=begun.get(i, nothing).ids,
                logprobs=begun.get(i, nothing).logprobs, complete=i in complete,
            )
            for i, row in self.rows.items()
        }  # fmt: skip

    def _sample(self, i: int, begun: Generation = Generation(())) -> None:  # noqa: B008  it is frozen
        start, context = self.rows[i].start, self.rows[i].context
        seed = self.seed if start.seed is None else start.seed
        own = derived_seed(seed, start.question.id, start.sample, len(self.rows[i].turns))
        max_new_tokens = int(min(self.config.max_action_tokens, self.limit - len(context), self.rows[i].budget))
        self.session.submit(Request(i, context, max_new_tokens, own, begun, start.temperature))
        self.sampling.add(i)

    def _answer(self, finished: Sequence[tuple[int, Generation]]) -> None:
        calls = []
        for i, generation in finished:
            if i not in self.rows:
                continue  # dropped
            self.sampling.discard(i)
            draft = self._draft(self.rows[i], generation)
            if self.rows[i].stop is None and draft["kind"].is_call:
                seen = next((turn.passage_ids for turn in reversed(self.rows[i].turns) if turn.served), ())
                tool = ToolCall(draft["tool"] or SEARCH.name, Call(draft["argument"], seen), draft["action_text"])
                calls.append((i, draft, tool))
                self.searching[i] = generation
            else:
                self._take(i, draft)
        self.calls.launch(calls)

    def _draft(self, row: Row, generation: Generation) -> Draft:
        """The turn of a generation, with the correction if malformed; sets ``stop`` on the row if it ends here."""
        text = self.tokenizer.decode(generation.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        action = MALFORMED if generation.stop else self.protocol.parse(text)
        draft: Draft = dict(
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

    def _take(self, i: int, draft: Draft, passages: Sequence[Passage] = ()) -> None:
        """Add a turn, then continue sampling or end the row."""
        if i not in self.rows:
            return  # dropped
        row, turn = self.rows[i], Turn(**draft)
        self.searching.pop(i, None)
        row.append(turn)
        if self.on_turn:
            self.on_turn(i, turn, passages)
        if i not in self.rows:
            return  # dropped by `on_turn`
        if row.stop is None and (len(row.context) >= self.limit or row.budget <= 0):
            row.stop = StopReason.MAX_TOKENS
        if row.stop is None:
            self._sample(i)
            return
        self.session.release(i)
        self._end(i)

    def _end(self, i: int) -> None:
        self.rows[i].reward.begin(self.rows[i].answer, self.rows[i].start.question)
        self._unreported.append(i)
        self.tell_ended(wait=False)

    def tell_ended(self, *, wait: bool) -> None:
        """Report ended trajectories whose reward is known; with ``wait``, wait for all rewards (a judge may be slow)."""
        waiting, self._unreported = self._unreported, []
        for i in waiting:
            if i not in self.rows:
                continue  # dropped
            row = self.rows[i]
            if not wait and not row.reward.ready(row.answer, row.start.question):
                self._unreported.append(i)
            elif self.on_trajectory:
                self.on_trajectory(i, row.finish())
