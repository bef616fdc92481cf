"""The vLLM engine, GRPO beside it and a vLLM server, over a faithful double; the real one is in ``test_vllm_engine.py``."""

import copy
import json
import math
import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tenacity import wait_none

import fake_vllm
from conftest import PASSAGES, TinyRetriever
from fake_vllm import LLM
from scripted import STOP_STRINGS, generate
from search_e1.config import PolicyConfig, VllmConfig
from search_e1.errors import ConfigError, EndpointError, ModelError, RetrievalError, SearchE1Error
from search_e1.rollout.engines import vllm
from search_e1.rollout.engines.base import Engine, Request
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.rollout.engines.vllm import VllmLaunch
from search_e1.rollout.engines.vllm_server import VllmServerEngine
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import starts
from search_e1.runs.context import StageContext
from search_e1.stages.grpo import Grpo
from search_e1.training.policy import Policy
from search_e1.types import Trajectory
from serving import misbehaving
from taught import LIMITS, QUESTIONS, teach
from trained import config_of


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Path]:
    policy, directory = teach(), tmp_path_factory.mktemp("vllm") / "policy"
    policy.save(directory)
    return policy, directory


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)


def engine(directory: Path, config: VllmConfig | None = None, **changes: Any) -> VllmLaunch:
    policy = PolicyConfig(model=str(directory), **{"device": "cpu", "dtype": "float32", **changes})
    return VllmLaunch(directory, policy, config or VllmConfig(), rows=4, max_tokens=500)


