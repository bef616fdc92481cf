"""What tests of the training loop share: samples, a source that is a list, and one call that trains."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from search_e1.config import Config, GrpoConfig, TrainingConfig
from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.context import StageContext
from search_e1.training.batch import make_batch, normalized_weights
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives.base import Objective
from search_e1.training.objectives.grpo import Grpo
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Sample

Steps = Sequence[Mapping[str, Sequence[Sample]]]

MASK = (1, 1, 1, 0, 0, 0, 1, 1)
"""A search of 3 ids, what came back, an answer of 2; longer ones repeat it."""
CONFIG = TrainingConfig()
GRPO = GrpoConfig(mini_batches=1)


def sample(seed: int, prompt: int = 5, response: int = 8, *, teacher: int = 0, **fields: Any) -> Sample:
    """Random ids of these lengths. ``teacher``: length of the teacher's prompt; ``advantage``: of all tokens."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(0, 256, (count,), generator=draw).tolist()

    mask = (MASK * (response // len(MASK) + 1))[:response]
    if "advantage" in fields:
        fields["advantages"] = (fields.pop("advantage"),) * response
    return Sample(
        **{
            "question_id": f"q{seed}",
            "prompt_ids": ids(prompt),
            "response_ids": ids(response),
            "action_mask": mask,
            "teacher_prompt_ids": ids(teacher) if teacher else None,
            **fields,
        }
    )


def opinionated(model: Any, factor: float = 3.0) -> Any:
    """The same model with larger matrices: far from uniform, so that contexts matter and the clip can bind."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(factor)
    return model


class ListSource:
    """The samples of each step."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.figures, self.asked = steps, {}, []

    def next(self, step: int) -> Mapping[str, Sequence[Sample]]:
        self.asked.append(step)
        self.figures = {"asked": float(step)}
        return self.steps[step]


def run(
    model: Any,
    steps: Steps,
    objectives: Mapping[str, Objective],
    out: Path,
    config: TrainingConfig = CONFIG,
    *,
    seed: int = 0,
    checkpointer: Checkpointer | None = None,
    packed: bool | None = None,
    source: ListSource | None = None,
    frozen_start: bool | None = None,
    dtype: torch.dtype = torch.float32,
    **schedule: Any,
) -> tuple[list[dict[str, float]], Any]:
    """Train ``model`` (it is changed); the records without their seconds, and the finished model."""
    out.mkdir(exist_ok=True, parents=True)
    if frozen_start is None:
        frozen_start = any(objective.needs_start for objective in objectives.values())
    policy = TrainedPolicy(model, config, frozen_start=frozen_start, dtype=dtype)
    policy.packed = policy.packed if packed is None else packed
    context = StageContext(out, seed=seed, checkpointer=checkpointer or Checkpointer())
    schedule = {"learning_rate": 1e-3, **schedule}
    records = train(policy, source or ListSource(steps), objectives, config, Schedule(len(steps), **schedule), context)
    assert all(record["seconds"] >= 0 for record in records)
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records], policy.finish()


def gradients(
    model: Any,
    samples: Sequence[Sample],
    objective: Objective,
    config: TrainingConfig = CONFIG,
    *,
    packed: bool = False,
    prepared: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, gradients by name and figures of one pass over ``samples`` with a copy of ``model``, without the loop.

    ``prepared``: the samples have all that the objective needs.
    """
    policy = TrainedPolicy(copy.deepcopy(model), config, frozen_start=objective.needs_start, dtype=dtype)
    if not prepared:
        samples = list(objective.prepare(policy, samples))
    policy.model.train()
    weights = normalized_weights(samples, objective.average, lambda own: own, objective.max_tokens)
    loss, figures = policy.run(make_batch(samples, weights, packed=packed), objective.loss, objective.teacher)
    (loss * objective.weight).backward()
    found = {name: weight.grad for name, weight in policy.parameters.items() if weight.grad is not None}
    return loss.item(), found, {name: value.item() for name, value in figures.items()}


def grpo(max_tokens: int = 100, **changes: Any) -> Grpo:
    return Grpo(GRPO.model_copy(update=changes), max_tokens)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """To the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_near(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` of the norm of all of ``b`` together."""
    assert a.keys() == b.keys()
    difference = torch.stack([(a[name].double() - b[name].double()).norm() for name in b]).norm()
    whole = torch.stack([b[name].double().norm() for name in b]).norm()
    assert difference <= tolerance * whole, f"{difference / whole:.2e} of the norm"


def logprobs(model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """[response, V]: log-probabilities by plain torch, one sequence at a time."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)


def token_logprobs(model: Any, s: Sample, temperature: float = 1.0) -> torch.Tensor:
    """[response]"""
    return logprobs(model, s.prompt_ids, s.response_ids, temperature).gather(1, torch.tensor(s.response_ids)[:, None])[:, 0]


def config_of(tmp_path: Path, **sections: Any) -> Config:
    """A run's config whose files are not there."""
    needed = {
        "run": tmp_path / "run",
        "policy": {"model": "small", "device": "cpu"},
        "data": {
            "train": [tmp_path / "questions.jsonl"],
            "eval": {"dev": tmp_path / "dev.jsonl"},
            "corpus": tmp_path / "corpus.jsonl",
        },
    }
    return Config.model_validate(needed | sections)
