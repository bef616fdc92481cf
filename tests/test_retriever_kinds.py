"""Kinds of retriever by name: those of the package, and a user's own."""

import sys
from pathlib import Path

import pytest

from search_e1.config import RetrievalConfig
from search_e1.errors import ConfigError, RetrievalError
from search_e1.retrieval import registry
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.retrieval.client import HttpRetriever
from search_e1.retrieval.registry import index_kinds, open_retriever
from search_e1.types import Passage
from serving import good, misbehaving

OWN = """
from search_e1.types import Passage

class Shouting:
    checksum = "shouting-1"
    def __init__(self, section):
        self.suffix = section.parameters
    def search(self, queries, topk):
        return [[Passage(id=f"{q}-{i}", title=q.upper(), text=self.suffix) for i in range(topk)] for q in queries]

number = 3
nothing = lambda section: None
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_retriever.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_retriever", raising=False)


def test_a_retriever_from_outside_the_package(own: None) -> None:
    section = RetrievalConfig(kind="my_retriever:Shouting", parameters="!")
    assert index_kinds(section) == ()
    found = open_retriever(section).search(["oslo"], 2)
    assert found == [[Passage(id=f"oslo-{i}", title="OSLO", text="!") for i in range(2)]]


def test_a_kind_registered_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.KINDS, "_entries", dict(registry.KINDS._entries))

    class Silent:
        def __init__(self, section: registry.Section) -> None:
            self.probed: list[int] = []

        def search(self, queries: list[str], topk: int) -> list[list[Passage]]:
            return [[] for _ in queries]

        def probe(self, topk: int) -> None:
            self.probed.append(topk)

    registry.KINDS.register("silent")(Silent)
    opened = open_retriever(RetrievalConfig(kind="silent"), topk=5)
    assert isinstance(opened, Silent)
    assert (opened.search(["a", "b"], 1), opened.probed) == ([[], []], [5])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("bm52", "retrieval.kind = 'bm52': no such kind of retriever; did you mean 'bm25'?"),
        ("hybird", "did you mean 'hybrid'?"),
        ("xyz", "known: bm25, dense, hybrid, url, or module:attribute"),
        ("url", "kind = 'url' needs a url; give url"),
        ("dense", r"kind = 'dense' needs an encoder; give encoder\.model"),
    ],
)
def test_an_unknown_kind_is_refused_with_the_nearest_name(kind: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RetrievalConfig(kind=kind)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no_such_module:X", "No module named 'no_such_module'; give an importable module:attribute"),
        ("my_retriever:Missing", "has no attribute 'Missing'"),
        ("my_retriever:number", "not callable; give a function of the section or a class"),
        ("my_retriever:nothing", "gave a NoneType, which has no method search"),
    ],
)
def test_an_own_retriever_that_cannot_be_opened_is_one_line(own: None, kind: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        open_retriever(RetrievalConfig(kind=kind))
    assert str(caught.value).startswith(f"retrieval.kind = {kind!r}: ")
    assert "\n" not in str(caught.value)


def test_indexes_and_servers_by_their_names(tmp_path: Path) -> None:
    Bm25Index.build([Passage(id="1", title="Oslo", text="A city.")], tmp_path / "index")
    opened = open_retriever(RetrievalConfig(index=tmp_path / "index"))
    assert isinstance(opened, Bm25Index)
    assert opened.search(["oslo"], 1)[0][0].id == "1"
    assert index_kinds(RetrievalConfig(kind="hybrid", index=tmp_path / "index")) == ("bm25", "dense")
    with misbehaving(good) as server:
        for kind in ("url", "bm25"):  # a url alone is enough
            section = RetrievalConfig(kind=kind, url=server.url)
            assert index_kinds(section) == ()
            assert isinstance(open_retriever(section, topk=2), HttpRetriever)
        assert [request["topk"] for request in server.requests] == [2, 2]
    with pytest.raises(RetrievalError, match="no passages after 1 attempt"):
        open_retriever(RetrievalConfig(url="http://127.0.0.1:1", attempts=1))
    with pytest.raises(ValueError, match="give index or url, not both"):
        RetrievalConfig(index=tmp_path / "index", url="http://127.0.0.1:1")
