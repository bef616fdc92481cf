"""The agent's page: themes, a phone, the keyboard alone, scripts of every direction, and what axe-core finds."""

import os
import re
from pathlib import Path

import pytest

import chromium
from page_server import PAGE, answered, bare, source
from paged import AHAB, ANSWER, ASKED, MOBY, STEPS, WHALE
from paged import page as page
from paged import server as server

pytestmark = pytest.mark.skipif(chromium.MISSING is not None, reason=str(chromium.MISSING))
AXE = os.environ.get("AXE_CORE")
"""axe.min.js of `npm pack axe-core`, which is not kept here."""


def test_the_themes_and_their_palette(page):
    style = (PAGE / "page.css").read_text()
    report = (PAGE.parent.parent / "evaluation/report/assets/report.css").read_text()
    palettes = [re.findall(r"(--[\w-]+): (#\w+);", text) for text in (style, report)]
    assert set(palettes[0]) <= set(palettes[1])
    assert len(palettes[0]) == 3 * 14
    back = "getComputedStyle(document.documentElement).backgroundColor"
    page.open(dark=True)
    assert page.js(back) == "rgb(15, 18, 21)"
    page.click("#theme")
    assert page.js(back) == "rgb(244, 245, 247)"
    page.driver.refresh()
    page.wait(f"{back} == 'rgb(244, 245, 247)'")
    page.click("#theme")
    page.open()
    assert page.js(back) == "rgb(15, 18, 21)"


def test_a_phone(page, server):
    long = source("p9", "Taumata" * 12, "whakatangihanga" * 40, file="a/very/long/" + "path" * 30, held="whakatangihanga" * 40)
    server.scripts[ASKED] = [*STEPS, ("answer", answered(ASKED, "whakatangihanga" * 9, "held", [long, MOBY]))]
    page.open(width=390, height=844, dark=True)
    width = "document.documentElement.scrollWidth"
    assert page.js(width) == 390
    page.ask()
    page.click(".trace > summary")
    assert page.js(width) == 390
    page.click(".sources .title")
    assert page.js("document.getElementById('passage').matches(':modal')")
    box = page.js("JSON.parse(JSON.stringify(document.getElementById('passage').getBoundingClientRect()))")
    assert (box["left"], box["width"], box["bottom"]) == (0, 390, 844)
    assert page.js("document.getElementById('passage').scrollWidth") <= 390
    page.press("Escape")
    page.wait("!document.getElementById('passage').open")
    page.click(".sources .title")
    page.look(1280)  # turned to a wide screen, the sheet becomes the side panel
    page.wait("document.getElementById('passage').matches(':not(:modal)[open]')")
    page.click("#history-button")
    assert page.js(width) <= 1280


def test_who_reads_at_the_end_goes_on_reading_there(page, server):
    more = [("search", f"query {i}", bare(MOBY, WHALE)) for i in range(12)]
    server.scripts |= {ASKED: [*more, ("answer", ANSWER)], "wait": [*more, ("gate",), *STEPS, ("answer", ANSWER)]}
    page.open(height=600)
    page.ask("wait", until="document.querySelectorAll('.passages').length === 12")
    end = "document.querySelector('.trace').getBoundingClientRect().bottom"
    assert 500 < page.js(end) <= 600
    page.js("window.scrollTo(0, 0)")  # to read again from the start
    server.gate.set()
    page.wait("document.querySelectorAll('.passages').length === 14")
    assert page.js("window.scrollY") == 0
    page.wait("document.querySelector('.answer')")
    page.ask()
    assert page.js("window.scrollY") == 0  # at the answer, above which the trace is folded
    assert page.js("document.querySelector('.big').getBoundingClientRect().bottom") < 600


def test_the_keyboard_alone(page):
    page.open()
    page.type("Who wrote")
    page.press("Enter", shift=True)
    page.type("it")
    assert page.js("document.getElementById('question').value") == "Who wrote\nit"
    page.js("document.getElementById('question').select()")
    page.type(ASKED)
    page.press("Enter")
    page.wait("document.querySelector('.answer')")
    page.driver.execute_script("document.querySelector('.skip').focus()")
    page.press("Enter")
    assert page.focus == "question"
    assert page.js("location.hash") == "#q=Who+wrote+the+novel+Moby+Dick%3F"
    seen = []
    for _ in range(8):
        page.press("Tab")
        seen.append(page.focus)
    assert seen[0] == "go"
    assert seen[1].startswith("2 searches")
    assert seen[2:] == ["[1] Moby-Dick", "Copy link", "Ask again", "Moby-Dick", "Sperm whale", "Captain Ahab"]
    page.js("document.activeElement.blur()")
    page.press("/")
    assert page.focus == "question"


def test_scripts_of_every_direction(page, server):
    arabic = source("a", "موبي ديك", "رواية موبي ديك كتبها هرمان ملفيل عام 1851.", held="هرمان ملفيل", file="novels.pdf")
    persian = source("f", "می\u200cخواهم", "می\u200cخواهم 👩\u200d🚀")
    chinese = source("c", "白鲸记", "《白鲸记》是赫尔曼·梅尔维尔于1851年发表的小说。" * 9, held="赫尔曼·梅尔维尔")
    server.scripts["من كتب موبي ديك؟"] = [
        ("answer", answered("من كتب موبي ديك؟", "هرمان ملفيل", "held", [arabic, chinese, persian]))
    ]
    page.open(width=390, height=844)
    page.ask("من كتب موبي ديك؟")
    for place in (".asked", ".big", "blockquote", ".source .excerpt", ".source .title"):
        assert page.js(f"getComputedStyle(document.querySelector('{place}')).direction") == "rtl"
    assert page.texts(".source mark")[:2] == ["هرمان ملفيل", "赫尔曼·梅尔维尔"]
    assert page.texts(".source .excerpt")[2] == persian["text"]  # joiners are letters there
    assert page.texts(".control") == []
    assert page.js("document.documentElement.scrollWidth") == 390


@pytest.mark.skipif(not AXE, reason="AXE_CORE names no axe.min.js (npm pack axe-core)")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(page, server, dark, width):
    server.scripts |= {
        "guess": [*STEPS, ("answer", answered("guess", "Jules Verne", "guess", [WHALE, AHAB]))],
        "streaming": [*STEPS, ("gate",)], "cut": [("cut",)],
    }  # fmt: skip
    found = {}

    def check(state: str) -> None:
        page.driver.execute_script("document.getAnimations().forEach((one) => one.cancel())")  # a pulse has no one contrast
        page.driver.execute_script(Path(str(AXE)).read_text())
        result = page.driver.execute_async_script("axe.run().then(arguments[0])")
        found[state] = [(one["id"], one["impact"], [node["html"] for node in one["nodes"]]) for one in result["violations"]]

    page.open(width=width, dark=dark)
    check("start")
    page.ask()
    check("answer")
    page.click(".sources .title")
    check("passage")
    page.press("Escape")
    page.ask("guess")
    check("guess")
    page.click("#history-button")
    check("history")
    page.press("Escape")
    page.ask("streaming", until="document.querySelectorAll('.passages').length === 2")
    check("streaming")
    page.press("Escape")
    page.wait("document.querySelector('.stopped')")
    check("stopped")
    page.ask("cut", until="document.querySelector('.problem')")
    check("problem")
    server.key = "k"
    page.failures = "status of 401"
    page.ask("cut", until="document.getElementById('key')")
    check("key")
    assert {state: one for state, one in found.items() if one} == {}
