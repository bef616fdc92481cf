"""Random models in the shapes of real ones, and samples with random ids in the lengths of real trajectories."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from search_e1.lab.plan.shapes import SHAPES
from search_e1.training.objectives.grpo import advantages
from search_e1.types import Sample

LENGTHS = Path(__file__).parent / "real_lengths.json"
GROUP = 8
_PRIVILEGED = 120  # tokens of a teacher's prompt besides the reference
SMOLLM2 = dict(
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, rms_norm_eps=1e-5,
    rope_theta=100000,
)  # fmt: skip
TINY = dict(
    model_type="qwen2", vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
ALL: dict[str, dict[str, Any]] = {"smollm2-135m": SMOLLM2, "tiny": TINY, **SHAPES}
"""Name -> arguments of ``AutoConfig.for_model``."""


def config_of(shape: str) -> Any:
    """transformers' configuration, without ids that would end a text."""
    return AutoConfig.for_model(**ALL[shape], bos_token_id=None, eos_token_id=None)


def random_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    """A causal language model, with the same weights each time on one device."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype)


def samples_of(
    count: int, vocabulary: int, *, scale: float = 1.0, longest: int | None = None, taught: bool = False
) -> list[Sample]:
    """``count`` samples in groups with right and wrong trajectories. ``scale``: factor of all lengths; ``longest``: scale so
    that the longest row has this many tokens; ``taught``: add a teacher's prompt with a reference to each."""
    chooser = random.Random(0)
    lengths = json.loads(LENGTHS.read_text())["trajectories"]
    lengths = [lengths[i % len(lengths)] for i in range(count)]
    if longest:
        scale = longest / max(prompt + sum(map(sum, turns)) for prompt, turns in lengths)

    def scaled(tokens: int) -> int:
        return int(tokens * scale)

    made: list[Sample] = []
    for at in range(0, count, GROUP):
        gains = advantages([1.0, 0.0, *(float(chooser.random() < 0.5) for _ in range(GROUP - 2))])
        for i, gain in enumerate(gains[: count - at]):
            prompt, turns = lengths[at + i]
            cut = max(1, scaled(prompt))
            mask = [bit for action, seen in turns for bit in [1] * (scaled(action) or 1) + [0] * scaled(seen)]
            ids = [chooser.randrange(10, vocabulary) for _ in range(cut + len(mask))]
            reference = [chooser.randrange(10, vocabulary) for _ in range(cut + scaled(_PRIVILEGED) + len(mask))]
            made.append(
                Sample(
                    question_id=str(at),
                    prompt_ids=tuple(ids[:cut]),
                    response_ids=tuple(ids[cut:]),
                    action_mask=tuple(mask),
                    advantages=(gain,) * len(mask),
                    teacher_prompt_ids=tuple(reference) if taught else None,
                )
            )
    return made
