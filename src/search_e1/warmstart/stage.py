"""The warm start as a stage: from questions with supporting passages to a policy that knows the protocol."""

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search_e1.config import Config, Prompts, WarmstartConfig
from search_e1.data.corpus import read_corpus
from search_e1.errors import ConfigError
from search_e1.retrieval.base import Retriever
from search_e1.rollout import demonstrations
from search_e1.runs.checkpoints import Work
from search_e1.runs.progress import Progress, Track, silent, untracked
from search_e1.training import fresh
from search_e1.types import Passage, Question
from search_e1.warmstart.trainer import train

_LAST = 20  # steps whose mean loss is reported


def warm_start(
    questions: Sequence[Question],
    retriever: Retriever,
    config: Config,
    *,
    out: Path,
    progress: Progress = silent,
    track: Track = untracked,
    work: Work | None = None,
) -> dict[str, Any]:
    """Make a policy from nothing, teach it by demonstrations, and save it in ``out / "policy"``; see ``train`` for ``work``.

    Returns how many questions gave a demonstration, by the part of their id before ``_``, the number of weights, and the loss
    (nats) at the start and at the end, and how often a pass was halved because memory ran out.

    Raises:
        ConfigError: the configuration lacks the warm start's section or the corpus.
        DataError: no question gives a demonstration, or one names a passage that the corpus lacks.
        TrainingError: the loss is not finite.
    """
    warmstart, corpus = config.warmstart, config.data.corpus
    if warmstart is None:
        raise ConfigError("section [warmstart] is missing; add it, it may be empty")
    if corpus is None:
        raise ConfigError("data.corpus is missing; a warm start reads the supporting passages there")
    passages = {passage.id: passage for passage in read_corpus(corpus)}
    prompts = config.prompts or Prompts()
    if prompts.protocol != "tags":
        raise ConfigError(
            'prompts.protocol = "tools": the demonstrations of a warm start are written in tags; leave it out'
        )
    policy = fresh.policy(_texts(questions, passages, prompts, warmstart, config.seed), warmstart, prompts, config.seed)
    taught = demonstrations.lessons(
        questions, passages, retriever, policy.tokenizer, prompts, config.rollout, seed=config.seed, progress=progress
    )
    halved = 0

    def tracked(step: int, figures: Mapping[str, float]) -> None:
        nonlocal halved
        halved += int(figures.get("halved", 0))
        track(step, figures)

    losses = train(
        policy,
        demonstrations.batches(taught, policy.tokenizer, prompts, warmstart, config.rollout, seed=config.seed),
        steps=warmstart.steps,
        learning_rate=warmstart.learning_rate,
        seed=config.seed,
        progress=progress,
        track=tracked,
        work=work,
    )
    policy.save(out / "policy")
    last = losses[-_LAST:]
    return {
        "questions": len(questions),
        "taught": dict(Counter(lesson.question.id.rpartition("_")[0] for lesson in taught)),
        "parameters": policy.model.num_parameters(),
        "first_loss": losses[0],
        "last_loss": sum(last) / len(last),
        "halved": halved,
    }


def _texts(
    questions: Sequence[Question], passages: dict[str, Passage], prompts: Prompts, config: WarmstartConfig, seed: int
) -> list[str]:
    """What the tokenizer is trained on: questions, a sample of the passages, and the words around them."""
    sample = random.Random(seed).sample(list(passages), min(config.tokenizer_passages, len(passages)))
    said = (
        "I need to find",
        "So the answer is",
        "I will search for the question.",
        "Doc 1(Title: ",
        "user\n",
        "assistant\n",
    )
    framed = (prompts.instruction, prompts.privileged, prompts.correction, *said)
    return [
        *itertools.chain.from_iterable(itertools.repeat(text, 50) for text in framed),
        *(question.text for question in questions),
        *(f"{passages[id].title}\n{passages[id].text}" for id in sample),
    ]
