"""The look of the report in headless Chromium: charts, terms, keys, themes, a phone, several runs, what axe finds."""

import json
from pathlib import Path

import axe_core_python
import pytest

import chromium
from made_run import make_run
from report_page import THESE, VIEWS, Page
from report_page import quiet as quiet
from report_page import report as report
from search_e1.evaluation.report import page

pytestmark = [
    pytest.mark.skipif(chromium.MISSING is not None, reason=str(chromium.MISSING)),
    pytest.mark.usefixtures("quiet"),
]


@pytest.fixture(scope="module")
def several(driver, tmp_path_factory) -> Page:
    root = tmp_path_factory.mktemp("several")
    first = make_run(root / "first", groups=1)
    second = make_run(root / "second", questions=6, policies=("base", "grpo-1"), seed=1)
    page.write(first, root / "r.html", others=[second])
    return Page(driver, root / "r.html")


def test_charts_tell_their_values_under_the_mouse_and_by_keys(report):
    report.open()
    tip, chart = "document.getElementById('tip')", "svg[aria-label='Exact match by policy']"
    assert report.js(f"{tip}.hidden")
    report.point(chart)  # the third of five
    assert not report.js(f"{tip}.hidden")
    assert report.texts("#tip b")[0] == "ofsd-1"
    assert report.texts("#tip li")[0] == "greedy 0.833 (95% 0.552 to 0.953)"  # Wilson's of 10 of 12
    assert report.count(f"{chart} .crosshair") == 1
    report.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 2, "y": 2})
    report.wait(f"{tip}.hidden")
    assert report.count(f"{chart} .crosshair") == 0
    report.js("document.querySelector('svg[aria-label=\"Gain in EM by stage\"]').parentElement.focus()")
    for key, title in (
        ("Home", "grpo-1"),
        ("ArrowRight", "ofsd-1"),
        ("End", "ofsd-2"),
        ("ArrowRight", "ofsd-2"),
        ("ArrowLeft", "grpo-2"),
    ):
        report.press(key)
        assert report.texts("#tip b")[0] == title
    assert report.texts("#tip li")[2] == "questions 12 2 won, 1 lost"
    [spoken] = report.texts("#spoken")
    assert spoken.startswith("grpo-2: gain +0.083 (95% ")
    report.press("Escape")
    assert report.js(f"{tip}.hidden")
    report.point("svg[aria-label='Reward by step']")
    assert report.texts("#tip li")[0].startswith("reward 1")
    assert "step" in report.texts("#tip b")[0]


@pytest.mark.parametrize(
    ("place", "word", "begins"),
    [
        ("#loop", "usable", "Questions with a reference and a sibling"),
        ("#loop", "off track", "Begun from the middle of a wrong student's trajectory"),
        ("#loop", "Teacher's lead", "The teacher's EM minus the student's"),
        ("#pairs", "Reference", "The correct trajectory that the teacher sees."),
        ("#pairs", "Student", "The same policy under the plain prompt."),
        ("#trajectories?at=base/musique/q5", "No action", "A turn that is neither a search nor an answer"),
        ("#cost", "trained tokens", "Tokens that entered a loss"),
    ],
)
def test_our_words_explain_themselves(report, place, word, begins):
    report.open(place)
    found = f"[...document.querySelectorAll('.term')].find((one) => one.textContent === {json.dumps(word)})"
    report.js(f"{found}.setAttribute('id', 'word')")
    report.point("#word")
    report.wait("!document.getElementById('tip').hidden")
    assert report.texts("#tip")[0].startswith(begins)
    assert report.js("document.getElementById('word').getAttribute('aria-describedby')") == "tip"
    report.press("Escape")
    assert report.js("document.getElementById('tip').hidden")
    report.js("document.getElementById('word').focus()")
    assert report.texts("#tip")[0].startswith(begins)
    assert not report.js("document.getElementById('tip').hidden")


