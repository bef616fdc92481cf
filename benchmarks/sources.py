"""Check whether the marked passages are the right ones, and whether "not found in these documents" is true.

    python benchmarks/sources.py questions/*.dev.jsonl.gz --corpus corpus.jsonl.gz --policy runs/x/grpo-1/policy

A policy answers each question twice: over the whole corpus, and over the corpus without the passages that hold an answer to any
of the questions. Questions are drawn from those without yes/no answers whose answers are in 1 to 20 passages, so that the
second corpus lacks the answers and little else. The agent says "not found" if the policy gave no answer, or one that no passage
it read holds (docs/agent.md); "gold" passages are those of ``metadata.gold_passage_ids``.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from search_e1.agent.agent import Agent
from search_e1.agent.answer import Answer
from search_e1.config import PolicyConfig, RolloutConfig
from search_e1.data.answers import exact_match
from search_e1.data.corpus import Corpus
from search_e1.data.questions import load_questions
from search_e1.evaluation.recall import patterns, words
from search_e1.evaluation.statistics import wilson
from search_e1.retrieval.base import Retriever
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.training import policy as policies
from search_e1.types import Passage, Question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="+", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--policy", default="small")
    parser.add_argument("--number", type=int, default=200, help="questions")
    parser.add_argument("--most", type=int, default=20, help="passages that may hold a question's answer")
    parser.add_argument("--seed", type=int, default=0)
    for limit in ("max_searches", "topk", "max_action_tokens", "max_observation_tokens", "max_tokens"):
        parser.add_argument(f"--{limit.replace('_', '-')}", type=int, default=RolloutConfig.model_fields[limit].default)
    parser.add_argument("--json", type=Path, help="write the answers here as well")
    arguments = parser.parse_args()
    limits = RolloutConfig(
        max_searches=arguments.max_searches, topk=arguments.topk, max_action_tokens=arguments.max_action_tokens,
        max_observation_tokens=arguments.max_observation_tokens, max_tokens=arguments.max_tokens, batch_size=64,
    )  # fmt: skip
    asked = [q for file in arguments.questions for q in load_questions(file, file.name.partition(".")[0])]
    passages = list(Corpus(arguments.corpus))
    holding = passages_that_hold(asked, passages)
    known = [q for q in asked if 0 < len(holding[q.id]) <= arguments.most]
    chosen = random.Random(arguments.seed).sample(known, min(arguments.number, len(known)))
    if not chosen:
        sys.exit("no question whose answer stands in so few passages")
    removed = set().union(*(holding[q.id] for q in chosen))
    policy = policies.load(arguments.policy, PolicyConfig(model=str(arguments.policy)))
    with tempfile.TemporaryDirectory() as scratch:
        whole = Bm25Index.build(passages, Path(scratch) / "whole")
        less = Bm25Index.build([p for p in passages if p.id not in removed], Path(scratch) / "less")
        answered = {name: ask(policy, index, limits, chosen) for name, index in (("whole", whole), ("without", less))}
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; {arguments.policy}, {policy.dtype}; {len(chosen)} of {len(known)} "
        f"questions (seed {arguments.seed}), {len(passages):,} passages, {len(removed):,} taken out"
    )
    Console(width=None if sys.stdout.isatty() else 100).print(table(chosen, answered, holding))
    if arguments.json:
        rows = [
            {"question": q.id, **{name: answers[i].as_json() for name, answers in answered.items()}}
            for i, q in enumerate(chosen)
        ]
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


def passages_that_hold(questions: Sequence[Question], passages: Iterable[Passage]) -> dict[str, set[str]]:
    """Question id -> ids of the passages that hold one of its answers; empty for yes/no questions."""
    found: dict[str, set[str]] = {question.id: set() for question in questions}
    by_word: dict[str, list[tuple[str, str]]] = defaultdict(list)  # longest word -> padded patterns and their questions
    for question in questions:
        for pattern in patterns(question):
            by_word[max(pattern.split(), key=len)].append((f" {pattern} ", question.id))
    for passage in passages:
        text = f" {words(f'{passage.title} {passage.text}')} "
        for word in by_word.keys() & set(text.split()):
            for pattern, id in by_word[word]:
                if pattern in text:
                    found[id].add(passage.id)
    return found


def ask(policy: policies.Policy, retriever: Retriever, limits: RolloutConfig, questions: Sequence[Question]) -> list[Answer]:
    with Agent(policy, retriever, limits) as agent:
        return [job.answer.result() for job in [agent.submit(question) for question in questions]]


def table(questions: Sequence[Question], answered: dict[str, list[Answer]], holding: dict[str, set[str]]) -> Table:
    whole, without = list(zip(questions, answered["whole"], strict=True)), answered["without"]
    right = [(q, a) for q, a in whole if exact_match(a.text, q.answers)]
    wrong = [a for q, a in whole if not exact_match(a.text, q.answers)]
    silent = [True for a in without if not a.found] + [False for _, a in whole if not a.found]
    rows = {
        "whole corpus: right (EM)": [(q, a) in right for q, a in whole],
        "whole corpus: said found": [a.found for _, a in whole],
        "right answers: a passage is marked": [a.found for _, a in right],
        "right answers: the first marked one holds a right answer": [marks_one_of(a, holding[q.id]) for q, a in right],
        "right answers: a marked one is gold": [marks_gold(q, a) for q, a in right if q.metadata.get("gold_passage_ids")],
        "wrong or no answers: said not found": [not a.found for a in wrong],
        "answers taken out: said not found (recall)": [not a.found for a in without],
        "said not found: answers were taken out (precision)": silent,
    }
    made = Table("share of", "n", "share", "95%")
    for name, values in rows.items():
        low, high = wilson(sum(values), len(values)) if values else (0.0, 1.0)
        share = f"{sum(values) / len(values):.3f}" if values else "-"
        made.add_row(name, str(len(values)), share, f"{low:.3f} to {high:.3f}")
    return made


def marked(answer: Answer) -> list[str]:
    return [source.passage.id for source in answer.sources if source.holds]


def marks_one_of(answer: Answer, ids: set[str]) -> bool:
    return bool(marked(answer)) and marked(answer)[0] in ids


def marks_gold(question: Question, answer: Answer) -> bool:
    gold: Any = question.metadata["gold_passage_ids"]
    return bool({*map(str, gold)} & {*marked(answer)})


if __name__ == "__main__":
    main()
