"""BM25 in other languages than English, and English as it was before there were others."""

import hashlib
import json
import logging
from pathlib import Path

import pytest

from search_e1.errors import ConfigError, DataError
from search_e1.retrieval import directory
from search_e1.retrieval.analysis import analysis_of, detect
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.runs.files import SUM
from search_e1.runs.languages import fold
from search_e1.types import Passage

ENGLISH = [
    Passage(id="1", title="Paris", text="The capital of France is on the river Seine, which runs through it."),
    Passage(id="2", title="Running rivers", text="A river is running where it was not stopped. Straße, naïve, 漢字."),
    *(Passage(id=f"e{i}", title="Lyon", text=f"It is the {i}th city of the country, and they are on it.") for i in range(40)),
]
CHINESE = [
    Passage(id="beijing", title="北京", text="北京是中国的首都，位于华北平原。"),
    Passage(id="shanghai", title="上海", text="上海是中国最大的城市，位于长江口。"),
    Passage(id="river", title="长江", text="长江是亚洲最长的河流。"),
]


def top(index: Bm25Index, *queries: str) -> list[str | None]:
    return [hits[0].id if hits else None for hits in index.search(queries, 3)]


def test_auto_is_english_to_the_byte_for_english(tmp_path: Path) -> None:
    auto, fixed = Bm25Index.build(ENGLISH, tmp_path / "auto"), Bm25Index.build(ENGLISH, tmp_path / "en", language="en")
    files = [f.relative_to(tmp_path / "en") for f in sorted((tmp_path / "en").rglob("*")) if f.is_file()]
    names = [f for f in files if not f.name.startswith("manifest")]
    assert len(names) > 6
    for name in names:
        assert (tmp_path / "auto" / name).read_bytes() == (tmp_path / "en" / name).read_bytes()
    assert auto.search(["running rivers"], 5) == fixed.search(["running rivers"], 5)
    assert auto.analysis.split("The Running café 漢字x") == ["the", "running", "café", "漢字x"]
    assert [auto.analysis.stem(word) for word in ("the", "running", "漢字x")] == ["", "run", "漢字x"]


def test_an_english_index_keeps_the_checksum_of_before_and_an_old_one_opens(tmp_path: Path) -> None:
    index = Bm25Index.build(ENGLISH, tmp_path / "index")
    expected = index.search(["the running rivers"], 5)
    before = {"k1": 0.9, "b": 0.4, "stopwords": "english", "stemmer": "english"}
    identity = {"kind": "bm25", "format": 2, "corpus": index.manifest.corpus, "settings": before}
    assert index.checksum == hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    manifest = tmp_path / "index" / directory.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"settings": before}))
    manifest.with_name(manifest.name + SUM).unlink()
    old = Bm25Index.open(tmp_path / "index")
    assert old.analysis.language == "en"
    assert old.search(["the running rivers"], 5) == expected


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("de", "Die Häuser der Straße in MÜNCHEN", ["haus", "strass", "munch"]),
        ("fr", "L'Italie et les chevaux", ["ital", "cheval"]),
        ("zh", "北京是首都 iPhone手机 第5回", ["北京", "京是", "是首", "首都", "iphone", "手机", "第", "回"]),
        ("ja", "ｶﾞｲﾄﾞブック", ["ガイ", "イド", "ドブ", "ブッ", "ック"]),
        ("ko", "서울은 수도", ["서울", "울은", "수도"]),
        ("th", "ที่ดิน", ["ที่ดิ", "ดิน"]),
        ("ar", "الْقَاهِرَةُ عاصمة مصر", ["قاهر", "عاصم", "مصر"]),
        ("hi", "हिन्दी भाषा", ["हिन्द", "भाष"]),
        ("tr", "İstanbul IŞIK", ["istanbul", "ışık"]),
        ("vi", "của thành phố Ｈà Nội", ["thành", "phố", "hà", "nội"]),
        ("none", "The Häuser", ["the", "häuser"]),
        ("en+zh", "The runners of 北京", ["runner", "北京"]),
        ("ru+en", "Running по улицам", ["run", "улиц"]),
    ],
)
def test_words_of_a_language(language: str, text: str, words: list[str]) -> None:
    analysis = analysis_of(language)
    assert [root for word in analysis.split(text) if (root := analysis.stem(word))] == words


