"""How large a pass may be, from passes that are measured: memory differs with the model, its adapters, kernels and the GPU."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from search_e1.runs import ranks
from search_e1.training import memory
from search_e1.training.batch import make_batch
from search_e1.training.objectives.sft import Sft
from search_e1.training.sharding import local_part
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Sample

logger = logging.getLogger(__name__)

_COUNTED = "cuda", "xpu"  # where torch counts memory
_MEASURED = 1024, 2048  # tokens of the two passes
_MOST = 65_536  # longer passes are no faster
_USABLE = 0.85  # of what is free: memory fragments, and a teacher's pass or a longer row come beside what is measured
_SAMPLED = 8  # every eighth token is the policy's


class Meter(Protocol):
    """Measures memory, in bytes."""

    def free(self) -> int:
        """What could still be allocated."""
        ...

    def rise(self, run: Callable[[], None]) -> int:
        """By how much ``run`` raises what is allocated, at its peak."""
        ...


class AcceleratorMeter:
    """Of one accelerator, by its driver's and torch's own count."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        memory.release()  # what torch holds unused is not all free: recorded graphs have memory of their own
        return int(torch.accelerator.get_memory_info(self._device)[0])

    def rise(self, run: Callable[[], None]) -> int:
        torch.accelerator.reset_peak_memory_stats(self._device)
        before = torch.accelerator.memory_allocated(self._device)
        run()
        return int(torch.accelerator.max_memory_allocated(self._device) - before)


def fit_passes(policy: TrainedPolicy, samples: Mapping[str, Sequence[Sample]], meter: Meter | None = None) -> None:
    """Set the size of a pass, and gradient checkpointing, where the config leaves them open; once in a stage.

    Two passes are measured, of rows as long as the longest of ``samples``, and the size is the largest power of two of tokens
    whose memory fits beside the optimizer's states, as far as memory grows evenly. A pass of that size is then made, and the
    size halved until what it takes fits: a mask that tells packed rows apart grows with the square. Checkpointing is turned
    on where the longest of ``samples`` does not fit without it. On a CPU nothing is measured: small passes are fastest there.
    Every rank has to call this, and all measure the same passes: the fullest device decides.
    """
    config, device = policy.config, policy.device.type
    if policy.fitted or config.micro_batch_tokens is not None or (device not in _COUNTED and meter is None):
        return
    meter, policy.fitted = meter or AcceleratorMeter(policy.device), True
    longest = max(ranks.all_gather_object(max((len(s) for part in samples.values() for s in part), default=0)))
    taught = any(ranks.all_gather_object(any(s.teacher_prompt_ids for part in samples.values() for s in part)))
    given = config.gradient_checkpointing
    with torch.random.fork_rng([] if device == "cpu" else [policy.device], device_type=device):
        for checkpointing in (False, True) if given is None else (given,):
            if checkpointing:
                policy.enable_checkpointing()
            tokens = _fitting(policy, meter, longest, taught)
            if tokens >= longest:
                break
    policy.micro_batch_tokens = max(tokens, _MEASURED[0])
    logger.info(
        "passes of %s tokens %s gradient checkpointing, by two passes measured",
        f"{policy.micro_batch_tokens:,}", "with" if policy.checkpointing else "without",
    )  # fmt: skip


def _fitting(policy: TrainedPolicy, meter: Meter, longest: int, taught: bool) -> int:
    """The largest power of two of tokens that a pass may have; 0 if not even a small one fits."""
    weights = policy.parameters.values()

    def rise(tokens: int) -> float:
        taken = math.inf
        try:
            with policy.accumulating(last=False):  # without waiting for a rank whose memory has run out
                taken = meter.rise(lambda: _pass(policy, tokens, longest, taught))
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
        if taken == math.inf:
            memory.release()
        return max(ranks.all_gather_object(taken))

    try:
        rise(_MEASURED[0])  # gradients exist from now on
        states = 8 * sum(local_part(weight).numel() for weight in weights)  # AdamW's two, in float32
        free = min(ranks.all_gather_object(_USABLE * meter.free() - states))
        small, large = map(rise, _MEASURED)
        if math.inf in (small, large):
            return 0
        a_token = max(1, large - small) / (_MEASURED[1] - _MEASURED[0])
        room = (free - (small - a_token * _MEASURED[0])) / a_token
        tokens = 0 if room < 1 else min(_MOST, 1 << int(room).bit_length() - 1)
        while tokens > _MEASURED[1] and rise(tokens) > free:
            tokens //= 2
        return tokens
    finally:
        policy.model.zero_grad()
        memory.release()


def _pass(policy: TrainedPolicy, tokens: int, longest: int, taught: bool) -> None:
    """Of rows of ``longest`` tokens, and one of those that are left."""
    width = max(2, min(longest, tokens))
    widths = [width] * (tokens // width) + [tokens % width] * (tokens % width > 1)
    samples = [_sample(width, taught) for width in widths]
    batch = make_batch(samples, [[0.0] * len(s.positions) for s in samples], packed=policy.packed)
    policy.run(batch, Sft(logits_mib=policy.config.logits_mib).loss, "current" if taught else None)[0].backward()


def _sample(width: int, taught: bool) -> Sample:
    mask = tuple(int(i % _SAMPLED == 0) for i in range(width - 1))
    teacher = (0,) if taught else None
    return Sample(
        question_id="", prompt_ids=(0,), response_ids=(0,) * (width - 1), action_mask=mask, teacher_prompt_ids=teacher
    )
