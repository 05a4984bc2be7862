"""The command `mlo`: run, resume, sweep, compare, reproduce, list, graph."""

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mlo.errors import ConfigError, MloError
from mlo.files import write_atomic
from mlo.ops import distributed
from mlo.options import registry

if TYPE_CHECKING:
    from mlo.runs.folder import RunFolder
    from mlo.runs.job import Job

app = typer.Typer(
    help="Multi-level optimization: run a problem, go on with a run, compare runs, see what there is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}
Name = Annotated[
    str | None, typer.Argument(metavar="NAME", help="The problem, as `mlo list` names it.", show_default=False)
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE.yaml", help="Options; the command line wins.")
]
Help = Annotated[bool, typer.Option("--help", "-h", help="With a NAME, every option of that problem.")]


Workers = Annotated[int, typer.Option(min=1, metavar="N", help="Runs at a time, each in a process of its own.")]
OneCoreEach = Annotated[bool, typer.Option("--one-core-each", help="Keep each process on a core of its own.")]


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Versions of mlo, torch and Python.")] = False,
) -> None:
    """Say the versions."""
    if distributed.world() > 1 and context.invoked_subcommand not in ("run", "resume"):
        raise ConfigError("torchrun is for `run` and `resume`; give this command to mlo alone")
    if version:
        print(", ".join(f"{what} {number}" for what, number in registry.versions().items()))
        raise typer.Exit


@app.command(context_settings=OPEN, add_help_option=False)
def run(
    context: typer.Context,
    name: Name = None,
    config: ConfigFile = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run folder, new or empty.", show_default="runs/NAME-DATE-TIME"),
    ] = None,
    help: Help = False,
) -> None:
    """Run a problem: mlo run NAME [--option VALUE]...  (mlo run NAME --help lists the options)."""
    job = distributed.on_main(lambda: _job(context, name, config, help))
    if job:
        from mlo.runs.folder import RunFolder

        folder = RunFolder.create(str(name), job, output)
        try:
            _go(folder)
        except typer.Exit:
            raise
        except Exception:
            if distributed.is_main():
                folder.discard()
            raise


@app.command()
def resume(folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of the run.")]) -> None:
    """Go on with a run that was stopped, from its last checkpoint."""
    from mlo.runs.folder import RunFolder

    _go(RunFolder.open(folder))


@app.command(context_settings=OPEN, add_help_option=False)
def sweep(
    context: typer.Context,
    name: Name = None,
    config: ConfigFile = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the run folders go; must be given.", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Each with the seeds 0 to N-1.")] = 1,
    workers: Workers = 1,
    one_core_each: OneCoreEach = False,
    help: Help = False,
) -> None:
    """Run a problem with several options and seeds.

    mlo sweep NAME --output DIR [--grid.OPTION LIST]... [--OPTION VALUE]... [--seeds N]

    Each --grid.OPTION has a list of values, in quotes, and all their combinations are run;
    an option that is a list itself has a list of lists: '[[a], [a, b]]'.
    Other options, --OPTION VALUE, hold for all runs.

    Given again, the command goes on with what was stopped and leaves alone what is finished.
    """
    from mlo.cli.options import part_grid, print_help, read_grid, read_options
    from mlo.reports.compare import groups, load, measures
    from mlo.reports.tables import table
    from mlo.sweeps.grid import grid, report_failures, run_all

    model = _model(context, name, help)
    if help:
        print(context.get_help())
        print_help(str(name), model, Console())
        return
    if output is None:
        raise ConfigError(f"a sweep needs a folder for its runs: mlo sweep {name} --output DIR ...")
    words, grids = part_grid(context.args)
    given, values = read_options(model, words), read_grid(model, grids)
    if "seed" in {**given, **values}:
        raise ConfigError("--seed: a sweep takes --seeds N, and runs each of its options with the seeds 0 to N-1")
    planned = grid(str(name), _merged(model, config, given), values, seeds, output)
    with _stoppable("the same command"):
        failures = run_all(planned, workers, one_core_each)
    failed = report_failures(failures, len(planned))
    finished = [plan.folder for plan in planned if plan.finished()]
    compared = groups(load(finished)) if finished else []
    if measures(compared):
        print("\n" + table(compared), end="")
    raise typer.Exit(failed)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders that hold such.")],
    measure: Annotated[
        str | None, typer.Option(metavar="MEASURE", help="Whose differences are told.", show_default="the first")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="LABEL", help="What differences are from.", show_default="the first row")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="text, markdown, latex, or csv: run by run.")
    ] = "text",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table there; a new file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the measure there: a new .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Compare finished runs: means over seeds, and differences from a baseline."""
    from mlo.reports.compare import groups, load
    from mlo.reports.tables import draw, table

    for file in (output, plot):
        if file and file.exists():
            raise ConfigError(f"{file}: is there already, and nothing is written over; give another name")
    compared = groups(load(runs))
    text = table(compared, measure, baseline, form)
    try:
        if plot:
            draw(compared, plot, measure)
        if output:
            write_atomic(output, text)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written ({error.strerror}); give another name") from error
    if not output:
        print(text, end="")
    for file in filter(None, (output, plot)):
        print(f"written: {file}", file=sys.stdout if output else sys.stderr)  # a table may be read by another program


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The experiment, as `mlo list` names it.")],
    scale: Annotated[
        str | None, typer.Option(metavar="SCALE", help="How large.", show_default="the first it has")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where runs and pages go.")] = Path("runs/reproduce"),
    seeds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Runs of each kind.", show_default="as the scale has it")
    ] = None,
    workers: Workers = 1,
    one_core_each: OneCoreEach = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what it will cost.")] = False,
) -> None:
    """Do the runs of an experiment, and write its pages.

    The same command goes on where it was stopped.
    """
    from mlo.sweeps import experiment as experiments
    from mlo.sweeps.cost import cost
    from mlo.sweeps.grid import report_failures

    experiment = experiments.load_experiment(name)
    scale = experiments.chosen_scale(experiment, scale)
    planned = experiments.plan(experiment, scale, seeds or experiment.scales[scale], output)
    runs = [run for plans in planned.values() for run in plans]
    left = {key: [run for run in plans if not run.finished()] for key, plans in planned.items()}
    print(f"{output / scale}: {experiments.status(runs)}", flush=True)
    with _stoppable("the same command"):
        if any(left.values()):
            print("measuring a few rounds of each kind of run ...", flush=True)
            print(f"what is to do takes {cost(left, workers, one_core_each)}", flush=True)
        if estimate:
            return
        failures = experiments.run_planned(planned, workers, one_core_each)
    if report_failures(failures, len(runs)):
        print("no page is written from a part of the runs", file=sys.stderr)
        raise typer.Exit(1)
    for page in experiments.write(experiment, name, scale, planned):
        print(f"page: {page}")


@app.command(context_settings=OPEN, add_help_option=False)
def graph(context: typer.Context, name: Name = None, config: ConfigFile = None, help: Help = False) -> None:
    """Print who reads whom, level by level, in each stage of `mlo run NAME`, whose options it takes."""
    job = _job(context, name, config, help)
    if job:
        stages: dict[str, list[str]] = {}
        for stage, build, _ in job.stages():
            stages.setdefault(str(build().graph), []).append(stage)
        print("\n\n".join(f"{', '.join(names)}:\n{graph}" for graph, names in stages.items()))


@app.command(name="list")
def list_all() -> None:
    """List the problems, the experiments, and the hypergradient's estimators and products."""
    for group, written in registry.WRITTEN.items():
        names = registry.entries(group)
        print(f"{group.removeprefix('mlo.').capitalize()}: {written}")
        for name in names:
            print(f"  {name:<{max(map(len, names))}}  {_told(group, name)}")
        print("" if names else "  (none)\n")


