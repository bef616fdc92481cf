"""The environment speaks words: it reads an action's text and says what to answer it with."""

import re
from dataclasses import dataclass

from search_e1.types import ActionKind

# The inner guards make a match start at the *last* opening tag before its closing one, and end at the first closing one.
ACTION = re.compile(r"<(search|answer)>((?:(?!<\1>|</(?:search|answer)>).)*)</\1>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Action:
    kind: ActionKind
    argument: str | None


def parse_action(text: str) -> Action:
    """The first complete search or answer in the text of one generation.

    Text after the closing tag is ignored. A search without a query is malformed; an empty answer is an answer.
    """
    match = ACTION.search(text)
    if match is None:
        return Action(ActionKind.MALFORMED, None)
    kind, argument = ActionKind(match[1]), match[2].strip()
    if kind is ActionKind.SEARCH and not argument:
        return Action(ActionKind.MALFORMED, None)
    return Action(kind, argument)
