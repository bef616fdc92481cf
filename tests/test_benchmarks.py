import gzip
import hashlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import fake_hub
from search_e1 import runs
from search_e1.data import benchmarks, hub
from search_e1.data.prepare import unique_answers
from search_e1.data.questions import load_many, load_questions
from search_e1.errors import ConfigError, DataError

# Lines as they stand in the collection: each benchmark annotates in its own way.
COLLECTION = {
    "nq/train": [
        {"id": "train_0", "question": "who wrote faust", "golden_answers": ["Goethe"]},
        {"id": "train_1", "question": "Where is the Arda?", "golden_answers": ["Bel", "the bel", "Bel City"]},
    ],
    "nq/test": [{"id": "test_0", "question": "where is arda", "golden_answers": ["Bel"]}],
    "hotpotqa/train": [
        {
            "id": "train_0",
            "question": "Who leads the capital of Arda?",
            "golden_answers": ["Cor Dun"],
            "metadata": {
                "type": "bridge",
                "level": "hard",
                "supporting_facts": {"title": ["Arda", "Bel", "Bel"], "sent_id": [0, 0, 2]},
                "context": {"title": ["Arda"], "content": [["Arda is a land."]]},
            },
        }
    ],
    "2wikimultihopqa/dev": [
        {
            "id": "dev_0",
            "question": "Who is older, Cor or Gil?",
            "golden_answers": ["Gil"],
            "metadata": {
                "type": "bridge_comparison",
                "supporting_facts": {"title": ["Cor"], "sent_id": [0]},
                "evidences": {"fact": ["Cor"], "relation": ["born"], "entity": ["1900"]},
            },
        },
    ],
    "musique/dev": [
        {
            "id": "dev_0",
            "question": "Which land borders the land of Gil?",
            "golden_answers": ["Arda"],
            "metadata": {
                "answerable": True,
                "question_decomposition": [
                    {"id": 1, "question": "a", "answer": "b", "support_paragraph": {"idx": 1, "title": "Gil"}},
                    {"id": 2, "question": "c", "answer": "d", "support_paragraph": {"idx": 2, "title": "Eth"}},
                    {"id": 3, "question": "e", "answer": "f", "support_paragraph": None},
                ],
            },
        }
    ],
    "bamboogle/test": [{"id": "test_0", "question": "Who led Fen in 1900?", "golden_answers": ["Gil"]}],
}


def jsonl(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    for name, rows in COLLECTION.items():
        jsonl(tmp_path / "collection" / f"{name}.jsonl", *rows)
    return tmp_path / "collection"


def test_each_benchmark_s_annotation_becomes_the_product_s(collection: Path) -> None:
    def loaded(name: str, split: str) -> dict[str, Any]:
        ((where, question),) = benchmarks.load(name, split, collection).questions
        assert where == f"{collection}/{name}/{split}.jsonl:1"
        return {"id": question.id, "text": question.text, "hops": question.hops, **question.metadata}

    assert loaded("nq", "test") == {"id": "nq_test_0", "text": "where is arda?", "hops": 1, "source_id": "test_0"}
    assert loaded("hotpotqa", "train") == {
        "id": "hotpotqa_train_0",
        "text": "Who leads the capital of Arda?",
        "hops": 2,
        "type": "bridge",
        "level": "hard",
        "supporting_titles": ["Arda", "Bel"],
        "source_id": "train_0",
    }
    assert loaded("2wikimultihopqa", "dev") == {
        "id": "2wikimultihopqa_dev_0",
        "text": "Who is older, Cor or Gil?",
        "hops": 4,
        "type": "bridge_comparison",
        "supporting_titles": ["Cor"],
        "evidences": [["Cor", "born", "1900"]],
        "source_id": "dev_0",
    }
    assert loaded("musique", "dev") == {
        "id": "musique_dev_0",
        "text": "Which land borders the land of Gil?",
        "hops": 3,
        "supporting_titles": ["Gil", "Eth"],
        "answerable": True,
        "source_id": "dev_0",
    }


def test_the_test_sets_are_those_of_the_published_figures() -> None:
    assert benchmarks.TEST_SPLITS == {
        "nq": "test",
        "triviaqa": "test",
        "popqa": "test",
        "hotpotqa": "dev",
        "2wikimultihopqa": "dev",
        "musique": "dev",
        "bamboogle": "test",
    }
    assert sum(benchmarks.TEST_SIZES.values()) == 51_713
    assert sum(benchmarks.SIZES[name]["train"] for name in benchmarks.TRAINING_MIX) == 169_615


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("hotpot", "hotpotqa"), ("2wiki", "2wikimultihopqa"), ("bambogle", "bamboogle"), ("natural-questions", "nq")],
)
def test_an_unknown_benchmark_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown benchmark {name!r}; did you mean {nearest!r}?"):
        benchmarks.find(name)
    assert benchmarks.find(nearest.upper()) == nearest


