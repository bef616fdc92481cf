"""Drafts of questions, and the split of documents."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from search_e1.data.answers import normalize_answer
from search_e1.errors import ConfigError
from search_e1.runs import sha256_text
from search_e1.types import Passage, Question, Record

Candidate = tuple[Passage, ...]
"""One passage, or two linked passages in the order in which they are needed."""
Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")


class Draft(Record):
    """A question as written, with the data that filters need."""

    text: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    """The passages it was written from, in the order in which they are needed."""
    queries: tuple[str, ...]
    """A query for each of ``passages``: the question, or the sub-questions of two hops."""
    made_by: str
    rule: str = ""

    @property
    def hops(self) -> int:
        return len(self.passages)

    @property
    def id(self) -> str:
        return f"made-{sha256_text(' '.join((normalize_answer(self.text), *self.answers)))[:12]}"

    def question(self) -> Question:
        """The draft as a question, with passage ids and titles in the metadata for ``rollout.demonstrations.passages``."""
        metadata: dict[str, Any] = {
            "gold_passage_ids": [passage.id for passage in self.passages],
            "supporting_titles": list(dict.fromkeys(passage.title for passage in self.passages if passage.title)),
            "made_by": self.made_by,
        }
        metadata |= {"rule": self.rule} if self.rule else {}
        metadata |= {"sub_questions": list(self.queries)} if self.hops > 1 else {}
        return Question(id=self.id, text=self.text, answers=self.answers, hops=self.hops, metadata=metadata)


def document_of(passage: Passage) -> str:
    """The document that a passage belongs to: its ``file``, else its title, else its id."""
    return str(passage.metadata.get("file") or passage.title or passage.id)


def split_documents(passages: Sequence[Passage], eval_share: float, seed: int) -> dict[str, Split]:
    """The split of each document; ``eval`` gets at least one document, with about ``eval_share`` of the passages.

    Raises:
        ConfigError: there is only one document.
    """
    sizes = Counter(map(document_of, passages))
    if not eval_share:
        return dict.fromkeys(sizes, "train")
    if len(sizes) < 2:
        raise ConfigError(
            f"--eval-share {eval_share:g}: all passages come from one document ({next(iter(sizes))}), which cannot be split; "
            "write --eval-share 0, or give more documents"
        )
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    split: dict[str, Split] = dict.fromkeys(sizes, "train")
    wanted, held = eval_share * len(passages), 0.0
    for document in order[:-1]:  # the last one always stays in training
        if not held or held + sizes[document] / 2 <= wanted:
            split[document] = "eval"
            held += sizes[document]
    return split
