"""The agent's page in headless Chromium: what comes as it comes, answers, passages, history, links; a quiet console."""

import re

import pytest

import chromium
from page_server import answered, bare
from paged import AHAB, ANSWER, ASKED, MOBY, STEPS, WHALE
from paged import page as page
from paged import server as server

pytestmark = pytest.mark.skipif(chromium.MISSING is not None, reason=str(chromium.MISSING))


def test_thoughts_searches_and_passages_come_as_they_are_sampled(page, server):
    server.scripts[ASKED] = [*STEPS[:3], ("gate",), *STEPS[3:], ("answer", ANSWER)]
    page.open()
    assert page.js("document.getElementById('start').innerText").startswith("Ask these documents\n")
    assert page.text("#agent") == "moby"
    assert page.focus == "question"
    page.ask(until="document.querySelector('.search .body')?.textContent === 'Moby Di'")
    assert page.texts(".trace .thought .body") == ["I need the author."]
    assert page.text(".trace > summary") == "Searching …"
    assert page.js("document.getElementById('result').getAttribute('aria-busy')") == "true"
    assert not page.js("document.getElementById('stop').hidden")
    page.click(".thought summary")  # what a reader has folded stays folded
    server.gate.set()
    page.wait("document.querySelector('.answer')")
    assert page.texts(".trace .body") == ["I need the author.", "Moby Dick", "And the captain?", "Ahab"]
    assert page.js("[...document.querySelectorAll('.thought')].map((one) => one.open)") == [False, True]
    assert page.texts(".passages button") == ["Moby-Dick", "Sperm whale", "Captain Ahab"]
    assert page.texts(".passages .origin") == ["novels.pdf · page 3", "whales.md"]
    assert re.fullmatch(r"2 searches · 3 passages read · \d+\.\d s", page.text(".trace > summary"))
    assert not page.js("document.querySelector('.trace').open")
    assert page.js("document.getElementById('stop').hidden")
    assert page.text("#status") == "Answer: Herman Melville"


def test_an_answer_has_its_place_and_its_sources(page):
    page.open()
    page.ask()
    assert page.text(".answer.found .big") == "Herman Melville"
    assert page.texts("blockquote mark") == ["Herman Melville"]  # behind it stands a character of two UTF-16 units
    assert page.text("figcaption button") == "[1] Moby-Dick"
    assert page.texts(".sources .number") == ["1", "2", "3"]
    assert page.texts(".sources .title") == ["Moby-Dick", "Sperm whale", "Captain Ahab"]
    assert page.texts(".sources .holds .pill") == ["holds the answer"]
    assert page.texts(".sources mark") == ["Herman Melville"]
    assert page.text(".asked") == ASKED
    assert page.js("document.getElementById('start').hidden")
    assert page.js("document.title") == f"{ASKED} · search-e1"


def test_a_passage_opens_beside_the_answer(page, server):
    page.open()
    page.ask()
    page.js("document.querySelector('.sources .title').focus()")
    page.press("Enter")
    page.wait("document.getElementById('passage').open")
    assert page.focus == "passage-title"
    assert not page.js("document.getElementById('passage').matches(':modal')")
    assert page.texts("#passage mark") == ["Herman Melville"] * 2
    assert page.text("#passage .text") == MOBY["text"]
    assert page.texts("#passage dt") == ["File", "Page", "Heading", "Link", "Found by", "Id"]
    assert page.texts("#passage dd") == ["novels.pdf", "3", "Moby-Dick", MOBY["url"], "Moby Dick", "p1"]
    link = "document.querySelector('#passage a')"
    assert page.js(f"[{link}.href, {link}.rel]") == [MOBY["url"], "noopener noreferrer"]
    assert page.js("document.querySelector('#passage').getBoundingClientRect().left") > 700
    page.press("Escape")
    assert not page.js("document.getElementById('passage').open")
    assert page.focus == "Moby-Dick"
    page.js("document.querySelectorAll('.sources .title')[2].click()")
    assert page.texts("#passage dt") == ["Found by", "Shelf", "Id"]  # what else the corpus tells
    # A passage of the trace is shown as the source that it is.
    page.click(".trace > summary")
    page.click(".passages button")
    assert page.texts("#passage mark") == ["Herman Melville"] * 2


def test_a_passage_is_read_from_the_server_while_there_is_no_answer(page, server):
    server.scripts[ASKED] = [*STEPS, ("gate",), ("answer", ANSWER)]
    server.passages["p1"] = {"id": "p1", "title": "Moby-Dick", "text": MOBY["text"]}
    page.open()
    page.ask(until="document.querySelectorAll('.passages').length === 2")
    page.click(".passages button")
    page.wait("document.querySelector('#passage .text')")
    assert page.text("#passage .text") == MOBY["text"]
    assert page.texts("#passage dd")[0] == "novels.pdf"
    page.js("document.querySelectorAll('.passages button')[2].click()")
    page.wait("document.querySelector('#passage .about')?.textContent === 'The server has no text of this passage.'")
    page.failures = "status of 404"


