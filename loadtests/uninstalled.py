"""Run a script of this folder from a checkout where Mnemosyne isn't installed.

    python3 loadtests/uninstalled.py loadtests/bench_gpu.py --only ingest

A GPU machine may have torch and triton and no way to install more. The folders at the top level import as
``mnemosyne.*``, so a link named ``mnemosyne`` to the checkout goes onto PYTHONPATH, for the script and
whatever it starts; the script then takes this process's place.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def linked(root: Path) -> Path:
    """A folder in which ``mnemosyne`` is ``root``; the same one for the same checkout."""
    name = hashlib.sha256(str(root).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"mnemosyne-uninstalled-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    link = folder / "mnemosyne"
    if not link.is_symlink():
        link.symlink_to(root, target_is_directory=True)
    return folder


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python3 loadtests/uninstalled.py SCRIPT ARGUMENTS ...")
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    # Absolute: what the script starts may run in another folder.
    path = [str(linked(ROOT)), *map(os.path.abspath, given)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
