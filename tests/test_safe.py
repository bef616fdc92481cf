"""What others wrote steers no terminal and leads to no file outside, and secrets are not stored."""

import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from search_e1 import runs
from search_e1.cli import display
from search_e1.cli.display.comparison import show_comparison
from search_e1.errors import DataError, ModelError, RetrievalError, RunError
from search_e1.evaluation import results
from search_e1.evaluation.compare import compare, load
from search_e1.evaluation.exports import to_latex, to_markdown
from search_e1.retrieval import directory as directories
from search_e1.retrieval.client import HttpRetriever
from search_e1.retrieval.convention import Overrides, read_convention
from search_e1.retrieval.directory import IndexManifest
from search_e1.runs.safe import inside, is_name, masked, masked_url, plain, printable
from search_e1.types import ActionKind, Passage, Turn
from serving import good, misbehaving
from test_cli import project, run  # noqa: F401
from test_compare import made

EVIL = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202eright\u2066 \u200b\x00\r[red]x[/red][/]:smile:\U000e0041"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f\ud800-\udfff]")


def test_printable_text_by_hand() -> None:
    kept = "a\tb\nc \u05d0\u200f \u2764\ufe0f\u200d\U0001f525"  # a mark of Hebrew text, a joined emoji
    assert printable(kept) == kept
    assert printable("\x1b[31m\u202eab\u200b\ud800") == "\ufffd[31m\ufffdab\ufffd\ufffd"
    assert plain("http://me:pw@host:1/x\nand \x1b") == "http://***@host:1/x\nand \ufffd"


@given(st.text(st.characters()))
def test_nothing_printable_steers_and_an_error_is_plain(text: str) -> None:
    assert not STEERS.search(printable(text))
    assert len(printable(text)) == len(text)
    assert not STEERS.search(plain(text))


def printed(show) -> str:
    """What ``show`` prints into a terminal without colors."""
    stream = io.StringIO()
    show(Console(file=stream, force_terminal=True, color_system=None, width=80, markup=False, emoji=False))
    return stream.getvalue()


def _evaluation():
    row = {
        "benchmark": EVIL, "id": EVIL, "hops": 1, "question": EVIL, "answers": (EVIL,), "answer": EVIL, "em": 0.0, "f1": 0.0,
        "cover_em": 0.0, "searches": 1, "tokens": 9, "stop_reason": "answered", "em_of_samples": (), "yes_no": False,
        "read": False, "in_topk": None, "in_corpus": None, "failure": "not_retrieved",
    }  # fmt: skip
    return results.evaluation([results.Result.model_validate(row)] * 3, seed=0)


