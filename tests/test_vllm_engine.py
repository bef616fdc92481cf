"""vLLM itself, where it is installed, on the device that its build is for. ``docs/rollouts.md`` says where it ran."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

pytest.importorskip("vllm", reason="needs search-e1[vllm]")

from chat import call, chat_tokenizer
from conftest import PASSAGES, TinyRetriever
from scripted import STOP_STRINGS, generate
from search_e1.config import PolicyConfig, Prompts, RolloutConfig, VllmConfig
from search_e1.config.prompts import ProtocolName
from search_e1.rollout.engines.base import Engine, Generation
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.rollout.engines.vllm import VllmEngine, VllmLaunch, _VLLMSession
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import starts
from search_e1.training.policy import Policy
from search_e1.types import Question, Trajectory
from taught import learn, scripted

QUESTIONS = [Question(id=name, text=f"capital of {name}?", answers=("Bel",)) for name in ("Arda", "Eth")]
LIMITS = RolloutConfig(max_searches=2, topk=1, max_action_tokens=100, max_observation_tokens=150, max_tokens=900)
HABITS: dict[ProtocolName, list[list[str]]] = {
    "tags": [["<search>Arda</search>", "<answer>Bel</answer>"], ["<search>Eth</search>", "<answer>Fen</answer>"]],
    "tools": [[call("Arda"), "<answer>Bel</answer><|im_end|>"], [call("Eth"), "Fen<|im_end|>"]],
}
END = "<|im_end|>"


@dataclass
class Made:
    """One policy on disk, in transformers and in vLLM."""

    policy: Policy
    directory: Path
    vllm: VllmEngine
    hf: TorchEngine


def under(policy: Policy, protocol: ProtocolName) -> Policy:
    given = {"instruction": "Q: {question}", "correction": "\nNo.\n", "protocol": protocol}
    return Policy(policy.model, policy.tokenizer, Prompts.model_validate(given))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    tokenizer = chat_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = under(Policy(Qwen2ForCausalLM(config), tokenizer, Prompts()), "tags")
    lines = [
        t
        for protocol, habits in HABITS.items()
        for q in QUESTIONS
        for t in scripted(under(policy, protocol), q, habits, LIMITS)
    ]
    learn(policy, lines, 120)
    directory = tmp_path_factory.mktemp("vllm") / "policy"
    policy.save(directory)
    settings = VllmConfig(engine={"enforce_eager": True}, gpu_memory_utilization=0.3)
    engine = VllmLaunch(directory, PolicyConfig(model=str(directory)), settings, rows=8, max_tokens=900)
    with engine.running(tokenizer) as generator:
        yield Made(policy, directory, generator, TorchEngine(policy.model, tokenizer))


def prompts(made: Made, protocol: ProtocolName = "tags") -> list[tuple[int, ...]]:
    policy = under(made.policy, protocol)
    return [start.prompt_ids for start in starts(policy.tokenizer, policy.prompts, QUESTIONS)]


def forward(made: Made, prompt: tuple[int, ...], ids: tuple[int, ...], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = made.policy.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_a_forward_pass(made: Made, temperature: float) -> None:
    asked = [*prompts(made), *prompts(made, "tools")] * 2
    done = generate(made.vllm, asked, max_new_tokens=40, temperature=temperature, stop=())
    for prompt, generation in zip(asked, done, strict=True):
        expected = forward(made, prompt, generation.ids, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-3, rtol=0)


def test_greedy_is_what_transformers_says(made: Made) -> None:
    for stop in ((), STOP_STRINGS, (END,)):
        asked = [*prompts(made), *prompts(made, "tools")]
        ours, theirs = (
            generate(generator, asked, max_new_tokens=60, temperature=0.0, stop=stop) for generator in (made.hf, made.vllm)
        )
        assert [g.ids for g in theirs] == [g.ids for g in ours]


def test_generations_end_with_the_token_that_completes_a_stop_string(made: Made) -> None:
    [whole, _] = generate(made.vllm, prompts(made), max_new_tokens=40, temperature=0.0, stop=())
    said = made.policy.tokenizer.decode(whole.ids)
    assert said.startswith("<search>")
    for stop in ("sea", "</search>", "rch>A"):  # every character is a token here, so that all of them straddle
        [cut, _] = generate(made.vllm, prompts(made), max_new_tokens=40, temperature=0.0, stop=(stop,))
        assert cut.ids == whole.ids[: len(cut.ids)]
        assert made.policy.tokenizer.decode(cut.ids) == said[: said.index(stop) + len(stop)]
    assert len(generate(made.vllm, prompts(made), max_new_tokens=3, temperature=0.0, stop=())[0].ids) == 3


def test_an_end_token_stays(made: Made) -> None:
    done = generate(made.vllm, prompts(made, "tools"), max_new_tokens=200, temperature=0.0, stop=())
    assert [g.ids[-1] for g in done] == [made.policy.tokenizer.eos_token_id] * 2


def test_each_row_has_its_own_seed(made: Made) -> None:
    def sample(seed: int) -> list[Generation]:
        return generate(made.vllm, prompts(made) * 4, max_new_tokens=30, temperature=1.5, stop=(), seed=seed)

    first = sample(0)
    assert sample(0) == first  # to the bit
    assert len({g.ids for g in first}) > 2
    # Row 2 of seed 0 is row 0 of seed 2, whoever it is sampled with.
    assert [g.ids for g in sample(2)][:6] == [g.ids for g in first][2:]


@pytest.mark.parametrize("protocol", ["tags", "tools"])
def test_a_whole_rollout(made: Made, protocol: ProtocolName, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[tuple[int, ...]] = []
    step = _VLLMSession.step

    def recorded(session: Any) -> list[tuple[int, Generation]]:
        finished = step(session)
        sampled.extend(generation.ids for _, generation in finished)
        return finished

    monkeypatch.setattr(_VLLMSession, "step", recorded)
    policy = under(made.policy, protocol)

    def play(generator: Engine, temperature: float) -> list[Trajectory]:
        begun = starts(policy.tokenizer, policy.prompts, QUESTIONS, group_size=4)
        return rollout(
            generator, TinyRetriever(PASSAGES), begun, LIMITS, temperature=temperature, seed=1, prompts=policy.prompts
        )

    done = play(made.vllm, 1.0)
    assert sorted(turn.action_ids for t in done for turn in t.turns) == sorted(sampled)
    assert sum(t.searches for t in done) >= 2
    assert sum(t.answer is not None for t in done) >= 2
    for t in done:
        mask = torch.tensor(t.action_mask, dtype=torch.bool)
        told = torch.tensor([x for turn in t.turns for x in turn.sampling_logprobs or ()])
        torch.testing.assert_close(told, forward(made, t.prompt_ids, t.response_ids, 1.0)[mask], atol=1e-3, rtol=0)
    assert play(made.vllm, 1.0) == done
    ours, theirs = play(made.hf, 0.0), play(made.vllm, 0.0)
    assert [t.response_ids for t in theirs] == [t.response_ids for t in ours]
    assert sum(t.searches for t in theirs) >= 1
