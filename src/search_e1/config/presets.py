"""Presets: named values for several keys at once. A key given in the file or as a flag wins."""

from collections.abc import Mapping
from typing import Any, Literal

Preset = Literal["search-e1", "concise", "harmless"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The published method, gated and guarded: the default of every key.
    "search-e1": {},
    # GRPO, one self-distillation on students of any kind, and GRPO again: docs/when-it-pays.md.
    "concise": {"ofsd": "first_round", "pairs": {"students": 4, "students_by": "any"}},
    # The same with verified teachers only, merged at a strength that costs no EM on training questions.
    "harmless": {
        "ofsd": "first_round",
        "pairs": {"students": 4, "students_by": "any"},
        "distill": {"teachers": "verified", "merge": {"strengths": [0.0, 0.25, 0.5, 0.75, 1.0], "questions": 200}},
    },
}


def apply_preset(preset: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with missing keys filled from ``preset``; an unknown preset fills none (validation refuses it later)."""
    return _merged(PRESETS.get(preset, {}) if isinstance(preset, str) else {}, given)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            merged[key] = _merged(below[key], above[key])
    return merged