def _told(group: str, name: str) -> str:
    try:
        return registry.summary_of(group, name)
    except ConfigError as error:
        return f"(broken: {error})"


def _job(context: typer.Context, name: str | None, config: Path | None, help: bool) -> "Job | None":
    """The job of a command line, or None after its help was printed."""
    from mlo.cli.options import print_help, read_options
    from mlo.options.config import validate

    model = _model(context, name, help)
    if help:
        print_help(str(name), model, Console())
        return None
    data = _merged(model, config, read_options(model, context.args))
    try:
        return validate(model, data, str(name))
    except ConfigError as error:
        raise ConfigError(f"{error}\n`mlo run {name} --help` lists the options") from None


def _model(context: typer.Context, name: str | None, help: bool) -> "type[Job]":
    """The job's class; without a name, the command's help is printed instead."""
    from mlo.runs.job import load_job

    if name is None:
        print(context.get_help())
        raise typer.Exit(0 if help else 2)
    if name.startswith("-"):
        raise ConfigError(f"the name comes first: mlo {context.info_name} NAME {name} ...; `mlo list` shows the names")
    return load_job(name)


def _merged(model: "type[Job]", config: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, with the file's options over them, and those of the command line over these."""
    from mlo.options.config import defaults
    from mlo.options.yaml_options import merge, read_yaml

    return dict(merge(merge(defaults(model), read_yaml(config) if config else {}), given))


def _go(folder: "RunFolder") -> None:
    with _stoppable(f"{distributed.launcher()} resume {folder.path}"):
        folder.execute()
    if distributed.is_main():
        print(f"finished: {folder.path}")


@contextmanager
def _stoppable(again: str) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the command with the way to go on."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        if distributed.is_main():
            print(f"stopped; go on with: {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run the command; an error of ours is told in words, with exit code 2 if an option is at fault and 1 if not."""
    with distributed.processes():
        try:
            app()
        except MloError as error:
            if distributed.tells(error):
                where = "" if distributed.is_main() else f" in process {distributed.rank()}"
                print(f"error{where}: {error}", file=sys.stderr, flush=True)
            sys.exit(2 if isinstance(error, ConfigError) else 1)
