"""Families that docs/policies.md names are loaded and sampled, take a GRPO step and a distillation step, in both protocols."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chat import call, chat_tokenizer
from conftest import PASSAGES, TinyRetriever
from search_e1.config import PolicyConfig, Prompts, RolloutConfig
from search_e1.rollout.engines.continuous import ContinuousSession
from search_e1.rollout.engines.torch import PlainEngine, TorchEngine
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import starts
from search_e1.training.policy import Policy, load
from search_e1.types import Pair, Question
from stages_run import run_distill, run_grpo
from taught import Script

FAMILIES = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "mistral": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi3": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gpt2": {"n_inner": 32},
    # Without max_position_embeddings:
    "bloom": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 1024, "expansion_ratio": 1},
    "mamba": {"state_size": 4},
}
"""Name of a family in transformers -> what its tiny model takes beside the common sizes."""
QUESTIONS = [Question(id=name, text=f"capital of {name}?", answers=("Bel",)) for name in ("Arda", "Eth")]
LIMITS = RolloutConfig(max_searches=1, topk=1, max_action_tokens=8, max_observation_tokens=130, max_tokens=900)
RIGHT = {
    "tags": ["<search>Arda</search>", "<answer>Bel</answer>"],
    "tools": [call("Arda"), "<answer>Bel</answer><|im_end|>"],
}
WRONG = {"tags": ["<answer>Fen</answer>"], "tools": ["Fen<|im_end|>"]}


def random_policy(family: str, protocol: str, directory: Path) -> Policy:
    """Made, saved in ``directory`` and loaded again."""
    tokenizer = chat_tokenizer()
    shape = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape | FAMILIES[family]))
    given = {"instruction": "Q: {question}", "correction": "\nNo.\n"}
    Policy(model, tokenizer, Prompts.model_validate({"protocol": protocol} | given)).save(directory)
    return load(directory, PolicyConfig(model=str(directory), dtype="float32", device="cpu"))


def test_the_docs_name_these_families() -> None:
    text = (Path(__file__).parent.parent / "docs" / "policies.md").read_text()
    [paragraph] = [part for part in text.split("\n\n") if part.startswith("Families tested: ")]
    assert re.findall(r"`(\w+)`", paragraph) == list(FAMILIES)


@pytest.mark.parametrize("protocol", ["tags", "tools"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_rolls_out_and_trains(family: str, protocol: str, tmp_path, monkeypatch) -> None:
    policy, retriever = random_policy(family, protocol, tmp_path / "start"), TinyRetriever(PASSAGES)
    begun = starts(policy.tokenizer, policy.prompts, QUESTIONS)
    torch.manual_seed(0)
    generator = TorchEngine(policy.model, policy.tokenizer)
    sampled: list[tuple[int, ...]] = []
    step, generate = ContinuousSession.step, PlainEngine.generate

    def recorded_step(session):
        made = step(session)
        sampled.extend(generation.ids for _, generation in made)
        return made

    def recorded_generate(engine, requests, **options):
        made = generate(engine, requests, **options)
        sampled.extend(generation.ids for generation in made)
        return made

    monkeypatch.setattr(ContinuousSession, "step", recorded_step)
    monkeypatch.setattr(PlainEngine, "generate", recorded_generate)
    done = rollout(generator, retriever, begun, LIMITS, temperature=1.0, seed=0, prompts=policy.prompts)
    assert sorted(turn.action_ids for t in done for turn in t.turns) == sorted(sampled)
    for t in done:
        with torch.no_grad():
            logits = policy.model(torch.tensor([[*t.prompt_ids, *t.response_ids]])).logits[0, len(t.prompt_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(t.response_ids)[:, None])[:, 0]
        recorded_logprobs = torch.tensor([x for turn in t.turns for x in turn.sampling_logprobs or ()])
        mask = torch.tensor(t.action_mask, dtype=torch.bool)
        torch.testing.assert_close(recorded_logprobs, logprobs[mask], atol=1e-4, rtol=0)

    [right], [wrong] = (
        rollout(Script(policy.tokenizer, [script[protocol]]), retriever, begun[:1],
                LIMITS.model_copy(update={"max_action_tokens": 100}), temperature=1.0, seed=0, prompts=policy.prompts)
        for script in (RIGHT, WRONG)
    )  # fmt: skip
    assert (right.reward, wrong.reward, right.searches) == (1.0, 0.0, 1)
    # A random policy is never right, so that its advantages are 0; what a step takes from rewards is tested with a taught one.
    settings = {"steps": 1, "questions_per_step": 2, "group_size": 2, "learning_rate": 1e-2}
    figures = run_grpo(
        policy, tmp_path / "grpo", questions=QUESTIONS, retriever=retriever, grpo=settings, rollout=LIMITS.model_dump()
    )
    assert figures["steps"] == 1

    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    pairs = [Pair(question=QUESTIONS[0], reference=right, student=student) for student in (wrong, right)]
    lora = {"rank": 2, "alpha": 4}
    figures = run_distill(policy, pairs, tmp_path / "distill", learning_rate=1e-2, batch_size=2, lora=lora)
    assert figures["positions"] == right.sampled_tokens + wrong.sampled_tokens
    assert figures["kl_first"] > 0
    assert any(not torch.equal(before[name], weight) for name, weight in policy.model.named_parameters())
    saved = json.loads((tmp_path / "distill" / "policy" / "search_e1.json").read_text())["prompts"]["protocol"]
    assert saved == protocol
