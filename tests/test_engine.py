"""What a row samples is its own: whoever it is sampled with, in whatever order, from whatever the cache still holds."""

import random
import threading
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from chat import chat_tokenizer
from conftest import PASSAGES, TinyRetriever, byte_tokenizer
from scripted import STOP_STRINGS, generate
from search_e1.config import Prompts, RolloutConfig
from search_e1.errors import ConfigError, ModelError
from search_e1.rollout.engines import continuous
from search_e1.rollout.engines import torch as hf
from search_e1.rollout.engines.base import Generation, Request
from search_e1.rollout.engines.continuous import ContinuousSession
from search_e1.rollout.engines.registry import check_engine, open_engine
from search_e1.rollout.engines.sampling import Ends, draw
from search_e1.rollout.engines.torch import PlainEngine, TorchEngine
from search_e1.rollout.loop import Spent, rollout
from search_e1.rollout.starts import starts
from search_e1.training.policy import Policy
from search_e1.types import Question, Trajectory
from trained import config_of

PROMPTS = Prompts(instruction="Answer this after searching. Question: {question}\n", correction="\nNo.\n")
QUESTIONS = [Question(id=name, text=f"{name}?" * (1 + i), answers=("Bel",)) for i, name in enumerate(("Arda", "x", "Fen"))]
LIMITS = RolloutConfig(max_searches=2, topk=1, max_action_tokens=10, max_observation_tokens=60, max_tokens=400)
SHAPE = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
FAMILIES = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "mistral": {"sliding_window": 9},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 9, "attn_implementation": "eager"},
    "gemma3_text": {"head_dim": 8, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def random_policy(family: str, **shape) -> Policy:
    tokenizer = chat_tokenizer()
    given = SHAPE | FAMILIES.get(family, {}) | shape
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3, **given,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Policy(AutoModelForCausalLM.from_config(config), tokenizer, PROMPTS)


def play(policy: Policy, generator, temperature: float, seed: int = 0, retriever=None, **kwargs) -> list[Trajectory]:
    begun = starts(policy.tokenizer, policy.prompts, QUESTIONS, 2)
    order = kwargs.pop("order", range(len(begun)))
    retriever = retriever or TinyRetriever(PASSAGES)
    done = rollout(
        generator, retriever, [begun[i] for i in order], LIMITS, temperature=temperature, seed=seed,
        prompts=policy.prompts, **kwargs,
    )  # fmt: skip
    return [done[list(order).index(i)] for i in range(len(begun))]


def ids(done: Sequence[Trajectory]) -> list[list[tuple[int, ...]]]:
    return [[turn.action_ids for turn in t.turns] for t in done]


@pytest.mark.parametrize(("family", "temperature"), [*((family, 1.0) for family in FAMILIES), ("qwen2", 0.0), ("lfm2", 0.0)])
def test_a_family_samples_the_same_in_any_company(family: str, temperature: float) -> None:
    policy = random_policy(family)
    model, tokenizer = policy.model, policy.tokenizer
    assert hf._bytes_per_position(model), "its rows can come and go"
    # Seed 1: with 0, one number of 4,000 falls between two ids' shares of the distribution, where rounding decides.
    expected = play(policy, PlainEngine(model, tokenizer, batch_size=1), temperature, seed=1)
    assert sum(len(t.turns) for t in expected) > 1.5 * len(expected)
    shuffled = random.Random(0).sample(range(len(expected)), len(expected))
    for generator, order in (
        (PlainEngine(model, tokenizer), range(len(expected))),
        (TorchEngine(model, tokenizer, batch_size=4), shuffled),
        (TorchEngine(model, tokenizer), range(len(expected))),
    ):
        done = play(policy, generator, temperature, seed=1, order=order)
        assert ids(done) == ids(expected)
        for a, b in zip(done, expected, strict=True):
            for one, other in zip(a.turns, b.turns, strict=True):
                assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-4)


