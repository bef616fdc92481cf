"""The doctor: whether a run can learn, whether it fits, and how long it takes, before it is started."""

import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from search_e1.config import NEW, Config, migrate_fingerprint
from search_e1.errors import ModelError
from search_e1.evaluation import preflight
from search_e1.evaluation.audit import Source, audit
from search_e1.evaluation.preflight import Finding, Level, Observed
from search_e1.lab.plan.memory import training_jobs
from search_e1.lab.plan.plan import misfits
from search_e1.rollout.sampler import RolloutSampler
from search_e1.runs.devices import device
from search_e1.runs.opening import CONFIG, opened
from search_e1.stages.coldstart import Coldstart
from search_e1.stages.grpo import sample_of
from search_e1.stages.inputs import Inputs, Watch, no_progress, subsample
from search_e1.stages.preflight import findings, of_files, train_recall
from search_e1.training import memory
from search_e1.training.batch import make_batch, micro_batches, normalized_weights
from search_e1.training.objectives import open_objective
from search_e1.training.policy import with_adapter
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Group, Question, Record

_PASSES = 3
_KEY = re.compile(r"\w+\.\w")
"""The beginning of a message that names a key, as it is written in a config."""
_MOST_PASSAGES = 2**20
"""A larger corpus is not searched for every answer, since that takes longer than everything else."""


class Diagnosis(Record):
    """The content of ``doctor --json``."""

    findings: tuple[Finding, ...]
    observed: Observed | None
    """Counts over the sampled trajectories; ``None`` if the policy cannot be loaded or is made by the cold start."""
    seconds: float

    @property
    def can_learn(self) -> bool:
        return preflight.worst(self.findings) is not Level.STOP


@dataclass(frozen=True, slots=True)
class _Sampled:
    groups: Sequence[Group]
    answers: Sequence[Group]
    """Groups of one greedy trajectory each."""
    seconds: float

    @property
    def trajectories_per_second(self) -> float:
        return sum(len(group.trajectories) for group in (*self.groups, *self.answers)) / self.seconds

    @property
    def tokens(self) -> float:
        return fmean(t.sampled_tokens for group in (*self.groups, *self.answers) for t in group.trajectories)


def examine(
    config: Config, policy: str | None = None, *, questions: int = 16, evaluated: int = 32, watch: Watch = no_progress
) -> Diagnosis:
    """Examine ``config`` with ``policy`` (by default ``policy.model``), in a temporary directory.

    Args:
        questions: number of training questions to sample a group for, as GRPO does.
        evaluated: number of evaluation questions to answer greedily, over all benchmarks.

    Raises:
        SearchE1Error: a mistake in config or data that ``train`` would also refuse, or a failed component.
    """
    begun, path = time.perf_counter(), policy or config.policy.model
    with _workplace(config) as root:
        found, seen = _examine(Inputs(config, root, watch), path, questions, evaluated)
    if config.coldstart and not policy:
        found = [_before_coldstart(finding) for finding in found]
    return Diagnosis(findings=tuple(found), observed=seen, seconds=time.perf_counter() - begun)


def _examine(run: Inputs, path: str, questions: int, evaluated: int) -> tuple[list[Finding], Observed | None]:
    config = run.config
    if config.coldstart:
        Coldstart().check(run)
    overlap = preflight.overlap(run.train_questions, run.eval_questions)
    if path == NEW:  # the cold start makes it
        return [*of_files(run, Observed(), train_recall(run, config.seed)), *_audit(run)], None
    try:
        reader = run.load_reader(path)
    except ModelError as error:
        return [_sentences("policy", Level.STOP, *str(error).split("; ", 1)), overlap, *_audit(run)], None
    run.check(path)
    loads = Finding(check="policy", level=Level.OK, text="It loads, and its prompt holds the question.")
    sampled = _sample(run, path, questions, evaluated)
    seen = preflight.observe((*sampled.groups, *sampled.answers))
    with run.watch("search for answers"):
        rows = train_recall(run, config.seed)
    per_second, fits = _train(run, path, sampled.groups)
    amounts = preflight.amounts(config, len(run.train_questions), sum(map(len, run.eval_questions.values())))
    lasts = preflight.time(amounts, sampled.trajectories_per_second, sampled.tokens, per_second)
    return [loads, *findings(run, seen, rows, path), *_audit(run, reader.tokenizer), *fits, lasts], seen


def _audit(run: Inputs, tokenizer: Any = None) -> list[Finding]:
    """The audit's findings beyond ``overlap``. A server's passages and very large corpora are not searched."""
    sources = [Source("train", "train", [("", question) for question in run.train_questions])]
    sources += [Source(name, "eval", [("", q) for q in part]) for name, part in run.eval_questions.items()]
    count, limits = run.passage_count, run.config.rollout
    texts = run.passage_texts() if count is not None and count <= _MOST_PASSAGES else None
    with run.watch("audit") as progress:
        found, _ = audit(
            sources, texts, topk=limits.topk, tokenizer=tokenizer, max_action_tokens=limits.max_action_tokens, progress=progress
        )
    near = any(total.near_leaks for total in found.totals)
    return [f for f in found.findings if f.check in ("reach", "wording", "repeats") or (f.check == "leaks" and near)]


