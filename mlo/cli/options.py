"""The options of a job on the command line: `--nested.option VALUE` read into plain data, and their help."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlo.errors import ConfigError
from mlo.options import registry
from mlo.options.config import Config, Registered, defaults, option_model, parts, registered
from mlo.options.yaml_options import KIND, merge, nested, parse_yaml, shown


def read_options(model: type[Config], words: Sequence[str]) -> dict[str, Any]:
    """The plain data that `--option VALUE`, `--option=VALUE` and `--switch` (true) on a command line stand for.

    A value is read as YAML, and as it stands where the option is text.

    Raises:
        ConfigError: if a word is neither an option nor the value of one, a value is no YAML, or what is no switch has
            none.
    """
    data: dict[str, Any] = {}
    given = [
        (path, _switched_on(model, path) if text is None else _value(model, path, text)) for path, text in _pairs(words)
    ]
    # what chooses a kind comes before that kind's options, wherever it is typed
    for path, value in sorted(given, key=lambda pair: (len(pair[0]), pair[0][-1] != KIND)):
        data = merge(data, nested(path, value))
    return data


def part_grid(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line without its `--grid.OPTION LIST`, and those words as `--OPTION LIST`."""
    others: list[str] = []
    grid: list[str] = []
    into = others
    for word in words:
        if word.startswith("--"):
            into = grid if word.startswith("--grid.") else others
        into.append(word.replace("--grid.", "--", 1) if into is grid else word)
    return others, grid


def read_grid(model: type[Config], words: Sequence[str]) -> dict[str, list[Any]]:
    """{dotted name: its values} of `--option '[a, b]'`; each value is read as that of the option would be.

    Raises:
        ConfigError: as :func:`read_options`, and if an option has no list of values, or no list of lists if it is one.
    """
    grid: dict[str, list[Any]] = {}
    for path, text in _pairs(words):
        name = ".".join(path)
        items = _items(text or "")
        if not items:
            fault = "has no values" if text is None else f"{shown(text)} is no list of values"
            raise ConfigError(f"--grid.{name}: {fault}; write --grid.{name} '[a, b]'")
        if name in grid:
            raise ConfigError(f"--grid.{name}: is given twice; write all its values into one list")
        grid[name] = [_value(model, path, item) for item in items]
        listed = any(get_origin(field.annotation) in (tuple, list) for field in _fields(model, path))
        if listed and not all(isinstance(value, list) for value in grid[name]):
            raise ConfigError(f"--grid.{name}: each value is a list itself; write --grid.{name} '[[a], [a, b]]'")
    return grid


def _items(text: str) -> list[str]:
    """The texts of the items of a YAML list; none if it is no list."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return []
    return [
        item.value if getattr(item, "style", None) in ("'", '"') else text[item.start_mark.index : item.end_mark.index]
        for item in (node.value if isinstance(node, yaml.SequenceNode) else [])
    ]


def _pairs(words: Sequence[str]) -> Iterator[tuple[list[str], str | None]]:
    """(path, text of the value) of each option among the words of a command line; None where no value follows."""
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(
                f"{word!r} belongs to no option; write --option VALUE, and quote a VALUE that holds spaces"
            )
        name, given, text = word[2:].partition("=")
        follows = waiting and not waiting[0].startswith("--")
        yield name.replace("-", "_").split("."), text if given else waiting.pop(0) if follows else None


def _switched_on(model: type[Config], path: Sequence[str]) -> bool:
    """The value of an option that has none: true, unless it cannot be that (of a section, more is said later)."""
    fields = _fields(model, path)
    if fields and not any(bool in parts(field.annotation) or option_model(field, None) for field in fields):
        name = ".".join(path)
        raise ConfigError(f"--{name}: has no value; write --{name} VALUE ({type_text(fields[0])})")
    return True


def _value(model: type[Config], path: Sequence[str], text: str) -> Any:
    """The value of an option's text; text stays text where the option takes it."""
    fields = [field for field in _fields(model, path) if not registered(field)]
    if text != "null" and any(_takes(field.annotation, text) for field in fields):
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", error)
        raise ConfigError(
            f"--{'.'.join(path)}: {shown(text)} cannot be read as a value ({reason}); a VALUE that holds spaces is "
            f"quoted: --{'.'.join(path)} '[a, b]'"
        ) from error


def _fields(model: type[BaseModel], path: Sequence[str]) -> list[FieldInfo]:
    """What a dotted name stands for: nothing, one option, or one of each kind that can be chosen."""
    field = model.model_fields.get(path[0])
    if field is None or len(path) == 1:
        return [field] if field else []
    mark, one = registered(field), option_model(field, None)
    below = mark.kinds().values() if mark else [one] if one else []
    return [found for kind in below for found in _fields(kind, path[1:])]


