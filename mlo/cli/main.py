"""The command `mlo`: run, resume, check, sweep, compare, reproduce, list, graph."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlo.cli.arguments import (
    EXTRA_OPTIONS,
    ConfigFile,
    Help,
    HelpAll,
    Name,
    OneCoreEach,
    Preset,
    Workers,
    job_class,
    make_job,
    merged,
)
from mlo.cli.check import check
from mlo.cli.help import JobCommand, complete_names
from mlo.cli.interruption import StoppableCommands, stoppable
from mlo.cli.listing import list_all
from mlo.cli.options import read_sweep
from mlo.errors import ConfigError, MloError, brief
from mlo.files import write_atomic
from mlo.ops import distributed
from mlo.options import registry

if TYPE_CHECKING:
    from mlo.runs.run import Run

_UsageError: Any = typer.BadParameter.__mro__[1]  # what all errors of typer derive from, under no public name


app = typer.Typer(
    cls=StoppableCommands,
    help="Multi-level optimization: run jobs, resume runs, compare them.",
    rich_markup_mode=None,  # it would take [a, b] in a help text for markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the versions of mlo, torch and Python.")] = False,
) -> None:
    """What is done before each command."""
    if distributed.world() > 1 and context.invoked_subcommand not in ("run", "resume"):
        raise ConfigError("torchrun can start `mlo run` and `mlo resume` only; start this command without torchrun")
    if version:
        print(", ".join(f"{what} {number}" for what, number in registry.versions().items()))
    elif context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command(cls=JobCommand, context_settings=EXTRA_OPTIONS, add_help_option=False)
def run(
    context: typer.Context,
    name: Name = None,
    preset: Preset = None,
    config: ConfigFile = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run folder, new or empty.", show_default="runs/NAME-DATE-TIME"),
    ] = None,
    help: Help = False,
    help_all: HelpAll = False,
) -> None:
    """Run a job: mlo run NAME [--OPTION VALUE]...

    `mlo run NAME --help` shows the job's main options, `mlo run NAME --help-all` all of them.
    """
    job = distributed.on_main(lambda: make_job(context, name, preset, config, help, help_all))
    from mlo.runs.folder import discard_folder
    from mlo.runs.run import Run

    created = Run.create(str(name), job, output)
    try:
        _execute(created)
    except typer.Exit:
        raise
    except Exception:
        if distributed.is_main():
            discard_folder(created.path)
        raise


@app.command(context_settings=EXTRA_OPTIONS)
def resume(
    context: typer.Context, folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of the run.")]
) -> None:
    """Continue a stopped run from its last checkpoint, with the options that it was started with."""
    if context.args:
        raise ConfigError(
            f"mlo resume takes no {' '.join(context.args)}: a run keeps the options that it was started with; for "
            "other options, start another run: mlo run NAME --config RUN_DIR/config.yaml [--OPTION VALUE]..."
        )
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; give the folder of a run, such as runs/NAME-DATE-TIME")
    from mlo.runs.run import Run

    _execute(Run.open(folder))


app.command()(check)


@app.command(cls=JobCommand, context_settings=EXTRA_OPTIONS, add_help_option=False)
def sweep(
    context: typer.Context,
    name: Name = None,
    preset: Preset = None,
    config: ConfigFile = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder for the run folders; required.", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Run each combination with the seeds 0 to N-1.")] = 1,
    workers: Workers = 1,
    one_core_each: OneCoreEach = False,
    help: Help = False,
    help_all: HelpAll = False,
) -> None:
    """Run a job with several options and seeds.

    mlo sweep NAME --output DIR [--grid.OPTION LIST]... [--OPTION VALUE]... [--seeds N]

    Each --grid.OPTION has a list of values, in quotes: '[1, 2]'. All combinations are run. For an option that is
    itself a list, write a list of lists: '[[a], [a, b]]'. Other options, --OPTION VALUE, are the same in all runs.

    The same command again resumes what was stopped, and leaves finished runs as they are.
    """
    model = job_class(context, name, help, help_all)
    if output is None:
        raise ConfigError(f"a sweep needs a folder for its runs: mlo sweep {name} --output DIR ...")
    given, values = read_sweep(model, context.args)
    if "seed" in {**given, **values}:
        raise ConfigError("--seed: a sweep takes --seeds N instead, and runs each combination with the seeds 0 to N-1")
    from mlo.reports.compare import groups, load, measures
    from mlo.reports.tables import table
    from mlo.sweeps.grid import grid, report_failures, run_all

    planned = grid(str(name), merged(model, preset, config, given), values, seeds, output)
    with stoppable("the same command"):
        failures = run_all(planned, workers, one_core_each)
    failed = report_failures(failures, len(planned))
    finished = [plan.folder for plan in planned if plan.finished()]
    compared = groups(load(finished)) if finished else []
    if measures(compared):
        print("\n" + table(compared), end="")
    raise typer.Exit(failed)


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders that contain run folders.")
    ],
    measure: Annotated[
        str | None,
        typer.Option(metavar="MEASURE", help="The measure whose differences are shown.", show_default="the first"),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="LABEL", help="The row that the others are compared with.", show_default="the first row"),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="text, markdown, latex, or csv (a row per run).")
    ] = "text",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table to this new file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plot the measure to this new .png, .svg or .pdf file.")
    ] = None,
) -> None:
    """Compare finished runs.

    Shows means over seeds, and differences from a baseline.
    """
    from mlo.reports.compare import groups, load
    from mlo.reports.tables import draw, table

    for file in (output, plot):
        if file and file.exists():
            raise ConfigError(f"{file}: already exists and is not overwritten; give another name")
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
    stream = sys.stdout if output else sys.stderr  # a table on standard output may be piped into another program
    for file in filter(None, (output, plot)):
        print(f"written: {file}", file=stream)


@app.command()
def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="The experiment; `mlo list` shows the names.",
            autocompletion=complete_names(registry.EXPERIMENTS),
        ),
    ],
    scale: Annotated[
        str | None, typer.Option(metavar="SCALE", help="The size of the experiment.", show_default="its first")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="The folder for runs and pages.")] = Path(
        "runs/reproduce"
    ),
    seeds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many seeds.", show_default="those of the scale")
    ] = None,
    workers: Workers = 1,
    one_core_each: OneCoreEach = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only show how long it will take.")] = False,
) -> None:
    """Do the runs of an experiment and write its pages.

    The same command again continues where it was stopped.
    """
    from mlo.sweeps import experiment as experiments
    from mlo.sweeps.cost import cost
    from mlo.sweeps.grid import report_failures, run_all

    experiment = experiments.load_experiment(name)
    scale = experiments.chosen_scale(experiment, scale)
    planned = experiments.plan(experiment, scale, seeds or experiment.scales[scale], output)
    runs = [run for plans in planned.values() for run in plans]
    left = {key: [run for run in plans if not run.finished()] for key, plans in planned.items()}
    print(f"{output / scale}: {experiments.status(runs)}", flush=True)
    with stoppable("the same command"):
        if any(left.values()):
            print("measuring a few rounds of each kind of run ...", flush=True)
            print(f"what is left takes {cost(left, workers, one_core_each)}", flush=True)
        if estimate:
            return
        failures = run_all(runs, workers, one_core_each)
    if report_failures(failures, len(runs)):
        print("no pages are written until all runs are finished", file=sys.stderr)
        raise typer.Exit(1)
    for page in experiments.write(experiment, name, scale, planned):
        print(f"page: {page}")


@app.command(cls=JobCommand, context_settings=EXTRA_OPTIONS, add_help_option=False)
def graph(
    context: typer.Context,
    name: Name = None,
    preset: Preset = None,
    config: ConfigFile = None,
    help: Help = False,
    help_all: HelpAll = False,
) -> None:
    """Print which level reads which.

    Prints a graph for each stage of `mlo run NAME`, and takes the same options.
    """
    stages: dict[str, list[str]] = {}
    for stage, build, _ in make_job(context, name, preset, config, help, help_all).stages():
        stages.setdefault(str(build().graph), []).append(stage)
    print("\n\n".join(f"{', '.join(names)}:\n{graph}" for graph, names in stages.items()))


app.command(name="list")(list_all)


def _execute(run: "Run") -> None:
    with stoppable(f"{distributed.launcher()} resume {shlex.quote(str(run.path))}"):
        run.execute()
    if distributed.is_main():
        print(f"finished: {run.path}")


def main() -> None:
    """Run the command. The exit code is 2 if an option is wrong, 130 if the command was stopped, 1 at other errors."""
    with distributed.processes():
        try:
            sys.exit(app(prog_name="mlo", standalone_mode=False) or 0)
        except _UsageError as error:
            if distributed.is_main():
                print(f"error: {brief(error.format_message())}", file=sys.stderr)
            sys.exit(2)
        except MloError as error:
            if distributed.prints_error(error):
                where = "" if distributed.is_main() else f" in process {distributed.rank()}"
                print(f"error{where}: {brief(str(error))}", file=sys.stderr, flush=True)
            sys.exit(2 if isinstance(error, ConfigError) else 1)
