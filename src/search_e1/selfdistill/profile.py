"""The profile: per-token divergence of teacher and student on the student's trajectory, and the teacher's preferred tokens."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from search_e1.errors import TrainingError
from search_e1.selfdistill.samples import classes_of, sample_of
from search_e1.text.tokens import TokenClass
from search_e1.training.batch import make_batch, micro_batches
from search_e1.training.divergence import fused_divergence
from search_e1.training.head import Head, split_head
from search_e1.training.policy import Policy
from search_e1.types import Pair, Record

FILE = "kl.jsonl"
_PASS_TOKENS = 8192
_POSITIONS = 256  # positions whose probabilities are in memory at once
_WINDOW = 12  # ids decoded before an id to see what it adds to the text


class ClassKL(Record):
    """The divergence at the sampled tokens of one class."""

    tokens: int
    mean: float
    """KL(teacher || student), nats per token, not clipped."""
    share: float
    """Share of the divergence of all sampled tokens."""


class PairKL(Record):
    """Per-token values of a pair's student, one for each sampled token, in order."""

    question_id: str
    pieces: tuple[str, ...]
    """The text that each token adds to its turn; joined, the text. A character of several tokens is in the last one's piece."""
    classes: tuple[TokenClass, ...]
    kl: tuple[float, ...]
    """KL(teacher || student) in nats, not clipped."""
    student: tuple[float, ...]
    """Probability of the token under the plain prompt."""
    teacher: tuple[float, ...]
    """Probability of the token under the privileged prompt."""
    preferred: tuple[str, ...]
    """The teacher's most probable token at that position, decoded by itself."""


@torch.no_grad()
def pair_kl(policy: Policy, pairs: Sequence[Pair]) -> list[PairKL]:
    """The per-token divergence of each pair, in order.

    Raises:
        TrainingError: a divergence is not finite.
    """
    decoder, head = split_head(policy.model)
    was_training = policy.model.training
    policy.model.eval()
    samples = [sample_of(pair, []) for pair in pairs]
    measured: dict[int, PairKL] = {}
    for group in micro_batches(samples, _PASS_TOKENS, packed=False):
        chosen = [samples[i] for i in group]
        batch = make_batch(chosen, [[1.0] * len(s.positions) for s in chosen], packed=False).to(policy.model.device)
        assert batch.teacher
        student, teacher = batch.student.hidden(decoder), batch.teacher.hidden(decoder)
        _, per_token = fused_divergence(student, teacher, head, clip="none")
        kl: list[float] = per_token.tolist()
        if not all(map(math.isfinite, kl)):
            raise TrainingError(
                f"question {chosen[0].question_id!r}: the divergence from the teacher is not finite in {policy.dtype}; set "
                'policy.dtype = "bfloat16" or "float32"'
            )
        by_student, _ = _probabilities(head, student, batch.targets)
        by_teacher, preferred = _probabilities(head, teacher, batch.targets)
        begin = 0
        for i in group:
            end = begin + len(samples[i].positions)
            at = slice(begin, end)
            measured[i] = _record(policy, pairs[i], kl[at], by_student[at], by_teacher[at], preferred[at])
            begin = end
    policy.model.train(was_training)
    return [measured[i] for i in range(len(samples))]


def by_class(profiles: Sequence[PairKL]) -> dict[TokenClass, ClassKL]:
    """The divergence of all pairs by ``tokens.token_classes``; classes that do not occur are absent."""
    parts: dict[TokenClass, list[float]] = {}
    for profile in profiles:
        for kind, divergence in zip(profile.classes, profile.kl, strict=True):
            parts.setdefault(kind, []).append(divergence)
    total = math.fsum(map(math.fsum, parts.values()))
    return {
        kind: ClassKL(tokens=len(values), mean=fmean(values), share=math.fsum(values) / total if total > 0 else 0.0)
        for kind, values in sorted(parts.items())
    }


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each id adds to the text of ``ids``; a character of several ids is in the last one's piece."""
    added: list[str] = []
    for end in range(1, len(ids) + 1):
        begin = max(0, end - 1 - _WINDOW)
        # Decoded after the preceding ids, an id keeps its leading space; an unfinished character decodes to U+FFFD.
        before, after = (
            tokenizer.decode(ids[begin:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for stop in (end - 1, end)
        )
        added.append(after.rstrip("\N{REPLACEMENT CHARACTER}")[len(before.rstrip("\N{REPLACEMENT CHARACTER}")) :])
    return added


def _probabilities(head: Head, hidden: Tensor, ids: Tensor) -> tuple[list[float], list[int]]:
    """For each of N positions (``hidden`` [N, H], ``ids`` [N]): the probability of its id, and the most probable id."""
    chosen: list[float] = []
    best: list[int] = []
    for part, part_ids in zip(hidden.split(_POSITIONS), ids.split(_POSITIONS), strict=True):
        probabilities = head.logits(part.to(head.weight.dtype)).float().softmax(-1)
        chosen += probabilities.gather(-1, part_ids[:, None])[:, 0].tolist()
        best += probabilities.argmax(-1).tolist()
    return chosen, best


def _record(
    policy: Policy, pair: Pair, kl: list[float], student: list[float], teacher: list[float], preferred: list[int]
) -> PairKL:
    tokenizer = policy.tokenizer
    decoded = {i: tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in set(preferred)}
    return PairKL(
        question_id=pair.question.id,
        pieces=tuple(piece for turn in pair.student.turns for piece in pieces(tokenizer, turn.action_ids)),
        classes=tuple(classes_of(tokenizer, policy.prompts, pair.student)),
        kl=_rounded(kl),
        student=_rounded(student),
        teacher=_rounded(teacher),
        preferred=tuple(decoded[i] for i in preferred),
    )


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)
