"""What will go wrong, or does less than it seems, and what to change."""

from collections.abc import Sequence

from search_e1.config import Config
from search_e1.errors import ConfigError
from search_e1.grpo import batching
from search_e1.lab.plan.hardware import GIB, Cluster
from search_e1.lab.plan.memory import Memory
from search_e1.lab.plan.shapes import Shape
from search_e1.lab.plan.work import Counts

_MOST_SHOWN = 8
_LOST = 1e-4  # a step of AdamW is about as large as its rate, and half a unit in the last place of 0.02 is 3e-5


def unfit(memory: Memory, cluster: Cluster) -> str | None:
    """Why a stage does not fit, and what to change; ``None`` if it does."""
    if memory.stage in ("pool, evaluation", "lead", "grpo sampling") and cluster.engine == "vllm":
        return _unfit_vllm(memory, cluster)
    if memory.total <= cluster.room:
        return None
    found = f"{memory.stage}: needs {memory.total / GIB:.1f} GiB a rank and {cluster.room / GIB:.1f} are usable"
    return f"{found}; {_mending(memory, cluster)}"


def _mending(memory: Memory, cluster: Cluster) -> str:
    sampling = memory.knob == "rollout.batch_size"
    if memory.fixed > cluster.room or memory.most_rows == 0:
        by_length = memory.fixed <= cluster.room
        ways = ["use a smaller policy or a larger GPU"]
        if by_length:
            ways = ["lower rollout.max_tokens", *ways]
            if not sampling:
                section = memory.knob.split(".")[0]
                ways.insert(0, f"set {section}.trainer.gradient_checkpointing = true")
        elif memory.optimiser > memory.weights / 10:  # else adapters are what is trained
            ways.insert(
                0, "train adapters ([grpo.lora])" if memory.stage.startswith("grpo") else 'set distill.weights = "lora"'
            )
            if cluster.gpus > 1 and cluster.sharding != "full":
                ways.insert(0, 'shard the weights (launch.sharding = "fsdp2")')
        return ", ".join(ways[:-1]) + f", or {ways[-1]}" if len(ways) > 1 else ways[0]
    if sampling:
        return f"lower rollout.batch_size = {memory.rows}"
    most = f"set it to {memory.most_rows}" if memory.most_rows else "lower it"
    section = memory.knob.split(".")[0]
    return f"{memory.knob} is {memory.rows}: {most}, or set {section}.trainer.gradient_checkpointing = true"


def _unfit_vllm(memory: Memory, cluster: Cluster) -> str | None:
    beside = memory.weights + memory.optimiser
    if memory.rows == 0:
        return (
            f"{memory.stage}: vLLM's share of {cluster.gpu_memory_utilization:g} holds its weights ({memory.others / GIB:.1f} "
            "GiB) and not one whole trajectory; raise gpu_memory_utilization, or use a larger GPU"
        )
    if memory.total > cluster.gpu.memory_gib * GIB:
        left = 1 - beside / (cluster.gpu.memory_gib * GIB) - cluster.reserve
        mend = f"lower gpu_memory_utilization to {left:.2f}" if left > 0.1 else "sample on GPUs of its own, or shard"
        return (
            f"{memory.stage}: vLLM's share of {cluster.gpu_memory_utilization:g} and {beside / GIB:.1f} GiB of training "
            f"states exceed {cluster.gpu.memory_gib:.1f} GiB; {mend}"
        )
    return None


def sharing_problem(total: int, gpus: int) -> str | None:
    """Why so many trajectories or pairs cannot be shared by ``gpus``, and which numbers can; ``None`` if they can."""
    if total % gpus == 0:
        return None
    fitting = [n for n in range(1, total + 1) if total % n == 0]
    near = sorted(sorted(fitting, key=lambda n: abs(n - gpus))[:_MOST_SHOWN])
    return f"{total} do not divide among {gpus} GPUs; {', '.join(map(str, near))} GPUs would do"


