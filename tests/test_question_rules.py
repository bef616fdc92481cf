"""How questions are made of passages, piece by piece: rules, links, filters, the split, replies."""

import random

import pytest

from search_e1.errors import ConfigError
from search_e1.questions import prompts
from search_e1.questions.draft import split_documents
from search_e1.questions.filters import Copies, in_passage, jaccard, needs_both, well_formed
from search_e1.questions.links import links
from search_e1.questions.rules import RuleWriter, facts
from search_e1.types import Passage
from test_made_questions import ANN, FILM, MANUAL, TOWN, WORLD, draft


def asked(passage: Passage) -> dict[str, str]:
    return {fact.about(passage.title): fact.answer for fact in facts(passage)}


def test_rules_read_facts_about_the_title():
    assert asked(FILM) == {
        "Who directed Red Dust?": "Ann Moss",
        "In what year was Red Dust released?": "1932",
    }
    assert asked(ANN) == {"In what year was Ann Moss born?": "1901"}
    assert asked(TOWN) == {"What is the population of Belden?": "4,120 people", "In what year was Belden founded?": "1811"}
    assert asked(MANUAL) == {
        "What is the version of Model X100 under Specifications?": "2.3",
        "What is the weight of Model X100 under Specifications?": "2 kg",
        "What is the number of Filter in Model X100?": "F-7",
        "What is the number of Pump in Model X100?": "P-9",
    }


@pytest.mark.parametrize(
    "text",
    [
        "Red Dust is a film directed by Ann Moss and Bo Lee.",  # two right answers
        "Red Dust is a film about a man who was directed by Ann Moss.",  # another thing's
        "The sequel was released in 1932.",  # about something else
        "Red Dust is a film based on Ann Moss's novel.",
        "Red Dust is a film. It was released in 1932 or in 1933.",
        "Version: 1\nVersion: 2",
    ],
)
def test_rules_leave_alone_what_they_may_misread(text: str):
    assert asked(Passage(id="x", title="Red Dust", text=text)) == {}


def test_a_value_is_what_stands_on_its_line_alone():
    text = (
        "Contact us at http://www.example.org/\nTue Nov 27 12:40:49 EST\n\n* Default: EDITOR, or\n  'vi' elsewhere\n"
        "* See also: [`GET\n* Type: String (of one word)\nSince: 2.0\nNote: it is an error to use\nthe old name\n"
    )
    assert asked(Passage(id="x", title="editor", text=text)) == {
        "What is the type of editor?": "String (of one word)",
        "What is the since of editor?": "2.0",
    }


def test_lives_and_definitions():
    passage = Passage(id="x", title="Ada King", text="Ada King (10 December 1815 \u2013 27 November 1852) was a mathematician.")
    assert asked(passage) == {"In what year was Ada King born?": "1815", "In what year did Ada King die?": "1852"}
    [[*made]] = RuleWriter([FILM], 10, 0).write([(FILM,)])
    assert ("Which 1932 American film is directed by Ann Moss?", ("Red Dust",)) in [(d.text, d.answers) for d in made]


def test_a_sentence_with_a_gap_is_asked_where_no_fact_is_found():
    passage = Passage(id="x", title="Oak Hall", text="Many people say that Oak Hall had its best days around 1890 or so.")
    [[made]] = RuleWriter([passage], 10, 0).write([(passage,)])
    assert made.text == "Which year is missing in \u201cMany people say that Oak Hall had its best days around ___ or so\u201d?"
    assert (made.answers, made.rule, made.made_by) == (("1890",), "cloze", "rule")


def test_titles_in_texts_link_passages():
    assert [(a.id, b.id) for a, b in links(WORLD)] == [("f", "a")]
    album = Passage(id="x", title="Free (album)", text="An album.")
    start = Passage(id="y", title="Other", text="Music is here. The Free world. Belden of Ohio, and a Belden.")
    music = Passage(id="z", title="Music", text="What sounds.")
    assert [(a.id, b.id) for a, b in links([album, start, music, TOWN])] == [("y", "t")]


