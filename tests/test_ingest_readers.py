"""Passages of one file of each kind."""

import json
import warnings
import zipfile
import zlib
from email.message import EmailMessage
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import made_documents as made
from search_e1.data.documents import workers
from search_e1.data.documents.chunks import Part, count, cut
from search_e1.data.documents.folder import KINDS, Found
from search_e1.data.documents.passages import Cutting
from search_e1.data.documents.workers import Limits, Outcome, read_file


def outcome_of(path: Path, limits: Limits | None = None, **cutting: Any) -> Outcome:
    kind = KINDS.get(path.suffix, "text")
    return read_file(Found(path.name, path, kind, 0, 0), Cutting(**cutting), limits or Limits())


def passages_of(path: Path, **cutting: Any) -> list[dict[str, Any]]:
    outcome = outcome_of(path, **cutting)
    assert outcome.status == "read", outcome.reason
    found = [json.loads(line) for line in zlib.decompress(outcome.packed).splitlines()]
    assert len(found) == outcome.passages
    return found


def shown(passage: dict[str, Any]) -> tuple[Any, ...]:
    return passage["title"], passage["text"], passage.get("page"), passage.get("heading")


def test_markdown_is_cut_at_headings_under_the_title_of_its_front_matter(tmp_path: Path) -> None:
    file = tmp_path / "guide.md"
    text = (
        '---\ntitle: "The Guide"\n---\nIntro.\n\n# Install\n\nRun it.\n\n```sh\n# no heading\n```\n\n## *Linux*\n\nUse apt.\n'
    )
    file.write_text(text)
    first, second, third = passages_of(file, language="en")
    assert shown(first) == ("The Guide", "Intro.", None, None)
    assert shown(second) == ("The Guide > Install", "Run it.\n\n```sh\n# no heading\n```", None, "Install")
    assert shown(third) == ("The Guide > Install > Linux", "Use apt.", None, "Install > Linux")
    assert third["file"] == "guide.md"
    assert third["metadata"]["language"] == "en"
    start, end = third["metadata"]["start"], third["metadata"]["end"]
    assert text[start:end] == "Use apt."