def fewer_rows(memory: Sequence[Memory], config: Config) -> list[str]:
    """Where fewer trajectories are sampled together than were asked for, since their cache does not fit."""
    return [
        f"{row.stage}: {row.rows} trajectories of {row.tokens} tokens are sampled together, not rollout.batch_size = "
        f"{config.rollout.batch_size}: their cache takes the memory"
        for row in memory
        if row.cache and row.rows < min(config.rollout.batch_size, row.asked)
    ]


def setting_warnings(config: Config, shape: Shape, cluster: Cluster, counts: Counts) -> list[str]:
    """Of settings that contradict one another, or defeat their purpose."""
    return [
        *_sharing(config, cluster),
        *_contexts(config, shape),
        *_precision(config),
        *_amounts(config, counts),
    ]


def _sharing(config: Config, cluster: Cluster) -> list[str]:
    found = []
    grpo, distill = config.grpo, config.distill
    total = grpo.questions_per_step * grpo.group_size
    if grpo.steps and (problem := sharing_problem(total, cluster.gpus)):
        found.append(f"grpo.questions_per_step x grpo.group_size: {problem}")
    elif grpo.steps:
        try:
            batching.split(total, cluster.gpus, grpo.trainer)
        except ConfigError as error:
            found.append(str(error))
    if not config.distillations:
        return found
    if problem := sharing_problem(distill.batch_size, cluster.gpus):
        found.append(f"distill.batch_size: {problem}")
    else:
        share = distill.batch_size // cluster.gpus
        rows = distill.trainer.get("per_device_train_batch_size", share)
        if share % rows:
            found.append(
                f"distill.trainer.per_device_train_batch_size = {rows} does not divide the {share} pairs of a rank; use "
                f"{max(n for n in range(1, share + 1) if share % n == 0 and n <= rows)}"
            )
    return found


def _contexts(config: Config, shape: Shape) -> list[str]:
    found = []
    limits, context = config.rollout, shape.context_length
    if limits.max_tokens > context:
        found.append(
            f"rollout.max_tokens = {limits.max_tokens} is more than the policy's context of {context}, which rules"
        )
    if config.reference.shows == "whole" and 2 * min(limits.max_tokens, context) > context:
        found.append(
            f"a reference and a student of {limits.max_tokens} tokens each do not fit the context of {context}: passages of "
            "long references are left out (reference.shorten), and what is still too long is not distilled"
        )
    return found


def _precision(config: Config) -> list[str]:
    found = []
    dtype = config.policy.dtype
    for name, active, whole, trainer in (
        ("grpo", config.grpo.steps, config.grpo.lora is None, config.grpo.trainer),
        ("distill", config.distillations, config.distill.weights == "all", config.distill.trainer),
    ):
        if not active:
            continue
        rate = config.grpo.learning_rate if name == "grpo" else config.distill.learning_rate
        if whole and dtype == "bfloat16" and rate < _LOST:
            found.append(
                f"{name} trains all weights in bfloat16, AdamW's states too: steps of {rate:g} round away against weights of "
                f'usual size; set policy.dtype = "float32" and {name}.trainer.bf16 = true, or train adapters'
            )
        if dtype == "float16":
            found.append(f'{name} trains in float16, whose small gradients are lost; set policy.dtype = "bfloat16"')
        if dtype == "float32" and not (trainer.get("bf16") or trainer.get("fp16")):
            found.append(
                f"{name} computes in float32, many times slower than bfloat16 on a GPU; set {name}.trainer.bf16 = true"
            )
    return found


def _amounts(config: Config, counts: Counts) -> list[str]:
    found = []
    if config.grpo.steps and counts.train < config.grpo.questions_per_step:
        found.append(
            f"grpo.questions_per_step = {config.grpo.questions_per_step}, but there are {counts.train} training "
            "questions; lower it"
        )
    sampled = config.distillations and config.pool.source == "fresh"
    if sampled and config.pool.questions is None and counts.train > 50_000:
        found.append(
            f"the pool samples {config.pool.group_size} trajectories for each of {counts.train:,} questions, every round; "
            "pool.questions takes fewer"
        )
    return found
