import re
import sys
import unicodedata

import pytest

from search_e1.data.answers import cover_match, exact_match, f1, normalize_answer
from search_e1.runs.nfc import _PERHAPS, nfc


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Beatles", "beatles"),
        ("  A  man,\ta plan \n", "man plan"),
        ("U.S.A.", "usa"),
        ("An apple a day", "apple day"),
        ("theatre another", "theatre another"),
        ("The-the", "thethe"),  # punctuation goes first, so that no article is left to drop
        ("(the) 'end'!", "end"),
        ("Łódź, POLAND", "łódź poland"),
        ("it\u2019s", "it\u2019s"),  # ASCII punctuation only
        ("1,000.5", "10005"),
        ("Ko\u0308ln", "k\u00f6ln"),  # NFD
        ("the", ""),
        ("", ""),
    ],
)
def test_normalisation_as_in_squad(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("answer", "gold", "em"),
    [
        ("the Eiffel Tower.", ["Eiffel tower"], 1.0),
        ("Eiffel", ["Eiffel tower"], 0.0),
        ("Paris", ["London", "paris"], 1.0),
        ("January 2015", ["2015 January"], 0.0),
        ("", ["the"], 0.0),  # nothing is left to be equal to
        ("?", ["!!!"], 0.0),
        ("!!!", ["!!!", "x"], 0.0),
        ("K\u00f6ln", ["Ko\u0308ln"], 1.0),
        ("Ko\u0308ln", ["K\u00f6ln"], 1.0),
        ("", ["x"], 0.0),
        (None, ["x"], 0.0),
        ("x", [], 0.0),
    ],
)
def test_exact_match(answer: str | None, gold: list[str], em: float) -> None:
    assert exact_match(answer, gold) == em


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("the Eiffel Tower", ["Eiffel tower"], 1.0),
        ("Eiffel", ["Eiffel tower"], 2 / 3),
        ("tall Eiffel tower here", ["Eiffel tower"], 2 * 0.5 * 1 / 1.5),
        ("dog dog cat", ["dog cat cat"], 2 / 3),  # a multiset: one dog and one cat are common
        ("London", ["Paris"], 0.0),
        ("Eiffel", ["Paris", "Eiffel tower", "Eiffel"], 1.0),
        ("yes", ["yes"], 1.0),
        ("yes it is", ["yes"], 0.0),
        ("no", ["no one"], 0.0),
        (None, ["x"], 0.0),
        ("", ["x"], 0.0),
        ("the", ["the"], 0.0),
    ],
)
def test_f1(answer: str | None, gold: list[str], expected: float) -> None:
    assert f1(answer, gold) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "gold", "held"),
    [
        ("in the city of Ko\u0308ln.", ["K\u00f6ln"], 1.0),
        ("Colognes", ["Cologne"], 0.0),
        ("", ["!!!"], 0.0),
        ("the", ["the"], 0.0),
        (None, ["x"], 0.0),
    ],
)
def test_cover_match(answer: str | None, gold: list[str], held: float) -> None:
    assert cover_match(answer, gold) == held


def test_composing_is_unicodes_and_takes_linear_time() -> None:
    texts = ["", "Oslo", "Ko\u0308ln", "\u1112\u1161\u11ab", "\u212b", "q\u0323\u0307", "e\u0301" * 100]
    assert [nfc(text) for text in texts] == [unicodedata.normalize("NFC", text) for text in texts]
    many = "a" + "\u0301\u0327" * 100_000  # minutes, composed as a whole
    assert len(nfc(many)) > 100_000


def test_every_mark_is_looked_for() -> None:
    one = re.compile(_PERHAPS.pattern.removesuffix("{30}"))
    assert all(one.match(chr(i)) for i in range(sys.maxunicode + 1) if unicodedata.combining(chr(i)))
