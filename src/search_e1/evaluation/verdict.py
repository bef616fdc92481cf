"""The findings of an audit: sentences about its figures, each with a remedy."""

from collections.abc import Mapping, Sequence
from typing import Literal

from search_e1.evaluation.preflight import Finding, Level
from search_e1.evaluation.reach import Reached
from search_e1.types import Record

Role = Literal["train", "eval"]
COMMON = 0.05
"""Share of passages above which containing an answer is no evidence: three random passages contain it one time in seven."""
_FAR = 0.3
_KIND: Mapping[Role, str] = {"train": "training", "eval": "evaluation"}
_BUT_FOR = "except for inflection, order and small words"


class FileAudit(Record):
    """Figures of one file, or of all files of a role."""

    name: str
    role: Role
    questions: int
    yes_no: int
    """Questions whose every right answer is yes or no, which is not searched for in passages. The retrieval figures below
    exclude yes/no and unanswerable questions."""
    unanswerable: int = 0
    """Questions that ``metadata.unanswerable`` marks as having no answer in the documents."""
    in_corpus: float | None = None
    """Share with an answer in some passage; ``None`` if passages were not read."""
    in_top: dict[int, float] = {}
    """k -> share with an answer in the first k passages for the question's own words, by BM25."""
    rank: float | None = None
    """Median BM25 rank of the first passage with an answer, over questions that have one."""
    passages: float | None = None
    """Median number of passages with an answer, over questions that have one."""
    common: int = 0
    out_of_reach: int = 0
    """Questions whose answer is in no passage, or cannot be written by the policy."""
    refused: int = 0
    unsayable: int = 0
    conflicts: int = 0
    leaks: int = 0
    """Questions that the other role's files also ask."""
    near_leaks: int = 0
    repeats: int = 0
    """Repeated questions, within all training files together or within one evaluation file."""
    near_repeats: int = 0

    @property
    def most(self) -> float:
        """The highest EM possible without answering from memory."""
        return 1 - self.out_of_reach / self.questions if self.questions else 0.0


def find(totals: Sequence[FileAudit], found: Reached | None, skipped: Mapping[str, int]) -> list[Finding]:
    """The findings about training and evaluation questions, evaluation first."""
    made = [reach(total) for total in reversed(totals) if found]
    return [*made, records(totals, found, skipped), wording(totals), repeats(totals), *filter(None, [leaks(totals)])]


def reach(total: FileAudit) -> Finding:
    """Can the questions be answered from the passages?"""
    lost, kind = total.out_of_reach / total.questions, f"{total.questions:,} {_KIND[total.role]} questions"
    share, given = f"{lost:.0%}" if lost >= 0.005 else "under 1%", " that can be given" if total.unsayable else ""
    text = f"Of {kind} {share} have no passage that holds an answer{given}"
    if not total.out_of_reach:
        text = f"All of {kind} have a passage that holds an answer."
    elif total.role == "eval":
        text += f": EM can be at most {total.most:.2f}, unless the policy answers from memory."
    else:
        text += ": there, only guesses can be rewarded."
    if total.in_top:
        shares = [f"{share:.0%} in the first {k}" for k, share in total.in_top.items()]
        text += f" The question's own words find one for {', '.join(shares)}."
    if total.common:
        text += f" {_are(total.common, 'answer')} in more than {COMMON:.0%} of the passages, where finding it proves nothing."
    if lost <= _FAR:
        return Finding(check="reach", level=Level.OK, text=text)
    remedy = "Add passages that hold the answers, or take such questions out: search-e1 data audit --out lists them."
    return Finding(check="reach", level=Level.WARNING, text=text, remedy=remedy)


def records(totals: Sequence[FileAudit], found: Reached | None, skipped: Mapping[str, int]) -> Finding:
    """Can every line be read, and does no passage repeat another?"""
    refused = sum(total.refused for total in totals)
    parts = [f"{_are(refused, 'line')} not {'a question' if refused == 1 else 'questions'}"] if refused else []
    if skipped:
        parts.append("invalid passages: " + ", ".join(f"{number:,} {fault}" for fault, number in skipped.items()))
    if parts:
        remedy = "Fix or remove them: a run stops at the first."
        return Finding(check="records", level=Level.WARNING, text=f"{'; '.join(parts)}.", remedy=remedy)
    if found and found.repeated:
        text = f"{found.repeated:,} of {found.passages:,} passages repeat another, and take up a place in the top k beside it."
        return Finding(check="records", level=Level.WARNING, text=text, remedy="Remove them from the corpus.")
    text = f"Every line can be read{', and no passage repeats another' if found else ''}."
    return Finding(check="records", level=Level.OK, text=text)


def wording(totals: Sequence[FileAudit]) -> Finding:
    """Can every answer be written, and does no question have conflicting answers?"""
    count, yes_no, unanswerable, unsayable, conflicts = (
        sum(getattr(total, name) for total in totals)
        for name in ("questions", "yes_no", "unanswerable", "unsayable", "conflicts")
    )
    text = f"{yes_no / count:.0%} of {count:,} questions are answered by yes or no"
    text += f", and {_are(unanswerable, 'question')} marked as unanswerable" if unanswerable else ""
    if not unsayable + conflicts:
        return Finding(
            check="wording",
            level=Level.OK,
            text=f"{text}; every {'other ' if unanswerable else ''}question has an answer that can be given.",
        )
    parts = [f"no policy can give the answer of {unsayable:,}"] if unsayable else []
    parts += [f"{_are(conflicts, 'question')} asked with other answers elsewhere"] if conflicts else []
    remedy = "Fix their answers: search-e1 data audit --out lists them."
    return Finding(check="wording", level=Level.WARNING, text=f"{text}; {'; '.join(parts)}.", remedy=remedy)


def repeats(totals: Sequence[FileAudit]) -> Finding:
    """Is each question asked once?"""
    parts = [
        f"{count:,} of {total.questions:,} {_KIND[total.role]} questions{kind}"
        for total in totals
        for count, kind in ((total.repeats, ""), (total.near_repeats, f" {_BUT_FOR}"))
        if count
    ]
    if not parts:
        return Finding(check="repeats", level=Level.OK, text="No question is asked twice.")
    remedy = "`search-e1 data prepare --duplicates drop` keeps the first of identical ones."
    return Finding(check="repeats", level=Level.WARNING, text=f"Asked before: {'; '.join(parts)}.", remedy=remedy)


def leaks(totals: Sequence[FileAudit]) -> Finding | None:
    """Is an evaluation question also a training question? ``None`` without training or evaluation files."""
    evaluated = next((total for total in totals if total.role == "eval"), None)
    if len(totals) < 2 or not evaluated:
        return None
    if not evaluated.leaks + evaluated.near_leaks:
        return Finding(check="leaks", level=Level.OK, text="No evaluation question is a training question.")
    parts = [f"{_are(evaluated.leaks, 'evaluation question')} in training"] if evaluated.leaks else []
    parts += [f"{_are(evaluated.near_leaks, 'evaluation question')} in training {_BUT_FOR}"] if evaluated.near_leaks else []
    remedy = "`search-e1 data prepare --drop-leaks` removes identical ones from training; check the others."
    return Finding(check="leaks", level=Level.WARNING, text=f"{'; '.join(parts)}.", remedy=remedy)


def _are(count: int, noun: str) -> str:
    return f"{count:,} {noun} is" if count == 1 else f"{count:,} {noun}s are"
