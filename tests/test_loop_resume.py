"""Training that is killed or stopped anywhere ends, after it is resumed, with the weights and records of one that was not."""

import copy
import signal
from typing import Any

import pytest
import torch

from conftest import make_tiny_policy
from search_e1.config import DistillConfig, LoraConfig, TrainingConfig
from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.stopping import Stopped
from search_e1.training.objectives.self_distillation import SelfDistillation
from search_e1.training.objectives.sft import Sft
from search_e1.training.policy import with_adapter
from test_loop import FULL, group, mixed, mixed_step
from trained import ListSource, equal, opinionated, run, sample, weights

STEPS = [mixed_step(100 * i) for i in range(3)]
CONFIG = TrainingConfig(micro_batch_tokens=40, schedule="cosine", warmup=0.3, weight_decay=0.1)
SCHEDULE = dict(mini_batches=2, epochs=2, learning_rate=3e-3)
DROPPING = LoraConfig(rank=4, alpha=8, dropout=0.2)


def model_of(adapters: bool) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = opinionated(make_tiny_policy().model)
        return with_adapter(model, DROPPING) if adapters else model


def objectives() -> dict[str, Any]:
    return mixed(mini_batches=2, epochs=2, clip_low=0.05, clip_high=0.05)


def saving(directory) -> Checkpointer:
    """Saves after each step."""
    return Checkpointer(directory, every_seconds=0, share=1e9)


@pytest.fixture(scope="module", params=[("muon", False), ("adamw", True)], ids=str)
def setting(request, tmp_path_factory):
    """Config, whether adapters are trained, and the uninterrupted run: records, weights."""
    optimizer, adapters = request.param
    config = CONFIG.model_copy(update={"optimizer": optimizer})
    records, model = run(model_of(adapters), STEPS, objectives(), tmp_path_factory.mktemp("whole"), config, **SCHEDULE)
    return config, adapters, records, weights(model)


class Killed(BaseException):
    pass


class Deadly(ListSource):
    """Dies when it is asked for a step."""

    def __init__(self, steps, at: int) -> None:
        super().__init__(steps)
        self.at = at

    def next(self, step):
        if step == self.at:
            raise Killed
        return super().next(step)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_killed_before_any_step(setting, tmp_path, at):
    config, adapters, records, expected = setting
    with pytest.raises(Killed):
        run(model_of(adapters), STEPS, objectives(), tmp_path, config, checkpointer=saving(tmp_path / "kept"),
            source=Deadly(STEPS, at), **SCHEDULE)  # fmt: skip
    torch.manual_seed(99)  # a process of its own
    source = ListSource(STEPS)
    found, model = run(model_of(adapters), STEPS, objectives(), tmp_path, config, checkpointer=saving(tmp_path / "kept"),
                       source=source, **SCHEDULE)  # fmt: skip
    assert source.asked == list(range(at, 3))
    assert found == records
    assert equal(weights(model), expected)
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 3


class Stopping(Sft):
    """Asks to stop in its n-th pass, as a signal would."""

    def __init__(self, weight: float, checkpointer: Checkpointer, at: int) -> None:
        super().__init__(weight)
        self.checkpointer, self.left = checkpointer, at

    def loss(self, states, batch):
        self.left -= 1
        if not self.left:
            self.checkpointer.stop.asked = signal.SIGTERM
        return super().loss(states, batch)


@pytest.mark.parametrize("at", [1, 3, 6])
def test_stopped_within_a_step(setting, tmp_path, at):
    """Passes 1 to 4 over replayed samples are the first step's, one in each of its four updates; 6 is the second's second."""
    config, adapters, records, expected = setting
    first = saving(tmp_path / "kept")
    stopping = objectives() | {"replay": Stopping(0.5, first, at)}
    source = ListSource(STEPS)
    with pytest.raises(Stopped):
        run(model_of(adapters), STEPS, stopping, tmp_path, config, checkpointer=first, source=source, **SCHEDULE)
    again = ListSource(STEPS)
    torch.manual_seed(99)
    found, model = run(model_of(adapters), STEPS, objectives(), tmp_path, config, checkpointer=saving(tmp_path / "kept"),
                       source=again, **SCHEDULE)  # fmt: skip
    assert source.asked + again.asked == [0, 1, 2]  # the step at hand is not sampled again
    assert found == records
    assert equal(weights(model), expected)


