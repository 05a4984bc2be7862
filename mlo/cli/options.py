"""Reads `--nested.option VALUE` on the command line into plain data."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from mlo.errors import ConfigError
from mlo.options.config import Config, options, parts, type_text
from mlo.options.yaml_options import KIND, merge, nested, parse_yaml, shown

GRID = "grid."


def read_options(model: type[Config], words: Sequence[str]) -> dict[str, Any]:
    """The nested mapping for the `--option VALUE`, `--option=VALUE` and `--switch` (true) of a command line.

    Raises:
        ConfigError: if a word is neither an option nor a value, an option is given twice, a value is not valid YAML,
            or an option that is not a switch has no value.
    """
    return _nest(model, _pairs(words))


def read_sweep(model: type[Config], words: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The options that all runs have, as :func:`read_options`, and {dotted name: values} of each `--grid.OPTION LIST`.

    Raises:
        ConfigError: as :func:`read_options`, and if an option in the grid has no list of values.
    """
    pairs = _pairs(words)
    lists = {path.removeprefix(GRID): pairs.pop(path) for path in list(pairs) if path.startswith(GRID)}
    grid: dict[str, list[Any]] = {}
    fields = _fields(model)
    for path, text in lists.items():
        items = _items(text or "")
        if not items:
            given = "has no value" if text is None else f"{shown(text)} is not a list of values"
            raise ConfigError(f"--{GRID}{path}: {given}; write --{GRID}{path} '[a, b]'")
        grid[path] = [_value(path, item, fields.get(path, [])) for item in items]
    return _nest(model, pairs), grid


def _nest(model: type[Config], pairs: Mapping[str, str | None]) -> dict[str, Any]:
    fields = _fields(model)
    data: dict[str, Any] = {}
    # a section before its options, and the name of a choice before the options of the chosen class
    for path in sorted(pairs, key=lambda path: (path.count("."), path.rpartition(".")[2] != KIND)):
        data = merge(data, nested(path.split("."), _value(path, pairs[path], fields.get(path, []))))
    return data


def _items(text: str) -> list[str]:
    """The texts of the items of a YAML list; none if it is not a list."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return []
    return [
        item.value if getattr(item, "style", None) in ("'", '"') else text[item.start_mark.index : item.end_mark.index]
        for item in (node.value if isinstance(node, yaml.SequenceNode) else [])
    ]


def _pairs(words: Sequence[str]) -> dict[str, str | None]:
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


def _value(path: str, text: str | None, fields: Sequence[FieldInfo]) -> Any:
    """The value for an option's text: the text itself where the option takes it, else what it is in YAML."""
    if text is None:
        if fields and not any(bool in parts(field.annotation) for field in fields):
            raise ConfigError(f"--{path}: has no value; write --{path} VALUE ({type_text(fields[0])})")
        return True
    if text != "null" and any(_takes(field, text) for field in fields):
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", error)
        raise ConfigError(f"--{path}: {shown(text)} is not valid YAML: {reason}") from error


def _takes(field: FieldInfo, text: str) -> bool:
    try:
        TypeAdapter(field.rebuild_annotation()).validate_json(json.dumps(text), strict=True)
    except ValidationError:
        return False
    return True


def _fields(model: type[Config]) -> dict[str, list[FieldInfo]]:
    """{dotted name: the option, of each class that can be chosen}."""
    fields: dict[str, list[FieldInfo]] = {}
    for option in options(model):
        fields.setdefault(option.path, []).append(option.field)
    return fields
