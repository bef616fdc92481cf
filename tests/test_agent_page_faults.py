"""The agent's page when things go wrong: keys, refusals, broken connections; text of models and passages stays text."""

import re
from pathlib import Path

import pytest

import chromium
from page_server import PAGE, answered, source, standing_in
from paged import ANSWER, ASKED, STEPS, Page
from paged import page as page
from paged import server as server

pytestmark = pytest.mark.skipif(chromium.MISSING is not None, reason=str(chromium.MISSING))


def test_a_key_is_asked_for_and_kept_in_the_tab(page, server):
    server.key = "right"
    page.open()
    page.wait("document.querySelector('.problem')")
    assert page.text(".problem h2") == "This server asks for a key"
    page.failures = "status of 401"
    for key in ("wrong", "right"):
        page.js("document.getElementById('key').focus()")
        page.type(key)
        page.press("Enter")
        if key == "wrong":
            page.wait("document.querySelector('.problem h2')?.textContent === 'The server rejected this key'")
    page.wait("document.getElementById('agent').textContent === 'moby'")
    assert page.texts(".problem") == []
    page.ask()
    assert page.js("[sessionStorage.getItem('search-e1-key'), JSON.stringify(localStorage)]") == ["right", "{}"]
    server.key = "changed"
    page.ask(until="document.getElementById('key')")
    server.key = "third"
    page.wait("document.activeElement.id === 'key'")
    page.type("third")
    page.press("Enter")
    page.wait("document.querySelector('.answer')")


FULL = (503, {"error": {"message": "64 questions wait"}}, {"Retry-After": "2"})


@pytest.mark.parametrize(
    ("refusal", "title", "remedy"),
    [
        (FULL, "The server is busy", "Wait 2 seconds."),
        ((429, {}, {"Retry-After": "7"}), "The server is busy", "Wait 7 seconds."),
        ((504, {"error": {"message": "60 s"}}, {}), "It took too long", "gave up on this question"),
        ((400, {"error": {"message": "too long"}}, {}), "The server rejected this question", "Change the question"),
        ((422, {"detail": [{"msg": "x"}]}, {}), "The server rejected this question", "Its message: status 422"),
        ((500, {"detail": "<img src=x>"}, {}), "The server failed", "Its message: <img src=x>"),
    ],
)
def test_a_refusal_says_what_to_do(page, server, refusal, title, remedy):
    page.open()
    server.refusal, page.failures = refusal, f"status of {refusal[0]}"
    page.ask(until="document.querySelector('.problem')")
    assert page.text(".problem h2") == title
    assert remedy in page.text(".problem")
    assert page.text("[role=alert]").startswith(title)
    assert page.texts("#history li .hidden") == [", failed"]


def test_a_full_queue_can_be_tried_again_after_its_wait(page, server):
    page.open()
    server.refusal, page.failures = FULL, "status of 503"
    page.driver.execute_script("window.setInterval = (tick) => { window.tick = tick }")
    page.ask(until="document.querySelector('.problem')")
    server.refusal = None
    for left in (2, 1):
        assert page.text(".problem button") == f"Try again in {left} s"
        assert page.js("document.querySelector('.problem button').ariaDisabled") == "true"
        page.click(".problem button")
        page.js("window.tick()")
    assert page.text(".problem button") == "Try again"
    assert len(page.texts(".problem")) == 1  # the clicks did nothing
    page.click(".problem button")
    page.wait("document.querySelector('.answer')")


@pytest.mark.parametrize(
    ("end", "title"),
    [
        (("cut",), "The connection was lost"),
        (("search", "x", [None]), "The server failed"),
        (("error", {"message": "the index is gone", "type": "server_error", "code": "failed"}), "The server failed"),
        (("error", {"message": "no answer within 60 s", "type": "timeout_error", "code": "timeout"}), "It took too long"),
    ],
)
def test_what_fails_under_way(page, server, end, title):
    server.scripts[ASKED] = [*STEPS[:5], end]
    page.open()
    page.ask(until="document.querySelector('.problem')")
    assert page.text(".problem h2") == title
    assert page.texts(".passages button") == ["Moby-Dick", "Sperm whale"]
    assert page.js("document.getElementById('stop').hidden")
    server.scripts[ASKED] = [("answer", ANSWER)]
    page.click(".problem button")
    page.wait("document.querySelector('.answer')")


def test_a_server_that_has_gone(driver):
    with standing_in() as standin:
        page = Page(driver, standin).open()
        page.wait("document.getElementById('agent').textContent === 'moby'")
    page.ask(until="document.querySelector('.problem')")
    assert page.text(".problem h2") == "The server does not respond"
    assert "search-e1 serve" in page.text(".problem")
    assert all("ERR_CONNECTION_REFUSED" in entry["message"] for entry in driver.get_log("browser"))


HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\x1b[31m\u202eevil\u200b"


def test_what_models_and_passages_say_stays_text(page, server):
    one = source(
        HOSTILE, HOSTILE, HOSTILE + " evil", held="evil", file=HOSTILE, page=HOSTILE, heading=HOSTILE, query=HOSTILE,
        url="javascript:window.hacked=3", **{HOSTILE: HOSTILE, "style": "x", "onclick": "window.hacked = 4"},
    )  # fmt: skip
    bad = one | {"id": "b", "url": "data:text/html,<script>1</script>", "marks": [["a", None], [5, 2], 7, [90000, 90001]]}
    asked = HOSTILE.replace("\x1b", "")  # which no keyboard types
    server.scripts[asked] = [
        ("thought", f"<think>{HOSTILE}</think><search>{HOSTILE}"), ("search", HOSTILE, [one, bad]),
        ("answer", answered(HOSTILE, HOSTILE, "held", [one, bad])),
    ]  # fmt: skip
    page.open()
    page.ask(asked, shown=asked.replace("\u202e", "U+202E").replace("\u200b", "U+200B"))
    assert "U+202EevilU+200B" in page.text(".answer .big")
    page.click(".trace > summary")
    for i in (0, 1):
        page.js(f"document.querySelectorAll('.sources .title')[{i}].click()")
        assert page.texts("#passage a") == []  # neither address becomes a link
        assert "<img src=x onerror='window.hacked = 2'>" in page.text("#passage .text")
    page.click("#history-button")
    assert (
        page.js("document.querySelectorAll('img, iframe, body script, [onerror], [onclick], a[href^=javascript]').length") == 0
    )
    assert page.js("window.hacked") is None
    assert not {"\x1b", "\u202e", "\u200b"} & set(page.js("document.body.innerText"))


def test_no_source_of_the_page_makes_markup_of_text():
    for file in Path(str(PAGE)).glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", file.read_text())
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|style=|\son\w+=|<script>|https?:", html)
