"""Prompts of the model writer, and parsing of its replies."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from search_e1.types import Passage

_MOST_CHARS = 4000
"""Maximum characters of a passage in a prompt; about 1,000 tokens, which fits a small context."""
UNKNOWN = "unknown"
_ONE = """{passages}

Write {number} from this passage, each with a short answer.
- A reader who does not see the passage must know what is asked: name the person, thing or place in full.
- Never write "the passage" or "the text".
- The answer is one to five words, copied from the passage, and is not in the question.
Use this form and write nothing else:
Question: ...
Answer: ...
"""
_TWO = """{passages}

Passage 1 mentions {link}; passage 2 is about {link}. Write one question that takes both passages to answer.
- It asks for a fact that only passage 2 has.
- It does not name {link}, but describes it by what passage 1 says of it and {first}. Name {first} in the question.
- The answer is one to five words, copied from passage 2.
- Never write "the passage" or "the text".
Use this form and write nothing else:
Question: ...
First: (the question that leads from {first} to {link})
Second: (the question about {link} that the answer answers)
Answer: ...
"""
_READ = """{passages}

Answer the question from the passages with as few words as possible, copied from them. If they do not hold the answer, write \
"{unknown}".
Question: {question}
Answer:"""
_CLOSED = """Answer the question with as few words as possible. If you do not know, write "{unknown}".
Question: {question}
Answer:"""

_LABEL = re.compile(
    r"^[\s>*#_-]*(?:\d+[.)]\s*)?(question|first|second|answer)\b[\s*_]*\d*[\s*_]*[:.][\s*_]*(.*?)[\s*_]*$", re.IGNORECASE
)
_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_QUOTES = "\"'\u201c\u201d\u2018\u2019` "


@dataclass(frozen=True, slots=True)
class Written:
    """A question-answer block of a reply."""

    question: str
    answer: str
    first: str = ""
    second: str = ""


def ask_for_one_hop(passage: Passage, number: int) -> str:
    return _filled(_ONE, passages=shown(passage), number="one question" if number == 1 else f"{number} different questions")


def ask_for_two_hops(first: Passage, second: Passage, link: str) -> str:
    return _filled(_TWO, passages=shown(first, second), link=link, first=first.title or "passage 1's subject")


def read_question(question: str, *passages: Passage) -> str:
    return _filled(_READ, passages=shown(*passages), question=question, unknown=UNKNOWN)


def closed_book(question: str) -> str:
    return _filled(_CLOSED, question=question, unknown=UNKNOWN)


def shown(*passages: Passage) -> str:
    """Passages as rendered in a prompt."""
    names = [f"Passage {i}" for i in range(1, len(passages) + 1)] if len(passages) > 1 else ["Passage"]
    return "\n\n".join(
        f"{name} ({p.title}):\n{p.text[:_MOST_CHARS]}" if p.title else f"{name}:\n{p.text[:_MOST_CHARS]}"
        for name, p in zip(names, passages, strict=True)
    )


def read_written(reply: str) -> Iterator[Written]:
    """The blocks of a reply with question and answer, in order; numbering, bullets and bold are ignored."""
    block: dict[str, str] = {}
    for line in without_thinking(reply).splitlines():
        if not (match := _LABEL.match(line)) or not match[2]:
            continue
        label = match[1].lower()
        if label == "question":
            block = {}
        block.setdefault(label, match[2].strip(_QUOTES))
        if label == "answer" and block.get("question"):
            answer = block["answer"].removesuffix(".").strip(_QUOTES)
            if answer:
                yield Written(block["question"], answer, block.get("first", ""), block.get("second", ""))
            block = {}


def read_answer(reply: str) -> str:
    """The first non-empty line, without an "Answer:" label."""
    lines = (line.strip() for line in without_thinking(reply).splitlines())
    line = next((line for line in lines if line), "")
    match = _LABEL.match(line)
    return (match[2] if match and match[1].lower() == "answer" else line).strip(_QUOTES)


def without_thinking(reply: str) -> str:
    return _THINKING.sub("", reply).split("</think>")[-1]


def _filled(template: str, **values: str) -> str:
    """Fill a template in a single pass, not with ``str.format`` or successive replacements: passages may contain braces."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)
