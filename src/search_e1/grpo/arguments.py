"""TRL's arguments, made of ours, and what ``[grpo.trainer]`` may hand on to them."""

import difflib
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from trl import GRPOConfig

from search_e1.config import GrpoConfig, RolloutConfig, Sharding
from search_e1.errors import ConfigError
from search_e1.grpo import batching
from search_e1.runs import ranks
from search_e1.training.sharding import dividing, settle

_ELSEWHERE = "has no effect here, sampling is not TRL's; leave it out"
RESERVED = {
    "output_dir": "is the stage's own directory; leave it out",
    "seed": "set `seed`",
    "data_seed": "set `seed`",
    "max_steps": "set `grpo.steps`",
    "num_train_epochs": "set `grpo.steps`",
    "learning_rate": "set `grpo.learning_rate`",
    "temperature": "set `grpo.temperature`",
    "num_generations": "set `grpo.group_size`",
    "generation_batch_size": "set `grpo.questions_per_step`",
    "steps_per_generation": "set `grpo.questions_per_step` and `grpo.trainer.per_device_train_batch_size`",
    "gradient_accumulation_steps": "set `grpo.questions_per_step` and `grpo.trainer.per_device_train_batch_size`",
    "max_completion_length": "set `rollout.max_tokens`",
    "use_cpu": "set `policy.device`",
    "report_to": "set `tracking.report_to`",
    "disable_tqdm": "progress is not TRL's; leave it out",
    "logging_steps": "every step is logged; leave it out",
    "logging_strategy": "every step is logged; leave it out",
    "ignore_data_skip": "a stage that goes on must not see its questions again; leave it out",
    "shuffle_dataset": "the order of questions follows from `seed`; leave it out",
    "mask_truncated_completions": "it would drop every trajectory that ends at </answer>; leave it out",
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed"), "set `launch.sharding`"),
    **dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"), _ELSEWHERE),
    **dict.fromkeys(("use_vllm", "vllm_mode"), 'set `rollout.engine = "vllm"`'),
    "vllm_gpu_memory_utilization": "set `vllm.shared_gpu_memory_utilization`",
    "vllm_max_model_length": "set `rollout.max_tokens`",
    **dict.fromkeys(("vllm_tensor_parallel_size", "vllm_enable_sleep_mode", "vllm_model_impl"), _ELSEWHERE),
    **dict.fromkeys(("use_transformers_continuous_batching", "use_transformers_paged"), _ELSEWHERE),
    **dict.fromkeys(("cache_implementation", "chat_template_kwargs"), _ELSEWHERE),
}
"""What the user sets elsewhere, or not at all: key of ``trl.GRPOConfig`` -> what to do instead."""


def trl_arguments(
    config: GrpoConfig,
    limits: RolloutConfig,
    questions: int,
    *,
    seed: int,
    out: Path,
    device: torch.device,
    sharding: Sharding = "none",
) -> GRPOConfig:
    """``config`` in TRL's terms, so that one optimiser step trains on one freshly sampled set of groups.

    Raises:
        ConfigError: names the key of ``[grpo]`` or ``[grpo.trainer]``, and how to mend it.
    """
    _check_passthrough(config.trainer)
    if config.steps and questions < config.questions_per_step:
        raise ConfigError(
            f"grpo.questions_per_step = {config.questions_per_step}, but there are {questions} training questions; lower it"
        )
    total = config.questions_per_step * config.group_size
    micro, micro_batches = batching.split(total, ranks.count(), config.trainer)
    defaults = dict(
        loss_type="grpo",  # TRL's default is "dapo"
        scale_rewards="group",
        beta=0.0,
        epsilon=0.2,
        lr_scheduler_type="constant",
        bf16=False,  # TRL's default is mixed precision, on CPUs as well; the policy's own dtype decides here
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        ddp_broadcast_buffers=False,  # nothing changes them, and ranks may make passes in different numbers
        dataloader_pin_memory=device.type != "cpu",
        # With vLLM. TRL's default masks whole sequences by the product of all their ratios, which long ones rarely survive.
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=2.0,
    )
    ours = dict(
        output_dir=str(out / "trainer"),
        seed=seed,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        temperature=config.temperature,
        num_generations=config.group_size,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=micro_batches,
        generation_batch_size=total,
        max_completion_length=limits.max_tokens,
        shuffle_dataset=False,  # `batching.order` has shuffled
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide what must stop the run
    )
    ours |= dividing(sharding, config.trainer, device)
    try:
        arguments = GRPOConfig(**{**defaults, **config.trainer, **ours})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"grpo.trainer: {str(error).splitlines()[0]}") from error
    if arguments.n_gpu > 1:
        raise ConfigError(
            f"{arguments.n_gpu} GPUs are visible to one process; set CUDA_VISIBLE_DEVICES to one of them, or start "
            "one process for each with `accelerate launch`"
        )
    settle(arguments)
    return arguments


def _check_passthrough(trainer: dict[str, Any]) -> None:
    types = typing.get_type_hints(GRPOConfig)
    known = [field.name for field in fields(GRPOConfig) if field.init and field.name not in RESERVED]
    for key, value in trainer.items():
        if key in RESERVED:
            raise ConfigError(f"grpo.trainer.{key}: {RESERVED[key]}")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "it takes the arguments of trl.GRPOConfig"
            raise ConfigError(f"unknown key grpo.trainer.{key}; {hint}")
        try:
            TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"grpo.trainer.{key} = {value!r}: {error.errors()[0]['msg']}") from error
