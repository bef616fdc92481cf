"""The context that every stage runs in."""

from dataclasses import dataclass, field
from pathlib import Path

from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.progress import Progress, Track, silent, untracked


@dataclass(frozen=True, slots=True)
class StageContext:
    """A stage's directory, seed, progress listeners and checkpointer."""

    out: Path
    """The artifact's directory while it is unfinished. Rank 0 writes."""
    seed: int = 0
    progress: Progress = silent
    track: Track = untracked
    checkpointer: Checkpointer = field(default_factory=Checkpointer)
