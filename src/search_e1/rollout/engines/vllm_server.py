"""A running vLLM server, ids in and ids out: its ``/v1/completions`` accepts prompts as ids and returns the sampled ids.

Unlike other endpoints (``endpoint``), it is equivalent to an engine in this process.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from search_e1.config import VllmConfig
from search_e1.errors import ConfigError, EndpointError
from search_e1.rollout.engines.base import Generation, Request, finite
from search_e1.rollout.engines.remote import RemoteEngine, api_url, key_headers
from search_e1.runs.http import Reply, Server, check_status
from search_e1.training.sources import resolve
from search_e1.types import StopReason

_DTYPE = "start it with --dtype bfloat16 or float32"


class _Logprobs(BaseModel):
    token_logprobs: list[float | None]


class _Choice(BaseModel):
    token_ids: list[int]
    logprobs: _Logprobs | None = None


class _Completion(BaseModel):
    choices: list[_Choice]


class _Model(BaseModel):
    id: str
    root: str | None = None
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[_Model]


class VllmServerEngine(RemoteEngine):
    """Samples from the policy of a running ``vllm serve``."""

    def __init__(self, config: VllmConfig, policy: str | Path, tokenizer: Any, *, concurrency: int) -> None:
        """Connect. ``concurrency``: number of concurrent requests.

        Raises:
            ConfigError: ``config.url`` is invalid, or its server serves another policy than ``policy``.
            EndpointError: the server does not answer, or is not vLLM.
        """
        url = api_url(str(config.url), "vllm.url", "/completions")
        super().__init__(
            url, timeout=config.timeout, attempts=None, time_limit=config.timeout, concurrency=concurrency, check="vllm.url"
        )
        self.tokenizer = tokenizer
        models = url.copy_with(path=url.path.removesuffix("/completions") + "/models")
        self._model, self.context_length = self._served(models, str(policy))

    def _served(self, url: httpx.URL, policy: str) -> tuple[str, int]:
        """The server's name and context length of ``policy``."""

        def read(reply: Reply) -> list[_Model]:
            check_status(reply)
            if not reply.ok:
                raise EndpointError(f"{server.shown}: {reply.words}; is `vllm serve` running there?")
            try:
                return _Models.model_validate_json(reply.content).data
            except ValidationError as error:
                raise EndpointError(f"{server.shown}: not a vLLM server's answer; give the URL of a `vllm serve`") from error

        with Server(
            url, EndpointError, what="list of models", timeout=30.0, time_limit=60.0, most_bytes=2**20, concurrency=1,
            headers=key_headers(),
        ) as server:  # fmt: skip
            models = server.submit(server.ask(read, early=True)).result()
        names = {policy, str(resolve(policy)), str(Path(resolve(policy)).resolve())}
        for model in models:
            if names & {model.id, model.root} and model.max_model_len:
                return model.id, model.max_model_len
        listed = ", ".join(model.root or model.id for model in models) or "nothing"
        raise ConfigError(
            f"vllm.url: {server.shown} serves {server.hide(listed)}, but the policy is {policy}; start the server with `vllm "
            f"serve {policy}`, or, if its path differs there, with --served-model-name {policy}"
        )

    def _payload(self, request: Request, temperature: float, stop: Sequence[str]) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": list(request.prompt),
            "max_tokens": request.max_new_tokens,
            "temperature": temperature,
            "seed": request.seed,
            "stop": list(stop),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # they may be, or complete, a stop string
            "spaces_between_special_tokens": False,
            "return_token_ids": True,
            "logprobs": 0,  # only the sampled id's
            # Override the server's defaults: they are the model's own and would change the distribution.
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }

    def _understood(self, reply: Reply, payload: dict[str, Any]) -> Generation:
        if "not JSON compliant" in reply.reason:  # vLLM's words for a log-probability that is NaN
            finite([None], self.server.shown, _DTYPE)
        return super()._understood(reply, payload)

    def _read(self, content: bytes, payload: dict[str, Any]) -> Generation:
        choice = _Completion.model_validate_json(content).choices[0]
        ids, logprobs = tuple(choice.token_ids), choice.logprobs.token_logprobs if choice.logprobs else []
        known = finite(logprobs, self.server.shown, _DTYPE)
        # A server returns log-probabilities at temperature 1, unless --logprobs-mode was set, which it does not expose.
        usable = payload["temperature"] in (0.0, 1.0) and len(known) == len(ids)
        return Generation(ids, known if usable else None)

    def _ended(self, stop: StopReason, words: str) -> Generation:
        raise EndpointError(f"{self.server.shown}: {words}; the server accepts less than it reports; lower rollout.max_tokens")
