"""The plan of a run, and the memory check when one starts."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from search_e1.config import Config
from search_e1.data.benchmarks import TEST_SIZES
from search_e1.data.lines import raw_lines
from search_e1.errors import ConfigError, ModelError
from search_e1.lab.plan.constants import GIB, Constants, Gpu, Measured, load_constants
from search_e1.lab.plan.memory import Memory, MemoryModel, training_jobs
from search_e1.lab.plan.shapes import Shape, read_config, shape_of
from search_e1.lab.plan.work import Work, WorkModel
from search_e1.runs.devices import device
from search_e1.types import Record

logger = logging.getLogger(__name__)
_ROUNDED_AWAY = 1e-4  # AdamW's steps are about as large as its learning rate; half a bfloat16 ulp of a weight of 0.02 is 3e-5


class Plan(Record):
    """The requirements of a run."""

    model: str
    shape: Shape
    gpu: Gpu
    gpus: int
    usable: int  # bytes per GPU
    memory: tuple[Memory, ...]
    work: tuple[Work, ...]
    disk: dict[str, int]  # bytes in the run directory, by kind, without an index
    problems: tuple[str, ...]  # stages that do not fit, and what to change
    warnings: tuple[str, ...]  # settings that defeat their purpose
    assumed: tuple[str, ...]
    measured: Measured | None = None  # measurements behind the hours; None if they rest on assumptions

    @property
    def hours(self) -> float:
        return sum(work.hours for work in self.work)


def make_plan(config: Config, gpu: Gpu, gpus: int, constants: Constants) -> Plan:
    """The plan of ``config`` on ``gpus`` GPUs.

    Raises:
        ModelError: ``policy.model`` is neither on this machine nor a known shape.
    """
    model = read_config(config.policy.model, trust_remote_code=config.policy.trust_remote_code)
    shape = shape_of(model)
    memory_model = MemoryModel(model, shape, config, gpu, gpus, constants)
    memory = stage_memory(memory_model)
    sampling = next(m for m in memory if m.stage == "pool, eval.")
    train, evaluated, assumed = _questions(config, constants)
    recomputed = {m.stage.removesuffix(": update") for m in memory if m.recompute}
    work_model = WorkModel(shape, config, gpu, gpus, constants, sampling.rows, recomputed)
    work = work_model.stages(train, evaluated)
    kept = [memory_model.dtype, *(torch.float32 for job in training_jobs(config).values() if job.training.master_weights)]
    size, policies = max(dtype.itemsize for dtype in kept) * shape.parameters, config.distillations
    policies += bool(config.coldstart) + (config.rounds if config.grpo.steps else 0)
    stored = sum(w.trajectories for w in work if w.stage in ("pool", "evaluation")) * work_model.total
    disk = {"policies": policies * size, "trajectories": round(stored * constants.data["bytes_per_token"])}
    if any(not job.lora for job in training_jobs(config).values()):
        disk["checkpoints"] = 2 * 3 * size  # two checkpoints, each with weights and AdamW's two states
    return Plan(
        model=config.policy.model, shape=shape, gpu=gpu, gpus=gpus, usable=memory_model.usable, memory=memory,
        work=tuple(work), disk=disk, problems=tuple(filter(None, (misfit(memory_model, m) for m in memory))),
        warnings=tuple(_warnings(config)), assumed=tuple(assumed), measured=constants.measured,
    )  # fmt: skip


def stage_memory(model: MemoryModel) -> tuple[Memory, ...]:
    """The memory of each stage, in loop order."""
    config, rows, jobs = model.config, model.config.rollout.batch_size, training_jobs(model.config)
    updates = {stage: model.update(stage, job) for stage, job in jobs.items()}
    stages = [model.sample("pool, eval.", rows, model.longest)]
    if "grpo" in jobs:
        own = -(-config.grpo.questions_per_step * config.grpo.group_size // model.gpus)
        sampling = model.sample("grpo: sample", min(rows, own), model.longest, during=jobs["grpo"])
        stages = [sampling, updates["grpo"], *stages]
    if "coldstart" in jobs:
        stages = [updates["coldstart"], *stages]
    if "distill" in jobs:
        stages += [model.sample("lead", rows, model.longest_privileged)] if jobs["distill"].has_teacher else []
        stages.append(updates["distill"])
    return tuple(stages)


def misfit(model: MemoryModel, memory: Memory) -> str | None:
    """Why a stage does not fit, and what to change; ``None`` if it does."""
    stage, _, kind = memory.stage.partition(": ")
    by_vllm = kind != "update" and model.config.rollout.engine == "vllm"
    limit = model.size if by_vllm and not memory.optimizer else model.usable
    if memory.rows and memory.total <= limit:
        return None
    ways = ["use a smaller policy or larger GPUs"]
    trained = memory.weights + memory.gradients + memory.optimizer
    if (trained if by_vllm else memory.fixed) > limit:
        if memory.optimizer > memory.weights / 10:  # all weights are trained
            ways.insert(0, 'set distill.weights = "lora"' if stage == "distill" else f"train adapters ([{stage}.lora])")
        if model.gpus > 1 and not model.sharded:
            ways.insert(0, 'set parallel.sharding = "fsdp2"')
    elif by_vllm:
        ways = ["change [vllm] gpu_memory_utilization"]
    elif kind == "update":
        job = training_jobs(model.config)[stage]
        width = model.longest_privileged if job.has_teacher else model.longest
        fewer = ((memory.rows >> halvings) * width for halvings in range(1, memory.rows.bit_length()))
        fitting = next((tokens for tokens in fewer if model.update(stage, job, tokens).total <= limit), None)
        recompute = f"set {stage}.training.gradient_checkpointing = true"
        shorter = "lower rollout.max_tokens" if job.training.gradient_checkpointing else recompute
        ways = [f"set {stage}.training.micro_batch_tokens = {fitting}" if fitting else shorter]
    else:
        ways.insert(0, "lower rollout.batch_size")
    needs = f"needs {memory.total / GIB:.1f} GiB per GPU, but {limit / GIB:.1f} are usable"
    if memory.total <= limit:
        needs = f"no trajectory of {memory.tokens} tokens fits vLLM's cache"
    return f"{memory.stage}: {needs}; {', or '.join(ways)}"


def check_memory(config: Config, model: str, stages: Sequence[str], ranks: int, size: int | None = None) -> None:
    """Refuse, before any work, what cannot fit this machine's GPU; warn if only short trajectories fit.

    Raises:
        ConfigError: weights, gradients and optimizer states alone exceed the GPU's memory; the message says what to change.
    """
    for problem, at_all in misfits(config, model, stages, ranks, size):
        if at_all:
            raise ConfigError(problem)
        logger.warning("with the longest trajectories, %s", problem)


def misfits(
    config: Config, model: str, stages: Sequence[str], ranks: int, size: int | None = None
) -> Iterator[tuple[str, bool]]:
    """Why stages do not fit this machine's GPU and what to change, and whether not even short trajectories fit.

    ``model``: the policy that ``stages`` (see ``training_jobs``) start from; if its shape is unknown, nothing is checked.
    ``size``: bytes of the GPU, by default this machine's. Empty on a CPU.
    """
    place = device(config.policy.device)
    if size is None and place.type != "cuda":
        return
    size = size or torch.cuda.get_device_properties(place).total_memory
    try:
        settings = read_config(model, trust_remote_code=config.policy.trust_remote_code)
    except ModelError:
        return
    gpu = Gpu(name="this GPU", memory_gib=size / GIB)
    planner = MemoryModel(settings, shape_of(settings), config, gpu, ranks, load_constants())
    for stage, job in training_jobs(config).items():
        problem = misfit(planner, memory := planner.update(stage, job)) if stage in stages else None
        if problem and memory.total > size:
            yield problem, memory.fixed > size


def _warnings(config: Config) -> Iterator[str]:
    dtype = config.policy.dtype
    for stage, job in training_jobs(config).items():
        rate = getattr(config, stage).learning_rate
        if dtype != "float32" and not job.training.master_weights and not job.lora and rate < _ROUNDED_AWAY:
            yield (
                f"{stage} trains all weights in {dtype}, where steps of {rate:g} are lost to rounding; set "
                f"{stage}.training.master_weights = true, or train adapters"
            )
    if dtype == "float32":
        yield 'float32 matrix products are many times slower than in bfloat16 on a GPU; set policy.dtype = "auto"'


def _questions(config: Config, constants: Constants) -> tuple[int, int, list[str]]:
    """Numbers of training and evaluation questions, counted if the files exist, and the assumptions made otherwise."""
    counts = [_lines(path) for path in config.data.train]
    train = constants.data["train_questions"] if None in counts else sum(filter(None, counts))
    assumed = [f"{train:,} training questions"] if None in counts else []
    evaluated = 0
    for name, path in config.data.eval.items():
        if (count := _lines(path)) is None:
            count = TEST_SIZES.get(name, constants.data["eval_questions"])
            assumed.append(f"{count:,} of {name}")
        evaluated += min(count, config.data.max_eval or count)
    return min(train, config.data.max_train or train), evaluated, assumed


def _lines(path: Path) -> int | None:
    return sum(1 for _ in raw_lines(path)) if path.is_file() else None
