"""Supervised fine-tuning on demonstrations: how a policy learns the protocol before it learns from rewards."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from search_e1.errors import DataError, TrainingError
from search_e1.runs.checkpoints import Work
from search_e1.runs.progress import Progress, Track, silent, untracked
from search_e1.training import memory
from search_e1.training.policy import Policy
from search_e1.training.resuming import load_trained, save_trained

_WARM_UP = 0.05  # share of the steps over which the learning rate rises; it then falls linearly to zero
_MAX_NORM = 1.0
_STATE = "state.pt"


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and a response to imitate, laid out as a ``Trajectory`` is: ids of actions and observations.

    ``action_mask`` is as long as ``response_ids``: 1 where the policy is to imitate the id, 0 where it is only read
    (observations, and turns that the policy is to go on from but not to imitate).

    Raises:
        DataError: lengths differ, the mask holds something else than 0 and 1 or no 1 at all, or the prompt is empty.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    action_mask: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.action_mask) != len(self.response_ids):
            raise DataError(
                f"a demonstration with {len(self.response_ids)} response_ids and {len(self.action_mask)} entries of "
                "action_mask; give one entry for each id"
            )
        if set(self.action_mask) - {0, 1} or 1 not in self.action_mask:
            raise DataError("a demonstration's action_mask must hold 0 and 1 only, and at least one 1")
        if not self.prompt_ids:
            raise DataError("a demonstration without a prompt; the first response id has nothing to be predicted from")

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def train(
    policy: Policy,
    demonstrations: Iterator[list[Demonstration]],
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    pass_tokens: int = 16_384,
    progress: Progress = silent,
    track: Track = untracked,
    work: Work | None = None,
) -> list[float]:
    """Train all weights of ``policy`` in place; returns the loss of each step.

    With the same arguments and a ``work`` that was begun, training goes on from its newest checkpoint and ends as if it had
    never been interrupted.

    The loss is the cross-entropy (nats) of the ids under ``action_mask`` 1, averaged over all of them in a batch.
    Matrices inside the layers are optimised by Muon, the rest (embeddings, norms, convolutions) by AdamW; Muon's update is
    scaled to AdamW's root mean square, so that both share ``learning_rate``.

    Args:
        demonstrations: one list an optimiser step; nothing after ``steps`` lists is drawn.
        pass_tokens: most ids, padding included, that go through the model at a time; bounds memory, not the result. It is
            halved for a batch for which memory does not suffice; ``track`` is told how often.

    Raises:
        DataError: too few batches, an empty one, or a demonstration that is longer than the model's context.
        Stopped: a signal has asked to stop.
        TrainingError: the loss or its gradient is not finite; the weights are those before that step.
    """
    work = work or Work()
    model = policy.model
    torch.manual_seed(seed)  # dropout, where the model has it
    optimizers = _optimizers(model, learning_rate)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, steps)) for o in optimizers]
    was_training = model.training
    model.train()
    state = _State(model, optimizers, schedules)
    losses = state.restore(work.newest())
    for step, loss in enumerate(losses, 1):
        track(step, {"loss": loss})
    try:
        with work.finishing():
            for batch in itertools.islice(demonstrations, len(losses), steps):
                loss, halved = _fitting(model, batch, pass_tokens, len(losses) + 1)
                losses.append(loss)
                _clip(model, len(losses))
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                track(len(losses), {"loss": losses[-1], **({"halved": halved} if halved else {})})
                progress(len(losses), steps, f"loss {losses[-1]:.3f}")
                work.reached(len(losses), lambda directory: state.save(directory, losses))
    finally:
        model.train(was_training)
    if len(losses) < steps:
        raise DataError(f"demonstrations ran out after {len(losses)} of {steps} steps; give more, or train fewer steps")
    return losses


@dataclass(frozen=True, slots=True)
class _State:
    """All that a step depends on, beside its demonstrations."""

    model: PreTrainedModel
    optimizers: Sequence[torch.optim.Optimizer]
    schedules: Sequence[torch.optim.lr_scheduler.LambdaLR]

    def save(self, directory: Path, losses: Sequence[float]) -> None:
        save_trained(self.model, directory)
        state = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "losses": list(losses),
        }
        torch.save(state, directory / _STATE)

    def restore(self, directory: Path | None) -> list[float]:
        """The losses so far."""
        if directory is None:
            return []
        load_trained(self.model, directory)
        state = torch.load(directory / _STATE, weights_only=True, map_location="cpu")
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        return state["losses"]


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then linear decay."""
    warm_up = max(1, round(_WARM_UP * steps))
    return (step + 1) / warm_up if step < warm_up else max(0.0, (steps - step) / max(1, steps - warm_up))


