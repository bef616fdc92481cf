"""The agent by MCP, asked by the SDK's own client over both transports."""

import asyncio
import json
import shlex
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("mcp")

from mcp import Client, StdioServerParameters

from agent_serving import Gated, make_bundle, scripted
from forking import Verb
from search_e1.agent import mcp as agent_mcp
from search_e1.agent.agent import Agent
from search_e1.agent.settings import ServeSettings
from serving import serving_app
from test_cli import run

COMMAND = ["-c", "from search_e1.cli.main import main; main()", "mcp"]


def called(place: Any, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    """Results of calls of tools, one after another."""

    async def call() -> list[Any]:
        async with Client(place) as client:
            assert [tool.name for tool in (await client.list_tools()).tools] == ["ask", "search"]
            return [await client.call_tool(name, arguments) for name, arguments in calls]

    return asyncio.run(asyncio.wait_for(call(), 120))


def test_it_answers_over_http_in_words_and_in_fields() -> None:
    settings = ServeSettings(max_question_chars=100)
    with scripted() as agent, serving_app(agent_mcp.make_app(agent, settings), settings) as url:
        asked, guessed, found, failed, long, empty = called(
            f"{url}/mcp", ("ask", {"question": "Who is mayor?"}), ("ask", {"question": "Guess?"}),
            ("search", {"query": "mayor", "topk": 1}), ("ask", {"question": "Break?"}), ("ask", {"question": "x" * 101}),
            ("search", {"query": " "}),
        )  # fmt: skip
    assert asked.structured_content["answer"] == "Cor Dun"
    assert (asked.structured_content["found"], asked.structured_content["searches"]) == (True, ["mayor of Bel"])
    assert [(s["id"], s["holds"]) for s in asked.structured_content["sources"]] == [("p2", True), ("p1", False)]
    assert asked.content[0].text == "Cor Dun\n\n[1] Bel (id p2)\nBel is a city with mayor Cor Dun."
    assert guessed.structured_content == {"answer": "Gil Hor", "found": False, "searches": [], "sources": []}
    assert guessed.content[0].text == "not found in these documents (a guess, in none of the passages read: Gil Hor)"
    [passage] = found.structured_content["passages"]
    assert passage == {"id": "p2", "title": "Bel", "text": "Bel is a city with mayor Cor Dun.", "origin": {}}
    assert failed.is_error
    assert "http://x: no passages after 4 attempts" in failed.content[0].text
    assert long.is_error
    assert empty.is_error


def test_a_call_that_is_given_up_leaves_the_agent() -> None:
    gate = Gated()
    settings = ServeSettings()

    async def give_up(url: str, agent: Agent) -> None:
        async with Client(f"{url}/mcp") as client:
            asking = asyncio.create_task(client.call_tool("ask", {"question": "Wait?"}))
            assert await asyncio.to_thread(gate.asked.wait, 30)
            asking.cancel()
            while agent._scheduler._jobs:
                await asyncio.sleep(0.01)

    with scripted(gate) as agent, serving_app(agent_mcp.make_app(agent, settings), settings) as url:
        asyncio.run(asyncio.wait_for(give_up(url, agent), 60))
        gate.opened.set()


def test_the_key_and_other_web_pages_over_http() -> None:
    settings, body = ServeSettings(), {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    with scripted() as agent, serving_app(agent_mcp.make_app(agent, settings, key="a-key"), settings) as url:
        assert httpx.post(f"{url}/mcp", json=body).status_code == 401
        wrong = httpx.post(f"{url}/mcp", json=body, headers={"Authorization": "Bearer b-key"})
        assert (wrong.status_code, wrong.json()["error"]["message"]) == (401, "a wrong key")
        assert httpx.post(f"{url}/mcp", json=body, headers={"Authorization": "Bearer a-key"}).status_code != 401
    with scripted() as agent, serving_app(agent_mcp.make_app(agent, settings), settings) as url:
        assert httpx.post(f"{url}/mcp", json=body, headers={"Host": "evil.example"}).status_code == 421
        assert httpx.post(f"{url}/mcp", json=body, headers={"Origin": "http://evil.example"}).status_code == 403


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("mcp") / "agent")


def test_over_standard_output_comes_nothing_but_the_protocol(bundle: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    command = f"{shlex.join([sys.executable, *COMMAND, str(bundle)])} | tee {shlex.quote(str(said))}"
    place = StdioServerParameters(command="sh", args=["-c", command])
    asked, found = called(place, ("ask", {"question": "Who?"}), ("search", {"query": "mayor", "topk": 1}))
    assert asked.structured_content["found"] is False  # its weights are random
    assert [p["id"] for p in found.structured_content["passages"]] == ["p2"]
    told = [json.loads(line) for line in said.read_text().splitlines()]
    assert {line["jsonrpc"] for line in told} == {"2.0"}
    assert told[-1]["result"]["structuredContent"] == found.structured_content


def test_a_line_that_is_no_json_is_no_end_and_the_end_of_input_is_one(bundle: Path) -> None:
    running = Verb("mcp", bundle)
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "x", "version": "0"}}
    running.stdin.write(f"no json\n{json.dumps({'jsonrpc': '2.0', 'id': 1, 'method': 'initialize', 'params': hello})}\n")
    status, said, errors = running.communicate()
    assert status == 0, errors
    assert 1 in [json.loads(line).get("id") for line in said.splitlines()]
    assert "Traceback" not in errors


def test_without_the_extra_or_with_a_port_in_use_it_is_one_line(monkeypatch, capsys, bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = run(monkeypatch, capsys, "mcp", bundle / "none", "--http", "--port", port)
    assert (status, out) == (2, "")
    assert err.startswith(f"search-e1: 127.0.0.1:{port}: cannot listen there")
    monkeypatch.delitem(sys.modules, "search_e1.agent.mcp", raising=False)
    monkeypatch.delattr("search_e1.agent.mcp", raising=False)
    monkeypatch.setitem(sys.modules, "mcp", None)
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    status, _, err = run(monkeypatch, capsys, "mcp", bundle)
    assert (status, err.split(";")[1]) == (2, " install it with `pip install 'search-e1[mcp]'`\n")
