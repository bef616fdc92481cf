"""The generator for CPUs and small GPUs: transformers' own ``generate``, batched, with stop strings."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from search_e1.rollout.generator import Generation


class HFGenerator:
    """Samples from a transformers model that is already in memory, so that a trainer can lend its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        batch_size: int = 64,
        on_id: Callable[[int | None], None] | None = None,
    ) -> None:
        """``batch_size``: rows sampled together. More is faster until memory ends.

        ``on_id``, where one row is sampled alone: called with ``None`` when it begins, then with each id as it is sampled.
        """
        self.on_id = on_id
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.context_length = model.config.get_text_config().max_position_embeddings
        self._end_ids = _end_ids(model, tokenizer)
        self._pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)  # masked

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, stop: Sequence[str]
    ) -> list[Generation]:
        """See ``Generator``. Randomness is torch's global one. The model's own sampling defaults are ignored."""
        was_training, defaults = self.model.training, self.model.generation_config
        self.model.eval()  # a trainer lends its model in train mode; dropout would sample from another policy
        # A model's own defaults (Qwen's have top-k, top-p and a repetition penalty) fill whatever is not set, and would
        # silently change the distribution that training believes was sampled.
        self.model.generation_config = GenerationConfig()
        try:
            # Rows of like length side by side: less padding. Longest first: a batch that does not fit fails at once.
            order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
            generations: dict[int, Generation] = {}
            for at in range(0, len(order), self.batch_size):
                rows = order[at : at + self.batch_size]
                batch = self._generate_batch([prompts[i] for i in rows], max_new_tokens, temperature, stop)
                generations.update(zip(rows, batch, strict=True))
        finally:
            self.model.train(was_training)
            self.model.generation_config = defaults
        return [generations[i] for i in range(len(prompts))]

    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, stop: Sequence[str]
    ) -> list[Generation]:
        width = max(map(len, prompts))
        device = self.model.device
        ids = torch.tensor([[self._pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        ends = _Ends(width, self._end_ids, StopStringCriteria(self.tokenizer, list(stop)) if stop else None)
        record = _Logprobs(temperature or 1.0, self.on_id if len(prompts) == 1 else None)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, pad_token_id=self._pad_id, do_sample=temperature > 0, top_k=0, top_p=1.0
        )
        model: Any = self.model  # mixed in from GenerationMixin, which the type of the class does not show
        sequences = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([record]),
            stopping_criteria=StoppingCriteriaList([record.criterion, ends]),
        )
        sampled = sequences[:, width:].tolist()
        logprobs = torch.stack(record.sampled, dim=1).tolist()
        lengths = ends.lengths(len(sampled[0]))
        return [
            Generation(tuple(row[:n]), tuple(row_logprobs[:n]))
            for row, row_logprobs, n in zip(sampled, logprobs, lengths, strict=True)
        ]


class _Logprobs(LogitsProcessor):
    """Applies the temperature and keeps the log-probability of each sampled id, one step's logits at a time.

    ``generate`` could return all logits instead, but at a vocabulary of 151,936 that is 19 GB for 64 rows of 500 tokens.
    """

    def __init__(self, temperature: float, on_id: Callable[[int | None], None] | None = None) -> None:
        self.temperature = temperature
        self._on_id = on_id
        if on_id:
            on_id(None)
        self.sampled: list[torch.Tensor] = []  # one [rows] a step, float32
        self._step: torch.Tensor | None = None  # [rows, vocabulary], float32

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._step = torch.log_softmax(scores.float() / self.temperature, -1)
        return self._step

    def criterion(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Called by ``generate`` right after each sampled id was appended; never stops anything."""
        assert self._step is not None
        self.sampled.append(self._step.gather(1, input_ids[:, -1:])[:, 0])
        if self._on_id:
            self._on_id(int(input_ids[0, -1]))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Ends(StoppingCriteria):
    """Stops a row at an end token or a stop string, and remembers where, so that no length is guessed from padding."""

    def __init__(self, prompt_width: int, end_ids: Sequence[int], stop_strings: StopStringCriteria | None) -> None:
        self.prompt_width = prompt_width
        self.end_ids = end_ids
        self.stop_strings = stop_strings
        self.ended_at: torch.Tensor | None = None  # [rows], 0 while a row goes on

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done = torch.isin(input_ids[:, -1], torch.tensor(self.end_ids, dtype=torch.long, device=input_ids.device))
        if self.stop_strings is not None:
            # Of sampled ids alone: a prompt that ends with a tag (an example in it) must not stop its row.
            done = done | self.stop_strings(input_ids[:, self.prompt_width :], scores)
        if self.ended_at is None:
            self.ended_at = torch.zeros_like(done, dtype=torch.long)
        self.ended_at[done & (self.ended_at == 0)] = input_ids.shape[1] - self.prompt_width
        return self.ended_at > 0

    def lengths(self, width: int) -> list[int]:
        """Ids sampled in each row, of ``width`` that the batch holds."""
        assert self.ended_at is not None
        return [n or width for n in self.ended_at.tolist()]


def _end_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """End tokens: the tokenizer's, and those that the model's generation config adds (chat models often have two)."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    return sorted(i for i in ids if i is not None)
