"""Engines that sample from a policy in training: the trained model itself, or vLLM with updated weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from peft.tuners.lora import LoraLayer
from torch import Tensor

from search_e1.config import Config
from search_e1.errors import ConfigError
from search_e1.rollout.engines import vllm
from search_e1.rollout.engines.base import Engine
from search_e1.rollout.engines.registry import vllm_launch
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.training.policy import context_length
from search_e1.training.trained import TrainedPolicy


class TrainingEngine(Protocol):
    """An engine over a policy that is being trained."""

    context_length: int
    reweighed: bool
    """Whether its numerics differ from the trainer's, so that the loss needs its sampling log-probabilities."""

    def updated(self) -> Any:
        """A context that yields an engine with the current weights."""
        ...


def check_training_engine(config: Config, policy: str | Path, stage: str) -> None:
    """Check that the weights of ``rollout.engine`` can be updated.

    Raises:
        ConfigError: they cannot.
    """
    engine = config.rollout.engine
    if engine == "vllm":
        vllm_launch(config, policy, config.rollout.max_tokens, shared=True)
    elif engine != "torch":
        raise ConfigError(
            f'rollout.engine = "{engine}": {stage} needs an engine that takes each step\'s weights; set "torch" or "vllm"'
        )


@contextmanager
def open_training_engine(config: Config, path: str | Path, trained: TrainedPolicy, tokenizer: Any) -> Iterator[TrainingEngine]:
    """The engine that ``rollout.engine`` names. ``path``: the policy that vLLM loads first."""
    if config.rollout.engine != "vllm":
        yield _OwnModel(trained, tokenizer, config.rollout.batch_size)
        return
    llm = vllm_launch(config, path, config.rollout.max_tokens, shared=True).start()
    try:
        yield _Vllm(llm, trained, tokenizer)
    finally:
        vllm.stop(llm)


class _OwnModel:
    reweighed = False

    def __init__(self, trained: TrainedPolicy, tokenizer: Any, rows: int) -> None:
        self.context_length = context_length(trained.model.config)
        self._trained, self._tokenizer, self._rows = trained, tokenizer, rows
        self._engine: TorchEngine | None = None
        """Kept between updates: it lowers its batch size where memory runs out."""

    @contextmanager
    def updated(self) -> Iterator[Engine]:
        with self._trained.sampled(keep=self._trained.device.type == "cuda") as model:
            if self._engine is None or self._engine.model is not model:
                self._engine = TorchEngine(model, self._tokenizer, batch_size=self._rows)
            yield self._engine


class _Vllm:
    reweighed = True

    def __init__(self, llm: Any, trained: TrainedPolicy, tokenizer: Any) -> None:
        self._llm, self._trained = llm, trained
        self._generator = vllm.VllmEngine(llm, tokenizer)
        self.context_length = self._generator.context_length

    @contextmanager
    def updated(self) -> Iterator[Engine]:
        with self._trained.sampled() as model:
            vllm.update_weights(self._llm, _plain_weights(model))
        yield self._generator


def _plain_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight, under the plain model's names, with adapters added.

    The model itself stays as it is: in bfloat16, merging an adapter and subtracting it again would not restore the base.
    """
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))
    adapted: dict[str, Any] = {f"{name}.base_layer.weight": layer for name, layer in layers}
    for name, weight in model.named_parameters():
        if "lora_" in name:
            continue
        value = weight.detach()
        if layer := adapted.get(name):
            deltas = (layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
            value = sum(deltas, value.float()).to(weight.dtype)
        yield name.replace(".base_layer", ""), value
