"""Demonstrations from a user's file: an expert's actions for a question, as text.

Each line holds a question's ``id`` and either ``text``, the whole response in Search-R1's tags with observations between
``<information>`` and ``</information>``, or ``turns``, a list of ``action_text`` and ``observation_text`` as in a pool's
trajectories, which works for every protocol. Text is encoded with the policy's tokenizer.

They serve as references of the teacher (by calling the object) and in a cold start (``lessons``). A cold start may omit
observations: the retriever provides them.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from search_e1.config import Prompts
from search_e1.data.answers import exact_match
from search_e1.data.lines import read_lines
from search_e1.errors import DataError
from search_e1.rollout.demonstrations.forms import Lesson
from search_e1.rollout.demonstrations.writer import Writer, detours, trajectory
from search_e1.runs.tokenizing import tokenizing
from search_e1.text.prompts import INFORMATION_CLOSE, INFORMATION_OPEN, neutralize
from search_e1.text.protocols import protocol_of
from search_e1.types import ActionKind, Question, Trajectory, Turn

_INFORMATION = re.compile(r"\s*<information>(.*?)</information>\s*", re.DOTALL)
_SEARCH_END = re.compile(r"(?<=</search>)(?!\s*\Z)")
_HOLDS = 'each line holds {"id", "text"} or {"id", "turns": [{"action_text", "observation_text"}, ...]}'
_Action = tuple[ActionKind, str | None]
"""The kind of an action, and its query or answer."""


class _Step(NamedTuple):
    action: str
    observation: str


class Demonstrations:
    """The demonstrations of a file; calling it with a question returns the question's demonstrations as trajectories."""

    def __init__(self, path: Path, tokenizer: Any, prompts: Prompts) -> None:
        """
        Raises:
            DataError: the file cannot be read, or a line is not a demonstration (named).
        """
        self.path, self._tokenizer, self._prompts = path, tokenizer, prompts
        self._protocol = protocol_of(tokenizer, prompts)
        self._by_question: dict[str, list[tuple[str, list[_Step]]]] = {}
        for number, record in read_lines(path):
            where = f"{path}:{number}"
            id = record.get("id")
            if type(id) not in (int, str) or ("text" in record) == ("turns" in record):
                raise DataError(f"{where}: not a demonstration; {_HOLDS}")
            self._by_question.setdefault(str(id), []).append((where, self._steps(record, where)))

    def __call__(self, question: Question) -> list[Trajectory]:
        """The question's demonstrations in the order of the file; empty if there are none.

        Raises:
            DataError: a demonstration does not search and then answer correctly; names the line.
        """
        return [self._trajectory(question, steps, where) for where, steps in self._by_question.get(question.id, ())]

    def check(self, questions: Iterable[Question]) -> None:
        """Check the demonstrations of ``questions`` without tokenizing them.

        Raises:
            DataError: see ``__call__``; or none of the questions has a demonstration.
        """
        for question in self._demonstrated(questions):
            for where, steps in self._by_question[question.id]:
                self._actions(question, steps, where)

    def check_form(self, questions: Iterable[Question]) -> None:
        """Check the form of the demonstrations of ``questions``, whether correct or not.

        Raises:
            DataError: as ``lessons``, except for demonstrations that are wrong or too long.
        """
        for question in self._demonstrated(questions):
            for where, steps in self._by_question[question.id]:
                self._searches(steps, where, executed=False)

    def lessons(self, questions: Sequence[Question], writer: Writer, *, seed: int = 0) -> tuple[list[Lesson], int]:
        """Lessons from the demonstrations of ``questions`` that are correct and within the limits, and the number of others.

        Raises:
            DataError: a demonstration does not search and then answer in the protocol's format (names the line); none of the
                questions has a demonstration; or none is correct and within the limits.
            RetrievalError: from the retriever.
        """
        given = [(question, *one) for question in self._demonstrated(questions) for one in self._by_question[question.id]]
        actions = [self._searches(steps, where, executed=False) for _, where, steps in given]
        writer.retrieve(query or "" for made in actions for kind, query in made if kind is ActionKind.SEARCH)

        def write(at: int) -> Trajectory:
            question, _, steps = given[at]
            return writer.trajectory(question, [self._executed(*turn, writer) for turn in zip(steps, actions[at], strict=True)])

        rng = random.Random(seed)
        written = writer.map(write, range(len(given)))
        lessons = [
            Lesson(question, clean, writer, detours(question.text, rng), _needed(clean, writer))
            for (question, *_), clean in zip(given, written, strict=True)
            if clean.correct and writer.fits(clean)
        ]
        if not lessons:
            question, where, _ = given[0]
            raise DataError(
                f"{self.path}: none of {len(given)} demonstrations of training questions is correct and within the limits of "
                f"[rollout]; {where} answers {written[0].answer!r}, and question {question.id!r} has "
                f"{list(question.answers)}; fix them"
            )
        return lessons, len(given) - len(lessons)

    def _executed(self, step: _Step, action: _Action, writer: Writer) -> Turn:
        kind, query = action
        unanswered = kind is ActionKind.SEARCH and not step.observation
        return writer.searched(step.action, query or "") if unanswered else self._turn(step, kind, query)

    def _demonstrated(self, questions: Iterable[Question]) -> list[Question]:
        known = [question for question in questions if question.id in self._by_question]
        if not known:
            raise DataError(
                f"{self.path}: no demonstration of any training question; give a file whose ids match those of data.train"
            )
        return known

    def _steps(self, record: Mapping[str, Any], where: str) -> list[_Step]:
        if "turns" in record:
            try:
                steps = [_Step(turn["action_text"], turn.get("observation_text", "")) for turn in record["turns"]]
            except (AttributeError, KeyError, TypeError) as error:
                raise DataError(f"{where}: not a demonstration; {_HOLDS}") from error
        elif self._prompts.protocol != "tags":
            raise DataError(f'{where}: "text" is for prompts.protocol = "tags"; give "turns" instead')
        else:
            steps = self._split(record["text"].rstrip()) if isinstance(record["text"], str) else []
        if not steps or not all(isinstance(text, str) for step in steps for text in step):
            raise DataError(f"{where}: not a demonstration; {_HOLDS}")
        return steps

    def _split(self, text: str) -> list[_Step]:
        """Split a response in tags into actions with their observations, empty where a search was not executed."""
        parts = _INFORMATION.split(text)
        seen = [*map(self._observed, parts[1::2]), ""]
        steps: list[_Step] = []
        for part, found in zip(parts[::2], seen, strict=False):
            *before, last = _SEARCH_END.split(part)
            steps += [*(_Step(action, "") for action in before), _Step(last, found)]
        return steps

    def _observed(self, passages: str) -> str:
        """The observation as the environment would write it, with its blank lines."""
        return INFORMATION_OPEN + neutralize(self._tokenizer, passages.strip("\n")) + "\n" + INFORMATION_CLOSE

    def _actions(self, question: Question, steps: list[_Step], where: str) -> list[_Action]:
        """The actions: executed searches, then a correct answer."""
        actions = self._searches(steps, where)
        answer = actions[-1][1]
        if not exact_match(answer, question.answers):
            raise DataError(
                f"{where}: answers {answer!r}, and question {question.id!r} has {list(question.answers)}; fix it, or drop the "
                "line"
            )
        return actions

    def _searches(self, steps: list[_Step], where: str, *, executed: bool = True) -> list[_Action]:
        """The actions: searches (with observations, if ``executed``), then an answer."""
        actions = [self._protocol.parse(step.action) for step in steps]
        for number, (action, step) in enumerate(zip(actions, steps, strict=True), 1):
            last = number == len(steps)
            if action.kind is not (ActionKind.ANSWER if last else ActionKind.SEARCH):
                needed = "an answer" if last else "a search"
                raise DataError(f"{where}: turn {number} is not {needed} in the protocol's form; fix it, or drop the line")
            if last and step.observation:
                raise DataError(f"{where}: something follows the answer; fix it, or drop the line")
            if executed and not last and not step.observation:
                raise DataError(f"{where}: nothing was found in turn {number}; fix it, or drop the line")
        return [(action.kind, action.argument) for action in actions]

    def _trajectory(self, question: Question, steps: list[_Step], where: str) -> Trajectory:
        actions = self._actions(question, steps, where)
        turns = [self._turn(step, *action) for step, action in zip(steps, actions, strict=True)]
        return trajectory(self._tokenizer, self._prompts, question, turns, lambda a, q: exact_match(a, q.answers))

    def _turn(self, step: _Step, kind: ActionKind, argument: str | None) -> Turn:
        return Turn(
            action_ids=self._ids(step.action),
            action_text=step.action,
            kind=kind,
            argument=argument,
            observation_ids=self._ids(step.observation),
            observation_text=step.observation,
        )

    def _ids(self, text: str) -> tuple[int, ...]:
        with tokenizing(self._tokenizer):
            return tuple(self._tokenizer.encode(text, add_special_tokens=False)) if text else ()


def _needed(clean: Trajectory, writer: Writer) -> frozenset[str]:
    """Ids of the passages that the retriever finds for the searches; given observations do not name theirs."""
    queries = [turn.argument or "" for turn in clean.turns if turn.kind is ActionKind.SEARCH]
    return frozenset(passage.id for query in queries for passage in writer.passages(query))
