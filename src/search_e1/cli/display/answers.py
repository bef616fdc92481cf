"""An answer with its sources, in a terminal."""

from rich.console import Console
from rich.text import Text

from search_e1.agent.answer import NOT_FOUND, Answer, Source
from search_e1.runs.safe import printable

_AROUND = 60
"""Characters shown on either side of the answer in a passage."""


def show_answer(console: Console, answer: Answer) -> None:
    """Print the answer, each passage that holds it with an excerpt, and how many others were read."""
    if answer.text is None:
        why = "" if answer.trajectory.stop_reason == "answered" else f" ({answer.trajectory.stop_reason})"
        console.print(Text(f"no answer{why}: {NOT_FOUND}", style="red"))
    elif answer.found:
        console.print(Text(printable(answer.text), style="bold green"))
    else:
        console.print(Text(NOT_FOUND, style="red"))
        console.print(Text(f"a guess, in none of the passages read: {printable(answer.text)}", style="dim"))
    holding = [source for source in answer.sources if source.holds]
    for number, source in enumerate(holding, 1):
        console.print(Text(f"  [{number}] {origin(source)}", style="bold"))
        if source.marks:
            console.print(Text("      ") + _excerpt(source), soft_wrap=False)
    if rest := len(answer.sources) - len(holding):
        others = "other passage" if holding else "passage"
        console.print(Text(f"  {rest} {others}{'s' * (rest > 1)} read", style="dim"))


def origin(source: Source) -> str:
    """Title and metadata: name of the corpus among several, file, page, heading, link."""
    told = source.passage.metadata
    title = source.passage.title or source.passage.id
    keys = ("corpus", "file", "heading", "url")
    parts = [title, *(text for key in keys if (text := str(told.get(key, ""))) and text not in title)]
    if "page" in told:
        parts.append(f"page {told['page']}")
    return printable(", ".join(parts))


def _excerpt(source: Source) -> Text:
    """The first occurrence of the answer, in bold, with the words around it."""
    text, (begin, end) = source.passage.text, source.marks[0]
    first, last = max(0, begin - _AROUND), min(len(text), end + _AROUND)
    first = text.find(" ", first, begin) + 1 if first else 0
    last = text.rfind(" ", end, last) if last < len(text) and " " in text[end:last] else last
    head, tail = "... " * (first > 0), " ..." * (last < len(text))
    pieces = (text[first:begin], text[begin:end], text[end:last])
    shown = [printable(" ".join(piece.splitlines())) for piece in pieces]
    return Text.assemble((head + shown[0], "dim"), (shown[1], "bold"), (shown[2] + tail, "dim"))
