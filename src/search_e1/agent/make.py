"""Makes a bundle from a run: a policy, its prompts and limits, its index, and its figures."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from search_e1 import runs
from search_e1.agent import card, ollama
from search_e1.agent.bundle import FILE, Bundle, Dtype
from search_e1.config import Config
from search_e1.errors import DataError, RunError
from search_e1.retrieval import directory as indexes
from search_e1.retrieval.registry import index_kinds
from search_e1.runs import disk, locks
from search_e1.runs.artifacts import Manifest
from search_e1.runs.day import pin, recorded
from search_e1.runs.devices import device
from search_e1.runs.files import SUM, sync
from search_e1.runs.opening import CONFIG
from search_e1.runs.safe import HIDDEN, masked_url
from search_e1.training import policy as policies
from search_e1.training.policy import Policy
from search_e1.training.precision import compute_dtype, multiplies_bfloat16
from search_e1.training.sources import resolve

AGENT = "agent"
"""Name of the bundle in a run's directory."""
INDEX = "index"
SUMMARY = "summary.json"
_FIGURES = (
    "stage", "n", "em", "em_interval", "macro_em", "macro_em_interval", "em_sampled", "em_sampled_interval", "f1", "searches",
    "tokens", "by_benchmark",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Searched:
    """The source of a bundle's passages; by default a copy of the index that the run searched."""

    indexes: Sequence[Path] = ()
    """Current directory of that index, or of several whose rankings are fused."""
    copied: bool = True
    """Whether the bundle holds a copy."""
    url: str | None = None
    """Server of the same passages, for a bundle without an index."""


COPIED = Searched()


@dataclass(frozen=True, slots=True)
class Run:
    """The facts that a bundle needs from a run's directory."""

    directory: Path
    config: Config
    policies: list[dict[str, Any]]
    """Evaluated policies, in order, with their figures."""

    @classmethod
    def read(cls, directory: Path) -> "Run":
        """
        Raises:
            RunError: no policy of the run was evaluated, or its files are damaged.
        """
        try:
            config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
            summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
            found = [{key: policy[key] for key in _FIGURES if key in policy} for policy in summary["policies"]]
            if not found:
                raise FileNotFoundError
            return cls(directory, Config.model_validate({**config, "run": directory}), found)
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(
                f"{directory}: no run with an evaluated policy (no {SUMMARY}); give the directory of a `search-e1 train`"
            ) from None
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise RunError(
                f"{directory}: its {CONFIG} or {SUMMARY} cannot be read ({problem}); run `search-e1 train` again"
            ) from None

    def place(self, stage: str) -> str | Path:
        """The policy made by ``stage``; for ``base``, the one that the run started from.

        Raises:
            RunError: the run has no such policy.
        """
        if stage == "base" and any(policy["stage"] == "base" for policy in self.policies):
            return self.config.policy.model
        if not (self.directory / stage / "policy").is_dir() or not re.fullmatch(r"\w[\w-]*", stage):
            made = sorted(path.parent.name for path in self.directory.glob("[!.]*/policy"))
            known = list(dict.fromkeys([*(policy["stage"] for policy in self.policies), *made]))
            raise RunError(f"{self.directory}: no policy {stage!r}; known: {', '.join(known)}")
        return self.directory / stage / "policy"

    def evaluation(self, stage: str) -> Manifest | None:
        """The manifest of the evaluation of ``stage``; ``None`` if there is none."""
        place = self.directory / f"evaluation-{stage}" / runs.MANIFEST
        try:
            return Manifest.model_validate_json(runs.read_summed(place))
        except FileNotFoundError:
            return None
        except ValueError:
            raise RunError(f"{place}: damaged; remove {place.parent} and run `search-e1 train` again") from None

    @property
    def indexes(self) -> list[Path]:
        """The indexes that the run searched; empty for a server or a custom retriever."""
        kinds = index_kinds(self.config.retrieval)
        return list(self.config.retrieval.index) or [self.directory / "index" / kind for kind in kinds] if kinds else []


def make_bundle(
    run: Path,
    out: Path,
    *,
    stage: str | None = None,
    dtype: Dtype | None = None,
    searched: Searched = COPIED,
    modelfile: bool = False,
    name: str | None = None,
    checksum: str | None = None,
    renew: bool = False,
) -> Bundle:
    """Write a bundle of ``run`` to ``out``, which appears as a whole. Weights are loaded into CPU memory.

    Args:
        stage: the stage that made the policy; by default the last.
        dtype: type of the weights; by default the type that the run computed in.
        modelfile: add a Modelfile for Ollama.
        checksum: the policy's, if known.
        renew: replace an earlier bundle, unless it has the same policy and figures.

    Raises:
        RunError: ``out`` exists, cannot be written to or its disk is full; or the run lacks the policy, or it is damaged.
        DataError: the index is missing, or is not the one that the run searched.
        ModelError: the policy cannot be loaded.
    """
    if out.exists() and not renew:
        raise _exists_error(out)
    origin = Run.read(run)
    stage = stage or origin.policies[-1]["stage"]
    place, measured = origin.place(stage), origin.evaluation(stage)
    found = resolve(str(place))
    checksum = checksum or (runs.checksum(found) if isinstance(found, Path) else found)
    if renew and (known := _present(out)) and (known.policy, known.trained["policies"]) == (checksum, origin.policies):
        return known
    sources, of_index = _searched(origin, searched, measured)
    with _building(out, renew) as work, pin(recorded(run)):
        policy = _load(origin.config, place, dtype, measured)
        policy.save(work)
        names = [_link(source, work / INDEX) for source in sources] if searched.copied else []
        base = card.base_of_run(origin.config.policy.model)
        for file in base.notices:
            shutil.copyfile(file, work / file.name)
        manifests = [indexes.read(source) for source in sources]
        bundle = Bundle(
            name=name or out.resolve().name,
            dtype=_name(policy.dtype),
            limits=origin.config.rollout,
            policy=checksum,
            weights={file.name: file.stat().st_size for file in sorted(work.glob("*.safetensors"))},
            index=tuple(names),
            parameters=origin.config.retrieval.parameters,
            passages=manifests[0].passages if manifests else None,
            url=_address(origin.config, searched),
            checksum=of_index,
            made_by=runs.versions()["search-e1"],
            trained=_trained(origin, stage, measured),
        )
        bundle.write(work)
        for weights in bundle.weights:  # safetensors creates files that only their owner can read
            (work / weights).chmod((work / FILE).stat().st_mode)
        (work / card.FILE).write_text(card.text(bundle, base, manifests, _encoder(sources)), encoding="utf-8")
        if modelfile:
            ollama.write(work, policy.tokenizer, policy.prompts, bundle.limits)
    return bundle.model_copy(update={"directory": out})


def bundle_of_run(run: Path, checksum: str) -> Bundle:
    """Make the bundle of the last policy of ``run``, which has ``checksum``, in the run; raises as ``make_bundle``."""
    return make_bundle(run, run / AGENT, name=run.resolve().name, checksum=checksum, renew=True)


def _present(out: Path) -> Bundle | None:
    try:
        return Bundle.read(out)
    except DataError:
        return None


def _load(config: Config, place: str | Path, dtype: Dtype | None, measured: Manifest | None) -> Policy:
    """The policy on the CPU, with weights in ``dtype``, or else in the type that the run computed in."""
    wanted = dtype or config.policy.dtype
    settings = config.policy.model_copy(update={"device": "cpu", "dtype": wanted})
    policy = policies.load(place, settings, config.prompts, master_weights=wanted == "auto")
    if wanted == "auto":
        # The run's device, as far as known: its evaluation's if recorded, else this machine's.
        run_device = device("auto") if measured is None or measured.gpus else torch.device("cpu")
        has = bool(measured and measured.gpus and run_device.type == "cpu") or multiplies_bfloat16(run_device)
        policy.dtype = compute_dtype("auto", policy.model.num_parameters(), has)
        policy.model.to(policy.dtype)  # type: ignore[arg-type]  # its stub knows devices alone
    return policy


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _searched(run: Run, searched: Searched, measured: Manifest | None) -> tuple[list[Path], str | None]:
    """The indexes to copy or describe, and their checksum according to the run's evaluation.

    Raises:
        RunError: an index is missing.
        DataError: a directory is not an index, or not the one that the run searched.
    """
    sources = list(searched.indexes) or run.indexes
    for source in sources if searched.copied else ():
        if not source.is_dir():
            raise RunError(
                f"{source}: the index that the run searched is gone; give its current directory with --index DIR, or leave it "
                "out with --no-index"
            )
    sources = [source for source in sources if source.is_dir()]
    known = (measured.inputs if measured else {}).get("retrieval", "")
    checksum = known if re.fullmatch("[0-9a-f]{64}", known) else None  # a server may report none
    if len(sources) == 1 and not run.config.retrieval.parameters:
        found = indexes.read(sources[0]).checksum
        if checksum and found != checksum:
            raise DataError(
                f"{sources[0]}: not the index that the run searched (checksum {found[:12]}, not {checksum[:12]}); give that "
                "with --index DIR, or leave it out with --no-index"
            )
        checksum = found
    return sources, checksum


def _address(config: Config, searched: Searched) -> str | None:
    """The server's URL; ``None`` if it contains a key, which a run does not record and a bundle must not leak."""
    url = searched.url or (None if searched.indexes or index_kinds(config.retrieval) else config.retrieval.url)
    return None if url and (HIDDEN in url or masked_url(url) != url) else url


def _link(source: Path, into: Path) -> str:
    """Put the index ``source`` in a directory of ``into`` named by its kind, by hard links or copies; returns its name."""
    manifest = indexes.read(source)
    place, number = into / manifest.kind, 1
    while place.exists():
        number += 1
        place = into / f"{manifest.kind}-{number}"
    for name in (*manifest.files, indexes.MANIFEST, indexes.MANIFEST + SUM):
        file, to = (source / name).resolve(), place / name
        if name.endswith(SUM) and not file.exists():  # an index of an earlier version has none
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            to.hardlink_to(file)
        except OSError:  # a different file system, one without hard links, or another user's file
            shutil.copyfile(file, to)
    return f"{into.name}/{place.name}"


def _encoder(sources: Sequence[Path]) -> str | None:
    """The query encoder of a dense index; bundles do not contain it."""
    files = [source / "encoder.json" for source in sources]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    return next((str(about["model"]) for about in found), None)


def _trained(run: Run, stage: str, measured: Manifest | None) -> dict[str, Any]:
    """The bundle's origin. Files are given by name only, since paths describe the machine."""
    config = json.loads(json.dumps(run.config.fingerprint(), default=str))
    config["data"] = {key: _names(value) for key, value in config["data"].items()}
    config["policy"]["model"] = card.plain_name(run.config.policy.model)
    config["retrieval"]["index"] = _names(config["retrieval"]["index"])
    config["retrieval"]["url"] = _address(run.config, COPIED)
    if encoder := config["retrieval"]["encoder"]:
        encoder["model"] = card.plain_name(encoder["model"])
    return {
        "stage": stage, "seed": run.config.seed, "config": config, "policies": run.policies,
        "versions": measured.versions if measured else {},
    }  # fmt: skip


def _names(value: Any) -> Any:
    """``value`` with each path replaced by its file name."""
    if isinstance(value, str):
        return Path(value).name
    if isinstance(value, Mapping):
        return {key: _names(inner) for key, inner in value.items()}
    return [_names(inner) for inner in value] if isinstance(value, list) else value


def _exists_error(out: Path) -> RunError:
    return RunError(f"{out} already exists; remove it, or give another directory for the bundle with --out")


@contextmanager
def _building(out: Path, renew: bool) -> Iterator[Path]:
    """A hidden directory beside ``out``, renamed to it when the context ends; removed on failure."""
    out = out.resolve()
    work, old = (out.with_name(f".{out.name}.{part}") for part in ("unfinished", "old"))
    with disk.translate_disk_errors(out), locks.held(work, out):
        try:
            for left in work.iterdir():  # from a killed attempt
                if not left.name.startswith("."):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield work
            for file in work.rglob("*"):
                if file.is_dir():
                    sync(file)
                else:
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
            if out.exists() and not renew:  # another process finished it meanwhile
                raise _exists_error(out)
            shutil.rmtree(old, ignore_errors=True)
            if out.exists():
                out.rename(old)
            work.rename(out)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        for left in out.glob(".*"):  # the lock's files
            left.unlink()
        shutil.rmtree(old, ignore_errors=True)
        sync(out.parent)