def test_a_heading_above_all_others_is_the_title(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text("# Manual\n\nOne.\n\n## Part\n\nTwo.\n")
    assert [passage["title"] for passage in passages_of(file)] == ["Manual", "Manual > Part"]
    file.write_text("# One\n\nOne.\n\n# Two\n\nTwo.\n")
    assert [passage["title"] for passage in passages_of(file)] == ["a.md > One", "a.md > Two"]


def test_rows_of_a_cut_table_keep_its_header(tmp_path: Path) -> None:
    file = tmp_path / "t.md"
    file.write_text("Prices.\n\n| item | price |\n|---|---|\n" + "".join(f"| thing {i} | {i} euro |\n" for i in range(40)))
    first, *others = passages_of(file, words=40, overlap=0)
    assert first["text"].startswith("Prices.")
    assert len(others) > 2
    assert all(other["text"].startswith("| item | price |\n|---|---|\n| thing ") for other in others)
    assert "".join(passage["text"] for passage in (first, *others)).count("| thing 17 |") == 1


def test_a_table_may_end_the_text() -> None:
    text = "# A\n\nText.\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    for end in ("", "\n", "\n\n"):
        [chunk] = cut([Part(text + end, markdown=True)], 100, 20)
        assert (chunk.text, chunk.heading) == (text.partition("\n\n")[2], ("A",))


def test_sentences_stay_whole_and_the_next_passage_repeats_the_end_of_the_last() -> None:
    sentences = [f"Sentence number {i} has seven words in it." for i in range(60)]
    chunks = list(cut([Part(" ".join(sentences))], 100, 20))
    assert all(chunk.text.startswith("Sentence") and chunk.text.endswith("it.") for chunk in chunks)
    assert all(80 <= count(chunk.text) <= 145 for chunk in chunks[:-1])
    assert all(after.start < before.end for before, after in pairwise(chunks))
    assert chunks[-1].text.endswith(sentences[-1])


def test_scripts_without_spaces_and_text_without_words_are_cut_too() -> None:
    assert count("これは本") == 4
    assert all(count(chunk.text) <= 125 for chunk in cut([Part("这是一个句子。" * 100)], 100, 0))
    assert len(list(cut([Part("x" * 12_000)], 100, 0))) >= 8


def test_html_has_no_scripts_navigation_or_addresses_in_its_passages(tmp_path: Path) -> None:
    file = tmp_path / "p.html"
    file.write_text(
        "<html lang='de-AT'><head><title>Seite</title><style>p {}</style></head><body><nav>Menu</nav><script>x()</script>"
        "<h1>Oben</h1><p>Ein <a href='http://a.b/c'>Verweis</a> auf snake_case.</p></body></html>"
    )
    [passage] = passages_of(file)
    assert shown(passage) == ("Seite > Oben", "Ein Verweis auf snake_case.", None, "Oben")
    assert passage["metadata"]["language"] == "de"


def test_headings_have_their_names_without_the_signs_that_link_to_them(tmp_path: Path) -> None:
    file = tmp_path / "p.html"
    file.write_text(
        "<html><head><title>Reference</title></head><body>"
        "<h2>child_process.exec()<span><a class='mark' href='#exec'>#</a></span></h2><p>Runs.</p>"
        "<h2><em>os_name</em> <a class='headerlink' href='#os'>\N{PILCROW SIGN}</a></h2><p>Tells.</p>"
        "<h2><a href='#c'>C#</a></h2><p>See <a href='#exec'>#</a>.</p></body></html>"
    )
    passages = passages_of(file)
    assert [passage["heading"] for passage in passages] == ["child_process.exec()", "os_name", "C#"]
    assert passages[2]["text"] == "See #."


def test_a_heading_of_markdown_has_no_badges_anchors_or_addresses(tmp_path: Path) -> None:
    file = tmp_path / "p.md"
    badge = "[![Build status](https://ci.example/a.svg?branch=main)](https://ci.example/a)"
    file.write_text(
        f"# cssesc {badge}\n\nEscapes.\n\n## <a name='ls'></a> `org.ls(org, [opts])` in [the API](api.md)\n\nLists.\n\n"
        "## f(x)[y](z w)\n\nEnds.\n"
    )
    titles = [passage["title"] for passage in passages_of(file)]
    assert titles == ["cssesc", "cssesc > org.ls(org, [opts]) in the API", "cssesc > f(x)[y](z w)"]


def test_a_fence_without_its_code_is_no_passage(tmp_path: Path) -> None:
    file = tmp_path / "p.md"
    file.write_text("Call it:\n\n```js\n" + "".join(f"const value_{i} = require('module_{i}');\n" for i in range(40)) + "```\n")
    texts = [passage["text"] for passage in passages_of(file, words=30, overlap=0)]
    assert texts[0] == "Call it:"
    assert texts[1].startswith("const value_0 = require('module_0');\n")
    file.write_text("Before.\n\n---\n\n# B\n\n---\n\n# C\n\nAfter.\n")
    assert [passage["text"] for passage in passages_of(file)] == ["Before.\n\n---", "After."]


def test_carriage_returns_do_not_shift_what_stands_behind_them(tmp_path: Path) -> None:
    file = tmp_path / "p.html"
    file.write_text("<title>T</title><pre>a&#13;b&#13;c</pre><h1>One</h1><p>First.</p><table><tr><td>x</td></tr></table>")
    assert [shown(p)[:2] for p in passages_of(file)][1:] == [("T > One", "First.\n\n|  |\n| --- |\n| x |")]


def test_a_pdf_has_its_pages_and_tells_those_that_need_ocr(tmp_path: Path) -> None:
    made.make_pdf(tmp_path / "a.pdf", ["Page one speaks.", "", "Page three too."])
    assert [shown(p) for p in passages_of(tmp_path / "a.pdf")] == [
        ("a.pdf", "Page one speaks.", 1, None),
        ("a.pdf", "Page three too.", 3, None),
    ]
    assert outcome_of(tmp_path / "a.pdf").reason == "1 of 3 pages without text: scanned? OCR is needed"
    made.make_pdf(tmp_path / "scan.pdf", ["", ""])
    scan = outcome_of(tmp_path / "scan.pdf")
    assert (scan.status, scan.reason) == ("empty", "no text on its 2 pages: scanned? OCR is needed")


def test_docx_pptx_epub(tmp_path: Path) -> None:
    made.make_docx(tmp_path / "w.docx", [("Heading1", "Handbook"), ("", "Welcome."), ("Heading2", "Leave"), ("", "30 days.")])
    assert [shown(p) for p in passages_of(tmp_path / "w.docx")] == [
        ("Handbook", "Welcome.", None, None),
        ("Handbook > Leave", "30 days.", None, "Leave"),
    ]
    made.make_pptx(tmp_path / "s.pptx", [("Plan", "Ship it"), ("Risks", "Few")])
    assert [shown(p) for p in passages_of(tmp_path / "s.pptx")] == [
        ("s.pptx > Plan", "Ship it", 1, "Plan"),
        ("s.pptx > Risks", "Few", 2, "Risks"),
    ]
    made.make_epub(tmp_path / "b.epub", "The Book", [("One", "First."), ("Two", "Second.")])
    assert [shown(p) for p in passages_of(tmp_path / "b.epub")] == [
        ("The Book > One", "First.", None, "One"),
        ("The Book > Two", "Second.", None, "Two"),
    ]


def test_a_sheet_becomes_blocks_of_rows_each_under_the_header(tmp_path: Path) -> None:
    rows = [["Sales of 2024"], ["Region", "Product", "Units"], *(["North", f"apple {i}", float(i)] for i in range(30))]
    made.make_xlsx(tmp_path / "s.xlsx", {"Q1": rows, "Empty": [], "Q2": [["Region", "Units"], ["South", 2.5]]})
    above, *blocks, last = passages_of(tmp_path / "s.xlsx", words=40)
    assert shown(above) == ("s.xlsx > Q1", "Sales of 2024", None, "Q1")
    assert all(block["text"].startswith("Region | Product | Units\nNorth | apple ") for block in blocks)
    assert [line for block in blocks for line in block["text"].splitlines()[1:]] == [
        f"North | apple {i} | {i}" for i in range(30)
    ]
    assert shown(last) == ("s.xlsx > Q2", "Region | Units\nSouth | 2.5", None, "Q2")
    (tmp_path / "t.csv").write_text("name;age\n\nAnn;3\n", encoding="utf-8-sig")
    assert shown(passages_of(tmp_path / "t.csv")[0]) == ("t.csv", "name | age\nAnn | 3", None, None)


def test_a_mail_has_its_sender_and_names_what_is_attached(tmp_path: Path) -> None:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "ann@a.example", "bob@b.example", "Grüße"
    mail.set_content("Hallo Bob!")
    mail.add_alternative("<p>Hallo <b>Bob</b>!</p>", subtype="html")
    mail.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="plan.pdf")
    (tmp_path / "m.eml").write_bytes(bytes(mail))
    [passage] = passages_of(tmp_path / "m.eml")
    assert shown(passage) == ("Grüße", "From: ann@a.example\nTo: bob@b.example\n\nHallo Bob!", None, None)
    assert outcome_of(tmp_path / "m.eml").reason == "attachments are not read (plan.pdf); save them as files"


