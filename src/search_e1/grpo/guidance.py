"""The policy as its own teacher within GRPO: shown a group's reference, what would it have said in the place of the siblings?

Two uses of the same teacher, the current weights under the privileged prompt, without gradient:

- **Hindsight** distils the teacher's distributions into the plain policy at the search queries of the siblings, as a loss
  beside GRPO's. After SD-Search (arXiv:2605.18299), by its abstract: the Jensen-Shannon divergence at search-query positions,
  the same model in both roles, within the GRPO step. There the teacher sees a summary of the queries and outcomes of the
  whole group; here the group's reference, as ``[reference]`` shows it.
- **Evidence** weighs each sampled token's advantage by the teacher's lead there; see ``corrected``.

The reference itself, what equals it, groups without a reference, and rows that do not fit the context are left as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from search_e1.config import EvidenceConfig, HindsightConfig, Prompts, ReferenceConfig
from search_e1.grpo import replay
from search_e1.runs import ranks
from search_e1.text.prompts import privileged_prompt
from search_e1.text.reference import room, show
from search_e1.text.tokens import token_classes
from search_e1.training.divergence import fused_divergence
from search_e1.training.head import split_head
from search_e1.types import Group, Trajectory

Logprobs = Callable[[Sequence[replay.Example]], Tensor]
"""[examples, response width], of each response's ids, 0 at its padding."""


def corrected(advantages: Tensor, lead: Tensor, strength: float, bound: float) -> Tensor:
    """Advantages of tokens, [B, T], of trajectories' advantages A [B] and the teacher's lead [B, T], which is
    ``log p(token | privileged prompt) - log p(token | plain prompt)``.

    ``A * (1 + strength * (clip(exp(sign(A) * lead), 1 - bound, 1 + bound) - 1))``: what speaks for a right trajectory or
    against a wrong one counts for more, the rest for less. With ``strength`` at most 1 and ``bound`` below 1 no sign changes;
    where the lead is 0 nothing does. The bounded correction that EviSD is described by, with the weights of RLSD
    (Self-Distilled RLVR, arXiv:2604.03128).
    """
    wide = advantages[:, None]
    ratio = (wide.sign() * lead).exp().clamp(1 - bound, 1 + bound)
    return wide * (1 + strength * (ratio - 1))


def siblings(
    tokenizer: Any,
    prompts: Prompts,
    groups: Sequence[Group],
    trajectories: Sequence[Trajectory],
    context_length: int,
    shown: ReferenceConfig,
) -> list[replay.Example | None]:
    """Each trajectory under the prompt that shows the reference of its group, or ``None`` where there is no teacher.
    ``loss_mask`` is its action mask."""
    questions = {group.question.id: (group.question.text, group.reference) for group in groups}
    made: list[replay.Example | None] = []
    for trajectory in trajectories:
        question, reference = questions[trajectory.question_id]
        if reference is None or trajectory == reference:
            made.append(None)
            continue
        left = room(shown, context_length, len(trajectory.response_ids))
        text = show(tokenizer, prompts, question, reference, shown, left)
        prompt = None if text is None else privileged_prompt(tokenizer, prompts, question, text.text)
        response, mask = trajectory.response_ids, trajectory.action_mask
        made.append(None if prompt is None else replay.Example(prompt, response, mask))
    return made


def class_mask(tokenizer: Any, prompts: Prompts, trajectory: Trajectory, classes: Sequence[str]) -> list[int]:
    """As long as the response: 1 where a sampled id is of one of ``classes``."""
    mask: list[int] = []
    for turn in trajectory.turns:
        mask += [int(kind in classes) for kind in token_classes(tokenizer, turn, prompts)]
        mask += [0] * len(turn.observation_ids)
    return mask


