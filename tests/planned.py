"""A tiny model and a config to plan for."""

from transformers import AutoConfig

from search_e1.config import Config
from search_e1.lab.plan.constants import Gpu, load_constants
from search_e1.lab.plan.memory import MemoryModel
from search_e1.lab.plan.shapes import shape_of

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
