"""The report in headless Chromium: what each view shows, finds and copies; no console errors."""

import pytest

import chromium
from made_run import POLICIES, make_run
from report_page import THESE, Page
from report_page import quiet as quiet
from report_page import report as report
from search_e1.evaluation.report import page

pytestmark = [
    pytest.mark.skipif(chromium.MISSING is not None, reason=str(chromium.MISSING)),
    pytest.mark.usefixtures("quiet"),
]


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


def test_the_answer_stands_beside_the_gold_ones(report):
    report.open("#trajectories?at=base/nq/q0")
    assert report.texts(".detail .answers > div > dt") == ["✓rightAnswered, right", "Goldany of these"]
    title = report.js("document.querySelector('.detail .passages li:has(mark) b').textContent")
    assert report.texts(".detail .answers dd") == ["Gold 0", f"found in {title}", "Gold 0G. 0"]
    report.open("#trajectories?at=base/musique/q1")
    assert report.texts(".detail .answers .given.wrong dd") == ["somebody else", "found in nothing that was read"]
    report.open("#trajectories?at=base/musique/q5")
    assert report.texts(".detail .answers .given.wrong dt")[0].endswith("No answer")
    assert report.texts(".detail .answers .given.wrong dd") == [
        "Stopped: the last generation was neither a search nor an answer."
    ]
    report.open(f"#pairs?at={THESE['pairs']}")
    assert report.texts(".column .given dd:not(.rests)") == ["Gold 1", "somebody else"]


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
