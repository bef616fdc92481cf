"""A tiny model and a config to plan for, and traces of deep models by few of their layers."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from search_e1.config import Config, LoraConfig
from search_e1.lab.plan.constants import Gpu, load_constants
from search_e1.lab.plan.memory import MemoryModel
from search_e1.lab.plan.shapes import shape_of
from search_e1.lab.plan.trace import Activations, TracedModel

TINY = dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096,
)  # fmt: skip
CONSTANTS = load_constants()
H100 = CONSTANTS.gpus["h100-80gb"]


def tiny(**changes: object):
    return AutoConfig.for_model("qwen2", **{**TINY, "tie_word_embeddings": True, **changes})


def a_config(**sections: object) -> Config:
    base = {
        "run": "unused",
        "policy": {"model": "small"},
        "data": {"corpus": "none.jsonl", "train": ["none.jsonl"], "eval": {"nq": "none.jsonl"}},
    }
    return Config.model_validate({**base, **sections})


def memory_model(config: Config, gpus: int = 1, gpu: Gpu = H100) -> MemoryModel:
    return MemoryModel(tiny(), shape_of(tiny()), config, gpu, gpus, CONSTANTS)


class FewLayers:
    """A ``TracedModel`` of layers that are alike: two and three of them are traced, and each further one adds as much.

    A trace of 28 layers takes four seconds.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, lora: LoraConfig | None, recompute: bool) -> None:
        self.layers = config.num_hidden_layers
        self.few = [TracedModel(_with_layers(config, count), dtype, lora, recompute) for count in (2, 3)]
        self.weights = self._all([model.weights for model in self.few])
        self.trained = self._all([model.trained for model in self.few])

    def train(self, rows: int, width: int, **how: bool) -> Activations:
        passes = [model.train(rows, width, **how) for model in self.few]
        return Activations(*(self._all(bytes) for bytes in zip(*passes, strict=True)))

    def forward(self, rows: int, width: int) -> int:
        return self._all([model.forward(rows, width) for model in self.few])

    def _all(self, bytes: Sequence[int]) -> int:
        two, three = bytes
        return two + (self.layers - 2) * (three - two)


def _with_layers(config: PreTrainedConfig, count: int) -> Any:
    few = copy.deepcopy(config)
    few.num_hidden_layers, few.layer_types = count, few.layer_types[:count]
    return few
