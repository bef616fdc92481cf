"""The pool: groups of trajectories that pairs are mined from."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from search_e1.config import EndpointConfig, PoolConfig, Prompts, RolloutConfig
from search_e1.errors import DataError
from search_e1.retrieval.base import Retriever
from search_e1.rollout.engines.base import Engine
from search_e1.rollout.loop import Spent
from search_e1.rollout.progress import RolloutProgress
from search_e1.rollout.sampler import PARTS, RolloutSampler, tally, warn_of_empty_searches
from search_e1.rollout.sharing import Part, write_parts
from search_e1.runs import ranks, read_records
from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.progress import Progress, silent
from search_e1.types import Group, Question

FILE = "groups.jsonl"


def sample(
    engine: Engine,
    retriever: Retriever,
    questions: Sequence[Question],
    prompts: Prompts,
    config: PoolConfig | EndpointConfig,
    limits: RolloutConfig,
    *,
    seed: int,
    out: Path,
    progress: Progress = silent,
    checkpointer: Checkpointer | None = None,
    check: Callable[[Mapping[str, float]], None] = lambda sums: None,
) -> dict[str, Any]:
    """Sample a group for each question into ``out / FILE``, one JSON line per group, written chunk by chunk.

    ``check`` is called before each chunk with the sums of ``sampler.tally`` so far, and raises if continuing is useless.

    With the same arguments and the ``checkpointer`` of an interrupted call, complete chunks are kept and the rest is sampled.

    Returns:
        questions; means over the trajectories of EM (``em``), searches and sampled tokens; ``stop_reasons`` with the number of
        trajectories for each; ``seconds`` of sampling, of waiting for the retriever, and of the rest; trajectories and sampled
        tokens per second, over all attempts.

    Raises:
        Stopped: a signal requested a stop; the current chunk is finished and on disk.
        RetrievalError: from the retriever.
    """
    checkpointer = checkpointer or Checkpointer()
    sampler, size = RolloutSampler(engine, retriever, prompts, limits, checkpointer), config.group_size
    reporter = RolloutProgress(progress, len(questions) * size, "sampled EM", detailed=True)

    def make(chunk: Sequence[Question], before: Mapping[str, float]) -> tuple[Iterator[str], Mapping[str, float]]:
        check(before)
        spent = Spent()
        report, temperature = reporter.after(before), config.temperature
        groups = sampler.groups(chunk, size, temperature=temperature, seed=seed, on_trajectory=report, spent=spent)
        sums = tally((t for group in groups for t in group.trajectories), spent)
        return (group.model_dump_json() for group in groups), sums

    [sums] = write_parts(checkpointer, [Part(out / FILE, list(sampler.chunks(questions, size)), make)])
    if ranks.is_first():
        warn_of_empty_searches(sums["empty"], sums["searches"])
    return {"questions": len(questions), **figures(sums)}


def figures(sums: Mapping[str, float]) -> dict[str, Any]:
    """The result figures from ``sums`` of ``sampler.tally``."""
    count, seconds = sums["trajectories"], sum(sums[f"seconds.{part}"] for part in PARTS)
    return {
        **_means(sums),
        "seconds": {part: round(sums[f"seconds.{part}"], 3) for part in PARTS},
        "trajectories_per_second": round(count / seconds, 3),
        "tokens_per_second": round(sums["tokens"] / seconds, 1),
    }


def _means(sums: Mapping[str, float]) -> dict[str, Any]:
    reasons = ((name.removeprefix("stop."), n) for name, n in sorted(sums.items()) if name.startswith("stop."))
    means = {name: sums[name] / sums["trajectories"] for name in ("em", "searches", "tokens")}
    return {**means, "stop_reasons": {name: int(n) for name, n in reasons}}


def take(source: Path, out: Path, most: int | None) -> dict[str, Any]:
    """Copy the first ``most`` groups (default: all) of the pool file ``source`` to ``out / FILE``.

    Returns:
        questions; means over the trajectories of EM (``em``), searches and sampled tokens; ``stop_reasons``.

    Raises:
        DataError: the file cannot be read, or has no groups.
    """
    sums: Counter[str] = Counter()
    questions = 0
    with (out / FILE).open("w", encoding="utf-8") as file:
        for group in islice(read(source), most):
            file.write(group.model_dump_json() + "\n")
            sums.update(tally(group.trajectories, Spent()))
            questions += 1
    if not questions:
        raise DataError(f"{source}: no groups in it; give a policy that GRPO has trained with grpo.keep_groups = true")
    return {"questions": questions, **_means(sums)}


def read(path: Path) -> Iterator[Group]:
    """The groups of a pool file, one at a time: a large pool does not fit into memory. See ``runs.read_records``."""
    return read_records(path, Group, "sample the pool with `search-e1 rollout`")
