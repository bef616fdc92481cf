"""The two passes of a distillation step: what the teacher and the student make of the same response ids.

The teacher is the policy as it was when the stage began. Its hidden states are computed beside the student's in every
step (``live``), or once for each pair before the first step and kept on disk (``cached``), so that the privileged prompt,
the longest part of all, is read once however many epochs follow.
"""

import copy
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from search_e1.config import DistillConfig
from search_e1.distill.collate import Row
from search_e1.errors import RunError
from search_e1.runs import disk, ranks
from search_e1.runs.progress import Progress, silent
from search_e1.training.divergence import fused_cross_entropy, fused_divergence
from search_e1.training.head import Head, computing, hidden_at, split_head

_PROBE_TOKENS = 8


class TeacherStates:
    """The teacher's last hidden states at the positions of the loss, for every row, in one memory-mapped file."""

    def __init__(self, path: Path, rows: Sequence[Row], width: int, dtype: torch.dtype) -> None:
        """Make the file at ``path``: ``width`` numbers of ``dtype`` for each position of ``rows``.

        Raises:
            RunError: the disk has no room for it.
        """
        counts = {row["number"]: len(row["teacher_positions"]) for row in rows}
        ends = torch.tensor([counts[number] for number in sorted(counts)]).cumsum(0)
        self._starts = dict(zip(sorted(counts), [0, *ends.tolist()[:-1]], strict=True))
        self._counts = counts
        needed = int(ends[-1]) * width * dtype.itemsize
        free = shutil.disk_usage(path.parent).free + (path.stat().st_blocks * 512 if path.exists() else 0)
        if needed > free:
            raise RunError(
                f"{path.parent}: the teacher's hidden states take {needed / 2**20:,.0f} MiB and the disk has "
                f'{free / 2**20:,.0f} left; make room, or set distill.teacher = "live"'
            )
        disk.reserve(path, needed)
        self._states = torch.from_file(str(path), shared=True, size=needed // dtype.itemsize, dtype=dtype).view(
            -1, width
        )

    def write(self, numbers: Tensor, states: Tensor) -> None:
        """Keep ``states`` [N, H], those of the rows ``numbers`` one after the other."""
        at = 0
        for number in numbers.tolist():
            start, count = self._starts[number], self._counts[number]
            self._states[start : start + count] = states[at : at + count].cpu()
            at += count

    def checksum(self, numbers: Tensor) -> str:
        """sha256 of what ``read`` gives."""
        return hashlib.sha256(self.read(numbers).view(torch.uint8).numpy().data).hexdigest()

    def read(self, numbers: Tensor) -> Tensor:
        """[N, H], on the CPU: the states of the rows ``numbers``, one after the other."""
        spans = ((self._starts[number], self._counts[number]) for number in numbers.tolist())
        return torch.cat([self._states[start : start + count] for start, count in spans])


