"""The training loop. Cold start, GRPO, distillation and fine-tuning differ only in their source and objectives.

A step gets samples from its source and makes one or several optimizer updates from them (mini-batches, epochs). An update runs
in micro-batches; their losses sum to the update's loss, independent of their number and the number of ranks.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from search_e1.config import TrainingConfig
from search_e1.errors import TrainingError
from search_e1.runs import ranks
from search_e1.runs.context import StageContext
from search_e1.training import memory
from search_e1.training.batch import Batch, make_batch, micro_batches, normalized_weights
from search_e1.training.checkpoint import TrainingState, Unfinished
from search_e1.training.fit import fit_passes
from search_e1.training.guard import Guard
from search_e1.training.objectives.base import Objective
from search_e1.training.optimizer import make_optimizers, rate
from search_e1.training.record import Passes, StepLog
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Sample

BAD_BATCH = "bad_batch.pt"


class Source(Protocol):
    """Supplies the samples of each step."""

    figures: Mapping[str, float]
    """Figures of the latest step requested."""

    def next(self, step: int) -> Mapping[str, Sequence[Sample]]:
        """This rank's samples of ``step`` (from 0), by the name of their objective."""
        ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """Number of steps and updates, and the learning rate."""

    steps: int
    learning_rate: float
    mini_batches: int = 1
    """Updates per epoch: a step's samples are divided among them."""
    epochs: int = 1
    """Passes over a step's samples."""

    @property
    def updates(self) -> int:
        """Optimizer updates per step."""
        return self.mini_batches * self.epochs


def train(
    policy: TrainedPolicy,
    source: Source,
    objectives: Mapping[str, Objective],
    config: TrainingConfig,
    schedule: Schedule,
    context: StageContext,
    *,
    headline: str = "loss",
    guard: Guard | None = None,
) -> list[dict[str, float]]:
    """Train ``policy`` in place; writes one line per step to ``steps.jsonl``. Resumes bit for bit from the latest checkpoint.

    ``headline``: the figure that progress shows. ``guard``: stops training after a collapse and restores the best weights.

    Returns:
        The records of all steps.

    Raises:
        Stopped: a signal requested a stop; the passes so far are saved.
        TrainingError: a loss or gradient is not finite (``bad_batch.pt`` holds the batch), or one sample exceeds the memory.
    """
    torch.manual_seed(context.seed)  # dropout
    optimizers = make_optimizers(policy.model, config, schedule.learning_rate)
    updates = schedule.steps * schedule.updates
    schedules = [LambdaLR(o, lambda update: rate(update, updates, config)) for o in optimizers]
    state = TrainingState(policy, optimizers, schedules, guard)
    records, unfinished = state.restore(context.checkpointer.newest())
    log = StepLog(context, records, schedule.steps, headline)
    policy.model.train()
    with context.checkpointer.finishing():
        for step in range(len(log.steps), schedule.steps):
            if guard and guard.collapsed(log.steps):
                break
            clock = time.perf_counter()
            if unfinished is None:
                with context.checkpointer.saving_on_stop(step, lambda to: state.save(to, log.steps, None)):
                    samples = {name: list(part) for name, part in source.next(step).items()}
                    fit_passes(policy, samples)
                    samples = {name: list(objectives[name].prepare(policy, part)) for name, part in samples.items()}
                unfinished = Unfinished(samples, source_figures=dict(source.figures))
            if guard and not unfinished.update:  # also for an interrupted step: the checkpoint may be from before
                guard.before_update(policy, [*log.steps, unfinished.source_figures])
            passes = log.passes(clock, schedule.updates)
            current = _Step(policy, objectives, config, state, log, context, step, unfinished, passes)
            for update in range(unfinished.update, schedule.updates):
                current.accumulate(_mini_batch(unfinished.samples, update % schedule.mini_batches, schedule.mini_batches))
                norm = current.gradient_norm()
                for optimizer, scheduler in zip(optimizers, schedules, strict=True):
                    used = float(scheduler.get_last_lr()[0])
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
                unfinished.update, unfinished.passes = update + 1, 0
            log.add(
                {**unfinished.source_figures, **current.figures(schedule.updates), "grad_norm": norm, "learning_rate": used}
            )
            unfinished = None
            context.checkpointer.on_step_end(len(log.steps), lambda to: state.save(to, log.steps, None))
    if guard and guard.collapsed(log.steps):
        guard.restore(policy)
    return log.steps


