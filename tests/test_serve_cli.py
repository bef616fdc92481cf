"""``search-e1 serve-retriever`` from outside."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from conftest import PASSAGES
from test_cli import run

pytest.importorskip("fastapi")

from search_e1.retrieval.bm25 import Bm25Index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "index"
    Bm25Index.build(PASSAGES, directory)
    return directory


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop(index: Path, stop: signal.Signals) -> None:
    command = [
        sys.executable,
        "-c",
        "from search_e1.cli.main import main; main()",
        "serve-retriever",
        "--index",
        str(index),
    ]
    running = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout
    line = running.stdout.readline()
    assert line.startswith(f"5 passages of {index} at http://127.0.0.1:")
    url = line.partition(" at ")[2].partition(";")[0]
    answer = httpx.post(url, json={"queries": ["mayor Cor", "zebra"], "topk": 1}).json()
    contents = '"Bel"\nBel is a city with mayor Cor Dun.'
    assert answer == {"result": [[{"id": "p2", "contents": contents}], []]}
    running.send_signal(stop)
    said, errors = running.communicate(timeout=30)
    assert (running.returncode, said, errors) == (0, "stopped\n", "")


def test_a_port_in_use_is_one_line(monkeypatch, capsys, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        # Found before the index, which is not there.
        status, out, err = run(monkeypatch, capsys, "serve-retriever", "--index", tmp_path / "none", "--port", port)
    assert (status, out) == (2, "")
    assert err == (
        f"search-e1: 127.0.0.1:{port}: cannot listen there (Address already in use); give another --port or --host\n"
    )


def test_no_index_is_one_line(monkeypatch, capsys, tmp_path: Path) -> None:
    status, out, err = run(monkeypatch, capsys, "serve-retriever", "--index", tmp_path / "none", "--port", 0)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"search-e1: {tmp_path / 'none'}: ")


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys, index: Path) -> None:
    monkeypatch.delitem(sys.modules, "search_e1.retrieval.server", raising=False)
    monkeypatch.delattr("search_e1.retrieval.server", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    status, _, err = run(monkeypatch, capsys, "serve-retriever", "--index", index)
    assert (status, err) == (2, "search-e1: this needs fastapi; install it with `pip install 'search-e1[serve]'`\n")
