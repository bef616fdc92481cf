"""Decoding by recorded steps, as on a GPU, simulated on the CPU: it samples what the plain path does, whatever happens."""

import gc
import inspect
import itertools
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any
from weakref import ref

import pytest
import torch
import torch.nn.attention.varlen as varlen
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

import replay
from conftest import PASSAGES, TinyRetriever
from replay import Tape
from scripted import generate
from search_e1.config import TrainingConfig
from search_e1.errors import ModelError
from search_e1.rollout.engines import torch as hf
from search_e1.rollout.engines.base import Generation, Request
from search_e1.rollout.engines.decoding import STEPS, _buckets
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Trajectory
from test_engine import FAMILIES, ids, play, random_policy

torch_varlen_attn = varlen.varlen_attn


@pytest.fixture
def tape(monkeypatch) -> Tape:
    """Records steps of models on the CPU, too."""
    tape = Tape()
    monkeypatch.setattr(hf, "_recorder", lambda device: tape)
    monkeypatch.setattr(hf, "_tried", {})
    return tape


@pytest.fixture
def paged(monkeypatch) -> None:
    """Flash attention on a CPU."""
    monkeypatch.setattr(varlen, "varlen_attn", replay.varlen_attn)


def plainly(sample: Callable[[], Any]) -> Any:
    """What the path of CPUs samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "_recorder", lambda device: None)
        return sample()


def prompts(lengths) -> list[list[int]]:
    return [[(7 * i + j) % 200 for j in range(length)] for i, length in enumerate(lengths)]


def tokens(policy, lengths=(5, 60, 9, 33), *, stop=(), temperature=1.0, new=20, **engine) -> list[tuple[int, ...]]:
    made = TorchEngine(policy.model, policy.tokenizer, **engine)
    done = generate(made, prompts(lengths), max_new_tokens=new, temperature=temperature, stop=stop)
    assert all(len(one.ids) == len(one.logprobs or ()) for one in done)
    return [one.ids for one in done]


@cache
def played_plainly(family: str) -> list[Trajectory]:
    policy = random_policy(family)
    return plainly(lambda: play(policy, TorchEngine(policy.model, policy.tokenizer), 1.0, seed=1))


@pytest.mark.parametrize("reading", ["masks", "pages"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_samples_what_the_plain_path_does(family: str, reading: str, tape: Tape, request, caplog) -> None:
    if reading == "pages":
        request.getfixturevalue("paged")
    policy, expected = random_policy(family), played_plainly(family)
    shuffled = random.Random(0).sample(range(len(expected)), len(expected))
    # Rows that come and go are read in both ways; all at once, with rows of the graph left over, by pages.
    for size, order in ((4, shuffled), (64, range(len(expected))))[: 1 + (reading == "pages")]:
        done = play(policy, TorchEngine(policy.model, policy.tokenizer, batch_size=size), 1.0, seed=1, order=order)
        assert ids(done) == ids(expected)
        for a, b in zip(done, expected, strict=True):
            for one, other in zip(a.turns, b.turns, strict=True):
                assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-4)
    assert tape.replays > tape.captures > 0
    pages = hf._cache_of(policy.model) is hf.PagedCache
    assert pages == (reading == "pages" and family != "gemma2")  # its attention is eager
    assert ("eager attention" if family == "gemma2" else "") in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "lfm2"])
def test_half_precision_is_near_enough_to_the_plain_step(family: str, dtype: torch.dtype, tape: Tape, paged, caplog) -> None:
    policy = random_policy(family)
    policy.model = policy.model.to(dtype)
    ours, theirs = (sampled() for sampled in (lambda: tokens(policy, new=1), lambda: plainly(lambda: tokens(policy, new=1))))
    assert ours == theirs  # one token: rounding may lead the next ones apart
    tokens(policy)
    assert type(hf._kept[policy.model].loop.cache) is hf.PagedCache
    assert tape.replays > 20
    assert not [record for record in caplog.records if record.name.startswith("search_e1")]


@pytest.mark.parametrize(
    ("family", "stop"), [("qwen2", ("e",)), ("qwen2", ("\u00e9",)), ("lfm2", ("e",)), ("lfm2", (" ",))], ids=str
)  # tokens that can complete the first of each can be told by their looks
def test_what_is_sampled_beyond_a_row_s_end_counts_nowhere(family: str, stop: tuple[str, ...], tape: Tape) -> None:
    policy = random_policy(family)
    expected = plainly(lambda: tokens(policy, stop=stop))
    assert tokens(policy, stop=stop) == expected
    assert min(map(len, expected)) < 20, "rows end at different steps"
    assert tape.replays


@pytest.mark.parametrize("family", ["qwen2", "lfm2"])
def test_a_row_that_ended_between_two_looks_goes_on_as_if_it_had_stopped_there(family: str, tape: Tape) -> None:
    policy = random_policy(family)

    def sampled() -> list[tuple[int, ...]]:
        context, actions = [5, 6, 7], []
        with TorchEngine(policy.model, policy.tokenizer).session(temperature=1.0, stop=(" ",), max_tokens=300) as session:
            for seed in range(4):
                session.submit(Request(0, context, 40, seed))
                while not (done := session.step()):
                    pass
                actions.append(done[0][1].ids)
                context = [*context, *actions[-1], 8, 9]
        return actions

    expected = plainly(sampled)
    assert any(len(action) % STEPS for action in expected if len(action) < 40)
    assert sampled() == expected


def test_each_row_has_its_own_limit_and_temperature(tape: Tape) -> None:
    policy = random_policy("qwen2")
    wanted = [(3, None), (19, 0.0), (1, 0.7), (8, 1.0), (16, 0.0)]

    def sampled() -> list[Generation]:
        done: dict[int, Generation] = {}
        with TorchEngine(policy.model, policy.tokenizer).session(temperature=1.0, stop=(), max_tokens=100) as session:
            for key, (most, temperature) in enumerate(wanted):
                session.submit(Request(key, [5, 6, 7], most, key, temperature=temperature))
            while len(done) < len(wanted):
                done |= dict(session.step())
        return [done[key] for key in range(len(wanted))]

    expected, done = plainly(sampled), sampled()
    assert [one.ids for one in done] == [one.ids for one in expected]
    assert [len(one.ids) for one in done] == [most for most, _ in wanted]
    for ours, theirs in zip(done, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_an_interrupted_row_goes_on_with_its_own_numbers(tape: Tape) -> None:
    policy = random_policy("qwen2")
    engine = TorchEngine(policy.model, policy.tokenizer)

    def run(begun: Generation, steps: int | None = None) -> tuple[Generation, dict[int, Generation]]:
        with engine.session(temperature=1.0, stop=(), max_tokens=100) as session:
            session.submit(Request(0, [5, 6, 7], 30, 9, begun))
            for _ in range(steps or 9):
                if done := session.step():
                    return done[0][1], {}
            return begun, session.begun()

    whole, _ = run(Generation(()))
    _, unfinished = run(Generation(()), steps=2)
    assert unfinished[0].ids == whole.ids[: 2 * STEPS]
    assert run(unfinished[0])[0].ids == whole.ids
    [plain] = plainly(lambda: generate(engine, [[5, 6, 7]], max_new_tokens=30, temperature=1.0, stop=(), seed=9))
    assert plain.ids == whole.ids


# Updates.


def test_weights_that_were_updated_in_place_are_sampled_from_without_a_new_capture(tape: Tape, paged) -> None:
    policy = random_policy("qwen2")
    before = tokens(policy)
    captures = tape.captures
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    after = tokens(policy)
    assert tape.captures == captures > 0
    assert after == plainly(lambda: tokens(policy)) != before


def test_master_weights_are_sampled_from_without_a_new_capture(tape: Tape) -> None:
    policy, seen = random_policy("qwen2"), []
    trained = TrainedPolicy(policy.model, TrainingConfig(), frozen_start=False, dtype=torch.float64)  # no close draws
    for _ in range(2):
        with trained.sampled(keep=True) as model:
            sampled = replace(policy, model=model)
            seen.append((tokens(sampled), tape.captures))
            assert seen[-1][0] == plainly(lambda policy=sampled: tokens(policy))
        with torch.no_grad():
            for weight in policy.model.parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    (first, captures), (second, all_captures) = seen
    assert all_captures == captures > 0
    assert first != second


def test_weights_that_lie_elsewhere_are_captured_anew(tape: Tape) -> None:
    policy = random_policy("qwen2")
    tokens(policy)
    captures = tape.captures
    head = policy.model.lm_head
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1)))
    assert tokens(policy) == plainly(lambda: tokens(policy))
    assert tape.captures > captures
    assert policy.model not in hf._kept, "it would be kept in vain"


def test_adapters_that_are_applied_otherwise_are_captured_anew(tape: Tape) -> None:
    policy = random_policy("qwen2")
    adapted = get_peft_model(policy.model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    policy.model = adapted.get_base_model()
    seen = [tokens(policy)]
    for strength in (3.0, 0.0):
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", strength)
        seen.append(tokens(policy))
        assert seen[-1] == plainly(lambda: tokens(policy))
    with adapted.disable_adapter():
        assert tokens(policy) == seen[-1]
    assert len(set(map(str, seen))) == 3


# Memory.


def test_a_cache_that_grows_is_captured_anew(tape: Tape) -> None:
    """The third row is one for which a step was recorded before, on memory that is no longer the cache's."""
    policy = random_policy("qwen2")
    policy.model.config.max_position_embeddings = 1024
    lengths = (5, 700, 5)
    expected = plainly(lambda: tokens(policy, lengths, new=10))
    done: dict[int, Generation] = {}
    with TorchEngine(policy.model, policy.tokenizer).session(temperature=1.0, stop=(), max_tokens=600) as session:
        for key, prompt in enumerate(prompts(lengths)):
            session.submit(Request(key, prompt, 10, key))
            while key not in done:
                done |= dict(session.step())
            session.release(key)
            assert session.loop.cache.capacity == (640 if key == 0 else 1280)
    assert [done[key].ids for key in range(3)] == expected


