"""What the commands that take a job have in common: their arguments, and how these make the job."""

import sys
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import typer

from mlo.cli.help import complete_names, job_help
from mlo.cli.options import read_options
from mlo.errors import ConfigError
from mlo.options import registry
from mlo.options.config import defaults, validate
from mlo.options.yaml_options import merge, read_yaml
from mlo.runs.job import Job, load_job

EXTRA_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
Name = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME",
        help="The job; `mlo list` shows the names.",
        show_default=False,
        autocompletion=complete_names(registry.PROBLEMS),
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE.yaml", help="A file of options; those on the command line have precedence."),
]
Preset = Annotated[
    str | None,
    typer.Option(metavar="PRESET", help="A named set of options of the job; other options have precedence."),
]
Help = Annotated[bool, typer.Option("--help", "-h", help="Show help; with a NAME, the job's main options.")]
HelpAll = Annotated[bool, typer.Option("--help-all", help="Show all options of the job.")]
Workers = Annotated[int, typer.Option(min=1, metavar="N", help="How many runs at a time, each in its own process.")]
OneCoreEach = Annotated[bool, typer.Option("--one-core-each", help="Keep each process on its own CPU core.")]


def job_class(context: typer.Context, name: str | None, help: bool, help_all: bool) -> type[Job]:
    """The job's class; where help is asked for or there is no name, the help is printed and the command ends."""
    if name is None:
        print(context.get_help())
        sys.exit(0 if help or help_all else 2)
    if name.startswith("-"):
        raise ConfigError(f"the name comes first: mlo {context.info_name} NAME {name} ...; `mlo list` shows the names")
    model = load_job(name)
    if help or help_all:
        print(job_help(context, name, model, help_all), end="")
        sys.exit(0)
    return model


def make_job(
    context: typer.Context, name: str | None, preset: str | None, config: Path | None, help: bool, help_all: bool
) -> Job:
    """The job of a command line."""
    model = job_class(context, name, help, help_all)
    data = merged(model, preset, config, read_options(model, context.args))
    try:
        return validate(model, data, str(name))
    except ConfigError as error:
        raise ConfigError(f"{error}\n`mlo run {name} --help-all` shows all options") from None


def merged(model: type[Job], preset: str | None, config: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, updated with the options of the preset, then of the file, and then of the command line.

    Raises:
        ConfigError: if the job has no such preset, or a file cannot be read.
    """
    if preset is not None and preset not in model.presets:
        names = registry.unknown(preset, model.presets, "among the presets of this job")
        raise ConfigError(f"--preset: {names if model.presets else 'this job has no presets; leave it out'}")
    files = [model.presets[preset]] if preset is not None else []
    files += [config] if config else []
    return reduce(merge, [*map(read_yaml, files), given], defaults(model))