def _takes(annotation: Any, text: str) -> bool:
    """Whether an option of this type takes this text as it stands."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return text in inner
    if origin in (Union, UnionType, Annotated):
        return any(_takes(branch, text) for branch in inner)
    return isinstance(annotation, type) and issubclass(annotation, str | PurePath)


def print_help(name: str, model: type[Config], console: Console) -> None:
    """Every option of a job: how it is written, what it means, its type and its default."""
    _say(console, f"mlo run {name} [--option VALUE]... [--config FILE.yaml] [--output DIR]\n", style="bold")
    _say(console, f"{inspect.getdoc(model) or ''}\n\nOptions, which a FILE.yaml can hold as well:")
    waiting = _print_options(model, "", console)
    told: set[str] = set()
    while waiting:
        path, mark = waiting.pop(0)
        if mark.group in told:
            continue
        told.add(mark.group)
        for kind in registry.entries(mark.group):
            waiting += _print_kind(path, kind, mark, console)
    _say(console, "A list is written '[1, 2]', nothing at all null, and a switch without a VALUE is true.")


def _print_kind(path: str, kind: str, mark: Registered, console: Console) -> list[tuple[str, Registered]]:
    try:
        model = mark.model(kind)
    except ValueError as error:
        _say(console, f"--{path} {kind}: {error}\n", style="red")
        return []
    _say(console, f"--{path} {kind}", style="bold")
    _say(console, registry.summary(model))
    return _print_options(model, f"{path}.", console)


def _print_options(model: type[BaseModel], prefix: str, console: Console) -> list[tuple[str, Registered]]:
    """Print the options of a model; those that are chosen by a registered name are given back, for their kinds."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 1))
    chosen = []
    for path, field, default in _rows(model, prefix, defaults(model)):
        table.add_row(Text(f"--{path.replace('_', '-')}", style="cyan"), _meaning(field, default))
        mark = registered(field)
        if mark:
            chosen.append((path, mark))
    if table.rows:
        console.print(table)
    console.print()
    return chosen


def _meaning(field: FieldInfo, default: str) -> Text:
    return Text.assemble(f"{field.description or ''} ".lstrip(), (f"({type_text(field)}; {default})", "dim"))


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style))


def _rows(model: type[BaseModel], prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, FieldInfo, str]]:
    """(dotted path, field, default as text) of each option, those of nested models in their place."""
    for name, field in model.model_fields.items():
        value = values.get(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) and not registered(field):
            yield from _rows(field.annotation, f"{prefix}{name}.", value or {})
        else:
            yield prefix + name, field, f"default {_default_text(field, value)}" if name in values else "must be given"


def _default_text(field: FieldInfo, value: Any) -> str:
    """A default as a user would write it: of a registered one, the kind and what differs from the kind's defaults."""
    below = option_model(field, value)
    if isinstance(value, Mapping) and below and KIND in value:
        usual = defaults(below)
        special = {name: given for name, given in value.items() if name != KIND and given != usual.get(name)}
        value = {KIND: value[KIND], **special} if special else value[KIND]
    return value if isinstance(value, str) else shown(value)


def type_text(field: FieldInfo) -> str:
    """An option's type as a user would write it, with its bounds: `int >= 1`, `true | false`, `a | b`."""
    mark = registered(field)
    text = " | ".join(registry.entries(mark.group)) if mark else _annotation_text(field.annotation)
    bounds = [f"{sign} {getattr(m, key)}" for m in field.metadata for key, sign in BOUNDS.items() if hasattr(m, key)]
    alternatives = text.split(" | null") if bounds else [text]
    return " | null".join([" ".join([alternatives[0], *bounds]), *alternatives[1:]])


BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
WORDS: dict[Any, str] = {NoneType: "null", bool: "true | false", str: "text", float: "number", ...: "..."}


def _annotation_text(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in inner)
    if origin in (Union, UnionType):
        return " | ".join(_annotation_text(branch) for branch in inner)
    if origin is Annotated:
        return _annotation_text(inner[0])
    if origin in (tuple, list):
        return "[" + ", ".join(_annotation_text(item) for item in inner) + (", ...]" if origin is list else "]")
    if origin is dict:
        return "{" + ": ".join(_annotation_text(item) for item in inner) + "}"
    return WORDS.get(annotation) or getattr(annotation, "__name__", str(annotation)).lower()
