"""Whatever a question file or a config holds, it is read right or refused in one line: no value changes without a word.

``CASES=10000 pytest tests/test_input_properties.py`` tries that many of each.
"""

import atexit
import csv
import io
import json
import math
import os
import shutil
import string
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from search_e1.config import Config, load
from search_e1.data import user_files
from search_e1.data.prepare import Request, prepare
from search_e1.data.questions import load_questions
from search_e1.data.user_files import Columns
from search_e1.errors import SearchE1Error
from search_e1.types import Question

cases = settings(
    max_examples=int(os.environ.get("CASES", "150")), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


_directory = Path(tempfile.mkdtemp(prefix="search-e1-properties-"))
atexit.register(shutil.rmtree, _directory, ignore_errors=True)


def read(name: str, content: bytes, reader: Callable[[Path], Any]) -> Any:
    """What ``reader`` makes of a file; ``None`` if it is refused, by an error of ours in one line."""
    path = _directory / name
    path.write_bytes(content)
    try:
        return reader(path)
    except SearchE1Error as error:
        refused = str(error)
    assert len(refused.splitlines()) == 1, refused
    return None


# Question files

words = st.text(max_size=12) | st.sampled_from(
    [
        "Oslo",
        "nan",
        "NaN",
        "1969.0",
        "2.50",
        "true",
        "[sic]",
        "['x', 'y']",
        '["x"',
        "{'a': 1}",
        "",
        " ",
        "\ufeff",
        "!!!",
        "\x1c",
        '"',
    ]
)
leaves = words | st.integers() | st.floats() | st.booleans() | st.none()
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=2), max_leaves=6
)
names = st.sampled_from(["question", "answers", "answer", "golden_answers", "answer_aliases", "id", "hops", "metadata", "x"])
rows = st.dictionaries(names, values, max_size=6) | st.fixed_dictionaries(
    {"question": words, "answers": values},
    optional={"id": leaves, "hops": leaves, "answer_aliases": st.lists(leaves, max_size=3)},
)


def said(value: Any) -> set[str]:
    """Every way in which a value of a question file may be meant, as text."""
    if isinstance(value, list):
        return {text for item in value for text in said(item)}
    if isinstance(value, bool):
        return {"yes" if value else "no"}
    if isinstance(value, float) and math.isfinite(value):
        return {str(int(value)) if value == int(value) else repr(value)}
    if isinstance(value, str) and value.strip()[:1] in ("[", "(", "{", "a", "n"):  # perhaps a list
        return {value.strip(), *(piece for piece in ("x", "y", "1", "a"))}
    return {str(value).strip()} if isinstance(value, str | int) and str(value).strip() else set()


@cases
@given(st.lists(rows, min_size=1, max_size=3))
@example([{"question": "Who?", "answers": ["x", True, 2.0, 10**30]}])
@example([{"question": "Who?", "answers": {"a": [1]}}])
def test_json_lines_of_any_values(given_rows: list[dict[str, Any]]) -> None:
    content = "".join(json.dumps(row) + "\n" for row in given_rows).encode()
    loaded = read("mine.jsonl", content, lambda path: user_files.load(path, "mine", Columns()))
    for row, (_, question) in zip(given_rows, loaded.questions if loaded else (), strict=False):
        columns = [row[name] for name in ("golden_answers", "answers", "answer", "answer_aliases") if name in row]
        assert question.text == row["question"].strip()
        assert set(question.answers) == {text for value in columns for text in said(value)} or "[" in str(columns)
        assert question.id.startswith("mine_") or question.id in said(row["id"])
        assert question.hops is None or float(question.hops) == float(row.get("hops") or row["metadata"]["hops"])


@cases
@given(st.lists(st.tuples(st.text(max_size=10), st.text(max_size=10)), min_size=1, max_size=4), st.sampled_from([*",;|\t"]))
@example([("Who?", '"Weird Al" Yankovic')], "\t")
@example([("0", "\r0\t")], "\t")
@example([("Who\tis?", "Ann"), ("Where\n?", "Oslo")], "\t")
def test_a_table_that_csv_writes_comes_back(cells: list[tuple[str, str]], delimiter: str) -> None:
    table = io.StringIO()
    csv.writer(table, delimiter=delimiter).writerows([("question", "answers"), *cells])
    content = table.getvalue().encode("utf-8", "surrogatepass")
    loaded = read("mine.csv", content, lambda path: user_files.load(path, "mine", Columns()))
    kept = [(question, answer) for question, answer in cells if question or answer]
    for (question, answer), (_, found) in zip(kept, loaded.questions if loaded else (), strict=loaded is not None):
        assert found.text == question.strip()
        assert found.answers == (answer.strip(),) or answer.strip()[:1] in ("[", "(", "{") or answer.strip().endswith(".0")


@cases
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,\\ntrue1.0eu \n"questionaswer\t', max_size=60).map(str.encode))
@example(b'{"question": "Who?", "answers": ' + b"[" * 100_000)
@example(b"\xff\xfeq\x00")
def test_files_of_any_bytes(content: bytes) -> None:
    for name in ("a.jsonl", "a.csv", "a.tsv", "a.json.gz", "a.csv.gz", "a.parquet", "a.JSONL"):
        for found in read(name, content, lambda path: user_files.load(path, "mine", Columns()).questions) or ():
            assert isinstance(found[1], Question)


@cases
@given(st.lists(rows, min_size=1, max_size=3))
def test_what_is_prepared_is_what_a_run_reads(given_rows: list[dict[str, Any]]) -> None:
    def prepared(path: Path) -> tuple[list[Question], list[Question]]:
        from search_e1.data.prepare import write

        made = prepare(Request(train=(str(path),)))
        write(made, Request(), path.parent / "out", overwrite=True)
        return [row.question for row in made.parts[0].rows], load_questions(path.parent / "out" / made.parts[0].file)

    content = "".join(json.dumps(row) + "\n" for row in given_rows).encode()
    if both := read("mine.jsonl", content, prepared):
        before, after = both
        assert [(q.id, q.text, q.answers, q.hops) for q in before] == [(q.id, q.text, q.answers, q.hops) for q in after]