def test_encodings(tmp_path: Path) -> None:
    text = "Der Bäcker verkauft süße Brötchen an höfliche Gäste. " * 3
    for number, encoding in enumerate(("utf-8-sig", "utf-16", "latin-1")):
        file = tmp_path / f"{number}.txt"
        file.write_bytes(text.encode(encoding))
        assert passages_of(file)[0]["text"] == text.strip()
        assert passages_of(file)[0]["metadata"]["language"] == "de"


def test_ids_follow_the_text_not_its_place(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text("# A\n\nOne.\n\n# B\n\nSame.\n\n# C\n\nSame.\n")
    one, same, again = (passage["id"] for passage in passages_of(file))
    assert len({one, same, again}) == 3
    file.write_text("# New\n\nNew.\n\n# A\n\nOne.\n\n# B\n\nSame.\n")
    assert [passage["id"] for passage in passages_of(file)][1:] == [one, same]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"\x89PNG\0\0", "binary, not text"),
        ("a.pdf", b"%PDF-1.4 rubbish", "a damaged PDF (Failed to load document (PDFium: Data format error).)"),
        ("a.docx", b"no archive", "damaged (File is not a zip file)"),
        ("a.xlsx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1....", "encrypted, or an old format under a new suffix"),
        ("a.eml", b"\n\nno headers", "not an email: it has no headers"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    outcome = outcome_of(tmp_path / name)
    assert (outcome.status, outcome.reason, outcome.packed) == ("failed", reason, b"")


def test_an_encrypted_pdf_and_an_archive_that_is_no_workbook(tmp_path: Path) -> None:
    made.make_pdf(tmp_path / "a.pdf", ["secret"], encrypted=True)
    assert outcome_of(tmp_path / "a.pdf").reason == "encrypted; it needs a password"
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as archive:
        archive.writestr("x", "y")
    assert outcome_of(tmp_path / "a.xlsx").reason.startswith("not a valid xlsx file (KeyError: ")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", "0" * 3 * 2**20)
    assert (tmp_path / "a.docx").stat().st_size < 10_000
    outcome = outcome_of(tmp_path / "a.docx", Limits(unpacked_mib=2))
    assert outcome.reason == "unpacks to 3 MiB, more than --max-unpacked-mib 2"


def test_an_empty_file_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(" \n")
    outcome = outcome_of(tmp_path / "a.md")
    assert (outcome.status, outcome.reason) == ("empty", "no text in it")


def test_what_a_reader_warns_of_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.md"
    path.write_text("# Oslo\n\nThe capital of Norway.\n")
    honest = workers.read

    def warning_read(*args: Any) -> Any:
        warnings.warn("to its programmer", DeprecationWarning, stacklevel=1)
        warnings.warn("a filter is not supported\nand dropped", UserWarning, stacklevel=1)
        return honest(*args)

    monkeypatch.setattr(workers, "read", warning_read)
    outcome = outcome_of(path)
    assert (outcome.status, outcome.reason, outcome.passages) == ("read", "its reader warns: a filter is not supported", 1)
