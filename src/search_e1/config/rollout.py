"""Sections of rollouts (in all stages), of vLLM, and of evaluation."""

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from search_e1.config.base import NonNegative, Positive, Section
from search_e1.config.rewards import RewardsConfig
from search_e1.runs.languages import join, parse


class RolloutConfig(Section):
    """Limits of the Search-R1 protocol, engine and reward, in training and in evaluation."""

    max_searches: NonNegative = 4
    """Turns that get an observation; in one last generation after them a search is not served."""
    topk: Positive = 3
    """Passages per query."""
    max_action_tokens: Positive = 500
    """Maximum tokens of one generation."""
    max_observation_tokens: Positive = 500
    """Maximum tokens of one observation; passages are cut, the closing tag never."""
    max_tokens: Positive = 4096
    """Maximum tokens of prompt and response together; a policy with a shorter context lowers it."""
    batch_size: Positive = 256
    """Maximum trajectories sampled at once; fewer if the KV cache does not fit into memory."""
    engine: str = "torch"
    """Sampling engine: `torch`, the policy itself on any device; `vllm` (an extra), configured in `[vllm]`; or your own,
    `module:attribute`."""
    reward: str = "em"
    """Reward of an answer: exact match (`em`), token `f1`, `numeric`, `number` (with units), `date`, `list`, `list_f1`,
    `yes_no`, a model's verdict (`judge`), `typed` (by each question's `metadata.answer_type`), or `module:function`, a function
    of the answer and the gold answers that returns 0 to 1. An answer with reward 1 is correct. Evaluation reports EM and the
    mean reward (docs/rewards.md)."""
    rewards: RewardsConfig = RewardsConfig()
    answer_language: str = "en"
    """Language whose normalization rule compares answers in rewards, evaluation and use, e.g. `de`, or several: `en+zh`. `en`
    is the published rule; other languages drop their own articles and all punctuation, and handle scripts without spaces
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
        """The same section with exact match as the only reward, for evaluation and for an agent in use: no judge is called."""
        return self.model_copy(update={"reward": "em", "rewards": RewardsConfig()})

    @model_validator(mode="after")
    def _check_judge(self) -> "RolloutConfig":
        if "judge" in (self.reward, *self.rewards.types.values()) and self.rewards.judge is None:
            raise ValueError("the reward judge needs rewards.judge; give its url and model")
        return self


class VllmConfig(Section):
    """Settings of `rollout.engine = "vllm"`."""

    url: str | None = None
    """A server to sample from, started by `vllm serve` with the same policy, instead of an engine in this process. Not for
    GRPO, whose policy changes at every step."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for one request to `url`, to the last byte of the response."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the device's memory for weights and KV cache."""
    shared_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.3
    """The same while the trained policy shares the device: in training stages, and when the lead is measured."""
    tensor_parallel_size: Positive = 1
    """Devices that the weights are split over. In GRPO a size above 1 needs as many processes."""
    engine: dict[str, Any] = {}
    """Further arguments of `vllm.EngineArgs` (`enforce_eager`, `kv_cache_dtype`, ...)."""


class EvaluationConfig(Section):
    samples: NonNegative = 1
    """Trajectories sampled per question, besides the greedy one, for `em_sampled`. 0 turns it off."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the sampled trajectories."""
    latency: NonNegative = 4
    """Questions per benchmark answered once more, one at a time, to measure latency. 0 turns it off."""
    recall: bool = True
    """Measure retrieval recall once per run: answers in the passages that each question retrieves, and in the whole corpus."""
