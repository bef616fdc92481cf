"""The agent's page in a browser, for tests: what it is asked, and what the stand-in says to that."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import chromium
from page_server import Standin, answered, bare, source, standing_in

ASKED = "Who wrote the novel Moby Dick?"
MOBY = source(
    "p1", "Moby-Dick", "Moby-Dick; or, The Whale is an 1851 novel by American writer Herman Melville. 🐋 The book is the "
    "sailor Ishmael's narrative of the maniacal quest of Ahab, captain of the whaling ship Pequod, for vengeance against Moby "
    "Dick, the giant white sperm whale that bit off his leg on the ship's previous voyage. Herman Melville began writing it in "
    "February 1850.",
    held="Herman Melville", file="novels.pdf", page=3, heading="Moby-Dick", url="https://example.org/moby?a=1",
)  # fmt: skip
WHALE = source("p2", "Sperm whale", "The sperm whale is the largest of the toothed whales. " * 8, file="whales.md")
AHAB = source(
    "p3", "Captain Ahab", "Captain Ahab is a fictional character, and captain of the Pequod.", query="Ahab", shelf="7"
)
STEPS = [
    ("thought", "<think>I need the auth"), ("thought", "or.</think>\n<sea"), ("thought", "rch>Moby Di"),
    ("thought", "ck</search>"), ("search", "Moby Dick", bare(MOBY, WHALE)),
    ("thought", "<think>And the captain?</think>"), ("thought", "<search>Ahab</search>"),
    ("search", "Ahab", bare(AHAB)),
]  # fmt: skip
ANSWER = answered(ASKED, "Herman Melville", "held", [MOBY, WHALE, AHAB])


class Page(chromium.Page):
    """The agent's page. ``failures``: what the browser itself may say of requests, and must have said."""

    def __init__(self, driver: Any, server: Standin) -> None:
        super().__init__(driver)
        self.server, self.failures = server, ""

    def open(self, place: str = "", width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        self.load(self.server.url + place, width, height, dark)
        self.wait("document.getElementById('agent').textContent || document.querySelector('.problem, .asked')")
        return self

    def type(self, text: str) -> None:
        self.driver.execute_cdp_cmd("Input.insertText", {"text": text})

    def ask(self, question: str = ASKED, until: str = "document.querySelector('.answer')", shown: str = "") -> None:
        self.js("(document.activeElement.blur(), document.getElementById('question').focus())")
        self.js("document.getElementById('question').select()")
        self.type(question)
        self.press("Enter")
        self.wait(f"document.querySelector('#result > h1')?.textContent === {json.dumps(shown or question)}")
        self.wait(until)

    @property
    def focus(self) -> str:
        return self.js("document.activeElement.id || document.activeElement.textContent")


@contextmanager
def browsing(driver: Any, server: Standin) -> Iterator[Page]:
    """The page of ``server``. The console stays empty, but for the failures that a test foresees."""
    driver.get_log("browser")
    page = Page(driver, server)
    yield page
    said = [entry["message"] for entry in driver.get_log("browser")]
    driver.get("about:blank")
    assert [one for one in said if not page.failures or not re.search(page.failures, one)] == []
    assert bool(said) == bool(page.failures)


@pytest.fixture
def server() -> Iterator[Standin]:
    """A stand-in that answers ``ASKED``."""
    with standing_in() as standin:
        standin.scripts = {ASKED: [*STEPS, ("answer", ANSWER)]}
        yield standin


@pytest.fixture
def page(driver: Any, server: Standin) -> Iterator[Page]:
    """Its page, not yet opened."""
    with browsing(driver, server) as page:
        yield page