def test_two_hops_hide_what_links_them():
    [[made]] = RuleWriter(WORLD, 10, 0).write([(FILM, ANN)])
    assert made.text == "In what year was the director of Red Dust born?"
    assert made.answers == ("1901",)
    assert made.queries == ("Who directed Red Dust?", "In what year was Ann Moss born?")
    assert needs_both(made) == ""
    named = draft("When was Ann Moss, who directed Red Dust, born?", "1901", passages=(FILM, ANN))
    assert needs_both(named) == "names the second passage"
    both = draft("In what year was its director of Red Dust famous?", "1932", passages=(FILM, ANN))
    assert needs_both(both) == "the first passage has the answer"


@pytest.mark.parametrize(
    ("text", "answer", "why"),
    [
        ("What is the population of Belden?", "4,120", ""),
        ("What is the population of Belden", "4,120", "no question mark at its end"),
        ("Population of Belden?", "4,120", "3 words"),
        ("What is the population according to the passage?", "4,120", "refers to a passage"),
        ("What town is mentioned in this article?", "Belden", "refers to a passage"),
        ("What is the population of Belden?", "a b c d e f g h i j k", "a long answer"),
        ("Where is the town of Belden in Ohio?", "the Ohio", "the answer is in the question"),
        ("What is the population of Belden?", "...", "no answer"),
        ("In what year was Ann Moss (1704-1784) born?", "1704", "the answer is in the question"),
    ],
)
def test_well_formed(text: str, answer: str, why: str):
    assert well_formed(draft(text, answer)) == why


def test_the_answer_stands_in_the_last_passage():
    assert in_passage(draft("What is it in there?", "ohio")) == ""
    assert in_passage(draft("What is it in there?", "Iowa")) == "not there"
    assert in_passage(draft("Who directed the film of 1901?", "1932", passages=(FILM, ANN))) == "not there"


def test_near_copies_are_those_that_a_comparison_of_all_finds():
    rng = random.Random(0)
    words = [f"w{i:02}" for i in range(14)]
    texts = [" ".join(rng.sample(words, rng.randint(4, 12))) + "?" for _ in range(300)]
    kept: list[frozenset[str]] = []
    expected = []
    for text in texts:
        own = frozenset(text.rstrip("?").split())
        expected.append(any(jaccard(own, other) >= 0.8 for other in kept))
        kept += [] if expected[-1] else [own]
    copies = Copies()
    assert [bool(copies(draft(text, "x"))) for text in texts] == expected
    assert 20 < sum(expected) < 280


def test_documents_are_split_by_size_and_seed():
    passages = [Passage(id=f"{d}-{i}", title="t", text="x", metadata={"file": d}) for d in "abcde" for i in range(4)]
    split = split_documents(passages, 0.2, 0)
    assert sorted(split.values()) == ["eval", *["train"] * 4]
    assert {name for seed in range(20) for name, of in split_documents(passages, 0.2, seed).items() if of == "eval"} == set(
        "abcde"
    )
    assert set(split_documents(passages[:4], 0, 0).values()) == {"train"}
    with pytest.raises(ConfigError, match=r"one document \(a\), which cannot be split; write --eval-share 0"):
        split_documents(passages[:4], 0.2, 0)


def test_replies_in_many_dresses_are_read():
    reply = (
        '<think>Question: no\nAnswer: no</think>Sure!\n**Question 1:** Who is mayor?\n**Answer:** "Cor Dun".\n\n'
        "2. Question: And the\n"
        "Question: Where is Bel?\n- Answer: Arda\nQuestion: Unanswered?\n"
    )
    assert [(w.question, w.answer) for w in prompts.read_written(reply)] == [
        ("Who is mayor?", "Cor Dun"),
        ("Where is Bel?", "Arda"),
    ]
    [two] = prompts.read_written("Question: Q?\nFirst: a?\nSecond: b?\nAnswer: c")
    assert (two.first, two.second) == ("a?", "b?")
    assert prompts.read_answer("<think>hm</think>\n\nAnswer: Cor Dun.") == "Cor Dun."
    assert prompts.read_answer("") == ""
    braces = Passage(id="b", title="{question}", text="{number}")
    assert "Passage ({question}):\n{number}" in prompts.read_question("Q {unknown}?", braces)
