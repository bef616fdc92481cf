"""Extracts a document's text (pages, headings, tables) with parsers imported only for the files that need them."""

import csv
import email
import email.policy
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from email.message import EmailMessage
from itertools import islice
from pathlib import Path
from typing import Any

from search_e1.data.documents.chunks import Part, row_blocks

MODULES = (
    "semantic_text_splitter",
    "py3langid",
    "charset_normalizer",
    "bs4",
    "markdownify",
    "markitdown",
    "openpyxl",
    "pypdfium2",
)
"""Modules of the extra ``documents`` that this package imports."""
_MARKDOWN: dict[str, Any] = {
    "heading_style": "ATX",
    "strip": ["a", "img"],
    "escape_underscores": False,
    "escape_asterisks": False,
}
"""Links are reduced to their text: a URL is as long as a sentence and carries no meaning."""
_FRONT_MATTER = re.compile(r"---\n(?:.*\n)*?---\n")
_TITLE = re.compile(r"^title:(.+)$", re.MULTILINE)
_SLIDE = re.compile(r"<!-- Slide number: (\d+) -->\n?")
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_HEADER_ROWS = 20  # rows searched for a table's header


class UnreadableError(Exception):
    """The file cannot be read; the message is a short reason."""


@dataclass(frozen=True, slots=True)
class Document:
    """The text of one file."""

    parts: list[Part] = field(default_factory=list)
    title: str = ""
    note: str = ""
    """What was not read of the file, in a few words."""
    language: str = ""
    """Language code, if the file states it."""


def read(path: Path, kind: str, words: int, max_unpacked: int) -> Document:
    """Read ``path``, a file of ``kind``. ``words``: size of a block of table rows. ``max_unpacked``: maximum unpacked bytes.

    Raises:
        UnreadableError: encrypted, damaged, binary, or too large when unpacked.
        Exception: any error of a parser on a malformed file.
    """
    if kind in ("docx", "pptx", "xlsx", "epub"):
        _check_zip(path, max_unpacked)
    if kind in ("xlsx", "table"):
        return Document(list((_xlsx if kind == "xlsx" else _csv)(path, words)))
    return _READERS[kind](path)


def _check_zip(path: Path, most: int) -> None:
    if path.read_bytes()[:8] == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":  # OLE container: Office's encrypted and old formats
        raise UnreadableError("encrypted, or an old format under a new suffix")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, EOFError) as error:
        raise UnreadableError(f"damaged ({error})") from None
    # Python's zipfile never unpacks more of a member than its header states.
    size = sum(member.file_size for member in members)
    if size > most:
        raise UnreadableError(f"unpacks to {size / 2**20:,.0f} MiB, more than --max-unpacked-mib {most / 2**20:g}")


def decode(data: bytes) -> str:
    """Decode UTF-8, UTF-16 with a byte-order mark, or what charset-normalizer detects; line ends become ``\\n``.

    Raises:
        UnreadableError: the data is not text.
    """
    return _with_newlines(_decode(data))


