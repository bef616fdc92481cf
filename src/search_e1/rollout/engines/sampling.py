"""How the next ids are drawn, and when a row has ended: the same for every way of running a transformers model."""

import math
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel

_AT_ONCE = 2**23
"""Most entries of a distribution that are summed in double precision together: 64 MiB."""


def draw(logits: torch.Tensor, temperature: float, sources: Sequence[Random]) -> tuple[list[int], list[float]]:
    """The next id of each row, and its log-probability under the distribution that was sampled from.

    ``logits`` is [rows, vocabulary]; temperature 0 takes the most likely id and tells its log-probability at temperature 1.
    Each row's randomness is one number of its own source (the inverse of the cumulative distribution), so that a row draws
    the same whoever it is sampled with.

    Raises:
        FloatingPointError: logits hold NaN or plus infinity, either of which makes every probability of its row NaN.
    """
    logits = logits.float() / temperature if temperature not in (0.0, 1.0) else logits.float()
    probabilities = torch.softmax(logits, -1)
    if temperature:
        numbers = torch.tensor([source.random() for source in sources], dtype=torch.float64, device=logits.device)
        rows = max(1, _AT_ONCE // logits.shape[1])
        parts = zip(probabilities.split(rows), numbers.split(rows), strict=True)
        ids = torch.cat([_inverse(part, number) for part, number in parts])
    else:
        ids = probabilities.argmax(-1)
    # One transfer: on an accelerator each is a wait for it.
    both = torch.stack((ids.double(), probabilities.gather(1, ids[:, None])[:, 0].log().double())).tolist()
    if any(map(math.isnan, both[1])):
        raise FloatingPointError("logits that are not finite")
    return [int(id) for id in both[0]], both[1]


def _inverse(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    # In single precision the small probabilities at the end of a large vocabulary would be lost in the sum.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    ids = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return ids.clamp_(max=probabilities.shape[1] - 1)


class Ends:
    """Tells when a row has ended."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # The tokenizer's, and those that the model's generation config adds (chat models often have two).
        configured = getattr(model.generation_config, "eos_token_id", None)
        self._end_ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
        last = _that_may_end(tokenizer, self._stop)
        self.candidates = None if last is None else last.keys() | self._end_ids
        """No other id ends a row; ``None`` if any may."""
        self._end_ids |= {id for id, whole in (last or {}).items() if whole}  # their text need not be looked at

    def at(self, ids: Sequence[int], begin: int = 0) -> bool:
        """Whether the last of ``ids`` is an end token, or completes a stop string of what follows ``begin``."""
        if ids[-1] in self._end_ids:
            return True
        text = self._tokenizer.decode(ids[begin:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(string in text for string in self._stop)


@lru_cache(maxsize=8)
def _that_may_end(tokenizer: Any, stop: tuple[str, ...]) -> dict[int, bool] | None:
    """Ids of the tokens that can complete a stop string, and whether they hold it whole.

    ``None`` if that cannot be told by their looks.
    Vocabularies write ASCII characters as they are, bytes of their own as ``<0x3E>``, all else as they please.
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
    """A token completes a string that it holds, or that ends with what the token begins with."""
    begins = any(string.endswith(token[:n]) for n in range(1, min(len(token), len(string)) + 1))
    return begins or string in token or token.startswith("<0x")
