"""Memory that runs out: a micro-batch is halved until it fits, and the step is the same but for rounding."""

import copy
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from conftest import PASSAGES, TinyRetriever, make_tiny_policy
from search_e1.config import DistillConfig, GrpoConfig, LoraConfig, ReplayConfig
from search_e1.distill import trainer as distill
from search_e1.errors import TrainingError
from search_e1.grpo import trainer as grpo
from search_e1.training import memory
from search_e1.training.policy import Policy
from search_e1.warmstart import trainer as warmstart
from taught import LIMITS, QUESTIONS, teach
from test_distill import pairs_of

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(scope="module")
def taught() -> Policy:
    return teach()


@contextmanager
def room_for(policy: Policy, rows: int, backward: bool = False) -> Iterator[None]:
    """While training, a pass over more rows fails: forward, or when its gradients are made in part."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError(FULL)

    def look(layer: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not layer.training or not torch.is_grad_enabled() or len(hidden) <= rows:
            return
        if not backward:
            fail()
        hidden.register_hook(fail)

    layer = policy.model.model.layers[0]
    handle = layer.register_forward_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def assert_same_step(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], start: Policy) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(tensor, one[name]) for name, tensor in start.model.state_dict().items())


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_grpo(policy: Policy, out: Path, micro: int = 12, **trainer: object) -> dict[str, float]:
    out.mkdir()
    config = GrpoConfig(
        steps=1, questions_per_step=2, group_size=6, learning_rate=1.0,
        replay=ReplayConfig(examples_per_step=2, weight=0.5),
        # Plain descent: Adam's first step is the gradient's sign, which rounding can turn.
        trainer={"optim": "sgd", "per_device_train_batch_size": micro, **trainer},
    )  # fmt: skip
    return grpo.train(policy, QUESTIONS, TinyRetriever(PASSAGES), config, LIMITS, seed=3, out=out)


@pytest.mark.parametrize(
    ("backward", "micro", "halved", "trainer"),
    [
        (False, 12, 3, {}),
        (True, 4, 3, {}),  # the second and the third of three are halved when the first has left its gradients
        (False, 12, 3, {"loss_type": "bnpo"}),
    ],
)
def test_a_step_of_grpo_is_the_same_in_halves(taught, tmp_path, backward, micro, halved, trainer):
    plain, short = copy.deepcopy(taught), copy.deepcopy(taught)
    assert train_grpo(plain, tmp_path / "plain", micro, **trainer)["halved"] == 0
    with room_for(short, 3, backward):
        assert train_grpo(short, tmp_path / "short", micro, **trainer)["halved"] == halved
    assert_same_step(weights(plain), weights(short), taught)
    expected, found = (lines(tmp_path / name / "steps.jsonl")[0] for name in ("plain", "short"))
    assert found.pop("halved") == halved
    assert found.keys() == expected.keys()
    for name in ("loss", "grad_norm", "replay_cross_entropy", "reward"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert found["entropy"] == pytest.approx(expected["entropy"], rel=0.1)  # a mean over parts


def test_what_does_not_fit_alone_stops_with_a_message(taught, tmp_path):
    policy = copy.deepcopy(taught)
    with room_for(policy, 0), pytest.raises(TrainingError, match="step 1: out of memory for a single sequence; lower"):
        train_grpo(policy, tmp_path / "out")
    assert not (tmp_path / "out" / "policy").exists()


@pytest.mark.parametrize(("backward", "teacher", "micro"), [(False, "live", 4), (True, "cached", 4), (True, "live", 2)])
def test_a_step_of_distillation_is_the_same_in_halves(tmp_path, backward, teacher, micro):
    config = DistillConfig(
        learning_rate=1.0, batch_size=4, lora=LoraConfig(rank=4, alpha=8), logits_mib=1, teacher=teacher,
        trainer={"optim": "sgd", "per_device_train_batch_size": micro, "max_steps": 1, "lr_scheduler_type": "constant"},
    )  # fmt: skip
    found = {}
    for name, rows in (("plain", 9), ("short", 1)):
        policy = make_tiny_policy()
        for parameter in policy.model.parameters():
            parameter.data *= 3 if parameter.ndim == 2 else 1  # a policy with opinions
        start = copy.deepcopy(policy)
        with room_for(policy, rows, backward):
            figures = distill.train(policy, pairs_of(policy, 4), config, seed=1, out=tmp_path / name)
        found[name] = weights(policy)
        assert figures["halved"] == (0 if name == "plain" else 3 if micro == 4 else 2)
    assert_same_step(found["plain"], found["short"], start)
    expected, halved = (lines(tmp_path / name / "steps.jsonl")[0] for name in ("plain", "short"))
    assert halved["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert halved["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_of_a_warm_start_is_the_same_in_halves(tiny_policy, backward):
    """Demonstrations of 8 to 22 ids; a pass holds two at most: an eighth of all, padded (176)."""
    batch = [warmstart.Demonstration((1, 2), tuple(range(n, 2 * n)), (1,) * n) for n in range(6, 21, 2)]
    found, told = [], []
    for rows, pass_tokens in ((9, 256), (2, 256), (2, 16_384)):
        policy = copy.deepcopy(tiny_policy)
        with room_for(policy, rows, backward):
            told.append([])
            losses = warmstart.train(
                policy, iter([batch]), steps=1, learning_rate=1e-3, pass_tokens=pass_tokens,
                track=lambda _, figures: told[-1].append(figures),
            )  # fmt: skip
        found.append((losses, weights(policy)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert [figures[0].get("halved", 0) for figures in told] == [0, 3, 3]
    # Muon and Adam hardly look at the size of a gradient, so that rounding shows: the mean change of a weight is 1e-3.
    for name, tensor in found[0][1].items():
        assert (tensor - found[1][1][name]).abs().mean() < 1e-5, name
    with (
        room_for(tiny_policy, 0),
        pytest.raises(TrainingError, match="step 1: out of memory for a single demonstration"),
    ):
        warmstart.train(tiny_policy, iter([batch]), steps=1, learning_rate=1e-3, pass_tokens=256)


def test_a_gradient_that_is_not_finite_stops_a_warm_start_before_its_step(tiny_policy):
    before = weights(tiny_policy)
    tiny_policy.model.model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    batch = [warmstart.Demonstration((1, 2), (3, 4), (1, 1))]
    with pytest.raises(TrainingError, match="the gradient's norm of step 1 is"):
        warmstart.train(tiny_policy, iter([batch]), steps=1, learning_rate=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tiny_policy).items())


def test_a_gradient_that_is_not_finite_stops_distillation_before_its_step(tmp_path):
    policy = make_tiny_policy()
    before = weights(policy)

    def spoil(layer: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.nan)

    policy.model.model.norm.register_forward_hook(spoil, with_kwargs=True)
    config = DistillConfig(batch_size=2, lora=LoraConfig(rank=4, alpha=8), logits_mib=1)
    with pytest.raises(TrainingError, match="distillation step 1: the gradient's norm is nan"):
        distill.train(policy, pairs_of(policy, 2), config, seed=1, out=tmp_path)
    for name, tensor in policy.model.state_dict().items():
        assert "lora" in name or torch.equal(tensor, before[name.replace(".base_layer", "")])


def test_a_worker_that_dies_ends_the_stage_with_a_message(tmp_path):
    """Killed when it is asked for its first batch."""
    loader = torch.utils.data.DataLoader(Deadly(), num_workers=1)
    with (
        pytest.raises(TrainingError, match=r"ofsd-1: DataLoader worker .*run the same command"),
        memory.told("ofsd-1"),
    ):
        next(iter(loader))


class Deadly(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


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
    with pytest.raises(TrainingError if ran_out else type(error)) as caught, memory.told("grpo-1"):
        raise error
    assert str(caught.value).startswith("grpo-1: out of memory (") == ran_out