def _mini_batch(samples: Mapping[str, Sequence[Sample]], part: int, parts: int) -> dict[str, Sequence[Sample]]:
    """Part ``part`` of ``parts`` equal parts of each objective's samples, in order, so that most groups stay together."""
    cut = {name: [len(own) * i // parts for i in (part, part + 1)] for name, own in samples.items()}
    return {name: own[slice(*cut[name])] for name, own in samples.items()}


@dataclass(slots=True)
class _Step:
    """The current step."""

    policy: TrainedPolicy
    objectives: Mapping[str, Objective]
    config: TrainingConfig
    state: TrainingState
    log: StepLog
    context: StageContext
    number: int
    unfinished: Unfinished
    passes: Passes
    pending: list[tuple[str, Tensor]] = field(default_factory=list)
    """Figures still on the device: one transfer per pass would stall it."""

    def accumulate(self, samples: Mapping[str, Sequence[Sample]]) -> None:
        """Run the forward and backward passes of one update. If memory runs out, restart the update with halved passes."""
        while True:
            size = self.policy.micro_batch_tokens >> self.unfinished.halvings
            if not self.unfinished.passes:
                self.unfinished.sums_before = dict(self.unfinished.sums)
            try:
                self._passes(list(self._batches(samples, size)))
                return
            except (RuntimeError, MemoryError) as error:
                if not memory.ran_out(error) or ranks.count() > 1:
                    raise
            memory.release()
            self.policy.model.zero_grad()
            if size < min(len(s) for part in samples.values() for s in part):
                if self.config.gradient_checkpointing is None and not self.policy.checkpointing:
                    self.policy.enable_checkpointing()
                    self._restart_update(0)
                    continue
                raise TrainingError(
                    f"step {self.number + 1}: out of memory for a single sequence; lower rollout.max_tokens, set "
                    "training.gradient_checkpointing, or use a smaller policy"
                )
            longest = max(len(s) for part in samples.values() for s in part) * max(map(len, samples.values()))
            while self.policy.micro_batch_tokens >> self.unfinished.halvings > longest:
                self.unfinished.halvings += 1  # halving a limit above the longest pass changes nothing
            self._restart_update(self.unfinished.halvings + 1)

    def _restart_update(self, halvings: int) -> None:
        self.unfinished.halvings, before = halvings, self.unfinished.sums_before
        self.unfinished.sums, self.unfinished.passes = {**before, "halved": before.get("halved", 0.0) + 1}, 0
        self.pending.clear()

    def _batches(self, samples: Mapping[str, Sequence[Sample]], size: int) -> Iterator[tuple[str, Batch]]:
        """The micro-batches of an update, of about as many tokens on each rank.

        All ranks get the same number: short ranks are filled up with zero-weight ones.
        """
        for name, part in samples.items():
            objective = self.objectives[name]
            weights = normalized_weights(part, objective.average, ranks.total, objective.max_tokens)
            taught = [(s, w) for s, w in zip(part, weights, strict=True) if objective.teaches(s)]
            taught = ranks.leveled(taught, [len(s) for s, _ in taught])  # ranks have unequal numbers of groups that teach
            groups = list(micro_batches([s for s, _ in taught], size, packed=self.policy.packed))
            batches = [[taught[i] for i in group] for group in groups]
            if ranks.count() > 1:
                most = max(ranks.all_gather_object(len(batches)))
                fillers = [f for f in ranks.all_gather_object(taught[:1]) if f]
                batches += [[(s, [0.0] * len(w)) for s, w in fillers[0]]] * (most - len(batches)) if fillers else []
            for batch in batches:
                yield name, make_batch([s for s, _ in batch], [w for _, w in batch], packed=self.policy.packed)

    def _passes(self, batches: Sequence[tuple[str, Batch]]) -> None:
        losses: list[Tensor] = []
        done = self.unfinished.passes
        for i, (name, batch) in enumerate(batches[done:], done):
            objective, last = self.objectives[name], i + 1 == len(batches)
            with self.policy.accumulating(last):
                loss, figures = self.policy.run(batch, objective.loss, objective.teacher)
                # Gradients are averaged over ranks, but each rank's loss is only its share of the update's.
                (loss * (objective.weight * ranks.count())).backward()
            losses.append(loss.detach() * objective.weight)
            prefix = "" if name == next(iter(self.objectives)) else f"{name}_"
            self.pending += [("loss", losses[-1]), (f"weight/{prefix}", batch.weights.sum())]
            self.pending += [(prefix + key, value) for key, value in figures.items()]
            self.unfinished.passes = i + 1
            if not last:
                self.passes.tell(self.unfinished.update, i + 1, len(batches))
                self.context.checkpointer.between_passes(self.number, self._save, same=not self.unfinished.update)
        for weight in () if batches else self.policy.parameters.values():
            weight.grad = torch.zeros_like(weight)  # no micro-batch, so no gradient
        finite = torch.isfinite(torch.stack(losses)).tolist() if losses else []
        if not all(finite):
            bad = finite.index(False)
            raise self._failure(f"the loss is {losses[bad].item()}", batches[done + bad][1])
        self._sum_up()

    def _sum_up(self) -> None:
        """Add the pending figures to the sums, in a single device transfer."""
        if not self.pending:
            return
        values = torch.stack([value.detach().to(self.policy.device) for _, value in self.pending]).tolist()
        for (key, _), value in zip(self.pending, values, strict=True):
            self.unfinished.sums[key] = self.unfinished.sums.get(key, 0.0) + value
        self.pending.clear()

    def figures(self, updates: int) -> dict[str, float]:
        """The step's figures over all ranks: the loss averaged over updates, the objectives' figures as weighted means."""
        sums: dict[str, float] = {"loss": 0.0}
        for own in ranks.all_gather_object(self.unfinished.sums):
            for key, value in own.items():
                sums[key] = sums.get(key, 0.0) + value
        totals = {key.removeprefix("weight/"): sums.pop(key) for key in list(sums) if key.startswith("weight/")}
        means = {}
        for key, value in sums.items():
            prefix = max((p for p in totals if p and key.startswith(p)), key=len, default="")
            means[key] = value if key in ("loss", "halved") or not totals.get(prefix) else value / totals[prefix]
        return {**means, "loss": sums["loss"] / updates}

    def gradient_norm(self) -> float:
        """Clip the gradient; returns its norm before clipping.

        Raises:
            TrainingError: the norm is not finite.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters.values(), self.config.max_grad_norm)
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(value):
            raise self._failure(f"the gradient's norm is {value}", None)
        return value

    def _save(self, directory: Path) -> None:
        self._sum_up()
        self.state.save(directory, self.log.steps, self.unfinished)

    def _failure(self, what: str, batch: Batch | None) -> TrainingError:
        self.policy.model.zero_grad()
        samples = {name: [s.model_dump() for s in part] for name, part in self.unfinished.samples.items()}
        path = self.context.out / BAD_BATCH
        if not ranks.is_first():  # a gradient's norm is the same on all ranks, which have samples of their own
            path = path.with_stem(f"{path.stem}-{ranks.rank()}")
        torch.save({"step": self.number, "samples": samples, "batch": batch}, path)
        return TrainingError(
            f"step {self.number + 1}: {what}; the batch is in {path}; lower the learning rate, or set policy.dtype to float32"
        )
