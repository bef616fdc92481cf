"""A language model as decoder and head: the head's logits of the decoder's states are the model's own."""

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from conftest import make_tiny_policy
from search_e1.config import LoraConfig
from search_e1.errors import ModelError
from search_e1.training.head import split_head
from search_e1.training.policy import with_adapter


def test_hidden_states_times_head_are_the_logits(tiny_policy):
    decoder, head = split_head(tiny_policy.model.eval())
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    hidden = decoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(head.logits(hidden), tiny_policy.model(input_ids=ids).logits)


SMALL = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.mark.parametrize(
    ("make", "scale", "softcap"),
    [
        (lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625)), 0.0625, None),
        (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)), 0.125, None),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5)), 1.0, 0.5),
    ],
)
def test_families_that_change_their_logits(make, scale, softcap):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data *= 5 if parameter.ndim == 2 else 1  # so that the cap bends
    decoder, head = split_head(model)
    assert (head.scale, head.softcap) == (scale, softcap)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        hidden = decoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(head.logits(hidden), model(ids).logits)


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused(tiny_policy):
    model = tiny_policy.model
    forward = model.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 3 * output.logits
        return output

    model.forward = shifted
    with pytest.raises(ModelError, match="computes its logits in an unsupported way"):
        split_head(model)


def test_an_adapter_on_the_head_is_refused():
    assert split_head(with_adapter(make_tiny_policy().model, LoraConfig(rank=2)))  # ours leave it alone
    adapted = get_peft_model(make_tiny_policy().model, PeftLoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ModelError, match=r"output head is a peft\..*; take adapters off the head \(lm_head\)"):
        split_head(adapted)
