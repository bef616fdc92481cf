"""The trainer's arguments, made of ours, and what ``[distill.trainer]`` may hand on to them."""

from pathlib import Path

import torch
from transformers import TrainingArguments

from search_e1.config import DistillConfig, Sharding
from search_e1.errors import ConfigError
from search_e1.runs import ranks
from search_e1.training.sharding import dividing, settle

_OWN_KEYS = {  # key of TrainingArguments -> where it is set instead
    "num_train_epochs": "distill.epochs",
    "learning_rate": "distill.learning_rate",
    "gradient_accumulation_steps": "distill.batch_size and distill.trainer.per_device_train_batch_size",
    "seed": "seed",
    "output_dir": "run",
    "report_to": "tracking.report_to",
    "use_cpu": "policy.device",
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed"), "launch.sharding"),
}
_FIXED_KEYS = {
    "remove_unused_columns",
    "logging_strategy",
    "logging_steps",
    "save_strategy",
    "disable_tqdm",
    "label_names",
}
_FIXED_KEYS |= {"auto_find_batch_size", "eval_strategy", "do_eval", "load_best_model_at_end", "resume_from_checkpoint"}
_FIXED_KEYS |= {"ignore_data_skip", "restore_callback_states_from_checkpoint"}


def training_arguments(
    config: DistillConfig, *, seed: int, out: Path, device: torch.device, sharding: Sharding = "none"
) -> TrainingArguments:
    """``config`` in transformers' terms; micro-batches are told by its ``per_device_train_batch_size``.

    Raises:
        ConfigError: names the key of ``[distill]`` or ``[distill.trainer]``, and how to mend it.
    """
    for key in config.trainer:
        if key in _OWN_KEYS:
            raise ConfigError(f"distill.trainer.{key}: set by {_OWN_KEYS[key]}; take it out")
        if key in _FIXED_KEYS:
            raise ConfigError(f"distill.trainer.{key}: cannot be chosen here; take it out")
        if key not in TrainingArguments.__dataclass_fields__:
            raise ConfigError(f"distill.trainer.{key}: transformers.TrainingArguments has no such argument")
    cpu = device.type == "cpu"
    ours = dict(
        output_dir=str(out),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        gradient_accumulation_steps=_accumulation(config),
        seed=seed,
        use_cpu=cpu,
        remove_unused_columns=False,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    defaults = dict(
        per_device_train_batch_size=micro_batch(config, ranks.count()),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        train_sampling_strategy="group_by_length",
        dataloader_pin_memory=not cpu,
        report_to="none",
    )
    ours |= dividing(sharding, config.trainer, device)
    try:
        arguments = TrainingArguments(**{**defaults, **config.trainer, **ours})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"distill.trainer: {str(error).strip().splitlines()[0]}") from error
    settle(arguments)
    if arguments.n_gpu > 1:
        # DataParallel would split a batch whose positions index it whole; `accelerate launch` is the way.
        arguments._n_gpu = 1
    return arguments


def micro_batch(config: DistillConfig, processes: int) -> int:
    """Pairs of one pass of one process.

    Raises:
        ConfigError: they do not divide the batch.
    """
    size = config.trainer.get("per_device_train_batch_size", max(1, config.batch_size // processes))
    if config.batch_size % processes:
        would = [str(n) for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
        raise ConfigError(
            f"distill.batch_size = {config.batch_size} cannot be shared by {processes} processes; change it, or launch "
            f"{', '.join(would[:-1])}{' or ' if would[:-1] else ''}{would[-1]}"
        )
    if not isinstance(size, int) or size < 1 or config.batch_size % (size * processes):
        raise ConfigError(
            f"distill.trainer.per_device_train_batch_size = {size!r} on {processes} processes does not divide "
            f"distill.batch_size = {config.batch_size}; choose a divisor"
        )
    return size


def _accumulation(config: DistillConfig) -> int:
    return config.batch_size // (micro_batch(config, ranks.count()) * ranks.count())
