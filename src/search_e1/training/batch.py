"""From samples to what goes through the model: rows of ids, and the positions that the loss is taken at.

The position p of a row predicts its id p + 1. Student and teacher read the same response after prompts of their own; entry n
of every [N] tensor belongs to the same predicted id in both. On CPUs rows are padded on the right, where no real position of
a causal model looks, so that no attention mask is needed; on GPUs rows are packed end to end.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from search_e1.training.head import split_head
from search_e1.types import Sample

_PROBE_TOKENS = 8
_WHOLE_ROWS = 8  # a pass of fewer rows is not cut short to save padding


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences of ids for one forward pass."""

    input_ids: Tensor
    """[rows, width] padded, or [1, total] packed; int64."""
    position_ids: Tensor | None
    """[1, total] of packed rows: begins again at 0 with each row, by which attention tells them apart."""
    index: Tensor
    """[N] int64: the predicting positions, into the flattened ``input_ids``."""

    def hidden(self, decoder: nn.Module) -> Tensor:
        """[N, H]: the last hidden states at ``index``."""
        layout = {} if self.position_ids is None else {"position_ids": self.position_ids}
        hidden = decoder(input_ids=self.input_ids, use_cache=False, **layout).last_hidden_state
        return hidden.flatten(0, 1)[self.index]


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that go through the model together; tensors are [N], float32 unless they say otherwise."""

    student: Rows
    teacher: Rows | None
    targets: Tensor
    """int64: the ids that are predicted."""
    weights: Tensor
    """Weight of each position in the loss of the whole update; see ``normalised_weights``."""
    advantages: Tensor | None
    sampling_logprobs: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{f.name: _to(getattr(self, f.name), device) for f in fields(self)})


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Rows):
        return Rows(*(_to(getattr(value, f.name), device) for f in fields(value)))
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def make_batch(samples: Sequence[Sample], weights: Sequence[Sequence[float]], *, packed: bool) -> Batch:
    """The batch of ``samples``; ``weights``: for each sample those of its positions, as they stand in the loss."""
    positions = [sample.positions for sample in samples]

    def at_positions(name: str) -> Tensor | None:
        if getattr(samples[0], name) is None:
            return None
        return torch.tensor([getattr(s, name)[i] for s, at in zip(samples, positions, strict=True) for i in at])

    taught = samples[0].teacher_prompt_ids is not None
    return Batch(
        student=_rows([s.prompt_ids for s in samples], samples, positions, packed),
        teacher=_rows([s.teacher_prompt_ids or () for s in samples], samples, positions, packed) if taught else None,
        targets=torch.tensor(
            [s.response_ids[i] for s, at in zip(samples, positions, strict=True) for i in at], dtype=torch.long
        ),
        weights=torch.tensor([weight for row in weights for weight in row], dtype=torch.float32),
        advantages=at_positions("advantages"),
        sampling_logprobs=at_positions("sampling_logprobs"),
        old_logprobs=at_positions("old_logprobs"),
        ref_logprobs=at_positions("ref_logprobs"),
    )


def _rows(
    prompts: Sequence[Sequence[int]], samples: Sequence[Sample], positions: Sequence[Sequence[int]], packed: bool
) -> Rows:
    rows = [[*prompt, *sample.response_ids] for prompt, sample in zip(prompts, samples, strict=True)]
    predicting = [[len(prompt) + i - 1 for i in at] for prompt, at in zip(prompts, positions, strict=True)]
    width = max(map(len, rows))
    widths = [len(row) if packed else width for row in rows]
    starts = itertools.accumulate(widths, initial=0)
    index = [start + position for start, at in zip(starts, predicting, strict=False) for position in at]
    if packed:
        ids = [[i for row in rows for i in row]]
        order = [[position for row in rows for position in range(len(row))]]
    else:
        ids = [row + [0] * (width - len(row)) for row in rows]
    return Rows(torch.tensor(ids), torch.tensor(order) if packed else None, torch.tensor(index, dtype=torch.long))


Average = str
"""``tokens``: all alike; ``sequences``: each sample's mean first; ``constant``: their sum over a fixed number of tokens."""


def normalised_weights(
    samples: Sequence[Sample], average: Average, total: Callable[[float], float], max_tokens: int = 1
) -> list[list[float]]:
    """Weights of each sample's positions, such that an update's loss is the weighted sum over all of its positions.

    With w the samples' own weights, n the number of samples of all ranks and ``total`` the sum over ranks:

    - ``tokens``: w / sum of all w (DAPO, arXiv:2503.14476, eq. 8);
    - ``sequences``: w / (n * sum of the sample's w) (GRPO, arXiv:2402.03300, eq. 3);
    - ``constant``: w / (n * max_tokens) (Dr. GRPO, arXiv:2503.20783).
    """
    own = [[(s.weights or s.action_mask)[i] for i in s.positions] for s in samples]
    if average == "tokens":
        divisors = [total(sum(map(sum, own)))] * len(own)
    else:
        count = total(len(own))
        divisors = [count * (max_tokens if average == "constant" else sum(row)) for row in own]
    return [[weight / divisor for weight in row] for row, divisor in zip(own, divisors, strict=True)]


def micro_batches(samples: Sequence[Sample], max_tokens: int, *, packed: bool) -> Iterator[list[int]]:
    """Indices of ``samples`` in groups of at most ``max_tokens`` tokens (or of one sample), padding included.

    Longest first, so that what does not fit into memory fails at once. Samples without a position are left out.
    """
    order = sorted((i for i, s in enumerate(samples) if s.positions), key=lambda i: -len(samples[i]))
    group: list[int] = []
    tokens = 0
    for i in order:
        size, widest = len(samples[i]), len(samples[group[0]]) if group else 0
        full = tokens + size > max_tokens if packed else (len(group) + 1) * widest > max_tokens
        mostly_padding = not packed and len(group) >= _WHOLE_ROWS and size < 0.75 * widest
        if group and (full or mostly_padding):
            yield group
            group, tokens = [], 0
        group.append(i)
        tokens += size
    if group:
        yield group


@torch.no_grad()
def packs(model: Any) -> bool:
    """Whether packed sequences stay apart in ``model``: found out by trying it.

    Attention heeds position ids that begin again; a convolution or a recurrence may run on over the border. The first
    sequence is changed; if what follows changes in a single bit, the two are not apart.
    """
    decoder, head = split_head(model)
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(head.weight), (3, _PROBE_TOKENS), generator=generator).to(head.weight.device)
    positions = torch.arange(_PROBE_TOKENS, device=ids.device).repeat(2)[None]
    one, other = (
        decoder(input_ids=torch.cat([first, ids[2]])[None], position_ids=positions, use_cache=False).last_hidden_state
        for first in ids[:2]
    )
    model.train(training)
    return torch.equal(one[:, _PROBE_TOKENS:], other[:, _PROBE_TOKENS:])
