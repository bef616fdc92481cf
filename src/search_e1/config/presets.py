"""Named values for several keys at once. A file or a flag that gives one of the keys wins."""

from collections.abc import Mapping
from typing import Any, Literal

Preset = Literal["search-e1", "concise", "harmless"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # As published: the default of every key.
    "search-e1": {},
    # GRPO, once self-distillation from all that the policy does, and GRPO again: docs/when-it-pays.md.
    "concise": {"ofsd": "first_round", "pairs": {"students": 4, "students_by": "any"}},
    # The same from teachers that follow their reference, and only as much of it as costs no EM on training questions.
    "harmless": {
        "ofsd": "first_round",
        "pairs": {"students": 4, "students_by": "any"},
        "distill": {"teachers": "verified", "merge": {"strengths": [0.0, 0.25, 0.5, 0.75, 1.0], "questions": 200}},
    },
}


def apply_preset(preset: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` and, for keys that it does not give, the values of ``preset``; of one that is not known none."""
    return _merged(PRESETS.get(preset, {}) if isinstance(preset, str) else {}, given)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            merged[key] = _merged(below[key], above[key])
    return merged
