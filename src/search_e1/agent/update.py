"""Updates an agent's index, or a standalone one, to its corpus."""

import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path

from search_e1.agent.bundle import FILE, Bundle
from search_e1.data.corpus import Corpus
from search_e1.errors import ConfigError, DataError
from search_e1.retrieval import directory as directories
from search_e1.retrieval.convention import EncoderSettings
from search_e1.retrieval.indexes import open_indexes
from search_e1.retrieval.update import Change, beside, build_updated, compare, recover, take_place
from search_e1.runs import MANIFEST, disk, locks, sync, write_atomically
from search_e1.runs.progress import Progress, silent

logger = logging.getLogger(__name__)


def update_indexes(
    places: Sequence[Path],
    corpus: Corpus,
    progress: Progress = silent,
    *,
    encoder: EncoderSettings | None = None,
    device: str = "auto",
    processes: int = 1,
) -> list[tuple[Path, Change, int]]:
    """Update each index to ``corpus``; returns for each its directory, the change, and the number of passages encoded.

    ``places``: index directories, which are replaced one by one once all are built, or one bundle, whose indexes change
    together.

    Raises:
        ConfigError: a place belongs to a run or a bundle, or a bundle is given together with other places.
        DataError: a place is not an index, or the corpus is empty or cannot be read.
        RunError: another process is updating it, or its disk is full.
    """
    bundle = next((place for place in places if (place / FILE).exists()), None)
    if bundle and len(places) > 1:
        raise ConfigError(f"{bundle}: a bundle is updated on its own; give nothing else")
    indexes = [Bundle.read(bundle).within(name) for name in Bundle.read(bundle).index] if bundle else list(places)
    if not indexes:
        raise DataError(f"{bundle}: a bundle without an index; update the one that it searches, and give it with --index")
    for place in () if bundle else places:
        _refuse_owned(place)
    with ExitStack() as stack:
        for index in indexes:
            work = index.with_name(f".{index.name}.update")
            stack.callback(shutil.rmtree, work, ignore_errors=True)
            stack.enter_context(disk.translate_disk_errors(index))
            stack.enter_context(locks.held(work, index))
            recover(index)
        done, source = [], corpus.checksum()
        for index in indexes:
            change = compare(index, corpus)
            if change.before and change.added == change.passages:
                raise DataError(
                    f"{index}: no passage of the corpus has an id of the index; read the corpus as for the build (--column, "
                    "--prefix-ids), or build a new index"
                )
            settings = {"encoder": encoder, "device": device, "processes": processes}
            built = None if change.same else build_updated(index, corpus, beside(index), progress, source=source, **settings)  # type: ignore[arg-type]
            done.append((index, change, built[1] if built else 0))
        changed = [index for index, change, _ in done if not change.same]
        if bundle and changed:
            _switch(bundle, encoder, device)
        for index in () if bundle else changed:
            take_place(index)
    return done


def _refuse_owned(place: Path) -> None:
    """Raise ``ConfigError`` if a bundle or a run's figures depend on this index."""
    parent = place.resolve().parent
    if (parent.parent / FILE).exists():
        raise ConfigError(f"{place}: the index of a bundle; give the bundle ({parent.parent}), which names what it searches")
    if parent.name == "index" and (parent / MANIFEST).exists():
        raise ConfigError(
            f"{place}: the index that this run's figures were measured with; update its agent instead ({parent.parent}/agent), "
            "or build an index of its own with `search-e1 index build`"
        )


def _switch(place: Path, encoder: EncoderSettings | None, device: str) -> None:
    """Switch the bundle to the new indexes, all at once, and remove the old ones."""
    before = Bundle.read(place)
    old = [before.within(name) for name in before.index]
    names = []
    for index in old:
        if beside(index).exists():
            found = directories.read(beside(index))
            new = index.with_name(f"{found.kind}-{found.checksum[:12]}")
            if new != index:
                shutil.rmtree(new, ignore_errors=True)  # from an update killed before the bundle named it
                beside(index).rename(new)
            names.append(new.relative_to(place).as_posix())
        else:
            names.append(index.relative_to(place).as_posix())
    directories_now = [place / name for name in names]
    sync(directories_now[0].parent)
    manifests = [directories.read(directory) for directory in directories_now]
    opened = open_indexes(directories_now, encoder, before.parameters, device)
    after = before.model_copy(
        update={
            "index": tuple(names),
            "passages": manifests[0].passages,
            "checksum": opened.checksum,
            "measured_on": before.measured_on or before.checksum,
        }
    )
    after.write(place)
    _update_card(place, before, after)
    for index in old:
        if index not in directories_now:
            shutil.rmtree(index)


def _update_card(place: Path, before: Bundle, after: Bundle) -> None:
    """Write into the model card what is searched now, and that its figures were measured before."""
    from search_e1.agent import card  # imports torch, which a standalone index does not need

    file = place / card.FILE
    was, now = (f"checksum `{bundle.checksum}`" for bundle in (before, after))
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if was not in text:
        logger.warning("%s: does not name the index that was searched; the card is left unchanged", file)
        return
    text = text.replace(f"{before.passages:,} passages by ", f"{after.passages:,} passages by ", 1)
    first = before.measured_on is None
    note = f" (updated on {date.today()}; the figures of this card were measured with {was})" if first else ""
    write_atomically(file, text.replace(was, f"{now}{note}", 1))
