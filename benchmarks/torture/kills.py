"""Runs, sweeps and experiments that are killed again and again, resumed, and compared with unbroken ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.torture.commands import Death, Ended, run_command
from benchmarks.torture.runs import OPTIONS, Tiny, chance, differences, temporary_folder, words_of
from benchmarks.torture.workers import FAILED, Outcome, Trial
from mlo.sweeps import experiment

MOST_KILLS = 6  # of one trial
SAME = "as unbroken"


class Command(NamedTuple):
    """A command to kill.

    Attributes:
        name: of the command.
        weight: how often it is chosen.
        words: those that start it in a folder.
    """

    name: str
    weight: int
    words: Callable[[str], Sequence[str]]


COMMANDS = (
    Command("run", 6, lambda folder: ["run", "lbt", *words_of(OPTIONS), "--output", folder]),
    Command(
        "run of two methods",
        2,
        lambda folder: ["run", "lbt", *words_of({**OPTIONS, "methods": ["lbt", "plain"]}), "--output", folder],
    ),
    Command(
        "sweep",
        2,
        lambda folder: [
            *("sweep", "lbt", *words_of(OPTIONS), "--grid.student_weight=[0.5, 1]", "--output", folder),
            *("--workers", "2"),
        ],
    ),
    Command("reproduce", 2, lambda folder: ["reproduce", "tiny", "--output", folder]),
)


def kill_trials(seed: int, home: Path, commands: Sequence[Command] = COMMANDS) -> Trial:
    """A function that does a trial; ``home`` is a folder for the unbroken runs."""
    experiment.load_experiment = lambda name: Tiny()
    unbroken: dict[str, Ended] = {}
    for command in commands:
        folder = home / command.name
        unbroken[command.name] = run_command(command.words(str(folder)), folder, folder.with_suffix(".log"))
        assert unbroken[command.name].code == 0, unbroken[command.name].output

    def trial(number: int) -> list[Outcome]:
        random = chance(seed, "kill", number)
        (command,) = random.choices(commands, [command.weight for command in commands])
        usual, phases = unbroken[command.name], list[str]()

        def death() -> Death:
            if len(phases) >= MOST_KILLS:
                return Death()
            if random.random() < 0.5:
                return Death(operation=random.randint(1, usual.operations))
            return Death(seconds=random.uniform(0, usual.seconds), everything=random.random() < 0.7)

        with temporary_folder() as top:
            folder = top / "run"
            failure = _kill_until_it_ends(command, folder, death, phases)
            failure = failure or "\n".join(differences(folder, home / command.name))
        verdict = FAILED if failure else SAME
        if failure and not phases:
            phases.append("not killed")
        outcomes = [Outcome(number, f"{command.name}: {phase}", verdict) for phase in phases]
        return [outcome._replace(detail=failure) for outcome in outcomes[:1]] + outcomes[1:]

    return trial


def _kill_until_it_ends(command: Command, folder: Path, death: Callable[[], Death], phases: list[str]) -> str:
    """Kill a command and give it again until it ends; returns what else went wrong, and adds a phase for each kill."""
    while True:
        resumable = (folder / "config.yaml").exists() and (folder / "run.json").exists()
        words = ["resume", str(folder)] if resumable else command.words(str(folder))
        ended = run_command(words, folder, folder.with_suffix(".log"), death())
        if ended.killed:
            phases.append(_phase(folder))
        elif ended.code:
            phases.append(_phase(folder))
            return f"mlo {' '.join(words)} ended with {ended.code}:\n{ended.output}"
        else:
            return ""
        if "Traceback" in ended.output:
            return ended.output


def _phase(folder: Path) -> str:
    """What a command was doing, after the files of its first unfinished run."""
    runs = sorted(file.parent for file in folder.rglob("run.json"))
    unfinished = [run for run in runs if not (run / "results.json").exists()]
    if runs and not unfinished:
        return "after the results"
    stages = sorted(unfinished[0].glob("stages/*"), key=lambda stage: stage.stat().st_mtime) if unfinished else []
    if not stages:
        return "before the first stage"
    return f"{'after' if (stages[-1] / 'result.json').exists() else 'in'} {stages[-1].name}"
