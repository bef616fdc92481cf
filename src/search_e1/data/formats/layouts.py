"""Question files in their original layouts: HotpotQA, 2WikiMultihopQA, MuSiQue, TriviaQA and KILT.

NQ-open (``question`` and a list ``answer``) needs no layout. A file is recognized by the keys of its first row.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from search_e1.data.benchmarks import annotation
from search_e1.data.lines import read_lines
from search_e1.errors import DataError

ALIASES = "id_aliases.json"
"""2WikiMultihopQA's aliases of its answers, a file beside the questions: JSON lines of Q_id, aliases and demonyms."""
Aliases = Mapping[str, list[str]]
Record = dict[str, Any]
"""A row in the form that ``questions.to_question`` reads."""


class Layout(NamedTuple):
    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    """Whether a row has the keys of this layout."""
    read: Callable[[Mapping[str, Any], Aliases], Record]
    """Raises KeyError, TypeError, ValueError or AttributeError for a row of another layout."""


def layout_of(row: Mapping[str, Any]) -> Layout | None:
    """The layout of a file whose first row is ``row``; ``None`` if unknown."""
    return next((layout for layout in _LAYOUTS if layout.matches(row)), None)


def read(layout: Layout, row: Mapping[str, Any], aliases: Aliases, where: str) -> Record:
    """The row as a record; ``metadata.unanswerable`` is true if the row says so.

    Raises:
        DataError: the row has another layout, or no answer, as in test sets with hidden answers.
    """
    try:
        record = layout.read(row, aliases)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DataError(
            f"{where}: not in the layout of {layout.name} ({missing}); give the file as published, or say where things "
            "are with --column FIELD=COLUMN"
        ) from None
    answered = any(isinstance(answer, str) and answer.strip() for answer in record["golden_answers"])
    if not answered and not record["metadata"].get("unanswerable"):
        raise DataError(
            f"{where}: no answer; the test set of {layout.name} is published without answers; give its train or dev file"
        )
    return record


def read_aliases(path: Path) -> Aliases:
    """Id of an answer -> its aliases, as 2WikiMultihopQA's own evaluation uses them.

    Raises:
        DataError: the file cannot be read.
    """
    found: dict[str, list[str]] = {}
    for number, row in read_lines(path):
        names: list[Any] = [row.get(key) for key in ("aliases", "demonyms")]
        if "Q_id" not in row or not all(isinstance(these, list) for these in names):
            raise DataError(f"{path}:{number}: not Q_id, aliases and demonyms; give {ALIASES} as published, or remove it")
        found[row["Q_id"]] = [name for these in names for name in these]
    return found


def _hotpotqa(row: Mapping[str, Any], aliases: Aliases) -> Record:
    known = {key: row[key] for key in ("supporting_facts", "type", "level", "evidences") if row.get(key) is not None}
    metadata = annotation(known, "2wikimultihopqa" if "evidences" in row else "hotpotqa")
    metadata |= {key: row[key] for key in ("type", "level") if key in known}
    answers = [row["answer"]] if row.get("answer") is not None else []
    answers += aliases.get(row.get("answer_id") or "", [])
    return {"id": row["_id"] if "_id" in row else row["id"], **_record(row["question"], answers, metadata)}


def _musique(row: Mapping[str, Any], aliases: Aliases) -> Record:
    paragraphs = {paragraph["idx"]: paragraph for paragraph in row.get("paragraphs") or ()}
    steps = [
        {**step, "support_paragraph": paragraphs.get(step.get("paragraph_support_idx"))}
        for step in row.get("question_decomposition") or ()
    ]
    metadata = annotation({"question_decomposition": steps}, "musique")
    if row.get("answerable") is False:
        metadata["unanswerable"] = True
    answers = [row["answer"]] if row.get("answer") is not None else []
    return {"id": row["id"], **_record(row["question"], [*answers, *(row.get("answer_aliases") or ())], metadata)}


def _triviaqa(row: Mapping[str, Any], aliases: Aliases) -> Record:
    answer = row.get("Answer") or {}
    answers = [answer["Value"]] if "Value" in answer else []
    answers += [*(answer.get("Aliases") or ()), *(answer.get("HumanAnswers") or ())]
    return {"id": row["QuestionId"], **_record(row["Question"], answers, {"hops": 1})}


def _kilt(row: Mapping[str, Any], aliases: Aliases) -> Record:
    if "input" not in row:
        raise ValueError("no 'input': KILT's files of TriviaQA hold ids alone, to which its own script adds the questions")
    outputs = row.get("output") or []
    answers = [output["answer"] for output in outputs if output.get("answer")]
    # One output's provenance is a complete set of evidence; other outputs are alternatives.
    evidence: list[Any] = next((output["provenance"] for output in outputs if output.get("provenance")), [])
    titles = list(dict.fromkeys(page["title"] for page in evidence if page.get("title")))
    return {"id": row["id"], **_record(row["input"], answers, {"supporting_titles": titles} if titles else {})}


def _record(question: Any, answers: list[Any], metadata: dict[str, Any]) -> Record:
    texts = [answer.strip() if isinstance(answer, str) else answer for answer in answers]
    return {
        "question": question.strip(),
        "golden_answers": [text for text in texts if text != ""],  # TriviaQA has empty answers among others
        "metadata": metadata,
    }


_LAYOUTS = (
    Layout("MuSiQue", lambda row: "question" in row and ("question_decomposition" in row or "answerable" in row), _musique),
    Layout("2WikiMultihopQA", lambda row: "evidences" in row and "supporting_facts" in row, _hotpotqa),
    Layout(
        "HotpotQA",
        lambda row: "question" in row and ("supporting_facts" in row or {"_id", "context"} <= row.keys()),
        _hotpotqa,
    ),
    Layout("TriviaQA", lambda row: {"Question", "QuestionId"} <= row.keys(), _triviaqa),
    Layout("KILT", lambda row: "question" not in row and "id" in row and not {"input", "output"}.isdisjoint(row), _kilt),
)