@contextmanager
def _workplace(config: Config) -> Iterator[Path]:
    """A temporary run directory, which reuses the run's index if that exists."""
    beside = config.run.parent  # on the run's file system its index is linked, not copied
    place = beside if beside.is_dir() and os.access(beside, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".search-e1-doctor-", dir=place) as name:
        begun = config.run if (config.run / CONFIG).exists() else None
        with opened(Path(name) / "run", config.fingerprint(), migrate=migrate_fingerprint, branch_of=begun) as root:
            yield root


def _sample(run: Inputs, policy: str, questions: int, evaluated: int) -> _Sampled:
    config = run.config
    asked = subsample(run.train_questions, questions, config.seed)
    shares = [subsample(part, -(-evaluated // len(run.eval_questions)), config.seed) for part in run.eval_questions.values()]
    answered = list(islice((q for part in _in_turn(shares) for q in part), evaluated))
    total = len(asked) * config.grpo.group_size + len(answered)
    with run.engine(policy) as (engine, prompts), run.watch("sample") as progress:
        sampler = RolloutSampler(engine, run.retriever, prompts, config.rollout)
        done, clock = 0, time.perf_counter()

        def on_trajectory(*_: object) -> None:
            nonlocal done
            done += 1
            progress(done, total)

        def sample(questions: Sequence[Question], size: int, temperature: float) -> list[Group]:
            chunks = sampler.chunks(questions, size)
            made = (
                sampler.groups(chunk, size, temperature=temperature, seed=config.seed, on_trajectory=on_trajectory)
                for chunk in chunks
            )
            return [group for groups in made for group in groups]

        groups = sample(asked, config.grpo.group_size, config.grpo.temperature)
        answers = sample(answered, 1, 0.0)
        return _Sampled(groups, answers, time.perf_counter() - clock)


def _in_turn(parts: Sequence[Sequence[Question]]) -> Iterator[list[Question]]:
    """The first of each part, the second of each, ..."""
    return ([part[i] for part in parts if i < len(part)] for i in range(max(map(len, parts))))


def _before_coldstart(finding: Finding) -> Finding:
    """The finding lowered to a warning if a cold start will teach what it misses."""
    if finding.check not in ("form", "search", "groups") or finding.level is Level.OK:
        return finding
    remedy = "[coldstart] comes first: check again with --policy RUN/coldstart/policy once it exists."
    return finding.warning().model_copy(update={"remedy": remedy})


def _train(run: Inputs, policy: str, groups: Sequence[Group]) -> tuple[float | None, list[Finding]]:
    """Trajectories per second of a GRPO update, measured on ``groups``, and findings about whether training fits."""
    config = run.config
    found = [
        _sentences("memory", Level.STOP if at_all else Level.WARNING, *problem.split("; ", 1))
        for problem, at_all in misfits(config, policy, tuple(training_jobs(config)), ranks=1)
    ]
    if not config.grpo.steps or any(finding.level is Level.STOP for finding in found):
        return None, found
    try:
        with run.watch("train"):
            speed = updates_per_second(run, policy, groups)
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
        remedy = (
            "Lower grpo.training.micro_batch_tokens, set grpo.training.gradient_checkpointing, or train adapters ([grpo.lora])."
        )
        return None, [
            *found,
            Finding(check="memory", level=Level.WARNING, text="A pass of an update ran out of memory.", remedy=remedy),
        ]
    where = "this machine" if device(config.policy.device).type == "cpu" else "the GPU"
    fits = Finding(check="memory", level=Level.OK, text=f"Passes of an update fit {where}.")
    return speed, found or [fits]


def updates_per_second(run: Inputs, policy: str, groups: Sequence[Group]) -> float:
    """Trajectories of ``groups`` per second through forward and backward passes, in an update's micro-batches."""
    config = run.config.grpo
    loaded = run.load_to_train(policy, config.training, adapters=config.lora is not None)
    model = with_adapter(loaded.model, config.lora) if config.lora else loaded.model
    trained = TrainedPolicy(model, config.training, frozen_start=False, dtype=loaded.dtype)
    objective = open_objective("grpo", "grpo.objective", run.config)
    samples = [sample_of(t, 1.0) for group in groups for t in group.trajectories]
    weights = normalized_weights(samples, objective.average, lambda own: own, objective.max_tokens)
    batches = list(micro_batches(samples, trained.micro_batch_tokens, packed=trained.packed))
    trained.model.train()
    seconds = count = 0.0
    for number in range(_PASSES + 1):  # the first warms up
        chosen = batches[number % len(batches)]
        batch = make_batch([samples[i] for i in chosen], [weights[i] for i in chosen], packed=trained.packed)
        clock = time.perf_counter()
        loss, _ = trained.run(batch, objective.loss, None)
        loss.backward()
        loss.item()  # waits for the device
        if number:
            seconds, count = seconds + time.perf_counter() - clock, count + len(chosen)
    return count / seconds


def _sentences(check: str, level: Level, text: str, remedy: str = "") -> Finding:
    """A finding made from an error's message."""

    def sentence(part: str) -> str:
        first = part[:1] if _KEY.match(part) else part[:1].upper()
        return first + part[1:] + ("" if part.endswith(".") else ".") if part else ""

    return Finding(check=check, level=level, text=sentence(text), remedy=sentence(remedy))
