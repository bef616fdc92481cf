"""Check the installed packages against PyPI's advisories with pip-audit.

    python scripts/audit.py

Exit status 1 if an advisory has a fix: upgrade to it. Advisories without a fix, and packages that could not be looked up (no
network, a mirror without advisories, an unpublished package), are printed but do not fail.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def main() -> int:
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--local",
        "--progress-spinner",
        "off",
        "--timeout",
        "10",
        "--format",
        "json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError):
        print(f"not audited: {(done.stderr.strip().splitlines() or ['pip-audit said nothing'])[-1]}")
        return 0
    lines, status = judged(packages)
    print("\n".join(lines))
    return status


def judged(packages: Sequence[Mapping[str, Any]]) -> tuple[list[str], int]:
    """The lines to print about pip-audit's ``dependencies``, and the exit status."""
    audited = [package for package in packages if "vulns" in package]
    lines, status = [], 0
    for package in audited:
        for finding in package["vulns"]:
            fixes = ", ".join(finding["fix_versions"])
            status = 1 if fixes else status
            named = " ".join((finding["id"], *(alias for alias in finding.get("aliases", ()) if alias.startswith("CVE-"))))
            lines.append(f"{package['name']} {package['version']}: {named}; {f'fixed in {fixes}' if fixes else 'no fix yet'}")
    lines.append(f"{len(audited)} of {len(packages)} packages audited, {len(lines)} findings")
    if len(audited) < len(packages):
        lines.append(f"not audited, since no advisories could be had: {len(packages) - len(audited)}")
    return lines, status


if __name__ == "__main__":
    sys.exit(main())