def _optimizers(model: PreTrainedModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in ends]
    rest = [p for p in parameters if not (p.ndim == 2 and id(p) not in ends)]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(_Muon(matrices, {"lr": learning_rate}))
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0))
    return optimizers


def _fitting(model: PreTrainedModel, batch: Sequence[Demonstration], pass_tokens: int, step: int) -> tuple[float, int]:
    """``_accumulate`` with passes as small as memory asks for; the loss, and how often they were halved.

    Raises:
        TrainingError: a single demonstration does not fit.
    """
    whole = len(batch) * max(map(len, batch), default=0)
    size = min(pass_tokens, whole)  # half of more than there is would be the same pass again
    for halved in itertools.count():
        try:
            return _accumulate(model, batch, size >> halved, step), halved
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
        memory.give_back()
        model.zero_grad()  # a pass that failed may have left a part of its gradients
        if size >> halved < min(map(len, batch)):
            break
    raise TrainingError(
        f"step {step}: out of memory for a single demonstration; lower warmstart.hidden_size, .layers or .context_length"
    )


def _clip(model: PreTrainedModel, step: int) -> None:
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
    if not torch.isfinite(norm):
        model.zero_grad()
        raise TrainingError(f"the gradient's norm of step {step} is {norm.item()}; lower the learning rate")


def _accumulate(model: PreTrainedModel, batch: Sequence[Demonstration], pass_tokens: int, step: int) -> float:
    """Add the gradient of the batch's mean loss; returns that loss.

    Raises:
        TrainingError: the loss is not finite.
    """
    if not batch:
        raise DataError(f"batch {step} holds no demonstrations; every step needs at least one")
    context = model.config.get_text_config().max_position_embeddings
    if (longest := max(map(len, batch))) > context:
        raise DataError(f"a demonstration of {longest} tokens does not fit into the context of {context}; shorten it")
    targets = sum(sum(d.action_mask) for d in batch)
    total = 0.0
    for rows in _buckets(batch, pass_tokens):
        loss = _summed_loss(model, rows) / targets
        total += loss.item()
        if not math.isfinite(total):
            model.zero_grad()
            raise TrainingError(f"the loss of step {step} is {total}; lower the learning rate")
        loss.backward()
    return total


def _buckets(batch: Sequence[Demonstration], pass_tokens: int) -> Iterator[list[Demonstration]]:
    """The batch in parts of like length, each of at most ``pass_tokens`` ids when padded (or of one row)."""
    part: list[Demonstration] = []
    for row in sorted(batch, key=len, reverse=True):
        too_many = (len(part) + 1) * len(part[0]) > pass_tokens if part else False
        mostly_padding = len(part) >= 8 and len(row) < 0.75 * len(part[0])
        if too_many or mostly_padding:
            yield part
            part = []
        part.append(row)
    yield part


def _summed_loss(model: PreTrainedModel, rows: Sequence[Demonstration]) -> torch.Tensor:
    """Cross-entropy summed over the imitated ids of rows that fit through the model together."""
    width = max(map(len, rows))
    # Padding stands on the right, where no real position of a causal model looks: its id is never seen, and no
    # attention mask is needed, which keeps attention on its fast causal path.
    ids = torch.tensor([d.prompt_ids + d.response_ids + (0,) * (width - len(d)) for d in rows], device=model.device)
    imitated = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = len(row.prompt_ids)
        imitated[i, at : at + len(row.action_mask)] = torch.tensor(row.action_mask, dtype=torch.bool)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [rows, width, hidden]
    # Position t predicts id t + 1. Only those that are imitated are projected: most of the ids are prompt or passages.
    chosen = hidden[:, :-1][imitated[:, 1:]]
    logits = model.get_output_embeddings()(chosen).float()  # [imitated, vocabulary]
    return F.cross_entropy(logits, ids[:, 1:][imitated[:, 1:]], reduction="sum")


class _Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps (Jordan et al., 2024), scaled by 0.2 sqrt(max(n, m))
    to the root mean square of AdamW's (Liu et al., arXiv:2502.16982).

    ``torch.optim.Muon`` is the same but for the type it computes in: bfloat16, which many CPUs emulate, so that on them its
    step costs more than forward and backward pass of a small model together.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                gradient = parameter.grad.float()
                momentum = state.setdefault("momentum", torch.zeros_like(gradient)).lerp_(gradient, 0.05)
                update = _orthogonal(gradient.lerp(momentum, 0.95))  # Nesterov's
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Roughly the nearest matrix [n, m] whose singular values are all one (they end between 0.7 and 1.2)."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
