"""The report in headless Chromium, for tests."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

import chromium
from made_run import make_run
from search_e1.evaluation.report import page

VIEWS = ("loop", "cost", "trajectories", "pairs", "questions", "config")
THESE = {"trajectories": "base/musique/q1", "pairs": "1/musique/q1", "questions": "musique/q1"}
"""Question 1 in each list."""


class Page(chromium.Page):
    """A report in the browser; ``file`` has its address."""

    def __init__(self, driver: Any, file: Any) -> None:
        super().__init__(driver)
        self.file = file

    def open(self, place: str = "", width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        self.load(self.file.as_uri() + place, width, height, dark)
        self.wait("document.body.dataset.ready === 'true'")
        return self

    def point(self, selector: str) -> None:
        """Move the mouse to the middle of an element."""
        self.js(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{ block: 'center' }})")
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        box = self.js(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", **where})

    def choose(self, label: str, value: str) -> None:
        self.js(
            f"((select) => {{ select.value = {json.dumps(value)}; select.dispatchEvent(new Event('change')) }})"
            f"(document.querySelector('select[aria-label={label}]'))"
        )

    def type(self, text: str) -> None:
        self.js(
            f"((input) => {{ input.value = {json.dumps(text)}; input.dispatchEvent(new Event('input')) }})"
            "(document.querySelector('input[type=search]'))"
        )


@pytest.fixture
def quiet(driver: Any) -> Iterator[None]:
    """Nothing in the console, neither errors nor warnings."""
    driver.get_log("browser")
    yield
    assert [entry["message"] for entry in driver.get_log("browser")] == []


@pytest.fixture(scope="module")
def report(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Of a whole run."""
    root = tmp_path_factory.mktemp("report")
    page.write(make_run(root / "run"), root / "r.html")
    return Page(driver, root / "r.html")
