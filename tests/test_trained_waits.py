"""No pass waits for the device: a step asks it for numbers equally often, however many passes it takes."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import make_tiny_policy
from search_e1.config import DistillConfig, TrainingConfig
from search_e1.runs.context import StageContext
from search_e1.training import attention
from search_e1.training.batch import pack
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives.self_distillation import SelfDistillation
from search_e1.training.objectives.sft import Sft
from search_e1.training.trained import TrainedPolicy
from test_trained_packed import stand_in
from trained import ListSource, grpo, sample

WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim", "repeat_interleave",
    "bincount",
}  # fmt: skip
"""Operations whose result, or its size, the host has to know."""


class Waits(TorchDispatchMode):
    """Counts them. Indexing by a mask is one too."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.__name__.partition(".")[0]
        masked = name in ("index", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.counted[name] += name in WAITS or masked
        return operation(*args, **(kwargs or {}))


OBJECTIVES = {
    "sft": Sft(),
    "grpo": grpo(kl_coefficient=0.1, average="dr_grpo"),
    # The fused pass for CPUs looks whether an entry was clipped.
    "distill": SelfDistillation(DistillConfig(clip="token")),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_waits_equally_often_however_many_its_passes(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(attention, "obstacle", lambda model, dtype: None)
    monkeypatch.setattr(attention.varlen, "varlen_attn", stand_in)
    samples = [sample(i, 5, 8, teacher=9, advantage=1.0, old_logprobs=(-5.0,) * 8, ref_logprobs=(-5.5,) * 8) for i in range(8)]
    monkeypatch.setattr(type(OBJECTIVES[name]), "prepare", lambda self, policy, samples: samples)
    lists = Counter()
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.update("x") or tolist(tensor))
    waits, passes, losses = {}, {}, {}
    for tokens in (20, 1000):
        config = TrainingConfig(micro_batch_tokens=tokens)
        model = make_tiny_policy().model
        assert pack(model, torch.float32)
        policy = TrainedPolicy(model, config, frozen_start=True)
        policy.packed = True
        run, ran = policy.run, Counter()
        monkeypatch.setattr(policy, "run", lambda *given, run=run, ran=ran: ran.update("x") or run(*given))
        (out := tmp_path / str(tokens)).mkdir()
        source, objectives = ListSource([{name: samples}]), {name: OBJECTIVES[name]}
        lists.clear()
        with Waits() as mode:
            records = train(policy, source, objectives, config, Schedule(1, 1e-3), StageContext(out))
        waits[tokens], passes[tokens], losses[tokens] = (+mode.counted, lists.total()), ran.total(), records[0]["loss"]
    assert passes == {20: 8, 1000: 1}
    assert waits[20] == waits[1000]
    assert losses[20] == pytest.approx(losses[1000], rel=1e-4, abs=1e-6)
    assert waits[20][0]["_local_scalar_dense"] > 0  # the gradient's norm, once: what is counted can be seen


def test_what_waits_is_counted() -> None:
    tensor = torch.arange(3)
    with Waits() as mode:
        tensor[tensor > 0]
        if tensor.sum() > 0:
            float(tensor[0])
    assert +mode.counted == {"index": 1, "_local_scalar_dense": 2}
