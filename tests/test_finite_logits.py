"""Logits that are not finite stop sampling at once, under every way of running a transformers model."""

import random

import pytest
import torch

from scripted import generate
from search_e1.errors import ModelError
from search_e1.rollout.engines.sampling import draw
from search_e1.rollout.engines.torch import PlainEngine, TorchEngine


@pytest.mark.parametrize("kind", [TorchEngine, PlainEngine])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_first_token_of_a_broken_policy_raises(tiny_policy, kind, temperature: float) -> None:
    engine, prompt = kind(tiny_policy.model, tiny_policy.tokenizer), [1, 2, 3]
    sampled = dict(max_new_tokens=4, temperature=temperature, stop=())
    assert len(generate(engine, [prompt], **sampled)[0].ids) == 4
    with torch.no_grad():
        tiny_policy.model.model.norm.weight[3] = torch.nan
    with pytest.raises(ModelError, match=r"not finite while sampling with policy\.dtype = 'float32'; set it to bfloat16"):
        generate(engine, [prompt, prompt], **sampled)
    assert tiny_policy.model.training  # given back as it was


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_one_bad_entry_is_enough_and_minus_infinity_is_none(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[0, 1] = -torch.inf
    assert 1 not in draw(logits, temperature, [random.Random(0), random.Random(1)])[0][:1]
    logits[1, 3] = bad
    with pytest.raises(FloatingPointError):
        draw(logits, temperature, [random.Random(0), random.Random(1)])
