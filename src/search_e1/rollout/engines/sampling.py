"""Drawing of ids and detection of a row's end, shared by all ways of running a transformers model."""

import math
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from random import Random
from typing import Any, Literal, Protocol

import torch
from transformers import PreTrainedModel

_MAX_ENTRIES = 2**23
"""Maximum entries that are summed in float64 at once: 64 MiB."""

_BLOCK = 128
"""Entries per block: the drawn block is found first, then the entry within it."""
Mode = Literal["greedy", "sampled", "mixed"]
"""Whether all rows take the most likely id, all draw, or some do each."""


class Source(Protocol):
    """A source of random numbers in [0, 1)."""

    def random(self) -> float: ...


class Numbers:
    """A row's random numbers, one per token, with lookahead."""

    def __init__(self, seed: int) -> None:
        self._source = Random(seed)
        self._ahead: deque[float] = deque()

    def random(self) -> float:
        """The next number."""
        return self._ahead.popleft() if self._ahead else self._source.random()

    def peek(self, count: int) -> list[float]:
        """The next ``count`` numbers, without consuming them."""
        while len(self._ahead) < count:
            self._ahead.append(self._source.random())
        return list(islice(self._ahead, count))


def draw(logits: torch.Tensor, temperature: float, sources: Sequence[Source]) -> tuple[list[int], list[float]]:
    """The next id of each row, and its log-probability under the sampling distribution.

    ``logits`` is [rows, vocabulary]; temperature 0 takes the most likely id and returns its log-probability at temperature 1.
    Each row uses one number of its own source (inverse of the cumulative distribution), so that its draws do not depend on the
    rest of the batch.

    Raises:
        FloatingPointError: logits contain NaN or plus infinity, either of which makes all probabilities of the row NaN.
    """
    logits = logits.float() / temperature if temperature not in (0.0, 1.0) else logits.float()
    probabilities = torch.softmax(logits, -1)
    if temperature:
        numbers = torch.tensor([source.random() for source in sources], dtype=torch.float64, device=logits.device)
        rows = max(1, _MAX_ENTRIES // logits.shape[1])
        parts = zip(probabilities.split(rows), numbers.split(rows), strict=True)
        ids = torch.cat([_inverse(part, number) for part, number in parts])
    else:
        ids = probabilities.argmax(-1)
    # One transfer, because each synchronizes with an accelerator.
    both = torch.stack((ids.double(), probabilities.gather(1, ids[:, None])[:, 0].log().double())).tolist()
    if any(map(math.isnan, both[1])):
        raise FloatingPointError("logits that are not finite")
    return [int(id) for id in both[0]], both[1]


def _inverse(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    # In float32, the small probabilities at the end of a large vocabulary would be lost in the sum.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    ids = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return ids.clamp_(max=probabilities.shape[1] - 1)


def draw_on_device(
    logits: torch.Tensor, temperatures: torch.Tensor, numbers: torch.Tensor, mode: Mode
) -> tuple[torch.Tensor, torch.Tensor]:
    """``draw`` without host synchronization: ids and log-probabilities, both [rows].

    ``temperatures`` and ``numbers`` (float64) are [rows]. Log-probabilities are NaN where ``draw`` would raise. Ids differ from
    those of ``draw`` only if a number is within float64 rounding of the boundary between two ids.
    """
    logits = logits.float()
    if mode != "greedy":
        logits = logits / torch.where(temperatures > 0, temperatures, 1.0)[:, None]
    probabilities = torch.softmax(logits, -1)
    ids = probabilities.argmax(-1) if mode == "greedy" else _inverse_by_blocks(probabilities, numbers)
    if mode == "mixed":
        ids = torch.where(temperatures > 0, ids, probabilities.argmax(-1))
    return ids, probabilities.gather(1, ids[:, None])[:, 0].log()


def _inverse_by_blocks(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """``_inverse`` for GPUs, where a cumulative sum over a large vocabulary takes ten times as long as a plain sum."""
    rows, vocabulary = probabilities.shape
    blocks = torch.nn.functional.pad(probabilities, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    cumulative = sums.cumsum(-1)
    wanted = numbers[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=blocks.shape[1] - 1)
    rest = wanted - (cumulative.gather(1, block) - sums.gather(1, block))
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    # Rounding must not select an entry beyond the block, nor one of probability 0.
    rest = rest.clamp(min=0.0).minimum(torch.nextafter(within[:, -1:], torch.zeros_like(rest)))
    ids = block * _BLOCK + torch.searchsorted(within, rest, right=True)
    return ids[:, 0].clamp_(max=vocabulary - 1)


class Ends:
    """Detects the end of a row."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # The tokenizer's end token and those of the model's generation config (chat models often have two).
        configured = getattr(model.generation_config, "eos_token_id", None)
        self._end_ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
        last = _ending_tokens(tokenizer, self._stop)
        self.candidates = None if last is None else last.keys() | self._end_ids
        """The only ids that can end a row; ``None`` if any can."""
        self._end_ids |= {id for id, whole in (last or {}).items() if whole}  # no need to decode these
        self.certain = {id for id in self._end_ids if id is not None}
        """Ids that end a row regardless of the ids before."""

    def at(self, ids: Sequence[int], begin: int = 0) -> bool:
        """Whether the last of ``ids`` is an end token, or completes a stop string in the text from ``begin`` on."""
        if ids[-1] in self._end_ids:
            return True
        text = self._tokenizer.decode(ids[begin:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(string in text for string in self._stop)


@lru_cache(maxsize=8)
def _ending_tokens(tokenizer: Any, stop: tuple[str, ...]) -> dict[int, bool] | None:
    """Ids of the tokens that can complete a stop string, and whether they contain it whole.

    ``None`` if this cannot be determined from the token strings: vocabularies write ASCII characters literally and byte tokens
    as ``<0x3E>``, but have no common form for other characters.
    """
    if not all(character.isascii() and character.isprintable() and character != " " for character in "".join(stop)):
        return None
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return {
        i: token is not None and not token.startswith("<0x") and any(string in token for string in stop)
        for i, token in enumerate(tokens)
        if token is None or any(_may_end(token, string) for string in stop)
    }


def _may_end(token: str, string: str) -> bool:
    """Whether a token can complete ``string``: it contains it, or its beginning is the string's end."""
    begins = any(string.endswith(token[:n]) for n in range(1, min(len(token), len(string)) + 1))
    return begins or string in token or token.startswith("<0x")
