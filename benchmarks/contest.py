"""Measurements in separate processes: a contestant that fails becomes a row with the reason, and the others continue."""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_MEMORY = ("out of memory", "outofmemoryerror", "can't allocate memory", "memoryerror")


def measured(
    command: Sequence[str], *, seconds: float | None = None, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The JSON object in the last line that ``command`` prints; ``{"failed": reason}`` on failure or after ``seconds``.

    Its key ``slower`` holds the product's messages about fallbacks to slower paths, so that the figures are not mistaken for
    those of the fast paths.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            out, said = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with its child processes
            if isinstance(error, subprocess.TimeoutExpired):
                return {"failed": f"not done in {seconds:.0f} s"}
            raise
    if process.returncode:
        return {"failed": reason(process.returncode, said)}
    try:
        row: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (LookupError, ValueError):
        return {"failed": "it printed no figures"}
    slower = [line.strip() for line in said.splitlines() if "slower: " in line]
    return {**row, "slower": slower} if slower else row


def reason(status: int, said: str) -> str:
    """Why a process with ``said`` on stderr ended with ``status``."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if any(words in line.lower() for line in lines for words in _MEMORY):
        return "out of memory"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}: out of memory?"
    last = lines[-1] if lines else f"ended with status {status}"
    if last.startswith("ModuleNotFoundError: No module named "):
        return f"{last.split(chr(39))[1]} is not installed"
    return last


def versions(*packages: str) -> str:
    """``torch 2.13.0, trl not installed``."""
    return ", ".join(f"{name} {found or 'not installed'}" for name, found in ((name, installed(name)) for name in packages))


def installed(package: str) -> str | None:
    """The version of ``package``; ``None`` if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