def play(policy: Policy, generator: Engine, temperature: float = 1.0, retriever: Any = None) -> list[Trajectory]:
    begun = starts(policy.tokenizer, policy.prompts, QUESTIONS, group_size=3)
    return rollout(
        generator,
        retriever or TinyRetriever(PASSAGES),
        begun,
        LIMITS,
        temperature=temperature,
        seed=5,
        prompts=policy.prompts,
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rollout_is_that_of_the_engine_id_by_id(taught, temperature: float) -> None:
    policy, directory = taught
    expected = play(policy, TorchEngine(policy.model, policy.tokenizer), temperature)
    with engine(directory).running(policy.tokenizer) as generator:
        done = play(policy, generator, temperature)
        [running] = LLM.running
        assert not running.rows
    assert LLM.running == []
    assert [t.response_ids for t in done] == [t.response_ids for t in expected]
    assert any(t.searches for t in done)
    for ours, theirs in zip(done, expected, strict=True):
        for turn, other in zip(ours.turns, theirs.turns, strict=True):
            assert turn.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-5)
    params = running.asked[0]
    assert (params.temperature, params.stop, params.logprobs) == (temperature, list(STOP_STRINGS), 0)
    assert (params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (1.0, 0, 0.0, 1.0)


def test_the_engine_is_started_with_what_the_config_says(taught) -> None:
    _, directory = taught
    settings = VllmConfig(gpu_memory_utilization=0.5, tensor_parallel_size=2, engine={"kv_cache_dtype": "fp8"})
    vllm.stop(engine(directory, settings, dtype="bfloat16").start())
    [arguments] = LLM.started
    assert arguments == {
        "model": str(directory), "dtype": "bfloat16", "trust_remote_code": False, "max_model_len": 500, "max_num_seqs": 4,
        "gpu_memory_utilization": 0.5, "tensor_parallel_size": 2, "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs", "use_tqdm_on_load": False, "enable_prefix_caching": True,
        "kv_cache_dtype": "fp8",
    }  # fmt: skip


def test_what_was_under_way_is_given_up_when_a_rollout_fails(taught) -> None:
    policy, directory = taught

    class Broken:
        def search(self, queries, topk):
            raise RetrievalError("http://x: no passages after 4 attempts")

    with engine(directory).running(policy.tokenizer) as generator:
        with pytest.raises(RetrievalError):
            play(policy, generator, retriever=Broken())
        [running] = LLM.running
        assert not running.rows
        with generator.session(temperature=1.0, stop=(), max_tokens=99) as session:
            session.submit(Request(0, [1, 2], 5, 0))
        assert len(running.aborted) >= 1
        assert not running.rows


def test_a_row_that_the_engine_gives_up_is_no_generation(taught) -> None:
    policy, directory = taught
    with engine(directory).running(policy.tokenizer) as generator:
        LLM.running[0].finish_reason = "abort"
        with pytest.raises(ModelError, match=r"vLLM aborted a row \(abort\)"):
            play(policy, generator)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_of_logits_that_are_not_finite_is_no_generation(taught, monkeypatch, bad: float) -> None:
    policy, directory = taught
    with engine(directory).running(policy.tokenizer) as generator:
        [running] = LLM.running
        honest = running.step

        def step() -> list[Any]:
            for row in running.rows.values():
                row.generation = replace(row.generation, logprobs=(bad,) * len(row.generation.ids))
            return honest()

        monkeypatch.setattr(running, "step", step)
        with pytest.raises(ModelError, match=r"vLLM: logits that are not finite while sampling; set policy\.dtype"):
            play(policy, generator)


def missing(_: str) -> str:
    raise PackageNotFoundError("vllm")


@pytest.mark.parametrize(
    ("installed", "settings", "device", "message"),
    [
        (None, {}, "cpu", r'vLLM is not installed; run `pip install "search-e1\[vllm\]"`'),
        ("0.29.1", {}, "cpu", r"vLLM 0\.29\.1 is installed, but 0\.30\.\* is needed"),
        ("0.30.2", {}, "cuda", "this vLLM runs on cuda, and policy.device is cpu"),
        ("0.30.2", {"dtype": "half"}, "cpu", r"vllm\.engine\.dtype: set `policy\.dtype`"),
        (
            "0.30.2",
            {"enforce_eagre": True},
            "cpu",
            "unknown key vllm.engine.enforce_eagre; did you mean 'enforce_eager'",
        ),
    ],
)
def test_what_cannot_be_had_is_one_line(
    taught, monkeypatch: pytest.MonkeyPatch, installed: str | None, settings: dict, device: str, message: str
) -> None:
    fake_vllm.install(monkeypatch, version=installed or "", device=device)
    if installed is None:
        monkeypatch.setattr(vllm, "version", missing)
    with pytest.raises(SearchE1Error, match=message) as caught:
        engine(taught[1], VllmConfig(engine=settings)).start()
    assert "\n" not in str(caught.value)


def test_why_an_engine_does_not_start_is_one_line(taught, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "failure", ValueError("No available memory for the cache blocks.\nTry increasing"))
    with pytest.raises(ModelError, match=r"vLLM does not start with it: No available memory for the cache blocks\.$"):
        engine(taught[1]).start()
    with pytest.raises(ValidationError) as caught:
        VllmConfig(gpu_memory_utilization=2)
    monkeypatch.setattr(LLM, "failure", caught.value)  # pydantic's own text has several lines
    with pytest.raises(ModelError, match=r"with it: gpu_memory_utilization: Input should be less than or equal to 1$"):
        engine(taught[1]).start()


# GRPO beside it.


def train(policy: Policy, path: Path, out: Path, steps: int, **sections: Any) -> list[dict[str, float]]:
    """GRPO of ``policy``, which is changed; ``path`` is where it starts from."""
    out.mkdir()
    settings = {"steps": steps, "questions_per_step": 2, "group_size": 4, "learning_rate": 3e-3} | sections.pop("grpo", {})
    config = config_of(out, grpo=settings, policy={"model": str(path), "device": "cpu", "dtype": "float32"}, **sections)
    run = SimpleNamespace(
        config=config, train_questions=QUESTIONS, retriever=TinyRetriever(PASSAGES), load_to_train=lambda *_, **__: policy
    )
    Grpo(path, 1).work(run, StageContext(out, seed=3))  # type: ignore[arg-type]
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_grpo_samples_from_the_engine_and_hands_it_every_step_of_the_policy(taught, tmp_path, lora) -> None:
    policies, steps = {}, {}
    for name in ("torch", "vllm"):
        policies[name] = copy.deepcopy(taught[0])
        limits = {**LIMITS.model_dump(), "engine": name, "batch_size": 4}
        steps[name] = train(policies[name], taught[1], tmp_path / name, 3, grpo={"lora": lora}, rollout=limits)
    assert LLM.running == []
    # Same seeds and, by the hand-over at each step, same weights: the same trajectories, to which the ratio of 1 adds nothing.
    for figure in ("reward", "sampled_tokens"):
        assert [step[figure] for step in steps["vllm"]] == [step[figure] for step in steps["torch"]]
    gaps = [step["sampling_gap"] for step in steps["vllm"] if step["mixed"]]
    assert gaps
    assert max(gaps) < 1e-4
    trained, own = (policies[name].model.state_dict() for name in ("vllm", "torch"))
    for name, weight in trained.items():
        torch.testing.assert_close(weight, own[name], atol=1e-4, rtol=1e-3)
    assert any(not torch.equal(weight, taught[0].model.state_dict()[name]) for name, weight in trained.items())


def test_an_engine_that_does_not_start_stops_grpo_before_a_step(taught, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(LLM, "failure", RuntimeError("no memory"))
    with pytest.raises(ModelError, match="no memory"):
        train(copy.deepcopy(taught[0]), taught[1], tmp_path / "out", 1, rollout={"engine": "vllm"})


# A server.


class Served:
    """What `vllm serve` answers, from a transformers model."""

    def __init__(self, policy: Policy, root: str) -> None:
        self.generator = TorchEngine(policy.model, policy.tokenizer)
        self.root = root
        self.asked: list[dict[str, Any]] = []

    def __call__(self, request: dict[str, Any], number: int) -> tuple[int, bytes]:
        if request["path"] == "/v1/models":
            card = {"id": "p", "root": self.root, "max_model_len": 500}
            return 200, json.dumps({"object": "list", "data": [card]}).encode()
        self.asked.append(request)
        [done] = generate(
            self.generator, [request["prompt"]], max_new_tokens=request["max_tokens"],
            temperature=request["temperature"], stop=request["stop"], seed=request["seed"],
        )  # fmt: skip
        logprobs = {"token_logprobs": done.logprobs, "tokens": [], "text_offset": [], "top_logprobs": []}
        choice = {"index": 0, "text": "", "token_ids": done.ids, "logprobs": logprobs, "finish_reason": "stop"}
        return 200, json.dumps({"choices": [choice]}).encode()


def server_generator(url: str, directory: Path, policy: Policy, model: str | Path | None = None) -> VllmServerEngine:
    generator = VllmServerEngine(VllmConfig(url=url), model or directory, policy.tokenizer, concurrency=3)
    generator.server.retrying.wait = wait_none()
    return generator


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_rollout_is_that_of_the_server_id_by_id(taught, temperature: float) -> None:
    policy, directory = taught
    served = Served(policy, str(directory))
    with misbehaving(served) as server:
        generator = server_generator(server.url, directory, policy)
        assert generator.context_length == 500
        done = play(policy, generator, temperature)
    expected = play(policy, TorchEngine(policy.model, policy.tokenizer), temperature)
    assert [t.response_ids for t in done] == [t.response_ids for t in expected]
    for ours, theirs in zip(done, expected, strict=True):
        for turn, other in zip(ours.turns, theirs.turns, strict=True):
            # A server tells log-probabilities at temperature 1, whatever it samples at.
            told = None if temperature == 0.7 else pytest.approx(other.sampling_logprobs, abs=1e-5)
            assert turn.sampling_logprobs == told
    asked = {key: served.asked[0][key] for key in ("model", "return_token_ids", "logprobs", "include_stop_str_in_output")}
    assert asked == {"model": "p", "return_token_ids": True, "logprobs": 0, "include_stop_str_in_output": True}
    assert (served.asked[0]["top_p"], served.asked[0]["top_k"], served.asked[0]["skip_special_tokens"]) == (
        1.0,
        0,
        False,
    )
    assert served.asked[0]["path"] == "/v1/completions"


NO_JSON = (400, b'{"error": {"message": "Out of range float values are not JSON compliant: nan", "code": 400}}')


@pytest.mark.parametrize("bad", ["NaN", "null", "Infinity", NO_JSON])
def test_a_server_s_logits_that_are_not_finite_are_no_generation(taught, bad: Any) -> None:
    """vLLM itself cannot write NaN as JSON, and says so; what stands between may write it, or null."""
    policy, directory = taught
    served = Served(policy, str(directory))

    def broken(request: dict[str, Any], number: int) -> tuple[int, bytes]:
        status, content = served(request, number)
        if not isinstance(bad, str):
            return bad if request["path"].endswith("/completions") else (status, content)
        return status, re.sub(rb'"token_logprobs": \[[^,\]]+', b'"token_logprobs": [' + bad.encode(), content)

    with misbehaving(broken) as server:
        generator = server_generator(server.url, directory, policy)
        with pytest.raises(ModelError, match=r"v1/completions: logits that are not finite .*start it with --dtype bfloat16"):
            play(policy, generator)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", r"not an http or https URL; write http://host:port"),
        ("http://me:pw@h/", "a password in the URL would be stored"),
        ("http://h:x", "write http://host:port"),
    ],
)
def test_a_url_that_is_none_is_refused(taught, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"vllm\.url.*{message}"):
        server_generator(url, taught[1], taught[0])


