"""Cuts a document into passages: at headings, then by semantic-text-splitter at paragraphs, sentences, words."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

_WORD = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|\\w+")
"""A word, or a letter of a script without spaces between words; either is about one token."""
_LONG_WORD = 12  # characters per word above which characters are counted instead, as in minified code
_FULLER = 1.25
"""A passage may exceed the requested words by this factor, so that a section leaves no remainder of a few words."""
_MARKS = re.compile(r"[*`]+|(?<!\w)_+|_+(?!\w)")
"""Marks of emphasis and code; an underscore within a name is none."""
_IMAGE_OR_ANCHOR = re.compile(r"!\[[^\]]*\]\([^)]*\)|<a\s[^>]*>\s*</a>")
_LINK = re.compile(r"\[([^\]]*)\]\([^)\s]*\)")
_MARKS_ALONE = re.compile(r"\s*(?:`{3,}|~{3,})[^\n]*\s*|[\W_]*")
"""The fence of a code block that is cut right after it, a rule, an empty list item: no passage."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a document that no passage crosses: a page, or the whole document."""

    text: str
    page: int | None = None
    heading: tuple[str, ...] = ()
    markdown: bool = False
    """Whether to parse headings and tables as Markdown."""
    whole: bool = False
    """Whether to keep it as one passage, unless it is more than twice the requested size."""


class Chunk(NamedTuple):
    """A passage, without its document's name and title."""

    text: str
    heading: tuple[str, ...]
    page: int | None
    start: int
    end: int
    """``start:end``: its slice of the part's text."""


class _Section(NamedTuple):
    heading: tuple[str, ...]
    start: int
    end: int


class _Table(NamedTuple):
    start: int
    end: int
    header: str


def count(text: str) -> int:
    """The size of ``text`` in words."""
    return max(len(_WORD.findall(text)), len(text) // _LONG_WORD)


def cut(parts: Iterable[Part], words: int, overlap: int) -> Iterator[Chunk]:
    """Cut ``parts`` into passages of about ``words`` words, which overlap by at most ``overlap`` words."""
    for part in parts:
        if part.whole and count(part.text) <= 2 * words:
            yield Chunk(part.text, part.heading, part.page, 0, len(part.text))
            continue
        sections, tables = _outline(part.text) if part.markdown else ([_Section((), 0, len(part.text))], [])
        splitter = _splitter(words, overlap, part.markdown)
        for section in sections:
            heading = part.heading + section.heading
            for offset, text in splitter.chunk_indices(part.text[section.start : section.end]):
                if part.markdown and _MARKS_ALONE.fullmatch(text):
                    continue
                start = section.start + offset
                end = start + len(text)
                yield Chunk(_under_header(text, start, tables), heading, part.page, start, end)


def row_blocks(header: str, lines: Iterable[str], words: int) -> Iterator[str]:
    """Lines of a table in blocks of about ``words`` words, each with ``header`` as its first line."""
    repeated = count(header)
    block, size = [header], repeated
    for line in lines:
        more = count(line)
        if len(block) > 1 and size + more > words:
            yield "\n".join(block)
            block, size = [header], repeated
        block.append(line)
        size += more
    if len(block) > 1 or header:
        yield "\n".join(block)


@cache
def _splitter(words: int, overlap: int, markdown: bool) -> Any:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

    kind: Any = MarkdownSplitter if markdown else TextSplitter
    return kind.from_callback(count, (words, int(words * _FULLER)), overlap)


def _under_header(text: str, start: int, tables: list[_Table]) -> str:
    """``text``, prefixed with the table's header if it begins inside a table's rows."""
    at = bisect_right(tables, start, key=lambda table: table.start) - 1
    if at < 0 or not tables[at].start + len(tables[at].header) <= start < tables[at].end:
        return text
    return f"{tables[at].header}\n{text}"


@cache
def _parser() -> Any:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table")
    parser.core.ruler.enableOnly(["normalize", "block"])  # headings and tables only; no emphasis or links
    return parser


def _outline(text: str) -> tuple[list[_Section], list[_Table]]:
    """Sections of Markdown, without their headings, and tables, each in order."""
    lines = text.split("\n")
    starts = list(accumulate((len(line) + 1 for line in lines), initial=0))
    sections, tables, path, begin = [], [], list[tuple[int, str]](), 0
    tokens = _parser().parse(text)
    for at, token in enumerate(tokens):
        if token.type == "table_open":
            first, last = token.map
            tables.append(_Table(starts[first], min(starts[last], len(text)), "\n".join(lines[first : first + 2])))
        if token.type != "heading_open" or token.level:
            continue
        first, last = token.map
        sections.append(_Section(tuple(heading for _, heading in path), begin, starts[first]))
        level, heading = int(token.tag[1:]), _plain(tokens[at + 1].content)
        path = [entry for entry in path if entry[0] < level] + ([(level, heading)] if heading else [])
        begin = min(starts[last], len(text))
    sections.append(_Section(tuple(heading for _, heading in path), begin, len(text)))
    filled = [section for section in sections if text[section.start : section.end].strip()]
    return filled or [_Section((), 0, len(text))], tables  # if there are only headings, they are the text


def _plain(heading: str) -> str:
    """A heading without badges, anchors, addresses of links and marks of emphasis."""
    return " ".join(_MARKS.sub("", _LINK.sub(r"\1", _IMAGE_OR_ANCHOR.sub("", heading))).split())
