"""The same workloads with mlo, hand-written PyTorch loops and other libraries.

    python -m benchmarks.peers                       # measure everything, and write docs/benchmarks.md
    python -m benchmarks.peers --workload mwn --library betty
    python -m benchmarks.peers --quick               # small sizes, only print the tables: does everything run?

Each measurement runs in its own process on one thread. Each library has its own virtual environment, which is created
when first used. Each row is a JSON file in the output folder; the page shows all rows there, including earlier ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.peers import environments, report
from benchmarks.peers.catalogue import LIBRARIES, REFERENCES, REFUSED, WORKLOADS, Case, cases

HERE = Path(__file__).resolve().parents[2]
# By default glibc keeps freed blocks of some MB in its heap, where small live blocks pin them. With a fixed threshold
# they return to the system, and the peak is that of the memory in use.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# Without the compiler's caches, compile times are those of a first run.
FIXED = {**ONE_THREAD, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}


class Session:
    """Measures rows.

    Args:
        folder: the folder of the virtual environments.
        output: the folder of the results.
        size: of the workloads, "small" or "full".
    """

    def __init__(self, folder: Path, output: Path, size: str) -> None:
        self.folder, self.output, self.size = folder, output, size
        output.mkdir(parents=True, exist_ok=True)

    def measure(self, case: Case) -> dict[str, Any]:
        """Measure one row: error and time, then memory, each in a new process."""
        if (case.workload, case.library) in REFUSED:
            return {"failed": REFUSED[case.workload, case.library]}
        stored = self.output / f"{case.workload}-{REFERENCES[case.estimator]}.pt"
        if not stored.exists():
            made = self._run(Case(case.workload, "hand", case.estimator), "reference", stored)
            if "failed" in made:
                return made
        row = self._run(case, "time", stored)
        if "failed" in row or case.library in ("compiled", "jax"):  # its peak would be the compiler's own memory
            return row
        return {**row, **self.measure_memory(case)}

    def measure_memory(self, case: Case) -> dict[str, Any]:
        """Measure the peak memory of a row and of its baseline, and their difference with malloc's default settings."""
        nothing = Case(case.workload, "none", "none")
        found, base = self._run(case, "memory", exact=True), self._baseline(nothing, exact=True)
        usual, usual_base = self._run(case, "memory"), self._baseline(nothing)
        if "failed" in found:
            return found
        over = {"default_over_mb": usual["peak_mb"] - usual_base["peak_mb"]}
        return {**found, "baseline_mb": base["peak_mb"], **over}

    def _baseline(self, case: Case, exact: bool = False) -> dict[str, Any]:
        stored = self.output / f"baseline-{case.workload}{'-exact' if exact else ''}.json"
        if not stored.exists():
            stored.write_text(json.dumps(self._run(case, "memory", exact=exact)), encoding="utf-8")
        return dict(json.loads(stored.read_text(encoding="utf-8")))

    def _run(self, case: Case, mode: str, stored: Path = Path(), exact: bool = False) -> dict[str, Any]:
        result = self.output / "result.tmp"
        result.unlink(missing_ok=True)
        try:
            python = environments.interpreter(case.environment, self.folder)
        except RuntimeError as error:
            return {"failed": f"cannot be installed: {error}"}
        words = [case.workload, case.library, case.estimator, mode, self.size, str(result), str(stored)]
        ended = subprocess.run(
            [str(python), "-W", "ignore", "-m", "benchmarks.peers.worker", *words],
            cwd=HERE,
            env={**os.environ, **FIXED, **(EXACT_MEMORY if exact else {}), "PYTHONPATH": str(HERE)},
            capture_output=True,
            text=True,
        )
        if not result.exists():
            lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
            return {"failed": lines[-1]}
        return dict(json.loads(result.read_text(encoding="utf-8")))


def revision() -> str:
    """The commit that is measured, with a + if the code has uncommitted changes."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=7", "HEAD") + "+" * bool(git("status", "--porcelain", "mlo", "benchmarks"))


def machine() -> dict[str, str]:
    """The processor and the Python version of this machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "python": platform.python_version()}


def main() -> None:
    """Measure the selected rows, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, help="only this workload")
    parser.add_argument("--library", choices=LIBRARIES, help="only this library")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions; prints the page")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the page from the stored rows")
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "mlo" / "peers",
                        help="folder of the libraries' virtual environments")  # fmt: skip
    parser.add_argument(
        "--output", type=Path, help="folder of the rows (default: runs/peers, or runs/peers-quick with --quick)"
    )
    options = parser.parse_args()
    output = options.output or HERE / "runs" / ("peers-quick" if options.quick else "peers")
    session = Session(options.environments.absolute(), output.absolute(), "small" if options.quick else "full")
    for case in [] if options.report else cases(options.workload, options.library):
        row = session.measure(case)
        if case.library == "mlo":
            row["revision"] = revision()
        (output / f"{case.name}.row.json").write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
        print(f"{case.name:32} {report.line(row)}", flush=True)
    found = {
        case: json.loads(path.read_text(encoding="utf-8"))
        for case in cases()
        if (path := output / f"{case.name}.row.json").exists()
    }
    page = report.page(found, machine())
    if options.quick:
        print(page)
    else:
        (HERE / "docs" / "benchmarks.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
