"""The cold start: fine-tuning on demonstrations before RL."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from search_e1.config.base import LoraConfig, NonNegative, NonNegativeFloat, Positive, Section, Share
from search_e1.config.training import ColdstartTrainingConfig


class NewPolicyConfig(Section):
    """Sizes of the newly initialized policy for `policy.model = "new"`, and of the tokenizer trained for it."""

    hidden_size: Positive = 192
    layers: Annotated[int, Field(ge=2)] = 5
    heads: Positive = 6
    vocabulary: Positive = 8192
    """Vocabulary size of the tokenizer, which is trained on corpus and questions."""
    context_length: Positive = 2048
    tokenizer_passages: Positive = 20_000
    """Passages that the tokenizer is trained on."""

    @model_validator(mode="after")
    def _fits(self) -> "NewPolicyConfig":
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            raise ValueError(f"hidden_size {self.hidden_size} does not split into {self.heads} heads of even size")
        return self


class EndpointConfig(Section):
    """A model behind an OpenAI-compatible endpoint, whose correct trajectories become demonstrations. An API key is read from
    the environment variable `SEARCH_E1_API_KEY`."""

    url: str
    """With or without a trailing `/v1`."""
    model: str
    """The model's name on the server."""
    questions: Positive | None = None
    """Number of training questions to sample. Default: all."""
    group_size: Positive = 4
    """Trajectories per question; the best correct one becomes the demonstration."""
    temperature: NonNegativeFloat = 1.0
    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds for one attempt of a request."""
    concurrency: Positive = 8
    """Concurrent requests."""


class ColdstartConfig(Section):
    """Fine-tuning on demonstrations of the protocol, before the first round. `train` runs it if this section is present."""

    demonstrations: Literal["auto", "passages", "questions", "endpoint", "file"] = "auto"
    """Source of demonstrations. `passages`: the supporting passages in `data.corpus` that the training questions' metadata
    names. `questions`: the questions alone, if the passages that they retrieve hold the answer. `endpoint`:
    `coldstart.endpoint`. `file`: `data.demonstrations`. `auto`: the endpoint if given, else the file if given, else passages,
    with questions for those that name no passages."""
    endpoint: EndpointConfig | None = None
    probe: NonNegative = 32
    """Training questions answered greedily before and after, to report EM and the shares of malformed and of searching
    trajectories; questions without a demonstration come first. 0 turns it off."""
    steps: Positive = 100
    """Optimizer steps."""
    batch_size: Positive = 16
    """Demonstrations per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    lora: LoraConfig | None = None
    """Train adapters and merge them at the end of the stage. Default: all weights are trained."""
    drills: NonNegative = 0
    """First N steps train on the first query alone, with six times as many questions per batch."""
    privileged: Share = 0.0
    """Share of demonstrations that follow a reference in the privileged prompt."""
    off_track: Share = 0.5
    """Share of those that begin with a needless search, which carries no loss."""
    irrelevant: Share = 0.0
    """Share of plain demonstrations with an irrelevant search."""
    duplicate: Share = 0.0
    """Share of plain demonstrations that repeat their first search."""
    early: Share = 0.0
    """Share of plain demonstrations that stop after the first search and answer with the title of its first passage."""
    new_policy: NewPolicyConfig = NewPolicyConfig()
    training: ColdstartTrainingConfig = ColdstartTrainingConfig()

    @model_validator(mode="after")
    def _fits(self) -> "ColdstartConfig":
        if self.drills > self.steps:
            raise ValueError(f"drills = {self.drills} exceeds steps = {self.steps}; lower it")
        if self.demonstrations == "endpoint" and self.endpoint is None:
            raise ValueError('demonstrations = "endpoint" needs [coldstart.endpoint]; give its url and model')
        if self.irrelevant + self.duplicate + self.early > 1:
            raise ValueError("irrelevant, duplicate and early add up to more than 1; lower them")
        return self
