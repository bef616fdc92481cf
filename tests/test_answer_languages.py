"""Exact match and its kin in other languages than English, and where the language comes from."""

from threading import Thread

import pytest

from search_e1.agent.answer import locate
from search_e1.config import RolloutConfig
from search_e1.data.answers import (
    answer_words,
    cover_match,
    exact_match,
    f1,
    in_language,
    language_in_force,
    normalize_answer,
    put_in_force,
    word_spans,
    words,
)
from search_e1.errors import ConfigError
from search_e1.evaluation.compare import Evaluated, mixed
from search_e1.evaluation.recall import holds, in_corpus, patterns_of


@pytest.mark.parametrize(
    ("language", "text", "normal"),
    [
        ("en", "The  Rhein-Fall, Ａ 北京。", "rheinfall ａ 北京。"),  # the published rule
        ("de", "„Der  Rhein“!", "rhein"),
        ("de", "The Rhine", "the rhine"),
        ("de", "Mu\u0308nchen", "münchen"),
        ("fr", "L’Italie", "italie"),
        ("fr", "La Tour Eiffel", "tour eiffel"),
        ("es", "El río Ebro", "río ebro"),
        ("it", "un'isola, l'Elba", "isola elba"),
        ("pt", "Os Lusíadas", "lusíadas"),
        ("nl", "Het IJsselmeer", "ijsselmeer"),
        ("ru", "«Война и мир»", "война и мир"),  # no articles
        ("zh", "北京 市。", "北京市"),
        ("zh", "ＡＢＣ（公司）", "abc公司"),
        ("zh", "iPhone 手机", "iphone手机"),
        ("zh", "the North Sea", "the north sea"),
        ("ja", "「東京　ﾀﾜｰ」", "東京タワー"),
        ("ko", "서울 특별시", "서울특별시"),
        ("th", "กรุงเทพ มหานคร", "กรุงเทพมหานคร"),
        ("ar", "القَاهِرَة", "قاهرة"),
        ("ar", "أحمد، ١٩٩٠؟", "احمد 1990"),
        ("en+zh", "The 北京", "北京"),
        ("de+fr", "Die Loire, la Seine", "loire seine"),
        ("none", "The “Rhein”", "the rhein"),
    ],
)
def test_normal_forms(language: str, text: str, normal: str) -> None:
    with in_language(language):
        assert normalize_answer(text) == normal
    assert language_in_force() == "en"


def test_matches_by_hand() -> None:
    assert exact_match("Der Rhein", ["Rhein"]) == 0.0
    with in_language("de"):
        assert exact_match("Der Rhein", ["Rhein"]) == 1.0
        assert exact_match("der", ["die"]) == 0.0  # nothing is left
        assert cover_match("am Rhein entlang", ["der Rhein"]) == 1.0
    assert cover_match("首都是北京", ["北京"]) == 0.0
    with in_language("zh"):
        assert answer_words("北京 iPhone") == ["北", "京", "iphone"]
        assert cover_match("首都是北京", ["北京"]) == 1.0
        assert cover_match("北海", ["北京"]) == 0.0
        assert f1("北京市", ["北京"]) == pytest.approx(0.8)  # 2 of 3 and 2 of 2 characters
        assert f1("上海", ["北京"]) == 0.0


def test_a_passage_that_holds_an_answer_and_where() -> None:
    text = "中国的首都是北京（Ｂeijing）。"
    assert not holds([text], patterns_of(["北京"]))
    with in_language("zh"):
        assert holds([text], patterns_of(["北京。"]))
        assert not holds([text], patterns_of(["京都"]))
        assert in_corpus(["上海", text], [("北 京",), ("广 州",)]) == [True, False]
        assert locate(text, "北 京") == [(6, 8)]
        assert locate(text, "beijing") == [(9, 16)]
    with in_language("ar"):
        arabic = "تقع القَاهِرة في مصر"
        assert holds([arabic], patterns_of(["قاهرة"]))
        assert [arabic[a:b] for a, b in locate(arabic, "القاهرة")] == ["القَاهِرة"]
    with in_language("fr"):
        assert words("l'Italie est là") == ["italie", "est", "là"]
        assert word_spans("l'Italie") == [("italie", 2, 8)]
    assert words("The L'Italie") == ["l", "italie"]


def test_each_thread_has_its_own_language() -> None:
    found: list[str] = []

    def work() -> None:
        found.append(language_in_force())
        put_in_force("zh")
        found.append(language_in_force())

    with in_language("de"):
        thread = Thread(target=work)
        thread.start()
        thread.join()
        assert (found, language_in_force()) == (["en", "zh"], "de")


def test_the_config_names_it() -> None:
    assert RolloutConfig().answer_language == "en"
    assert RolloutConfig(answer_language="EN+zh").answer_language == "en+zh"
    with pytest.raises(ValueError, match="answer_language = 'chinese': no such language; did you mean 'zh'"):
        RolloutConfig(answer_language="chinese")
    with pytest.raises(ConfigError, match=r"rollout.answer_language = 'xx': no such language"), in_language("xx"):
        pass


def test_evaluations_by_different_rules_are_not_compared() -> None:
    english, german = (Evaluated(code, None, {}, {"rollout": {"answer_language": code}}) for code in ("en", "de"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"different protocols: rollout.answer_language \(en for en, de for de\)"):
        mixed([english, german], allowed=False)
    assert mixed([english, german], allowed=True) == ["mixed protocols: rollout.answer_language (en for en, de for de)"]
