"""Damaged files of run folders, and states with parts that do not belong there."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.torture.commands import command_here
from benchmarks.torture.runs import chance, differences, finished_run, same, temporary_folder
from benchmarks.torture.workers import FAILED, Outcome, Trial
from mlo import Engine, MloError, checkpoint
from mlo.runs.folder import read_results, run_info, stored_job
from mlo.runs.run import Run
from problems.jobs.evaluate import find_genotype

READ, STATE, RESUME = "read", "state", "resume"
LOAD = "load a state"
KINDS = {READ: 70, STATE: 22, RESUME: 8}
REFUSED, UNCHANGED, RECOVERED, OTHER_TEXT = "refused", "read as before", "as unbroken", "read, and not verified"
TEXTS = b"{}", b"[]", b"null", b"1e999", b"\xff\xfe", b"[" * 5000, b'{"a": ' * 5000, b"- [1, {b: *x}]", bytes(99)
SMALL = ("metrics.jsonl", "seconds.json", "genotype.json")  # files without a digest, which no state is read from


def damage_trials(seed: int, home: Path) -> Trial:
    """A function that does a trial; ``home`` is a folder for good runs."""
    good = finished_run(home / "run")
    finished_run(home / "other")  # of the same options and seed
    engines: list[Engine] = []
    last = checkpoint.load(good / "stages" / "search-lbt" / "step-000000003.pt")

    def trial(number: int) -> list[Outcome]:
        chances = chance(seed, "damage", number)
        (kind,) = chances.choices([*KINDS], [*KINDS.values()])
        if kind == STATE:
            if not engines:
                engines.append(stored_job(good)[1].engine())
            outcome = _state_trial(number, chances, engines[0], last)
            if outcome.verdict != REFUSED:
                engines.clear()  # it may have more attributes now than before
            return [outcome]
        with temporary_folder() as top:
            run = shutil.copytree(good, top / "run")
            if kind == RESUME:
                _unfinish(run, chances)
            file, how = damage(run, home / "other", chances)
            return [(_resume if kind == RESUME else _read)(number, good, run, file, how)]

    return trial


def damage(run: Path, other: Path, chances: random.Random) -> tuple[Path, str]:
    """Damage one file of a run, or exchange it; returns the file and what was done."""
    files = sorted(f for f in run.rglob("*") if f.is_file() and f.stat().st_size)
    weights = [3 if file.suffix == ".pt" else 2 if file.suffix == ".json" else 1 for file in files]
    (file,) = chances.choices(files, weights)
    content = bytearray(file.read_bytes())
    how = chances.choice(["flip", "flip", "truncate", "zero", "append", "insert", "exchange", "other run", "replace"])
    at = chances.randrange(len(content))
    if how == "flip":
        for _ in range(chances.choice([1, 1, 1, 2, 5])):
            content[chances.randrange(len(content))] ^= 1 << chances.randrange(8)
    elif how == "truncate":
        del content[chances.choice([0, at, len(content) - 1]) :]
    elif how == "zero":
        size = min(chances.choice([1, 16, 512, 4096]), len(content) - at)
        content[at : at + size] = bytes(size)
    elif how in ("append", "insert"):
        at = len(content) if how == "append" else at
        content[at:at] = chances.randbytes(chances.choice([1, 7, 4096]))
    elif how == "exchange":
        content = bytearray(chances.choice([f for f in files if f.suffix == file.suffix]).read_bytes())
    elif how == "other run":
        content = bytearray((other / file.relative_to(run)).read_bytes())
    else:
        texts = [
            b"{}",
            b"[]",
            b"null",
            b"1e999",
            b"\xff\xfe",
            b"[" * 5000,
            b'{"a": ' * 5000,
            b"- [1, {b: *x}]",
            b"\0" * 99,
        ]
        content = bytearray(chances.choice(texts))
    file.write_bytes(content)
    return file, how


def _unfinish(run: Path, chances: random.Random) -> None:
    """Make a run one that was killed in one of its stages, with one checkpoint or two."""
    for name in ("results.json", "results.json.sha256", "genotype.json"):
        (run / name).unlink()
    stage = run / "stages" / chances.choice(["search-lbt", "train-lbt"])
    if stage.name == "search-lbt":
        shutil.rmtree(run / "stages" / "train-lbt")
    for name in ("result.json", "result.json.sha256"):
        (stage / name).unlink()
    if chances.random() < 0.5:
        max(stage.glob("*.pt")).unlink()


def _reader(run: Path, file: Path) -> Callable[[], Any]:
    """What mlo reads of the run that depends on the file."""
    stage = file.parent.name
    name = file.name.removesuffix(".sha256")
    if file.suffix == ".pt":
        identity = {"run": run_info(run).id, "stage": stage, "round": int(file.stem[5:])}
        return lambda: checkpoint.load(file, identity)
    if name == "results.json":
        return lambda: read_results(run)
    if name == "result.json":
        return lambda: Run.open(run).stage(stage, _never, 1, _never)
    if name == "metrics.jsonl":
        return lambda: Run.open(run).metrics(stage)
    if name == "seconds.json":
        return lambda: Run.open(run).seconds(stage)
    if name == "genotype.json":
        return lambda: find_genotype(str(file))
    return lambda: (stored_job(run)[0], stored_job(run)[1].model_dump())


def _never(*_: Any) -> Any:
    raise AssertionError("a finished stage was trained again")


def _read(number: int, good: Path, run: Path, file: Path, how: str) -> Outcome:
    """Read a damaged file: it must be refused, or read as the good one."""
    what = f"read {file.name.removesuffix('.sha256') if file.suffix != '.pt' else 'a checkpoint'}"
    expected = _reader(good, good / file.relative_to(run))()
    detail = f"{file.relative_to(run)}, {how}"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            found = _reader(run, file)()
    except MloError:
        return Outcome(number, what, REFUSED)
    except Exception:  # noqa: BLE001  # any other error is what is looked for
        return Outcome(number, what, FAILED, f"{detail}\n{traceback.format_exc()}")
    if same(found, expected):
        return Outcome(number, what, UNCHANGED)
    if file.name in SMALL:
        return Outcome(number, what, OTHER_TEXT)
    return Outcome(number, what, FAILED, f"{detail}: it was read as something else: {str(found)[:500]}")


def _resume(number: int, good: Path, run: Path, file: Path, how: str) -> Outcome:
    """Resume a damaged run: it must be refused, or end as an unbroken one."""
    what = f"resume with damaged {file.name if file.suffix != '.pt' else 'checkpoint'}"
    code, output = command_here("resume", str(run))
    detail = f"{file.relative_to(run)}, {how}, exit code {code}\n{output}"
    if code in (1, 2) and output.count("error: ") == 1 and "Traceback" not in output:
        return Outcome(number, what, REFUSED)
    if code or "Traceback" in output:
        return Outcome(number, what, FAILED, detail)
    wrong = differences(run, good, damaged=file)
    return Outcome(number, what, FAILED if wrong else RECOVERED, "\n".join([*wrong, detail]) if wrong else "")


def _state_trial(number: int, chances: random.Random, engine: Engine, good: Mapping[str, Any]) -> Outcome:
    """Load a state with a wrong part: it must be refused, with the engine as before, or be what the engine then has."""
    wrong, what = _with_wrong_part(good, chances)
    engine.load_state_dict(copy.deepcopy(good))
    before = copy.deepcopy(engine.state_dict())
    try:
        engine.load_state_dict(copy.deepcopy(wrong))
    except MloError:
        kept = same(engine.state_dict(), before)
        return Outcome(number, LOAD, REFUSED if kept else FAILED, "" if kept else f"{what}: refused, and changed")
    except Exception:  # noqa: BLE001  # any other error is what is looked for
        return Outcome(number, LOAD, FAILED, f"{what}\n{traceback.format_exc()}")
    try:
        found = engine.state_dict()
        if same(found, before) or same(found, wrong):
            engine.step()
            return Outcome(number, LOAD, "taken as it is")
        return Outcome(number, LOAD, FAILED, f"{what}: loaded as something else")
    except Exception:  # noqa: BLE001  # any other error is what is looked for
        return Outcome(number, LOAD, FAILED, f"{what}: loaded, and then\n{traceback.format_exc()}")


def _with_wrong_part(good: Mapping[str, Any], chances: random.Random) -> tuple[dict[str, Any], str]:
    """A state with a part that was left out, renamed, added, or replaced by another one; and what was done."""
    state = copy.deepcopy(dict(good))
    holder, path = state, []
    while True:
        keys = [*holder] if isinstance(holder, dict) else [*range(len(holder))]
        key = chances.choice(keys)
        part = holder[key]
        path.append(str(key))
        inside = isinstance(part, dict | list) and len(part) > 0
        if not inside or chances.random() < 0.2:
            break
        holder = part
    how = chances.choice(["drop", "rename", "add", "replace", "replace", "replace"])
    if how == "drop":
        del holder[key]
    elif how == "add" and isinstance(holder, dict):
        holder["more"] = part
    elif how == "rename" and isinstance(holder, dict):
        holder["other"] = holder.pop(key)
    else:
        name, holder[key] = _other_part(part, good, chances)
        how = f"replace by {name}"
    return state, f"{'.'.join(path)}: {how}"


def _other_part(part: Any, good: Mapping[str, Any], chances: random.Random) -> tuple[str, Any]:
    tensor = torch.rand(chances.choice([(), (0,), (3,), (2, 5)]))
    plain = {
        "null": None,
        "text": "text",
        "-1": -1,
        "big": 2**62,
        "a list": [1],
        "a mapping": {"a": 1},
        "tensor": tensor,
    }
    plain |= {"true": True, "nan": float("nan"), "a state": good["problems"], "()": (), "1.5": 1.5}
    if isinstance(part, torch.Tensor):
        plain = {"null": None, "number": 0.5, "a list": part.tolist(), "tensor": tensor, "double": part.double()}
        plain |= {"int": part.int(), "flat": part.flatten(), "more": torch.stack([part, part])}
    name = chances.choice([*plain])
    return name, plain[name]
