"""The trained agent: a policy, the passages it searches, and the prompts and limits it was trained under."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from search_e1.agent.answer import Answer
from search_e1.agent.bundle import Bundle, open_retriever
from search_e1.agent.publish import download, is_hub_id
from search_e1.agent.scheduler import Job, OnText, OnTurn, Scheduler
from search_e1.config import PolicyConfig, Prompts, RolloutConfig
from search_e1.errors import ConfigError
from search_e1.retrieval.base import Retriever
from search_e1.rollout.engines.base import Engine
from search_e1.rollout.engines.endpoint import Endpoint, EndpointEngine
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.text.protocol import Protocol
from search_e1.training import policy as policies
from search_e1.training.policy import Policy
from search_e1.types import Passage, Question, Turn


class Agent:
    """Answers questions, from any number of threads at once. Use it as a context manager, or call ``close``.

    ::

        with Agent.open("agent") as agent:
            answer = agent.ask("Who wrote Moby Dick?")
            print(answer, [source.passage.title for source in answer.sources if source.holds])
    """

    def __init__(
        self,
        policy: Policy | Endpoint | Engine,
        retriever: Retriever,
        limits: RolloutConfig | None = None,
        *,
        prompts: Prompts | None = None,
        name: str = "agent",
    ) -> None:
        """``prompts``: for an endpoint or an engine; a policy has its own. ``name``: the agent's name.

        Raises:
            ModelError: the tokenizer does not fit the protocol.
            ConfigError: the endpoint's URL is invalid, or its key cannot be sent.
        """
        self.name, self.retriever, self.limits = name, retriever, limits or RolloutConfig()
        self.bundle: Bundle | None = None
        """The bundle that the agent was opened from, if any."""
        self._resources = ExitStack()
        engine: Engine
        if isinstance(policy, Endpoint):
            prompts = prompts or Prompts()
            engine = EndpointEngine(policy, prompts)
            self._resources.enter_context(engine.server)
        elif isinstance(policy, Policy):
            prompts = policy.prompts
            engine = TorchEngine(policy.model, policy.tokenizer, batch_size=self.limits.batch_size)
        else:
            engine, prompts = policy, prompts or Prompts()
        self.prompts = prompts
        self._scheduler = Scheduler(engine, retriever, prompts, self.limits)

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        device: str = "auto",
        url: str | None = None,
        index: Sequence[Path] = (),
        encoder: str | Path | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """The agent of a bundle (``search-e1 bundle``). It samples the same ids as in its evaluation.

        Args:
            directory: the bundle's directory, or its ``owner/name`` on the Hub, which is downloaded at ``revision``.
            url, index: the current server or indexes of its passages, if the bundle does not hold them.
            encoder: the current place of a dense index's encoder, if it has moved.
            trust_remote_code: run Python code that comes with the model.

        Raises:
            DataError: the directory is not a bundle, is damaged, or the index is over other passages than the bundle's; or the
                Hub does not have it or cannot be reached.
            ModelError: the policy or the encoder cannot be loaded.
            RetrievalError: the retrieval server does not answer.
        """
        place = Path(directory).expanduser()
        if not place.exists() and is_hub_id(str(directory)):
            place = download(str(directory), revision)
        bundle = Bundle.read(place)
        settings = PolicyConfig(model=str(place), dtype=bundle.dtype, device=device, trust_remote_code=trust_remote_code)
        retriever = open_retriever(bundle, url, index, encoder, device)
        agent = cls(policies.load(place, settings), retriever, bundle.limits, name=bundle.name)
        agent.bundle = bundle
        if close := getattr(retriever, "close", None):
            agent._resources.callback(close)
        return agent

    def ask(
        self,
        question: str | Question,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        timeout: float | None = None,
        on_text: OnText | None = None,
        on_turn: OnTurn | None = None,
    ) -> Answer:
        """The answer to one question, with its sources; see ``Scheduler.submit`` for the callbacks.

        ``timeout``: seconds after which the question is given up.

        Raises:
            ModelError: the question does not fit into the context.
            RetrievalError, EndpointError: the retriever or the endpoint fails.
            TimeoutError: it took too long.
        """
        job = self.submit(question, temperature=temperature, seed=seed, on_text=on_text, on_turn=on_turn)
        try:
            return job.answer.result(timeout)
        finally:
            self.cancel(job)  # does nothing if it is answered

    def submit(
        self,
        question: str | Question,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int | None = None,
        on_text: OnText | None = None,
        on_turn: OnTurn | None = None,
    ) -> Job:
        """Start answering; ``Job.answer`` is a future. ``max_tokens``: limit on sampled tokens, besides ``limits``.

        Raises:
            ConfigError: the question is empty.
        """
        if isinstance(question, str):
            if not question.strip():
                raise ConfigError("the question is empty; give one")
            # External text may contain surrogates, which tokenizers refuse. The type requires a gold answer; nothing matches
            # an empty one.
            text = question.encode("utf-8", "replace").decode()
            question = Question(id="asked", text=text, answers=("",))
        return self._scheduler.submit(
            question, temperature=temperature, seed=seed, max_tokens=max_tokens, on_text=on_text, on_turn=on_turn
        )

    @property
    def protocol(self) -> Protocol:
        """The protocol in which the agent writes its actions."""
        return self._scheduler.protocol

    def said(self, turn: Turn) -> str:
        """The text sampled in ``turn``, without end tokens, as ``on_text`` gets it."""
        return self._scheduler.said(turn)

    def cancel(self, job: Job) -> None:
        """Cancel a question that is not answered yet."""
        self._scheduler.cancel(job)

    def search(self, query: str, topk: int | None = None) -> list[Passage]:
        """The passages that ``query`` finds, at most ``topk``; by default as many as the policy reads.

        Raises:
            RetrievalError: from the retriever.
        """
        [found] = self.retriever.search([query], topk or self.limits.topk)
        return list(found)

    def passage(self, id: str) -> Passage | None:
        """The passage with this id; ``None`` if there is none, or the retriever cannot look one up."""
        lookup: Callable[[str], Passage | None] = getattr(self.retriever, "passage", lambda _: None)
        found = lookup(id)
        return found if found and found.id == id else None

    def close(self) -> None:
        """Cancel unanswered questions, and release threads and connections."""
        self._scheduler.close()  # before the engine and retriever that it uses
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
