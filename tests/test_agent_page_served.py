"""The agent's page from its real server: what the two say to each other."""

import pytest

import chromium

pytest.importorskip("fastapi")

from agent_serving import Gated, scripted, serving_agent
from conftest import PASSAGES
from page_server import PAGE, Standin
from paged import browsing

pytestmark = pytest.mark.skipif(chromium.MISSING is not None, reason=str(chromium.MISSING))


def test_answers_guesses_and_failures_of_the_real_server(driver):
    with serving_agent(scripted()) as url, browsing(driver, Standin(f"{url}/")) as page:
        page.open()
        assert page.text("#agent") == "tiny"
        page.ask("Who is mayor?")
        assert page.text(".found .big") == "Cor Dun"
        assert page.texts(".steps .body") == ["It is a city.", "mayor of Bel", "So."]
        assert page.texts(".sources .title") == ["Bel", "Arda"]
        assert page.texts(".sources .excerpt mark") == ["Cor Dun"]
        page.click(".sources .title")
        assert page.text("#passage .text") == PASSAGES[1].text
        page.ask("Guess?")
        assert page.text(".guess bdi") == "Gil Hor"
        page.failures = "status of 500"
        page.ask("Break?", until="document.querySelector('.problem')")
        assert "no passages after 4 attempts" in page.text(".problem")


def test_a_passage_is_read_and_a_question_stopped_at_the_real_server(driver):
    retriever = Gated()
    with serving_agent(scripted(retriever)) as url, browsing(driver, Standin(f"{url}/")) as page:
        page.open()
        page.ask("Then wait?", until="document.querySelector('.passages')")
        assert retriever.asked.wait(20)
        page.click(".passages button")
        page.wait("document.querySelector('#passage .text')")
        assert page.text("#passage .text") in {passage.text for passage in PASSAGES}
        assert page.texts("#passage a") == []  # the server's own address of it is none for readers
        page.press("Escape")
        page.press("Escape")
        page.wait("document.querySelector('.stopped')")
        retriever.opened.set()


def test_the_real_server_s_key_and_its_files(driver):
    with serving_agent(scripted(), key="s3cret") as url, browsing(driver, Standin(f"{url}/")) as page:
        page.open()
        page.failures = "status of 401"
        page.wait("document.getElementById('key')")
        page.js("document.getElementById('key').focus()")
        page.type("s3cret")
        page.press("Enter")
        page.wait("document.getElementById('agent').textContent === 'tiny'")
        page.ask("Who is mayor?")
        loaded = page.js("performance.getEntriesByType('resource').map((one) => new URL(one.name).pathname)")
        assert {f"/page/{file.name}" for file in PAGE.iterdir() if file.name != "index.html"} <= set(loaded)