def test_rows_that_fill_the_cache_do_not_make_it_grow(tape: Tape) -> None:
    policy, done = random_policy("qwen2"), {}
    with TorchEngine(policy.model, policy.tokenizer).session(temperature=1.0, stop=(), max_tokens=128) as session:
        for key, (length, most) in enumerate(((125, 3), (50, 30))):
            session.submit(Request(key, prompts((length,))[0], most, key))
        while len(done) < 2:
            done |= dict(session.step())
        cache = session.loop.cache
    assert (cache.capacity, cache.moved) == (128, 0)
    assert [len(done[key].ids) for key in range(2)] == [3, 30]


def test_what_is_kept_goes_with_the_model(tape: Tape) -> None:
    policy = random_policy("qwen2")
    tokens(policy)
    cache = ref(hf._kept[policy.model].loop.cache)
    assert cache() is not None
    del policy
    gc.collect()
    assert cache() is None


def test_a_graph_is_not_replayed_for_a_longer_row(tape: Tape, monkeypatch) -> None:
    policy = random_policy("qwen2")
    policy.model.config.max_position_embeddings = 1024
    expected = plainly(lambda: tokens(policy, (505, 20), new=20))
    kept: dict = {}
    monkeypatch.setattr(hf, "_kept", kept)
    assert tokens(policy, (505, 20), new=20) == expected
    assert {key.extent for key in kept[policy.model].loop._recorded} == {512, 576}  # the second: all there is