class SelfDistillation(nn.Module):
    """Both roles and the loss in one module, so that whatever wraps a model (DDP, autocast) wraps all of it."""

    def __init__(
        self, model: PeftModel | PreTrainedModel, config: DistillConfig, cached: TeacherStates | None = None
    ) -> None:
        """``model``: with an adapter, or whole; then all its weights are trained, and a copy of them teaches.

        Raises:
            ModelError: from ``split_head``.
        """
        super().__init__()
        self.decoder, head = split_head(model)
        self._transform = head.scale, head.softcap
        self.model = model
        self.settings = config
        self.config: Any = model.config  # the trainer looks for it
        self.cached = cached
        self.frozen: nn.Module | None = None
        self.teacher_head: Head | None = None
        """Where it is not the student's."""
        if config.objective == "ofsd" and not isinstance(model, PeftModel):
            self.teacher_head = self.head._replace(
                weight=self.head.weight.detach().clone(),
                bias=None if self.head.bias is None else self.head.bias.detach().clone(),
            )
            if cached is None:
                self.frozen = copy.deepcopy(self.decoder).requires_grad_(False)
        # What divides a model asks it for its parts.
        self._no_split_modules = model._no_split_modules
        self.base_model_prefix = "decoder"

    @property
    def head(self) -> Head:
        """The student's, with weights as they are now."""
        layer = self.get_output_embeddings()
        return Head(layer.weight, layer.bias, *self._transform)

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.model.gradient_checkpointing_enable(**kwargs)

    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean loss of a batch from ``collate`` or ``pack``, and each position's: the divergence from the teacher, or
        for ``objective = "sft"`` the cross-entropy of the student's own ids, for which there is no teacher."""
        if self.settings.objective == "sft":
            loss = partial(self._cross_entropy, batch)
        else:
            loss = partial(self._divergence, batch, self._teacher(batch))
        student = hidden_at(self.decoder, batch, "student")
        with computing(self.get_output_embeddings(), loss) as head:
            found: tuple[Tensor, Tensor] = head(student)
        return found

    def _cross_entropy(self, batch: Mapping[str, Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
        predicted = batch["student_input_ids"].flatten()[batch["student_index"] + 1]  # what a position predicts is next
        weights, most = batch.get("weights"), self.settings.logits_mib
        return fused_cross_entropy(student, predicted, self.head, weights=weights, logits_mib=most)

    def _divergence(self, batch: Mapping[str, Tensor], teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.settings
        return fused_divergence(
            student,
            teacher.to(student.device),
            self.head,
            teacher_head=self.teacher_head,
            weights=batch.get("weights"),
            divergence=settings.divergence,
            beta=settings.beta,
            tau=settings.tau,
            clip=settings.clip,
            student_temperature=settings.student_temperature,
            teacher_temperature=settings.teacher_temperature,
            logits_mib=settings.logits_mib,
        )

    @torch.no_grad()
    def _teacher(self, batch: Mapping[str, Tensor]) -> Tensor:
        if self.cached is not None:
            return self.cached.read(batch["pairs"])
        if self.frozen is not None:
            return hidden_at(self.frozen.eval(), batch, "teacher")
        assert isinstance(self.model, PeftModel)
        training = self.training
        self.model.eval()
        with self.model.disable_adapter():
            hidden = hidden_at(self.decoder, batch, "teacher")
        self.model.train(training)
        return hidden


@torch.no_grad()
def teach(
    model: PreTrainedModel,
    rows: Sequence[Row],
    path: Path,
    collator: Callable[[Sequence[Row]], Mapping[str, Tensor]],
    *,
    batch_size: int,
    progress: Progress = silent,
) -> TeacherStates:
    """The teacher's hidden states of all rows, computed in batches of like length and kept in the file ``path``, for all ranks.

    Batches that an earlier call has finished there are not computed again, if they are as it left them.

    Raises:
        RunError: the disk has no room.
    """
    decoder, head = split_head(model)
    if not ranks.is_first():
        ranks.gathered(None)  # the first makes the file
    states = TeacherStates(path, rows, head.weight.shape[1], head.weight.dtype)
    if ranks.is_first():
        ranks.gathered(None)
    training = model.training
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)  # what does not fit fails first
    finished = path.with_suffix(f".finished-{ranks.rank()}")  # a batch's checksum a line
    sums = {sum for file in path.parent.glob(f"{path.stem}.finished-*") for sum in file.read_text().split()}
    for at in range(ranks.rank() * batch_size, len(ordered), batch_size * ranks.count()):
        batch = collator(ordered[at : at + batch_size])
        if not (sums and states.checksum(batch["pairs"]) in sums):
            batch = {key: value.to(head.weight.device) for key, value in batch.items()}
            states.write(batch["pairs"], hidden_at(decoder, batch, "teacher"))
            with finished.open("a") as file:
                file.write(f"{states.checksum(batch['pairs'])}\n")
        progress(min(at + batch_size, len(rows)), len(rows), "teacher")
    ranks.gathered(None)
    model.train(training)
    return states


@torch.no_grad()
def packs(model: PreTrainedModel) -> bool:
    """Whether sequences that lie end to end stay apart in ``model``: found out by trying it.

    Attention heeds position ids that begin again; a convolution or a recurrence may run on over the border. What comes
    first is changed; if what follows changes in a single bit, the two are not apart.
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
