"""`search-e1 report --serve`: a page in headless Chromium that follows a run while it goes on."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import chromium
from made_run import make_run
from report_page import Page
from search_e1.errors import RunError
from search_e1.evaluation.report.live import LiveReport

STEP = '{{"step": {}, "reward": 0.5}}\n'


class Served:
    """The verb in a process of its own."""

    def __init__(self, run: Path) -> None:
        command = [sys.executable, "-m", "search_e1.cli", "report", "--serve", str(run), "--port", "0"]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        assert self.process.stdout
        self.said = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", self.said)
        assert found, self.said + self.process.stdout.read()
        self.url = found[0]

    def as_uri(self) -> str:
        return self.url

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        rest, _ = self.process.communicate(timeout=60)
        return self.process.returncode, rest


@pytest.fixture
def growing(tmp_path):
    """A finished run to take stages from, and one that has only begun its first GRPO."""
    whole = make_run(tmp_path / "whole", questions=6, groups=1)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole / "config.json", run)
    shutil.copytree(whole / "evaluation-base", run / "evaluation-base")
    (run / ".grpo-1.partial").mkdir()
    (run / ".grpo-1.partial" / "steps.jsonl").write_text(STEP.format(1) + STEP.format(2))
    (run / ".holder.json").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": "now"}))
    return whole, run


@pytest.mark.skipif(chromium.MISSING is not None, reason=str(chromium.MISSING))
def test_the_page_follows_the_run_and_keeps_what_is_selected(growing, driver):
    whole, run = growing
    driver.get_log("browser")
    served = Served(run)
    try:
        page = Page(driver, served).open("#trajectories")
        assert page.texts("#run-state") == ["live · grpo-1"]
        page.choose("Outcome", "wrong")
        page.press("j")
        page.type("gold")
        page.js("document.querySelector('.detail').scrollTo(0, 40)")
        selected, question = page.js("location.hash"), page.texts(".detail h2")
        page.js("window.before = document.querySelector('.detail article')")
        # A step more: the figures change, the list does not.
        with (run / ".grpo-1.partial" / "steps.jsonl").open("a") as steps:
            steps.write(STEP.format(3))
        page.wait("overview.curves[0].step.length === 3")
        # GRPO is complete and evaluated.
        shutil.rmtree(run / ".grpo-1.partial")
        for name in ("grpo-1", "evaluation-grpo-1"):
            shutil.copytree(whole / name, run / name)
        page.wait("records.trajectories.length === 15")  # two evaluations of six, and a group of three
        assert page.js("location.hash") == selected
        assert page.texts(".detail h2") == question
        assert page.js("document.querySelector('.detail article') === before")
        assert page.js("document.querySelector('input[type=search]').value") == "gold"
        assert page.texts(".count")[0].endswith("of 15 trajectories")
        page.open("#loop")
        assert page.texts("h1")[0].startswith("From base to grpo-1")
        # Damage is told, and the page keeps what it has.
        page.js("window.scrollTo(0, 300)")
        evaluation = run / "evaluation-grpo-1" / "manifest.json"
        good = evaluation.read_text()
        evaluation.write_text("{")
        page.wait("document.getElementById('run-state').textContent.includes('damaged; remove')")
        assert page.texts("h1")[0].startswith("From base to grpo-1")
        evaluation.write_text(good)
        (run / ".holder.json").unlink()
        page.wait("document.getElementById('run-state').textContent === 'stopped: no process is running it'")
        assert page.js("window.scrollY") == 300
        for name in whole.iterdir():
            if name.is_dir() and not (run / name.name).exists():
                shutil.copytree(name, run / name.name)
        page.wait("document.getElementById('run-state').textContent === 'finished: nothing more to come'")
        assert page.texts("h1")[0].startswith("From base to ofsd-2")
        assert [entry["message"] for entry in driver.get_log("browser")] == []
        driver.get("about:blank")
    finally:
        status, said = served.stop()
    assert (status, said) == (0, "stopped\n")


def test_what_is_answered_and_to_whom(growing):
    served = Served(growing[1])
    try:
        page = httpx.get(served.url)
        assert "connect-src 'self'" in page.text
        news = httpx.get(served.url + "data").json()
        assert [run["run"] for run in news["overview"]["runs"]] == ["run"]
        known = {"version": news["version"], "records": news["records"]}
        assert httpx.get(served.url + "data", params=known).status_code == 204
        assert "packed" not in httpx.get(served.url + "data", params={"records": news["records"]}).json()
        assert httpx.get(served.url, headers={"Host": "evil.example"}).status_code == 421
        assert httpx.get(served.url + "data", headers={"Origin": "https://evil.example"}).status_code == 403
    finally:
        assert served.stop()[0] == 0


def test_what_is_no_run_is_not_served(tmp_path):
    with pytest.raises(RunError, match="no such directory; give the run directory"):
        LiveReport([tmp_path / "nowhere"], 10)
