"""Passages of one file as corpus lines."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from search_e1.data.documents.chunks import Chunk, cut
from search_e1.data.documents.readers import Document
from search_e1.types import Record

_MOST_TITLE = 120  # characters of the document's title, and of each heading
_LANGUAGE_SAMPLE, _LEAST_SAMPLE = 2000, 40  # characters; with less, detection is a guess
_PROSE = frozenset(("markdown", "text", "html", "pdf", "docx", "pptx", "epub", "mail"))


class Cutting(Record):
    """Everything besides a file's content that determines its passages."""

    words: int = 100
    overlap: int = 20
    language: str | None = None
    """Language of all files; ``None``: detected per file."""
    format: int = 3
    """Version of the readers and of this module; a change makes all files be read again."""


def lines(name: str, kind: str, document: Document, cutting: Cutting) -> Iterator[bytes]:
    """The passages of ``document``, one JSON object per line.

    Ids are hashes of file name and passage text, so that they survive changes elsewhere in the file.
    """
    chunks = list(cut(document.parts, cutting.words, cutting.overlap))
    title = _title(name, document, chunks)
    language = cutting.language or document.language or _detect(kind, chunks)
    seen: Counter[str] = Counter()
    for chunk in chunks:
        text = chunk.text.strip()
        seen[text] += 1
        identity = "\0".join((name, text, str(seen[text])))
        headings = [_short(heading) for heading in chunk.heading if heading.casefold() not in title.casefold()]
        record: dict[str, Any] = {
            "id": hashlib.blake2b(identity.encode(), digest_size=8).hexdigest(),
            "title": " > ".join((title, *headings)),
            "text": text,
            "file": name,
        }
        if chunk.page is not None:
            record["page"] = chunk.page
        if headings:
            record["heading"] = " > ".join(headings)
        record["metadata"] = {"start": chunk.start, "end": chunk.end} | ({"language": language} if language else {})
        yield json.dumps(_clean(record), ensure_ascii=False).encode() + b"\n"


def _title(name: str, document: Document, chunks: list[Chunk]) -> str:
    """The document's own title, else its only top heading, else the file name."""
    tops = {chunk.heading[0] for chunk in chunks if chunk.heading}
    if not document.title and len(tops) == 1 and any(part.markdown for part in document.parts):
        return _short(tops.pop())
    return _short(document.title) or PurePosixPath(name).name


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MOST_TITLE else text[: _MOST_TITLE - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _clean(value: Any) -> Any:
    """Replaces halves of surrogate pairs, which UTF-8 cannot encode."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return {key: _clean(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _detect(kind: str, chunks: list[Chunk]) -> str:
    """The language of the beginning of the file, an ISO 639-1 code; empty for code, tables and very short texts."""
    sample = " ".join(chunk.text for chunk in chunks[:20])[:_LANGUAGE_SAMPLE]
    if kind not in _PROSE or sum(map(str.isalpha, sample)) < _LEAST_SAMPLE:
        return ""
    return str(_detector()(sample)[0])


@cache
def _detector() -> Any:
    import py3langid

    # py3langid's three-letter languages are rarer than its errors on short texts.
    py3langid.set_languages([code for code, _ in py3langid.rank("") if len(code) == 2])
    return py3langid.classify
