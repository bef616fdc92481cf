"""A pair in the terminal: the reference and the student side by side.

Actions are aligned as in the divergence. Between the columns: nothing if two actions are the same, ``|`` if they differ, ``<``
and ``>`` if only the reference or only the student acted.
"""

import re

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from search_e1.runs.safe import printable
from search_e1.selfdistill.pairs import Step, align, divergence
from search_e1.text.prompts import seen_passages, split_passage
from search_e1.types import ActionKind, Pair, Trajectory, Turn

_TAGS = re.compile(r"</?think>")
_ARGUMENT = re.compile(r"<(?:search|answer|tool_call)>")


def show_pair(console: Console, pair: Pair, heading: str) -> None:
    """Print ``pair``. In a terminal of 80 columns each side has 39."""
    console.print(Text(_flat(heading), style="bold"))
    facts = {
        "question": pair.question.text,
        "answers": " | ".join(pair.question.answers),
        "id": pair.question.id,
        "divergence": f"{divergence(pair.reference, pair.student):.2f}",
        "teacher": _seen(pair),
    }
    for name, fact in facts.items():
        console.print(Text(f"{name:<10}  {_flat(fact)}"))
    console.print()
    console.print(_table(pair, min(console.width, 160)))


def _seen(pair: Pair) -> str:
    if pair.reference_shown is None:
        return "sees the whole reference"
    if pair.shortened:
        share = len(pair.reference_shown) / len(pair.reference.text)
        return f"sees {share:.0%} of the reference: passages were cut so that it fits"
    return f"sees only {pair.reference_shown}" if pair.reference_shown else "sees nothing of the reference"


def _table(pair: Pair, width: int) -> Table:
    table = Table(box=None, padding=0, pad_edge=False, show_header=False)
    side = (width - 2) // 2
    for size in (side - 1, 3, side):  # a space before the mark separates it from a full line
        table.add_column(width=size, overflow="fold")
    table.add_row(_totals("reference", pair.reference), "", _totals("student", pair.student))
    table.add_row("-" * (side - 1), "", "-" * side)
    for step in align(pair.reference, pair.student):
        table.add_row(_turn(step.a), _mark(step), _turn(step.b))
    return table


def _totals(name: str, trajectory: Trajectory) -> Text:
    outcome = "right" if trajectory.correct else "wrong" if trajectory.answer is not None else "no answer"
    searches = f"{trajectory.searches} search{'' if trajectory.searches == 1 else 'es'}"
    return Text(f"{name}: {outcome}\n{searches}, {trajectory.sampled_tokens} tokens", style="bold")


def _mark(step: Step) -> Text:
    mark = "<" if step.b is None else ">" if step.a is None else "|" if step.cost else " "
    return Text(f" {mark} ", style="bold yellow")


def _turn(turn: Turn | None) -> RenderableType:
    """Thought, action, and the titles of the passages, each with its label."""
    if turn is None:
        return ""
    rows = Table(box=None, padding=0, pad_edge=False, show_header=False)
    rows.add_column(width=7)
    rows.add_column(overflow="fold")
    thought = _TAGS.sub("", turn.action_text if turn.argument is None else _ARGUMENT.split(turn.action_text)[0])
    if thought.strip():
        rows.add_row(Text("think", style="dim"), Text(_flat(thought), style="dim"))
    if turn.kind is ActionKind.MALFORMED:
        rows.add_row(Text("-", style="red"), Text("(neither a search nor an answer)", style="red"))
    else:
        style = "bold cyan" if turn.kind is ActionKind.SEARCH else "bold green"
        rows.add_row(Text(turn.kind, style=style), Text(_flat(turn.argument or "(empty)"), style=style))
    for i, passage in enumerate(seen_passages(turn.observation_text)):
        title, text = split_passage(passage)
        rows.add_row("" if i else "found", Text(_flat(title or text)))
    return Group(rows, "")


def _flat(text: str) -> str:
    """``text`` on one line, without control characters."""
    return " ".join(printable(text).split())
