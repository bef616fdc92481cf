"""Questions written by a model, filtered by its own answers with and without the passages."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from search_e1.data.answers import cover_match, exact_match, normalize_answer
from search_e1.errors import EndpointError, ModelError
from search_e1.questions import prompts
from search_e1.questions.completions import Completer, Tell
from search_e1.questions.draft import Candidate, Draft
from search_e1.questions.filters import Filter, count_usable
from search_e1.questions.links import bare_title

_ENOUGH = 16
"""Number of replies after which writing stops if none holds a usable question."""
_LONG_ANSWER = 15  # words; a longer reply may contain the answer by chance
_SHOWN = 160  # characters of a reply in a message


@dataclass
class ModelWriter:
    """Writes drafts of candidates; as deterministic as its completer."""

    completer: Completer
    per_passage: int
    temperature: float
    tell: Tell
    _replies: int = field(default=0, init=False)
    usable: int = field(default=0, init=False)
    _example: str = field(default="", init=False)

    @property
    def name(self) -> str:
        return self.completer.name

    def write(self, candidates: Sequence[Candidate]) -> list[list[Draft]]:
        """
        Raises:
            EndpointError, ModelError: none of the first replies holds a usable question; the message quotes one.
        """
        requests = [
            prompts.ask_for_two_hops(candidate[0], candidate[1], bare_title(candidate[1]))
            if len(candidate) > 1
            else prompts.ask_for_one_hop(candidate[0], self.per_passage)
            for candidate in candidates
        ]
        replies = self.completer.complete(requests, temperature=self.temperature, purpose="writing", tell=self.tell)
        drafts = [self._drafts(candidate, reply) for candidate, reply in zip(candidates, replies, strict=True)]
        self._replies += len(replies)
        self.usable += sum(map(count_usable, drafts))
        self._example = self._example or next((reply for reply in replies if reply.strip()), "")
        if self._replies >= _ENOUGH:
            self.check()
        return drafts

    def check(self) -> None:
        """
        Raises:
            EndpointError, ModelError: no reply so far holds a usable question.
        """
        if self.usable or not self._replies:
            return
        shown = " ".join(self._example.split())[:_SHOWN]
        error = EndpointError if self.name.startswith("endpoint") else ModelError
        raise error(
            f"{self.name}: none of {self._replies} replies holds a usable question; one of them: {shown!r}; name a stronger "
            "model, or, if that is cut short, raise --max-tokens"
        )

    def _drafts(self, candidate: Candidate, reply: str) -> list[Draft]:
        made = []
        for written in list(prompts.read_written(reply))[: self.per_passage]:
            queries: tuple[str, ...] = (written.question,)
            if len(candidate) > 1:
                first, second = candidate
                queries = (
                    written.first or f"{first.title} {written.question}",
                    written.second or f"{second.title} {written.question}",
                )
            made.append(
                Draft(text=written.question, answers=(written.answer,), passages=candidate, queries=queries, made_by=self.name)
            )
        return made

    def filters(self) -> list[Filter]:
        return [Filter("answered with its passages", self._not_answered), Filter("not known without them", self._known)]

    def _not_answered(self, drafts: Sequence[Draft]) -> list[str]:
        requests = [prompts.read_question(draft.text, *draft.passages) for draft in drafts]
        replies = self.completer.complete(requests, temperature=0.0, purpose="reading", tell=self.tell)
        answers = [prompts.read_answer(reply) for reply in replies]
        return [
            "" if _right(answer, draft) else f"answered {answer[:_SHOWN]!r}"
            for answer, draft in zip(answers, drafts, strict=True)
        ]

    def _known(self, drafts: Sequence[Draft]) -> list[str]:
        requests = [prompts.closed_book(draft.text) for draft in drafts]
        replies = self.completer.complete(requests, temperature=0.0, purpose="closed book", tell=self.tell)
        answers = (prompts.without_thinking(reply) for reply in replies)
        return [
            "answered without them" if cover_match(answer, draft.answers) else ""
            for answer, draft in zip(answers, drafts, strict=True)
        ]


def _right(answer: str, draft: Draft) -> bool:
    short = len(normalize_answer(answer).split()) <= _LONG_ANSWER
    return bool(exact_match(answer, draft.answers) or (short and cover_match(answer, draft.answers)))
