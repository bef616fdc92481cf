"""Memory that runs out in the training loop: halves, checkpointing, and what counts as such."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from search_e1.config import TrainingConfig
from search_e1.errors import TrainingError
from search_e1.training import memory
from search_e1.training.objectives.sft import Sft
from search_e1.training.trained import TrainedPolicy
from test_loop import FULL, group, mixed, mixed_step, moved
from test_loop import descent as descent
from test_loop import tiny as tiny
from trained import (
    assert_near,
    equal,
    grpo,
    run,
    sample,
    weights,
)


@pytest.fixture
def no_collection(monkeypatch):
    """Collecting garbage takes a quarter of a second beside all that the tests have imported."""
    monkeypatch.setattr(memory.gc, "collect", lambda: 0)


@contextmanager
def room_for(model: Any, rows: int, backward: bool = False, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """While training, a pass over more rows fails, ``unless`` that holds: forward, or when its gradients are made in part."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError(FULL)

    def look(layer: Any, args: tuple, kwargs: dict, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not layer.training or not torch.is_grad_enabled() or len(hidden) <= rows or unless():
            return
        if not backward:
            fail()
        hidden.register_hook(fail)

    handle = model.get_decoder().layers[0].register_forward_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("tokens", [16_384, 150])
def test_where_memory_runs_out_the_update_is_the_same_in_halves(tiny, tmp_path, descent, no_collection, backward, tokens):
    """Also of the second of two updates, and where another objective's gradients were there already."""
    steps = [mixed_step(), mixed_step(100)]
    config = TrainingConfig(micro_batch_tokens=tokens)
    plain, whole = run(
        copy.deepcopy(tiny), steps, mixed(mini_batches=2), tmp_path / "plain", config, mini_batches=2, learning_rate=0.1
    )
    short = copy.deepcopy(tiny)
    with room_for(short, 1, backward):
        halved, model = run(short, steps, mixed(mini_batches=2), tmp_path / "short", config, mini_batches=2, learning_rate=0.1)
    for record, expected in zip(halved, plain, strict=True):
        assert record.pop("halved") >= 1
        assert record == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert_near(moved(model, weights(tiny)), moved(whole, weights(tiny)), 1e-4)


def test_passes_stay_halved_for_the_step(tiny, tmp_path, no_collection):
    """8 rows of 13 at most 3 a pass: 104 tokens are halved to 52 and to 26; the second update begins there."""
    model = copy.deepcopy(tiny)
    step = {"sft": [sample(i, 5, 8) for i in range(16)]}
    with room_for(model, 3):
        config = TrainingConfig(micro_batch_tokens=104)
        (record,), _ = run(model, [step], {"sft": Sft()}, tmp_path, config, mini_batches=2)
    assert record["halved"] == 2


def test_what_does_not_fit_alone_stops_with_a_message(tiny, tmp_path, no_collection):
    model = copy.deepcopy(tiny)
    with room_for(model, 0), pytest.raises(TrainingError, match="step 1: out of memory for a single sequence; lower"):
        run(model, [{"grpo": group()}], {"grpo": grpo()}, tmp_path)
    assert equal(weights(model), weights(tiny))


def test_a_sequence_that_does_not_fit_alone_is_checkpointed(tiny, tmp_path, descent, no_collection):
    """Unless the config says otherwise; the update is the same."""
    plain, whole = run(copy.deepcopy(tiny), [{"grpo": group()}], {"grpo": grpo()}, tmp_path / "plain", learning_rate=0.1)
    model = copy.deepcopy(tiny)
    with room_for(model, 0, unless=lambda: model.is_gradient_checkpointing):
        (record,), trained = run(model, [{"grpo": group()}], {"grpo": grpo()}, tmp_path / "short", learning_rate=0.1)
    assert record.pop("halved") >= 1
    assert record == pytest.approx(plain[0], rel=1e-3, abs=1e-5)
    assert_near(moved(trained, weights(tiny)), moved(whole, weights(tiny)), 1e-4)
    assert not trained.is_gradient_checkpointing
    with room_for(tiny, 0), pytest.raises(TrainingError, match="step 1: out of memory for a single sequence; lower"):
        run(tiny, [{"grpo": group()}], {"grpo": grpo()}, tmp_path / "off", TrainingConfig(gradient_checkpointing=False))


def test_another_error_is_not_taken_for_memory(tiny, tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(TrainedPolicy, "run", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(copy.deepcopy(tiny), [{"grpo": group()}], {"grpo": grpo()}, tmp_path)


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (torch.OutOfMemoryError(FULL), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("size mismatch"), False),
        (TrainingError("step 1: out of memory for a single sequence"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, ran_out):
    assert memory.ran_out(error) == ran_out
    with pytest.raises(TrainingError if ran_out else type(error)) as caught, memory.translate_oom("grpo-1"):
        raise error
    assert str(caught.value).startswith("grpo-1: out of memory (") == ran_out
