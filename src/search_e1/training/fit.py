"""How large a pass may be, from passes that are measured: memory differs with the model, its adapters, kernels and the GPU."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from search_e1.runs import ranks
from search_e1.training import memory
from search_e1.training.batch import make_batch
from search_e1.training.objectives.sft import Sft
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Sample

logger = logging.getLogger(__name__)

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
    """Of the current accelerator, by torch's own count."""

    def free(self) -> int:
        unused = torch.accelerator.memory_reserved() - torch.accelerator.memory_allocated()
        return int(torch.accelerator.get_memory_info()[0] + unused)

    def rise(self, run: Callable[[], None]) -> int:
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        run()
        return int(torch.accelerator.max_memory_allocated() - before)


def fit_passes(policy: TrainedPolicy, samples: Mapping[str, Sequence[Sample]], meter: Meter | None = None) -> None:
    """Set the size of a pass, and gradient checkpointing, where the config leaves them open; once in a stage.

    Two passes are measured, and the size is the largest power of two of tokens whose memory fits beside the optimiser's
    states. Checkpointing is turned on where the longest of ``samples`` does not fit without it. On a CPU nothing is measured:
    small passes are fastest there. Every rank has to call this.
    """
    config, device = policy.config, policy.device.type
    if policy.fitted or config.micro_batch_tokens is not None or (device == "cpu" and meter is None):
        return
    meter, policy.fitted = meter or AcceleratorMeter(), True
    longest = max(ranks.all_gather_object(max((len(s) for part in samples.values() for s in part), default=0)))
    given = config.gradient_checkpointing
    with torch.random.fork_rng(device_type=device if device != "cpu" else "cuda"):
        for checkpointing in (False, True) if given is None else (given,):
            if checkpointing:
                policy.enable_checkpointing()
            tokens = min(ranks.all_gather_object(_fitting(policy, meter)))
            if tokens >= longest:
                break
    policy.micro_batch_tokens = max(tokens, _MEASURED[0])
    logger.info(
        "passes of %s tokens %s gradient checkpointing, by two passes measured",
        f"{policy.micro_batch_tokens:,}", "with" if policy.checkpointing else "without",
    )  # fmt: skip


def _fitting(policy: TrainedPolicy, meter: Meter) -> int:
    """The largest power of two of tokens that a pass may have; 0 if not even a small one fits."""
    weights = policy.parameters.values()
    try:
        _pass(policy, _MEASURED[0])  # gradients exist from now on
        states = 8 * sum(weight.numel() for weight in weights)  # AdamW's two, in float32
        free = _USABLE * meter.free() - states
        small, large = (meter.rise(lambda n=n: _pass(policy, n)) for n in _MEASURED)  # type: ignore[misc]
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
        free, small, large = 0.0, 1, 2
    finally:
        policy.model.zero_grad()
        memory.release()
    a_token = max(1, large - small) / (_MEASURED[1] - _MEASURED[0])
    room = (free - (small - a_token * _MEASURED[0])) / a_token
    return 0 if room < 1 else min(_MOST, 1 << int(room).bit_length() - 1)


def _pass(policy: TrainedPolicy, tokens: int) -> None:
    mask = tuple(int(i % _SAMPLED == 0) for i in range(tokens - 1))
    sample = Sample(question_id="", prompt_ids=(0,), response_ids=(0,) * (tokens - 1), action_mask=mask)
    batch = make_batch([sample], [[0.0] * len(sample.positions)], packed=policy.packed)
    policy.run(batch, Sft(logits_mib=policy.config.logits_mib).loss, None)[0].backward()
