"""A virtual environment for each library. It has the library's own files, and shares torch with this interpreter.

The language model needs transformers, which also gets an environment.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

#: {environment: what pip installs there, without dependencies}; other libraries need no environment
REQUIREMENTS = {
    "betty": ("betty-ml==0.2.1",),
    "torchopt": ("torchopt==0.7.3", "optree==0.17.0", "graphviz==0.21"),
    "higher": ("higher==0.2.1",),
    "boat": ("boat-torch==1.1.1", "higher==0.2.1"),
    "jax": ("jax==0.10.2", "jaxlib==0.10.2", "ml-dtypes==0.6.0", "opt-einsum==3.4.0", "scipy==1.17.1"),
    "transformers": (
        "transformers==5.24.0",
        "huggingface-hub==2.4.0",
        "tokenizers==0.23.3",
        "safetensors==0.8.0",
        "regex==2026.11.19",
        "tqdm==4.70.1",
        "packaging>=24",
        "pyyaml>=6.0",
        # for the hub, which is imported but not used
        "httpx2==2.16.2",
        "httpcore2==2.16.2",
        "anyio==4.16.0",
        "h11==0.16.0",
        "idna==3.20",
        "truststore==0.10.5",
    ),
}


def interpreter(name: str, folder: Path) -> Path:
    """Return the interpreter of the environment ``name``, and create the environment in ``folder`` if needed.

    Raises:
        RuntimeError: if pip cannot install its packages, with the last line of its output.
    """
    if name not in REQUIREMENTS:
        return Path(sys.executable)
    home = folder / name
    python, done = home / "bin" / "python", home / ".installed"
    wanted = "\n".join((*REQUIREMENTS[name], sys.version, sysconfig.get_paths()["purelib"]))
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    _share_packages(python)
    # betty-ml requires Python < 3.11, but works with 3.11
    words = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--ignore-requires-python"]
    found = subprocess.run([str(python), "-m", "pip", *words, *REQUIREMENTS[name]], capture_output=True, text=True)
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
