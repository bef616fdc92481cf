import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after ``statement``."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_imports_follow_the_layers() -> None:
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " kept, 0 broken." in done.stdout


def test_the_map_names_every_package_and_the_layers_as_they_are() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    modules = {p.name for p in (ROOT / "src" / "search_e1").iterdir() if (p / "__init__.py").is_file() or p.suffix == ".py"}
    named = [
        name.strip("/") for row in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for name in re.findall(r"`(\w\S*)`", row)
    ]
    assert modules - {"__init__.py"} <= set(named)
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    assert f"    {' < '.join(layers).replace('search_e1.', '')}\n" in text


@pytest.mark.parametrize(
    "statement",
    [
        "import search_e1",
        "from search_e1 import Question, Trajectory, load_config",
        "from search_e1 import Retriever, HttpRetriever, Engine",
        "from search_e1 import load_questions",
    ],
)
def test_the_public_face_loads_no_engine_before_it_is_used(statement: str) -> None:
    engines = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "vllm", "faiss", "fastapi"}
    assert not engines & loaded_by(statement)


def test_every_public_name_is_there() -> None:
    import search_e1

    assert dir(search_e1) == sorted([*search_e1.__all__, "__version__"])
    for name in search_e1.__all__:
        assert getattr(search_e1, name).__module__.startswith("search_e1.")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = search_e1.nonsense
