"""What the audit of dependencies says, and when it fails."""

import runpy
from pathlib import Path

judged = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "audit.py"))["judged"]
SOUND = {"name": "a", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "b", "skip_reason": "not found on PyPI"}


def finding(*fixes: str) -> dict:
    return {
        "name": "c",
        "version": "2.0",
        "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-9", "GHSA-x"], "fix_versions": [*fixes]}],
    }


def test_it_fails_only_where_there_is_a_fix() -> None:
    assert judged([SOUND, UNKNOWN]) == (
        ["1 of 2 packages audited, 0 findings", "not audited, since no advisories could be had: 1"],
        0,
    )
    assert judged([SOUND, finding()]) == (
        ["c 2.0: PYSEC-1 CVE-9; no fix yet", "2 of 2 packages audited, 1 findings"],
        0,
    )
    assert judged([finding("2.1", "3.0"), finding()]) == (
        [
            "c 2.0: PYSEC-1 CVE-9; fixed in 2.1, 3.0",
            "c 2.0: PYSEC-1 CVE-9; no fix yet",
            "2 of 2 packages audited, 2 findings",
        ],
        1,
    )
