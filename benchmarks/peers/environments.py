"""A virtual environment for each library. It has the library's own files, and shares torch with this interpreter."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

#: {library: what pip installs for it, without dependencies}; other libraries need no environment
REQUIREMENTS = {
    "betty": ("betty-ml==0.2.1",),
    "torchopt": ("torchopt==0.7.3", "optree==0.17.0", "graphviz==0.21"),
    "higher": ("higher==0.2.1",),
    "boat": ("boat-torch==1.1.1", "higher==0.2.1"),
}


def interpreter(library: str, folder: Path) -> Path:
    """Return the interpreter for ``library``, and create its environment in ``folder`` if needed.

    Raises:
        RuntimeError: if pip cannot install the library, with the last line of its output.
    """
    if library not in REQUIREMENTS:
        return Path(sys.executable)
    home = folder / library
    python, done = home / "bin" / "python", home / ".installed"
    wanted = "\n".join((*REQUIREMENTS[library], sys.version, sysconfig.get_paths()["purelib"]))
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    _share_packages(python)
    # betty-ml requires Python < 3.11, but works with 3.11
    words = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--ignore-requires-python"]
    found = subprocess.run([str(python), "-m", "pip", *words, *REQUIREMENTS[library]], capture_output=True, text=True)
    if found.returncode:
        lines = [line for line in found.stderr.splitlines() if line.strip()] or ["pip failed"]
        raise RuntimeError(lines[-1])
    done.write_text(wanted, encoding="utf-8")
    return python


def _share_packages(python: Path) -> None:
    """Make the packages of this interpreter visible in the environment, after its own."""
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    shared = sysconfig.get_paths()["purelib"]
    Path(own, "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n", encoding="utf-8")