def test_steps_are_captured_for_few_numbers_of_rows(tape: Tape, monkeypatch) -> None:
    assert list(_buckets(320)) == [1, 4, 16, 64, 128, 192, 256, 320]
    assert [list(_buckets(n)) for n in (1, 4, 5, 100)] == [[1], [1, 4], [1, 4, 5], [1, 4, 16, 64, 100]]
    policy, kept = random_policy("qwen2"), {}
    monkeypatch.setattr(hf, "_kept", kept)
    lengths = tuple(range(3, 9))  # six rows, of which some end early
    assert tokens(policy, lengths, stop=("e",)) == plainly(lambda: tokens(policy, lengths, stop=("e",)))
    assert {key.rows for key in kept[policy.model].loop._recorded} == {4, 16}


def test_a_cache_is_kept_if_memory_has_room_for_it(tape: Tape, monkeypatch) -> None:
    policy, kept = random_policy("qwen2"), {}
    monkeypatch.setattr(hf, "_kept", kept)
    tokens(policy, batch_size=2)
    held = kept[policy.model].loop.cache.bytes
    assert held == (2 + 2) * 128 * hf._bytes_per_position(policy.model)  # slots, positions of each
    tape.bytes = 1000  # of the recorded steps
    for free, stays in ((4 * (held + 1000), True), (4 * (held + 1000) - 4, False)):
        kept.clear()
        monkeypatch.setattr(hf, "_free_memory", lambda device, free=free: free)
        tokens(policy, batch_size=2)
        assert bool(kept) == stays