SHOWN = {
    "passages": lambda c: display.show_passages(c, [Passage.model_construct(id=EVIL, title=f"{EVIL}\ud800", text=EVIL)]),
    "search": lambda c: display.show_turn(
        c,
        Turn.model_construct(
            action_text=EVIL, kind=ActionKind.SEARCH, argument=EVIL, observation_text=f"Doc 1(Title: {EVIL}) x"
        ),
    ),
    "index": lambda c: c.print(
        display.index_table(
            IndexManifest(
                kind=EVIL, format=1, passages=1, corpus=EVIL, settings={EVIL: {EVIL: EVIL}}, checksum=EVIL, files={EVIL: 1},
                versions={EVIL: EVIL}, seconds=1.0,
            )
        )
    ),
    "evaluation": lambda c: display.show_evaluation(c, _evaluation()),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_shown_steers_no_terminal_and_is_no_markup(name: str) -> None:
    out = printed(SHOWN[name])
    assert not STEERS.search(out)
    assert "[red]x[/red]" in re.sub(r"\s+", "", out)
    assert ":smile:" in re.sub(r"\s+", "", out)


def test_progress_of_a_stage_with_any_name(capsys) -> None:
    console = Console(force_terminal=True, color_system=None, width=100)
    with display.watch(console, 1)("evaluation[/x]") as progress:
        progress(1, 1, "[/y]")
    assert "evaluation[/x]" in capsys.readouterr().out


def forge(path: Path, files: dict[str, str]) -> None:
    """Write another manifest of the artifact, with all that makes it look sound."""
    manifest = runs.Manifest.model_validate_json((path / runs.MANIFEST).read_bytes())
    runs.write_summed(path / runs.MANIFEST, manifest.model_copy(update={"files": files}).model_dump_json())


@pytest.fixture
def comparison(tmp_path: Path):
    places = [made(tmp_path / name, right) for name, right in (("a", "00000000"), ("b", "11111111"))]
    for place in places:
        rows = list(results.read(place / results.QUESTIONS))
        said = f"<script>x</script> [a](javascript:1) | {EVIL}"
        changed = [row.model_copy(update={"question": said, "benchmark": f"nq {EVIL}", "answers": (said,)}) for row in rows]
        results.write(changed, place / results.QUESTIONS)
        forge(place, {results.QUESTIONS: runs.sha256(place / results.QUESTIONS)})
    return compare([load(place, f"{place.name}[/]") for place in places])


def test_a_comparison_steers_nothing(comparison) -> None:
    assert not STEERS.search(printed(lambda c: show_comparison(c, comparison, questions=True)))
    markdown = to_markdown(comparison, True)
    assert not STEERS.search(markdown)
    assert r"\<script>x\</script> [a\](javascript:1) \|" in markdown
    assert not STEERS.search(to_latex(comparison, False))


def test_an_error_steers_nothing_and_tells_no_password(project, monkeypatch, capsys) -> None:  # noqa: F811
    status, _, err = run(
        monkeypatch, capsys, "train", "--config", project / "config.toml", "--data.train", f'["{project}/no\x1b[2J"]'
    )
    assert (status, len(err.splitlines())) == (2, 1)
    assert not STEERS.search(err.rstrip("\n"))
    words = ("--retrieval.url", "http://me:secret@127.0.0.1:9", "--retrieval.index", "i")
    status, _, err = run(monkeypatch, capsys, "train", "--config", project / "config.toml", *words)
    assert status == 2
    assert "secret" not in err


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ({"url": "http://me:pw@host:80/x?y=a@b"}, {"url": "http://***@host:80/x?y=a@b"}),
        ({"a": [{"hub_token": "hf_1", "api_key": "k", "WANDB_API_KEY": "w", "password": "p"}]}, None),
        ({"max_tokens": 5, "pad_token": "<pad>", "eos_token": "</s>", "tokens": "sampled", "token": ""}, ...),
        ({"model": "a@b/c", "mail": "me@host", "url": "http://host/a@b"}, ...),
        ("a http://x@h and https://u:p%40@g/", "a http://***@h and https://***@g/"),
        ("at http://h/x?api_key=K&topk=3&sig=S down", "at http://h/x?api_key=***&topk=3&sig=*** down"),
        ({"url": "me:pw@host:8000"}, {"url": "***@host:8000"}),  # refused, and stored before that
        ({"url": "http://me:p/w@host"}, {"url": "***@host"}),
        ({"url": "host:8000?token=T"}, {"url": "host:8000?token=***"}),
    ],
)
def test_what_is_masked(value, kept) -> None:
    if kept is None:
        assert masked(value) == {"a": [dict.fromkeys(("hub_token", "api_key", "WANDB_API_KEY", "password"), "***")]}
    else:
        assert masked(value) == (value if kept is ... else kept)


def test_a_key_in_a_path_is_masked_and_two_paths_stay_apart() -> None:
    first, second = masked("http://h/sk-4f9a8b7c6d5e/retrieve"), masked("http://h/sk-00aa8b7c6d5e/retrieve")
    assert re.fullmatch(r"http://h/\*\*\*[0-9a-f]{6}/retrieve", first)
    assert first != second
    assert masked(first) == first
    plain_path = "http://127.0.0.1:8000/indexes/wiki-18-e5-base-v2/Qwen2.5-72B-Instruct/retrieve"
    assert masked(plain_path) == plain_path


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_is_masked_stays_masked(text: str) -> None:
    assert masked(masked(text)) == masked(text)
    assert masked_url(masked_url(text)) == masked_url(text)