class Guidance:
    """Of a GRPO stage: what it holds of the step at hand, and what it adds to advantages and loss."""

    def __init__(self, hindsight: HindsightConfig, evidence: EvidenceConfig, model: Any) -> None:
        """``model``: with adapters or without, before anything wraps it.

        Raises:
            ModelError: hindsight, and a head that ``split_head`` does not know.
        """
        self._hindsight, self._evidence = hindsight, evidence
        self.active = bool(hindsight.weight or evidence.strength)
        if hindsight.weight:
            self._decoder, self._head = split_head(model)
        self._taught: list[replay.Example | None] = []
        self._plain: list[replay.Example] = []
        self._masks: list[list[int]] = []
        self._every = 0  # tokens of the step's hindsight, of all ranks
        self.divergence = 0.0
        """This rank's share of the step's mean, so far."""
        self._figures: dict[str, float] = {}

    def begin(
        self,
        tokenizer: Any,
        prompts: Prompts,
        groups: Sequence[Group],
        trajectories: Sequence[Trajectory],
        context_length: int,
        shown: ReferenceConfig,
    ) -> None:
        """A step's ``trajectories``, this rank's, of ``groups``, all ranks'. Every rank has to call it."""
        self._taught = siblings(tokenizer, prompts, groups, trajectories, context_length, shown)
        self._plain = [replay.Example(t.prompt_ids, t.response_ids, t.action_mask) for t in trajectories]
        self._masks = [
            class_mask(tokenizer, prompts, t, self._hindsight.classes) if row and self._hindsight.weight else []
            for t, row in zip(trajectories, self._taught, strict=True)
        ]
        self._every = sum(ranks.gathered(sum(map(sum, self._masks))))
        self._figures, self.divergence = {}, 0.0

    def prepared(self, batch: dict[str, Any], logprobs: Logprobs, micro: int) -> dict[str, Any]:
        """``batch``, TRL's of all this rank's trajectories in their order, with advantages [B, T] and, for hindsight, ``row``
        [B] and ``hindsight_mask`` [B, T], int64. ``micro`` rows go through the model together."""
        added: dict[str, Any] = {}
        like = batch["completion_mask"]
        if self._evidence.strength:
            lead, mask = self._lead(like, logprobs, micro)
            settings = self._evidence
            added["advantages"] = corrected(batch["advantages"], lead, settings.strength, settings.bound)
            self._note(batch["advantages"], added["advantages"], lead, mask)
        if self._hindsight.weight:
            added["row"] = torch.arange(len(like), device=like.device)
            added["hindsight_mask"] = _padded(self._masks, like)
        return {**batch, **added}

    @torch.no_grad()
    def _lead(self, like: Tensor, logprobs: Logprobs, micro: int) -> tuple[Tensor, Tensor]:
        """Lead and mask of the tokens that have one, both float32 and of the shape of ``like``; 0 elsewhere."""
        lead = torch.zeros(like.shape, device=like.device)
        mask = _padded([row.loss_mask if row else () for row in self._taught], like).float()
        rows = {i: row for i, row in enumerate(self._taught) if row}
        order = sorted(rows, key=lambda i: len(rows[i].prompt_ids) + len(rows[i].response_ids), reverse=True)
        for at in range(0, len(order), micro):
            part = order[at : at + micro]
            gap = logprobs([rows[i] for i in part]) - logprobs([self._plain[i] for i in part])
            lead[part, : gap.shape[1]] = gap.float()
        return lead.masked_fill(mask == 0, 0), mask

    def _note(self, before: Tensor, after: Tensor, lead: Tensor, mask: Tensor) -> None:
        wide = before[:, None].abs()
        change = torch.where(wide > 0, (after.abs() - wide).abs() / wide.clamp(min=1e-12), 0)
        taught = sum(row is not None for row in self._taught)
        sums = [mask.sum().item(), lead.sum().item(), (change * mask).sum().item(), taught]
        tokens, lead_sum, change_sum, taught = (sum(column) for column in zip(*ranks.gathered(sums), strict=True))
        self._figures |= {"evidence_siblings": taught}
        if tokens:
            self._figures |= {"evidence_lead": lead_sum / tokens, "evidence_correction": change_sum / tokens}

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """The last hidden states of each pass of the policy in this context, [B, width, H]; none without hindsight."""
        seen: list[Tensor] = []
        if not self._hindsight.weight:
            yield seen
            return
        hook = self._decoder.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state))
        try:
            yield seen
        finally:
            hook.remove()

    def loss(self, inputs: dict[str, Any], hidden: Tensor, pad_id: int) -> Tensor | None:
        """What a micro-batch adds to the step's loss, given the policy's states of its pass [B, prompts + responses, H].

        Over the tokens of the whole step: the sum over micro-batches is the mean over tokens, and gradients are averaged
        over ranks. ``None`` where none of its tokens are taught.
        """
        mask = inputs["hindsight_mask"].bool()
        some = mask.any(1)
        if not some.any():
            return None
        width = mask.shape[1]
        student = hidden[:, -width - 1 : -1][mask]  # the position before an id predicts it
        examples = [row for i in inputs["row"][some].tolist() if (row := self._taught[i])]
        batch = replay.collate(examples, pad_id, hidden.device)
        longest = batch.loss_mask.shape[1]
        teacher = self._teacher(batch)[:, -longest - 1 : -1][mask[some, :longest]]
        mean, _ = fused_divergence(
            student,
            teacher,
            self._head,
            divergence=self._hindsight.divergence,
            teacher_temperature=self._hindsight.teacher_temperature,
        )
        share = mean * (len(student) * ranks.count() / self._every)
        self.divergence += share.item()
        return self._hindsight.weight * share

    @torch.no_grad()
    def _teacher(self, batch: replay.Batch) -> Tensor:
        training = self._decoder.training
        self._decoder.eval()
        # After the student's pass: under autocast, weights that are cast first without a gradient would have none.
        states = self._decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        self._decoder.train(training)
        return states.last_hidden_state

    def figures(self) -> dict[str, float]:
        """Of the step that has ended, for ``steps.jsonl``. Every rank has to call it."""
        if not self._hindsight.weight:
            return self._figures
        parts = ranks.gathered((self.divergence, sum(map(any, self._masks))))
        self.divergence = 0.0
        divergence, taught = (sum(column) for column in zip(*parts, strict=True))
        return self._figures | {"hindsight_divergence": divergence / len(parts), "hindsight_siblings": taught}


def _padded(rows: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """[B, T] as ``like``, int64; rows may be shorter."""
    padded = torch.zeros(like.shape, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded.to(like.device)
