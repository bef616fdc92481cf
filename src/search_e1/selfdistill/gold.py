"""Demonstrations that a user gives, as references: what an expert did for a question, in words.

A line of the file holds a question's ``id`` and either ``text``, the whole response in Search-R1's tags with what came back
between ``<information>`` and ``</information>``, or ``turns``, a list of ``action_text`` and ``observation_text`` as a pool's
trajectories have them, which does for every protocol. Ids are the policy's own: nothing is taken over from another tokenizer.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from search_e1.config import Prompts
from search_e1.data.answers import exact_match, f1
from search_e1.data.lines import read_lines
from search_e1.errors import DataError
from search_e1.text.prompts import INFORMATION_CLOSE, INFORMATION_OPEN, neutralize, plain_prompt
from search_e1.text.protocols import protocol_of
from search_e1.types import ActionKind, Question, StopReason, Trajectory, Turn

_INFORMATION = re.compile(r"\s*<information>(.*?)</information>\s*", re.DOTALL)
_HOLDS = 'each line holds {"id", "text"} or {"id", "turns": [{"action_text", "observation_text"}, ...]}'


class _Step(NamedTuple):
    action: str
    observation: str


class Demonstrations:
    """The demonstrations of a file; called with a question it gives the question's own, as trajectories."""

    def __init__(self, path: Path, tokenizer: Any, prompts: Prompts) -> None:
        """
        Raises:
            DataError: the file cannot be read, or a line is no demonstration; names it.
        """
        self.path, self._tokenizer, self._prompts = path, tokenizer, prompts
        self._protocol = protocol_of(tokenizer, prompts)
        self._found: dict[str, list[tuple[str, list[_Step]]]] = {}
        for number, record in read_lines(path):
            where = f"{path}:{number}"
            id = record.get("id")
            if type(id) not in (int, str) or ("text" in record) == ("turns" in record):
                raise DataError(f"{where}: not a demonstration; {_HOLDS}")
            self._found.setdefault(str(id), []).append((where, self._steps(record, where)))

    def __call__(self, question: Question) -> list[Trajectory]:
        """In the order of the file; none if it has none.

        Raises:
            DataError: a demonstration does not search and then answer rightly; names the line.
        """
        return [self._trajectory(question, steps, where) for where, steps in self._found.get(question.id, ())]

    def check(self, questions: Iterable[Question]) -> None:
        """Find every mistake in the demonstrations of ``questions``, without tokenising them.

        Raises:
            DataError: see ``__call__``; or none of the questions has one.
        """
        known = [question for question in questions if question.id in self._found]
        if not known:
            raise DataError(
                f"{self.path}: no demonstration of any training question; give one whose ids are those of data.train"
            )
        for question in known:
            for where, steps in self._found[question.id]:
                self._actions(question, steps, where)

    def _steps(self, record: Mapping[str, Any], where: str) -> list[_Step]:
        if "turns" in record:
            try:
                steps = [_Step(turn["action_text"], turn.get("observation_text", "")) for turn in record["turns"]]
            except (AttributeError, KeyError, TypeError) as error:
                raise DataError(f"{where}: not a demonstration; {_HOLDS}") from error
        elif self._prompts.protocol != "tags":
            raise DataError(f'{where}: "text" is for prompts.protocol = "tags"; give "turns" instead')
        else:
            parts = _INFORMATION.split(record["text"].rstrip()) if isinstance(record["text"], str) else []
            seen = [*map(self._observed, parts[1::2]), ""]
            steps = [_Step(action, found) for action, found in zip(parts[::2], seen, strict=False)]
        if not steps or not all(isinstance(text, str) for step in steps for text in step):
            raise DataError(f"{where}: not a demonstration; {_HOLDS}")
        return steps

    def _observed(self, passages: str) -> str:
        """As the environment would have written it: the blank lines are its own."""
        return INFORMATION_OPEN + neutralize(self._tokenizer, passages.strip("\n")) + "\n" + INFORMATION_CLOSE

    def _actions(self, question: Question, steps: list[_Step], where: str) -> list[tuple[ActionKind, str | None]]:
        """What the actions are: searches with what they found, and the right answer at the end."""
        actions = [self._protocol.parse(step.action) for step in steps]
        for number, (action, step) in enumerate(zip(actions, steps, strict=True), 1):
            last = number == len(steps)
            if action.kind is not (ActionKind.ANSWER if last else ActionKind.SEARCH):
                needed = "an answer" if last else "a search"
                raise DataError(f"{where}: turn {number} is not {needed} in the protocol's form; mend it, or drop the line")
            if bool(step.observation) is last:
                found = "something follows the answer" if last else f"nothing was found in turn {number}"
                raise DataError(f"{where}: {found}; mend it, or drop the line")
        if not exact_match(actions[-1].argument, question.answers):
            raise DataError(
                f"{where}: answers {actions[-1].argument!r}, and question {question.id!r} has {list(question.answers)}; mend "
                "it, or drop the line"
            )
        return [(action.kind, action.argument) for action in actions]

    def _trajectory(self, question: Question, steps: list[_Step], where: str) -> Trajectory:
        turns = tuple(
            Turn(
                action_ids=self._ids(step.action),
                action_text=step.action,
                kind=kind,
                argument=argument,
                observation_ids=self._ids(step.observation),
                observation_text=step.observation,
            )
            for step, (kind, argument) in zip(steps, self._actions(question, steps, where), strict=True)
        )
        return Trajectory(
            question_id=question.id,
            prompt_ids=plain_prompt(self._tokenizer, self._prompts, question.text),
            turns=turns,
            stop_reason=StopReason.ANSWERED,
            answer=turns[-1].argument,
            reward=exact_match(turns[-1].argument, question.answers),
            f1=f1(turns[-1].argument, question.answers),
        )

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False)) if text else ()