def test_a_model_with_a_recurrent_state_is_sampled_in_whole_batches() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "expand": 2, "time_step_rank": 4}
    policy = random_policy("mamba", **shape)
    policy.model.config.max_position_embeddings = 512
    assert hf._bytes_per_position(policy.model) is None
    expected = play(policy, PlainEngine(policy.model, policy.tokenizer), 1.0)
    assert ids(play(policy, TorchEngine(policy.model, policy.tokenizer), 1.0)) == ids(expected)


def test_siblings_differ_and_seeds_count() -> None:
    policy = random_policy("qwen2")
    generator = TorchEngine(policy.model, policy.tokenizer)
    first = play(policy, generator, 1.0)
    assert len({str(t) for t in ids(first)}) == len(first)
    assert play(policy, generator, 1.0) == first
    assert ids(play(policy, generator, 1.0, seed=1)) != ids(first)
    state = torch.random.get_rng_state()
    play(policy, generator, 1.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_each_row_has_its_own_limit() -> None:
    policy = random_policy("qwen2")
    prompt = policy.tokenizer.encode("Who?")
    for generator in (TorchEngine(policy.model, policy.tokenizer), PlainEngine(policy.model, policy.tokenizer)):
        done = {}
        with generator.session(temperature=0.0, stop=(), max_tokens=100) as session:
            for key, most in enumerate((3, 6, 1)):
                session.submit(Request(key, prompt, most, 0))
            while len(done) < 3:
                done |= dict(session.step())
        assert [len(done[key].ids) for key in range(3)] == [3, 6, 1]
        assert done[1].ids[:3] == done[0].ids


@pytest.mark.parametrize("stop", [("e",), ("\u00e9",)], ids=["many tokens may end it", "any token may"])
def test_tokens_that_may_end_a_row_and_do_not_change_nothing(stop: tuple[str, ...]) -> None:
    policy = random_policy("qwen2")
    prompts = [policy.tokenizer.encode(text) for text in ("Who?", "W", "Where is it?")]
    plain, ours = (
        generate(make(policy.model, policy.tokenizer), prompts, max_new_tokens=12, temperature=1.0, stop=stop, seed=3)
        for make in (PlainEngine, TorchEngine)
    )
    assert [done.ids for done in ours] == [done.ids for done in plain]
    for one, other in zip(ours, plain, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert len(one.logprobs or ()) == len(one.ids)


def test_earlier_turns_and_common_prompts_are_computed_once(monkeypatch) -> None:
    """Of all tokens of a trajectory each goes through the model once; of the common instruction once for all."""
    policy = random_policy("qwen2")
    seen = 0
    forward = policy.model.forward

    def counting(*args, input_ids, **kwargs):
        nonlocal seen
        seen += int(kwargs["position_ids"].numel())
        return forward(*args, input_ids=input_ids, **kwargs)

    play(policy, TorchEngine(policy.model, policy.tokenizer), 1.0)  # the trial is behind it
    monkeypatch.setattr(policy.model, "forward", counting)
    done = play(policy, TorchEngine(policy.model, policy.tokenizer, batch_size=64), 1.0)
    prefix = len(policy.tokenizer.encode(PROMPTS.instruction.split("{")[0]))
    prompts = prefix + sum(len(done[i].prompt_ids) - prefix for i in (0, 2, 4))
    responses = sum(len(t.response_ids) for t in done)
    padding = 0.4 * responses  # observations of one moment are padded to the longest
    assert prompts + responses - 3 * len(done) <= seen <= prompts + responses + padding
    whole = sum(
        len(t.prompt_ids) + sum(len(u.action_ids) + len(u.observation_ids) for u in t.turns[:n])
        for t in done
        for n in range(len(t.turns))
    )
    assert seen < whole / 2


class _Crowded:
    """A forward pass that runs out of memory with more than ``rows`` rows."""

    def __init__(self, forward, rows: int) -> None:
        self.forward, self.rows, self.failed = forward, rows, 0

    def __call__(self, *args, input_ids, **kwargs):
        if len(input_ids) > self.rows:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.forward(*args, input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_that_memory_does_not_hold_is_halved_and_nothing_else_changes(temperature: float, monkeypatch) -> None:
    policy = random_policy("lfm2")
    generator = TorchEngine(policy.model, policy.tokenizer, batch_size=6)
    expected = play(policy, generator, temperature)
    crowded = _Crowded(policy.model.forward, 2)
    monkeypatch.setattr(policy.model, "forward", crowded)
    with pytest.warns(UserWarning, match="3 trajectories are sampled together instead of 6; lower rollout.batch_size"):
        assert ids(play(policy, generator, temperature)) == ids(expected)
    assert (crowded.failed, generator.batch_size) == (2, 1)
    assert ids(play(policy, generator, temperature)) == ids(expected)
    assert crowded.failed == 2
    crowded.rows = 0
    with pytest.raises(ModelError, match="not even one trajectory fits into memory"):
        play(policy, generator, temperature)


def test_no_more_rows_than_memory_holds(monkeypatch) -> None:
    policy = random_policy("qwen2")
    size = hf._bytes_per_position(policy.model)
    assert size == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    monkeypatch.setattr(hf, "_free_memory", lambda device: 10 * size * LIMITS.max_tokens)
    generator = TorchEngine(policy.model, policy.tokenizer, batch_size=64)
    with generator.session(temperature=0.0, stop=(), max_tokens=LIMITS.max_tokens) as session:
        assert isinstance(session, ContinuousSession)
        assert session.rows == 5  # 0.6 of them, less the one that holds the common prompt


# The retriever.


def test_others_are_sampled_while_the_retriever_works() -> None:
    """A retriever that answers only once others have gone on would wait for ever if they waited for it."""
    tokenizer, gone_on = chat_tokenizer(), threading.Event()
    said = {(0, 1): "<search>Arda</search>", (1, 6): "<answer>x</answer>", (0, 6): "<answer>Bel</answer>"}

    class Stepping:
        admission_interval, steps = 4, 0

        def __init__(self) -> None:
            self.waiting: set[int] = set()

        def submit(self, request):
            self.waiting.add(request.key)

        def release(self, key):
            pass

        def step(self):
            self.steps += 1
            if self.steps == 3:
                gone_on.set()
            done = [key for key in self.waiting if (key, self.steps) in said]
            self.waiting -= set(done)
            return [(key, Generation(tuple(tokenizer.encode(said[key, self.steps])))) for key in done]

    class Steps:
        context_length = 1000

        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def session(self, **_):
            return nullcontext(Stepping())

    class Slow(TinyRetriever):
        def search(self, queries, topk):
            assert gone_on.wait(60), "nobody went on"
            return super().search(queries, topk)

    begun = starts(tokenizer, PROMPTS, QUESTIONS[:2])
    done = rollout(Steps(), Slow(PASSAGES), begun, LIMITS, temperature=1.0, seed=0, prompts=PROMPTS)
    assert [t.answer for t in done] == ["Bel", "x"]
    assert done[0].turns[0].passage_ids == ("p1",)


def test_when_the_retriever_answers_changes_nothing() -> None:
    policy = random_policy("qwen2")
    pauses = random.Random(0)

    class Late(TinyRetriever):
        def search(self, queries, topk):
            threading.Event().wait(pauses.random() / 100)
            return super().search(queries, topk)

    generator = TorchEngine(policy.model, policy.tokenizer)
    first = play(policy, generator, 1.0, retriever=Late(PASSAGES))
    assert play(policy, generator, 1.0, retriever=Late(PASSAGES)) == first  # log-probabilities to the bit


def test_time_is_told_apart() -> None:
    policy, spent = random_policy("qwen2"), Spent()
    play(policy, TorchEngine(policy.model, policy.tokenizer), 1.0, spent=spent)
    first = spent.sampling
    assert first > spent.rest > 0
    assert spent.retrieval >= 0
    play(policy, TorchEngine(policy.model, policy.tokenizer), 1.0, spent=spent)
    assert spent.sampling > first


# Drawing and ending.


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_ids_are_drawn_with_their_probabilities(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    expected = torch.softmax(logits / temperature, -1)
    n = 4000
    drawn, logprobs = draw(logits.expand(n, -1), temperature, [random.Random(seed) for seed in range(n)])
    counts = torch.bincount(torch.tensor(drawn), minlength=5).double()
    chi2 = float(((counts - n * expected)[:4] ** 2 / (n * expected[:4])).sum())
    assert chi2 < 16.3  # three degrees of freedom, p = 0.001
    assert counts[4] == 0
    assert logprobs == pytest.approx(expected.log()[drawn].tolist(), abs=1e-6)


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    together, _ = draw(logits, 1.0, [random.Random(i) for i in range(6)])
    assert [draw(logits[i : i + 1], 1.0, [random.Random(i)])[0][0] for i in range(6)] == together
    assert draw(logits, 0.0, [])[0] == logits.argmax(-1).tolist()


TOKENIZERS = [chat_tokenizer(), byte_tokenizer()]
RANDOM = random_policy("qwen2").model
STOPS = st.sampled_from([STOP_STRINGS, ("</tool_call>",), ("é>", "日"), (" x",), ()])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<", "/", "search", ">", "</search", "</answer>", "é", "é>", "日", " x", "a", "ch>", "tool_call>"])
    ),
    STOPS,
    st.sampled_from(TOKENIZERS),
)
def test_a_row_ends_where_its_text_first_holds_a_stop_string(pieces, stop, tokenizer) -> None:
    sampled = tokenizer.encode("".join(pieces), add_special_tokens=False)
    ends = Ends(RANDOM, tokenizer, stop)
    begin = tokenizer.encode("</search>", add_special_tokens=False)  # of the prompt, and no end of it
    ended = [
        n
        for n in range(1, len(sampled) + 1)
        if (ends.candidates is None or sampled[n - 1] in ends.candidates) and ends.at(begin + sampled[:n], len(begin))
    ]
    texts = [tokenizer.decode(sampled[:n], skip_special_tokens=False) for n in range(1, len(sampled) + 1)]
    holding = [n for n, text in enumerate(texts, 1) if any(s in text for s in stop)]
    special = [n for n in range(1, len(sampled) + 1) if sampled[n - 1] == tokenizer.eos_token_id]
    assert ended[:1] == sorted(holding + special)[:1]


@pytest.mark.parametrize("family", ["qwen2", "lfm2"])
def test_prompts_longer_than_a_pass_are_computed_in_pieces(monkeypatch, family: str) -> None:
    policy = random_policy(family)
    prompts = [[(7 * i + j) % 200 for j in range(length)] for i, length in enumerate((60, 61, 9, 33, 2))]
    given = dict(max_new_tokens=6, temperature=1.0, stop=())
    whole = generate(TorchEngine(policy.model, policy.tokenizer), prompts, **given)
    monkeypatch.setattr(continuous, "_CPU_PREFILL", 16)
    pieces = generate(TorchEngine(policy.model, policy.tokenizer), prompts, **given)
    assert [g.ids for g in pieces] == [g.ids for g in whole]
    for ours, theirs in zip(pieces, whole, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


# By name.


@contextmanager
def own_engine(config, policy, loaded, max_tokens):
    """A user's engine."""
    yield (policy, max_tokens, config.rollout.batch_size)


def test_an_engine_of_ones_own_is_opened_by_its_name(tmp_path, tiny_policy) -> None:
    tiny_policy.save(tmp_path / "policy")
    config = config_of(tmp_path, rollout={"engine": "test_engine:own_engine", "batch_size": 7, "max_tokens": 99})
    with open_engine(config, tmp_path / "policy") as (engine, prompts):
        assert engine == (tmp_path / "policy", 99, 7)
    assert prompts == tiny_policy.prompts
    with open_engine(config, tmp_path / "policy", tiny_policy) as (engine, _):
        assert engine == (tmp_path / "policy", None, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vlm", r"rollout\.engine = 'vlm': no such engine; did you mean 'vllm'\?"),
        ("nowhere:engine", r"rollout\.engine = 'nowhere:engine': No module named 'nowhere'"),
    ],
)
def test_an_unknown_engine_is_refused_before_the_work(tmp_path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_engine(config_of(tmp_path, rollout={"engine": name}))


def test_the_former_name_is_refused_with_the_new_one() -> None:
    with pytest.raises(ValidationError, match=r'called "torch" now; write engine = "torch"'):
        RolloutConfig(engine="transformers")
