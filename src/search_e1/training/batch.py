"""Batches: rows of ids that go through the model, and the positions of the loss.

Position p of a row predicts its id p + 1. Student and teacher get the same response after different prompts; entry n of every
[N] tensor belongs to the same predicted id in both. On CPUs, rows are padded on the right: no real position of a causal model
attends there, so no mask is needed. On GPUs, rows are packed end to end.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from search_e1.training import attention
from search_e1.types import Sample

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 8
_CLOSE = 0.1  # relative error of hidden states: many times the bfloat16 rounding error of dozens of layers
_WHOLE_ROWS = 8  # a pass is not closed before this many rows just to save padding


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences of ids for one forward pass."""

    input_ids: Tensor
    """[rows, width] padded, or [1, total] packed; int64."""
    position_ids: Tensor | None
    """[1, total] for packed rows: restarts at 0 with each row, which is how attention separates them."""
    index: Tensor
    """[N] int64: the predicting positions, as indices into the flattened ``input_ids``."""
    cu_seq: Tensor | None = None
    """[rows + 1] int32 for packed rows: cumulative row lengths."""
    longest: int | None = None
    """Tokens of the longest packed row; a Python int, as the kernel requires."""

    def hidden(self, decoder: nn.Module) -> Tensor:
        """[N, H]: the last hidden states at ``index``."""
        layout: dict[str, Any] = {} if self.position_ids is None else {"position_ids": self.position_ids}
        if self.cu_seq is not None and self.longest is not None and attention.takes_borders(decoder):
            layout |= attention.borders(self.cu_seq, self.longest)
        hidden = decoder(input_ids=self.input_ids, use_cache=False, **layout).last_hidden_state
        return hidden.flatten(0, 1)[self.index]


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that go through the model together; tensors are [N], float32 unless noted."""

    student: Rows
    teacher: Rows | None
    targets: Tensor
    """int64: the predicted ids."""
    weights: Tensor
    """Weight of each position in the loss of the whole update; see ``normalized_weights``."""
    advantages: Tensor | None
    sampling_logprobs: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """The batch on ``device``; copies to a GPU go through pinned memory, so that the host does not wait."""
        return Batch(**{f.name: _to(getattr(self, f.name), device) for f in fields(self)})


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Rows):
        return Rows(*(_to(getattr(value, f.name), device) for f in fields(value)))
    if not isinstance(value, Tensor):
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def make_batch(samples: Sequence[Sample], weights: Sequence[Sequence[float]], *, packed: bool) -> Batch:
    """The batch of ``samples``; ``weights``: for each sample, the loss weights of its positions."""
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
    starts = list(itertools.accumulate([len(row) if packed else width for row in rows], initial=0))
    index = torch.tensor(
        [start + position for start, at in zip(starts, predicting, strict=False) for position in at], dtype=torch.long
    )
    if packed:
        return _packed(rows, index)
    return Rows(torch.tensor([row + [0] * (width - len(row)) for row in rows]), None, index)


def _packed(rows: Sequence[Sequence[int]], index: Tensor) -> Rows:
    starts = list(itertools.accumulate(map(len, rows), initial=0))
    return Rows(
        torch.tensor([[i for row in rows for i in row]]),
        torch.tensor([[position for row in rows for position in range(len(row))]]),
        index,
        torch.tensor(starts, dtype=torch.int32),
        max(map(len, rows)),
    )


Average = str
"""``tokens``: mean over all tokens; ``sequences``: mean of sample means; ``constant``: sample sums over a fixed length."""


def normalized_weights(
    samples: Sequence[Sample], average: Average, total: Callable[[float], float], max_tokens: int = 1
) -> list[list[float]]:
    """Weights of each sample's positions, such that an update's loss is the weighted sum over all of its positions.

    With w the samples' own weights, n the number of samples on all ranks, and ``total`` the sum over ranks:

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
    """Micro-batches, as indices into ``samples``: at most ``max_tokens`` tokens, padding included, or a single sample.

    Longest first, so that running out of memory happens at once. Samples without positions are left out.
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


def pack(model: Any, dtype: torch.dtype) -> bool:
    """Whether rows for ``model``, computing in ``dtype``, may be packed; switches it to packed attention if that works.

    If it does not, a mask separates packed rows, which is quadratic in the length of the pack.
    """
    plain = plain_model(model)
    before = attention.implementations(plain.config)
    reason = attention.obstacle(plain, dtype)
    tried = reason is None
    with ExitStack() as unless_it_works:
        unless_it_works.callback(attention.attend, plain, before)
        try:
            if tried:
                window = attention.attend_by_borders(plain)
                if packs(model, dtype) and _matches_unpacked(model, dtype, before, window):
                    _check_backward(model, dtype)
                    unless_it_works.pop_all()
                    return True
                reason = "its hidden states are not those of each row alone"
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if may := packs(model, dtype):
        said = "packed rows are separated by a mask, which is slower: %s"
        logger.log(logging.WARNING if tried else logging.INFO, said, reason)
    return may


@torch.no_grad()
def packs(model: Any, dtype: torch.dtype = torch.float32) -> bool:
    """Whether packed sequences are independent in ``model``, computing in ``dtype``; determined by a trial.

    Attention respects position ids that restart; a convolution or a recurrence may leak across the boundary. The trial changes
    the first sequence: if a single bit of the second one's hidden states changes, they are not independent.
    """
    first, changed, second = _probe(model, 3, _PROBE_TOKENS)
    one, other = (_hidden(model, dtype, [row, second])[_PROBE_TOKENS:] for row in (first, changed))
    return torch.equal(one, other)


@torch.no_grad()
def _matches_unpacked(model: Any, dtype: torch.dtype, implementation: dict[str, Any], window: int) -> bool:
    """Whether a row has the same hidden states packed after another row as alone under the attention ``implementation``.

    The row is longer than the sliding ``window``, if the model's context allows.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _PROBE_TOKENS
    other, row = _probe(model, 2, min(limit, window + _PROBE_TOKENS))
    together = _hidden(model, dtype, [other[:_PROBE_TOKENS], row])[_PROBE_TOKENS:].float()
    with attention.attending(plain_model(model), implementation):
        alone = _hidden(model, dtype, [row]).float()
    return bool((together - alone).norm() <= _CLOSE * alone.norm())


@torch.enable_grad()
def _check_backward(model: Any, dtype: torch.dtype) -> None:
    """Try a backward pass to the embeddings, without leaving gradients: on some GPUs wide heads work in the forward pass only.

    Raises:
        RuntimeError: from the kernel, if it has no backward pass.
    """
    embedded: list[Tensor] = []

    def cut(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        hidden = _hidden(model, dtype, _probe(model, 2, _PROBE_TOKENS))
        torch.autograd.grad(hidden.float().sum(), embedded)
    finally:
        hook.remove()


def plain_model(model: Any) -> Any:
    """``model`` without PEFT's wrapper, whose generation config would take precedence; the adapters stay in the layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _probe(model: Any, rows: int, tokens: int) -> list[list[int]]:
    vocabulary = len(model.get_output_embeddings().weight)
    ids: list[list[int]] = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return ids


def _hidden(model: Any, dtype: torch.dtype, rows: Sequence[Sequence[int]]) -> Tensor:
    """Hidden states [total, H] of packed ``rows``."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    half = dtype != torch.float32
    packed = _to(_packed(rows, torch.arange(sum(map(len, rows)))), device)
    with torch.autocast(device.type, dtype if half else None, enabled=half, cache_enabled=False):
        hidden: Tensor = packed.hidden(plain_model(model).get_decoder())
    model.train(training)
    return hidden