def test_calls_of_tools(page, server):
    server.scripts[ASKED] = [
        ("thought", '<think>a < b & "c"</think>\n<tool_call>\n{"name": "search", "argu'),
        ("thought", 'ments": {"query": "Moby Dick"}}\n</tool_call>'), ("search", "Moby Dick", bare(MOBY)),
        ("thought", "<open>Doc 1</open>"), ("call", "open", "Doc 1", bare(WHALE)), ("thought", "So.\n"), ("answer", ANSWER),
    ]  # fmt: skip
    page.open()
    page.ask()
    shown = ["Thought", 'a < b & "c"', "search", "Moby Dick", "Passages", "open", "Doc 1", "Passages", "Thought", "So."]
    assert page.texts(".steps .label, .steps .body") == shown
    assert page.text(".trace > summary").startswith("1 search · 2 passages read · ")
    assert page.texts(".thought .body, .search .body") == ['a < b & "c"', "Moby Dick", "Doc 1", "So."]


def test_what_is_not_found_looks_different(page, server):
    server.scripts = {
        "guess": [*STEPS, ("answer", answered("guess", "Jules Verne", "guess", [WHALE, AHAB]))],
        "none": [("answer", answered("none", None, "none", [], stop_reason="max_turns"))],
        "yes": [*STEPS, ("answer", answered("yes", "yes", "yes_no", [WHALE]))],
    }
    page.open()
    page.ask("guess")
    assert page.text(".answer.missing .big") == "Not found in these documents"
    assert page.text(".guess") == "The model's guessJules Verne"
    assert page.text(".answer .about") == "The model has a guess, but none of the 2 passages it read holds it."
    assert page.text("#status") == "Not found in these documents. The model's guess: Jules Verne"
    assert page.texts("#result .found, .pill, mark, blockquote") == []
    assert page.text(".sources h2") == "Passages read"
    page.ask("none")
    assert page.text(".answer.missing .about") == "The model gave no answer. It asked for more searches than it is allowed."
    assert page.texts(".guess, .sources") == []
    assert page.js("document.querySelector('.trace').hidden")
    page.ask("yes")
    assert page.text(".answer.found .big") == "yes"
    assert "check it against what was read" in page.text(".answer .about")
    assert page.texts("#history li .hidden") == [", answered", ", not found", ", not found"]


@pytest.mark.parametrize("by", ["key", "button"])
def test_stop_aborts_the_request(page, server, by):
    server.scripts[ASKED] = [*STEPS, ("gate",), ("answer", ANSWER)]
    page.open()
    page.ask(until="document.querySelectorAll('.passages').length === 2")
    if by == "key":
        page.press("Escape")
    else:
        page.js("document.getElementById('stop').focus()")
        page.press("Enter")
    page.wait("document.querySelector('.stopped')")
    assert server.aborted.wait(20)
    assert page.js("document.getElementById('stop').hidden")
    assert page.focus == ("question" if by == "key" else "result")
    assert page.text(".trace > summary") == "2 searches · 3 passages read · stopped"
    assert len(page.texts(".passages")) == 2  # what had come stays
    assert page.text("#status") == "Stopped."


def test_a_new_question_takes_the_place_of_the_one_under_way(page, server):
    server.scripts |= {ASKED: [*STEPS, ("gate",)], "other": [("answer", answered("other", "b", "held", []))]}
    page.open()
    page.ask(until="document.querySelectorAll('.passages').length === 2")
    page.ask("other")
    assert server.aborted.wait(20)
    page.wait("document.querySelectorAll('#history li').length === 2")
    assert page.text(".big") == "b"
    assert sorted(page.texts("#history li .hidden")) == [", answered", ", stopped"]


def test_the_history_and_the_address(page, server):
    server.scripts |= {
        "first": [*STEPS, ("answer", answered("first", "a", "guess", [WHALE]))],
        "後 & <b>": [("answer", answered("後 & <b>", "b", "held", []))],
    }
    page.open()
    page.ask("first")
    page.ask("後 & <b>")
    assert page.text("#history-button") == "History (2)"
    page.js("document.getElementById('history-button').focus()")
    page.press("Enter")
    page.wait("document.querySelector('#history').matches(':popover-open')")
    assert page.texts("#history li bdi") == ["後 & <b>", "first"]
    page.js("document.querySelectorAll('#history li button')[1].click()")
    assert page.text(".asked") == "first"
    assert page.text(".guess bdi") == "a"
    assert page.texts(".trace .body") == ["I need the author.", "Moby Dick", "And the captain?", "Ahab"]
    assert page.text("#status") == "Not found in these documents. The model's guess: a"
    page.js("history.back()")
    page.wait("document.querySelector('.asked').textContent === '後 & <b>'")
    page.driver.refresh()
    page.wait("document.querySelector('.big')?.textContent === 'b'")
    assert server.asked == ["first", "後 & <b>"]  # none was asked again
    page.click("#history-button")
    page.js("document.querySelector('#history > .link').click()")
    assert page.js("document.getElementById('history-button').hidden")
    assert page.js("sessionStorage.getItem('search-e1-history')") == "[]"


def test_a_link_asks_its_question(page, server):
    page.open("#q=Who+wrote%20the+novel+Moby+Dick%3F")
    page.wait("document.querySelector('.answer')")
    assert server.asked == [ASKED]
    assert page.js("document.getElementById('question').value") == ASKED
    page.js("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    page.click(".actions button")
    page.wait("document.querySelector('.actions button').textContent === 'Copied'")
    assert page.js("window.copied") == server.url + "#q=Who+wrote+the+novel+Moby+Dick%3F"
    page.ask()  # again, for the user wants it
    assert server.asked == [ASKED, ASKED]
    page.js("navigator.clipboard.writeText = async () => { throw new Error('denied') }")
    page.click(".actions button")
    page.wait("document.querySelector('.address')")
    assert page.js("document.activeElement.value") == server.url + "#q=Who+wrote+the+novel+Moby+Dick%3F"
