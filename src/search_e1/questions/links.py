"""Pairs of passages that an entity links: the title of the second occurs in the text of the first."""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from search_e1.types import Passage

_TOKEN = re.compile(r"\w+")
_SENTENCE_START = re.compile(r"(?:^|[.!?:\n]\s*[\"'\u201c(]*)$")
_PARENTHESIS = re.compile(r"\s*\([^()]*\)$")
_MOST_WORDS = 8  # of a title; longer ones are sentences
_SHORTEST = 4  # letters of a title
_PASSAGES = 2  # of one title that a mention is linked to
_COMMON = 20  # mentions, or one in a hundred passages: "American" links nothing


def bare_title(passage: Passage) -> str:
    """The title without a final parenthesis, which texts leave out: ``Mercury (planet)``."""
    return _PARENTHESIS.sub("", passage.title).strip()


def links(passages: Sequence[Passage], most: int = sys.maxsize) -> list[tuple[Passage, Passage]]:
    """Every pair, in the order of the first passages and of their mentions; each pair once.

    Case counts, a title of one word counts only within a sentence, and titles that very many passages mention link nothing.
    Of more than ``most`` passages, only so many, evenly spread, are looked into as the first of a pair.
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
        vague = len(words) == 1 and name != passage.title.strip()  # what is written "Free (album)" is meant by no "Free"
        if words and not vague and len(words) <= _MOST_WORDS and len(name) >= _SHORTEST and not "".join(words).isdigit():
            titles[words].append(number)
    return titles


def _mentions(text: str, titles: dict[tuple[str, ...], list[int]], longest: dict[str, int]) -> Iterator[tuple[str, ...]]:
    """Titles in ``text``, the longest at each place."""
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
    """Whether a single word is written as a name: with a capital or a digit, and not only because a sentence begins."""
    written = word[0].isupper() or any(c.isdigit() for c in word)
    return written and not _SENTENCE_START.search(before[-8:])
