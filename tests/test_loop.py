"""The training loop: an update is the same in passes of any size, and what it does to the weights is done by hand here."""

import copy
import json
from typing import Any

import pytest
import torch

from conftest import make_tiny_policy
from made_pairs import lfm2_policy
from search_e1.config import DistillConfig, LoraConfig, TrainingConfig
from search_e1.errors import TrainingError
from search_e1.runs.context import StageContext
from search_e1.training import loop
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives.hindsight import Hindsight
from search_e1.training.objectives.self_distillation import SelfDistillation
from search_e1.training.objectives.sft import Sft
from search_e1.training.policy import with_adapter
from search_e1.training.trained import TrainedPolicy
from test_objectives import spread
from trained import (
    ListSource,
    assert_near,
    equal,
    gradients,
    grpo,
    logprobs,
    opinionated,
    run,
    sample,
    token_logprobs,
    weights,
)

LORA = LoraConfig(rank=4, alpha=8)
DROPPING = LoraConfig(rank=4, alpha=8, dropout=0.2)


@pytest.fixture(scope="module")
def tiny():
    return opinionated(make_tiny_policy().model)


@pytest.fixture
def descent(monkeypatch):
    """Plain descent: Adam's first step is the gradient's sign, which rounding can turn."""
    monkeypatch.setattr(
        loop, "make_optimizers",
        lambda model, _, rate: [torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=rate)],
    )  # fmt: skip


def group(count=6, *, teacher=0, first=0):
    gains = (1.2, -0.7, 0.0, -0.5, 0.9, 0.4)
    return [
        sample(first + i, 3 + i % 4, 8 + 5 * (i % 3), advantage=gains[i % 6], teacher=teacher and teacher + i)
        for i in range(count)
    ]


def mixed_step(first=0):
    """Three objectives, of which two weigh other than 1."""
    return {
        "grpo": group(first=first),
        "hindsight": group(3, teacher=9, first=first + 20),
        "replay": [sample(first + 40, 30, 11), sample(first + 41, 20, 16)],
    }


def mixed(**changes):
    return {"grpo": grpo(**changes), "hindsight": Hindsight(0.25), "replay": Sft(0.5)}


def moved(model, start):
    return {name: tensor - start[name] for name, tensor in weights(model).items()}


@pytest.mark.parametrize("average", ["grpo", "dapo", "dr_grpo"])
def test_passes_of_any_size_make_the_same_update(tiny, tmp_path, descent, average):
    start, found = weights(tiny), []
    for tokens in (1, 40, 100_000):
        config = TrainingConfig(micro_batch_tokens=tokens)
        records, model = run(
            copy.deepcopy(tiny), [mixed_step()], mixed(average=average), tmp_path / str(tokens), config,
            learning_rate=1.0,
        )  # fmt: skip
        found.append((records[0], moved(model, start)))
    for record, change in found[:-1]:
        assert record == pytest.approx(found[-1][0], rel=1e-4, abs=1e-6)
        assert_near(change, found[-1][1], 1e-4)


def test_an_update_is_the_weighted_sum_of_the_objectives_gradients(tiny, tmp_path, descent):
    step, objectives, expected, losses = mixed_step(), mixed(), {}, []
    for name, objective in objectives.items():
        loss, gradient, _ = gradients(tiny, step[name], objective)
        losses.append(loss * objective.weight)
        for weight, value in gradient.items():
            expected[weight] = expected.get(weight, 0) + value
    config = TrainingConfig(max_grad_norm=float("inf"))
    (record,), model = run(copy.deepcopy(tiny), [step], objectives, tmp_path, config, learning_rate=0.1)
    change = {name: -value / 0.1 for name, value in moved(model, weights(tiny)).items() if name in expected}
    assert_near(change, expected, 1e-4)
    assert record["loss"] == pytest.approx(sum(losses), rel=1e-5, abs=1e-6)
    assert record["hindsight_divergence"] == pytest.approx(losses[1] / 0.25, rel=1e-4)
    assert record["replay_cross_entropy"] == pytest.approx(losses[2] / 0.5, rel=1e-4)
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    assert record["grad_norm"] == pytest.approx(whole.item(), rel=1e-4)
    assert {key for key in record if key.startswith(("hindsight", "replay"))} == {
        "hindsight_divergence", "replay_cross_entropy",
    }  # fmt: skip