strict_rows = st.fixed_dictionaries(
    {"id": leaves, "question": leaves, "golden_answers": st.lists(leaves, max_size=3) | leaves},
    optional={"metadata": st.none() | st.dictionaries(st.sampled_from(["hops", "x"]), leaves, max_size=2), "x": values},
)


@cases
@given(strict_rows)
def test_a_run_s_question_file_is_taken_literally(row: dict[str, Any]) -> None:
    content = json.dumps(row).encode()
    for question in read("q.jsonl", content, load_questions) or ():
        assert (question.text, list(question.answers)) == (row["question"], row["golden_answers"])
        assert question.id == (str(row["id"]) if type(row["id"]) is int else row["id"])
        assert question.hops is None or question.hops == float((row["metadata"] or {})["hops"])


# Configs

MINIMAL = """
run = "runs/x"
[policy]
model = "small"
[data]
corpus = "corpus.jsonl"
train = ["train.jsonl"]
eval = { nq = "nq.jsonl" }
"""


FLAT = 'run = "x"\npolicy.model = "small"\ndata.corpus = "c.jsonl"\ndata.train = ["t.jsonl"]\ndata.eval.nq = "n.jsonl"\n'


def keys(section: Any = Config, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = [t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if hasattr(t, "model_fields")]
        yield f"{prefix}{name}"
        yield from keys(inner[0], f"{prefix}{name}.") if inner else ()


KEYS = sorted(keys())
words_of_flags = st.text(max_size=12) | st.text(string.digits + ".-+e_:[]{}\"'#\n xT", max_size=12)
flag_values = words_of_flags | st.sampled_from(
    [
        "true",
        "false",
        "1",
        "0",
        "-1",
        "1.0",
        "1e400",
        "nan",
        "inf",
        "2025-11-28",
        "[]",
        "[1]",
        "{}",
        "x = 1",
        '""',
        "'x'",
        "1 # 2",
    ]
)
flags = st.tuples(st.sampled_from(KEYS) | st.text("abc.", max_size=8), flag_values)


def at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def same(value: Any, text: str) -> bool:
    """Whether a setting is what a flag's text says: as text, or as TOML."""
    if str(value) in (text, str(Path(text))) or (value == () and text == "[]"):
        return True
    meant: Any = text
    with suppress(ValueError):
        meant = tomllib.loads(f"x = {text}")["x"]
    if isinstance(value, bool):
        return str(meant).lower() in (
            ("true", "1", "1.0", "yes", "on", "t", "y") if value else ("false", "0", "0.0", "no", "off", "f", "n")
        )
    if isinstance(value, int | float) and not isinstance(meant, bool):
        return float(value) == float(meant)
    if isinstance(value, tuple) and isinstance(meant, list) and all(isinstance(item, int | float) for item in (*value, *meant)):
        return [float(item) for item in value] == [float(item) for item in meant]
    if isinstance(value, tuple):
        return [str(item) for item in value] in (
            [str(Path(str(m))) for m in meant] if isinstance(meant, list) else [],
            [str(Path(text))],
            [str(m) for m in meant] if isinstance(meant, list) else [str(Path(str(meant)))],
        )
    return str(value) == str(meant) or (value is not None and str(value) == str(Path(str(meant))))


@cases
@given(flags)
@example(("run", "2025-11-28"))
@example(("grpo.steps", "true"))
@example(("run", ""))
@example(("prompts.date", "0"))
@example(("policy.model", "1\nrun = 2"))
@example(("grpo.steps", "[" * 5000))
def test_a_flag_is_what_it_says(flag: tuple[str, str]) -> None:
    key, text = flag
    config = read("c.toml", MINIMAL.encode(), lambda path: load(path, [f"--{key}={text}"]))
    if (
        config is not None
        and key in KEYS
        and not hasattr(at(config, key), "model_fields")
        and not isinstance(at(config, key), dict)
    ):
        assert same(at(config, key), text), (at(config, key), text)


toml_values = st.recursive(
    words.map(lambda text: json.dumps(text.encode("utf-8", "ignore").decode()))
    | st.integers().map(str)
    | st.floats().map(lambda number: repr(number))
    | st.sampled_from(["true", "false", "2025-11-28", "10:00:00", "[]", "{}"]),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
    max_leaves=4,
)


@cases
@given(st.lists(st.tuples(st.sampled_from(KEYS), toml_values), min_size=1, max_size=2))
@example([("rounds", '"2"')])
@example([("grpo.learning_rate", "inf")])
@example([("grpo.steps", "3.0"), ("data.max_eval", "7")])
def test_a_file_of_any_values(pairs: list[tuple[str, str]]) -> None:
    content = "".join(f"{key} = {value}\n" for key, value in pairs)
    for text in (FLAT + content, f"\ufeff{FLAT}{content}"):
        config = read("c.toml", text.encode("utf-8", "ignore"), load)
        for key, value in pairs if config else ():
            if not hasattr(at(config, key), "model_fields") and not isinstance(at(config, key), dict):
                assert same(at(config, key), value), (key, at(config, key), value)


@cases
@given(st.binary(max_size=80))
@example(b"a = " + b"[" * 100_000)
@example(b"a = " + b"1" * 5000)
def test_a_config_of_any_bytes(content: bytes) -> None:
    for text in (content, MINIMAL.encode() + content):
        config = read("c.toml", text, load)
        assert config is None or isinstance(config, Config)
