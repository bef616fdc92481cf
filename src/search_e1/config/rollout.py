"""How trajectories are sampled, wherever they are, and how many for evaluation."""

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from search_e1.config.base import NonNegative, Positive, Section
from search_e1.config.rewards import RewardsConfig
from search_e1.runs.languages import join, parse


class RolloutConfig(Section):
    """The Search-R1 protocol's limits. They hold in training and in evaluation."""

    max_searches: NonNegative = 4
    """Turns that are answered; then follows one last generation in which a search is no longer served."""
    topk: Positive = 3
    """Passages for a query."""
    max_action_tokens: Positive = 500
    """Most tokens of one generation."""
    max_observation_tokens: Positive = 500
    """Most tokens of one observation; passages are cut, the closing tag never."""
    max_tokens: Positive = 4096
    """Most tokens of prompt and response together; a policy with a shorter context lowers it."""
    batch_size: Positive = 256
    """Most trajectories that are sampled together; fewer where memory does not hold their cache."""
    engine: str = "torch"
    """What samples: `torch`, the policy itself on any device; `vllm` (an extra), whose settings are `[vllm]`; or an engine of
    your own, `module:attribute`."""
    reward: str = "em"
    """What an answer is worth: exact match (`em`), token `f1`, `numeric`, `number` (with units), `date`, `list`, `list_f1`,
    `yes_no`, what a `judge` says, `typed` (by each question's `metadata.answer_type`), or a function `module:function` of the
    answer and the gold answers that returns 0 to 1. An answer is correct where that is 1. Evaluation counts exact matches, and
    beside them the mean of this (docs/rewards.md)."""
    rewards: RewardsConfig = RewardsConfig()
    answer_language: str = "en"
    """Language of answers, by whose rule they are compared in rewards, evaluation and use, e.g. `de`, or several: `en+zh`. `en`
    is the published rule; others drop their own articles and all punctuation, and know scripts without spaces
    (docs/languages.md)."""

    @field_validator("answer_language")
    @classmethod
    def _check_language(cls, language: str) -> str:
        return join(parse(language, "answer_language"))

    @field_validator("engine")
    @classmethod
    def _renamed(cls, name: str) -> str:
        if name == "transformers":
            raise ValueError('the engine "transformers" is called "torch" now; write engine = "torch"')
        return name

    @property
    def without_reward(self) -> Self:
        """The same limits with exact match and nothing else: for evaluation, and for an agent in use, which asks no judge."""
        return self.model_copy(update={"reward": "em", "rewards": RewardsConfig()})

    @model_validator(mode="after")
    def _check_judge(self) -> "RolloutConfig":
        if "judge" in (self.reward, *self.rewards.types.values()) and self.rewards.judge is None:
            raise ValueError("the reward judge needs rewards.judge; give its url and model")
        return self


class VllmConfig(Section):
    """Settings of `rollout.engine = "vllm"`."""

    url: str | None = None
    """A server to sample from, started by `vllm serve` with the policy in question, instead of an engine in this process. Not
    for GRPO, whose policy changes with every step."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for one request to `url`, to the last byte of its answer."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the device's memory for weights and cache."""
    shared_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.3
    """The same where the policy is in memory too: in GRPO, and when the lead is measured."""
    tensor_parallel_size: Positive = 1
    """Devices that the weights are spread over. More than 1 in GRPO needs as many processes."""
    engine: dict[str, Any] = {}
    """Further arguments of `vllm.EngineArgs` (`enforce_eager`, `kv_cache_dtype`, ...)."""


class EvaluationConfig(Section):
    samples: NonNegative = 1
    """Trajectories sampled for each question, beside the greedy one, for `em_sampled`. 0 leaves them out."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the sampled trajectories."""
    latency: NonNegative = 4
    """Questions of each benchmark that are asked once more, alone, for the time from question to answer. 0 leaves it out."""
    recall: bool = True
    """Look, once a run, for the answers in the passages that each question itself finds, and in the whole corpus."""
