"""The report in headless Chromium: every view, keys, themes, a phone, hostile text, 5,000 trajectories; no console errors."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import axe_core_python
import pytest

import chromium
from made_run import POLICIES, make_run
from search_e1.evaluation.report import page

pytestmark = pytest.mark.skipif(chromium.MISSING is not None, reason=str(chromium.MISSING))
VIEWS = ("loop", "cost", "trajectories", "pairs", "questions", "config")
WITH_LISTS = ("trajectories", "pairs", "questions")
THESE = {"trajectories": "base/musique/q1", "pairs": "1/musique/q1", "questions": "musique/q1"}
"""Question 1 in each list."""
HOSTILE = {
    "QUESTION": "</script><script>window.hacked = 1</script>Who?",
    "TITLE": "<img src=x onerror='window.hacked = 2'>",
    "PASSAGE": "<!-- <script> \u2028 & &lt;b&gt; <svg onload=window.hacked=3>",
    "THOUGHT": "\x1b[31mred\x1b[0m and \u202eoverridden",
    "QUERY": "<iframe srcdoc='<script>parent.hacked = 4</script>'>",
    "ANSWER": "<a href='javascript:window.hacked = 5'>\u200bme</a>",
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium.opened(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


class Page:
    """A report in the browser."""

    def __init__(self, driver: Any, file: Path) -> None:
        self.driver, self.file = driver, file

    def open(self, place: str = "", width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        device = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get("about:blank")
        self.driver.get(self.file.as_uri() + place)
        self.wait("document.body.dataset.ready === 'true'")
        return self

    def js(self, expression: str) -> Any:
        return self.driver.execute_script(f"return {expression}")

    def wait(self, condition: str) -> None:
        end = time.monotonic() + 20
        while not self.js(condition):
            assert time.monotonic() < end, f"never: {condition}"
            time.sleep(0.02)

    def texts(self, selector: str) -> list[str]:
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.textContent)")

    def count(self, selector: str) -> int:
        return len(self.texts(selector))

    def click(self, selector: str) -> None:
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def press(self, key: str) -> None:
        """As the keyboard would, wherever the focus is."""
        event = {"key": key, "code": key, "windowsVirtualKeyCode": {"Escape": 27, "Enter": 13}.get(key, 0)}
        if len(key) == 1 or key == "Enter":
            event["text"] = "\r" if key == "Enter" else key
        for kind in ("keyDown", "keyUp"):
            self.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, **event})

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


@pytest.fixture(autouse=True)
def quiet(driver):
    """Nothing in the console, neither errors nor warnings."""
    driver.get_log("browser")
    yield
    assert [entry["message"] for entry in driver.get_log("browser")] == []


@pytest.fixture(scope="module")
def report(driver, tmp_path_factory) -> Page:
    root = tmp_path_factory.mktemp("report")
    page.write(make_run(root / "run"), root / "r.html")
    return Page(driver, root / "r.html")


def test_the_loop_at_a_glance(report):
    report.open()
    [headline] = report.texts("h1")
    assert headline.startswith("From base to ofsd-2, greedy exact match went from 0.500 to 1.000 (+0.500)")
    assert report.count("svg[aria-label='Exact match by policy'] circle") == 10  # greedy and sampled
    assert report.count("svg[aria-label='Gain in EM by stage'] rect") == 4
    assert report.texts("svg[aria-label='Gain in EM by stage'] .value") == ["+0.167", "+0.167", "+0.083", "+0.083"]
    assert report.count("svg[aria-label='Reward by step'] polyline") == 2
    assert report.count('svg[aria-label="Teacher\'s lead by round"] circle') == 2
    assert report.texts(".share .good, .share .bad") == [""] * 4
    assert "0.25" in " ".join(report.texts(".tile"))  # the lead


def test_costs_say_what_ran_on_gpus(report):
    report.open("#cost")
    cells = report.js("[...document.querySelectorAll('tbody tr')].map((row) => [...row.children].map((c) => c.textContent))")
    by_stage = {row[0]: row[1:] for row in cells if len(row) == 6}
    assert by_stage["grpo-1"] == ["90 s", "1,500", "1,500", "2", "0.05"]
    assert by_stage["pool-1"] == ["90 s", "2,400", "–", "0 (CPU)", "0.00"]
    assert by_stage["all stages"][-1] == "0.10"


def test_trajectories_are_filtered_searched_and_shown(report):
    report.open("#trajectories")
    assert report.texts(".count") == ["60 trajectories"]
    report.choose("Outcome", "wrong")
    report.choose("Policy", "base")
    assert report.texts(".count") == ["6 of 60 trajectories"]
    report.choose("Failure", "no action")
    assert report.texts(".count") == ["1 of 60 trajectories"]
    assert "outcome=wrong" in report.js("location.hash")
    report.click(".filters button")
    report.choose("Benchmark", "musique")
    report.choose("Hops", "2-hop")
    assert report.texts(".count") == ["10 of 60 trajectories"]  # questions 1 and 7
    report.click(".filters button")
    report.type("gold 11")
    assert report.texts(".count") == ["5 of 60 trajectories"]
    report.click(".row")
    assert report.texts(".detail .label")[:3] == ["Thought", "Search", "Passages"]
    assert report.texts(".detail .label")[-1] == "Answer ✗"
    assert report.texts(".detail .answer .body") == ["somebody else"]
    assert report.count(".detail mark") == 3  # the gold answer in each first passage of three searches
    assert report.texts(".detail .chips .chip") == ["base ✗", "grpo-1 ✗", "ofsd-1 ✗", "grpo-2 ✓", "ofsd-2 ✓"]


def test_the_first_of_a_list_is_open(report):
    for view, title in (("trajectories", "(0)?"), ("pairs", "(0)?"), ("questions", "(0)?")):
        report.open(f"#{view}")
        assert report.js("document.querySelector('[aria-selected=true]').getAttribute('aria-posinset')") == "1"
        assert report.texts(".detail h2")[0].endswith(title)
        assert report.js("location.hash") == f"#{view}"
    report.choose("Change", "lost by grpo-2")
    assert report.texts(".detail h2")[0].endswith("(0)?")
    report.choose("Change", "won by grpo-1")
    assert report.texts(".detail h2")[0].endswith("(1)?")


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


def test_the_answer_stands_beside_the_gold_ones(report):
    report.open("#trajectories?at=base/nq/q0")
    assert report.texts(".detail .answers > div > dt") == ["✓rightAnswered, right", "Goldany of these"]
    title = report.js("document.querySelector('.detail .passages li:has(mark) b').textContent")
    assert report.texts(".detail .answers dd") == ["Gold 0", f"stands in {title}", "Gold 0G. 0"]
    report.open("#trajectories?at=base/musique/q1")
    assert report.texts(".detail .answers .given.wrong dd") == ["somebody else", "stands in nothing that was read"]
    report.open("#trajectories?at=base/musique/q5")
    assert report.texts(".detail .answers .given.wrong dt")[0].endswith("No answer")
    assert report.texts(".detail .answers .given.wrong dd") == [
        "Stopped: the last generation was neither a search nor an answer."
    ]
    report.open(f"#pairs?at={THESE['pairs']}")
    assert report.texts(".column .given dd:not(.rests)") == ["Gold 1", "somebody else"]


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


def test_what_matches_nothing_can_be_reset(report):
    report.open("#trajectories?q=nowhere&outcome=right")
    assert report.texts(".detail .empty p") == ["No trajectory matches the search and these filters."]
    report.click(".detail .empty button")
    assert report.texts(".count") == ["60 trajectories"]
    assert report.js("location.hash") == "#trajectories"
    assert report.texts(".detail h2")[0].endswith("(0)?")


def test_pools_and_groups_of_grpo_are_among_the_trajectories(driver, tmp_path):
    page.write(make_run(tmp_path / "run", groups=2), tmp_path / "r.html")
    report = Page(driver, tmp_path / "r.html").open("#trajectories")
    assert report.texts(".count") == ["84 trajectories"]
    report.choose("Source", "pool (sampled)")
    report.choose("Round", "round 2")
    assert report.texts(".count") == ["6 of 84 trajectories"]
    assert report.texts(".detail .chips") == ["Group1 of 3 right:1 ✓2 ✗3 ✗"]
    report.click(".detail .chip:last-child")
    report.wait("location.hash.includes('pool-2')")
    assert report.js("new URLSearchParams(location.hash.split('?')[1]).get('at')") == "pool-2/nq/q0/3"
    assert report.texts(".detail .chip.here") == ["3 ✗"]
    report.open("#questions")
    assert report.texts(".count") == ["12 questions"]


def test_why_em_fell_stands_below_the_gains(driver, tmp_path):
    page.write(make_run(tmp_path / "run", failing=("ofsd-1",)), tmp_path / "r.html")
    report = Page(driver, tmp_path / "r.html").open()
    [why] = report.texts(".notice")
    assert why.startswith(
        "Greedy EM fell by 0.667 from grpo-1 to ofsd-1 (95% −0.917 to −0.417): its teacher had a lead (+0.250 EM"
    )
    assert "the GRPO that follows teaches the decisions again in the new words: grpo-2 has EM 0.917." in why


def test_the_config_and_the_commands_can_be_copied(report):
    report.open("#config")
    commands, config = report.texts(".copyable pre")
    assert commands.startswith("search-e1 train run.toml\n")
    assert 'model = "small"' in config
    report.js("document.querySelector('[aria-label=\"Copy config\"]').focus()")
    report.press("Enter")
    report.wait("document.querySelector('[aria-label=\"Copy config\"]').textContent !== 'Copy'")
    assert report.texts("[aria-label='Copy config']") == ["Copied"]


@pytest.fixture(scope="module")
def several(driver, tmp_path_factory) -> Page:
    root = tmp_path_factory.mktemp("several")
    first = make_run(root / "first", groups=1)
    second = make_run(root / "second", questions=6, policies=("base", "grpo-1"), seed=1)
    page.write(first, root / "r.html", others=[second])
    return Page(driver, root / "r.html")


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
        "No pairs: the run has not reached mining, which follows GRPO and the pool."
    )


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


def test_a_pair_shows_what_each_token_diverges(report):
    report.open(f"#pairs?at={THESE['pairs']}")
    pair, tokens = report.js("records.pairs[1]"), "[...document.querySelectorAll('.block.heat .token')]"
    assert report.count(".block.heat .token") == len(pair["kl"]["kl"])
    assert "".join(report.texts(".block.heat .token")) == "".join(pair["kl"]["pieces"])
    heats = report.js(f"{tokens}.map((token) => parseFloat(getComputedStyle(token).getPropertyValue('--heat')))")
    assert heats[0] == 0
    assert heats[5] == pytest.approx(100 * (1 - 2.718281828**-0.5), abs=0.1)
    assert heats == sorted(heats)
    colors = report.js(f"{tokens}.map((token) => getComputedStyle(token).backgroundColor)")
    assert len(set(colors)) > 5
    last = len(heats) - 1
    report.press("n")  # the greatest peak
    assert report.texts(".readout dd") == [
        "</answer>␣",
        "thought",
        f"{last / 10:.3f} nats",
        "0.250",
        "0.500",
        "␣instead",
    ]
    report.press("ArrowLeft")
    assert report.texts(".readout dd")[2] == f"{(last - 1) / 10:.3f} nats"
    report.js("document.querySelectorAll('.block.heat .token')[2].dispatchEvent(new MouseEvent('mouseenter'))")
    assert report.texts(".readout dd")[2] == "0.200 nats"
    assert report.texts(".column h3")[0].startswith("Reference")
    assert report.count(".column:first-child .answer.right") == 1


def test_a_question_through_the_rounds(report):
    report.open()
    report.click("a[href*='change=lost+by+grpo-2']")
    report.wait("document.querySelectorAll('.row').length > 0")
    assert report.texts(".count") == ["1 of 12 questions"]
    assert report.texts(".row .squares") == ["✓✓✓✗✓"]
    assert report.texts(".column h3") == list(POLICIES)
    assert report.count(".column .answer.wrong, .column .correction") >= 1


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


def test_what_models_and_passages_say_stays_text(driver, tmp_path):
    page.write(make_run(tmp_path / "<b>run\u202e", replace=HOSTILE), tmp_path / "r.html")
    report = Page(driver, tmp_path / "r.html")
    for place in ("#loop", "#cost", "#config", *(f"#{view}?at={at}" for view, at in THESE.items())):
        report.open(place)
        if "?" in place:
            assert report.texts(".detail h2") == [HOSTILE["QUESTION"]]
        assert (
            report.js(
                "document.querySelectorAll('img, iframe, main script, main a[href^=javascript], [onload], [onerror]').length"
            )
            == 0
        )
        assert report.js("window.hacked") is None
    report.open(f"#trajectories?at={THESE['trajectories']}")
    shown = report.js("document.querySelector('.detail').textContent")
    assert HOSTILE["TITLE"] in shown
    assert "U+001B[31mredU+001B[0m and U+202Eoverridden" in shown
    assert "<a href='javascript:window.hacked = 5'>U+200Bme</a>" in shown
    assert not {"\x1b", "\u202e", "\u200b"} & set(report.js("document.body.innerText"))


def test_names_of_anything_stay_text(driver, tmp_path):
    evil = "</script><img src=x onerror='window.hacked = 6'><svg onload=window.hacked=7>\u202e\x1b"
    root = make_run(tmp_path / "run")
    config = json.loads((root / "config.json").read_text()) | {"policy": {"model": evil}, "rounds": 2}
    (root / "config.json").write_text(json.dumps(config))
    (root / "summary.json").write_text(json.dumps({"rounds": {"1": {"refused": evil}}}))
    for file in root.glob("evaluation-*/*.json*"):
        if file.name != "manifest.json":
            # Benchmarks, and ids of questions: keys, values, whatever stands in the place of a name.
            text = file.read_text().replace('"musique"', json.dumps(evil)).replace('"q1"', json.dumps(evil))
            file.write_text(text.replace('"malformed": ', f"{json.dumps(evil)}: "))
    for file in root.glob("*/steps.jsonl"):
        file.write_text(file.read_text().replace('"grad_norm"', json.dumps(evil)))
    page.write(root, tmp_path / "r.html")
    report = Page(driver, tmp_path / "r.html")
    for place in (f"#{view}" for view in VIEWS):
        report.open(place)
        if place[1:] in WITH_LISTS:
            report.press("j")  # to question 1
        assert report.js("document.querySelectorAll('main img, main script, main iframe, [onload], [onerror]').length") == 0
        assert report.js("window.hacked") is None
        assert not {"\x1b", "\u202e"} & set(report.js("document.body.innerText"))


def test_five_thousand_trajectories(driver, tmp_path):
    page.write(make_run(tmp_path / "run", questions=1000, words=30), tmp_path / "r.html")
    report = Page(driver, tmp_path / "r.html").open("#trajectories")
    assert report.texts(".count") == ["5,000 trajectories"]
    assert report.count(".row") < 60
    assert report.js("document.querySelector('.rows').scrollHeight") > 400_000
    report.js("document.querySelector('.rows').scrollTo(0, 300000)")
    report.wait("Number(document.querySelector('.row').getAttribute('aria-posinset')) > 3000")
    assert report.count(".row") < 60
    report.type("gold 777")
    assert report.texts(".count") == ["5 of 5,000 trajectories"]
    assert report.texts(".detail .meta")[0].endswith("q777")
    report.open("#questions")
    assert report.texts(".count") == ["1,000 questions"]


def test_an_unfinished_run_says_so(driver, tmp_path):
    run = make_run(tmp_path / "run", policies=("base",))
    (run / ".grpo-1.partial").mkdir()
    page.write(run, tmp_path / "r.html")
    report = Page(driver, tmp_path / "r.html").open()
    assert "not finished: round 0 of 2; begun and not complete: grpo-1" in report.texts(".notice")[0]
    for view in VIEWS:
        report.open(f"#{view}")
    report.open("#questions")
    assert report.texts(".count") == ["12 questions"]
    shutil.rmtree(run / "evaluation-base")
    page.write(run, tmp_path / "r.html")
    for view in VIEWS:
        report.open(f"#{view}")
    report.open("#questions")
    assert report.texts(".count") == ["0 questions"]
    assert (
        report.texts(".detail .empty")
        == report.texts(".why .empty")
        == [
            "No questions: a question is shown here once a policy has answered it in an evaluation. Begun: grpo-1. No process "
            "works in the run; search-e1 train with its config resumes it."
        ]
    )