def _with_newlines(text: str) -> str:
    """Line ends as ``\\n``, as the Markdown parser counts lines."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decode(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    if b"\0" in data:
        raise UnreadableError("binary, not text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        import charset_normalizer

        best = charset_normalizer.from_bytes(data[: 2**17]).best()
        if best is None:
            raise UnreadableError("binary, or text of an unknown encoding") from None
        return data.decode(best.encoding, "replace")


def _text(path: Path) -> Document:
    return Document([Part(decode(path.read_bytes()))])


def _markdown(path: Path) -> Document:
    text, title = decode(path.read_bytes()), ""
    if front := _FRONT_MATTER.match(text):
        found = _TITLE.search(front[0])
        title = found[1].strip().strip("\"'") if found else ""
        text = re.sub("[^\n]", " ", front[0]) + text[front.end() :]  # blanked, so that offsets stay those of the file
    return Document([Part(text, markdown=True)], title)


def _html(path: Path) -> Document:
    data = path.read_bytes()
    if b"\0" in data and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnreadableError("binary, not text")
    return html_document(data)


def html_document(html: bytes | str) -> Document:
    """The body of a page as Markdown, without scripts, styles and navigation."""
    import bs4
    from markdownify import MarkdownConverter

    with warnings.catch_warnings(action="ignore", category=UserWarning):  # on pages that look like XML or a file name
        soup = bs4.BeautifulSoup(html, "lxml")
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    language = str(soup.html.get("lang") or "") if soup.html else ""
    for element in soup(["script", "style", "noscript", "template", "nav", "title"]):
        element.decompose()
    for link in [link for heading in soup(_HEADINGS) for link in heading("a", href=True)]:
        if str(link["href"]).startswith("#") and not any(map(str.isalnum, link.get_text())):
            link.decompose()  # the sign, such as "#" or a pilcrow, by which a reader links to the heading
    try:
        text = MarkdownConverter(**_MARKDOWN).convert_soup(soup.body or soup)
    except RecursionError:  # nested more deeply than Python allows
        text = soup.get_text("\n", strip=True)
    text = re.sub(r"\n{3,}", "\n\n", _with_newlines(text))
    return Document([Part(text, markdown=True)], title, language=language[:2].lower())


def _pdf(path: Path) -> Document:
    import pypdfium2

    try:
        pdf = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        encrypted = "password" in str(error).lower() or "security" in str(error).lower()
        raise UnreadableError("encrypted; it needs a password" if encrypted else f"a damaged PDF ({error})") from None
    with closing(pdf):
        parts, without = [], []
        for number in range(1, len(pdf) + 1):
            try:
                text = pdf[number - 1].get_textpage().get_text_bounded()
            except pypdfium2.PdfiumError as error:
                raise UnreadableError(f"a damaged PDF (page {number}: {error})") from None
            # Lines are as printed; U+FFFE stands for a hyphen at the end of a line.
            text = " ".join(re.sub("[\ufffe\x02]\\s*", "", text).split())
            if text:
                parts.append(Part(text, page=number))
            else:
                without.append(number)
        title = str(pdf.get_metadata_dict().get("Title") or "").strip()
        pages = len(pdf)
    note = ""
    if without:
        which = f"{len(without)} of {pages} pages without text" if parts else f"no text on its {pages} pages"
        note = f"{which}: scanned? OCR is needed"
    return Document(parts, title, note)


def _docx(path: Path) -> Document:
    from markitdown.converters import DocxConverter

    return Document([Part(_converted(DocxConverter(), path), markdown=True)])


def _epub(path: Path) -> Document:
    from markitdown.converters import EpubConverter

    text = _converted(EpubConverter(), path)
    head, _, text = text.partition("\n\n")  # the book's metadata
    about = dict(re.findall(r"^\*\*(Title|Language):\*\* (.+)$", head, re.MULTILINE))
    return Document([Part(text, markdown=True)], about.get("Title", ""), language=about.get("Language", "")[:2].lower())


def _pptx(path: Path) -> Document:
    from markitdown.converters import PptxConverter

    pieces = _SLIDE.split(_converted(PptxConverter(), path))
    slides = zip(pieces[1::2], pieces[2::2], strict=True)
    return Document([Part(_without_images(text), page=int(number), markdown=True) for number, text in slides if text.strip()])


def _converted(converter: Any, path: Path) -> str:
    from markitdown import StreamInfo

    with path.open("rb") as stream:
        return _with_newlines(converter.convert(stream, StreamInfo(extension=path.suffix.lower()), **_MARKDOWN).markdown)


def _without_images(text: str) -> str:
    return re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)


def _mail(path: Path) -> Document:
    with path.open("rb") as stream:
        message = email.message_from_binary_file(stream, policy=email.policy.default)
    if not message.keys():
        raise UnreadableError("not an email: it has no headers")
    assert isinstance(message, EmailMessage)
    lines = [f"{name}: {message[name]}" for name in ("From", "To", "Cc", "Date") if message[name]]
    head = Part("\n".join(lines))
    body = message.get_body(("plain", "html"))
    parts = []
    if body is not None:
        text = _content(body)
        html = body.get_content_type() == "text/html"
        found = html_document(text).parts[0] if html else Part(text)
        # As one text, so that a short mail becomes one passage with its sender and date.
        parts = [Part(f"{head.text}\n\n{found.text}".strip(), markdown=found.markdown)]
    names = [part.get_filename() or part.get_content_type() for part in message.iter_attachments()]
    note = f"attachments are not read ({', '.join(names)}); save them as files" if names else ""
    return Document(parts, str(message["Subject"] or "").strip(), note)


def _content(body: Any) -> str:
    try:
        return str(body.get_content())
    except LookupError:  # a character set that Python does not know
        return decode(body.get_payload(decode=True))


_READERS: dict[str, Callable[[Path], Document]] = {
    "text": _text, "code": _text, "markdown": _markdown, "html": _html, "pdf": _pdf, "docx": _docx, "epub": _epub,
    "pptx": _pptx, "mail": _mail,
}  # fmt: skip


def _xlsx(path: Path, words: int) -> Iterator[Part]:
    import openpyxl

    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    with closing(book):
        for sheet in book.worksheets:
            yield from _table(sheet.iter_rows(values_only=True), (sheet.title,), words)


def _csv(path: Path, words: int) -> Iterator[Part]:
    lines = decode(path.read_bytes()).splitlines(keepends=True)
    sample = "".join(lines[:_HEADER_ROWS])
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=sample.count)
    yield from _table(csv.reader(lines, delimiter=delimiter), (), words)


def _table(rows: Iterable[Iterable[Any]], heading: tuple[str, ...], words: int) -> Iterator[Part]:
    """Blocks of rows, each under the header: the first row at least half as full as the fullest of the first 20 rows."""
    nonempty = (cells for row in rows if any(cells := [_cell(value) for value in row]))
    first = list(islice(nonempty, _HEADER_ROWS))
    if not first:
        return
    filled = [sum(map(bool, row)) for row in first]
    at = next(i for i, number in enumerate(filled) if 2 * number >= max(filled))
    above, header = first[:at], first[at]

    def lines() -> Iterator[str]:
        yield from map(_line, first[at + 1 :])
        yield from map(_line, nonempty)

    if above:
        yield Part("\n".join(map(_line, above)), heading=heading)
    yield from (Part(text, heading=heading, whole=True) for text in row_blocks(_line(header), lines(), words))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value.isoformat(" ") if hasattr(value, "hour") and hasattr(value, "year") else str(value)
    return " ".join(text.removesuffix(" 00:00:00").split())


def _line(cells: list[str]) -> str:
    return " | ".join(cells).rstrip(" |")