def test_stopped_between_two_passes_of_one_update(tmp_path):
    """Gradients of the first passes are part of the checkpoint, figures too; a frozen teacher is the start's."""
    steps = [{"distill": group(3, teacher=9, first=10 * i)} for i in range(2)]
    config = TrainingConfig(micro_batch_tokens=1)
    make = {"distill": SelfDistillation(DistillConfig())}
    start = opinionated(make_tiny_policy().model)
    records, expected = run(copy.deepcopy(start), steps, make, tmp_path / "whole", config)
    for at in range(1, 6):
        out = tmp_path / str(at)
        first = Checkpointer(out / "kept")

        class Stops(SelfDistillation):
            left, checkpointer = at, first

            def loss(self, states, batch):
                self.left -= 1
                if not self.left:
                    self.checkpointer.stop.asked = signal.SIGINT
                return super().loss(states, batch)

        with pytest.raises(Stopped):
            run(copy.deepcopy(start), steps, {"distill": Stops(DistillConfig())}, out, config, checkpointer=first)
        found, model = run(copy.deepcopy(start), steps, make, out, config, checkpointer=Checkpointer(out / "kept"))
        assert found == records
        assert equal(weights(model), weights(expected))


def test_stopped_after_the_last_step_nothing_is_left_to_do(tmp_path):
    first = Checkpointer(tmp_path / "kept")
    steps = [{"sft": [sample(1)]}] * 2
    start = make_tiny_policy().model
    with pytest.raises(Stopped):
        run(copy.deepcopy(start), steps, {"sft": Stopping(1.0, first, 2)}, tmp_path, checkpointer=first)
    source = ListSource(steps)
    found, model = run(copy.deepcopy(start), steps, {"sft": Sft()}, tmp_path, source=source,
                       checkpointer=Checkpointer(tmp_path / "kept"))  # fmt: skip
    assert source.asked == []
    records, expected = run(start, steps, {"sft": Sft()}, tmp_path / "whole")
    assert found == records
    assert equal(weights(model), weights(expected))


def test_a_second_signal_while_it_samples_saves_the_steps_before(tmp_path):
    class Interrupted(ListSource):
        def next(self, step):
            if step == 2:
                raise Stopped(signal.SIGTERM)
            return super().next(step)

    steps = [{"sft": [sample(i)]} for i in range(3)]
    start = make_tiny_policy().model
    with pytest.raises(Stopped):
        run(copy.deepcopy(start), steps, {"sft": Sft()}, tmp_path, source=Interrupted(steps),
            checkpointer=Checkpointer(tmp_path / "kept"))  # fmt: skip
    source = ListSource(steps)
    found, model = run(copy.deepcopy(start), steps, {"sft": Sft()}, tmp_path, source=source,
                       checkpointer=Checkpointer(tmp_path / "kept"))  # fmt: skip
    assert source.asked == [2]
    records, expected = run(start, steps, {"sft": Sft()}, tmp_path / "whole")
    assert found == records
    assert equal(weights(model), weights(expected))


def test_memory_that_runs_out_after_a_resume_counts_no_pass_twice(tmp_path):
    """The update begins anew, without the figures and gradients of its passes before the stop."""
    steps = [{"sft": [sample(i, 5, 14 - i) for i in range(4)]}]
    config = TrainingConfig(micro_batch_tokens=40)  # two passes of two rows, halved: four of one
    start = make_tiny_policy().model
    (record,), expected = run(copy.deepcopy(start), steps, {"sft": Sft()}, tmp_path / "whole", config)
    first = Checkpointer(tmp_path / "kept")
    with pytest.raises(Stopped):
        run(copy.deepcopy(start), steps, {"sft": Stopping(1.0, first, 1)}, tmp_path, config, checkpointer=first)

    class Full(Sft):
        def loss(self, states, batch):
            if len(batch.student.input_ids) > 1:
                raise torch.OutOfMemoryError(FULL)
            return super().loss(states, batch)

    (found,), model = run(copy.deepcopy(start), steps, {"sft": Full()}, tmp_path, config,
                          checkpointer=Checkpointer(tmp_path / "kept"))  # fmt: skip
    assert found.pop("halved") == 1
    assert found == pytest.approx(record, rel=1e-5)
    for name, weight in weights(expected).items():
        torch.testing.assert_close(weights(model)[name], weight, rtol=1e-2, atol=1e-4)


def test_a_checkpoint_of_another_policy_is_refused(tmp_path):
    steps = [{"grpo": group()}] * 2
    objective = {"grpo": mixed()["grpo"]}
    with pytest.raises(Killed):
        run(model_of(False), steps, objective, tmp_path, checkpointer=saving(tmp_path / "kept"), source=Deadly(steps, 1))
    wider = opinionated(make_tiny_policy().model)
    wider.resize_token_embeddings(300)
    for other in (model_of(True), wider):
        before = weights(other)
        with pytest.raises(AssertionError, match="the checkpoint is of another policy"):
            run(other, steps, objective, tmp_path, checkpointer=saving(tmp_path / "kept"))
        assert equal(weights(other), before)
