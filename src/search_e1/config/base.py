"""Building blocks of sections: the base class, constrained types, and shared sections."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from search_e1.runs.values import as_written

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str | Path) else v)]
"""One path, or a list of them."""


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    _as_written = as_written


class LoraConfig(Section):
    """Low-rank adapters on all linear layers except the head."""

    rank: Positive = 16
    alpha: Positive = 32
    dropout: Share = 0.0
