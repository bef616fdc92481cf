"""An objective from outside the package: registered by name, or named as module:attribute."""

import copy

import pytest
import torch

from conftest import make_tiny_policy
from search_e1.errors import ConfigError
from search_e1.training.logprobs import fused_token_loss
from search_e1.training.objectives import objectives, open_objective
from search_e1.training.objectives.base import BaseObjective
from trained import config_of, opinionated, run, sample, token_logprobs, weights


class Toy(BaseObjective):
    """Unlikelihood (arXiv:1908.04319): ``-log(1 - p)`` of what was sampled, each sample's mean first."""

    average = "sequences"

    def loss(self, states, batch):
        loss, tokens = fused_token_loss(
            states.hidden, batch.targets, states.head, lambda logp, _: -torch.log1p(-logp.exp()), weights=batch.weights
        )
        return loss, {"probability": (tokens.logprobs.exp() * batch.weights).sum()}


def toy(config):
    return Toy()


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(objectives, "_entries", dict(objectives._entries))
    objectives.register("toy")(toy)


@pytest.mark.parametrize("name", ["toy", "test_toy_objective:toy"])
def test_it_trains_through_the_loop(registered, tmp_path, name):
    config = config_of(tmp_path, grpo={"objective": name})
    objective = open_objective(config.grpo.objective, "grpo.objective", config)
    start = opinionated(make_tiny_policy().model)
    samples = [sample(i, 5, 8 + 4 * i) for i in range(3)]
    with torch.no_grad():
        p = [token_logprobs(start, s).exp()[list(s.positions)] for s in samples]
    records, trained = run(
        copy.deepcopy(start), [{"toy": samples}] * 20, {"toy": objective}, tmp_path / "out", learning_rate=1e-2
    )
    assert records[0]["loss"] == pytest.approx(torch.stack([-(1 - one).log().mean() for one in p]).mean().item(), rel=1e-4)
    assert records[0]["probability"] == pytest.approx(torch.stack([one.mean() for one in p]).mean().item(), rel=1e-4)
    assert records[-1]["probability"] < 0.2 * records[0]["probability"]
    assert not torch.equal(weights(trained)["model.norm.weight"], start.model.norm.weight)


def test_an_unknown_name_is_refused_in_one_line_with_the_nearest(registered, tmp_path):
    config = config_of(tmp_path)
    for name, says in (("toyy", "did you mean 'toy'?"), ("gpro", "did you mean 'grpo'?")):
        with pytest.raises(ConfigError, match=f"grpo.objective = '{name}': no such objective; ") as refusal:
            open_objective(name, "grpo.objective", config)
        assert says in str(refusal.value)
        assert "\n" not in str(refusal.value)
