"""GRPO (DeepSeekMath, arXiv:2402.03300): group-relative advantages and the clipped policy-gradient loss."""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev, stdev

import torch
from torch import Tensor

from search_e1.config import GrpoConfig
from search_e1.training.batch import Batch
from search_e1.training.logprobs import fused_token_loss
from search_e1.training.objectives.base import BaseObjective
from search_e1.training.trained import States, TrainedPolicy
from search_e1.types import Sample, Trajectory

_AVERAGES = {"dapo": "tokens", "grpo": "sequences", "dr_grpo": "constant"}
_EPSILON = 1e-4  # added to the standard deviation, as in TRL


def advantages(rewards: Sequence[float], *, scaled: bool = True) -> list[float]:
    """Advantages of the trajectories of one group: reward minus the group's mean, over its standard deviation if ``scaled``.

    The deviation is the sample standard deviation (n - 1). A group with equal rewards has zero advantages and teaches nothing.
    """
    if min(rewards) == max(rewards):  # the mean may differ in its last bit, which Adam would scale up to a full step
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    deviation = stdev(rewards) + _EPSILON if scaled else 1.0
    return [(reward - mean) / deviation for reward in rewards]


def length_penalties(trajectories: Sequence[Trajectory], strength: float) -> list[float]:
    """Length penalties to add to the rewards of a group; between ``-strength`` and 0.

    After Arora and Zanette, "Training Language Models to Reason Efficiently" (arXiv:2502.04463): the reward of a correct
    trajectory is multiplied by ``1 - strength * sigmoid((length - mean) / deviation)``, with the mean and population standard
    deviation over the correct trajectories of its group; wrong ones keep their reward. Length is the number of sampled tokens,
    so observations cost nothing. If all correct trajectories are equally long, the sigmoid is taken at 0.
    """
    lengths = [t.sampled_tokens for t in trajectories if t.correct]
    if not lengths:
        return [0.0] * len(trajectories)
    mean, deviation = fmean(lengths), pstdev(lengths)

    def penalty(t: Trajectory) -> float:
        standing = (t.sampled_tokens - mean) / deviation if deviation else 0.0
        return -t.reward * strength / (1 + math.exp(-standing)) if t.correct else 0.0

    return [penalty(t) for t in trajectories]


class Grpo(BaseObjective):
    """The clipped policy-gradient loss with an optional KL penalty, for on-policy or slightly off-policy trajectories."""

    def __init__(self, config: GrpoConfig, max_tokens: int) -> None:
        """``max_tokens``: the trajectory length that ``average = "dr_grpo"`` divides by."""
        self.config, self.max_tokens = config, max_tokens
        self.average = _AVERAGES[config.average]
        self.needs_start = config.kl_coefficient > 0

    def prepare(self, policy: TrainedPolicy, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Add log-probabilities under the current policy if ratios need them, and under the KL penalty's reference policy."""
        config = self.config
        # An engine with other numerics returns its own log-probabilities, which tokens are reweighted by.
        reweighed = any(s.sampling_logprobs is not None for s in samples)
        if config.mini_batches * config.epochs > 1 or reweighed:
            old = policy.logprobs(samples, config.temperature)
            samples = [s.model_copy(update={"old_logprobs": row}) for s, row in zip(samples, old, strict=True)]
        if self.needs_start:
            anchored = [s.model_copy(update={"teacher_prompt_ids": s.prompt_ids}) for s in samples]
            rows = policy.logprobs(anchored, config.temperature, "start")
            samples = [s.model_copy(update={"ref_logprobs": row}) for s, row in zip(samples, rows, strict=True)]
        return samples

    def teaches(self, sample: Sample) -> bool:
        """Whether any token has an advantage; with a KL penalty every sample has a gradient."""
        return self.config.kl_coefficient > 0 or any(sample.advantages or ())

    def loss(self, states: States, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """``-min(r A, clip(r, 1 - low, 1 + high) A) + k KL`` per token, with r the ratio to the old policy (paper, eq. 3).

        The KL to the reference policy is estimated by ``exp(d) - d - 1``, with d the difference of log-probabilities (eq. 4).
        """
        config = self.config
        assert batch.advantages is not None
        gain = batch.advantages

        def token_loss(logprobs: Tensor, rows: slice) -> Tensor:
            old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs[rows]
            ratio = torch.exp(logprobs - old)
            clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            loss = -torch.minimum(ratio * gain[rows], clipped * gain[rows])
            if batch.sampling_logprobs is not None:
                loss = loss * torch.exp(old - batch.sampling_logprobs[rows]).clamp(max=config.importance_cap)
            if config.kl_coefficient:
                loss = loss + config.kl_coefficient * self._divergence(logprobs, batch, rows)
            return loss

        loss, tokens = fused_token_loss(
            states.hidden, batch.targets, states.head, token_loss,
            weights=batch.weights, temperature=config.temperature, logits_mib=config.training.logits_mib,
        )  # fmt: skip
        return loss, self._figures(tokens.logprobs, tokens.entropy, batch)

    @staticmethod
    def _divergence(logprobs: Tensor, batch: Batch, rows: slice) -> Tensor:
        assert batch.ref_logprobs is not None
        difference = batch.ref_logprobs[rows] - logprobs
        return torch.exp(difference) - difference - 1

    def _figures(self, logprobs: Tensor, entropy: Tensor, batch: Batch) -> dict[str, Tensor]:
        config, weights = self.config, batch.weights
        assert batch.advantages is not None
        figures = {"entropy": (entropy * weights).sum()}
        if batch.old_logprobs is not None:
            ratio = torch.exp(logprobs - batch.old_logprobs)
            low, high = ratio < 1 - config.clip_low, ratio > 1 + config.clip_high
            clipped = (low & (batch.advantages < 0)) | (high & (batch.advantages > 0))
            figures["clip_ratio"] = (clipped * weights).sum()
        if config.kl_coefficient:
            figures["kl"] = (self._divergence(logprobs, batch, slice(None)) * weights).sum()
        if batch.sampling_logprobs is not None and batch.old_logprobs is not None:
            figures["sampling_gap"] = ((batch.old_logprobs - batch.sampling_logprobs).abs() * weights).sum()
        return figures