def test_mini_batches_and_epochs_by_hand(tiny, tmp_path, descent):
    """Two mini-batches twice: ratios are to the policy when the step began, so that the clip binds in the end."""
    steps = [{"grpo": group(4, first=10 * i)} for i in range(2)]
    config = TrainingConfig(max_grad_norm=float("inf"), micro_batch_tokens=30, schedule="linear")
    objective = grpo(mini_batches=2, epochs=2, clip_low=0.1, clip_high=0.15)
    records, model = run(
        copy.deepcopy(tiny), steps, {"grpo": objective}, tmp_path, config, mini_batches=2, epochs=2, learning_rate=0.02
    )
    by_hand, update = copy.deepcopy(tiny), 0
    for step, record in zip(steps, records, strict=True):
        samples = step["grpo"]
        old = [token_logprobs(by_hand, s).detach() for s in samples]
        clipped = total = losses = 0
        for _ in range(2):
            for part in ((0, 1), (2, 3)):
                loss = 0
                for i in part:
                    gain, at = samples[i].advantages[0], list(samples[i].positions)
                    ratio = (token_logprobs(by_hand, samples[i]) - old[i]).exp()
                    own = -torch.minimum(ratio * gain, ratio.clamp(0.9, 1.15) * gain)[at]
                    loss = loss + own.mean() / 2
                    cut = ((ratio < 0.9) if gain < 0 else (ratio > 1.15))[at]
                    if gain:  # the others make no pass, and have no part in the figures
                        clipped, total = clipped + cut.float().mean().item(), total + 1
                losses += loss.item()
                by_hand.zero_grad()
                loss.backward()
                with torch.no_grad():
                    for weight in by_hand.parameters():
                        weight -= 0.02 * (1 - update / 8) * weight.grad
                update += 1
        assert record["clip_ratio"] == pytest.approx(clipped / total, abs=1e-6)
        assert record["loss"] == pytest.approx(losses / 4, rel=1e-3, abs=1e-5)
        assert record["learning_rate"] == pytest.approx(0.02 * (1 - (update - 1) / 8))
    assert records[0]["clip_ratio"] > 0.02
    assert_near(moved(model, weights(tiny)), moved(by_hand, weights(tiny)), 1e-4)


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_gradient_beyond_the_norm_is_cut_to_it(tiny, tmp_path, descent, share):
    _, gradient, _ = gradients(tiny, group(), grpo())
    norm = torch.stack([value.norm() for value in gradient.values()]).norm().item()
    config = TrainingConfig(max_grad_norm=share * norm)
    (record,), model = run(copy.deepcopy(tiny), [{"grpo": group()}], {"grpo": grpo()}, tmp_path, config, learning_rate=1.0)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)  # before the cut
    change = moved(model, weights(tiny))
    assert_near({n: change[n] for n in gradient}, {n: -min(1.0, share) * g for n, g in gradient.items()}, 1e-4)


