"""Reads `--nested.option VALUE` on the command line into plain data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from mlo.errors import ConfigError
from mlo.options.config import KIND, Config, options, parts, registered, shown
from mlo.options.yaml_options import merge, nested, parse_yaml

GRID = "grid."


def read_options(model: type[Config], words: Sequence[str]) -> dict[str, Any]:
    """The nested mapping for the `--option VALUE`, `--option=VALUE` and `--switch` (true) of a command line.

    A VALUE is YAML, except that an option that can be text takes any VALUE as its text.

    Raises:
        ConfigError: if a word is neither an option nor a value, or an option is given twice, has no value and is not a
            switch, or has a value that is not YAML.
    """
    return _nested(_values(model, words))


def read_sweep(model: type[Config], words: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The options that all runs have, as :func:`read_options`, and {dotted name: values} of each `--grid.OPTION LIST`.

    Raises:
        ConfigError: as :func:`read_options`, and if an option in the grid has no list of values.
    """
    values = _values(model, words)
    grid = {path.removeprefix(GRID): values.pop(path) for path in list(values) if path.startswith(GRID)}
    for path, items in grid.items():
        if not isinstance(items, list) or not items:
            raise ConfigError(f"--{GRID}{path}: {shown(items)} is not a list of values; write --{GRID}{path} '[a, b]'")
    return _nested(values), grid


def _values(model: type[Config], words: Sequence[str]) -> dict[str, Any]:
    """{dotted name: value} of the options among the words."""
    fields = {option.path: option.field for option in options(model)}
    found = {}
    for path, text in _texts(words).items():
        field = fields.get(path.removeprefix(GRID))
        if text is None and field and bool not in parts(field.annotation):
            raise ConfigError(f"--{path}: has no value; write --{path} VALUE")
        if text is None or (path in fields and text != "null" and _is_text(fields[path])):
            found[path] = True if text is None else text
            continue
        try:
            found[path] = parse_yaml(text)
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", error)
            raise ConfigError(f"--{path}: {shown(text)} is not valid YAML: {reason}") from error
    return found


def _texts(words: Sequence[str]) -> dict[str, str | None]:
    """{dotted name: text of the value} of the options among the words; None where no value follows."""
    found: dict[str, str | None] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"{word!r} is not an option; write --option VALUE, and quote a VALUE that has spaces")
        name, equals, text = word[2:].partition("=")
        path, value = name.replace("-", "_"), text if equals else None
        if not equals and waiting and not waiting[0].startswith("--"):
            value = waiting.pop(0)
        if path in found:
            raise ConfigError(f"--{path}: is given twice, as {found[path]} and as {value}; give it once")
        found[path] = value
    return found


def _is_text(field: FieldInfo) -> bool:
    """Whether an option can be any text, itself and not only in a list."""
    union = get_args(field.annotation) if get_origin(field.annotation) is not tuple else ()
    return not registered(field) and any(kind in (str, Path) for kind in (field.annotation, *union))


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    # a section before its options, and the name of a choice before the options of the chosen class
    for path in sorted(values, key=lambda path: (path.count("."), path.rpartition(".")[2] != KIND)):
        data = merge(data, nested(path.split("."), values[path]))
    return data
