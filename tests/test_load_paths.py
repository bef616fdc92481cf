"""Nothing that is loaded can run: no pickle, no code of a model that was not allowed, no template out of its sandbox."""

import ast
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_tiny_policy
from search_e1.config import PolicyConfig
from search_e1.errors import DataError, ModelError
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.retrieval.encoder import Encoder
from search_e1.training import policy as policies
from search_e1.types import Passage
from tiny_encoder import make_tiny_encoder

SOURCES = sorted((Path(__file__).parent.parent / "src").rglob("*.py"))
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}


def _calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, str], int]]:
    """Dotted name, keyword arguments and line of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg or "**": ast.unparse(k.value) for k in node.keywords}, node.lineno


def _faults(source: str) -> list[str]:
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"imports {name}" for name in names if name.partition(".")[0] in UNPICKLING]
    for name, given, line in _calls(tree):
        last = name.rpartition(".")[2]
        if (
            name in ("torch.load", "torch.jit.load", "pandas.read_pickle", "eval", "exec")
            and given.get("weights_only") != "True"
        ):
            found.append(f"{line}: {name}")
        if name in ("np.load", "numpy.load", "bm25s.BM25.load") and given.get("allow_pickle") != "False":
            found.append(f"{line}: {name} without allow_pickle=False")
        if last == "from_pretrained" and name.startswith("Auto"):
            if given.get("trust_remote_code") not in ("False", "config.trust_remote_code", "trust_remote_code"):
                found.append(f"{line}: {name} does not say whose code it runs")
            if name.startswith("AutoModel") and given.get("use_safetensors") != "True":
                found.append(f"{line}: {name} without use_safetensors=True")
        if last == "load_dataset" and "trust_remote_code" in given:
            found.append(f"{line}: {name} with trust_remote_code")
    return found


def test_no_source_un_pickles_or_runs_what_it_loads() -> None:
    assert len(SOURCES) > 80
    assert {str(path): faults for path in SOURCES if (faults := _faults(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)",
        "np.load(f, allow_pickle=True)", "AutoModel.from_pretrained(d, trust_remote_code=False)", "eval(x)",
        "AutoTokenizer.from_pretrained(d)", "AutoTokenizer.from_pretrained(d, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_what_would_be_noticed(source: str) -> None:
    assert _faults(source)


@pytest.fixture
def touched(tmp_path: Path) -> Path:
    """The file that an attack makes if it runs."""
    return tmp_path / "pwned"


class Runs:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_tiny_policy().save(tmp_path / "model")
    return tmp_path / "model"


def refused(model: Path) -> str:
    """What is said where the policy, and where only its tokenizer, is loaded."""
    said = set()
    for load in (policies.load, policies.load_reader):
        with pytest.raises(ModelError) as caught:
            load(model, PolicyConfig(model=str(model)))
        said.add(str(caught.value))
    assert len(said) == 1
    return said.pop()


def test_pickled_weights_are_refused(model: Path, touched: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Runs(touched)}))
    assert (
        "weights only as pickles (pytorch_model.bin), which can run code; if you trust them, save them as safetensors"
        in refused(model)
    )
    assert not touched.exists()


def test_pickles_beside_weights_are_not_touched(model: Path, touched: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (model / name).write_bytes(pickle.dumps(Runs(touched)))
    policies.load(model, PolicyConfig(model=str(model)))
    assert not touched.exists()


def bring_code(model: Path, touched: Path, **config) -> None:
    (model / "evil.py").write_text(
        f"open({str(touched)!r}, 'w').close()\nfrom transformers import Qwen2Config as C, Qwen2ForCausalLM as M\n"
    )
    settings = json.loads((model / "config.json").read_text())
    settings |= {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoModel": "evil.M"}} | config
    (model / "config.json").write_text(json.dumps(settings))


def test_code_of_a_model_is_refused_and_the_key_that_allows_it_is_named(model: Path, touched: Path) -> None:
    bring_code(model, touched, model_type="evil")
    assert refused(model).endswith("it brings code of its own; read that, and set policy.trust_remote_code = true to run it")
    assert not touched.exists()


def test_code_beside_a_known_architecture_is_not_run(model: Path, touched: Path) -> None:
    bring_code(model, touched)
    policies.load(model, PolicyConfig(model=str(model)))
    assert not touched.exists()


def test_code_of_an_encoder_is_never_run(tmp_path: Path, touched: Path) -> None:
    directory = make_tiny_encoder(tmp_path / "e")
    bring_code(directory, touched, model_type="evil")
    with pytest.raises(ModelError, match="ships its own code, which is never run here"):
        Encoder.open(directory)
    assert not touched.exists()


def test_a_chat_template_that_reaches_out_is_one_line(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    assert "the policy's chat template fails (access to attribute '__class__'" in refused(model)


def test_arrays_of_objects_in_an_index_are_refused(tmp_path: Path, touched: Path) -> None:
    built = tmp_path / "index"
    Bm25Index.build([Passage(id="1", title="Bel", text="A city.")], built)
    arrays = sorted(built.rglob("*.npy"))
    assert len(arrays) >= 4
    for array in arrays:
        forged = tmp_path / "forged"
        shutil.copytree(built, forged)
        evil = forged / array.relative_to(built)
        np.save(evil, np.array([Runs(touched)], dtype=object), allow_pickle=True)
        manifest = json.loads((forged / "manifest.json").read_text())
        manifest["files"][array.relative_to(built).as_posix()] = evil.stat().st_size
        (forged / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError):
            Bm25Index.open(forged)
        shutil.rmtree(forged)
    assert not touched.exists()


def test_the_attack_works_where_it_is_let(touched: Path) -> None:
    pickle.loads(pickle.dumps(Runs(touched)))  # noqa: S301
    assert touched.exists()
    touched.unlink()
    torch.save(Runs(touched), touched.parent / "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(touched.parent / "evil.pt", weights_only=True)
    assert not touched.exists()
