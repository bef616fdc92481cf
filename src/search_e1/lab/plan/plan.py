"""The plan of a run: what each stage takes on a cluster, and what will go wrong."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedConfig

from search_e1.config import Config
from search_e1.data.benchmarks import BENCHMARKS, TEST_SIZES
from search_e1.data.lines import raw_lines
from search_e1.errors import ConfigError
from search_e1.grpo import batching
from search_e1.lab.plan import lengths as lengths_
from search_e1.lab.plan.hardware import Cluster
from search_e1.lab.plan.lengths import Lengths
from search_e1.lab.plan.memory import Estimator, Memory, largest
from search_e1.lab.plan.shapes import Shape, read_config, shape_of
from search_e1.lab.plan.storage import Storage, storage
from search_e1.lab.plan.warnings import fewer_rows, setting_warnings, sharing_problem, unfit
from search_e1.lab.plan.work import Clock, Counts, Rates, Work
from search_e1.types import Record

_TRAINED_ON = 169_615  # NQ's and HotpotQA's training questions
_EVALUATED_ON = 1_000  # questions of a benchmark of one's own whose file is not here


class Plan(Record):
    """What a run takes."""

    model: str
    shape: Shape
    cluster: Cluster
    lengths: Lengths
    rates: Rates
    questions: dict[str, int]
    memory: tuple[Memory, ...]
    work: tuple[Work, ...]
    storage: tuple[Storage, ...]
    fits: bool
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """What was assumed."""

    @property
    def hours(self) -> float:
        return sum(work.hours for work in self.work)


def make_plan(
    config: Config,
    cluster: Cluster,
    *,
    lengths: Lengths | None = None,
    rates: Rates | None = None,
    passages: int | None = None,
    largest_rows: bool = True,
    progress: Callable[[str], None] = lambda stage: None,
) -> Plan:
    """What ``config`` takes on ``cluster``.

    ``lengths``: if not given, assumed. ``passages`` of the corpus: if not given, counted where there is an index or a corpus,
    else those of wiki-18. ``largest_rows``: also look for the largest micro-batches. ``progress`` is told each stage.

    Raises:
        ModelError: ``policy.model`` is not here, and no known shape.
    """
    lengths, rates = lengths or lengths_.assumed(config), rates or Rates()
    model = read_config(config.policy.model, trust_remote_code=config.policy.trust_remote_code)
    shape = shape_of(model)
    memory = memories(model, shape, config, cluster, largest_rows=largest_rows, progress=progress)
    counts, notes = _counts(config)
    sampling = next(m for m in memory if m.stage == "pool, evaluation")
    side_by_side = sampling.rows
    if cluster.engine == "vllm":
        held = lengths.total * shape.cached * 2
        side_by_side = max(1, min(rates.most_rows, int(sampling.cache / held)))
    stored, assumed = storage(config, shape, lengths, counts, passages)
    problems = [unfit(m, cluster) for m in memory]
    return Plan(
        model=config.policy.model,
        shape=shape,
        cluster=cluster,
        lengths=lengths,
        rates=rates,
        questions=counts._asdict(),
        memory=memory,
        work=tuple(Clock(shape, config, cluster, lengths, counts, rates, side_by_side).stages()),
        storage=stored,
        fits=not any(problems),
        warnings=(
            *(p for p in problems if p),
            *fewer_rows(memory, config),
            *setting_warnings(config, shape, cluster, counts),
        ),
        notes=(*notes, *assumed),
    )


def memories(
    model: PreTrainedConfig,
    shape: Shape,
    config: Config,
    cluster: Cluster,
    *,
    largest_rows: bool = True,
    progress: Callable[[str], None] = lambda stage: None,
) -> tuple[Memory, ...]:
    """Memory of each stage, in the order of the loop."""
    estimator = Estimator(model, shape, config, cluster)
    made = []

    def training(stage: str, step: Callable[[int, int], Memory], share: int, rows: int, knob: str) -> None:
        progress(stage)
        found: Memory = step(rows, share // rows)
        most = None
        if largest_rows:
            divisors = [n for n in range(1, share + 1) if share % n == 0]
            most = largest(lambda n: step(n, share // n), divisors, cluster.room)
        made.append(found.model_copy(update={"most_rows": most, "knob": knob}))

    if config.grpo.steps:
        progress("grpo sampling")
        share, rows = _shares(config, cluster)
        side_by_side = min(config.rollout.batch_size, share)
        made.append(estimator.sample("grpo sampling", rows=side_by_side, tokens=estimator.width, during="training"))
        training("grpo update", estimator.update, share, rows, "grpo.trainer.per_device_train_batch_size")
    progress("pool, evaluation")
    made.append(estimator.sample("pool, evaluation", rows=config.rollout.batch_size, tokens=estimator.width))
    if not config.distillations:
        return tuple(made)
    if config.distill.objective == "ofsd":
        progress("lead")
        longer = min(shape.context_length, estimator.width + estimator.teacher_width - estimator.width)
        made.append(estimator.sample("lead", rows=config.rollout.batch_size, tokens=longer))
    share = max(1, config.distill.batch_size // cluster.gpus)
    rows = min(config.distill.trainer.get("per_device_train_batch_size", share), share)
    training("distillation", estimator.distill, share, rows, "distill.trainer.per_device_train_batch_size")
    return tuple(made)


def _shares(config: Config, cluster: Cluster) -> tuple[int, int]:
    """Trajectories of a GRPO step on each rank, and of them in one pass; rounded up where they do not divide."""
    total = config.grpo.questions_per_step * config.grpo.group_size
    if sharing_problem(total, cluster.gpus):
        return -(-total // cluster.gpus), 1
    try:
        rows, micro_batches = batching.split(total, cluster.gpus, config.grpo.trainer)
    except ConfigError:  # told by the warnings
        return total // cluster.gpus, 1
    return rows * micro_batches, rows


def _counts(config: Config) -> tuple[Counts, list[str]]:
    """Questions of the files where they are here, else of the published sets, and what had to be assumed."""
    notes = []
    train = 0
    for path in config.data.train:
        counted = _lines(path)
        if counted is None:
            notes.append(f"{path} is not here: {_TRAINED_ON:,} training questions assumed (NQ and HotpotQA)")
            train = _TRAINED_ON
            break
        train += counted
    evaluated, missing = 0, []
    for name, path in config.data.eval.items():
        counted = _lines(path)
        if counted is None:
            missing.append(name)
            counted = TEST_SIZES.get(name, _EVALUATED_ON)
        evaluated += min(counted, config.data.max_eval or counted)
    if missing:
        own = [name for name in missing if name not in BENCHMARKS]
        notes.append(
            f"Evaluation files not here, sizes of the published test sets taken: {', '.join(missing)}"
            + (f" ({_EVALUATED_ON:,} questions for {', '.join(own)})" if own else "")
        )
    return Counts(min(train, config.data.max_train or train), evaluated), notes


def _lines(path: Path) -> int | None:
    return sum(1 for _ in raw_lines(path)) if path.is_file() else None
