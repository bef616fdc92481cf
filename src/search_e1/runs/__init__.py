"""Run directories: artifacts (``artifacts``) and everything that protects them.

``opening`` takes the run's lock (``locks``), compares the config with the one it was started with (``drift``) and translates
disk errors (``disk``); ``checkpoints`` survive preemption while an artifact is made, and ``stopping`` turns signals into an
orderly stop.
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