def test_a_server_of_another_policy_is_refused(taught) -> None:
    policy, directory = taught
    with (
        misbehaving(Served(policy, "/models/other")) as server,
        pytest.raises(ConfigError, match=r"serves /models/other, but the policy is .*; start the server with `vllm serve"),
    ):
        server_generator(server.url, directory, policy)


def test_what_is_no_vllm_server_is_one_line(taught) -> None:
    policy, directory = taught
    with misbehaving(lambda *_: (404, b"{}")) as server, pytest.raises(EndpointError, match="is `vllm serve` running"):
        server_generator(server.url, directory, policy)
    with (
        misbehaving(lambda *_: (200, b'{"data": 3}')) as server,
        pytest.raises(EndpointError, match="not a vLLM server"),
    ):
        server_generator(server.url, directory, policy)
    with pytest.raises(EndpointError, match=r"no list of models after 4 attempts: .*; is the server running"):
        server_generator(server.url, directory, policy)  # it is gone


def test_a_server_that_breaks_off_is_asked_again_and_then_stops_the_rollout(taught) -> None:
    policy, directory = taught
    served, dead, seen = Served(policy, str(directory)), [True], set()

    def reply(request: dict[str, Any], number: int) -> tuple[int, bytes]:
        asked = (tuple(request.get("prompt", ())), request.get("seed"))
        if request["path"] != "/v1/models" and (dead[0] or asked not in seen):
            seen.add(asked)
            return 500, b'{"error": {"message": "engine dead"}}'
        return served(request, number)

    with misbehaving(reply) as server:
        generator = server_generator(server.url, directory, policy)
        with pytest.raises(
            EndpointError, match=r"no answer after 4 attempts: status 500 Internal Server Error \(engine dead\)"
        ):
            play(policy, generator)
        dead[0] = False  # each request fails once
        seen.clear()
        assert len(play(policy, generator)) == 9
