"""Demonstrations from a model behind an endpoint: its correct trajectories under the policy's protocol.

An endpoint returns text, so its trajectories hold word ids instead of token ids. Only thoughts, queries and the answer are
kept: they are rewritten in the policy's format and token ids, and the retriever answers the queries again.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from search_e1.config import EndpointConfig, Prompts, RolloutConfig
from search_e1.errors import EndpointError
from search_e1.retrieval.base import Retriever
from search_e1.rollout import pool
from search_e1.rollout.demonstrations.forms import Lesson
from search_e1.rollout.demonstrations.writer import Writer, detours, seen
from search_e1.rollout.engines.endpoint import Endpoint, EndpointEngine
from search_e1.rollout.engines.words import Words
from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.progress import Progress, silent
from search_e1.runs.safe import masked_url
from search_e1.text.prompts import neutralize
from search_e1.text.protocol import Protocol
from search_e1.text.protocols import protocol_of
from search_e1.types import ActionKind, Group, Question, Trajectory, Turn

_THINK = re.compile(r"</?think>")
_TRAJECTORIES_PER_REQUEST = 4  # per concurrent request; finished chunks on disk are not requested again
_MAX_WITHOUT_CORRECT = 64  # trajectories without a correct answer after which to give up


def endpoint_of(config: EndpointConfig) -> Endpoint:
    keys = "coldstart.endpoint.url, coldstart.endpoint.model"
    return Endpoint(config.url, config.model, timeout=config.timeout, concurrency=config.concurrency, keys=keys)


def sample(
    config: EndpointConfig,
    questions: Sequence[Question],
    retriever: Retriever,
    prompts: Prompts,
    limits: RolloutConfig,
    *,
    seed: int,
    out: Path,
    progress: Progress = silent,
    checkpointer: Checkpointer | None = None,
) -> dict[str, Any]:
    """Sample a group per question from the endpoint into ``out / pool.FILE``; can be interrupted and resumed like a pool.

    Returns:
        See ``pool.sample``.

    Raises:
        ConfigError: the endpoint's URL is invalid.
        EndpointError: the endpoint fails, or never answers correctly.
        RetrievalError: from the retriever.
    """
    engine = EndpointEngine(endpoint_of(config), prompts)

    def check(sums: Mapping[str, float]) -> None:
        if sums["trajectories"] >= _MAX_WITHOUT_CORRECT and not sums["em"]:
            raise EndpointError(_never_correct(config, sums["trajectories"], sums.get("stop.malformed", 0)))

    with engine.server:
        figures = pool.sample(
            engine, retriever, questions, prompts,
            config, limits.model_copy(update={"batch_size": _TRAJECTORIES_PER_REQUEST * config.concurrency}),
            seed=seed, out=out, progress=progress, checkpointer=checkpointer, check=check,
        )  # fmt: skip
    if not figures["em"]:
        count = sum(figures["stop_reasons"].values())
        raise EndpointError(_never_correct(config, count, figures["stop_reasons"].get("malformed", 0)))
    return figures


def _never_correct(config: EndpointConfig, trajectories: float, malformed: float) -> str:
    return (
        f"{config.model} at {masked_url(config.url)}: none of {trajectories:.0f} trajectories is correct "
        f"({malformed / trajectories:.0%} malformed); name a stronger model in coldstart.endpoint, or check that the "
        "answers are in the corpus"
    )


def lessons(groups: Iterable[Group], writer: Writer, *, seed: int = 0) -> list[Lesson]:
    """A lesson for each group with a correct trajectory of searches and an answer only: the one with the fewest searches (ties:
    fewest sampled tokens, then the first). Those that exceed the limits in the policy's tokens are left out.

    Raises:
        RetrievalError: from the retriever.
    """
    rng = random.Random(seed)
    best = [(group.question, found) for group in groups if (found := _best(group))]
    writer.retrieve(turn.argument or "" for _, found in best for turn in found.turns if turn.kind is ActionKind.SEARCH)

    protocol = protocol_of(Words(), writer.prompts)

    def write(row: tuple[Question, Trajectory]) -> Trajectory | None:
        question, found = row
        clean = writer.trajectory(question, [_rewrite(turn, protocol, writer) for turn in found.turns])
        return clean if clean.correct and writer.fits(clean) else None

    questions = {question.id: question for question, _ in best}
    made = ((questions[clean.question_id], clean) for clean in writer.map(write, best))
    return [Lesson(q, clean, writer, detours(q.text, rng), seen(clean)) for q, clean in made]


def _best(group: Group) -> Trajectory | None:
    """The best trajectory of searches and an answer only: the retriever cannot reproduce the output of other tools."""
    kinds = {ActionKind.SEARCH, ActionKind.ANSWER}
    written = [t for t in group.trajectories if {turn.kind for turn in t.turns} <= kinds]
    return group.model_copy(update={"trajectories": tuple(written)}).reference


def _rewrite(turn: Turn, protocol: Protocol, writer: Writer) -> Turn:
    """A turn in the policy's format and ids; ``protocol`` is the endpoint's."""
    thought = " ".join(_THINK.sub(" ", turn.action_text[: protocol.begins(turn.action_text)]).split())
    thought, argument = (neutralize(writer.tokenizer, text, writer.prompts.protocol) for text in (thought, turn.argument or ""))
    return writer.search(thought, argument) if turn.kind is ActionKind.SEARCH else writer.answer(thought, argument)