def test_three_steps_of_adamw_by_hand(tiny, tmp_path):
    steps = [{"sft": [sample(i, 5, 14), sample(9 + i)]} for i in range(3)]
    config = TrainingConfig(weight_decay=0.1, betas=(0.9, 0.95), warmup=0.5, max_grad_norm=0.5)
    records, model = run(copy.deepcopy(tiny), steps, {"sft": Sft()}, tmp_path, config, learning_rate=3e-3)
    by_hand = copy.deepcopy(tiny)
    groups = [{"params": [w for w in by_hand.parameters() if w.ndim == dim]} for dim in (2, 1)]
    groups[1]["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step, factor, record in zip(steps, (0.5, 1.0, 1.0), records, strict=True):
        terms = torch.cat([-token_logprobs(by_hand, s)[list(s.positions)] for s in step["sft"]])
        optimizer.zero_grad()
        terms.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        for part in optimizer.param_groups:
            part["lr"] = 3e-3 * factor
        optimizer.step()
        assert record["loss"] == pytest.approx(terms.mean().item(), rel=1e-4)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert record["learning_rate"] == pytest.approx(3e-3 * factor)
    assert_near(weights(model), weights(by_hand), 1e-5)


def test_training_lowers_the_loss(tmp_path):
    for name, optimizer, learning_rate in (("a", "adamw", 1e-2), ("m", "muon", 2e-2)):
        records, _ = run(
            make_tiny_policy().model, [{"sft": [sample(1), sample(2, 4)]}] * 30, {"sft": Sft()}, tmp_path / name,
            TrainingConfig(optimizer=optimizer), learning_rate=learning_rate,
        )  # fmt: skip
        assert records[-1]["loss"] < 0.1 < 3 < records[0]["loss"]


def passes_of(monkeypatch) -> list[int]:
    """Rows of each pass that trains."""
    rows: list[int] = []
    honest = TrainedPolicy.run

    def counted(self: Any, batch: Any, *args: Any) -> Any:
        rows.append(len(batch.student.input_ids))
        return honest(self, batch, *args)

    monkeypatch.setattr(TrainedPolicy, "run", counted)
    return rows


def test_a_sample_without_advantage_makes_no_pass_and_counts_in_the_average(tiny, tmp_path, descent, monkeypatch):
    taught = [s for s in group() if s.advantages[0]]
    idle = [sample(50 + i, 60, 40, advantage=0.0) for i in range(4)]
    config = TrainingConfig(max_grad_norm=float("inf"))
    rows = passes_of(monkeypatch)
    _, model = run(copy.deepcopy(tiny), [{"grpo": [*taught, *idle]}], {"grpo": grpo()}, tmp_path, config, learning_rate=1.0)
    assert sum(rows) == len(taught) == 5
    _, gradient, _ = gradients(tiny, taught, grpo())
    change = moved(model, weights(tiny))
    assert_near({n: change[n] for n in gradient}, {n: -g * 5 / 9 for n, g in gradient.items()}, 1e-4)


def test_with_a_kl_penalty_it_makes_a_pass(tiny, tmp_path, monkeypatch):
    rows = passes_of(monkeypatch)
    idle = [sample(i, advantage=0.0) for i in range(3)]
    run(copy.deepcopy(tiny), [{"grpo": idle}], {"grpo": grpo(kl_coefficient=0.1)}, tmp_path)
    assert sum(rows) == 6  # once for the log-probabilities of the start


def test_a_step_where_nothing_teaches_leaves_the_weights(tiny, tmp_path):
    idle = {"grpo": [sample(i, advantage=0.0) for i in range(3)]}
    records, model = run(copy.deepcopy(tiny), [idle, idle], {"grpo": grpo()}, tmp_path)
    assert equal(weights(model), weights(tiny))
    assert [record["grad_norm"] for record in records] == [0.0, 0.0]
    records, _ = run(copy.deepcopy(tiny), [idle, {"grpo": group()}], {"grpo": grpo()}, tmp_path / "then")
    assert records[1]["grad_norm"] > 0


def test_no_steps_leave_the_policy_as_it_is(tiny, tmp_path):
    records, model = run(copy.deepcopy(tiny), [], {"grpo": grpo()}, tmp_path)
    assert records == []
    assert equal(weights(model), weights(tiny))


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Spoiled(Sft):
    """A loss that is not finite in the pass over the sample of 20 ids."""

    def loss(self, states, batch):
        loss, figures = super().loss(states, batch)
        return loss * (torch.nan if batch.student.input_ids.shape[1] == 25 else 1), figures


def test_a_loss_that_is_not_finite_stops_and_leaves_the_batch(tiny, tmp_path):
    steps = [{"sft": [sample(1)]}, {"sft": [sample(2, 5, 31), sample(3, 5, 20), sample(4)]}]
    model = copy.deepcopy(tiny)
    with pytest.raises(TrainingError, match=r"step 2: the loss is nan; the batch is in .*bad_batch\.pt; lower the lear"):
        run(model, steps, {"sft": Spoiled()}, tmp_path, TrainingConfig(micro_batch_tokens=1))
    saved = torch.load(tmp_path / "bad_batch.pt", weights_only=False)
    assert saved["step"] == 1
    assert saved["batch"].student.input_ids.tolist() == [[*steps[1]["sft"][1].prompt_ids, *steps[1]["sft"][1].response_ids]]
    assert [tuple(s["response_ids"]) for s in saved["samples"]["sft"]] == [s.response_ids for s in steps[1]["sft"]]
    _, once = run(copy.deepcopy(tiny), steps[:1], {"sft": Sft()}, tmp_path / "once")
    assert equal(weights(model), weights(once))  # the second step did nothing


@pytest.mark.parametrize("adapters", [False, True])
def test_a_gradient_that_is_not_finite_stops_before_the_step(tiny, tmp_path, adapters):
    model = copy.deepcopy(tiny)
    start = weights(model)

    def spoil(layer, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)

    model.model.norm.register_forward_hook(spoil)
    model = with_adapter(model, LORA) if adapters else model
    with pytest.raises(TrainingError, match="step 1: the gradient's norm is"):
        run(model, [{"grpo": group()}], {"grpo": grpo()}, tmp_path)
    assert torch.load(tmp_path / "bad_batch.pt", weights_only=False)["samples"]["grpo"]
    after = {name.replace("base_model.model.", "").replace(".base_layer", ""): w for name, w in weights(model).items()}
    assert all(torch.equal(after[name], start[name]) for name in start)


def test_adapters_alone_are_trained_and_merged_into_a_plain_trainable_model(tiny, tmp_path):
    adapted = with_adapter(copy.deepcopy(tiny), LORA)
    frozen = {n: w.detach().clone() for n, w in adapted.named_parameters() if "lora_" not in n}
    policy = TrainedPolicy(adapted, TrainingConfig(), frozen_start=False)
    assert all("lora_" in name for name in policy.parameters)
    source = ListSource([{"grpo": group()}] * 2)
    train(policy, source, {"grpo": grpo()}, TrainingConfig(), Schedule(2, 1e-2), StageContext(tmp_path))
    assert all(torch.equal(weight, frozen[n]) for n, weight in adapted.named_parameters() if n in frozen)
    with torch.no_grad():
        before = logprobs(adapted.eval(), (5, 6), (7, 8, 9))
        model = policy.finish()
        torch.testing.assert_close(logprobs(model, (5, 6), (7, 8, 9)), before, rtol=1e-4, atol=1e-4)
    assert type(model) is type(tiny)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    start, after = tiny.state_dict(), model.state_dict()
    assert {n for n in start if not torch.equal(start[n], after[n])} == {n for n in start if n.endswith("proj.weight")}


@pytest.mark.parametrize("adapters", [False, True])
def test_gradient_checkpointing_changes_nothing(tiny, tmp_path, adapters):
    found = []
    for checkpointing in (False, True):
        config = TrainingConfig(gradient_checkpointing=checkpointing)
        model = spread(with_adapter(copy.deepcopy(tiny), LORA)) if adapters else copy.deepcopy(tiny)
        objectives = {"distill": SelfDistillation(DistillConfig())}
        found.append(run(model, [{"distill": group(4, teacher=9)}] * 2, objectives, tmp_path / str(checkpointing), config))
    assert found[1][0][0] == pytest.approx(found[0][0][0], rel=1e-4)
    assert_near(weights(found[1][1]), weights(found[0][1]), 1e-4)
    finished = found[1][1]
    assert not finished.is_gradient_checkpointing
    assert not finished.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("objective", [grpo(kl_coefficient=0.1), Sft(), Hindsight(1.0)], ids=lambda one: type(one).__name__)
def test_mixed_precision_computes_in_bfloat16_and_trains_every_weight(tiny, objective):
    samples = group(4, teacher=9)
    exact = gradients(tiny, samples, objective)
    loss, found, _ = gradients(tiny, samples, objective, dtype=torch.bfloat16)
    assert loss == pytest.approx(exact[0], rel=0.05, abs=0.05)
    assert found.keys() == exact[1].keys()
    assert all(gradient.dtype is torch.float32 and gradient.abs().sum() > 0 for gradient in found.values())
    assert_near(found, exact[1], 0.1)
    assert any(not torch.equal(found[name], exact[1][name]) for name in found)


def test_packed_training_gives_the_weights_of_padded_training(tiny, tmp_path, descent):
    found = [
        run(copy.deepcopy(tiny), [mixed_step()], mixed(), tmp_path / str(packed), packed=packed, learning_rate=1.0)
        for packed in (False, True)
    ]
    assert found[1][0][0] == pytest.approx(found[0][0][0], rel=1e-4, abs=1e-6)
    assert_near(moved(found[1][1], weights(tiny)), moved(found[0][1], weights(tiny)), 1e-4)


def test_a_model_that_does_not_pack_trains_padded(tmp_path, descent):
    """The border of a packed row would be seen by its convolution."""
    model = opinionated(lfm2_policy().model)
    start = weights(model)
    alone = [{"sft": [s]} for s in group(3)]
    expected: dict[str, torch.Tensor] = {}
    for step in alone:
        _, gradient, _ = gradients(model, step["sft"], Sft())
        count = len(step["sft"][0].positions) / sum(len(one["sft"][0].positions) for one in alone)
        expected = {name: expected.get(name, 0) + count * value for name, value in gradient.items()}
    config = TrainingConfig(max_grad_norm=float("inf"))
    _, trained = run(model, [{"sft": group(3)}], {"sft": Sft()}, tmp_path, config, learning_rate=1.0)
    change = moved(trained, start)
    assert_near({n: change[n] for n in expected}, {n: -g for n, g in expected.items()}, 1e-4)


def test_the_same_seed_gives_the_same_weights_to_the_bit(tiny, tmp_path):
    results = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(0)  # of the adapters' start; the stages' runner does it
        model = spread(with_adapter(copy.deepcopy(tiny), DROPPING))
        torch.manual_seed(ord(name))  # whatever state the loop finds
        results.append(run(model, [{"grpo": group()}] * 2, {"grpo": grpo()}, tmp_path / name, seed=seed))
    assert results[0][0] == results[1][0]
    assert equal(weights(results[0][1]), weights(results[1][1]))
    assert not equal(weights(results[0][1]), weights(results[2][1]))


def test_each_step_is_recorded_tracked_and_shown_and_nothing_is_printed(tiny, tmp_path, capfd):
    shown, tracked = [], []
    context = StageContext(
        tmp_path, progress=lambda *args: shown.append(args), track=lambda step, figures: tracked.append((step, figures))
    )
    policy = TrainedPolicy(copy.deepcopy(tiny), TrainingConfig(), frozen_start=False)
    source = ListSource([{"grpo": group()}, {"grpo": group(first=10)}])
    records = train(policy, source, {"grpo": grpo()}, TrainingConfig(), Schedule(2, 1e-3), context, headline="asked")
    assert [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()] == records
    assert list(records[0]) == ["step", "asked", "loss", "entropy", "grad_norm", "learning_rate", "seconds"]
    assert [(r["step"], r["asked"], r["learning_rate"]) for r in records] == [(1, 0.0, 1e-3), (2, 1.0, 1e-3)]
    assert shown == [(1, 2, "asked 0"), (2, 2, "asked 1")]
    assert [step for step, _ in tracked] == [1, 2]
    assert tracked[0][1] == {key: value for key, value in records[0].items() if key not in ("step", "seconds")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["steps.jsonl"]
    assert capfd.readouterr() == ("", "")