class _Broken:
    """A recorder whose steps, from the replay ``first`` on, leave other logits of the second row."""

    def __init__(self, tape: Tape, first: int) -> None:
        self.tape, self.first = tape, first

    def capture(self, step):
        (repeat, result), replays = self.tape.capture(step), itertools.count(1)

        def replay() -> None:
            repeat()
            if next(replays) >= self.first:
                result[1:2].mul_(1.1)

        return replay, result


@pytest.mark.parametrize("family", ["qwen2", "lfm2"])
@pytest.mark.parametrize(("first", "where"), [(1, ""), (2, " at step 2"), (STEPS, f" at step {STEPS}")])
def test_logits_that_differ_from_the_plain_step_s_end_the_use_of_graphs(
    family: str, first: int, where: str, tape: Tape, monkeypatch, caplog
) -> None:
    policy = random_policy(family)
    expected = plainly(lambda: tokens(policy))
    monkeypatch.setattr(hf, "_recorder", lambda device: _Broken(tape, first))
    assert tokens(policy) == expected
    assert tokens(policy) == expected
    said = f"decoding without CUDA graphs, which is slower: its logits differ from the plain step's{where}\n"
    assert caplog.text.count(said) == 1
    assert tape.replays == first


def test_a_model_that_computes_on_the_host_is_sampled_without_graphs(tape: Tape, monkeypatch, caplog) -> None:
    policy = random_policy("qwen2")
    expected, forward = plainly(lambda: tokens(policy)), policy.model.forward

    def reading(*args, position_ids, **kwargs):
        return forward(*args, position_ids=position_ids + 0 * int(position_ids.max()), **kwargs)

    monkeypatch.setattr(policy.model, "forward", reading)
    assert tokens(policy) == expected
    assert "without CUDA graphs, which is slower: the model computes on the host (_local_scalar_dense)" in caplog.text
    assert not tape.replays


def test_memory_that_runs_out_while_capturing_halves_the_rows(tape: Tape, monkeypatch) -> None:
    policy = random_policy("qwen2")
    expected, capture = plainly(lambda: tokens(policy)), tape.capture

    room = 2

    def crowded(step):
        if step().shape[0] > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return capture(step)

    monkeypatch.setattr(tape, "capture", crowded)
    engine = TorchEngine(policy.model, policy.tokenizer, batch_size=4)
    with pytest.warns(UserWarning, match="2 trajectories are sampled together instead of 4"):
        done = generate(engine, prompts((5, 60, 9, 33)), max_new_tokens=20, temperature=1.0, stop=())
    assert [one.ids for one in done] == expected
    assert (engine.batch_size, tape.replays > 0) == (2, True)
    room = 0
    with pytest.raises(ModelError, match=r"not even one trajectory fits into memory; lower rollout\.max_tokens"):
        tokens(policy)


