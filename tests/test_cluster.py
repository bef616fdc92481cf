"""The examples for schedulers: what they name exists, and their parts fit together."""

import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from search_e1.cli.main import app

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "configs" / "cluster").glob("*.sbatch"))
MANIFESTS = list(yaml.safe_load_all((ROOT / "configs" / "cluster" / "kubernetes.yaml").read_text()))


def of_kind(kind: str) -> dict:
    (found,) = [manifest for manifest in MANIFESTS if manifest["kind"] == kind]
    return found


def check_command(words: list[str]) -> None:
    """A command line of ``search-e1``, perhaps under torchrun: verb, options and configs exist."""
    program, verb, *rest = words[words.index("search-e1") :]
    assert program == "search-e1"
    command: Any = typer.main.get_command(app)
    known = {flag for parameter in command.commands[verb].params for flag in parameter.opts}
    known |= {"--config"} if "config" in known else set()  # a word of its own, or an option
    for word in rest:
        if word.startswith("--") and "." not in word:
            assert word in known, word
        if word.endswith(".toml"):
            tomllib.loads((ROOT / word).read_text())
    required = {p.opts[0] for p in command.commands[verb].params if p.required}
    assert required <= set(rest)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_batch_scripts_are_sound_shell(path: Path) -> None:
    checker = shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert checker
    done = subprocess.run([checker, "--shell=bash", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_batch_scripts_call_what_there_is(path: Path) -> None:
    text = path.read_text().replace("\\\n", " ")
    config = text.split("CONFIG=${CONFIG:-", 1)[1].split("}", 1)[0]
    lines = [line[line.index("search-e1 ") :] for line in text.splitlines() if "search-e1 " in line and "--" in line]
    lines = [line for line in lines if not line.startswith("search-e1 plan")]
    assert [line.split()[1] for line in lines] == ["serve-retriever", "train"]
    for line in lines:
        check_command([word.replace("$CONFIG", config) for word in shlex.split(line.removesuffix(" &"))])
    directives = [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert f"--nodes={2 if '2nodes' in path.name else 1}" in directives
    assert {"--ntasks-per-node=1", "--gpus-per-node=8"} <= {*directives}
    assert "torchrun" in text
    assert "--nproc-per-node 8 --no-python" in text


def test_kubernetes_manifests_fit_together() -> None:
    versions = {manifest["kind"]: manifest["apiVersion"] for manifest in MANIFESTS}
    assert versions == {"PersistentVolumeClaim": "v1", "Deployment": "apps/v1", "Service": "v1", "Job": "batch/v1"}
    deployment, service, job = of_kind("Deployment"), of_kind("Service"), of_kind("Job")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    (trainer,) = job["spec"]["template"]["spec"]["containers"]
    (port,), (served,) = service["spec"]["ports"], server["ports"]
    assert port["targetPort"] == served["name"] == server["readinessProbe"]["httpGet"]["port"]
    assert server["args"][server["args"].index("--port") + 1] == str(served["containerPort"])
    assert trainer["args"][-1] == f"http://{service['metadata']['name']}:{port['port']}"
    assert job["spec"]["template"]["spec"]["restartPolicy"] in ("OnFailure", "Never")
    assert job["spec"]["template"]["metadata"]["labels"].items().isdisjoint(labels.items())
    for container in (server, trainer):
        check_command(container["command"] + container["args"])
        assert all(isinstance(word, str) for word in container["command"] + container["args"])


def test_kubernetes_volumes_are_claimed() -> None:
    claim = of_kind("PersistentVolumeClaim")["metadata"]["name"]
    for kind in ("Deployment", "Job"):
        pod = of_kind(kind)["spec"]["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]} == set(volumes)
        assert volumes["work"]["persistentVolumeClaim"]["claimName"] == claim
