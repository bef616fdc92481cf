"""The policies of a run as its config says, and what samples from them: the policy itself, an engine, or a server."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from search_e1.config import Config, Prompts
from search_e1.errors import ConfigError
from search_e1.rollout.engines import vllm
from search_e1.rollout.engines.base import Generator
from search_e1.rollout.engines.endpoint import Endpoint, EndpointGenerator
from search_e1.rollout.engines.torch import HFGenerator
from search_e1.rollout.engines.vllm_server import ServerGenerator
from search_e1.text.protocols import protocol_of
from search_e1.training import policy as policies
from search_e1.training.policy import Policy, Reader


def load(config: Config, policy: str | Path, device: str | None = None) -> Policy:
    """``policy`` on ``device``, or where ``policy.device`` says.

    Raises:
        ModelError: it cannot be loaded, or its tokenizer does not fit the protocol.
    """
    there = {} if device is None else {"device": device}
    loaded = policies.load(policy, config.policy.model_copy(update=there), config.prompts)
    protocol_of(loaded.tokenizer, loaded.prompts)  # a tokenizer that does not fit is refused before the work
    return loaded


def load_reader(config: Config, policy: str | Path) -> Reader:
    """What ``policy`` is but for its weights; raises as ``load``."""
    reader = policies.load_reader(policy, config.policy, config.prompts)
    protocol_of(reader.tokenizer, reader.prompts)
    return reader


@contextmanager
def asked(config: Config, policy: str | Path | Endpoint) -> Iterator[tuple[Generator, Prompts]]:
    """What samples, for as long as the context is, and the prompts to ask it with."""
    if isinstance(policy, Endpoint):
        prompts = config.prompts or Prompts()
        yield EndpointGenerator(policy, prompts), prompts
        return
    with sampling(config, policy, config.rollout.max_tokens) as generator:
        yield generator, load_reader(config, policy).prompts


@contextmanager
def sampling(config: Config, policy: str | Path, room: int | None, loaded: Policy | None = None) -> Iterator[Generator]:
    """Samples from ``policy``, which is ``loaded`` where something else needs it too. ``room``: see ``engine``."""
    rows = config.rollout.batch_size
    if config.rollout.engine == "transformers":
        loaded = loaded or load(config, policy)
        yield HFGenerator(loaded.model, loaded.tokenizer, batch_size=rows)
        return
    if config.vllm.url:
        yield ServerGenerator(config.vllm, policy, load_reader(config, policy).tokenizer, concurrency=rows)
        return
    vllm_engine = engine(config, policy, room, shared=loaded is not None)
    with vllm_engine.running(load_reader(config, policy).tokenizer) as generator:
        yield generator


def engine(config: Config, policy: str | Path, room: int | None, *, shared: bool) -> vllm.Engine:
    """vLLM in this process; ``shared`` where the policy is in memory too.

    ``room``: most ids of a trajectory; without it the policy's whole context.

    Raises:
        ConfigError: ``vllm.url`` names a server instead.
    """
    if config.vllm.url:
        raise ConfigError(
            "vllm.url: GRPO changes the policy with every step, and the server would go on with the first; leave it out, "
            'or set rollout.engine = "transformers"'
        )
    context = load_reader(config, policy).context_length
    rows, most = config.rollout.batch_size, min(context, room or context)
    return vllm.Engine(policy, config.policy, config.vllm, rows, most, shared)
