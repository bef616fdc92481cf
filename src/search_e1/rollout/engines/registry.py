"""Engines by name, and the function that opens the one that a config names: ``torch``, ``vllm``, or ``module:attribute``.

An entry is a function that takes a config, a policy's path, the loaded policy if it is in memory, and the maximum ids of a
trajectory (``None``: the policy's whole context), and returns a context manager of an ``Engine``. A user's own engine needs no
registration.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from search_e1.config import Config, Prompts
from search_e1.errors import ConfigError
from search_e1.rollout.engines import vllm
from search_e1.rollout.engines.base import Engine
from search_e1.rollout.engines.endpoint import Endpoint, EndpointEngine
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.rollout.engines.vllm_server import VllmServerEngine
from search_e1.runs.registry import Registry
from search_e1.text.protocols import protocol_of
from search_e1.training import policy as policies
from search_e1.training.policy import Policy, Reader
from search_e1.training.sources import plain_directory

OpenEngine = Callable[[Config, str | Path, Policy | None, int | None], AbstractContextManager[Engine]]
ENGINES: Registry[OpenEngine] = Registry("engine")


def check_engine(config: Config, policy: str | Path | None = None) -> None:
    """Check the engine before ``policy`` is loaded.

    Raises:
        ConfigError: there is no such engine, or its dependencies are not installed.
        ModelError: the engine cannot load ``policy``.
    """
    ENGINES.get(config.rollout.engine, "rollout.engine")
    if config.rollout.engine == "vllm":
        vllm.check(config.policy, config.vllm)
        if policy and not config.vllm.url:
            plain_directory(str(policy), "vLLM")


@contextmanager
def open_engine(
    config: Config, policy: str | Path | Endpoint, loaded: Policy | None = None
) -> Iterator[tuple[Engine, Prompts]]:
    """The engine that samples from ``policy``, valid within the context, and the policy's prompts.

    ``loaded``: the policy, if it is already in memory. Trajectories may then fill its whole context (a prompt with a reference
    is longer); otherwise ``rollout.max_tokens``.

    Raises:
        ConfigError: see ``check_engine``.
        ModelError: the policy cannot be loaded, or its tokenizer does not fit the protocol.
    """
    if isinstance(policy, Endpoint):
        prompts = config.prompts or Prompts()
        remote = EndpointEngine(policy, prompts)
        with remote.server:
            yield remote, prompts
        return
    open_by_name = ENGINES.get(config.rollout.engine, "rollout.engine")
    prompts = loaded.prompts if loaded else load_reader(config, policy).prompts
    with open_by_name(config, policy, loaded, None if loaded else config.rollout.max_tokens) as engine:
        yield engine, prompts


def load_reader(config: Config, policy: str | Path) -> Reader:
    """``policy`` without its weights; raises like ``open_engine``."""
    reader = policies.load_reader(policy, config.policy, config.prompts)
    protocol_of(reader.tokenizer, reader.prompts)
    return reader


@ENGINES.register("torch")
@contextmanager
def _open_torch(config: Config, policy: str | Path, loaded: Policy | None, max_tokens: int | None) -> Iterator[Engine]:
    loaded = loaded or policies.load(policy, config.policy, config.prompts)
    yield TorchEngine(loaded.model, loaded.tokenizer, batch_size=config.rollout.batch_size)


@ENGINES.register("vllm")
@contextmanager
def _open_vllm(config: Config, policy: str | Path, loaded: Policy | None, max_tokens: int | None) -> Iterator[Engine]:
    tokenizer = load_reader(config, policy).tokenizer
    if config.vllm.url:
        remote = VllmServerEngine(config.vllm, policy, tokenizer, concurrency=config.rollout.batch_size)
        with remote.server:
            yield remote
        return
    with vllm_launch(config, policy, max_tokens, shared=loaded is not None).running(tokenizer) as engine:
        yield engine


def vllm_launch(config: Config, policy: str | Path, max_tokens: int | None, *, shared: bool) -> vllm.VllmLaunch:
    """vLLM in this process; ``shared``: the policy is in the device's memory too.

    Raises:
        ConfigError: ``vllm.url`` names a server instead.
    """
    if config.vllm.url:
        raise ConfigError(
            "vllm.url: GRPO changes the policy with every step, and the server would keep the first; leave it out, or set "
            'rollout.engine = "torch"'
        )
    context = load_reader(config, policy).context_length
    longest = min(context, max_tokens or context)
    return vllm.VllmLaunch(policy, config.policy, config.vllm, config.rollout.batch_size, longest, shared)
