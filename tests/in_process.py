"""Scripts of benchmarks/ in this process, where their imports are made already: what they print last is their row."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(command, seconds=None):
    """As ``gpu.run``, but for the process."""
    from contest import reason

    out = io.StringIO()
    path = str(BENCHMARKS / command[0])
    try:
        with patch.object(sys, "argv", [path, *command[1:]]), contextlib.redirect_stdout(out):
            runpy.run_path(path, run_name="__main__")
    except (Exception, SystemExit) as error:
        return {"failed": reason(1, f"{type(error).__name__}: {error}")}
    return json.loads(out.getvalue().splitlines()[-1])
