import pytest

from search_e1.data.answers import exact_match, f1, normalize_answer


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
        ("", ["the"], 1.0),
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