@pytest.mark.parametrize("place", ["password", "query"])
def test_no_secret_comes_into_a_run(project, monkeypatch, capsys, place: str) -> None:  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    with misbehaving(lambda request, number: good(request, number)) as server:
        words = [
            "--retrieval.url",
            f"{server.url}/retrieve?token=SECRET" if place == "query" else server.url.replace("http://", "http://me:SECRET@"),
            "--retrieval.cache", "false",
            "--pool.questions", "1", "--pool.group_size", "2", "--grpo.steps", "0",
            "--rollout.max_tokens", "400", "--rollout.max_action_tokens", "20",
        ]  # fmt: skip
        config = project / "config.toml"
        assert run(monkeypatch, capsys, "rollout", "--config", config, *words)[0] == 0
        told = run(monkeypatch, capsys, "report", project / "run")
        assert told[0] == 0
        # Another password is no other config.
        words[1] = words[1].replace("SECRET", "OTHER")
        assert run(monkeypatch, capsys, "rollout", "--config", config, *words)[0] == 0
    assert server.requests
    written = [file for file in (project / "run").rglob("*") if file.is_file()]
    assert len(written) >= 4
    assert [file for file in written if b"SECRET" in file.read_bytes()] == []
    assert ("?token=***" if place == "query" else "***@127.0.0.1") in (project / "run" / "config.json").read_text()


def test_a_server_that_is_down_is_named_without_its_password() -> None:
    with HttpRetriever("http://me:secret@127.0.0.1:9", attempts=1) as client, pytest.raises(RetrievalError) as caught:
        client.search(["a"], 1)
    assert str(caught.value).startswith("http://***@127.0.0.1:9/retrieve: no passages after 1 attempt")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a\0b"])
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name) is None


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_is_inside_is_inside(name: str) -> None:
    directory = Path("/data/run")
    file = inside(directory, name)
    assert file is None or (file.is_relative_to(directory) and ".." not in file.parts and file != directory)
    if is_name(name):
        assert inside(directory, name) == directory / name
        assert "/" not in name


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    path = runs.artifact(tmp_path / "a", stage="s", settings={}, inputs={}, seed=0, make=lambda out: {}).path
    for name in ("../../etc/passwd", "/dev/zero"):
        forge(path, {name: "0"})
        with pytest.raises(RunError, match=re.escape(f"names the file {name!r}, which is not in {path}")):
            runs.read(path)


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    manifest = {
        "kind": "bm25", "format": directories.FORMAT, "passages": 1, "corpus": "", "settings": {}, "checksum": "",
        "files": {"../x": 0}, "versions": {}, "seconds": 0.0,
    }  # fmt: skip
    (tmp_path / directories.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"names the file '../x', which is not in it"):
        directories.read(tmp_path)


def test_an_encoder_that_names_modules_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "../../secret"}]))
    with pytest.raises(ModelError, match=r"names the module '../../secret', which is not in it"):
        read_convention(tmp_path, "e5", 64, Overrides(query_prefix="", passage_prefix=""))


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", ".hidden", "", "x" * 300, "a\nb"])
def test_an_evaluation_of_an_impossible_name_is_refused(project, monkeypatch, capsys, name: str) -> None:  # noqa: F811
    status, _, err = run(monkeypatch, capsys, "evaluate", "--config", project / "config.toml", "--name", name)
    assert status == 2
    assert "cannot be the name of a directory" in err
    assert not list(project.glob("*up*"))


def test_a_benchmark_may_have_any_name(project, monkeypatch, capsys) -> None:  # noqa: F811
    name = "../[/nq]\x1b"
    (project / "other.jsonl").write_text((project / "dev.jsonl").read_text())
    config = (project / "config.toml").read_text().replace("dev =", f'{json.dumps(name)} = "{project}/other.jsonl", dev =')
    (project / "config.toml").write_text(config)
    status, out, _ = run(
        monkeypatch, capsys, "evaluate", "--config", project / "config.toml", "--benchmark", name, "--evaluation.samples", "0",
        "--evaluation.latency", "0", "--rollout.max_tokens", "400", "--rollout.max_action_tokens", "20",
    )  # fmt: skip
    assert status == 0
    assert "../[/nq]\ufffd" in out
    assert [path.name for path in (project / "run").glob("evaluation-*")] == ["evaluation-base-..-nq-"]
