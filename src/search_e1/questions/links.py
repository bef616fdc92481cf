"""Pairs of passages linked by an entity: the title of the second occurs in the text of the first."""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from search_e1.types import Passage

_TOKEN = re.compile(r"\w+")
_SENTENCE_START = re.compile(r"(?:^|[.!?:\n]\s*[\"'\u201c(]*)$")
_PARENTHESIS = re.compile(r"\s*\([^()]*\)$")
_MOST_WORDS = 8  # per title; longer titles are sentences
_SHORTEST = 4  # characters of a title
_PASSAGES = 2  # passages per title that a mention links to
_COMMON = 20  # maximum mentions of a title, or 1% of the passages: excludes titles like "American"


def bare_title(passage: Passage) -> str:
    """The title without a final parenthesis, which running text omits: ``Mercury (planet)``."""
    return _PARENTHESIS.sub("", passage.title).strip()


def links(passages: Sequence[Passage], most: int = sys.maxsize) -> list[tuple[Passage, Passage]]:
    """All linked pairs, without repeats, ordered by first passage and mention.

    Matching is case-sensitive; a one-word title is not matched at the start of a sentence; titles that many passages mention
    are ignored. At most ``most`` passages, evenly spread, are searched for mentions.
    """
    titles = _titles(passages)
    longest: dict[str, int] = {}
    for words in titles:
        longest[words[0]] = max(longest.get(words[0], 0), len(words))
    firsts = range(0, len(passages), -(-len(passages) // most) or 1)
    found: list[tuple[int, tuple[str, ...]]] = []
    mentions: Counter[tuple[str, ...]] = Counter()
    for number in firsts:
        named = set(_TOKEN.findall(passages[number].title))
        about = dict.fromkeys(_mentions(passages[number].text, titles, longest))
        other = [words for words in about if not named.issuperset(words)]
        mentions.update(other)
        found += ((number, words) for words in other)
    common = max(_COMMON, len(firsts) // 100)
    return [
        (passages[number], passages[second])
        for number, words in found
        if mentions[words] <= common
        for second in titles[words][:_PASSAGES]
        if passages[number].title not in passages[second].title
    ]


def _titles(passages: Sequence[Passage]) -> dict[tuple[str, ...], list[int]]:
    titles: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, passage in enumerate(passages):
        name = bare_title(passage)
        words = tuple(_TOKEN.findall(name))
        vague = len(words) == 1 and name != passage.title.strip()  # the word "Free" does not refer to "Free (album)"
        if words and not vague and len(words) <= _MOST_WORDS and len(name) >= _SHORTEST and not "".join(words).isdigit():
            titles[words].append(number)
    return titles


def _mentions(text: str, titles: dict[tuple[str, ...], list[int]], longest: dict[str, int]) -> Iterator[tuple[str, ...]]:
    """Titles mentioned in ``text``, the longest at each position."""
    tokens = list(_TOKEN.finditer(text))
    words = [token[0] for token in tokens]
    at = 0
    while at < len(words):
        for length in range(longest.get(words[at], 0), 0, -1):
            name = tuple(words[at : at + length])
            if name in titles and (length > 1 or _is_name(name[0], text[: tokens[at].start()])):
                yield name
                at += length - 1
                break
        at += 1


def _is_name(word: str, before: str) -> bool:
    """Whether a word is written as a name: with a capital or a digit, and not at the start of a sentence."""
    written = word[0].isupper() or any(c.isdigit() for c in word)
    return written and not _SENTENCE_START.search(before[-8:])
