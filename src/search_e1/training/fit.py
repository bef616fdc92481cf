"""Sizing of passes by measurement: memory per token depends on the model, its adapters, the kernels and the GPU."""

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

_METERED_DEVICES = "cuda", "xpu"  # devices on which torch counts memory
_PROBE_TOKENS = 1024, 2048  # tokens of the two measured passes
_MAX_TOKENS = 65_536  # larger passes are no faster
_USABLE = 0.85  # share of free memory: leaves room for fragmentation, teacher passes and longer rows
_SAMPLED_EVERY = 8  # one in eight tokens of a measured row is sampled


class Meter(Protocol):
    """Measures memory, in bytes."""

    def free(self) -> int:
        """Bytes that can still be allocated."""
        ...

    def rise(self, run: Callable[[], None]) -> int:
        """Peak increase of allocated memory during ``run``."""
        ...


class AcceleratorMeter:
    """Measures one accelerator: free memory from the driver, the rise from torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        memory.release()  # torch's unused cache is not all available: recorded graphs own some of it
        return int(torch.accelerator.get_memory_info(self._device)[0])

    def rise(self, run: Callable[[], None]) -> int:
        torch.accelerator.reset_peak_memory_stats(self._device)
        before = torch.accelerator.memory_allocated(self._device)
        run()
        return int(torch.accelerator.max_memory_allocated(self._device) - before)


def fit_passes(policy: TrainedPolicy, samples: Mapping[str, Sequence[Sample]], meter: Meter | None = None) -> None:
    """Choose the size of a pass and gradient checkpointing where the config leaves them open; once per stage.

    Measures two passes with rows as long as the longest of ``samples`` and extrapolates linearly to the largest power of two of
    tokens that fits in memory beside the optimizer states. Then tries that size and halves it until it fits: the mask of packed
    rows grows quadratically. With sharded weights takes half of that size untried: if only some ranks ran out of memory, the
    others would wait for them. Enables checkpointing if the longest of ``samples`` does not fit without it. On a CPU nothing is
    measured: small passes are fastest. All ranks must call this; they measure the same passes, and the fullest device decides.
    """
    config, device = policy.config, policy.device.type
    if policy.fitted or config.micro_batch_tokens is not None or (device not in _METERED_DEVICES and meter is None):
        return
    meter, policy.fitted = meter or AcceleratorMeter(policy.device), True
    longest = max(ranks.all_gather_object(max((len(s) for part in samples.values() for s in part), default=0)))
    taught = any(ranks.all_gather_object(any(s.teacher_prompt_ids for part in samples.values() for s in part)))
    given = config.gradient_checkpointing
    with torch.random.fork_rng([] if device == "cpu" else [policy.device], device_type=device):
        for checkpointing in (False, True) if given is None else (given,):
            if checkpointing:
                policy.enable_checkpointing()
            tokens = _largest_pass(policy, meter, longest, taught)
            if tokens >= longest:
                break
    policy.micro_batch_tokens = max(tokens, _PROBE_TOKENS[0])
    logger.info(
        "passes of %s tokens %s gradient checkpointing, from two measured passes",
        f"{policy.micro_batch_tokens:,}", "with" if policy.checkpointing else "without",
    )  # fmt: skip


def _largest_pass(policy: TrainedPolicy, meter: Meter, longest: int, taught: bool) -> int:
    """The largest power of two of tokens that fits in a pass; 0 if not even a small pass fits."""
    weights = policy.parameters.values()

    def rise(tokens: int) -> float:
        taken = math.inf
        try:
            with policy.accumulating(last=False):  # no waiting for a rank that ran out of memory
                taken = meter.rise(lambda: _pass(policy, tokens, longest, taught))
        except (RuntimeError, MemoryError) as error:
            # Sharded layers are gathered from all ranks: the others would wait for one that gave up, so the job ends.
            if policy.sharded or not memory.ran_out(error):
                raise
        if taken == math.inf:
            memory.release()
        return max(ranks.all_gather_object(taken))

    try:
        rise(_PROBE_TOKENS[0])  # allocates the gradients
        states = 8 * sum(local_part(weight).numel() for weight in weights)  # AdamW's two states in float32
        free = min(ranks.all_gather_object(_USABLE * meter.free() - states))
        small, large = map(rise, _PROBE_TOKENS)
        if math.inf in (small, large):
            return 0
        bytes_per_token = max(1, large - small) / (_PROBE_TOKENS[1] - _PROBE_TOKENS[0])
        room = (free - (small - bytes_per_token * _PROBE_TOKENS[0])) / bytes_per_token
        tokens = 0 if room < 1 else min(_MAX_TOKENS, 1 << int(room).bit_length() - 1)
        if policy.sharded:  # a larger pass may not be tried; half of the estimate, for what grows faster than the tokens
            return max(min(tokens, _PROBE_TOKENS[1]), tokens // 2)
        while tokens > _PROBE_TOKENS[1] and rise(tokens) > free:
            tokens //= 2
        return tokens
    finally:
        policy.model.zero_grad()
        memory.release()


def _pass(policy: TrainedPolicy, tokens: int, longest: int, taught: bool) -> None:
    """Run a pass of ``tokens`` tokens: rows of ``longest`` tokens, and one row with the rest."""
    width = max(2, min(longest, tokens))
    widths = [width] * (tokens // width) + [tokens % width] * (tokens % width > 1)
    samples = [_sample(width, taught) for width in widths]
    batch = make_batch(samples, [[0.0] * len(s.positions) for s in samples], packed=policy.packed)
    policy.run(batch, Sft(logits_mib=policy.config.logits_mib).loss, "current" if taught else None)[0].backward()


def _sample(width: int, taught: bool) -> Sample:
    mask = tuple(int(i % _SAMPLED_EVERY == 0) for i in range(width - 1))
    teacher = (0,) if taught else None
    return Sample(
        question_id="", prompt_ids=(0,), response_ids=(0,) * (width - 1), action_mask=mask, teacher_prompt_ids=teacher
    )
