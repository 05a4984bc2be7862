"""Bad options, YAML files and data: each must end in one error, quickly and without much memory."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.torture.commands import command_here
from benchmarks.torture.runs import OPTIONS, chance, temporary_folder, words_of
from benchmarks.torture.workers import FAILED, Outcome, Trial
from mlo.cli import main as cli
from mlo.options.yaml_options import flat
from problems.jobs.lbt import LbtJob
from problems.nas import PUBLISHED

SECONDS = 1.0  # of the CPU
WAIT = 20.0  # seconds of the clock, on a machine that does other things too
MEMORY = 200 * 2**20  # bytes of address space
LONGEST = 8000  # characters of an error
NAMES = [*flat(LbtJob().model_dump(mode="json"))]
WORDS = [
    *("", "-", "--", "null", "~", "nan", "inf", "-inf", "1e999", "-1", "0", "0.5", "1e-3", "9" * 400, "9" * 5000),
    *("true", "[]", "[[[[1]]]]", "{}", "{a: b}", "{kind: cg}", "{kind: }", "*a", "&a [*a]", "!!python/object:os.a x"),
    *("'", "é" * 50, "\U0001f600", "\udcff", "a\nb", "\t", ": :", "#", "%x", "{" * 300, "[" * 300, "[" * 30_000),
    *("x" * 100_000, "cuda", "cuda:99", "cpu:x", "meta", "mps", "/dev/null", "/dev/zero", ".", "~nobody", "cifar10"),
    *("imagenet", "os:system", "json:loads", "torch:nn", "a.b:c", "resnet18", "darts", "cg", "{kind: cg, steps: 5}"),
]


def input_trials(seed: int, home: Path) -> Trial:
    """A function that does a trial."""
    good = home / "good.npz"
    _images(good)

    def trial(number: int) -> list[Outcome]:
        cli._execute = lambda run: None  # what is accepted is not run
        chances = chance(seed, "input", number)
        (attack,) = chances.choices([_options, _yaml, _data, _genotype, _command], [5, 5, 4, 2, 1])
        with temporary_folder() as folder:
            words = attack(chances, folder, good)
            before = os.getcwd()
            os.chdir(folder)
            try:
                verdict, detail = _tried(words)
            finally:
                os.chdir(before)
        shown = json.dumps([word if len(word) < 200 else f"{word[:200]}... ({len(word)})" for word in words])
        return [Outcome(number, attack.__name__.strip("_"), verdict, detail and f"{shown}\n{detail}")]

    return trial


def _tried(words: list[str]) -> tuple[str, str]:
    """The verdict on a command line, and what went wrong."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    started = time.process_time()
    try:
        code, output = command_here(*words)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    seconds = time.process_time() - started
    faults = []
    if seconds > SECONDS:
        faults.append(f"it took {seconds:.1f} s of the CPU")
    one_error = output.count("error: ") == 1 or output.startswith("Usage: ")
    if code not in (0, 1, 2) or "Traceback" in output or (code and not one_error):
        faults.append(f"exit code {code}, not one error")
    if len(output) > LONGEST and code:
        faults.append(f"an error of {len(output)} characters")
    if faults:
        return FAILED, f"{', '.join(faults)}\n{output[-1500:]}"
    return ("refused" if code else "accepted"), ""


def _too_late(number: int, frame: Any) -> None:
    raise TimeoutError(f"it did not end within {WAIT} s")


def _run(*words: str, base: Path | None = None) -> list[str]:
    """A run with small options, which are in the file ``base`` if others are given as words."""
    if base:
        base.write_text(yaml.safe_dump(OPTIONS))
    usual = [f"--config={base.name}"] if base else words_of(OPTIONS)
    return ["run", "lbt", *usual, *words, "--output", "out"]


def _options(chances: random.Random, folder: Path, good: Path) -> list[str]:
    """Options with values of every kind, and names that are nearly right."""
    words = []
    for _ in range(chances.choice([1, 1, 2, 5])):
        name, value = chances.choice(NAMES), chances.choice(WORDS)
        if chances.random() < 0.2:
            name = _typo(chances, name)
        words += chances.choice([[f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [value]])
    return _run(*words, base=folder / "base.yaml")


def _yaml(chances: random.Random, folder: Path, good: Path) -> list[str]:
    """A file of options that is damaged, strange, or made to take time or memory."""
    file = folder / chances.choice(["options.yaml", "options", "o.json"])
    text = yaml.safe_dump(OPTIONS).encode()
    kind = chances.randrange(8)
    if kind == 0:
        content = _damaged(chances, text)
    elif kind == 1:
        content = b"".join(
            b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9) if i else b"x") for i in range(12)
        )
    elif kind == 2:
        content = chances.choice([b"[", b"{a: ", b"- ", b"a:\n ", b"? "]) * chances.choice([10, 1000, 100_000])
    elif kind == 3:
        content = text + chances.choice(NAMES).encode() + b": " + chances.choice(WORDS).encode(errors="surrogateescape")
    elif kind == 4:
        content = chances.randbytes(chances.choice([0, 1, 100, 100_000]))
    elif kind == 5:
        nested: Any = chances.choice(WORDS)
        for part in reversed(chances.choice(NAMES).split(".")):
            nested = {part: nested}
        content = json.dumps(nested).encode(errors="surrogatepass")
    elif kind == 6:
        content = b"".join(
            b"%s: %d\n" % (_typo(chances, "option").encode(), i) for i in range(chances.choice([3, 30_000]))
        )
    else:
        os.mkfifo(file) if chances.random() < 0.3 else file.mkdir()
        content = None
    if content is not None:
        file.write_bytes(content)
    where = chances.choice(["--config", "--preset"]) if kind > 5 else "--config"
    return _run(f"{where}={file.name}")


