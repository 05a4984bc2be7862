"""The help of `mlo run NAME` and other commands that take a job's options, and their completion in a shell."""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer import Context
from typer.core import TyperCommand

from mlo.errors import ConfigError
from mlo.options import registry
from mlo.options.config import KIND, Option, options, parts, registered, shown
from mlo.runs.job import Job, load_job


def job_help(context: Context, name: str, model: type[Job], every: bool) -> str:
    """The help page of a command with a job: its main options, or all of them.

    The main options are those that the job's ``main_options`` name, or all that its class declares.
    """
    command = f"mlo {context.info_name} {name}"
    page = context.make_formatter()
    grid = "--output DIR [--grid.OPTION LIST]... " if context.info_name == "sweep" else ""
    page.write_usage(command, f"{grid}[--OPTION VALUE]...")
    page.write_paragraph()
    page.write_text((inspect.getdoc(model) or "") if every else registry.summary(model))
    for title, found in (_all_sections(model) if every else _main_sections(model)).items():
        names = [f"--{_dashed(option.path)}" for option in found]
        room = None if every else page.width - max(map(len, names)) - 6
        with page.section(title):
            page.write_dl([(name, _meaning(option, room)) for name, option in zip(names, found, strict=True)], 40)
    records: list[Any] = [(f"--preset {name}", _first_comment(path)) for name, path in model.presets.items()]
    records += [p.get_help_record(context) for p in context.command.params if p.name != "preset"]
    with page.section(f"Options of mlo {context.info_name}"):
        page.write_dl([record for record in records if record and re.match("--(?!help)", record[0])], 40)
    examples = [example for example in model.examples if f"{example} ".startswith(f"{command} ")]
    if examples:
        with page.section("Examples"):
            page.write("".join(f"  {example}\n" for example in examples))
    page.write_paragraph()
    notes = (
        "Write a list as '[1, 2]' and no value as null. A switch needs no VALUE. A FILE.yaml holds the same options."
    )
    page.write_text(notes if every else f"{command} --help-all shows all options.")
    return page.getvalue()


def _main_sections(model: type[Job]) -> dict[str, list[Option]]:
    known = list(options(model, kinds=False))
    own = [name for base in model.__mro__ if base not in Job.__mro__ for name in inspect.get_annotations(base)]
    return {
        title: [option for name in names for option in known if f"{option.path}.".startswith(f"{name}.")]
        for title, names in (model.main_options or {"Options": own}).items()
    }


def _all_sections(model: type[Job]) -> dict[str, list[Option]]:
    """The options of the job, then those of each class that can be chosen by name, at its first place."""
    sections: dict[Any, list[Option]] = {}
    for option in options(model):
        found = sections.setdefault(option.choice and option.choice[2], [option])
        if option.choice == found[0].choice and option not in found:
            found.append(option)
    return {_title(found[0]): found for found in sections.values()}


def _title(option: Option) -> str:
    if not option.choice:
        return "Options"
    path, kind, chosen = option.choice
    return f"--{_dashed(path)} {kind}: {registry.summary(chosen)}"


def _dashed(path: str) -> str:
    return path.replace("_", "-")


def _meaning(option: Option, room: int | None) -> str:
    """The description, the type and the default; or, on one line, the first part of the description and the default."""
    value = mark.dump(option.default) if (mark := registered(option.field)) else option.default
    value = value[KIND] if isinstance(value, dict) and KIND in value else value
    default = "required" if value is PydanticUndefined else "default " + shown(value).replace('"', "")
    kinds = " | ".join(_choices(option.field)) or inspect.formatannotation(option.field.annotation)
    text, kinds = option.field.description or "", kinds.replace("None", "null")
    if room is None:
        return f"{text} ({kinds}; {default})".lstrip()
    return f"{shorten(text.partition(';')[0] or kinds, room - len(default) - 3, placeholder='...')} ({default})"


def _first_comment(path: Path) -> str:
    """The comment in the first line of a YAML file, or nothing."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _choices(field: FieldInfo) -> list[str]:
    """The words that an option takes; none if it takes numbers or any text."""
    if mark := registered(field):
        return list(registry.entries(mark.group))
    inside = list(parts(field.annotation))
    return [part for part in inside if isinstance(part, str)] + ["true", "false"] * (bool in inside)


class JobCommand(TyperCommand):
    """A command whose argument is a job and whose options are the job's too, also when a shell completes them."""

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Completions of the command's own options, and of the job's options and their values."""
        item = type(super().shell_complete(ctx, "--")[0])  # typer has no public name for it
        found = {word: meaning for word, meaning in _completions(ctx, incomplete) if word.startswith(incomplete)}
        return [*super().shell_complete(ctx, incomplete), *(item(word, help=found[word]) for word in found)]


def _completions(context: Context, incomplete: str) -> Iterator[tuple[str, str]]:
    try:
        model = load_job(context.params.get("name") or "")
    except ConfigError:  # a shell that completes has no place for errors
        return
    plain, grid = "--", "--grid."
    start = grid if incomplete.startswith(grid) else plain
    known = list(options(model, kinds=False))
    if any(incomplete.startswith(f"{start}{_dashed(option.path)}.") for option in known if registered(option.field)):
        known = list(options(model))  # only here, because it imports the classes that can be chosen
    last = context.args[-1] if context.args else ""
    for option in known:
        if last in (f"--{_dashed(option.path)}", f"--{option.path}") and not incomplete.startswith("-"):
            yield from ((word, "") for word in _choices(option.field))
        elif incomplete.startswith("-"):
            for prefix in [plain, grid] if context.info_name == "sweep" else [plain]:
                yield f"{prefix}{_dashed(option.path)}", option.field.description or ""


def summary_of(group: str, name: str) -> str:
    """A line about a registered name, also where it cannot be loaded."""
    try:
        return registry.summary_of(group, name)
    except ConfigError as error:
        return f"(broken: {error})"


def complete_names(group: str) -> Callable[[str], list[str]]:
    """A completion of the names in an entry-point group."""
    return lambda incomplete: [name for name in registry.entries(group) if name.startswith(incomplete)]
