"""The config argument of a verb: `search-e1 train mine.toml`, or `--config mine.toml`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from search_e1.errors import ConfigError

ConfigArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        parser=str,  # may be an override (see `_split`), which would lose slashes as a path
        help="TOML file; `--config FILE` is the same. Every key can be set as `--section.key VALUE`.",
    ),
]
_OPTION = "--config"


class ConfigCommand(TyperCommand):
    """A verb with a `config: ConfigArgument`.

    typer does not know overrides (``--grpo.steps 8``), so this decides which word is the file and which an override's value.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for param in self.params:
            if param.name == "config":
                param.required = False  # checked below, with a better message

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """
        Raises:
            ConfigError: no file or more than one is given.
        """
        super().parse_args(ctx, args)
        first = ctx.params["config"]  # the first word that belongs to no option: the file or part of an override
        files, ctx.args = _split([*([] if first is None else [first]), *ctx.args])
        if len(files) > 1:
            raise ConfigError(f"two configs: {' and '.join(files)}; give one, and overrides as --section.key VALUE")
        if not files and not ctx.resilient_parsing:
            raise ConfigError(f"no config; give a TOML file: {ctx.command_path} mine.toml")
        ctx.params["config"] = Path(files[0]) if files else None
        return ctx.args


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The config files among ``words``, and the overrides."""
    files: list[str] = []
    overrides: list[str] = []
    at = 0
    while at < len(words):
        flag, equals, value = words[at].partition("=")
        follows = words[at + 1 : at + 2]
        takes_next = flag.startswith("-") and not equals and bool(follows) and not follows[0].startswith("--")
        if not flag.startswith("-"):
            files.append(words[at])
        elif flag == _OPTION and (equals or takes_next):
            files.append(value if equals else follows[0])
        else:
            overrides += words[at : at + 1 + takes_next]
        at += 1 + takes_next
    return files, overrides
