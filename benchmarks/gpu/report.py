"""The figures of docs/gpu.md, in Markdown, from the JSON files of the sections."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.sections import COMPILED, PAPER_GPU_DAYS, ROUNDS, SECTIONS

Results = Mapping[str, Any]


def report(folder: Path) -> str:
    """Tables of all sections whose results are in the folder.

    Raises:
        SystemExit: if there are none.
    """
    found = {name: folder / f"{name}.json" for name in SECTIONS if (folder / f"{name}.json").exists()}
    if not found:
        raise SystemExit(f"error: no results in {folder}; measure first: python -m benchmarks.gpu --out {folder}")
    results = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items()}
    lines: list[str] = []
    if any(of["smoke"] for of in results.values()):
        lines += ["**These are results of `--smoke`: a tiny size on the CPU, with no meaning as figures.**", ""]
    for name, of in results.items():
        lines += [f"### {_TITLES[name]}", "", *_status(of), *_TABLES[name](of), ""]
    return "\n".join(lines).rstrip()


def _status(of: Results) -> Iterator[str]:
    status = of.get("status", "not finished")
    if status != "done":
        yield f"This section has no full results: {status}."
        yield ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(_cell(value) for value in row)} |"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _device(of: Results) -> Iterator[str]:
    labels = {
        "name": "GPU", "memory_gib": "memory, GiB", "multiprocessors": "multiprocessors", "driver": "driver",
        "torch": "torch", "cuda": "CUDA", "cudnn": "cuDNN", "python": "Python", "copy_tb_s": "copy, TB/s",
        "float32_tflop_s": "matrix product in float32, TFLOP/s", "tf32_tflop_s": "in TF32",
        "bfloat16_tflop_s": "in bfloat16", "launch_us": "a launch, µs", "launch_in_graph_us": "in a CUDA graph, µs",
    }  # fmt: skip
    yield from _table(["", ""], [(label, of[key]) for key, label in labels.items() if key in of])


def _rounds(of: Results, columns: Mapping[str, str]) -> Iterator[str]:
    """One row for each variant; a variant that failed or was skipped says so in its first column of numbers."""
    rows = []
    for name, found in of.items():
        if name == "status" or (name.startswith("profile of ") and "failed" not in found):
            continue
        if isinstance(found, dict) and columns.keys() & found.keys():
            rows.append([name, *(found.get(key) for key in columns)])
        elif isinstance(found, dict) and set(found) == {"failed"}:
            rows.append(
                [name, f"failed: {found['failed'].strip().splitlines()[-1][:100]}", *[None] * (len(columns) - 1)]
            )
        elif isinstance(found, str) and found.startswith("skipped"):
            rows.append([name, found, *[None] * (len(columns) - 1)])
    yield from _table(["", *columns.values()], rows)


def _engine(of: Results) -> Iterator[str]:
    paper = " and ".join(f"{days} for {name}" for name, days in PAPER_GPU_DAYS.items())
    yield f"GPU-days are those of a search of {ROUNDS:,} rounds. The paper reports {paper}, on a V100."
    yield ""
    columns = {
        "round_s": "s a round", "streamed_s": "s, host ahead", "gpu_days": "GPU-days", "peak_gib": "peak, GiB",
        "replayed": "rounds replayed", "not_captured": "why not",
    }  # fmt: skip
    yield from _rounds(of, columns)
    yield from _profiles(of)


def _hand(of: Results) -> Iterator[str]:
    columns = {
        "eager_s": "s a round, eager", "graph_s": "s as a CUDA graph", "gpu_days": "GPU-days",
        "peak_gib": "peak, GiB", "capture_s": "s to capture",
    }  # fmt: skip
    yield from _rounds(of, columns)
    yield from _profiles(of)


def _profiles(of: Results, most: int = 12) -> Iterator[str]:
    """For each profile, the sums and the most expensive kernels."""
    for name, found in of.items():
        if name.startswith("profile of ") and "launches" in found:
            yield ""
            yield (
                f"A round, {name.removeprefix('profile of ')}: {found['launches']:,} kernels, {found['busy_ms']:g} ms "
                f"of kernels, {found['mean_us']:g} µs each. The most expensive:"
            )
            yield ""
            rows = [(f"`{row['name']}`", row["count"], row["ms"]) for row in found["top"][:most]]
            yield from _table(["kernel", "launches", "ms"], rows)


def _waits(of: Results) -> Iterator[str]:
    yield f"Waits a round: {of.get('waits_a_round', 'not measured')}."
    if of.get("lines"):
        yield ""
        yield from _table(["lines", "waits in 3 rounds"], [(f"`{k}`", count) for k, count in of["lines"].items()])


def _tests(of: Results) -> Iterator[str]:
    kinds = ("passed", "skipped", "failed")
    rows = []
    for name in ("cuda", "cuda and kernels"):
        found = of.get(name, "not run")
        if isinstance(found, dict) and "passed" in found:
            stopped = ", stopped before the end" if found.get("interrupted") else ""
            rows.append([f"`{name}`{stopped}", *(found[kind] for kind in kinds)])
        else:
            rows.append([f"`{name}`", found if isinstance(found, str) else "not finished", None, None])
    yield from _table(["tests", *kinds], rows)
    messages = [(k, v) for name in of.values() if isinstance(name, dict) for k, v in name.get("messages", {}).items()]
    for test, message in messages:
        yield f"\n- `{test}`: {' '.join(message.split())}"


def _convolutions(of: Results) -> Iterator[str]:
    times = {
        "forward_us": "forward", "image_gradient_us": "image gradient", "weight_gradient_us": "weight gradient",
        "double_backward_us": "double backward", "bytes_us": "bytes of the forward",
    }  # fmt: skip
    yield f"Microseconds. The last column is the time of the bytes at {of.get('copy_tb_s')} TB/s."
    yield ""
    rows = [
        (
            f"{row['convolution']}, {row['channels']} channels, {row['side']}x{row['side']}",
            row["dtype"] + (", TF32" if row["tf32"] else ""),
            row["order"],
            *((row.get(key) for key in times) if "failed" not in row else (row["failed"][:60], *[None] * 4)),
        )
        for row in of.get("table", [])
    ]
    yield from _table(["convolution", "dtype", "order", *times.values()], rows)


def _compile(of: Results) -> Iterator[str]:
    keys = ("first_s", "second_s", "third_s", "round_s", "peak_gib", "replayed", "not_captured")
    heads = ["", "first round, s", "second, s", "third, s", "s a round", "peak, GiB", "rounds replayed", "why not"]
    if of.get("compile"):
        yield f"{of['compile'].capitalize()}."
        return
    rows = [(name, *(of.get(f"{name}_{key}") for key in keys)) for name in COMPILED]
    yield from _table(heads, rows)


_TITLES = {
    "device": "The GPU and its limits",
    "engine": "A round by the engine",
    "hand": "The same round by hand",
    "waits": "Where a round waits",
    "tests": "Tests",
    "convolutions": "The supernet's convolutions",
    "compile": "Compiled, on three cells",
}
_TABLES = {
    "device": _device,
    "engine": _engine,
    "hand": _hand,
    "waits": _waits,
    "tests": _tests,
    "convolutions": _convolutions,
    "compile": _compile,
}
