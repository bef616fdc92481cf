"""A policy from nothing."""

from typing import Annotated

from pydantic import Field, model_validator

from search_e1.config.base import NonNegative, Positive, Section, Share
from search_e1.config.training import WarmstartTrainingConfig


class WarmstartConfig(Section):
    """A small policy from nothing, taught the protocol by demonstrations built of the questions' supporting passages."""

    hidden_size: Positive = 192
    layers: Annotated[int, Field(ge=2)] = 5
    heads: Positive = 6
    vocabulary: Positive = 8192
    """Ids of the tokenizer that is trained on corpus and questions."""
    context_length: Positive = 2048
    tokenizer_passages: Positive = 20_000
    """Passages that the tokenizer is trained on."""
    steps: Positive = 400
    """Optimiser steps."""
    drills: NonNegative = 100
    """First steps: only the first query, of six times as many questions."""
    batch_size: Positive = 16
    """Demonstrations an optimiser step."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    privileged: Share = 0.4
    """Share of the demonstrations that follow a reference in the privileged prompt."""
    off_track: Share = 0.5
    """Share of those that begin with a needless search, which is read and not imitated."""
    irrelevant: Share = 0.15
    """Share of the plain demonstrations with a search that leads nowhere."""
    duplicate: Share = 0.1
    """Share of the plain demonstrations that ask the same thing twice."""
    early: Share = 0.1
    """Share of the plain demonstrations that stop after their first search and answer with the title it found."""
    training: WarmstartTrainingConfig = WarmstartTrainingConfig()

    @model_validator(mode="after")
    def _fits(self) -> "WarmstartConfig":
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            raise ValueError(f"hidden_size {self.hidden_size} does not split into {self.heads} heads of even size")
        if self.drills > self.steps:
            raise ValueError(f"drills = {self.drills} of {self.steps} steps; give fewer")
        if self.irrelevant + self.duplicate + self.early > 1:
            raise ValueError("irrelevant, duplicate and early together exceed 1")
        return self
