"""The pool: groups of trajectories that pairs are mined from."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from search_e1.config import PoolConfig, RolloutConfig
from search_e1.progress import Progress, silent
from search_e1.prompts import Prompts
from search_e1.retrieval.base import Retriever
from search_e1.rollout.generator import Generator
from search_e1.rollout.loop import rollout, starts
from search_e1.runs import read_records
from search_e1.types import Group, Question

FILE = "groups.jsonl"


def sample(
    generator: Generator,
    retriever: Retriever,
    questions: Sequence[Question],
    prompts: Prompts,
    config: PoolConfig,
    limits: RolloutConfig,
    *,
    seed: int,
    out: Path,
    progress: Progress = silent,
) -> dict[str, float]:
    """Sample a group for each question into ``out / FILE``, one JSON line each; returns EM, searches and tokens."""
    groups: list[Group] = []
    per_batch = max(1, limits.batch_size // config.group_size)
    with (out / FILE).open("w", encoding="utf-8") as file:
        for at in range(0, len(questions), per_batch):
            batch = questions[at : at + per_batch]
            trajectories = rollout(
                generator,
                retriever,
                starts(generator.tokenizer, prompts, batch, config.group_size),
                limits,
                temperature=config.temperature,
                seed=seed,
                prompts=prompts,
            )
            for i, question in enumerate(batch):
                siblings = trajectories[i * config.group_size : (i + 1) * config.group_size]
                groups.append(Group(question=question, trajectories=tuple(siblings)))
                file.write(groups[-1].model_dump_json() + "\n")
            progress(len(groups), len(questions), f"EM {_mean(groups, 'reward'):.3f}")
    return {
        "questions": len(groups),
        "em": _mean(groups, "reward"),
        "searches": _mean(groups, "searches"),
        "tokens": _mean(groups, "sampled_tokens"),
    }


def read(path: Path) -> Iterator[Group]:
    """The groups of a pool's file, one at a time: a large pool does not fit into memory. See ``runs.read_records``."""
    return read_records(path, Group, "sample the pool with `search-e1 rollout`")


def _mean(groups: Sequence[Group], attribute: str) -> float:
    values = [getattr(t, attribute) for group in groups for t in group.trajectories]
    return sum(values) / len(values)
