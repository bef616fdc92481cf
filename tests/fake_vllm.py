"""vLLM's face as far as we use it, over a transformers model: for tests where vLLM is not installed.

Names, arguments and what they mean are those of vLLM 0.30; ``test_vllm_engine.py`` holds the real one to the same.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from search_e1.rollout.engines.base import Generation, Request
from search_e1.rollout.engines.torch import TorchEngine


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE


@dataclass
class EngineArgs:
    """The arguments' names; of the many others those that tests give."""

    model: str = ""
    dtype: str = "auto"
    trust_remote_code: bool = False
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float = 0.92
    tensor_parallel_size: int = 1
    generation_config: str = "auto"
    logprobs_mode: str = "raw_logprobs"
    use_tqdm_on_load: bool = True
    enable_prefix_caching: bool | None = None
    enforce_eager: bool = False
    kv_cache_dtype: str = "auto"


@dataclass
class _Row:
    name: str
    params: SamplingParams
    generation: Generation
    told: int = 0


@dataclass
class Engine:
    """One token for each row a step."""

    model: Any
    tokenizer: Any
    model_config: SimpleNamespace
    rows: dict[str, _Row] = field(default_factory=dict)
    asked: list[SamplingParams] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    finish_reason: str = ""
    """Instead of what is right."""

    def __post_init__(self) -> None:
        self.engine_core = SimpleNamespace(shutdown=lambda: LLM.running.remove(self))

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> str:
        assert request_id not in self.rows
        assert params.include_stop_str_in_output
        assert not params.skip_special_tokens
        assert params.detokenize or not params.stop
        assert prompt["type"] == "token"
        ids = prompt["prompt_token_ids"]
        assert params.max_tokens
        assert len(ids) + params.max_tokens <= self.model_config.max_model_len
        # Alone in its batch: what other requests there are must not matter.
        generator = TorchEngine(self.model, self.tokenizer)
        most = len(ids) + params.max_tokens
        with generator.session(temperature=params.temperature, stop=params.stop or (), max_tokens=most) as session:
            session.submit(Request(0, ids, params.max_tokens, params.seed or 0))
            done: list[tuple[int, Generation]] = []
            while not done:
                done = session.step()
        self.asked.append(params)
        self.rows[request_id] = _Row(request_id, params, done[0][1])
        return request_id

    def step(self) -> list[SimpleNamespace]:
        outputs = []
        for row in list(self.rows.values()):
            row.told += 1
            ids, logprobs = row.generation.ids, row.generation.logprobs or ()
            finished = row.told == len(ids)
            if finished:
                del self.rows[row.name]
            if row.params.output_kind is RequestOutputKind.FINAL_ONLY and not finished:
                continue
            since = row.told - 1 if row.params.output_kind is RequestOutputKind.DELTA else 0
            reason = self.finish_reason or ("length" if len(ids) == row.params.max_tokens else "stop")
            told = [{i: SimpleNamespace(logprob=x)} for i, x in zip(ids, logprobs, strict=True)]
            sampled = SimpleNamespace(
                token_ids=list(ids[since : row.told]),
                logprobs=told[since : row.told],
                finish_reason=reason if finished else None,
            )
            outputs.append(SimpleNamespace(request_id=row.name, outputs=[sampled], finished=finished))
        return outputs

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for name in request_ids:
            self.rows.pop(name, None)  # it may have ended


class LLM:
    started: list[dict[str, Any]] = []
    """Arguments of all that were started."""
    running: list[Engine] = []
    failure: Exception | None = None
    """What the next one fails with."""

    def __init__(self, model: str, **arguments: Any) -> None:
        assert set(arguments) <= set(EngineArgs.__dataclass_fields__)
        if LLM.failure:
            raise LLM.failure
        weights = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, arguments["dtype"]))
        config = SimpleNamespace(max_model_len=arguments["max_model_len"])
        self.llm_engine = Engine(weights, AutoTokenizer.from_pretrained(model), config)
        LLM.started.append({"model": model, **arguments})
        LLM.running.append(self.llm_engine)

    def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> list[None]:
        assert method == "reload_weights"
        own = dict(self.llm_engine.model.named_parameters())
        for name, weight in kwargs["weights_iterator"]:
            own.pop(name).data.copy_(weight)
        assert not own  # all of them
        return [None]

    def apply_model(self, func: Callable[[Any], None]) -> None:
        func(self.llm_engine.model)

    def reset_prefix_cache(self) -> bool:
        return True


def install(monkeypatch: pytest.MonkeyPatch, *, version: str = "0.30.0", device: str = "cpu") -> None:
    """Let ``import vllm`` find this."""
    from search_e1.rollout.engines import vllm

    modules: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": LLM, "EngineArgs": EngineArgs, "SamplingParams": SamplingParams},
        "vllm.sampling_params": {"RequestOutputKind": RequestOutputKind},
        "vllm.platforms": {"current_platform": SimpleNamespace(device_type=device)},
        "vllm.distributed": {"cleanup_dist_env_and_memory": lambda: None},
    }
    for name, attributes in modules.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm, "version", lambda _: version)
    monkeypatch.setattr(LLM, "started", [])
    monkeypatch.setattr(LLM, "running", [])
    monkeypatch.setattr(LLM, "failure", None)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