def test_what_is_written_in_several_ways_is_one() -> None:
    assert fold("أحمد آدم إلى ٱلله مُحَمَّدـ") == fold("احمد ادم الي الله محمد")
    assert fold("１２３ ٤٥ ੬ ﬁ Ａ") == "123 45 6 fi a"
    assert fold("كتاب ي", ("fa",)) == "کتاب ی"
    assert analysis_of("de").stem("müller") == analysis_of("de").stem("mueller")


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (["The capital of France is Paris."], "en"),
        (["river city mayor capital film", "Bel stone"], "en"),
        (["12 34", "?!"], "en"),
        (["Die Hauptstadt von Deutschland ist Berlin und hat viele Einwohner."], "de"),
        (["Hovedstaden i Norge er Oslo, og den ble ikke flyttet av noen etter at byen brant."], "no"),
        (["Hovedstaden i Danmark er København, og den blev ikke flyttet af nogen."], "da"),
        (["Киев является столицей Украины, и он стоит на реке."], "ru"),
        (["Київ є столицею України та найбільшим містом, що стоїть на Дніпрі."], "uk"),
        (["القاهرة هي عاصمة مصر في شمال أفريقيا"], "ar"),
        (["تهران پایتخت ایران است و در شمال این کشور قرار دارد"], "fa"),
        (["北京是中国的首都。"], "zh"),
        (["東京は日本の首都です。"], "ja"),
        (["서울은 한국의 수도이다."], "ko"),
        (["กรุงเทพเป็นเมืองหลวง"], "th"),
        (["ភ្នំពេញ"], "km"),
        (["The capital of China is Beijing, and it is in the north.", "北京是中国的首都，位于华北平原。"], "en+zh"),
        (["The city of Beijing is the capital, and it is in the north." * 20, "北京"], "en"),  # too little to matter
        (["ქართული ენა"], "none"),
    ],
)
def test_the_language_of_a_corpus(texts: list[str], language: str) -> None:
    assert detect(texts).language == language


def test_chinese_is_found_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "search_e1")
    index = Bm25Index.build(CHINESE, tmp_path / "zh")
    assert caplog.messages == [
        f"{tmp_path / 'zh'}: language zh, detected in a sample of 3 passages; --language or retrieval.language sets another"
    ]
    assert index.manifest.settings == {
        "k1": 0.9, "b": 0.4, "language": "zh", "analysis": 1, "stopwords": "none", "stemmer": "none", "unspaced": "bigrams",
    }  # fmt: skip
    queries = ("中国最大的城市是哪个？", "亚洲最长的河流", "哪个是首都", "１２３")
    assert top(index, *queries) == ["shanghai", "river", "beijing", None]
    assert top(Bm25Index.open(tmp_path / "zh"), *queries) == ["shanghai", "river", "beijing", None]
    assert top(Bm25Index.build(CHINESE, tmp_path / "en", language="en"), *queries) == [None, None, None, None]


def test_a_corpus_of_two_scripts(tmp_path: Path) -> None:
    index = Bm25Index.build([*ENGLISH[:5], *CHINESE], tmp_path / "index")
    assert index.manifest.settings["language"] == "en+zh"
    assert top(index, "French 首都", "亚洲最长的河流", "running") == ["beijing", "river", "2"]


def test_another_language_is_another_index(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    german, english = (Bm25Index.build(ENGLISH, tmp_path / code, language=code) for code in ("de", "en"))
    assert german.checksum != english.checksum
    assert german.manifest.settings["stemmer"] == "german"


def test_several_processes_count_by_the_same_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search_e1.retrieval.bm25_build.CHUNK_BYTES", 200)
    one = Bm25Index.build(CHINESE * 4, tmp_path / "one")
    two = Bm25Index.build(CHINESE * 4, tmp_path / "two", processes=2)
    assert one.search(["首都"], 9) == two.search(["首都"], 9) != [[]]
    vocabulary = [(tmp_path / name / "bm25" / "words.npy").read_bytes() for name in ("one", "two")]
    assert vocabulary[0] == vocabulary[1]


def test_gaps_are_said_in_one_line_with_the_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Bm25Index.build([*CHINESE, *ENGLISH[:1]], tmp_path / "en", language="en")
    [said] = caplog.messages
    assert said == (
        f"{tmp_path / 'en'}: by the rules for language en, 0% of the passages have no word to search for, and 44% of the "
        "letters are in no word, so searches will rarely find them; build it with --language en+zh"
    )
    caplog.clear()
    empty = [Passage(id=str(i), title="?", text="!") for i in range(30)]
    Bm25Index.build([*ENGLISH, *empty], tmp_path / "empty")
    [said] = caplog.messages
    assert ": by the rules for language en, 42% of the passages have no word to search for, and " in said
    assert said.endswith("build a dense index instead")
    caplog.clear()
    Bm25Index.build(ENGLISH, tmp_path / "fine")
    assert not caplog.messages
    with pytest.raises(DataError, match="not one word to search for"):
        Bm25Index.build(empty, tmp_path / "none")


@pytest.mark.parametrize(
    ("language", "says"),
    [
        ("german", r"language = 'german': no such language; did you mean 'de'\?"),
        ("xx", "language = 'xx': no such language; known: "),
        ("en+en", "language = 'en\\+en': a language is repeated"),
        ("en+de", "language = 'en\\+de': en and de: both use the latin script"),
        ("en+none", "language = 'en\\+none': no such language"),
    ],
)
def test_a_wrong_language_is_refused_before_anything_is_written(tmp_path: Path, language: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Bm25Index.build(ENGLISH, tmp_path / "index", language=language)
    assert list(tmp_path.iterdir()) == []