def _data(chances: random.Random, folder: Path, good: Path) -> list[str]:
    """Images that are damaged, of another form, or larger than their file."""
    file = folder / "images.npz"
    kind = chances.randrange(5)
    if kind == 0:
        file.write_bytes(_damaged(chances, good.read_bytes()))
    elif kind == 1:
        shape = chances.choice([(), (0,), (40,), (40, 8), (40, 8, 8), (40, 0, 8, 1), (40, 8, 8, 1), (40, 1, 1, 3)])
        array = np.zeros(shape, chances.choice(["u1", "i8", "f4", "c8", "?", "U3", "S2", "M8[s]", "O"]))
        _images(file, **{chances.choice(["train_images", "train_labels", "test_images", "test_labels"]): array})
    elif kind == 2:
        labels = np.array(chances.choices([-1, 0, 1, 2, 9, 2**31, 2**62], k=40))
        _images(file, **{chances.choice(["train_labels", "test_labels"]): labels})
    elif kind == 3:  # a header that promises more than there is, or zeros that take little room when compressed
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("train_images", "train_labels", "test_images", "test_labels"):
                shape = chances.choice([(40, 8, 8, 1), (10**6, 32, 32, 3), (2**62, 2, 1, 1), (-1, 8, 8, 1), (10**8,)])
                header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
                with archive.open(f"{name}.npy", "w") as part:
                    part.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
                    for _ in range(chances.choice([1, 1, 1, 400])):
                        part.write(bytes(2**20))
    else:
        for part in chances.sample(["train/a", "train/b", "test/a", "val/a", "train"], 3):
            (folder / "images" / part).mkdir(parents=True, exist_ok=True)
            if chances.random() < 0.7:
                (folder / "images" / part / "x.png").write_bytes(chances.randbytes(chances.choice([0, 9, 999])))
        file = folder / "images"
    more = [f"--data.image_size={chances.choice([1, 8, 9])}"] if chances.random() < 0.3 else []
    return _run(f"--data.source={file.name}", *more)


def _genotype(chances: random.Random, folder: Path, good: Path) -> list[str]:
    """A genotype that is damaged, or a name or path of another thing."""
    file = folder / "genotype.json"
    text = chances.choice([*PUBLISHED.values()]).model_dump_json().encode()
    file.write_bytes(_damaged(chances, text))
    given = chances.choice([file.name, file.name, file.name, ".", _typo(chances, "DARTS_V2"), chances.choice(WORDS)])
    return ["run", "evaluate", "--output=out", "--device=cpu", f"--genotype={given}"]


def _command(chances: random.Random, folder: Path, good: Path) -> list[str]:
    """Other commands, with words of every kind."""
    name = chances.choice(["resume", "sweep", "compare", "reproduce", "graph", "list", "run", _typo(chances, "run")])
    more = [
        "--seeds",
        "--output",
        "--workers",
        "--grid.steps=[]",
        "--grid.seed=[1]",
        "--grid.x=[1]",
        "lbt",
        "--estimate",
    ]
    return [name, *chances.choices([*WORDS, *more, "lbt", "table2"], k=chances.choice([0, 1, 2, 4]))]


def _images(file: Path, **other: np.ndarray) -> None:
    chances = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        arrays[f"{part}_images"] = chances.integers(0, 255, (40, 8, 8, 1), np.uint8)
        arrays[f"{part}_labels"] = np.arange(40) % 3
    np.savez(file, **{**arrays, **other})


def _damaged(chances: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(chances.choice([1, 1, 3, 20])):
        at = chances.randrange(len(changed))
        how = chances.randrange(5)
        if how == 0:
            changed[at] = chances.randrange(256)
        elif how == 1:
            changed[at] ^= 1 << chances.randrange(8)
        elif how == 2 and at:
            del changed[at:]
        elif how == 3:
            changed[at:at] = chances.choice([b"\0", b'"', b"[", b"}", b": ", b"9" * 400, b"\xff", b"- "])
        else:
            del changed[at : at + 5]
        changed = changed or bytearray(b" ")
    return bytes(changed)


def _typo(chances: random.Random, name: str) -> str:
    at = chances.randrange(len(name))
    return name[:at] + chances.choice(["", "x", "_", ".", "-", "=", name[at] * 2]) + name[at + 1 :]
