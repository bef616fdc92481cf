"""What a stage's work is given, whatever the stage."""

from dataclasses import dataclass, field
from pathlib import Path

from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.progress import Progress, Track, silent, untracked


@dataclass(frozen=True, slots=True)
class StageContext:
    """Where a stage works, what its randomness is drawn from, who watches, and what survives preemption."""

    out: Path
    """The artifact's directory while it is unfinished. Rank 0 writes."""
    seed: int = 0
    progress: Progress = silent
    track: Track = untracked
    checkpointer: Checkpointer = field(default_factory=Checkpointer)
