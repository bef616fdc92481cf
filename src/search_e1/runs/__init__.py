"""Run directories: artifacts and what they are made of (``artifacts``), and all that keeps them whole.

``opening`` a run takes its lock (``locks``), compares the config with the one it was begun under (``drift``), and looks for
room (``disk``); ``checkpoints`` outlive a kill while an artifact is made, ``stopping`` turns signals into an orderly end.
"""

from search_e1.runs.artifacts import (
    JOURNAL,
    MANIFEST,
    ORIGIN,
    SHARED,
    WORK,
    Artifact,
    Make,
    Manifest,
    artifact,
    checksum,
    derived_seed,
    read,
    versions,
)
from search_e1.runs.files import (
    read_records,
    read_summed,
    sha256,
    sha256_text,
    sync,
    write_atomically,
    write_summed,
)

__all__ = [
    "JOURNAL",
    "MANIFEST",
    "ORIGIN",
    "SHARED",
    "WORK",
    "Artifact",
    "Make",
    "Manifest",
    "artifact",
    "checksum",
    "derived_seed",
    "read",
    "read_records",
    "read_summed",
    "sha256",
    "sha256_text",
    "sync",
    "versions",
    "write_atomically",
    "write_summed",
]
