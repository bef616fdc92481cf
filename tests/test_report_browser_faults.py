"""The report in headless Chromium over hostile text, 5,000 trajectories and a run that is not finished."""

import json
import shutil

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
WITH_LISTS = ("trajectories", "pairs", "questions")
HOSTILE = {
    "QUESTION": "</script><script>window.hacked = 1</script>Who?",
    "TITLE": "<img src=x onerror='window.hacked = 2'>",
    "PASSAGE": "<!-- <script> \u2028 & &lt;b&gt; <svg onload=window.hacked=3>",
    "THOUGHT": "\x1b[31mred\x1b[0m and \u202eoverridden",
    "QUERY": "<iframe srcdoc='<script>parent.hacked = 4</script>'>",
    "ANSWER": "<a href='javascript:window.hacked = 5'>\u200bme</a>",
}


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
            "No questions yet: they appear once an evaluation is complete. Begun: grpo-1. No process "
            "is working on the run; search-e1 train with its config resumes it."
        ]
    )
