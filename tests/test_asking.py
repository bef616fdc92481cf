"""`ask` and `chat`: what is sampled is shown as it is sampled, a session goes on, and nothing steers the terminal."""

import io
import sys

import pytest

from conftest import TinyRetriever, make_tiny_policy
from search_e1.agent import agent
from search_e1.agent.answer import Source
from search_e1.cli import asking, main
from search_e1.cli.display.answers import origin
from search_e1.errors import RetrievalError
from search_e1.retrieval import indexes
from search_e1.rollout.engines.base import BatchEngine, Generation
from search_e1.stages import inputs  # noqa: F401  imported now, so that it does not keep what is put in a name's place below
from search_e1.training import policy as policies
from search_e1.types import Passage
from serving import misbehaving
from test_endpoint import completion


class Spoken(BatchEngine):
    """Takes the place of the engine: says what it is told."""

    script: list[str] = []
    context_length = 1024

    def __init__(self, model, tokenizer, *, batch_size) -> None:
        self.tokenizer = tokenizer

    def generate(self, requests, **_):
        ids = tuple(self.tokenizer.encode(Spoken.script.pop(0)))
        return [Generation(ids)]


@pytest.fixture
def spoken(monkeypatch):
    monkeypatch.setattr(agent, "TorchEngine", Spoken)
    return Spoken


def verb(monkeypatch, capsys, *words: str, stdin: str = "", terminal: bool = False) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["search-e1", *words])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    monkeypatch.setattr(policies, "load", lambda *_: make_tiny_policy())
    evil = Passage(id="p", title="Bel\x1b]0;pwned\x07", text="Bel \x1b[2J\x9b31m city")
    monkeypatch.setattr(indexes, "open_indexes", lambda *_: TinyRetriever([evil]))
    monkeypatch.setattr(asking, "console", asking.Console(force_terminal=terminal, color_system=None, width=80))
    try:
        main.main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


BASE = ("--model", "x", "--index", "i")
EVIL = "<think>\x1b[31mhm</think> <search>the bel city\x07</search>"


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_steers_the_terminal(monkeypatch, capsys, spoken, terminal: bool) -> None:
    spoken.script = [EVIL, "<answer>Cor\x1b[0m Dun</answer>"]
    status, out, _ = verb(monkeypatch, capsys, "ask", "Who?", *BASE, terminal=terminal)
    assert status == 0
    assert "Cor\ufffd[0m Dun" in out
    assert "search  the bel city" in out
    assert not {"\x1b", "\x07", "\x9b"} & set(out)
    assert ("<think>" in out) == terminal  # as sampled, in a terminal; else a thought, a search


def test_a_session_goes_on(monkeypatch, capsys, spoken) -> None:
    spoken.script = ["<answer>one</answer>", "no", "no", "no", "no", "no", "<answer>three</answer>"]
    status, out, _ = verb(monkeypatch, capsys, "chat", *BASE, stdin="a?\n\n   \nb\udcff?\nc?\n")
    assert status == 0
    said = [line for line in out.splitlines() if line and "neither" not in line and line != "no"]
    assert said == [
        "not found in these documents", "a guess, in none of the passages read: one",
        "no answer (malformed): not found in these documents",
        "not found in these documents", "a guess, in none of the passages read: three",
    ]  # fmt: skip


def test_a_question_that_fails_does_not_end_a_session(monkeypatch, capsys, spoken) -> None:
    def broken(self, queries, topk):
        raise RetrievalError("http://x: no passages after 4 attempts")

    monkeypatch.setattr(TinyRetriever, "search", broken)
    spoken.script = ["<search>a</search>", "<answer>two</answer>"]
    status, out, err = verb(monkeypatch, capsys, "chat", *BASE, stdin="a?\nb?\n")
    assert (status, out.splitlines()[-1]) == (0, "a guess, in none of the passages read: two")
    assert err.strip() == "search-e1: http://x: no passages after 4 attempts"


def test_an_endpoint_is_asked(monkeypatch, capsys) -> None:
    replies = [completion("<search> bel city"), completion("<answer> Cor Dun")]
    with misbehaving(lambda request, number: replies[number]) as server:
        options = ("--endpoint", server.url, "--endpoint-model", "m", "--index", "i")
        status, out, _ = verb(monkeypatch, capsys, "ask", "Who?", *options, terminal=True)
    assert status == 0
    assert "search  bel city" in out
    assert out.splitlines()[-2:] == ["a guess, in none of the passages read: Cor Dun", "  1 passage read"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--endpoint", "http://x"), "belong together"),
        (("--endpoint", "http://x", "--endpoint-model", "m", "--model", "small"), "give one of them"),
        (("--endpoint", "x", "--endpoint-model", "m", "--index", "i"), "not an http or https URL"),
    ],
)
def test_what_is_missing_is_said(monkeypatch, capsys, words, message: str) -> None:
    status, _, err = verb(monkeypatch, capsys, "ask", "Who?", *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_heading_that_the_title_holds_is_not_said_twice() -> None:
    told = {"file": "os.html", "heading": "OS > arch()", "page": 3}
    for title, shown in (
        ("Node > OS > arch()", "Node > OS > arch(), os.html, page 3"),
        ("Node", "Node, os.html, OS > arch(), page 3"),
    ):
        passage = Passage(id="p", title=title, text="x64", metadata=told)
        assert origin(Source(passage=passage, query="arch", turn=0, holds=True)) == shown
