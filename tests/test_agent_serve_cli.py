"""``search-e1 serve`` from outside: what it says when it starts, stops, or cannot start."""

import json
import signal
import socket
import sys
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi")

from agent_serving import make_bundle
from conftest import PASSAGES
from forking import Verb
from search_e1.retrieval.bm25 import Bm25Index
from test_cli import run

LONG = {"model": "tiny", "messages": [{"role": "user", "content": "Who is the mayor of Bel?"}], "temperature": 1, "seed": 1}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("served") / "agent")


def answered_until(stop: signal.Signals, running: Verb) -> None:
    """The rest of an answer comes after ``running``, a served agent, is told to ``stop``."""
    line = running.stdout.readline()
    assert line.startswith("tiny answers at http://127.0.0.1:")
    assert line.endswith("/ (key required); Ctrl-C stops it\n")
    url = line.split()[3].removesuffix("/v1,")
    assert httpx.get(f"{url}/v1/models").status_code == 401
    with httpx.stream(
        "POST",
        f"{url}/v1/chat/completions",
        json=LONG | {"stream": True},
        headers={"Authorization": "Bearer a-key"},
        timeout=60,
    ) as response:
        events = response.iter_lines()
        assert next(events).startswith("data: {")
        running.send_signal(stop)
        told = [line for line in events if line]
    assert told[-1] == "data: [DONE]"
    assert json.loads(told[-2][6:])["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_until_it_is_told_to_stop_and_finishes_what_it_has_begun(bundle: Path, stop: signal.Signals) -> None:
    running = Verb("serve", bundle, "--port", 0, SEARCH_E1_SERVE_KEY="a-key")
    answered_until(stop, running)
    assert running.communicate() == (0, "stopped\n", "")


def test_a_port_in_use_is_found_before_anything_is_loaded(monkeypatch, capsys, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = run(monkeypatch, capsys, "serve", tmp_path / "none", "--port", port)
    assert (status, out) == (2, "")
    assert err == (
        f"search-e1: 127.0.0.1:{port}: cannot listen there (Address already in use); give another --port or --host\n"
    )


def test_bundles_that_cannot_be_served(monkeypatch, capsys, tmp_path: Path) -> None:
    whole = make_bundle(tmp_path / "whole")
    bare = make_bundle(tmp_path / "bare", index=(), checksum=Bm25Index.open(whole / "index").checksum)
    Bm25Index.build(PASSAGES[:2], tmp_path / "other")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "agent").symlink_to(whole)
    for words, says in (
        ([tmp_path / "none"], f"{tmp_path / 'none'}: no such directory; give a bundle's"),
        ([tmp_path / "run"], f"{tmp_path / 'run'}: not a bundle (no agent.json); this run's is {tmp_path / 'run' / 'agent'}"),
        ([bare], f"{bare}: the bundle has no passages; give --index DIR or --url URL"),
        (
            [bare, "--index", tmp_path / "other"],
            f"{tmp_path / 'other'}: an index of other passages or settings than the bundle's",
        ),
        ([whole, "--index", whole / "index", "--url", "http://127.0.0.1:1"], f"{whole}: an index and a URL; give one of them"),
        ([whole, "--key", "ä"], "--key: not usable in a header"),
        ([whole, "--key", ""], "--key: not usable in a header"),
        ([whole, "--memory-mib", "1"], "memory of 1 MiB has no room for a request of 4 MiB"),
    ):
        status, out, err = run(monkeypatch, capsys, "serve", *words, "--port", 0)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"search-e1: {says}")


def test_an_open_address_without_a_key_is_warned_of(monkeypatch, capsys, tmp_path: Path) -> None:
    status, _, err = run(monkeypatch, capsys, "serve", tmp_path / "none", "--port", 0, "--host", "0.0.0.0")
    assert (status, err.count("\n")) == (2, 2)
    assert err.startswith("0.0.0.0: anyone who can reach this address can ask and read the passages; give --key")


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "search_e1.agent.server", raising=False)
    monkeypatch.delattr("search_e1.agent.server", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    status, _, err = run(monkeypatch, capsys, "serve", tmp_path)
    assert (status, err) == (2, "search-e1: this needs fastapi; install it with `pip install 'search-e1[serve]'`\n")