def test_both_layouts_of_a_directory_hold_the_same(collection: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    packed = gzip.compress((collection / "musique/dev.jsonl").read_bytes())
    (flat / "musique.dev.jsonl.gz").write_bytes(packed)
    nested, from_flat = benchmarks.load("musique", "dev", collection), benchmarks.load("musique", "dev", flat)
    assert [q for _, q in nested.questions] == [q for _, q in from_flat.questions]
    assert from_flat.checksum == hashlib.sha256(packed).hexdigest()
    assert (nested.expected, from_flat.expected) == (2417, None)
    assert benchmarks.splits("musique", flat) == ("dev",)
    with pytest.raises(DataError, match=r"neither musique/test.jsonl nor musique.test.jsonl.* for musique it has dev"):
        benchmarks.load("musique", "test", flat)


def test_the_published_set_up_needs_no_flags(collection: Path, tmp_path: Path, prepare_verb) -> None:
    out = tmp_path / "out"
    status, said, err = prepare_verb("--out", out, "--from", collection)
    assert (status, err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == [
        "2wikimultihopqa.dev.jsonl",
        "bamboogle.test.jsonl",
        "hotpotqa.train.jsonl",
        "manifest.json",
        "manifest.json.sha256",
        "musique.dev.jsonl",
        "nq.test.jsonl",
        "nq.train.jsonl",
    ]
    config = tomllib.loads(said[said.index("[data]") :])["data"]
    assert [q.id for q in load_many(map(Path, config["train"]))] == ["nq_train_0", "nq_train_1", "hotpotqa_train_0"]
    assert list(config["eval"]) == ["nq", "2wikimultihopqa", "musique", "bamboogle"]
    assert load_questions(Path(config["eval"]["musique"]))[0].hops == 3
    assert "79168 were expected" in " ".join(said.split())
    assert "nq.train.jsonl and nq.test.jsonl: 1" in said
    assert "Where is the Arda?  (line 2 = line 1 of test.jsonl)" in said
    assert max(len(line) for line in said[: said.index("[data]")].splitlines()) <= 80
    found = runs.read(out).manifest
    assert found.inputs[f"{collection}/nq/test.jsonl"] == runs.sha256(collection / "nq/test.jsonl")
    assert found.result["files"]["nq.train.jsonl"] == {
        "role": "train",
        "source": f"{collection}/nq/train.jsonl",
        "read": 2,
        "questions": 2,
        "repeated": 0,
        "repeated_examples": [],
        "leaked": 1,
        "answers": 3,
    }


PREPARE = """
import contextlib, gc, io, json, sys
gc.disable()  # objects of imports stay
from search_e1.cli.main import main
told = []
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            status = main()
        except SystemExit as left:
            status = left.code
    told.append([status or 0, said.getvalue()])
print(json.dumps(told))
"""


def test_the_hub_is_read_by_datasets_itself(collection: Path, tmp_path: Path) -> None:
    names = ("nq", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
    splits = {name: sorted(path.stem for path in (collection / name).iterdir()) for name in names}
    card = {n: [{"split": s, "path": f"{n}/{s}.jsonl"} for s in there] for n, there in splits.items()}
    configs = json.dumps([{"config_name": name, "data_files": files} for name, files in card.items()])
    (collection / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    out = tmp_path / "out"
    sources = ["--train", "nq", "--train", "hotpotqa", *(w for name in names[2:] for w in ("--eval", name))]
    with fake_hub.serve(collection) as address:
        clean = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        environment = {**clean, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}

        def run(*commands: Sequence[str]) -> list[list[Any]]:
            """Exit status and stderr of each, in one process: what the Hub's libraries are told, they read when they load."""
            command = [sys.executable, "-c", PREPARE, json.dumps([["data", "prepare", *words] for words in commands])]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            return json.loads(done.stdout.splitlines()[-1])

        no = ("--out", str(tmp_path / "no"), "--eval")
        made, missing, no_revision = run(("--out", str(out), *sources), (*no, "triviaqa"), (*no, "nq", "--revision", "v9"))
        environment.update(HF_HUB_OFFLINE="1")
        offline = tmp_path / "offline"
        again, stale = run(("--out", str(offline), *sources), (*no, "nq", "--revision", "0" * 40))
    assert made == again == [0, ""]
    manifests = [runs.read(path).manifest for path in (out, offline)]
    assert manifests[0].inputs == manifests[1].inputs
    assert manifests[0].files == manifests[1].files
    for name, split in (("nq", "train"), ("hotpotqa", "train"), ("2wikimultihopqa", "dev"), ("musique", "dev")):
        local = [question for _, question in benchmarks.load(name, split, collection).questions]
        hub = load_questions(out / f"{name}.{split}.jsonl", name)
        assert [q.model_copy(update={"answers": unique_answers(q.answers)}) for q in local] == hub
    assert set(manifests[0].inputs.values()) == {fake_hub.COMMIT}
    for (status, said), why in (
        (missing, "triviaqa/test.jsonl is not in it"),
        (no_revision, "has no revision 'v9'"),
        (stale, f"revision {'0' * 40} is not available, only {fake_hub.COMMIT} in the cache"),
    ):
        assert status == 2
        assert why in said
        assert len(said.splitlines()) == 1


def test_a_dead_hub_names_the_file_that_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare_verb) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    status, _, err = prepare_verb("--out", tmp_path / "out", "--eval", "nq")
    assert status == 2
    assert err.startswith("search-e1: RUC-NLPIR/FlashRAG_datasets: the Hub cannot be reached (")
    assert err.endswith("; give --from DIR with nq/test.jsonl or nq.test.jsonl in it instead\n")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_log_level_of_datasets_is_turned_down_only_while_it_loads() -> None:
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_info()
    try:
        with hub.quiet():
            assert datasets.logging.get_verbosity() == datasets.logging.ERROR
        assert datasets.logging.get_verbosity() == datasets.logging.INFO
    finally:
        datasets.logging.set_verbosity(before)
