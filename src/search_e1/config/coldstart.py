"""The cold start: fine-tuning on demonstrations before RL."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from search_e1.config.base import LoraConfig, NonNegative, NonNegativeFloat, Positive, Section, Share
from search_e1.config.training import ColdstartTrainingConfig


class NewPolicyConfig(Section):
    """Sizes of the policy that `policy.model = "new"` makes from nothing, and of the tokenizer trained for it."""

    hidden_size: Positive = 192
    layers: Annotated[int, Field(ge=2)] = 5
    heads: Positive = 6
    vocabulary: Positive = 8192
    """Ids of the tokenizer that is trained on corpus and questions."""
    context_length: Positive = 2048
    tokenizer_passages: Positive = 20_000
    """Passages that the tokenizer is trained on."""

    @model_validator(mode="after")
    def _fits(self) -> "NewPolicyConfig":
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            raise ValueError(f"hidden_size {self.hidden_size} does not split into {self.heads} heads of even size")
        return self


class EndpointConfig(Section):
    """A model behind an OpenAI-compatible endpoint, whose correct trajectories are demonstrations. Its key, if it needs one, is
    in the environment: `SEARCH_E1_API_KEY`."""

    url: str
    """With or without `/v1` at its end."""
    model: str
    """As the server names it."""
    questions: Positive | None = None
    """Ask it this many training questions (all, if not given)."""
    group_size: Positive = 4
    """Trajectories a question, of which the best correct one is kept."""
    temperature: NonNegativeFloat = 1.0
    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds for one try of a request."""
    concurrency: Positive = 8
    """Requests under way together."""


class ColdstartConfig(Section):
    """Fine-tuning on demonstrations of the protocol, before the first round. `train` does it where this section is."""

    demonstrations: Literal["auto", "passages", "questions", "endpoint", "file"] = "auto"
    """Where they come from: the supporting `passages` that the training questions' metadata names in `data.corpus`; the
    `questions` alone, where what they find holds the answer; `coldstart.endpoint`; or the `file` `data.demonstrations`. `auto`:
    the endpoint if it is given, else the file if it is given, else passages, and questions where no passages are named."""
    endpoint: EndpointConfig | None = None
    probe: NonNegative = 32
    """Training questions that are asked before and after, greedily, for the share of malformed and of searching trajectories:
    first those without a demonstration. 0 leaves it out."""
    steps: Positive = 100
    """Optimizer steps."""
    batch_size: Positive = 16
    """Demonstrations an optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    lora: LoraConfig | None = None
    """Train adapters and merge them at the end of the stage; without it all weights are trained."""
    drills: NonNegative = 0
    """First steps: only the first query, of six times as many questions."""
    privileged: Share = 0.0
    """Share of the demonstrations that follow a reference in the privileged prompt."""
    off_track: Share = 0.5
    """Share of those that begin with a needless search, which is read and not imitated."""
    irrelevant: Share = 0.0
    """Share of the plain demonstrations with a search that leads nowhere."""
    duplicate: Share = 0.0
    """Share of the plain demonstrations that ask the same thing twice."""
    early: Share = 0.0
    """Share of the plain demonstrations that stop after their first search and answer with the title it found."""
    new_policy: NewPolicyConfig = NewPolicyConfig()
    training: ColdstartTrainingConfig = ColdstartTrainingConfig()

    @model_validator(mode="after")
    def _fits(self) -> "ColdstartConfig":
        if self.drills > self.steps:
            raise ValueError(f"drills = {self.drills} of {self.steps} steps; give fewer")
        if self.demonstrations == "endpoint" and self.endpoint is None:
            raise ValueError('demonstrations = "endpoint" needs [coldstart.endpoint]; give its url and model')
        if self.irrelevant + self.duplicate + self.early > 1:
            raise ValueError("irrelevant, duplicate and early together exceed 1")
        return self
