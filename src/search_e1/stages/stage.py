"""The interface of a stage: its name, what its artifact depends on, and its work. The runner knows no more."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from search_e1.config import Config
from search_e1.runs.context import StageContext
from search_e1.runs.stage_id import StageId
from search_e1.stages.inputs import Inputs


class Stage(ABC):
    """One stage of a run. All ranks run it, or rank 0 alone if it is not ``parallel``."""

    parallel: ClassVar[bool] = True
    uses_device: ClassVar[bool] = True

    @property
    @abstractmethod
    def id(self) -> StageId: ...

    @abstractmethod
    def settings(self, config: Config) -> Mapping[str, Any]:
        """The settings that the artifact depends on. ``prompts`` and ``policy`` are added for every stage."""

    @abstractmethod
    def inputs(self, run: Inputs) -> Mapping[str, str]:
        """Name of each input -> its checksum."""

    def check(self, run: Inputs) -> None:
        """Check config and data before any work. Called on all ranks, and by the outer loop before its first stage.

        Raises:
            SearchE1Error: the first mistake found.
        """
        return

    @abstractmethod
    def work(self, run: Inputs, context: StageContext) -> Mapping[str, Any]:
        """Make the artifact's files in ``context.out``; rank 0 writes. Returns its figures, the same on all ranks."""

    @property
    def seed_name(self) -> str:
        """Name that the stage's seed is derived from."""
        return str(self.id)


def sections(config: Config, *names: str) -> dict[str, Any]:
    """The named sections and (dotted) keys of the config, as JSON values."""
    dumped = config.model_dump(mode="json")
    found: dict[str, Any] = {}
    for name in names:
        value: Any = dumped
        for part in name.split("."):
            value = value[part]
        found[name] = value
    return found