def test_logits_that_are_not_finite_stop_sampling(tape: Tape) -> None:
    policy = random_policy("qwen2")
    tokens(policy)
    with torch.no_grad():
        policy.model.model.norm.weight[3] = torch.nan
    with pytest.raises(ModelError, match=r"logits that are not finite while sampling"):
        tokens(policy)


# Attention.


def test_torch_takes_what_the_stand_in_takes() -> None:
    ours, theirs = (inspect.signature(function).parameters for function in (replay.varlen_attn, torch_varlen_attn))
    assert [(one.name, one.kind, one.default) for one in ours.values()] == [
        (one.name, one.kind, one.default) for one in theirs.values()
    ]


def test_without_flash_attention_masks_are_used_and_it_is_said_once(tape: Tape, caplog) -> None:
    policy = random_policy("qwen2")
    assert tokens(policy) == tokens(policy) == plainly(lambda: tokens(policy))
    assert caplog.text.count("sampling without flash attention, which is slower: Could not run") == 1


def _first_page(*arguments, block_table, **options):
    """A kernel that reads a row's first page for each of its pages."""
    return replay.varlen_attn(*arguments, block_table=block_table[:, :1].expand_as(block_table).contiguous(), **options)


def _windowless(*arguments, window_size, **options):
    return replay.varlen_attn(*arguments, window_size=(-1, 0), **options)


@pytest.mark.parametrize(
    ("kernel", "family", "window"),
    [(_first_page, "qwen2", None), (_windowless, "mistral", 9), (_windowless, "mistral", 300)],
)
def test_a_kernel_that_is_wrong_in_long_rows_alone_is_found_out(
    kernel, family: str, window: int | None, tape: Tape, paged, monkeypatch, caplog
) -> None:
    policy = random_policy(family, sliding_window=window)
    size = hf._bytes_per_position(policy.model)
    assert hf._bytes_per_position(policy.model, hf.PagedCache) == size > 0
    hf._tried.clear()
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    assert hf._bytes_per_position(policy.model, hf.PagedCache) is None
    assert caplog.text.count("slower: rows sampled together differ from rows sampled alone") == 1


@pytest.mark.parametrize(("window", "positions", "border"), [(9, 512, 256), (300, 512, 300), (5000, 9000, 256), (9, 64, 61)])
def test_the_border_that_a_trial_crosses(window: int, positions: int, border: int) -> None:
    policy = random_policy("mistral", sliding_window=window)
    policy.model.config.max_position_embeddings = positions
    assert hf.PagedCache(policy.model, 1).border == border


def test_prompts_are_packed_without_padding(tape: Tape, paged, monkeypatch) -> None:
    policy, passes = random_policy("qwen2"), []
    tokens(policy)  # what is tried on the model is behind it
    forward = policy.model.forward

    def counting(*args, position_ids, **kwargs):
        passes.append(position_ids.numel())
        return forward(*args, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(policy.model, "forward", counting)
    tokens(policy, (60, 9, 33, 2), new=1)
    assert passes[0] == 59 + 8 + 32 + 1


# The retriever.


def test_when_the_retriever_answers_changes_nothing(tape: Tape) -> None:
    policy, pauses = random_policy("qwen2"), random.Random(0)

    class Late(TinyRetriever):
        def search(self, queries, topk):
            threading.Event().wait(pauses.random() / 100)
            return super().search(queries, topk)

    engine = TorchEngine(policy.model, policy.tokenizer)
    first = play(policy, engine, 1.0, retriever=Late(PASSAGES))
    assert play(policy, engine, 1.0, retriever=Late(PASSAGES)) == first  # log-probabilities to the bit