@pytest.mark.parametrize("view", ["runs", *VIEWS])
def test_no_view_shuts_anybody_out(several, view):
    """axe-core's rules, those of WCAG 2 and its best practices; contrast is tested with the palette."""
    several.open(f"#{view}")
    several.driver.execute_script((Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = several.driver.execute_async_script(
        "axe.run({ rules: { 'color-contrast': { enabled: false } } }).then(arguments[0])"
    )
    assert [(one["id"], one["nodes"][0]["target"]) for one in found["violations"]] == []
    assert len(found["passes"]) > 20
    several.open(f"#{view}", width=390, height=844)
    assert several.js("document.documentElement.scrollWidth") <= 390


def test_keys(report):
    report.open()
    report.press("3")
    report.wait("document.querySelectorAll('.row').length > 0")
    report.press("/")
    assert report.js("document.activeElement.type") == "search"
    report.press("j")  # is typed
    assert report.js("document.activeElement.value") == "j"
    report.press("Escape")
    assert report.js("document.activeElement.tagName") == "BODY"
    report.type("")
    chosen = "document.querySelector('[aria-selected=true]')?.getAttribute('aria-posinset')"
    for key, position in (("j", "2"), ("j", "3"), ("ArrowDown", "4"), ("k", "3"), ("ArrowUp", "2"), ("k", "1"), ("k", "1")):
        report.press(key)
        assert report.js(chosen) == position
    report.click(".skip")
    assert report.js("[document.activeElement.id, document.body.dataset.view]") == ["main", "trajectories"]
    report.press("?")
    assert report.js("document.getElementById('help').open")
    report.press("Escape")
    report.wait("!document.getElementById('help').open")
    before = report.js("getComputedStyle(document.body).color")
    report.press("t")
    assert report.js("document.documentElement.dataset.theme") == "dark"
    assert report.js("getComputedStyle(document.documentElement).color") != before
    report.press("t")
    report.js("localStorage.clear()")


@pytest.mark.parametrize("view", VIEWS)
def test_a_phone_and_the_dark(report, view):
    report.open(f"#{view}{f'?at={THESE[view]}' if view in THESE else ''}", width=390, height=844, dark=True)
    report.wait("document.querySelector('#tabs [aria-current]')")
    assert report.js("document.documentElement.scrollWidth") <= 390
    assert report.js("getComputedStyle(document.documentElement).backgroundColor") == "rgb(15, 18, 21)"
    if view not in THESE:
        return
    assert report.js("getComputedStyle(document.querySelector('.side')).display") == "none"
    report.click(".back")
    assert report.js("getComputedStyle(document.querySelector('.detail')).display") == "none"
    assert report.js("document.querySelector('.rows').getBoundingClientRect().bottom") == 844
    report.click(".row")
    assert report.js("getComputedStyle(document.querySelector('.detail')).display") == "block"


def test_a_long_question_keeps_its_beginning_and_its_end(driver, tmp_path):
    long = f"Which of the composers {'who lived there ' * 20}was born in Oslo?"
    page.write(make_run(tmp_path / "run", replace={"QUESTION": long}), tmp_path / "r.html")
    report = Page(driver, tmp_path / "r.html").open("#trajectories")
    rows = "[...document.querySelectorAll('.row')]"
    report.wait(f"{rows}[1].textContent.includes(' … ')")  # once the width of the list is known
    shown, whole = report.js(f"(({{ textContent, title }}) => [textContent, title])({rows}[1].querySelector('.title'))")
    assert whole == long
    assert shown.startswith("Which of the composers ")
    assert shown.endswith(" was born in Oslo?")
    assert report.js(f"{rows}.every((row) => row.querySelector('.title').scrollHeight <= 45)")


def test_several_runs(several):
    several.open()
    assert several.js("document.body.dataset.view") == "runs"
    assert several.texts("tbody tr th a") == ["first", "second"]
    assert several.count("svg[aria-label='Greedy exact match by run'] circle") == 5 + 2
    several.point("svg[aria-label='Searches by run']")  # ofsd-1, which the second run has not
    assert several.texts("#tip b")[0] == "ofsd-1"
    assert several.count("#tip li") == 1
    # Two stages of the first run, and over the first of them that of the second.
    assert several.count("svg[aria-label='Reward by step'] polyline") == 4
    assert several.texts("tbody tr:last-child > *")[-3:] == ["seed", "0", "1"]
    several.choose("Run", "second")
    several.wait("document.body.dataset.view === 'loop'")
    assert several.js("location.hash") == "#loop?run=second"
    assert several.texts("h1")[0].startswith("From base to grpo-1")
    several.click("#tabs [data-view=trajectories]")
    several.wait("document.querySelectorAll('.row').length > 0")
    assert several.texts(".count") == ["12 trajectories"]
    several.press("j")
    assert several.js("location.hash") == "#trajectories?run=second&at=base%2Fmusique%2Fq1"
    several.press("5")
    several.wait("document.body.dataset.view === 'pairs'")
    assert several.texts(".detail .empty")[0].startswith(
        "No pairs: the run has not reached pair mining, which follows GRPO and the pool."
    )
